"""Ctrl-C, SIGTERM and SIGHUP end a run after its step; a second Ctrl-C ends it at once."""

import os
import signal

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):   # the terminal was closed; Windows has none
    SIGNALS.append(signal.SIGHUP)


class StopSignals:
    """
    `with StopSignals() as signals`: signals.received() is None or the name of the first of
    SIGNALS that arrived. The end of the block restores the previous handlers. Main thread only.

    under_torchrun   torchrun says by itself that a signal has arrived; and its own end, without
                     which nobody could end this process any more, counts as a signal
    """

    def __init__(self, under_torchrun=False):
        self.under_torchrun = under_torchrun
        self.parent = os.getppid()
        self.first = None
        self.handlers_before = {}

    def received(self):
        if self.first is None and self.under_torchrun and os.getppid() != self.parent:
            self.first = "torchrun is gone"
        return self.first

    def __enter__(self):
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:   # by nohup, for example
                continue
            self.handlers_before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.first = self.first or signal.Signals(number).name   # of two at once, the first
        if not self.under_torchrun:   # not by print, which this signal may have interrupted
            os.write(2, b"finishing this step; Ctrl-C once more stops at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Schedulers send SIGTERM to torchrun and to its processes, so it arrives here twice.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
