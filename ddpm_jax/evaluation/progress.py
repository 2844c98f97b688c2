"""Lines with the time left, for work of minutes."""

import time

REPORT_EVERY = 30.0     # seconds


class Progress:
    """progress(done, total): a line through ``say`` every half minute."""

    def __init__(self, say, name, unit="images"):
        self._say, self._name, self._unit = say, name, unit
        self._first = None      # (time, done) at the first call: older shards take no time
        self._last = time.monotonic()

    def __call__(self, done, total):
        now = time.monotonic()
        self._first = self._first or (now, done)
        since, before = self._first
        if now - self._last >= REPORT_EVERY and before < done < total:
            self._last, left = now, (now - since) / (done - before) * (total - done)
            self._say(f"{self._name}: {done:,} of {total:,} {self._unit}, "
                      f"about {left / 60:.1f} min left")
