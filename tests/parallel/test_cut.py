"""A state that is cut over devices: the same numbers, less memory, read back on any number of them.

Unclipped gradients are compared, by their norm and Adam's first moment: the clip hides a wrong
scale.
"""

import functools
import json
import shutil
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from pod_processes import Processes
from tiny_run import FLAGS, digits
from xla_flags import xla_flags

from ddpm_jax import experiment, programs
from ddpm_jax.checkpoints import Checkpoints
from ddpm_jax.cli.main import main
from ddpm_jax.compilation import hlo
from ddpm_jax.config import from_json
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, build_training
from ddpm_jax.parallel import cut
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.training import packing
from ddpm_jax.training.steps import Batch, init_state

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)


@pytest.fixture(autouse=True)
def small_arrays_are_cut_too(monkeypatch):
    monkeypatch.setattr(cut, "WHOLE_BYTES", 0)


def config(shards, kind, **fields):
    c = digits()
    c.data.image_size = 4
    c.model.update(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2,
                   dropout=0.0)
    c.train.update(batch_size=8, clip_norm=0.0, clip_scope="global", clip_replicas=8)
    c.parallel.update(runner="jit", shards=shards, cut=kind)
    c.update_from_flattened_dict(fields)
    return c


class Made(NamedTuple):
    training: Any
    program: Any
    compiled: Any

    def start(self):
        """A carry with weights of order one: at the initial ones gradients nearly vanish."""
        params = jax.tree.map(
            lambda p: np.asarray(p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape)),
            self.training.experiment.init_params())
        state = jax.tree.map(np.asarray, init_state(params, self.training.tx))
        return self.program.start(self.training.experiment.runner.put(
            self.training.placement(state), state))

    def steps(self, carry, count):
        """-> (carry, metrics of each step)"""
        data = self.training.experiment.runner.put(
            "replicated", Batch(IMAGES.reshape(len(IMAGES), -1)))
        found = []
        for _ in range(count):
            carry, metrics = self.compiled(carry, data, np.uint32(0), np.int32(1))
            found.append({name: float(fetch(x)[0]) for name, x in metrics.items()})
        return carry, found


def lowered(shards, kind, scope, devices=8):
    training = build_training(build_model(
        config(shards, kind, **{"train.clip_scope": scope}), jax.devices()[:devices]))
    program = programs.train_program(training, len(IMAGES), max_steps=1)
    return training, program, program.step.lower(*program.arguments)


@functools.cache
def made(shards=1, kind="optimizer", scope="global"):
    """1 shard: on one device, since test_runners.py has eight, whole."""
    training, program, step = lowered(shards, kind, scope, 1 if shards == 1 else 8)
    return Made(training, program, step.compile())


@functools.cache
def two_steps(*args):
    one = made(*args)
    carry, metrics = one.steps(one.start(), 2)
    return one.program.state(carry), metrics


def assert_close(got, want):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got),
                            jax.tree.leaves(want), strict=True):
        scale = max(np.abs(np.asarray(b)).max(), 1e-3)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


CASES = [pytest.param((8, "optimizer"), marks=pytest.mark.slow), (4, "params"),
         pytest.param((8, "optimizer", "per_replica"), marks=pytest.mark.soak)]  # 20 s to compile


