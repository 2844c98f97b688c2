"""Standard output and error that cannot end a run, and have colours on a terminal alone."""

import io
import os
import select
import sys

RED, GREEN, YELLOW = 31, 32, 33


def coloured(text: str, colour: int, stream=None) -> str:
    """``text`` for a stream (default: standard output); NO_COLOR and dumb terminals get none."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if plain or not (stream or sys.stdout).isatty():
        return text
    return f"\033[{colour}m{text}\033[0m"


class _Tolerant(io.FileIO):
    """Drops what cannot be written: the reader of a pipe or the terminal is gone, the disk full."""

    def write(self, data):
        try:
            while (count := super().write(data)) is None:  # another program set O_NONBLOCK
                select.select([], [self], [])
            return count
        except OSError:
            return memoryview(data).nbytes


def keep_writable():
    """Makes sys.stdout and sys.stderr drop what cannot be written; closed ones are /dev/null."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not None and (not hasattr(old, "buffer") or old.fileno() != number):
            continue  # not the process's own: a notebook's, a test's
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(_Tolerant(number, "w", closefd=False)),
            encoding=getattr(old, "encoding", "utf-8"), errors="backslashreplace",
            line_buffering=number == 2 or os.isatty(number),
            write_through=getattr(old, "write_through", False)))
