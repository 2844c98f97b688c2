"""Run one program as several processes of one pod on this machine.

    python launch/local.py --processes 2 --devices 4 -- ddpm train --config=digits --workdir=/tmp/w

Real jax.distributed and real collectives; on the CPU every process gets that many fake devices,
with --platform=cuda its share of the GPUs. Process 0 is shown, every process has a log file. When
one fails the others are ended and its log is named. Ctrl-C and the other signals that the program
handles are passed on as SIGTERM; a second Ctrl-C ends all at once. Exit code: 0 all done; 42
stopped on a signal with everything saved; 130 a second Ctrl-C; otherwise that of the process that
failed.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

RESTART, INTERRUPTED = 42, 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def parse(argv):
    before, _, command = _split(argv)
    parser = argparse.ArgumentParser(
        prog="local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="devices of each process")
    parser.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator; 0: a free one")
    parser.add_argument("--logdir", help="for the log files; default: a new temporary folder")
    parser.add_argument("--grace", type=float, default=15.0,
                        help="seconds that the others get to end by themselves after a failure")
    options = parser.parse_args(before)
    if not command:
        parser.error("no command: put it after --, as in: -- ddpm train ...")
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    return options, command


def _split(argv):
    if "--" in argv:
        at = argv.index("--")
        return argv[:at], "--", argv[at + 1:]
    return argv, "", []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(options, index: int, port: int) -> dict[str, str]:
    """The variables of process `index`; ddpm_jax/parallel/pod.py reads DDPM_*."""
    env = dict(os.environ)
    env.update(DDPM_COORD=f"127.0.0.1:{port}", DDPM_NPROC=str(options.processes),
               DDPM_PROC=str(index), PYTHONUNBUFFERED="1")
    if options.platform == "cpu":
        kept = [flag for flag in env.get("XLA_FLAGS", "").split()
                if "xla_force_host_platform_device_count" not in flag]
        env["XLA_FLAGS"] = " ".join(
            [*kept, f"--xla_force_host_platform_device_count={options.devices}"])
        env["JAX_PLATFORMS"] = "cpu"
    else:
        first = index * options.devices
        env["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(options.devices))
    return env


def verdict(codes: list[int], order: list[int]) -> tuple[int, int | None]:
    """Exit code of the whole and the process to blame. `order`: processes as they ended.

    A bug's own code (1..127) outweighs "peer lost" and signals, which are its consequences.
    """
    shell = [128 - code if code < 0 else code for code in codes]
    for blame in (lambda c: 0 < c < 128 and c != RESTART, lambda c: c >= 128):
        for index in order:
            if blame(shell[index]):
                return shell[index], index
    return (RESTART if RESTART in shell else 0), None


def main(argv=None) -> int:
    options, command = parse(sys.argv[1:] if argv is None else argv)
    port = options.port or free_port()
    logdir = pathlib.Path(options.logdir or tempfile.mkdtemp(prefix="ddpm_local_"))
    logdir.mkdir(parents=True, exist_ok=True)
    processes, logs = [], []
    for index in range(options.processes):
        log = open(logdir / f"process_{index}.log", "wb")
        logs.append(log)
        try:
            processes.append(subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=environment(options, index, port), start_new_session=True))
        except OSError as error:
            _kill(processes)
            _log(f"error: {command[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
    _log(f"{options.processes} processes x {options.devices} {options.platform} devices, logs in "
         f"{logdir}")
    _pass_signals_on(processes)
    order, deadline, killed = [], None, set()
    with open(logdir / "process_0.log", "rb") as shown:
        try:
            while len(order) < len(processes):
                _show(shown)
                for index, process in enumerate(processes):
                    if index not in order and process.poll() is not None:
                        order.append(index)
                        # 42 is no failure: the others are about to end by themselves as well.
                        if process.returncode not in (0, RESTART) and deadline is None:
                            deadline = time.monotonic() + options.grace
                if deadline is not None and time.monotonic() > deadline:
                    # Not SIGTERM: in a process of a pod it only asks for a save.
                    killed.update(i for i, p in enumerate(processes) if p.poll() is None)
                    _kill(processes)
                time.sleep(0.05)
        finally:
            _kill(processes)
        _show(shown)
    for log in logs:
        log.close()
    code, blamed = verdict([p.returncode for p in processes],
                           [i for i in order if i not in killed])
    if blamed is not None:
        path = logdir / f"process_{blamed}.log"
        end = path.read_text(errors="replace").splitlines()[-15:]
        _log("\n  ".join([f"process {blamed} failed with {code}; the end of {path}:", *end]))
    return code


def _pass_signals_on(processes):
    interrupts = []

    def handler(number, frame):
        interrupts.extend([number] * (number == signal.SIGINT))
        if len(interrupts) > 1:
            _kill(processes)
            os._exit(INTERRUPTED)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _show(file):
    data = file.read()
    if data:
        _write(sys.stdout, data.decode(errors="replace"))


def _log(text):
    _write(sys.stderr, f"local.py: {text}\n")


def _write(stream, text):
    """A run goes on when its output has no reader: the log files have it."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _kill(processes):
    for process in processes:
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
