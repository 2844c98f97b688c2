"""One training step, three runners, one and eight devices: the same gradients.

Plain SGD and unclipped gradients are compared: Adam and the clip hide a wrong scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import digits

from ddpm_jax import programs
from ddpm_jax.compilation import hlo
from ddpm_jax.data.feed import shuffled_index
from ddpm_jax.experiment import build_model, build_training
from ddpm_jax.models import layers
from ddpm_jax.parallel.runners import RUNNERS, fetch
from ddpm_jax.training import gradients, rng
from ddpm_jax.training.steps import Batch, init_state

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), np.uint8)
LABELS = np.arange(24, dtype=np.int32) % 3


def config(runner, **fields):
    c = digits()
    c.data.image_size = 4
    c.model.update(ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2,
                   dropout=0.3, num_classes=3, label_dropout=0.3)
    c.train.update(batch_size=16, clip_norm=0.0, clip_scope="global", clip_replicas=8,
                   steps_per_dispatch=1)
    c.data.flip = True
    c.parallel.runner = runner
    c.update_from_flattened_dict(fields)
    return c


@functools.cache
def one_step(runner, devices, fields=(), packed=True):
    """Parameters moved by one SGD step of rate 1, and the metrics."""
    training = build(config(runner, **dict(fields)), devices)
    tx = optax.sgd(1.0)
    training = training._replace(
        tx=tx, step=functools.partial(training.step, tx=tx, ema_decay=0.9),
        abstract_state=jax.eval_shape(lambda p: init_state(p, tx),
                                      training.experiment.abstract_params))
    exp = training.experiment
    # Weights of order one: at the initial ones the last layers' gradients nearly vanish.
    params = jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), exp.init_params())
    state = exp.runner.put("replicated", jax.tree.map(np.asarray, init_state(params, tx)))
    if packed:
        program = programs.train_program(training, len(IMAGES), max_steps=1)
        data = exp.runner.put("replicated", Batch(IMAGES.reshape(len(IMAGES), -1), LABELS))
        carry, metrics = program.step(program.start(state), data, np.uint32(0), np.int32(1))
        new, metrics = fetch((program.state(carry), jax.tree.map(lambda v: v[0], metrics)))
    else:
        rows = shuffled_index(np.uint32(0), np.arange(16, dtype=np.uint32), len(IMAGES), jnp)
        new, metrics = jax.jit(training.step)(state, Batch(IMAGES[rows], LABELS[rows]),
                                              rng.run_key(0))
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, params, new.params)
    return moved, {k: float(v) for k, v in metrics.items()}


def build(config, devices):
    return build_training(build_model(config, jax.devices()[:devices]))


def assert_same(got, want):
    scale = optax.tree.norm(want[0]).item()
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[0]),
                            jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
    for name, value in want[1].items():
        assert got[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("runner, devices", [
    ("jit", 8), ("shard_map", 8), *(pytest.param(*cell, marks=pytest.mark.slow)
                                    for cell in (("pmap", 8), ("shard_map", 1), ("pmap", 1)))])
def test_unclipped_gradients_agree(runner, devices):
    assert_same(one_step(runner, devices), one_step("jit", 1))


@pytest.mark.slow
def test_packed_parameters_move_as_named_ones_do():
    assert_same(one_step("jit", 1), one_step("jit", 1, packed=False))


PER_REPLICA = (("train.clip_scope", "per_replica"), ("train.clip_norm", 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("runner, devices, micro_batches", [
    ("jit", 1, 1), ("jit", 4, 1), ("pmap", 8, 1), ("shard_map", 4, 1), ("shard_map", 1, 4)])
def test_replicas_are_clipped_alike_whatever_the_devices(runner, devices, micro_batches):
    """Where a device has one part, its gradient is an ordinary one; several are taken together."""
    fields = (PER_REPLICA[0], ("train.clip_norm", 3.5))
    want = one_step("jit", 8, fields)
    assert 0 < want[1]["clip_fraction"] < 1
    if micro_batches > 1:
        fields = (*fields, ("train.accumulation", micro_batches))
    assert_same(one_step(runner, devices, fields), want)
    plain = one_step("jit", 1)
    assert optax.tree.norm(jax.tree.map(lambda a, b: a - b, plain[0], want[0])) > 1e-2


@pytest.mark.parametrize("runner", list(RUNNERS))
def test_a_device_with_one_part_has_an_ordinary_program(runner, monkeypatch):
    """Nothing that takes parts together is traced there."""
    def used(*args):
        raise AssertionError("parts taken together")

    monkeypatch.setattr(gradients, "_of_shards", used)
    monkeypatch.setattr(layers, "conv3x3_by_shard", used)
    for devices, expected in ((8, "nothing"), (4, "parts taken together")):
        training = build(config(runner, **dict(PER_REPLICA)), devices)
        program = programs.train_program(training, len(IMAGES), max_steps=1)
        with pytest.raises(AssertionError, match=expected):
            program.step.lower(*program.arguments)
            raise AssertionError("nothing")


@pytest.mark.parametrize("kernel, form", [("auto", "turned"), ("convolutions", "convolutions")])
def test_clip_kernel_is_how_parts_are_taken_together(kernel, form, monkeypatch):
    def used(x, kernel, stride, form):
        raise AssertionError(form)

    monkeypatch.setattr(layers, "conv3x3_by_shard", used)
    fields = {"parallel.clip_kernel": kernel} | dict(PER_REPLICA)
    program = programs.train_program(build(config("shard_map", **fields), 4), len(IMAGES),
                                     max_steps=1)
    with pytest.raises(AssertionError, match=form):
        program.step.lower(*program.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("runner, replicas, micro_batches", [
    ("jit", 2, 2), ("pmap", 2, 2), ("shard_map", 2, 2), ("jit", 4, 1), ("shard_map", 4, 1),
    ("shard_map", 1, 1), *(pytest.param(*cell, marks=pytest.mark.soak)
                           for cell in (("pmap", 4, 1), ("jit", 1, 1), ("pmap", 1, 1)))])
def test_more_devices_than_replicas_clip_the_same_parts(runner, replicas, micro_batches):
    """So a run that was clipped in 8 parts can be resumed on 16 devices."""
    fields = (*PER_REPLICA, ("train.clip_replicas", replicas))
    want = one_step("jit", 1, fields)
    assert 0 < want[1]["clip_fraction"]
    assert_same(one_step(runner, 8, (*fields, ("train.accumulation", micro_batches))), want)


@pytest.mark.slow
def test_accumulation_on_many_devices():
    fields = (("train.accumulation", 2),)
    for runner in ("jit", "shard_map"):
        assert_same(one_step(runner, 4, fields), one_step("jit", 1))


@pytest.mark.parametrize("name", RUNNERS)
def test_placements_round_trip(name):
    runner = RUNNERS[name](jax.devices())
    batch = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    steps = np.stack([batch, batch + 100])
    double = runner.compile(lambda a, x: a * x, ("replicated", "batch"), ("batch",))
    out = double(runner.put("replicated", np.float32(2)), runner.put("batch", batch))
    np.testing.assert_array_equal(runner.local(out), 2 * batch)
    last = runner.compile(lambda x: x[1], ("steps",), ("batch",))
    np.testing.assert_array_equal(runner.local(last(runner.put("steps", steps))), steps[1])
    total = runner.compile(
        lambda x: jax.lax.psum(x.sum(), runner.axis_name) if runner.axis_name else x.sum(),
        ("batch",), ("replicated",))
    assert fetch(total(runner.put("batch", batch))) == batch.sum()


@pytest.mark.parametrize("name", RUNNERS)
def test_abstract_arguments_lower_to_one_program_for_all_devices(name):
    runner = RUNNERS[name](jax.devices())
    fn = runner.compile(lambda x: x * jnp.float32(2), ("batch",), ("batch",))
    lowered = fn.lower(runner.abstract("batch", jax.ShapeDtypeStruct((16, 3), jnp.float32)))
    assert lowered.compile() is not None


def test_devices_of_a_process_lie_side_by_side():
    mesh = RUNNERS["shard_map"](jax.devices()[::-1]).mesh
    assert [d.id for d in mesh.devices.flat] == sorted(d.id for d in jax.devices())


ACCUMULATED = {"train.accumulation": 2}
# XLA gathers these tiny maps for the kernels' gradients, not those of the paper's model.
GATHERED = {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.parametrize("fields, resident, allowed", [
    ({}, True, {"all-reduce"}), ({}, False, {"all-reduce"}), (dict(PER_REPLICA), True, GATHERED),
    (ACCUMULATED, False, {"all-reduce"}),
    pytest.param(dict(PER_REPLICA), False, GATHERED, marks=pytest.mark.soak),
    pytest.param(ACCUMULATED, True, {"all-reduce"}, marks=pytest.mark.soak)])
def test_under_jit_a_device_works_on_its_share(fields, resident, allowed):
    """Equal results do not show it: every device could do all of the work, or pass it around."""
    def lowered(devices):
        training = build(config("jit", **fields, **{"train.clip_replicas": devices}), devices)
        program = programs.train_program(training, len(IMAGES) if resident else None)
        return program.step.lower(*program.arguments)

    cut, whole = lowered(8).compile(), lowered(1)
    # Of the whole program before XLA's passes, which is 0.85 of what they leave.
    assert cut.cost_analysis()["flops"] < 0.35 * whole.cost_analysis()["flops"]
    assert set(hlo.summary(cut.as_text())["collectives"]) <= allowed
