"""The dry run of a pod: each of its checks can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source
from ddpm_jax.doctor import dry_run

PROCESSES, DEVICES = 2, 2


@pytest.fixture
def seen():
    """What the processes of a healthy pod record."""
    config = dry_run.dry_config(PROCESSES * DEVICES)
    batch = config.train.batch_size
    source = open_source("digits", "", "train", image_size=8, channels=1)
    images = source.array()
    rng = np.random.default_rng(0)
    out = [{"examples": [], "params": {str(d): "abc" for d in range(DEVICES)}}
           for _ in range(PROCESSES)]
    for step in range(dry_run.STEPS):
        rows = dry_run.checksum(images[feed.batch_indices(config.seed, step, batch, len(source))])
        for one, part in zip(out, np.split(rows, PROCESSES), strict=True):
            one["examples"] += [[row, int(rng.integers(50)), rng.normal(size=4).tolist()]
                                for row in part.tolist()]
    return out


def verdicts(seen):
    checks = (dry_run.check_batches, dry_run.check_draws, dry_run.check_parameters)
    return {f.name: f.ok for f in (check(seen, DEVICES) for check in checks)}


def test_healthy_pod_passes(seen):
    assert verdicts(seen) == {"batches": True, "t and noise": True, "parameters": True}


def test_the_same_batch_on_every_host_is_found(seen):
    """What today's ports do: each host reads the data set from its start."""
    for mine, theirs in zip(seen[1]["examples"], seen[0]["examples"], strict=True):
        mine[0] = theirs[0]
    assert verdicts(seen) == {"batches": False, "t and noise": True, "parameters": True}


def test_exchanged_and_missing_examples_are_found(seen):
    mine, theirs = seen[1]["examples"], seen[0]["examples"]
    mine[0][0], theirs[0][0] = theirs[0][0], mine[0][0]
    assert not verdicts(seen)["batches"]
    mine[0][0], theirs[0][0] = theirs[0][0], mine[0][0]
    assert verdicts(seen)["batches"]
    mine.pop()
    assert not verdicts(seen)["batches"]


def test_shared_noise_is_found(seen):
    for mine, theirs in zip(seen[1]["examples"], seen[0]["examples"], strict=True):
        mine[2] = theirs[2]
    assert not verdicts(seen)["t and noise"]


def test_one_t_for_all_is_found(seen):
    for one in seen:
        for example in one["examples"]:
            example[1] = 7
    assert not verdicts(seen)["t and noise"]


def test_different_parameters_are_found(seen):
    seen[1]["params"]["1"] = "xyz"
    assert not verdicts(seen)["parameters"]


def test_the_loss_records_what_reaches_it_and_stays_the_same():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    recorded = []
    loss = dry_run.recording(lambda fn, schedule, x, t, noise: (x - noise).mean((1, 2, 3)),
                             lambda *values: recorded.append([np.asarray(v) for v in values]))
    t, noise = jnp.arange(4), jnp.ones((4, 8, 8, 1))
    x = jnp.asarray(images) / 127.5 - 1.0
    value, gradient = jax.jit(jax.value_and_grad(
        lambda x: loss(None, None, x, t, noise).mean()))(x)
    jax.effects_barrier()
    np.testing.assert_allclose(value, (x - noise).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.full(x.shape, 1 / x.size), rtol=1e-5)
    [(seen_images, seen_t, seen_noise)] = recorded
    np.testing.assert_array_equal(seen_images, images)
    np.testing.assert_array_equal(seen_t, t)
    np.testing.assert_array_equal(seen_noise, noise)


def test_missing_part_of_a_checkpoint_and_second_talker(tmp_path):
    run = tmp_path / "run"
    part = run / "checkpoints" / str(dry_run.STEPS) / "params" / "ocdbt.process_0" / "d"
    part.mkdir(parents=True)
    (part / "x").write_text("")
    assert dry_run.check_checkpoint(tmp_path, 1).ok
    assert dry_run.check_checkpoint(tmp_path, 2).ok is False
    lines = [json.dumps({"step": i + 1, "loss": 1.0}) for i in range(dry_run.STEPS)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert dry_run.check_logs(tmp_path, ["training digits", ""]).ok
    assert dry_run.check_logs(tmp_path, ["training digits"] * 2).ok is False
    (run / "metrics.jsonl").write_text("\n".join(lines * 2) + "\n")
    assert dry_run.check_logs(tmp_path, ["training digits", ""]).ok is False
