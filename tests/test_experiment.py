import jax
import numpy as np
import pytest

from ddpm_jax import experiment as E
from ddpm_jax import programs
from ddpm_jax.config import config_path, from_json, load_config, packaged_configs, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import runners

TABLE2 = ["mu_learned_l", "mu_fixed_l", "mu_fixed_simple", "eps_learned_l", "eps_fixed_l",
          "eps_fixed_simple"]
SHIPPED = [n for n in packaged_configs() if n != "cifar10_table2"]


@pytest.mark.parametrize("name", [*SHIPPED, *(f"cifar10_table2:{c}" for c in TABLE2)])
def test_every_shipped_config_builds_and_traces(name):
    """Abstractly: no weights are made, nothing is compiled."""
    config = load_config(name)
    config.parallel.runner = "jit"
    exp = E.build(config)
    if name.startswith("cifar10"):
        extra = 3 * (128 * 9 + 1) if "learned" in name else 0  # the variance's output channels
        count = sum(p.size for p in jax.tree.leaves(exp.abstract_state.params))
        assert count == 35_746_307 + extra
    keys = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.ShapeDtypeStruct((config.train.batch_size, *exp.image_shape), np.uint8)
    new, metrics = jax.eval_shape(exp.train_step, exp.abstract_state, batch, keys)
    assert jax.tree.structure(new) == jax.tree.structure(exp.abstract_state)
    assert {"loss", "grad_norm"} <= set(metrics)
    assert from_json(to_json(config)).to_dict() == config.to_dict()


def test_the_papers_numbers_are_in_the_config():
    c = load_config("cifar10")
    assert (c.train.batch_size, c.optimizer.learning_rate, c.ema.decay) == (128, 2e-4, 0.9999)
    assert (c.train.clip_scope, c.train.clip_replicas, c.train.clip_norm) == ("per_replica", 8, 1.0)
    assert (c.optimizer.warmup_steps, c.optimizer.eps_rule) == (5000, "tensorflow")
    for name, steps in [("celebahq256", 500_000), ("lsun_bedroom", 2_400_000),
                        ("lsun_cat", 1_800_000), ("lsun_church", 1_200_000),
                        ("lsun_bedroom_large", 1_150_000)]:
        c = load_config(name)
        assert (c.train.steps, c.train.batch_size, c.optimizer.learning_rate, c.model.dropout,
                c.diffusion.variance) == (steps, 64, 2e-5, 0.0, "fixed_small")


@pytest.mark.parametrize("field, value, message", [
    ("data.name", "mnist", "config.data.name='mnist' is not known; known: digits"),
    ("diffusion.predict", "v", "known: eps, x_start, x_prev"),
    ("diffusion.schedule.name", "log", "known: linear, quad"),
    ("parallel.runner", "gspmd", "known: jit, pmap, shard_map"),
    ("model.dtype", "float16", "known: float32, bfloat16"),
    ("train.batch_size", 12, "is not divisible by 8"),
    ("train.accumulation", 3, r"not divisible by 24 \(8 devices x train.accumulation=3\)"),
    ("train.clip_replicas", 12, "must be a multiple of the 8 devices"),
    ("train.batch_size", 0, "must be at least 1"),
    ("train.steps", 2**26, "reaches 2\\*\\*32 images"),
    ("model.dropout", 1.0, r"must be in \[0, 1\)"),
    ("data.image_size", 10, "not divisible by 8"),
    ("model.num_groups", 48, "cannot be cut into 48 groups"),
    ("sampler.steps", 1001, "is more than diffusion.num_timesteps"),
    ("diffusion.variance", "learned", "does not train a learned variance"),
    ("diffusion.schedule.beta_end", 1.5, "betas must be"),
])
def test_bad_fields_are_named(field, value, message):
    config = load_config("cifar10")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        E.build(config)


def test_misspelt_keywords_are_named():
    config = load_config("cifar10")
    with config.unlocked():
        config.model.chh = 3
    with pytest.raises(UserError, match="config.model: .*chh"):
        E.build(config)


