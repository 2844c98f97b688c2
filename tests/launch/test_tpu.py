"""launch/tpu.py: golden dry runs, and the real loop against a fake gcloud with real workers."""

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest
from cloud_tpu import __main__ as tpu
from cloud_tpu import staging
from xla_flags import xla_flags

HERE = pathlib.Path(__file__).parent
TPU = HERE.parents[1] / "launch" / "tpu.py"

SUBCOMMANDS = ["create", "setup", "train", "status", "logs", "stop", "delete", "supervise",
               "doctor"]
ACCELERATORS = {"v4-16": "us-central2-b", "v5litepod-8": "us-west4-a", "v5litepod-32": "us-west4-a",
                "v5p-16": "us-east5-a", "v6e-16": "us-east1-d"}
CASES = {f"{name}-{how}-{slices}": (name, zone, how, slices)
         for name, zone in ACCELERATORS.items()
         for how in ("spot", "reserved") for slices in (1, 2)}
EXTRA = {
    "v3-8-on-demand-1": ["--accelerator=v3-8", "--zone=europe-west4-a"],
    "v6e-32-everything-1": [
        "--accelerator=v6e-32", "--zone=us-east1-d", "--spot", "--project=p", "--network=n",
        "--subnetwork=s", "--internal-ips", "--service-account=a@p.iam.gserviceaccount.com",
        "--env=A=b c", "--ssh-parallelism=16", "--port=8500", "--replace"],
    "tpu7x-16-gce-spot-1": ["--api=gce", "--accelerator=tpu7x-16", "--zone=us-central1-c",
                            "--spot", "--project=p"],
    "v6e-8-gce-reserved-1": ["--api=gce", "--accelerator=v5p-8", "--zone=us-east5-a", "--reserved",
                             "--project=p", "--network=n", "--internal-ips"],
}
COMMAND = ["--", "ddpm", "train", "--config=cifar10", "--workdir=gs://b/w"]


def arguments(case):
    if case in EXTRA:
        return EXTRA[case]
    name, zone, how, slices = CASES[case]
    return [f"--accelerator={name}", f"--zone={zone}", f"--{how}", f"--slices={slices}"]


def dry(case, capsys):
    text = ""
    for what in SUBCOMMANDS:
        assert tpu.main([what, "--name=run", "--workdir=gs://b/w", *arguments(case), "--dry-run",
                         *(COMMAND if what in ("train", "supervise") else [])]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        text += f"# {what}\n{captured.out}"
    return text


@pytest.mark.parametrize("case", [*CASES, *EXTRA])
def test_dry_run_prints_what_it_printed(case, capsys):
    golden = HERE / "golden" / f"{case}.txt"
    text = dry(case, capsys)
    if os.environ.get("DDPM_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def shape(line):
    """The command and the names of its flags: lint looks at these, and at few values."""
    words = shlex.split(line)
    return (tuple(w for w in words if re.fullmatch("[a-z-]+", w) and not w.startswith("run")
                  and not w.startswith("--")),
            tuple(sorted({w.split("=")[0] for w in words if w.startswith("--")})))


@pytest.mark.slow
def test_golden_lines_pass_the_real_gcloud(tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("no gcloud on this machine: its command tree cannot be asked")
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    lines = {}
    for golden in sorted((HERE / "golden").glob("*.txt")):
        for line in golden.read_text().splitlines():
            if line.startswith("gcloud "):
                lines.setdefault(shape(line), line)
    assert 15 < len(lines) < 60

    wrong = "gcloud compute tpus queued-resources create a --zone=z --no-such"
    file = tmp_path / "lines.json"
    file.write_text(json.dumps([{"command_string": line} for line in (*lines.values(), wrong)]))
    done = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdicts = {verdict["command_string"]: verdict for verdict in json.loads(done.stdout)}
    assert not verdicts.pop(wrong)["success"]
    assert verdicts.keys() == set(lines.values())
    for line, verdict in verdicts.items():
        assert verdict["success"], (line, verdict)


# --- the real loop -----------------------------------------------------------------------------

@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A fake gcloud on PATH and a tiny wheel; returns a function that runs tpu.py."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\n" + (HERE / "fake_gcloud.py").read_text())
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(tmp_path))
    monkeypatch.setenv("DDPM_NEED_MB", "1")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(2))
    monkeypatch.delenv("DDPM_HOME", raising=False)
    wheel = tiny_wheel(tmp_path)

    def run(what, *arguments, command=(), **state):
        values = {"queue": ["ACTIVE"], "workers": 2, **state}
        if not (tmp_path / "state.json").exists() or state:
            (tmp_path / "state.json").write_text(json.dumps(values))
        return subprocess.run(
            [sys.executable, TPU, what, "--name=run", f"--staging={tmp_path}/staging",
             "--accelerator=v4-16", "--zone=us-central2-b", "--spot", "--poll=0.3",
             "--backoff=0.05", "--stop-grace=5", f"--wheel={wheel}", "--extra=",
             f"--workdir={tmp_path}/work", *arguments, *(["--", *command] if command else [])],
            capture_output=True, text=True, timeout=150)

    run.log = lambda: (tmp_path / "log").read_text().splitlines()
    run.said = lambda: "".join(p.read_text() for p in sorted(
        [*tmp_path.glob("worker*.log"), *tmp_path.glob("worker*/ddpm/run/*/log")]))
    run.count = lambda *words: sum(all(w in line for w in words) for line in run.log())
    run.path = tmp_path
    yield run
    for pid in tmp_path.glob("worker*/ddpm/run/*/pid"):
        try:
            os.killpg(int(pid.read_text().split()[0]), 9)
        except ProcessLookupError:
            pass


