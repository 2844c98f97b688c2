import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from ddpm_jax.config import defaults, from_json, load_config, override, packaged_configs, to_json
from ddpm_jax.configs.cifar10_improved import CELLS
from ddpm_jax.diffusion.objective import WEIGHTS
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, build_training, network, schedule_warning
from ddpm_jax.models import layers
from ddpm_jax.training.steps import Batch

TABLE2 = ["mu_learned_l", "mu_fixed_l", "mu_fixed_simple", "eps_learned_l", "eps_fixed_l",
          "eps_fixed_simple"]
SHIPPED = [n for n in packaged_configs() if n != "cifar10_table2"]


def build(config):
    return build_training(build_model(config))


@functools.cache
def parameters(model):
    image = jax.ShapeDtypeStruct((1, *2 * (model.image_size,), model.in_channels), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.int32)
    made = jax.eval_shape(lambda x, t: model.init(
        jax.random.key(0), x, t, labels=t if model.num_classes else None), image, t)
    return sum(p.size for p in jax.tree.leaves(made))


@pytest.mark.parametrize("name", ["cifar10", "digits", *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in (*SHIPPED, *(f"cifar10_table2:{c}" for c in TABLE2))
    if name not in ("cifar10", "digits"))])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_shipped_config_builds_and_traces(name, whole):
    """Abstractly: no weights are made, nothing is compiled. Not ``whole``: the step with one block
    a level and, but for two configs, the first two levels, a quarter of the time."""
    config = load_config(name)
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    config.parallel.runner = "jit"
    model = network(config)
    if name.startswith("cifar10") and "improved" not in name:
        extra = 3 * (128 * 9 + 1) if "learned" in name else 0  # the variance's output channels
        extra += 11 * 512 if "conditional" in name else 0  # a vector a class, and one for none
        assert parameters(model) == 35_746_307 + extra
    if not whole:
        config.model.num_res_blocks = 1
        if name not in ("cifar10", "lsun_church"):
            build_model(config)
            config.model.ch_mult = config.model.ch_mult[:2]
    training = build(config)
    exp = training.experiment
    assert schedule_warning(exp) is None
    keys = jax.eval_shape(lambda: jax.random.key(0))
    count = config.train.batch_size
    batch = Batch(jax.ShapeDtypeStruct((count, *exp.image_shape), np.uint8),
                  jax.ShapeDtypeStruct((count,), np.int32) if exp.model.num_classes else None)
    new, metrics = jax.eval_shape(training.step, training.abstract_state, batch, keys)
    assert jax.tree.structure(new) == jax.tree.structure(training.abstract_state)
    assert {"loss", "grad_norm"} <= set(metrics)


@pytest.mark.parametrize("field, value, message", [
    ("data.name", "imagenet", "config.data.name='imagenet' is not known; known: digits"),
    ("diffusion.predict", "w", "known: eps, x_start, x_prev"),
    ("diffusion.schedule.name", "log", "known: linear, quad"),
    ("parallel.runner", "gspmd", "known: jit, pmap, shard_map"),
    ("model.dtype", "float16", "known: float32, bfloat16"),
    ("train.batch_size", 12, "is not divisible by 8"),
    ("train.accumulation", 3, r"not divisible by 24 \(8 devices x train.accumulation=3\)"),
    ("train.clip_replicas", 12, "must be a multiple or a divisor of the 8 devices"),
    ("train.batch_size", 0, "must be a whole number in 1 ... "),
    ("train.steps", 2**26, "reaches 2\\*\\*32 images"),
    ("model.dropout", 1.0, r"must be a number in \[0, 0.999\]"),
    ("data.image_size", 10, "not divisible by 8"),
    ("model.num_groups", 48, "cannot be cut into 48 groups"),
    ("sampler.steps", 1001, "is more than diffusion.num_timesteps"),
    ("diffusion.variance", "learned", "variance=learned; take kl or hybrid"),
    ("diffusion.loss", "hybrid", "variance=fixed_large; take mse or kl"),
    ("diffusion.weights.name", "snr", "known: target, l_simple, constant"),
    ("diffusion.weights.gamma", 5.0, "gamma=5.0 is not of weights.name=target; its own: none"),
    ("diffusion.zero_terminal_snr", True, "predict=eps, which holds nothing .* take v or x_start"),
    ("sampler.guidance", 2.0, "sampler.guidance=2.0 needs labels"),
    ("model.num_classes", -1, "must be a whole number in 0 ... "),
    ("diffusion.schedule.beta_end", 1.5, r"must be a number in \(0, 1\]"),
])
def test_bad_fields_are_named(field, value, message):
    config = load_config("cifar10")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        build(config)


