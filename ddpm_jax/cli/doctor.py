"""ddpm doctor [--workdir=DIR] [--pod] | ddpm doctor --processes=4 --devices=2

Check this machine, and --workdir (a folder or gs://bucket/path), before a run: one line each, with
what to do about it. --pod: join the other hosts too and compare versions (launch/tpu.py doctor
does so on every worker).

--processes and --devices: a dry run of a pod on this machine's CPU. Starts the real training
program as that many processes of that many devices and checks that the batches are disjoint and
complete, that every example has its own t and noise, that parameters are equal on all hosts, that
every host writes its part of a checkpoint, and that only process 0 logs.

Exit code: 0 all well, 1 something is wrong.
"""

import os
import pathlib

from ddpm_jax.cli import common
from ddpm_jax.cli.output import GREEN, RED, YELLOW, coloured
from ddpm_jax.parallel import pod_flags


def define_flags(define):
    define.workdir()
    define.bool("pod", False, "join the other hosts and compare versions")
    define.integer("processes", 0, "dry run of a pod: processes", lower_bound=0)
    define.integer("devices", 2, "dry run of a pod: devices of each", lower_bound=1)
    define.pod()


def main(values, words):
    from ddpm_jax.doctor import checks, dry_run
    from ddpm_jax.parallel import pod

    common.no_words(words)
    if os.environ.get(dry_run.WORKER):
        stop, watchdog = common.join(values)
        return dry_run.worker(pathlib.Path(os.environ[dry_run.WORKER]), stop, watchdog)
    if values.processes:
        return report(dry_run.dry_run(values.processes, values.devices))
    port = checks.check_port(
        pod.option(values, "coordinator_port", int, pod_flags.DEFAULT_PORT, "JAX_COORDINATOR_PORT"),
        pod.option(values, "coordinator", str, None, "DDPM_COORD"),
        pod.option(values, "process_id", int, 0, "DDPM_PROC"))
    findings = [checks.check_python(), checks.check_settings(), *checks.check_lock(),
                checks.check_disk(), port, checks.check_devices()]
    if values.workdir:
        findings += checks.check_workdir(values.workdir)
    if values.pod:
        findings.append(checks.check_pod(pod.initialize(values)))
    return report(findings)


LABELS = {True: ("ok   ", GREEN), False: ("WRONG", RED), None: ("note ", YELLOW)}


def report(findings) -> int:
    """Prints the findings; 1 if any is wrong."""
    for name, ok, text in findings:
        print(f"{coloured(*LABELS[ok])} {name}: {text}")
    return int(any(ok is False for _, ok, _ in findings))