def tiny_wheel(folder, text="print('hello')"):
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", text)
        wheel.writestr("tiny-1.0.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
                       "Tag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def trainer(path, steps, *flags):
    return [sys.executable, str(HERE / "trainer.py"), f"{path}/work", str(steps), *flags]


def total(path):
    return float((path / "work" / "total").read_text())


def uninterrupted(devices, steps):
    """What the trainer writes when no step is lost or done twice."""
    return sum(range(devices)) + devices * sum(range(steps))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_supervise_through_preemption(cloud):
    """create, run, preempted after a checkpoint, delete, recreate, resume, done: loss-free."""
    out = cloud("supervise", command=trainer(cloud.path, 40, "--delay=0.2"),
                queue=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
                next_queue=["WAITING_FOR_RESOURCES", "ACTIVE"], preempt_at=10)
    assert out.returncode == 0, out.stderr + cloud.said()
    assert cloud.count("queued-resources create") == 2
    assert cloud.count("queued-resources delete") == 1
    assert cloud.count("host.sh start") == 2
    assert total(cloud.path) == uninterrupted(4, 40)
    resumed = sorted(int(line.split()[-1]) for line in cloud.said().splitlines()
                     if "from step" in line)
    assert resumed[:2] == [0, 0] and resumed[2] == resumed[3] >= 10 and len(resumed) == 4
    # Run again: everything is there and done.
    starts = cloud.count("host.sh start")
    out = cloud("supervise", command=trainer(cloud.path, 40, "--delay=0.2"))
    assert out.returncode == 0 and "done" in out.stderr
    assert cloud.count("host.sh start") == starts


@pytest.mark.multiprocess
@pytest.mark.slow
def test_supervise_replaces_a_pod_of_which_one_worker_died(cloud):
    out = cloud("supervise", command=trainer(cloud.path, 30, "--delay=0.2", "--heartbeat=5"),
                kill_worker=10)
    assert out.returncode == 0, out.stderr + cloud.said()
    assert "1 of 2 workers answer" in out.stderr and cloud.count("queued-resources create") == 2
    assert total(cloud.path) == uninterrupted(4, 30)


def test_restart_42_is_free_and_134_is_counted(cloud):
    once = (f"cd {cloud.path}; n=$(cat n$DDPM_PROC 2>/dev/null || echo 0); "
            "echo $((n+1)) > n$DDPM_PROC; mkdir -p work/checkpoints/$n; "
            "case $n in 0) exit 42;; 1) exit 134;; esac")
    out = cloud("supervise", "--max-restarts=1", command=["sh", "-c", once])
    assert out.returncode == 0, out.stderr + cloud.said()
    assert cloud.count("host.sh start") == 3 and "exited 42" in out.stderr
    assert "exited 134" in out.stderr
    for i in (0, 1):
        (cloud.path / f"n{i}").unlink()
    # Another command is not done because the one before it was.
    out = cloud("supervise", "--max-restarts=0", command=["sh", "-c", once + " "])
    assert out.returncode == 1 and "--max-restarts" in out.stderr


def test_bug_stops_at_once_with_its_code_and_log(cloud):
    out = cloud("supervise", command=["sh", "-c", "[ $DDPM_PROC = 0 ] && sleep 60; "
                                      "echo ddpm: error: no such config; exit 2"])
    assert out.returncode == 2 and cloud.count("host.sh start") == 1
    assert "worker w1 ended with 2" in out.stderr and "no such config" in out.stdout
    assert not any("state=running" in x for x in cloud("status").stdout.splitlines())


@pytest.mark.slow
def test_crash_loop_without_progress_is_stopped(cloud):
    out = cloud("supervise", command=["sh", "-c", "exit 134"])
    assert out.returncode == 1 and "3 restarts without a new checkpoint" in out.stderr
    assert cloud.count("host.sh start") == 3


def test_failed_request_is_deleted_and_made_again(cloud):
    out = cloud("create", queue=["FAILED"], type="v4-16")
    assert out.returncode == 0
    assert [line.split()[3] for line in cloud.log()] == [
        "describe", "delete", "describe", "create", "describe"]
    out = cloud("create", queue=["FAILED"], next_queue=["FAILED"], type="v4-16")
    assert out.returncode == 0  # the second request became ACTIVE
    out = cloud("create")
    assert out.returncode == 0 and cloud.log()[-1].split()[3] == "describe"  # no-op


def test_already_exists_means_look_again(cloud):
    out = cloud("create", create_fail="ALREADY_EXISTS: somebody was quicker")
    assert out.returncode == 0 and cloud.count("create") == 1


@pytest.mark.slow
def test_ssh_flake_is_tried_again_and_machines_stay(cloud):
    out = cloud("supervise", command=["true"], ssh_fail=2)
    assert out.returncode == 0, out.stderr
    assert cloud.count("queued-resources delete") == 0
    out = cloud("supervise", command=["true"], ssh_fail=3, type="v4-16")
    assert out.returncode == 0 and cloud.count("queued-resources delete") == 1


@pytest.mark.parametrize("text, expected", [
    ("PERMISSION_DENIED: The caller does not have permission", "roles/tpu.admin"),
    ("RESOURCE_EXHAUSTED: Quota limit exceeded", "no quota for v4-16 (spot)"),
])
def test_refused_creation_is_one_line(cloud, text, expected):
    out = cloud("create", create_fail=text)
    assert out.returncode == 1 and expected in out.stderr and len(out.stderr.splitlines()) == 2


def test_name_of_another_run_is_refused(cloud):
    out = cloud("create", type="v6e-8")
    assert out.returncode == 1 and "is taken: it has a v6e-8" in out.stderr


@pytest.mark.slow
def test_each_subcommand_can_be_repeated(cloud):
    assert cloud("create").returncode == 0
    for _ in range(2):
        assert cloud("setup").returncode == 0
    assert cloud("train", command=["sleep", "60"]).returncode == 0
    again = cloud("train", command=["sleep", "60"])
    assert again.returncode != 0 and "is running" in again.stdout + again.stderr
    assert cloud("train", "--replace", command=["sleep", "61"]).returncode == 0
    taken = cloud("supervise", command=["sleep", "62"])
    assert taken.returncode == 1 and "another command runs under it" in taken.stderr
    status = cloud("status").stdout
    assert status.count("state=running") == 2 and status.count("attempt=2") == 2
    for _ in range(2):
        assert cloud("stop").returncode == 0
    assert cloud("status").stdout.count("state=exited rc=143") == 2
    assert "sleep 61" in cloud("logs").stdout
    for _ in range(2):
        assert cloud("delete").returncode == 0
    assert "ABSENT" in cloud("status").stderr


def test_missing_gcloud_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tpu.main(["create", "--name=a", "--accelerator=v6e-8", "--zone=us-east1-d"]) == 1
    assert "gcloud is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, expected", [
    (["--accelerator=v9-8"], "accelerator 'v9-8' is unknown; known: v2-{8"),
    (["--accelerator=v5litepod-12"], "v5litepod comes in sizes 1, 4, 8"),
    (["--accelerator=v3-8", "--zone=mars-1"], "v3 is known in us-central1-a"),
    (["--accelerator=v3-32", "--zone=europe-west4-a", "--slices=2"], "v3 has no multislice"),
    (["--accelerator=tpu7x-8", "--zone=us-central1-c"], "use --api=gce"),
    (["--accelerator=v4-8", "--zone=us-central2-b", "--api=gce"], "served by the Cloud TPU API"),
    (["--env=1"], "expected NAME=VALUE"),
    (["--name=A_b"], "lower-case letters"),
])
def test_bad_arguments_are_one_line(arguments, expected, capsys):
    base = ["create", "--name=a", "--accelerator=v6e-8", "--zone=us-east1-d"]
    assert tpu.main([*base, *arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err and len(err.splitlines()) == 1


def test_stamp_depends_on_the_content_alone(tmp_path):
    stamps = []
    for i, text in enumerate(["a = 1", "a = 1", "a = 2"]):
        folder = tmp_path / str(i)
        folder.mkdir()
        wheel = tiny_wheel(folder, text)
        os.utime(wheel, (i, i))
        staging.stage(folder, [])
        stamps.append((folder / "stamp").read_text())
    assert stamps[0] == stamps[1] != stamps[2]
    assert stamps[0].splitlines()[1] == "tiny-1.0-py3-none-any.whl"
