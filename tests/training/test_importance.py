"""Timesteps drawn by importance: against lists of losses in numpy, and in a run that is cut off,
resumed, and laid out over devices in several ways."""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import config

from ddpm_jax import checkpoints, programs
from ddpm_jax.experiment import build_model, build_training, new_state
from ddpm_jax.parallel import cut
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.training import importance, rng
from ddpm_jax.training.steps import Batch

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 16), np.uint8)
FIELDS = {
    "data.image_size": 4, "diffusion.num_timesteps": 3, "diffusion.variance": "learned_range",
    "diffusion.schedule.beta_end": 0.5, "diffusion.loss": "vlb", "train.clip_norm": 0.0,
    "train.batch_size": 16, "model.dropout": 0.0, "optimizer.warmup_steps": 1,
}
STEPS = 6


def test_probabilities_are_of_the_last_ten_losses_of_each_timestep():
    random, total = np.random.default_rng(0), 5
    history, lists = importance.start(total), [collections.deque(maxlen=10) for _ in range(total)]
    record, probabilities = jax.jit(importance.record), jax.jit(importance.probabilities)
    full = []
    for step in range(30):
        t = random.integers(0, 1 + min(step // 2, total - 1), 24)  # at first more than ten of one t
        losses = (1 + t) ** 2 * random.exponential(size=24).astype(np.float32)
        history = record(history, t, losses)
        for one, loss in zip(t, losses, strict=True):
            lists[one].append(loss)
        full.append(all(len(one) == 10 for one in lists))
        root = np.array([np.sqrt(np.mean(np.square(one))) if one else 0 for one in lists])
        want = 0.999 * root / root.sum() + 0.001 / total if full[-1] else np.full(total, 1 / total)
        np.testing.assert_allclose(probabilities(history), want, rtol=1e-5)
    assert 3 < sum(full) < 27
    assert int(history.count.max()) < 20  # so it never overflows


def test_a_timestep_is_drawn_as_often_as_its_probability_and_weighted_by_the_inverse():
    p = jnp.array([0.5, 0.0, 0.2, 0.3])
    uniform = (jnp.arange(1000) + 0.5) / 1000
    t = jax.jit(jax.vmap(functools.partial(importance.timestep, jnp.cumsum(p))))(uniform)
    np.testing.assert_allclose(np.bincount(t, minlength=4) / 1000, p, atol=1.1e-3)
    drawn = jax.jit(lambda p: rng.draw(
        rng.example_keys(rng.run_key(0), 0, jnp.arange(64)), image_shape=(1, 1, 1),
        num_timesteps=4, dropout_shapes=[], probabilities=p))(p)
    np.testing.assert_allclose(drawn.weight, 1 / (4 * p[drawn.t]), rtol=1e-6)
    assert 20 < int((drawn.t == 0).sum()) < 44


def stepping(runner, devices, fields=()):
    training = build_training(build_model(config(**{
        **FIELDS, "parallel.runner": runner, **dict(fields)}), jax.devices()[:devices]))
    program = programs.train_program(training, len(IMAGES), max_steps=1)
    data = training.experiment.runner.put("replicated", Batch(IMAGES))

    def run(carry, steps):
        losses = []
        for _ in range(steps):
            carry, metrics = program.step(carry, data, np.uint32(0), np.int32(1))
            losses.append(float(fetch(metrics["loss"])[0]))
        return carry, losses

    return training, program, run


@functools.cache
def straight():
    training, program, run = stepping("jit", 1)
    carry, losses = run(program.start(new_state(training)), STEPS)
    return fetch(program.state(carry)), losses


def test_the_history_comes_to_differ_between_timesteps():
    state, losses = straight()
    p = importance.probabilities(state.history)
    assert np.isfinite(losses).all() and float(p.max() / p.min()) > 1.2
    assert int(state.history.count.min()) >= importance.KEPT


def test_a_run_that_is_cut_off_and_resumed_has_the_same_bits(tmp_path):
    training, program, run = stepping("jit", 1)
    carry, first = run(program.start(new_state(training)), STEPS - 2)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, background=False)) as store:
        store.save(STEPS - 2, program.state(carry), {})
        store.wait()
        restored = store.restore(STEPS - 2, training.abstract_state, training.experiment.runner)
    carry, rest = run(program.start(restored), 2)
    state, losses = straight()
    assert first + rest == losses
    jax.tree.map(np.testing.assert_array_equal, fetch(program.state(carry)), state)


@pytest.mark.parametrize("runner, devices, fields", [
    ("shard_map", 8, ()), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (
        ("shard_map", 1, (("train.clip_scope", "per_replica"), ("train.accumulation", 2))),
        ("jit", 8, (("parallel.shards", 4), ("parallel.cut", "params"),
                    ("train.accumulation", 2)))))])
def test_the_same_history_on_any_devices(runner, devices, fields, monkeypatch):
    """Losses reach it in the order of the examples, whatever parts a batch is taken in and
    whatever is cut over devices."""
    monkeypatch.setattr(cut, "WHOLE_BYTES", 0)
    training, program, run = stepping(runner, devices, fields)
    carry, losses = run(program.start(new_state(training)), STEPS)
    state, wanted = straight()
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    history = fetch(carry.history)
    np.testing.assert_array_equal(history.count, state.history.count)
    np.testing.assert_allclose(history.losses, state.history.losses, rtol=2e-3)