@pytest.mark.parametrize("args", CASES)
def test_the_numbers_are_those_of_a_whole_state(args):
    (state, metrics), (want, wanted) = two_steps(*args), two_steps()
    assert_close(state, want)
    for one, other in zip(metrics, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        if "per_replica" not in args:  # there the norm is the mean of the parts'
            assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("args", CASES)
def test_a_device_has_its_part_of_the_state_and_of_the_work(args):
    state, _ = two_steps(*args)
    fields = cut.CUTS[args[1]]
    for name in state._fields:
        arrays = jax.tree.leaves(getattr(state, name))
        kernels = [x for x in arrays if x.ndim > 1]
        here = sum(x.addressable_data(0).nbytes for x in kernels)
        assert here == sum(x.nbytes for x in kernels) / (args[0] if name in fields else 1), name
        assert all(x.addressable_data(0).shape == x.shape for x in arrays if x.ndim < 2)
    of, whole = made(*args).compiled, made().compiled
    assert of.cost_analysis()["flops"] < 0.3 * whole.cost_analysis()["flops"]
    saved = sum(x.nbytes for name in fields for x in jax.tree.leaves(getattr(state, name)))
    arguments = [x.memory_analysis().argument_size_in_bytes for x in (of, whole)]
    assert arguments[0] < arguments[1] - 0.6 * saved


def test_a_whole_step_of_cut_weights_gathers_kernels_and_not_activations():
    collectives = hlo.summary(made(4, "params").compiled.as_text())["collectives"]
    kernels = 4 * sum(x.size for x in jax.tree.leaves(two_steps(4, "params")[0].params)
                      if x.ndim > 1)
    assert collectives["all-gather"]["bytes"] <= 2 * kernels / 4  # counted: what a device gives


def test_parts_that_are_clipped_go_with_a_cut_optimizer():
    """In CI traced only."""
    assert "shards" in lowered(8, "optimizer", "per_replica")[2].as_text()


@pytest.mark.slow
def test_checkpoints_fit_any_number_of_shards(tmp_path):
    store, source = Checkpoints(tmp_path, keep=9), made(4, "params")
    carry, _ = source.steps(source.start(), 1)
    saved = source.program.state(carry)
    store.save(1, saved, {})
    want, _ = source.steps(carry, 1)
    for shards, kind in ((1, "optimizer"), (2, "params"), (4, "params"), (8, "optimizer")):
        training = build_training(build_model(config(shards, kind)))
        read = store.restore(1, training.abstract_state, training.experiment.runner)
        jax.tree.map(np.testing.assert_array_equal, read, saved)
        for x, like in zip(jax.tree.leaves(read), jax.tree.leaves(training.abstract_state),
                           strict=True):
            assert like.sharding is None or x.sharding == like.sharding
        store.save(10 * shards, read, {})  # and back
    for step, one in ((10, source), (20, source), (80, source), (40, made(8, "optimizer"))):
        read = store.restore(step, one.training.abstract_state, one.training.experiment.runner)
        new, _ = one.steps(one.program.start(read), 1)
        same = np.testing.assert_array_equal if one is source else assert_close
        jax.tree.map(same, one.program.state(new), source.program.state(want))
    store.close()


def test_whole_weights_for_samples():
    one = made(4, "params")
    for x, whole in zip(jax.tree.leaves(one.program.ema_params(one.start())),
                        jax.tree.leaves(one.training.abstract_state.params), strict=True):
        assert x.addressable_data(0).shape == whole.shape


def test_small_stacks_stay_whole_and_output_channels_are_cut(monkeypatch):
    like = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in {
        "a": (64, 3, 3, 32), "b": (64, 3, 3, 32), "dense": (32, 64), "out": (3, 3, 3, 64),
        "odd": (3, 5), "bias": (64,)}.items()}
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "shards"))
    order = packing.ORDERS["tpu"]
    axes = cut.make_cut(mesh, like, fields=(), order=order).axes
    assert axes == {(64, 3, 3, 32): 0, (2, 3, 3, 32, 64): 4, (32, 64): 1, (1, 32, 64): 2,
                    (3, 3, 3, 64): 3, (1, 3, 3, 64, 3): 3}
    stacked = packing.pack(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), like), order)
    assert {x.shape for x in stacked.kernels.values()} >= {s for s in axes if len(s) in (3, 5)}
    monkeypatch.setattr(cut, "WHOLE_BYTES", 4 * 2 * 64 * 9 * 32 - 1)
    assert set(cut.make_cut(mesh, like, fields=(), order=order).axes) == {
        (64, 3, 3, 32), (2, 3, 3, 32, 64)}


