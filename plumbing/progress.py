"""How far a long job is, how fast it goes, and how to print that."""

import sys
import time


class Progress:
    """
    Shows the progress of work that takes longer than two seconds, as one line on stderr: redrawn in
    place on a terminal, printed every ten seconds anywhere else.

    what    names the work, for example "downloading input.txt"
    total   bytes to process; 0 if unknown
    done    bytes processed before this run, which do not count towards its speed
    """

    def __init__(self, what, total, done=0):
        self.what = what
        self.total = total
        self.done_before = done
        self.start = time.monotonic()
        self.next_line = self.start + 2
        self.shown = False

    def __call__(self, done):
        """Call this often, with the number of bytes processed so far."""
        now = time.monotonic()
        finished = done == self.total
        if now < self.next_line and not (finished and self.shown):
            return
        line = f"{self.what}: {done / 1e6:,.1f}"
        if self.total:
            bytes_per_second = max(done - self.done_before, 1) / max(now - self.start, 1e-3)
            seconds_left = (self.total - done) / bytes_per_second
            line += f" of {self.total / 1e6:,.1f} MB, {seconds_left:,.0f} s left"
        else:
            line += " MB"
        terminal = sys.stderr.isatty()
        end = "\r" if terminal and not finished else "\n"
        print(line, end=end, file=sys.stderr, flush=True)
        self.shown = True
        self.next_line = now + (0.5 if terminal else 10)


class Stopwatch:
    """
    Measures the time spent training. It runs from the start and stands still from pause(), called
    before an evaluation or a save, to resume(). Calling either twice in a row does no harm.
    """

    def __init__(self):
        self.created = time.perf_counter()
        self.running_since = self.created   # None while paused
        self.lap_seconds = 0.0              # of this lap, up to running_since or to the pause

    def pause(self):
        if self.running_since is not None:
            self.lap_seconds += time.perf_counter() - self.running_since
            self.running_since = None

    def resume(self):
        self.pause()
        self.running_since = time.perf_counter()

    def lap(self):
        """Seconds since the last lap without the pauses; starts the next lap."""
        paused = self.running_since is None
        self.pause()
        seconds = self.lap_seconds
        self.lap_seconds = 0.0
        if not paused:
            self.resume()
        return seconds

    def elapsed(self):
        """Seconds since the stopwatch was made, with the pauses."""
        return time.perf_counter() - self.created


def clock(seconds):
    """4000 -> "1h06m", 65 -> "1m05s" """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s"


def sparkline(values):
    """[3.0, 2.0, 1.5] -> "█▃▁" """
    bars = "▁▂▃▄▅▆▇█"
    low = min(values)
    spread = (max(values) - low) or 1   # equal values: no division by zero
    return "".join(bars[round(7 * (v - low) / spread)] for v in values)
