"""Cloud TPU machines without a scheduler; standard library only. `__main__` describes the use.

A subcommand is a generator: it yields what to do (`commands`) and receives (rc, stdout, stderr). A
dry run prints the same list that is executed otherwise.
"""

import pathlib

REPO = pathlib.Path(__file__).resolve().parents[2]


class LaunchError(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code
