"""Run a program on Cloud TPU machines, where no scheduler does it: thin glue around gcloud.

    python launch/tpu.py supervise --name=cifar --accelerator=v5litepod-8 --zone=us-west4-a \\
        --spot --workdir=gs://BUCKET/cifar -- ddpm train --config=cifar10 --workdir=gs://BUCKET/cifar

create     request the machines and wait for them; no-op when they are there
setup      send wheel, configs and host.sh to every worker, make the environment; once per content
train      start the command on every worker, detached
status, logs, stop, delete            what they say; each can be repeated
supervise  all of it in a loop until the command is done: recreates lost machines, restarts from
           the last checkpoint; holds no long ssh and keeps no state, so it may be killed and rerun
doctor     check gcloud here, then `ddpm doctor` on every worker

--dry-run prints the commands, and nothing else: the same list is executed without it.
Exit codes: 0 done; 1 the program or gcloud failed, one line says how; 2 bad arguments; otherwise
that of the program.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[1]
RESTART = 42        # the program saved on SIGTERM: restart, not counted
SSH_FAILED = 255
FAILURES_OF_SSH = 3  # in a row, then the machines count as lost
FAILED_CREATIONS = 5
SETTLE = 6            # looks at workers of which some have ended well and some still run
WITHOUT_PROGRESS = 3  # restarts that reach no new checkpoint


class Family(NamedTuple):
    """A generation of TPU: names of the Cloud TPU API, machines of Compute Engine, GKE label."""

    runtime: str | None      # None: not served by the Cloud TPU API
    sizes: tuple             # the number in the accelerator's name
    per_chip: int            # 2 where that number counts cores, 1 where it counts chips
    one_host: tuple          # sizes that are one host
    per_host: int            # the name's number for each host of larger slices
    machine: str | None      # machine type of Compute Engine with 4 chips; None: not there
    multislice: bool
    zones: tuple             # where Google has offered it (state of 2026-11)


_V5E_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
FAMILIES = {
    "v2": Family("tpu-ubuntu2204-base", (8, 32, 128, 256, 512), 2, (8,), 8, None, False,
                 ("us-central1-b", "us-central1-c", "us-central1-f", "europe-west4-a",
                  "asia-east1-c")),
    "v3": Family("tpu-ubuntu2204-base", (8, 32, 64, 128, 256, 512, 1024, 2048), 2, (8,), 8, None,
                 False, ("us-central1-a", "us-central1-b", "us-east1-d", "europe-west4-a")),
    "v4": Family("tpu-ubuntu2204-base", (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), 2, (8,),
                 8, None, True, ("us-central2-b",)),
    "v5litepod": Family("v2-alpha-tpuv5-lite", _V5E_SIZES, 1, (1, 4, 8), 4, None, True,
                        ("us-central1-a", "us-west1-c", "us-west4-a", "us-west4-b", "us-east1-c",
                         "us-east5-a", "us-east5-b", "us-south1-a", "europe-west4-a",
                         "europe-west4-b", "asia-southeast1-b")),
    "v5p": Family("v2-alpha-tpuv5", (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), 2, (8,), 8,
                  "ct5p-hightpu-4t", True, ("us-east5-a", "us-central1-a", "europe-west4-b")),
    "v6e": Family("v2-alpha-tpuv6e", _V5E_SIZES, 1, (1, 4, 8), 4, "ct6e-standard-4t", True,
                  ("us-east1-d", "us-east5-a", "us-east5-b", "us-central1-b", "us-central2-b",
                   "us-south1-a", "us-south1-b", "europe-west4-a", "asia-northeast1-b",
                   "southamerica-west1-a")),
    "tpu7x": Family(None, (8, 16, 32, 64, 128, 256, 512, 1024), 2, (8,), 8, "tpu7x-standard-4t",
                    True, ("us-central1-c", "us-central1-ai1a")),
}
# Chips -> topology: squares and twofold squares, cubes and their doublings.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SOLID = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
         256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}


class Slice(NamedTuple):
    """One accelerator name, taken apart."""

    family: str
    chips: int
    hosts: int
    topology: str | None


class LaunchError(Exception):
    """One line for the user."""


def parse_accelerator(name: str) -> Slice:
    """'v5litepod-16' -> Slice. Raises LaunchError that lists what exists."""
    family, _, size = name.rpartition("-")
    if family not in FAMILIES:
        known = ", ".join(f"{f}-{{{','.join(map(str, row.sizes))}}}" for f, row in FAMILIES.items())
        raise LaunchError(f"accelerator {name!r} is unknown; known: {known}")
    row = FAMILIES[family]
    if not size.isdigit() or int(size) not in row.sizes:
        raise LaunchError(f"accelerator {name!r}: {family} comes in sizes "
                          f"{', '.join(map(str, row.sizes))}")
    size = int(size)
    hosts = 1 if size in row.one_host else size // row.per_host
    table = FLAT if family in ("v5litepod", "v6e") else SOLID
    return Slice(family, size // row.per_chip, hosts, table.get(size // row.per_chip))


class Command(NamedTuple):
    """Something to run. `dry` is the (rc, stdout) that a dry run pretends to have got."""

    argv: list
    dry: tuple = (0, "")
    quiet: bool = True     # keep the output to ourselves
    check: bool = True     # a failure ends the launch with gcloud's last line


class Sleep(NamedTuple):
    seconds: float


class Say(NamedTuple):
    text: str


class Do(NamedTuple):
    """A step in this process, not a command; a dry run leaves it out."""

    function: object


# --- commands: one function each, used by the dry run and by the real one -----------------------

def scope(o):
    return [f"--zone={o.zone}"] + ([f"--project={o.project}"] if o.project else [])


def nodes(o) -> list[str]:
    """Names of the TPU nodes, one a slice."""
    return [o.name] if o.slices == 1 else [f"{o.name}-{i}" for i in range(o.slices)]


def describe_cmd(o, dry):
    return Command(["gcloud", "compute", "tpus", "queued-resources", "describe", o.name, *scope(o),
                    "--format=value(state.state,tpu.nodeSpec[0].node.acceleratorType)"],
                   dry=dry, check=False)


def create_cmd(o):
    argv = ["gcloud", "compute", "tpus", "queued-resources", "create", o.name, *scope(o),
            f"--accelerator-type={o.accelerator}", f"--runtime-version={o.runtime_version}"]
    argv += ([f"--node-id={o.name}"] if o.slices == 1
             else [f"--node-count={o.slices}", f"--node-prefix={o.name}"])
    if o.provision != "on-demand":
        argv.append(f"--{o.provision}")
    if o.network:
        argv.append(f"--network={o.network}")
    if o.subnetwork:
        argv.append(f"--subnetwork={o.subnetwork}")
    if o.internal_ips:
        argv.append("--internal-ips")
    if o.service_account:
        argv.append(f"--service-account={o.service_account}")
    argv += ["--scopes=https://www.googleapis.com/auth/cloud-platform", f"--labels=ddpm={o.name}"]
    return Command(argv, check=False)


def delete_cmd(o):
    return Command(["gcloud", "compute", "tpus", "queued-resources", "delete", o.name, *scope(o),
                    "--force", "--quiet"], check=False)


def ssh_cmds(o, remote: str, worker="all", vms=None, check=True, dry_each="", quiet=False):
    """`remote` on every worker: one command a slice (TPU API) or a machine (Compute Engine)."""
    commands = []
    dry = (0, dry_each)
    if o.api == "gce":
        chosen = vms if worker == "all" else [vms[int(worker)]]
        for vm in chosen:
            commands.append(Command(["gcloud", "compute", "ssh", vm, *scope(o),
                                     f"--command={remote}"], dry, quiet, check))
        return commands
    many = ([f"--batch-size={o.ssh_parallelism}"] if o.ssh_parallelism else [])
    base = ["gcloud", *(["alpha"] if many else []), "compute", "tpus", "tpu-vm", "ssh"]
    for node in nodes(o):
        commands.append(Command([*base, node, *scope(o), f"--worker={worker}",
                                 f"--command={remote}", *many], dry, quiet, check))
        if worker != "all":
            break
    return commands


def scp_cmds(o, source: str, vms=None):
    """`source` (a folder) to ~/ of every worker."""
    if o.api == "gce":
        return [Command(["gcloud", "compute", "scp", source, f"{vm}:", *scope(o), "--recurse"])
                for vm in vms]
    return [Command(["gcloud", "compute", "tpus", "tpu-vm", "scp", source, f"{node}:", *scope(o),
                     "--worker=all", "--recurse"]) for node in nodes(o)]


def region(o):
    return o.zone.rpartition("-")[0]


def gce_create_cmds(o):
    """Workload policy, template, group. Each may exist already: that is fine."""
    piece = parse_accelerator(o.accelerator)
    project = f"--project={o.project}"
    policy = f"projects/{o.project}/regions/{region(o)}/resourcePolicies/{o.name}"
    template = ["gcloud", "compute", "instance-templates", "create", o.name, project,
                f"--machine-type={FAMILIES[piece.family].machine}",
                "--maintenance-policy=TERMINATE",
                f"--image-family={o.image_family}", f"--image-project={o.image_project}",
                "--scopes=cloud-platform", f"--labels=ddpm={o.name}"]
    if o.provision != "on-demand":
        model = {"spot": "SPOT", "reserved": "RESERVATION_BOUND"}[o.provision]
        template += [f"--provisioning-model={model}", "--instance-termination-action=DELETE"]
    for flag, value in (("network", o.network), ("subnet", o.subnetwork),
                        ("service-account", o.service_account)):
        if value:
            template.append(f"--{flag}={value}")
    if o.internal_ips:
        template.append("--no-address")
    return [Command(["gcloud", "compute", "resource-policies", "create", "workload-policy", o.name,
                     project, "--type=HIGH_THROUGHPUT",
                     f"--accelerator-topology={piece.topology}", f"--region={region(o)}"],
                    check=False),
            Command(template, check=False),
            Command(["gcloud", "compute", "instance-groups", "managed", "create", o.name, project,
                     f"--size={piece.hosts}", f"--template={o.name}", f"--zone={o.zone}",
                     "--default-action-on-vm-failure=do-nothing", f"--workload-policy={policy}"],
                    check=False)]


def gce_delete_cmds(o):
    project = f"--project={o.project}"
    return [Command(["gcloud", "compute", "instance-groups", "managed", "delete", o.name, project,
                     f"--zone={o.zone}", "--quiet"], check=False),
            Command(["gcloud", "compute", "instance-templates", "delete", o.name, project,
                     "--quiet"], check=False),
            Command(["gcloud", "compute", "resource-policies", "delete", o.name, project,
                     f"--region={region(o)}", "--quiet"], check=False)]


def gce_list_cmd(o, dry):
    return Command(["gcloud", "compute", "instance-groups", "managed", "list-instances", o.name,
                    f"--project={o.project}", f"--zone={o.zone}",
                    "--format=value(instance.basename(),instanceStatus)"], dry=dry, check=False)


# --- subcommands: generators that yield what to do and receive (rc, stdout, stderr) ------------

def run_all(commands):
    """Runs a list; returns the worst rc and all output."""
    worst, text, errors = 0, "", ""
    for command in commands:
        rc, out, err = yield command
        worst, text, errors = max(worst, abs(rc)), text + out, errors + err
    return worst, text, errors


def state_of(o, dry="ACTIVE"):
    """-> (state, vms): ABSENT, WAITING, ACTIVE, LOST."""
    hosts = parse_accelerator(o.accelerator).hosts
    if o.api == "gce":
        vms = "".join(f"{o.name}-{i}\tRUNNING\n" for i in range(hosts))
        rc, out, err = yield gce_list_cmd(o, (1, "NOT_FOUND") if dry == "ABSENT" else (0, vms))
        if rc and not_found(out + err):
            return "ABSENT", []
        if rc:
            raise LaunchError(last_line(err) or "gcloud failed")
        rows = [line.split() for line in out.splitlines() if line.strip()]
        ready = sorted(row[0] for row in rows if row[1:] == ["RUNNING"])
        if len(ready) == hosts:
            return "ACTIVE", ready
        return ("LOST" if any(row[1:] in (["STOPPED"], ["TERMINATED"], ["SUSPENDED"])
                              for row in rows) else "WAITING"), ready
    answer = (1, "NOT_FOUND") if dry == "ABSENT" else (0, f"{dry}\t{o.accelerator}")
    rc, out, err = yield describe_cmd(o, answer)
    if rc and not_found(out + err):
        return "ABSENT", []
    if rc:
        raise LaunchError(last_line(err) or "gcloud failed")
    state, *kind = out.split()
    if kind and kind[0] != o.accelerator:
        raise LaunchError(f"--name={o.name} is taken: it has a {kind[0]}, not {o.accelerator}; "
                          "choose another name, or delete it")
    return {"ACTIVE": "ACTIVE", "FAILED": "FAILED", "SUSPENDED": "LOST", "SUSPENDING": "LOST",
            "DELETING": "LOST"}.get(state, "WAITING"), []


def create(o):
    """Until the machines are there; returns the names of the machines (Compute Engine)."""
    started, failed, first = time.monotonic(), 0, True
    while True:
        state, vms = yield from state_of(o, "ABSENT" if first else "ACTIVE")
        first = False
        if state == "ACTIVE":
            return vms
        if state == "FAILED":
            failed += 1
            if failed >= FAILED_CREATIONS:
                raise LaunchError(f"{o.name}: {failed} requests in a row FAILED; gcloud compute "
                                  f"tpus queued-resources describe {o.name} --zone={o.zone} says "
                                  "why")
        if state in ("FAILED", "LOST"):
            yield Say(f"{o.name} is {state.lower()}: deleting what is left of it")
            yield from delete(o)
            yield Sleep(o.backoff * failed)
            continue
        if state == "ABSENT":
            yield Say(f"creating {o.name}: {o.accelerator}, {o.provision}, {o.zone}")
            for command in (gce_create_cmds(o) if o.api == "gce" else [create_cmd(o)]):
                rc, out, err = yield command
                # Somebody, perhaps our former self, was quicker: look again.
                if rc and not re.search("already.?exists", out + err, re.IGNORECASE):
                    raise LaunchError(explain(o, err))
        if time.monotonic() - started > o.wait_timeout:
            raise LaunchError(f"{o.name}: still no machines after {o.wait_timeout} s "
                              "(--wait-timeout); the request stays")
        yield Sleep(o.poll)


def delete(o):
    """Deletes everything under the name; absent is fine."""
    for command in (gce_delete_cmds(o) if o.api == "gce" else [delete_cmd(o)]):
        rc, out, err = yield command
        if rc and not not_found(out + err):
            raise LaunchError(explain(o, err))


def staging(o) -> pathlib.Path:
    return pathlib.Path(o.staging) / o.name / "ddpm"


def setup(o, vms=None, check=True):
    """Wheel, configs and host.sh to every worker; the environment is made where it differs."""
    folder = staging(o)
    yield Do(lambda: clear(REPO / folder))
    if o.wheel:
        yield Do(lambda: copy_into(pathlib.Path(o.wheel), REPO / folder))
    else:
        yield Command([o.python, "-m", "pip", "wheel", "--no-deps", "--quiet",
                       f"--wheel-dir={folder}", "."])
    yield Do(lambda: stage(REPO / folder, o.ship))
    rc, _, err = yield from run_all(
        [c._replace(check=check) for c in scp_cmds(o, str(folder), vms)])
    if rc:
        return rc
    rc, _, _ = yield from run_all(
        ssh_cmds(o, host(o, "setup", "ddpm", o.extra), vms=vms, check=check))
    return rc


def clear(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        path.unlink()


def copy_into(path, folder):
    (folder / path.name).write_bytes(path.read_bytes())


def stage(folder, ship):
    """Completes the folder that goes to the workers; `stamp` names its content."""
    import shutil
    (folder / "host.sh").write_bytes((REPO / "launch" / "host.sh").read_bytes())
    for source in [REPO / "configs", *map(pathlib.Path, ship)]:
        if source.is_dir():
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            copy_into(source, folder)
        elif source.name != "configs":
            raise LaunchError(f"--ship={source}: no such file")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "stamp"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(wheel_content(path) if path.suffix == ".whl" else path.read_bytes())
    [wheel] = folder.glob("*.whl")
    (folder / "stamp").write_text(f"{digest.hexdigest()}\n{wheel.name}\n")


def wheel_content(path) -> bytes:
    """What is in a wheel; the file itself holds the time of its making as well."""
    import zipfile
    with zipfile.ZipFile(path) as wheel:
        return b"".join(n.encode() + b"\0" + wheel.read(n) for n in sorted(wheel.namelist()))


def host(o, what: str, *words) -> str:
    return shlex.join(["sh", "ddpm/host.sh", what, *[str(w) for w in words]])


def key(o) -> str:
    """Names the command, so that what another one left behind is not taken for its result."""
    return hashlib.sha256("\0".join(o.command).encode()).hexdigest()[:8]


def start_words(o, replace):
    words = [f"--key={key(o)}", *(["--replace"] if replace else [])]
    if o.api == "gce":
        words.append("--coordinate")
    env = {"JAX_COORDINATOR_PORT": str(o.port), "DDPM_HEARTBEAT": str(o.heartbeat)}
    if o.init_timeout:
        env["DDPM_INIT_TIMEOUT"] = str(o.init_timeout)
    env.update(pair.split("=", 1) for pair in o.env)
    if o.api == "gce":  # host.sh reads the port while it works out the coordinator
        words = [f"JAX_COORDINATOR_PORT={env.pop('JAX_COORDINATOR_PORT')}", *words]
    return [*words, *[f"{k}={v}" for k, v in env.items()], "--", *o.command]


def train(o, vms=None, check=True):
    rc, _, _ = yield from run_all(
        ssh_cmds(o, host(o, "start", o.name, *start_words(o, o.replace)), vms=vms, check=check))
    return rc


def stop(o, vms=None, check=True, grace=None):
    seconds = o.stop_grace if grace is None else min(grace, o.stop_grace)
    rc, _, _ = yield from run_all(
        ssh_cmds(o, host(o, "stop", o.name, seconds), vms=vms, check=check))
    return rc


class Worker(NamedTuple):
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


def status_text(o, dry_state, vms=None):
    hosts = parse_accelerator(o.accelerator).hosts
    lines = "".join(f"ddpm-status host=w{i} state={dry_state} rc="
                    f"{'0' if dry_state == 'exited' else '-'} pid=- attempt=1 key={key(o)} last=-\n"
                    for i in range(1 if o.api == "gce" else hosts))
    return run_all(ssh_cmds(o, host(o, "status", o.name), vms=vms, check=False, dry_each=lines,
                            quiet=True))


def latest_step(o, vms=None):
    """Newest checkpoint in --workdir as far as can be seen, else None."""
    if not o.workdir:
        return None
    if o.workdir.startswith("gs://"):
        command = Command(["gcloud", "storage", "ls", f"{o.workdir.rstrip('/')}/checkpoints/"],
                          check=False)
    else:
        command = ssh_cmds(o, host(o, "latest", o.workdir), worker=0, vms=vms, check=False,
                           quiet=True)[0]
    _, out, _ = yield command
    steps = [int(x) for x in re.findall(r"(?:^|/)(\d+)/?\s*$", out, re.MULTILINE)]
    return max(steps, default=None)


def supervise(o):
    """The loop. Everything it knows it asks for: it can be killed and run again."""
    piece = parse_accelerator(o.accelerator)
    expected = piece.hosts * o.slices
    restarts, barren, unreachable, best, dry_round = 0, 0, 0, -1, 0
    while True:
        vms = yield from create(o)
        rc = yield from setup(o, vms, check=False)
        if rc:
            unreachable += 1
            if unreachable < FAILURES_OF_SSH:
                yield Say(f"setup failed on a worker ({rc}), try {unreachable} of "
                          f"{FAILURES_OF_SSH}")
                yield Sleep(o.poll)
                continue
            if rc != SSH_FAILED:
                raise LaunchError(f"setup fails on a worker with {rc}; its output is above")
            yield from lost(o)
            unreachable, restarts = 0, restarts + 1
            check_restarts(o, restarts)
            continue
        unreachable = 0
        started, settling = False, 0
        while True:
            rc, text, _ = yield from status_text(
                o, ["absent", "exited"][min(dry_round, 1)], vms)
            dry_round += 1
            workers = [of_this_command(o, w) for w in parse_status(text)]
            if rc or len(workers) < expected:
                unreachable += 1
                yield Say(f"{len(workers)} of {expected} workers answer, try {unreachable} of "
                          f"{FAILURES_OF_SSH}")
                state, _ = yield from state_of(o)
                if state == "ACTIVE" and unreachable < FAILURES_OF_SSH:
                    yield Sleep(o.poll)
                    continue
                unreachable = 0
                yield from stop(o, vms, check=False)
                if state == "ACTIVE":  # it says so, but a worker is dead: only new ones help
                    restarts += 1
                    check_restarts(o, restarts)
                    yield from lost(o)
                break
            unreachable = 0
            yield from stop_on_bug(o, vms, workers)
            if all(w.state == "exited" and w.rc == 0 for w in workers):
                yield Say("done")
                if o.delete_when_done:
                    yield from delete(o)
                return 0
            if all(w.state == "running" for w in workers):
                yield Sleep(o.poll)
                continue
            codes = {w.rc for w in workers if w.state == "exited"}
            ending = codes <= {0, RESTART} and {w.state for w in workers} == {"exited", "running"}
            settling = settling + 1 if ending else 0
            if 0 < settling <= SETTLE:  # they end together, but not in the same instant
                yield Sleep(min(o.poll, 10))
                continue
            if all(w.state == "absent" for w in workers) and not started:
                yield from train(o, vms)
                started = True
                yield Sleep(o.poll)
                continue
            # One is gone, or all stopped to be restarted: none may be left over.
            yield Say("restarting: " + ", ".join(
                f"{w.host} {w.state}{'' if w.rc is None else f' {w.rc}'}" for w in workers[:8]))
            yield from stop(o, vms, check=False, grace=15)
            _, text, _ = yield from status_text(o, "exited", vms)
            yield from stop_on_bug(o, vms, parse_status(text))
            step = yield from latest_step(o, vms)
            free = codes and codes <= {0, RESTART} and all(w.state == "exited" for w in workers)
            if step is not None and step > best:
                best, barren = step, 0
            elif not free:
                barren += 1
                if barren >= WITHOUT_PROGRESS:
                    yield from run_all(
                        ssh_cmds(o, host(o, "logs", o.name, 20), vms=vms, check=False))
                    raise LaunchError(f"{barren} restarts without a new checkpoint (newest: "
                                      f"{'none' if best < 0 else best}); stopped, see the logs")
            if not free:
                restarts += 1
                check_restarts(o, restarts)
                yield Sleep(min(o.backoff * 2 ** min(barren, 5), 600))
            yield from train(o, vms)
            started = True
            yield Sleep(o.poll)


def stop_on_bug(o, vms, workers):
    """Ends everything where a worker's exit code says that a restart would not help."""
    bugs = [w for w in workers if w.rc is not None and 0 < w.rc < 128 and w.rc != RESTART]
    if not bugs:
        return
    yield from stop(o, vms, check=False, grace=15)
    yield from run_all(
        ssh_cmds(o, host(o, "logs", o.name, 20), vms=vms, check=False))
    raise LaunchError(f"worker {bugs[0].host} ended with {bugs[0].rc}, a restart would not help; "
                      f"last line: {bugs[0].last}", bugs[0].rc)


