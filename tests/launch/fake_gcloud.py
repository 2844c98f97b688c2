"""A `gcloud` for PATH: queued resources as a state machine, workers as folders of this machine.

`ssh --worker=all --command=C` really runs C once per worker, with HOME in the worker's folder and
DDPM_COORD/NPROC/PROC set (on a TPU VM the metadata server tells as much). FAKE_GCLOUD names the
folder of state.json, whose keys a test sets:

  queue        states that the next describes show, the last one stays
  workers      how many
  ssh_fail     how many of the next ssh calls fail with 255
  create_fail  text with which create fails (once)
  taken        accelerator type of a resource that is there already
  preempt_at   a status call that finds a checkpoint of this step or later kills all workers and
               leaves the resource SUSPENDED
  kill_worker  as preempt_at, but only worker 1 dies (for good) and the resource stays ACTIVE
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

root = pathlib.Path(os.environ["FAKE_GCLOUD"])
file = root / "state.json"
state = json.loads(file.read_text())
argv = sys.argv[1:]
with open(root / "log", "a") as log:
    log.write(" ".join(argv) + "\n")
flags = dict(re.match(r"--([a-z-]+)=?(.*)", a, re.DOTALL).groups() for a in argv
             if a.startswith("--"))
words = [a for a in argv if not a.startswith("--")]


def finish(rc, out="", err=""):
    file.write_text(json.dumps(state))
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.exit(rc)


def folder(i):
    return root / f"worker{i}"


def boot():
    for i in range(state["workers"]):
        folder(i).mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        state["port"] = s.getsockname()[1]


def shoot(i):
    """The machine is gone: kill -9 of all that runs there, and its disk with it."""
    for pid in folder(i).glob("ddpm/run/*/pid"):
        try:
            os.killpg(int(pid.read_text().split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            pass
    # The test looks at what the programs printed.
    for path in folder(i).glob("ddpm/run/*/log"):
        with open(root / f"worker{i}.log", "a") as kept:
            kept.write(path.read_text())
    time.sleep(0.2)
    shutil.rmtree(folder(i), ignore_errors=True)


def newest_checkpoint():
    steps = [int(p.name) for p in root.glob("work/checkpoints/*") if p.name.isdigit()]
    return max(steps, default=-1)


if words[:3] == ["compute", "tpus", "queued-resources"]:
    what = words[3]
    if what == "describe":
        if not state.get("type"):
            finish(1, err="ERROR: (gcloud) NOT_FOUND: Resource not found\n")
        if len(state["queue"]) > 1:
            state["now"] = state["queue"].pop(0)
        else:
            state["now"] = state["queue"][0]
        if state["now"] == "ACTIVE" and not state.get("port"):
            boot()
        finish(0, f"{state['now']}\t{state['type']}\n")
    if what == "create":
        if state.get("create_fail"):
            text = state.pop("create_fail")
            if "ALREADY_EXISTS" in text:
                state["type"] = flags["accelerator-type"]
            finish(1, err=f"ERROR: (gcloud) {text}\n")
        if state.get("type"):
            finish(1, err="ERROR: (gcloud) ALREADY_EXISTS: the resource exists\n")
        state["type"] = flags["accelerator-type"]
        finish(0)
    if what == "delete":
        for i in range(state["workers"]):
            shoot(i)
        state.update(type=None, port=None, dead=[])
        state["queue"] = state.pop("next_queue", ["ACTIVE"])
        finish(0)
if words[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
    source = pathlib.Path(words[4])
    for i in range(state["workers"]):
        if i not in state.get("dead", []):
            shutil.copytree(source, folder(i) / source.name, dirs_exist_ok=True)
    finish(255 if state.get("dead") else 0)
if words[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
    command = flags["command"]
    if state.get("ssh_fail", 0) > 0:
        state["ssh_fail"] -= 1
        finish(255, err="ssh: connect to host 10.0.0.2 port 22: Connection timed out\n")
    status = " status " in command
    if status and 0 <= state.get("preempt_at", -1) <= newest_checkpoint():
        for i in range(state["workers"]):
            shoot(i)
        state.pop("preempt_at")
        state["queue"] = ["SUSPENDED"]
        finish(255, err="ssh: connect to host 10.0.0.2 port 22: No route to host\n")
    if status and 0 <= state.get("kill_worker", -1) <= newest_checkpoint():
        shoot(1)
        state.pop("kill_worker")
        state["dead"] = [1]
    worst, out = 0, ""
    chosen = range(state["workers"]) if flags["worker"] == "all" else [int(flags["worker"])]
    for i in chosen:
        if i in state.get("dead", []):
            worst = 255
            continue
        env = {**os.environ, "HOME": str(folder(i)), "DDPM_HOST_NAME": f"w{i}",
               "DDPM_COORD": f"127.0.0.1:{state['port']}", "DDPM_PROC": str(i),
               "DDPM_NPROC": str(state["workers"]), "DDPM_TPU_LOCK": str(folder(i) / "lock")}
        if "host.sh setup" in command and state.get("quick_setup", True):
            (folder(i) / "ddpm" / "venv").mkdir(exist_ok=True)
            shutil.copy(folder(i) / "ddpm" / "stamp", folder(i) / "ddpm" / "venv" / "stamp")
        done = subprocess.run(["sh", "-c", command], cwd=folder(i), env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out += done.stdout
        worst = max(worst, done.returncode)
    finish(worst, out)
if words[:2] == ["storage", "ls"] or words[:2] == ["auth", "list"]:
    finish(0)
finish(2, err=f"ERROR: fake gcloud does not know: {argv}\n")
