"""One generator a step: create, setup, train, status, logs, stop, delete, doctor.

`o` are the parsed options; `vms` the machines' names, which only Compute Engine needs.
"""

import hashlib
import pathlib
import re
import shlex
import time
from typing import NamedTuple

from cloud_tpu import REPO, LaunchError, compute_engine, queued_resources, staging
from cloud_tpu.commands import Command, Local, Message, Sleep, last_line, not_found, run_all

APIS = {"tpu": queued_resources, "gce": compute_engine}
FAILED_CREATIONS = 5


def state_of(o, dry="ACTIVE"):
    """-> (state, vms): ABSENT, WAITING, ACTIVE, FAILED or LOST."""
    rc, out, err = yield APIS[o.api].describe_command(o, dry)
    if rc and not_found(out + err):
        return "ABSENT", []
    if rc:
        raise LaunchError(last_line(err) or "gcloud failed")
    return APIS[o.api].read_state(o, out)


def create(o):
    """Until the machines are there; returns the names of the machines (Compute Engine)."""
    started, failed, dry = time.monotonic(), 0, "ABSENT"
    while True:
        state, vms = yield from state_of(o, dry)
        dry = "ACTIVE"
        if state == "ACTIVE":
            return vms
        if state in ("FAILED", "LOST"):
            failed += state == "FAILED"
            if failed >= FAILED_CREATIONS:
                raise LaunchError(f"{o.name}: {failed} requests in a row FAILED; gcloud compute "
                                  f"tpus queued-resources describe {o.name} --zone={o.zone} shows "
                                  "the reason")
            yield Message(f"{o.name} is {state.lower()}: deleting what is left of it")
            yield from delete(o)
            yield Sleep(o.backoff * failed)
            continue
        if state == "ABSENT":
            yield Message(f"creating {o.name}: {o.accelerator}, {o.provision}, {o.zone}")
            for command in APIS[o.api].create_commands(o):
                rc, out, err = yield command
                # Already exists (created by an earlier run): look again.
                if rc and not re.search("already.?exists", out + err, re.IGNORECASE):
                    raise LaunchError(explain(o, err))
        if time.monotonic() - started > o.wait_timeout:
            raise LaunchError(f"{o.name}: still no machines after {o.wait_timeout} s "
                              "(--wait-timeout); the request stays")
        yield Sleep(o.poll)


def delete(o):
    """Deletes everything under the name; absent is fine."""
    for command in APIS[o.api].delete_commands(o):
        rc, out, err = yield command
        if rc and not not_found(out + err):
            raise LaunchError(explain(o, err))


def explain(o, err: str) -> str:
    """gcloud's last line, with what to do about the usual ones."""
    line = last_line(err)
    if re.search("permission|forbidden|403", err, re.IGNORECASE):
        return f"{line}; needs the role TPU Admin (roles/tpu.admin) in the project"
    if re.search("quota|resource_exhausted", err, re.IGNORECASE):
        return f"{line}; no quota for {o.accelerator} ({o.provision}) in {o.zone}"
    return line or "gcloud failed"


def on_machines(step):
    """`step(o, vms)` as a subcommand, for machines that exist."""
    def subcommand(o):
        vms = None
        if APIS[o.api].NEEDS_NAMES:
            state, vms = yield from state_of(o)
            if state != "ACTIVE":
                raise LaunchError(f"{o.name} is {state.lower()}; run create first")
        return (yield from step(o, vms))
    return subcommand


def host(o, vms, what: str, *words, worker="all", dry="", quiet=False, check=True):
    """The commands that run `host.sh WHAT WORDS` on the workers."""
    remote = shlex.join(["sh", "ddpm/host.sh", what, *map(str, words)])
    return APIS[o.api].ssh_commands(o, vms, remote, worker, dry=(0, dry), quiet=quiet, check=check)


