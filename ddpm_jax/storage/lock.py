"""One command at a time writes to a folder, local or at an address: a lock file with a heartbeat.

The file names the host, the process and the command, and its counter goes up every BEAT_S seconds.
A second command is refused while the first is alive, which has GRACE_S seconds to end. On the same
machine its end is known at once; a lock of another machine is watched for PATIENCE_S seconds, which
needs no clocks that agree.
"""

import contextlib
import math
import os
import pathlib
import secrets
import socket
import sys
import threading
import time

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

NAME = "lock.json"
BEAT_S = 15.0
GRACE_S = 10.0
PATIENCE_S = 60.0


def _started(pid) -> str | None:
    """When a process of this machine began, in a form that is only compared; None if it ended."""
    try:
        if os.path.exists("/proc/self/stat"):
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if stat[0] == "Z" else stat[19]
        os.kill(pid, 0)
        return ""
    except OSError as error:
        return "" if isinstance(error, PermissionError) else None


def _machine() -> str:
    """The host and, where containers share its name, the container."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _read(path) -> dict | None:
    try:
        return files.read_json(path) if files.exists(path) else None
    except UserError:
        return None  # cut short by a bucket's outage or removed in between


def _outlives(path, holder, say) -> bool:
    """Whether the process that wrote ``holder`` still runs after a while: one that a supervisor
    replaces may take some seconds to end."""
    here = holder.get("machine") == _machine()

    def ended():
        started = holder.get("started")
        return here and (started is None or _started(holder["pid"]) != started)

    if ended():
        return False
    patience, beat_at = GRACE_S if here else PATIENCE_S, -math.inf
    say(f"{path} is held by {_describe(holder)}: waiting up to {patience:.0f} s for it to end")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_S / 20))
        now = _read(path)
        if now is None or ended():
            return False
        if now != holder:
            holder, beat_at = now, time.monotonic()
    return here or time.monotonic() - beat_at < 2 * BEAT_S


def _describe(holder) -> str:
    host = str(holder.get("machine")).split(" ")[0]
    return f"process {holder.get('pid')} on {host} ({holder.get('command')})"


class Lock:
    """The lock of ``folder``, held from the start to ``release``.

    flag: what names the folder in messages. say(text) is called before a wait. name: of the file;
    locks of other names do not exclude this one. Raises UserError naming the holder where another
    live command has it, or that the folder cannot be written. A folder that it made and that is
    empty at the end is removed.
    """

    def __init__(self, folder, flag: str, say=lambda text: None, name=NAME):
        self.path = files.join(folder, name)
        self._mine = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()),
                      "command": " ".join(["ddpm", *sys.argv[1:2]]), "token": secrets.token_hex(8)}
        self._beats, self._stopped, self._taken = 0, threading.Event(), None
        advice = "choose a folder that you may write to"
        with files.storage_errors(folder, f"write to {flag}", advice):
            files.check_no_file(folder, flag)
            place = files.resolve(folder)
            self._made = not place.exists()
            place.mkdir(parents=True, exist_ok=True)
        holder = _read(self.path)
        if holder is not None and _outlives(self.path, holder, say):
            self._refuse(folder, flag, holder)
        self._beat()
        # Two that came at the same time both wrote: the later one is in the file.
        time.sleep(2.0 if files.is_remote(folder) else 0.05)
        now = _read(self.path)
        if now is not None and now.get("token") != self._mine["token"]:
            self._refuse(folder, flag, now)
        self._thread = threading.Thread(target=self._loop, name="lock", daemon=True)
        self._thread.start()

    def _refuse(self, folder, flag, holder):
        raise UserError(f"{flag}={folder} is in use by {_describe(holder)}: wait for it, stop it, "
                        f"or take another {flag}")

    def _beat(self):
        self._beats += 1
        files.write_json(self.path, self._mine | {"beat": self._beats})

    def _loop(self):
        while not self._stopped.wait(BEAT_S):
            with contextlib.suppress(UserError):  # a full disk or an outage is no reason to end
                now = _read(self.path)
                if now is not None and now.get("token") != self._mine["token"]:
                    self._taken = now
                    return
                self._beat()

    def check(self) -> None:
        """Raise UserError where another command took the lock, as after a suspended laptop."""
        if self._taken is not None:
            raise UserError(f"{self.path} was taken by {_describe(self._taken)} while this command "
                            "was suspended: this one ends")

    def release(self) -> None:
        self._stopped.set()
        self._thread.join()
        now = _read(self.path)
        if now is not None and now.get("token") == self._mine["token"]:
            with contextlib.suppress(OSError, UserError):
                files.remove(self.path)
                if self._made and not files.is_remote(self.path):
                    os.rmdir(os.path.dirname(self.path))  # refused where something is in it
