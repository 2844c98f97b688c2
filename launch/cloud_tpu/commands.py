"""What a subcommand can yield, and the two ways to go through it: a dry run, and for real."""

import os
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

from cloud_tpu import REPO, LaunchError

SSH_FAILED = 255


class Command(NamedTuple):
    """Something to run. `dry` is the (rc, stdout) that a dry run pretends to have received."""

    argv: list
    dry: tuple = (0, "")
    quiet: bool = True     # do not show its output
    check: bool = True     # a failure ends the launch with gcloud's last line


class Sleep(NamedTuple):
    seconds: float


class Message(NamedTuple):
    text: str


class Local(NamedTuple):
    """A step in this process, not a command; a dry run leaves it out."""

    function: object


def run_all(commands):
    """Runs a list; returns the worst rc and all output."""
    worst, text, errors = 0, "", ""
    for command in commands:
        rc, out, err = yield command
        worst, text, errors = max(worst, abs(rc)), text + out, errors + err
    return worst, text, errors


def dry_run(generator) -> int:
    """Prints the commands, one a line, quoted for a shell."""
    answer = None
    try:
        while True:
            item = generator.send(answer)
            answer = None
            if isinstance(item, Command):
                print(shlex.join(item.argv))
                answer = (*item.dry, "")
    except StopIteration:
        return 0


def execute(generator) -> int:
    """Does what the generator yields; -> its exit code."""
    actions = {Sleep: lambda item: time.sleep(item.seconds),
               Message: lambda item: write(sys.stderr, f"tpu.py: {item.text}\n"),
               Local: lambda item: item.function(), Command: _call}
    answer = None
    try:
        while True:
            item = generator.send(answer)
            answer = actions[type(item)](item)
    except StopIteration as end:
        return end.value if isinstance(end.value, int) else 0


def _call(command):
    try:
        done = subprocess.run(command.argv, capture_output=True, text=True, cwd=REPO,
                              stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(f"{command.argv[0]} is not installed: "
                          "https://cloud.google.com/sdk/docs/install") from None
    if not command.quiet:
        write(sys.stdout, done.stdout)
    if done.returncode and not command.quiet:
        write(sys.stderr, done.stderr)
    if done.returncode and command.check:
        raise LaunchError(f"{shlex.join(command.argv[:6])} ...: {last_line(done.stderr)}",
                          1 if done.returncode == SSH_FAILED else done.returncode)
    return done.returncode, done.stdout, done.stderr


def write(stream, text: str):
    """A supervisor goes on when its output has no reader."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def not_found(text: str) -> bool:
    return re.search(r"not.?found", text, re.IGNORECASE) is not None


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