def setup(o, vms=None, check=True):
    """Wheel, configs and host.sh to every worker; the environment is made where it differs."""
    folder = staging.folder_of(o)
    yield Local(lambda: staging.clear(REPO / folder))
    if o.wheel:
        yield Local(lambda: staging.copy_into(pathlib.Path(o.wheel), REPO / folder))
    else:
        yield Command([o.python, "-m", "pip", "wheel", "--no-deps", "--quiet",
                       f"--wheel-dir={folder}", "."])
    yield Local(lambda: staging.stage(REPO / folder, o.ship))
    rc, _, _ = yield from run_all(
        APIS[o.api].scp_commands(o, vms, str(folder), check=check))
    if not rc:
        rc, _, _ = yield from run_all(host(o, vms, "setup", "ddpm", o.extra, check=check))
    return rc


def key(o) -> str:
    """Names the command, so that what another one left behind is not taken for its result."""
    return hashlib.sha256("\0".join(o.command).encode()).hexdigest()[:8]


def train(o, vms=None):
    """Starts the command on every worker, detached."""
    words = [f"--key={key(o)}", *(["--replace"] if o.replace else [])]
    env = {"JAX_COORDINATOR_PORT": str(o.port), "DDPM_HEARTBEAT": str(o.heartbeat)}
    if o.init_timeout:
        env["DDPM_INIT_TIMEOUT"] = str(o.init_timeout)
    env.update(pair.split("=", 1) for pair in o.env)
    words = APIS[o.api].start_words(words, env)
    rc, _, _ = yield from run_all(host(o, vms, "start", o.name, *words, "--", *o.command))
    return rc


def stop(o, vms=None, check=True, grace=None):
    """Ends the command on every worker: TERM, and KILL after `grace` seconds."""
    seconds = o.stop_grace if grace is None else min(grace, o.stop_grace)
    rc, _, _ = yield from run_all(host(o, vms, "stop", o.name, seconds, check=check))
    return rc


def status(o):
    state, vms = yield from state_of(o)
    yield Message(f"{o.name}: {state}")
    if state != "ACTIVE":
        return 0
    rc, _, _ = yield from run_all(host(o, vms, "status", o.name))
    return rc


def logs(o, vms=None, lines=None, worker=None, check=True):
    rc, _, _ = yield from run_all(host(o, vms, "logs", o.name, lines or o.lines,
                                       worker=worker or o.worker, check=check))
    return rc


def doctor(o):
    yield Command(["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"],
                  dry=(0, "you"))
    words = ["--", "ddpm", "doctor", "--pod", *([f"--workdir={o.workdir}"] if o.workdir else [])]
    rc, _, _ = yield from on_machines(
        lambda o, vms: run_all(host(o, vms, "run", *words)))(o)
    return rc


class Worker(NamedTuple):
    """What one worker's `host.sh status` prints. state: running, exited, lost or absent."""

    host: str
    state: str
    rc: int | None
    key: str
    last: str


def parse_status(text: str) -> list[Worker]:
    """The ddpm-status lines among whatever else ssh printed."""
    found = re.findall(r"ddpm-status host=(\S+) state=(\w+) rc=(\S+) .*? key=(\S+) last=(.*)",
                       text)
    return [Worker(h, s, int(rc) if rc != "-" else None, *rest) for h, s, rc, *rest in found]


def workers(o, vms, dry_state):
    """-> (worst rc, a Worker for each that answers)."""
    line = (f"ddpm-status host=w{{}} state={dry_state} rc="
            f"{'0' if dry_state == 'exited' else '-'} pid=- attempt=1 key={key(o)} last=-\n")
    dry = "".join(line.format(i) for i in range(APIS[o.api].workers_per_ssh(o)))
    rc, text, _ = yield from run_all(
        host(o, vms, "status", o.name, check=False, dry=dry, quiet=True))
    return rc, parse_status(text)


def latest_step(o, vms=None):
    """Newest checkpoint in --workdir as far as can be seen, else None."""
    if not o.workdir:
        return None
    if o.workdir.startswith("gs://"):
        command = Command(["gcloud", "storage", "ls", f"{o.workdir.rstrip('/')}/checkpoints/"],
                          check=False)
    else:
        [command] = host(o, vms, "latest", o.workdir, worker=0, check=False, quiet=True)
    _, out, _ = yield command
    steps = [int(x) for x in re.findall(r"(?:^|/)(\d+)/?\s*$", out, re.MULTILINE)]
    return max(steps, default=None)
