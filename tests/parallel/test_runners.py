"""One training step, three runners, one to eight devices: the gradients of its examples, two by
two, clipped in numpy.

Plain SGD and unclipped gradients are compared: Adam and the clip hide a wrong scale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import digits, weights

from ddpm_jax import programs
from ddpm_jax.compilation import hlo
from ddpm_jax.data.feed import shuffled_index
from ddpm_jax.experiment import build_model, build_training
from ddpm_jax.models import layers
from ddpm_jax.parallel.runners import RUNNERS, fetch
from ddpm_jax.training import gradients, rng
from ddpm_jax.training.steps import Batch, TrainState, init_state

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), np.uint8)
LABELS = np.arange(24, dtype=np.int32) % 3
CLIP = 2.55  # the batch's gradient is larger, and those of some pairs of examples and not of others


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


PER_REPLICA = (("train.clip_scope", "per_replica"), ("train.clip_norm", CLIP))
ACCUMULATED = (("train.accumulation", 2),)


def build(config, devices):
    return build_training(build_model(config, jax.devices()[:devices]))


def plain_sgd(runner, devices, fields=()):
    """Training with rate 1 and nothing else in its optimizer."""
    training, tx = build(config(runner, **dict(fields)), devices), optax.sgd(1.0)
    return training._replace(
        tx=tx, step=functools.partial(training.step, tx=tx, ema_decay=0.9),
        abstract_state=jax.eval_shape(lambda p: init_state(p, tx),
                                      training.experiment.abstract_params))


@functools.cache
def of_two():
    """What every step is compared with: the losses [8] and the gradients [8, ...] of the first
    batch's examples, two by two, of the network with named parameters on one device."""
    training = build(config("jit"), 1)
    exp, settings = training.experiment, training.step.keywords
    rows = shuffled_index(np.uint32(0), np.arange(16, dtype=np.uint32), len(IMAGES), np)

    @jax.jit
    def value_and_gradient(params, index, images, labels):
        draws = rng.draw(rng.example_keys(rng.run_key(0), 0, index), image_shape=exp.image_shape,
                         **{k: settings[k] for k in (
                             "num_timesteps", "dropout_shapes", "label_dropout")})
        images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)
        return jax.value_and_grad(settings["loss_fn"], has_aux=True)(
            params, Batch(images, labels), draws)

    found = [value_and_gradient(weights(exp.abstract_params, 5), np.arange(i, i + 2),
                                IMAGES[rows[i:i + 2]], LABELS[rows[i:i + 2]])
             for i in range(0, 16, 2)]
    (losses, _), grads = jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(found))
    return losses, grads