def test_config_names(tmp_path):
    assert config_path("cifar10").endswith("configs/cifar10.py")
    assert config_path("cifar10_table2:mu_fixed_l").endswith("cifar10_table2.py:mu_fixed_l")
    own = tmp_path / "mine.py"
    own.write_text("")
    assert config_path(str(own)) == str(own)
    with pytest.raises(UserError, match="packaged: celebahq256, cifar10"):
        config_path("cifar11")


def tiny(**fields):
    config = load_config("digits")
    config.data.image_size = 4
    config.model.update(ch=4, ch_mult=(1,), attn_resolutions=(), num_groups=2)
    config.train.update(batch_size=8, clip_replicas=8)
    config.diffusion.num_timesteps = 6
    config.update_from_flattened_dict(fields)
    return config


def test_sampling_does_not_depend_on_runner_batch_devices_or_where_the_loop_is():
    wanted = None
    for runner, devices, index in [("jit", 1, [0, 1, 2, 3]), ("shard_map", 8, range(8)),
                                   ("pmap", 4, [3, 2, 1, 0])]:
        exp = E.build(tiny(**{"parallel.runner": runner}), jax.devices()[:devices])
        chain = programs.sampling_chain(exp)
        state = E.new_state(exp)
        params = jax.tree.map(lambda p: p + 0.1, state.params)
        index = np.array(index, np.int32)
        args = params, np.uint32(3), exp.runner.put("batch", index)
        got = exp.runner.local(programs.sample_program(exp, chain)(*args))[np.argsort(index)][:4]
        if wanted is None:
            wanted = got
            one_program = jax.jit(lambda p: E.to_uint8(programs.draw_images(
                exp, chain, p, np.uint32(3), index)))  # noqa: B023
            assert np.abs(one_program(params).astype(int) - wanted).max() <= 1
            last, frames = programs.progressive_program(exp, chain, 2)(*args)
            np.testing.assert_array_equal(last, wanted)
            assert frames.shape == (4, 3, 4, 4, 1)
        assert np.abs(got.astype(int) - wanted).max() <= 1
    assert wanted.std() > 1 and len(np.unique(wanted.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("runner, devices", [("jit", 2), ("pmap", 4), ("shard_map", 1)])
def test_bound_does_not_depend_on_where_the_loop_is(runner, devices, monkeypatch):
    exp = E.build(tiny(**{"parallel.runner": runner}), jax.devices()[:devices])
    params = jax.tree.map(lambda p: p + 0.1, E.new_state(exp).params)
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1), dtype=np.uint8)
    args = (params, np.uint32(3), *(exp.runner.put("batch", x)
                                    for x in (images, np.arange(4, dtype=np.int32))))
    stepwise = programs.bound_program(exp)(*args)
    monkeypatch.setattr(runners, "_LOOPS_ON_HOST", set())
    compiled = programs.bound_program(exp)(*args)
    for name in compiled._fields:
        one, two = (exp.runner.local(getattr(b, name)) for b in (stepwise, compiled))
        assert one.shape == two.shape and one.std() > 0
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6, err_msg=name)


def test_fewer_steps_and_too_many():
    exp = E.build(tiny())
    assert programs.sampling_chain(exp, steps=3).num_steps == 3
    np.testing.assert_array_equal(
        programs.sampling_chain(exp, steps=3).schedule.timesteps, [0, 2, 5])
    with pytest.raises(UserError, match=r"sampler.steps=7 is not in 1 ... .*num_timesteps=6"):
        programs.sampling_chain(exp, steps=7)
    with pytest.raises(UserError, match="known: ancestral, ddim"):
        programs.sampling_chain(exp, name="heun")


@pytest.mark.parametrize("runner", ["jit", "pmap", "shard_map"])
def test_abstract_arguments_fit_the_program(runner):
    exp = E.build(tiny(**{"parallel.runner": runner, "train.steps_per_dispatch": 3}))
    for examples in (24, None):
        lowered = programs.train_program(exp, examples).lower(
            *programs.train_arguments(exp, examples))
        assert "main" in lowered.as_text()[:5000]