@pytest.mark.parametrize("fields, message", [
    ({"shards": 3}, "shards=3 does not divide the 8 devices; take one of 1, 2, 4, 8$"),
    ({"shards": 0}, "parallel.shards=0 must be a whole number in 1"),
    ({"shards": 4, "runner": "shard_map"}, "shards=4 needs parallel.runner=jit, not shard_map"),
    ({"shards": 4, "cut": "zero"}, "parallel.cut='zero' is not known; known: optimizer, params"),
    ({"shards": 4, "cut": "params", "scope": "per_replica"},
     "cut=params does not go with train.clip_scope=per_replica.* take parallel.cut=optimizer")])
def test_bad_input(fields, message):
    c = config(1, "optimizer", **{"train.clip_scope": fields.pop("scope", "global")})
    c.parallel.update(fields)
    with pytest.raises(UserError, match=message) as caught:
        build_training(build_model(c))
    assert "\n" not in str(caught.value)


def test_a_state_is_not_cut_over_slices():
    devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)])
    assert cut.shares_links(SimpleNamespace(devices=devices.reshape(2, 4)))
    over = SimpleNamespace(devices=devices.reshape(1, 8))
    assert not cut.shares_links(over) and cut.slice_size(over) == 4


def test_slices_of_different_sizes_are_no_exception(monkeypatch):
    """Shards that divide the smallest and yet lie over two. A CPU has only one slice."""
    monkeypatch.setattr(experiment, "shares_links", lambda mesh: False)
    c = config(4, "optimizer")
    with pytest.raises(UserError, match="shards=4 does not divide the 8 devices of one slice"):
        build_training(build_model(c))


# ---- two processes of four devices against one of eight ----

COMMAND = """
import sys
from ddpm_jax.cli.main import main
from ddpm_jax.parallel import cut
cut.WHOLE_BYTES = 0
sys.exit(main(sys.argv[1:]))
"""
FIELDS = ["--config.model.ch=8", "--config.model.dropout=0", "--config.model.num_classes=10",
          "--config.train.batch_size=32", "--config.train.steps=3", "--config.train.log_every=1",
          "--config.train.clip_scope=global", "--config.checkpoint.every=2",
          "--config.parallel.runner=jit", "--config.parallel.shards=8"]
# Two timesteps have ten losses each after a batch of 32: the next one's are drawn by importance.
VLB = ["--config.diffusion.loss=vlb", "--config.diffusion.num_timesteps=2"]
HYBRID = ["--config.diffusion.loss=hybrid", "--config.diffusion.variance=learned_range"]


def saved(workdir, step):
    """The state in the checkpoint as numpy, and the metrics of its last update."""
    training = build_training(build_model(from_json(
        json.loads((workdir / "config.json").read_text()))))
    store = Checkpoints(workdir, read_only=True)
    state = store.restore(step, training.abstract_state, training.experiment.runner)
    store.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return jax.tree.map(np.asarray, state), next(x for x in lines if x["step"] == step)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind, loss", [
    ("params", VLB), pytest.param("optimizer", HYBRID, marks=pytest.mark.soak)])
def test_two_processes_continue_what_one_saved(tmp_path, kind, loss):
    """And one reads what they save."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["train", *FLAGS, *FIELDS, *loss, f"--config.parallel.cut={kind}"]
    assert main([*words, f"--workdir={one}"]) == 0
    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoints" / "3")
    with Processes(tmp_path, [*words, f"--workdir={two}"], 2, program=COMMAND,
                   env={"XLA_FLAGS": xla_flags(4)}) as pod:
        assert pod.wait(200) == [0, 0], [pod.text(i)[-3000:] for i in range(2)]
        assert "from step 2" in pod.text(0) and "state cut over 8 devices" in pod.text(0)
    (state, metrics), (want, wanted) = saved(two, 3), saved(one, 3)
    assert_close(state, want)
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(wanted[name], rel=2e-5), name
    if state.history is not None:  # the last draw was by importance
        assert state.history.count.min() >= 10
