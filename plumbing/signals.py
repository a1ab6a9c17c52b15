"""Ctrl-C and SIGTERM end a run after the step it is in; a second Ctrl-C ends it at once."""

import os
import signal


class StopSignals:
    """
    `with StopSignals() as signals`: signals.received is None or the name of the first SIGINT or
    SIGTERM that arrived. The end of the block restores the previous handlers. Main thread only.

    announce   say on stderr that the signal has arrived; not under torchrun, which says so itself
    """

    def __init__(self, announce=True):
        self.announce = announce
        self.received = None
        self.handlers_before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers_before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.received = self.received or signal.Signals(number).name   # of two at once, the first
        if self.announce:   # not by print, which this signal may have interrupted
            os.write(2, b"finishing this step; Ctrl-C once more stops at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Schedulers send SIGTERM to torchrun and to its processes, so it arrives here twice.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