def expected(parts=1, clip=np.inf):
    """Parameters moved by one step, and its metrics, where the gradient of each of ``parts``
    equal parts of the batch is clipped."""
    losses, grads = of_two()
    grads = jax.tree.map(lambda g: g.reshape(parts, 8 // parts, *g.shape[1:]).mean(1), grads)
    norms = np.sqrt(sum((g.reshape(parts, -1) ** 2).sum(1) for g in jax.tree.leaves(grads)))
    scales = np.minimum(1, clip / norms)
    return (jax.tree.map(lambda g: -np.tensordot(scales, g, 1) / parts, grads),
            {"loss": losses.mean(), "grad_norm": norms.mean(),
             "clip_fraction": (norms > clip).mean()})


def one_step(runner, devices, fields=()):
    """Parameters moved by one SGD step of rate 1, and the metrics."""
    training = plain_sgd(runner, devices, fields)
    exp, params = training.experiment, weights(training.experiment.abstract_params, 5)
    state = exp.runner.put("replicated", TrainState(
        np.int32(0), params, params, training.tx.init(params)))
    program = programs.train_program(training, len(IMAGES), max_steps=1)
    data = exp.runner.put("replicated", Batch(IMAGES.reshape(len(IMAGES), -1), LABELS))
    carry, metrics = program.step(program.start(state), data, np.uint32(0), np.int32(1))
    new, metrics = fetch((program.state(carry), metrics))
    return (jax.tree.map(np.subtract, new.params, params),
            {k: v[0] for k, v in metrics.items()})


def assert_same(got, want):
    scale = np.sqrt(sum((b**2).sum() for b in jax.tree.leaves(want[0])))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[0]),
                            jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
    for name, value in want[1].items():
        assert got[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("runner, devices, fields", [
    ("shard_map", 8, ()), *(
        pytest.param(*cell, marks=pytest.mark.slow) for cell in (
            ("jit", 8, ()), ("jit", 1, ()), ("jit", 4, ACCUMULATED), ("pmap", 8, ()),
            ("shard_map", 4, ACCUMULATED))),
    *(pytest.param(*cell, marks=pytest.mark.soak) for cell in (
        ("pmap", 1, ()), ("shard_map", 1, ())))])
def test_unclipped_gradients_agree(runner, devices, fields):
    assert_same(one_step(runner, devices, fields), expected())


@pytest.mark.slow
@pytest.mark.parametrize("runner, devices, micro_batches", [
    ("jit", 8, 1), ("jit", 4, 1), ("pmap", 8, 1), ("shard_map", 4, 1), ("shard_map", 1, 4),
    pytest.param("jit", 1, 1, marks=pytest.mark.soak)])
def test_replicas_are_clipped_alike_whatever_the_devices(runner, devices, micro_batches):
    """Where a device has one part, its gradient is an ordinary one; several are taken together."""
    want = expected(8, CLIP)
    assert 0 < want[1]["clip_fraction"] < 1
    fields = PER_REPLICA if micro_batches == 1 else (
        *PER_REPLICA, ("train.accumulation", micro_batches))
    assert_same(one_step(runner, devices, fields), want)


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
    ("jit", 2, 2), ("pmap", 4, 1), ("shard_map", 2, 2), ("shard_map", 1, 1),
    *(pytest.param(*cell, marks=pytest.mark.soak) for cell in (
        ("pmap", 2, 2), ("jit", 4, 1), ("shard_map", 4, 1), ("jit", 1, 1), ("pmap", 1, 1)))])
def test_more_devices_than_replicas_clip_the_same_parts(runner, replicas, micro_batches):
    """So a run that was clipped in 8 parts can be resumed on 16 devices."""
    want = expected(replicas, CLIP)
    assert 0 < want[1]["clip_fraction"]
    fields = (*PER_REPLICA, ("train.clip_replicas", replicas),
              ("train.accumulation", micro_batches))
    assert_same(one_step(runner, 8, fields), want)


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


# XLA gathers these tiny maps for the kernels' gradients, not those of the paper's model.
GATHERED = {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.parametrize("fields, resident, allowed", [
    ((), True, {"all-reduce"}), (PER_REPLICA, True, GATHERED), (ACCUMULATED, False, {"all-reduce"}),
    *(pytest.param(*cell, marks=pytest.mark.soak) for cell in (
        ((), False, {"all-reduce"}), (PER_REPLICA, False, GATHERED),
        (ACCUMULATED, True, {"all-reduce"})))])
def test_under_jit_a_device_works_on_its_share(fields, resident, allowed):
    """Equal results do not show it: every device could do all of the work, or pass it around."""
    def lowered(devices):
        training = plain_sgd("jit", devices, (*fields, ("train.clip_replicas", devices)))
        program = programs.train_program(training, len(IMAGES) if resident else None, max_steps=1)
        return program.step.lower(*program.arguments)

    cut, whole = lowered(8).compile(), lowered(1)
    # Of the whole program before XLA's passes, which is 0.85 of what they leave.
    assert cut.cost_analysis()["flops"] < 0.35 * whole.cost_analysis()["flops"]
    assert set(hlo.summary(cut.as_text())["collectives"]) <= allowed