def of_this_command(o, worker):
    if worker.key == key(o) or worker.state == "absent":
        return worker
    if worker.state == "running":
        raise LaunchError(f"--name={o.name} is taken: another command runs under it on "
                          f"{worker.host}; choose another name, or stop it")
    return worker._replace(state="absent", rc=None)


def lost(o):
    yield Say(f"{o.name}: machines count as lost, new ones are requested")
    yield from delete(o)


def check_restarts(o, restarts):
    if restarts > o.max_restarts:
        raise LaunchError(f"{o.max_restarts} restarts (--max-restarts) are used up")


def simple(o):
    """setup, train, status, logs, stop, doctor on machines that exist."""
    vms = None
    if o.what == "doctor":
        yield Command(["gcloud", "auth", "list", "--filter=status:ACTIVE",
                       "--format=value(account)"], dry=(0, "you"))
    if o.api == "gce":
        state, vms = yield from state_of(o)
        if state != "ACTIVE":
            raise LaunchError(f"{o.name} is {state.lower()}; run create first")
    if o.what == "setup":
        return (yield from setup(o, vms))
    if o.what == "train":
        return (yield from train(o, vms))
    if o.what == "stop":
        return (yield from stop(o, vms))
    if o.what == "status":
        if o.api == "tpu":
            state, _ = yield from state_of(o)
            yield Say(f"{o.name}: {state}")
            if state != "ACTIVE":
                return 0
        rc, _, _ = yield from run_all(ssh_cmds(o, host(o, "status", o.name), vms=vms))
        return rc
    if o.what == "logs":
        rc, _, _ = yield from run_all(ssh_cmds(o, host(o, "logs", o.name, o.lines),
                                               worker=o.worker, vms=vms))
        return rc
    words = ["run", "--", "ddpm", "doctor", "--pod"]
    words += [f"--workdir={o.workdir}"] if o.workdir else []
    rc, _, _ = yield from run_all(ssh_cmds(o, host(o, *words), vms=vms))
    return rc


