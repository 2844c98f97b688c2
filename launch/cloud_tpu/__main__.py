"""Run a program on Cloud TPU machines, where no scheduler does it: thin glue around gcloud.

    python launch/tpu.py supervise --name=cifar --accelerator=v5litepod-8 --zone=us-west4-a \\
        --spot --workdir=gs://BUCKET/cifar -- ddpm train --config=cifar10 --workdir=gs://BUCKET/cifar

create     request the machines and wait for them; no-op when they are there
setup      send wheel, configs and host.sh to every worker, make the environment; once per content
train      start the command on every worker, detached
status, logs, stop, delete            can be repeated, as all of these
supervise  all of it in a loop until the command is done: recreates lost machines, restarts from
           the last checkpoint; holds no long ssh and keeps no state, so it may be killed and rerun
doctor     check gcloud here, then `ddpm doctor` on every worker

--dry-run prints the commands, and nothing else: the same list is executed without it.
Exit codes: 0 done; 1 the program or gcloud failed, one line says how; 2 bad arguments; otherwise
that of the program.
"""

import argparse
import os
import re
import sys

from cloud_tpu import LaunchError, steps
from cloud_tpu.accelerators import parse_accelerator
from cloud_tpu.commands import dry_run, execute
from cloud_tpu.supervise import supervise

SUBCOMMANDS = {"create": steps.create, "setup": steps.on_machines(steps.setup),
               "train": steps.on_machines(steps.train), "status": steps.status,
               "logs": steps.on_machines(steps.logs), "stop": steps.on_machines(steps.stop),
               "delete": steps.delete, "supervise": supervise, "doctor": steps.doctor}


def parse(argv):
    """argv -> options. Raises LaunchError; argparse itself exits with 2."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="tpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SUBCOMMANDS))
    _machine_flags(parser)
    _run_flags(parser)
    o = parser.parse_args(argv[:at])
    o.command = argv[at + 1:]
    check(o)
    return o


def _machine_flags(parser):
    add = parser.add_argument
    add("--name", required=True, help="of the machines and of the run")
    add("--zone", required=True)
    add("--any-zone", action="store_true", help="do not compare --zone with the known ones")
    add("--project", default=os.environ.get("CLOUDSDK_CORE_PROJECT", ""))
    add("--accelerator", required=True, help="as v5litepod-8; a wrong one lists all")
    add("--api", choices=list(steps.APIS), default="tpu",
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


def _run_flags(parser):
    add = parser.add_argument
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


def check(o):
    """Raises LaunchError for what gcloud would refuse later, or take and do wrong."""
    piece = parse_accelerator(o.accelerator)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", o.name):
        raise LaunchError(f"--name={o.name}: lower-case letters, digits and -, at most 50")
    if o.zone not in piece.tpu.zones and not o.any_zone:
        raise LaunchError(f"--zone={o.zone}: {piece.family} is known in "
                          f"{', '.join(piece.tpu.zones)}; --any-zone if it is offered there by now")
    if o.slices < 1:
        raise LaunchError(f"--slices={o.slices}: must be at least 1")
    if o.slices > 1 and not piece.tpu.multislice:
        raise LaunchError(f"--slices={o.slices}: {piece.family} has no multislice")
    steps.APIS[o.api].check(o, piece)
    if o.what in ("train", "supervise") and not o.command:
        raise LaunchError(f"{o.what}: no command; put it after --, as in: -- ddpm train ...")
    for pair in o.env:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            raise LaunchError(f"--env={pair}: expected NAME=VALUE")
    if o.wheel and not o.dry_run and not os.path.isfile(o.wheel):
        raise LaunchError(f"--wheel={o.wheel}: no such file")
    o.runtime_version = o.runtime_version or piece.tpu.runtime
    if o.slices > 1 and not o.init_timeout:
        o.init_timeout = 3600  # the slices come one by one


def main(argv=None) -> int:
    try:
        o = parse(sys.argv[1:] if argv is None else argv)
    except LaunchError as error:
        print(f"tpu.py: error: {error}", file=sys.stderr)
        return 2
    try:
        generator = SUBCOMMANDS[o.what](o)
        return dry_run(generator) if o.dry_run else execute(generator)
    except LaunchError as error:
        print(f"tpu.py: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("tpu.py: interrupted; the workers go on, run the same command again to watch",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