def test_each_keyword_of_a_weighting_is_a_field():
    fields = {*load_config("cifar10").diffusion.weights}
    assert all(defaults(row).keys() <= fields for row in WEIGHTS.values())


def test_misspelt_keywords_are_named():
    config = load_config("cifar10")
    with config.unlocked():
        config.model.chh = 3
    with pytest.raises(UserError, match="config.model: .*chh"):
        build(config)


def test_a_model_needs_no_training_fields_that_fit_the_devices():
    config = load_config("cifar10")
    config.train.update(batch_size=3, clip_replicas=5, accumulation=7)
    config.optimizer.eps_rule = "none"
    build_model(config)
    with pytest.raises(UserError, match="optimizer.eps_rule"):
        build(config)


@pytest.mark.parametrize("mistake", [
    lambda: jnp.ones((3, 4)) @ jnp.ones((5, 4)),              # TypeError of JAX
    lambda: np.arange(3)[:, None].astype("no such type"),     # TypeError of NumPy
    lambda: int("seven"),                                     # ValueError
])
def test_a_mistake_inside_a_layer_shows_its_traceback(mistake, monkeypatch):
    """Only misspelt keywords and checked values become one line."""
    def broken(layer):
        return mistake()

    monkeypatch.setattr(layers.Dense, "shapes", broken)
    with pytest.raises((TypeError, ValueError)) as caught:
        build_model(load_config("digits"))
    assert not isinstance(caught.value, UserError)
    assert any(entry.name == "broken" for entry in caught.traceback)


@pytest.mark.slow
@pytest.mark.parametrize("setting, value", [
    ("jax_threefry_partitionable", False), ("jax_default_prng_impl", "rbg"),
    ("jax_numpy_dtype_promotion", "strict"), ("jax_default_matmul_precision", "bfloat16"),
    ("jax_random_seed_offset", 5)])
def test_settings_of_jax_do_not_change_the_weights(setting, value):
    config = tiny_run.config()
    want = jax.tree.map(np.asarray, build_model(config).init_params())
    before = getattr(jax.config, setting)
    try:
        jax.config.update(setting, value)
        got = build_model(config).init_params()
    finally:
        jax.config.update(setting, getattr(before, "value", before))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_chain_that_ends_before_noise_is_a_warning_with_betas_that_do():
    config = load_config("cifar10")
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1)
    assert schedule_warning(build_model(config)) is None
    config.diffusion.num_timesteps = 100
    warning = schedule_warning(build_model(config))
    assert "alpha_bar_T is 0.36" in warning
    for name, value in re.findall(r"diffusion.schedule.(\w+)=([\d.]+)", warning):
        config.diffusion.schedule[name] = float(value)
    assert config.diffusion.schedule.beta_end > 0.02
    exp = build_model(config)
    assert schedule_warning(exp) is None and np.prod(1 - exp.betas) < 1e-4
    override(config, {"diffusion.schedule.name": "jsd"})
    assert schedule_warning(build_model(config)) is None


@pytest.mark.parametrize("cell", CELLS)
def test_no_cell_of_the_improved_config_ends_before_noise(cell):
    assert schedule_warning(build_model(load_config(f"cifar10_improved:{cell}"))) is None
