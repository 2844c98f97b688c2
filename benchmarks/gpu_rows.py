"""What gpu.sh needs beside `ddpm bench`: rows of whole commands and of a training run.

  python gpu_rows.py stamp FILE HOME              add commit and date to the rows of a file
  python gpu_rows.py command FILE BENCH NAME UNTIL -- WORDS
                                                  run a command; a row of the seconds until a line
                                                  that begins with UNTIL
  python gpu_rows.py run FILE WORKDIR SAMPLES     a row of a training run, from its metrics.jsonl
  python gpu_rows.py pictures FOLDER SIZE         write 256 made-up pictures
"""

import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def _write(file, rows):
    pathlib.Path(file).write_text(json.dumps(rows, indent=1) + "\n")


def _row(bench, name, seconds, **facts):
    """As timing.result makes them; imports JAX, which the timed command must not wait for."""
    import jax

    from ddpm_jax.compilation import timing
    return timing.result(bench, name=name, times=timing.Times.of(seconds), devices=jax.devices(),
                         **facts)


def stamp(file, home):
    git = subprocess.run(["git", "-C", home, "describe", "--always", "--dirty"],
                         capture_output=True, text=True, check=False)
    commit = os.environ.get("COMMIT") or git.stdout.strip() or "unknown"
    date = datetime.date.today().isoformat()
    rows = json.loads(pathlib.Path(file).read_text())
    _write(file, [{**row, "commit": commit, "date": date} for row in rows])


def command(file, bench, name, until, dashes, *words):
    """Runs ``words``; the row's seconds end at the first line of output that begins with ``until``
    ('': at the command's end). Each line is printed with its time."""
    before, reached = time.perf_counter(), None
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        for line in process.stdout:
            passed = time.perf_counter() - before
            if until and reached is None and line.startswith(until):
                reached = passed
            print(f"{passed:6.1f} s  {line}", end="", flush=True)
    whole = time.perf_counter() - before
    if process.returncode:
        sys.exit(process.returncode)
    if until and reached is None:
        sys.exit(f"no line of the command began with {until!r}")
    _write(file, [_row(bench, name, [reached or whole], images=1, whole_command_s=round(whole, 1),
                       note=f"the whole command {whole:.1f} s")])


def run(file, workdir, samples):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    config = json.loads((pathlib.Path(workdir) / "config.json").read_text())
    batch = config["train"]["batch_size"]
    rates = [r["images_per_second"] for r in records if r.get("images_per_second")]
    later = rates[len(rates) // 10:]  # the first tenth has the start
    drawn = json.loads(pathlib.Path(samples).read_text())[0]["seconds"]["median"]
    steps = records[-1]["step"]
    _write(file, [_row(
        "train", "ddpm_jax", [batch / rate for rate in later], images=batch,
        dtype=config["model"]["dtype"], config=config["data"]["name"], steps=steps,
        loss=statistics.mean(r["loss"] for r in records[-10:]), samples100_s=drawn,
        note=f"{steps} steps, rows of metrics.jsonl; then 100 samples in {drawn:.0f} s")])


def pictures(folder, size):
    import numpy as np
    from PIL import Image

    folder, size = pathlib.Path(folder), int(size)
    folder.mkdir(parents=True, exist_ok=True)
    made = np.random.default_rng(0)
    for i in range(256):
        coarse = made.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / f"{i:04d}.png")


COMMANDS = {"stamp": stamp, "command": command, "run": run, "pictures": pictures}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
