"""Writes workdir-84ae50c/: a run, half-drawn samples and a half-done evaluation as the code of
commit 84ae50c leaves them, and what that code draws and measures from the run.

    git worktree add /tmp/old 84ae50c
    PYTHONPATH=/tmp/old JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/golden/make_workdir.py

Run with JAX 0.10.2, Flax 0.12.8 and Orbax 0.12.8. It uses names of that commit and is kept to show
how the files came to be; the current code cannot run it. workdir.tar.xz holds run/ (12 steps; the
newest checkpoint and the best), half/ (1 of 2 shards of `ddpm sample --num=11 --batch_size=8`) and
run/evaluation/ (1 of 3 shards of bits/dim). expected.npz holds what that code draws from the run,
its bits/dim, and the losses of steps 14 and 16 where it resumes the run.
"""

import json
import pathlib
import shutil
import tarfile

import numpy as np

from ddpm_jax import experiment, judge, run

OUT = pathlib.Path(__file__).with_name("workdir-84ae50c")
WORK = pathlib.Path("/tmp/golden-84ae50c")  # the path that is written into the half-done requests
FIELDS = {
    "data.image_size": 8, "model.ch": 4, "model.ch_mult": (1,), "model.attn_resolutions": (),
    "model.num_groups": 2, "train.batch_size": 8, "train.clip_replicas": 8, "train.steps": 12,
    "train.log_every": 2, "train.steps_per_dispatch": 4, "checkpoint.every": 4,
    "checkpoint.keep": 2, "diffusion.num_timesteps": 10, "eval.sample_every": 8,
    "eval.every": 4, "eval.metrics": "bpd", "eval.best": "bpd_test", "eval.bpd_num": 16,
    "eval.sample_num": 4,
}
BOUND = judge.Options(metrics=("bpd",), bpd_num=24, splits=("train",), batch_size=8)


class Stop:
    """Requests a stop at index ``at``."""

    def __init__(self, at=None):
        self.at = at

    def requested(self, step):
        return self.at is not None and step >= self.at

    def unsaved(self, value):
        pass

    def beat(self, step=None):
        pass

    def pause(self):
        pass


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    config = experiment.load_config("digits")
    config.update_from_flattened_dict(FIELDS)
    workdir = WORK / "run"
    run.train(config, workdir, stop=Stop(), watchdog=Stop(), evaluate=judge.periodic())
    run.sample(workdir, WORK / "all", num=11, batch_size=8)
    run.sample(workdir, WORK / "raw", num=11, batch_size=8, ema=False, seed=1)
    run.sample(workdir, WORK / "half", num=11, batch_size=8, stop=Stop(1))
    exp, params, step = run.load_run(workdir)
    facts = {"workdir": str(workdir), "step": step, "weights": "ema"}
    records, _ = judge.evaluate_run(exp, params, BOUND, facts=facts)
    try:
        judge.evaluate_run(exp, params, BOUND, facts=facts, stop=Stop(1),
                           folder=f"{workdir}/evaluation/{step}")
    except judge.StoppedError:
        pass
    shutil.rmtree(workdir / "tb")
    (workdir / "loss.png").unlink()
    shutil.rmtree(workdir / "checkpoints" / "8")  # to save space, like the next two lines
    for merged in (workdir / "checkpoints" / "4").glob("*/ocdbt.process_0"):
        shutil.rmtree(merged)
    shutil.copytree(workdir, WORK / "resumed")
    config.train.steps = 16
    run.train(config, WORK / "resumed", stop=Stop(), watchdog=Stop())
    rows = map(json.loads, (WORK / "resumed" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["step"] > 12]
    images = {name: np.load(WORK / name / "samples.npz")["arr_0"] for name in ("all", "raw")}
    np.savez_compressed(OUT / "expected.npz", **images, losses=losses,
                        bpd_train=records[0][1]["bpd_train"])
    with tarfile.open(OUT / "workdir.tar.xz", "w:xz") as archive:
        for name in ("run", "half"):
            archive.add(WORK / name, name)


if __name__ == "__main__":
    main()
