"""Lines with the time left, for work of minutes."""

import time

REPORT_EVERY = 30.0     # seconds


def report_progress(say, name, num, unit="images"):
    """-> progress(done): every half minute, a line with the time left."""
    here = None      # (time, done) at the first call: shards of an earlier run take no time
    last = time.monotonic()

    def progress(done):
        nonlocal here, last
        now = time.monotonic()
        here = here or (now, done)
        if now - last >= REPORT_EVERY and here[1] < done < num:
            left = (now - here[0]) / (done - here[1]) * (num - done)
            last = now
            say(f"{name}: {done:,} of {num:,} {unit}, about {left / 60:.1f} min left")

    return progress