SUBCOMMANDS = {"create": create, "setup": simple, "train": simple, "status": simple,
               "logs": simple, "stop": simple, "delete": delete, "supervise": supervise,
               "doctor": simple}


# --- drivers -------------------------------------------------------------------------------------

def dry_run(generator):
    """Prints the commands, one a line, quoted for a shell."""
    answer = None
    try:
        while True:
            item = generator.send(answer)
            answer = None
            if isinstance(item, Command):
                print(shlex.join(item.argv))
                answer = (item.dry[0], item.dry[1], "")
    except StopIteration:
        return 0


def execute(generator, *, sleep=time.sleep):
    answer = None
    try:
        while True:
            item = generator.send(answer)
            answer = None
            if isinstance(item, Sleep):
                sleep(item.seconds)
            elif isinstance(item, Say):
                print(f"tpu.py: {item.text}", file=sys.stderr, flush=True)
            elif isinstance(item, Do):
                item.function()
            else:
                answer = call(item)
    except StopIteration as end:
        return end.value if isinstance(end.value, int) else 0


def call(command):
    try:
        done = subprocess.run(command.argv, capture_output=True, text=True, cwd=REPO,
                              stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(f"{command.argv[0]} is not installed: "
                          "https://cloud.google.com/sdk/docs/install") from None
    if not command.quiet:
        sys.stdout.write(done.stdout)
        sys.stdout.flush()
    if done.returncode and not command.quiet:
        sys.stderr.write(done.stderr)
    if done.returncode and command.check:
        raise LaunchError(f"{shlex.join(command.argv[:6])} ...: {last_line(done.stderr)}",
                          1 if done.returncode == SSH_FAILED else done.returncode)
    return done.returncode, done.stdout, done.stderr


def not_found(text: str) -> bool:
    return re.search(r"not.?found", text, re.IGNORECASE) is not None


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def explain(o, err: str) -> str:
    """gcloud's last line, with what to do about the usual ones."""
    line = last_line(err)
    if re.search("permission|forbidden|403", err, re.IGNORECASE):
        return f"{line}; needs the role TPU Admin (roles/tpu.admin) in the project"
    if re.search("quota|resource_exhausted", err, re.IGNORECASE):
        return f"{line}; no quota for {o.accelerator} ({o.provision}) in {o.zone}"
    return line or "gcloud failed"


def parse(argv):
    """argv -> options. Raises LaunchError; argparse itself exits with 2."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="tpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=list(SUBCOMMANDS))
    add("--name", required=True, help="of the machines and of the run")
    add("--zone", required=True)
    add("--any-zone", action="store_true", help="do not compare --zone with the known ones")
    add("--project", default=os.environ.get("CLOUDSDK_CORE_PROJECT", ""))
    add("--accelerator", required=True, help="as v5litepod-8; a wrong one lists all")
    add("--api", choices=["tpu", "gce"], default="tpu",
        help="Cloud TPU API (v2 to v6e), or Compute Engine (v5p and later)")
    add("--runtime-version", help="default: that of the generation")
    add("--image-family", default="ubuntu-accel-2404-amd64-tpu-tpu7x", help="--api=gce")
    add("--image-project", default="ubuntu-os-accelerator-images", help="--api=gce")
    how = parser.add_mutually_exclusive_group()
    for value in ("spot", "reserved", "on-demand"):
        how.add_argument(f"--{value}", dest="provision", action="store_const", const=value)
    parser.set_defaults(provision="on-demand")
    add("--slices", type=int, default=1)
    add("--network", default="")
    add("--subnetwork", default="")
    add("--internal-ips", action="store_true", help="no external addresses")
    add("--service-account", default="")
    add("--env", action="append", default=[], metavar="K=V", help="for the command")
    add("--workdir", default="", help="of the run: progress is read there")
    add("--wheel", default="", help="ready wheel; default: built from this repository")
    add("--staging", default="build/launch", help="folder here where files are put together")
    add("--ship", action="append", default=[], metavar="PATH", help="also send this to ~/ddpm")
    add("--extra", default="tpu", help="of the wheel")
    add("--port", type=int, default=8476, help="of the coordinator")
    add("--init-timeout", type=int, default=0)
    add("--heartbeat", type=int, default=30)
    add("--max-restarts", type=int, default=50)
    add("--backoff", type=float, default=15.0, help="seconds before a counted restart, doubling")
    add("--poll", type=float, default=30.0)
    add("--wait-timeout", type=float, default=24 * 3600.0, help="for create")
    add("--stop-grace", type=int, default=60, help="seconds from TERM to KILL")
    add("--ssh-parallelism", type=int, default=0, help="alpha of gcloud: workers at a time")
    add("--replace", action="store_true", help="train: stop what runs under this name first")
    add("--delete-when-done", action="store_true")
    add("--worker", default="all", help="logs: which")
    add("--lines", type=int, default=40, help="logs: how many")
    add("--python", default="python3", help="here, to build the wheel")
    add("--dry-run", action="store_true")
    o = parser.parse_args(argv[:at])
    o.command = argv[at + 1:]
    check(o)
    return o


def check(o):
    """Raises LaunchError for what gcloud would refuse later, or take and do wrong."""
    piece = parse_accelerator(o.accelerator)
    family = FAMILIES[piece.family]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", o.name):
        raise LaunchError(f"--name={o.name}: lower-case letters, digits and -, at most 50")
    if o.zone not in family.zones and not o.any_zone:
        raise LaunchError(f"--zone={o.zone}: {piece.family} is known in {', '.join(family.zones)}; "
                          "--any-zone if it is offered there by now")
    if o.slices < 1 or (o.slices > 1 and not family.multislice):
        raise LaunchError(f"--slices={o.slices}: {piece.family} has no multislice" if o.slices > 1
                          else f"--slices={o.slices}: must be at least 1")
    if o.api == "tpu" and family.runtime is None:
        raise LaunchError(f"{o.accelerator}: the Cloud TPU API does not serve it; use --api=gce, "
                          "or GKE (launch/gke)")
    if o.api == "gce":
        if family.machine is None:
            raise LaunchError(f"--api=gce: {piece.family} is served by the Cloud TPU API only; "
                              "leave --api away")
        if o.slices > 1:
            raise LaunchError("--api=gce: one slice only; several need GKE (launch/gke)")
        if not o.project:
            raise LaunchError("--api=gce: --project is needed")
        if piece.topology is None:
            raise LaunchError(f"--api=gce: no topology known for {piece.chips} chips")
    if o.what in ("train", "supervise") and not o.command:
        raise LaunchError(f"{o.what}: no command; put it after --, as in: -- ddpm train ...")
    for pair in o.env:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            raise LaunchError(f"--env={pair}: expected NAME=VALUE")
    if o.wheel and not o.dry_run and not os.path.isfile(o.wheel):
        raise LaunchError(f"--wheel={o.wheel}: no such file")
    o.runtime_version = o.runtime_version or family.runtime
    if o.slices > 1 and not o.init_timeout:
        o.init_timeout = 3600  # the slices come one by one


def main(argv=None) -> int:
    try:
        o = parse(sys.argv[1:] if argv is None else argv)
    except LaunchError as error:
        print(f"tpu.py: error: {error.args[0]}", file=sys.stderr)
        return 2
    try:
        generator = SUBCOMMANDS[o.what](o)
        return dry_run(generator) if o.dry_run else execute(generator)
    except LaunchError as error:
        print(f"tpu.py: error: {error.args[0]}", file=sys.stderr)
        return error.args[1] if len(error.args) > 1 else 1
    except KeyboardInterrupt:
        print("tpu.py: interrupted; the workers go on, run the same command again to watch",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
