"""The port against golden values of pytorch-fid's network (float64) and TensorFlow's resize."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.inception import network as inception

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"


def load_generator():
    spec = importlib.util.spec_from_file_location("make_inception", GOLDEN / "make_inception.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "inception.npz")


@functools.cache
def seeded_state():
    make = load_generator()
    return {name: make.seeded(name, shape) for name, shape in inception.state_shapes().items()}


@functools.cache
def pictures():
    return load_generator().images()


def relative(ours, golden):
    return float(np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden))


def pool_3_error(golden, params, images, network=inception.network):
    run = jax.jit(lambda params, x: network(params, x))
    scaled = (inception.resize_tf1(jnp.asarray(images, jnp.float32)) - 128) / 128
    return relative(run(params, scaled), golden["pool_3"][:len(images)])


@pytest.fixture(scope="module")
def params():
    return inception.fold(seeded_state())


def test_names_are_those_of_the_independent_network(golden):
    assert sorted(inception.state_shapes()) == list(golden["names"])
    assert len(inception.conv_shapes()) == 94
    assert sum(int(np.prod(s)) for s in inception.state_shapes().values()) == 23_885_392


def test_all_outputs_match_to_1e_5(golden, params):
    pool_3 = np.asarray(jax.jit(inception.features)(params, pictures()))
    fc = params["fc"]
    for name, ours in (("pool_3", pool_3), ("logits_unbiased", scores.logits(pool_3, fc["kernel"])),
                       ("logits", scores.logits(pool_3, fc["kernel"], fc["bias"]))):
        assert ours.shape == golden[name].shape
        assert relative(ours, golden[name]) < 1e-5, name
        worst = float(np.max(np.abs(ours - golden[name])))
        assert worst < 1e-5 * np.max(np.abs(golden[name])), name


def test_resize_is_tensorflow_bit_for_bit(golden):
    ours = inception.resize_tf1(jnp.asarray(pictures(), jnp.float32))
    np.testing.assert_array_equal(np.asarray(ours)[0, ::13], golden["resized_rows"])


def test_identity_size_is_untouched():
    image = np.random.default_rng(0).random((1, 299, 299, 3)).astype(np.float32)
    np.testing.assert_array_equal(inception.resize_tf1(jnp.asarray(image)), image)


def test_grey_images_are_three_equal_channels(params):
    grey = jnp.asarray(pictures()[:1, :, :, :1])
    run = jax.jit(lambda p, x: inception.features(p, x))
    np.testing.assert_allclose(run(params, grey), run(params, jnp.repeat(grey, 3, axis=-1)),
                               rtol=1e-5, atol=2e-5)


# Each way to get the port wrong that the literature knows must fail the golden comparison.

def average_with_padding(x, stride=1):
    return lax.reduce_window(x, np.float32(0), lax.add, (1, 3, 3, 1), (1, stride, stride, 1),
                             "SAME") / 9


@pytest.mark.parametrize("kind, wrong", [
    ("max", inception.average_pool),          # Mixed_7c is the only block with a 3x3 max, stride 1
    ("average", average_with_padding),
])
def test_wrong_pooling_is_caught(golden, params, monkeypatch, kind, wrong):
    monkeypatch.setitem(inception.POOLS, kind, wrong)
    assert pool_3_error(golden, params, pictures()[:1]) > 1e-3


@pytest.fixture(scope="module")
def right_network():
    run = jax.jit(lambda params, x: inception.network(params, x))
    return lambda params, x: run(params, jnp.asarray(x, jnp.float32))


def half_pixel(images):
    return jax.image.resize(jnp.asarray(images, jnp.float32),
                            (len(images), 299, 299, 3), "bilinear", antialias=False)


@pytest.mark.parametrize("resize, scale, epsilon, caught", [
    (inception.resize_tf1, lambda x: (x - 128) / 128, 1e-3, False),
    (inception.resize_tf1, lambda x: (x - 128) / 128, 1e-5, True),
    (half_pixel, lambda x: (x - 128) / 128, 1e-3, True),
    (inception.resize_tf1, lambda x: (x - 127.5) / 127.5, 1e-3, True),
    (inception.resize_tf1, lambda x: (jnp.floor(x) - 128) / 128, 1e-3, True),
])
def test_wrong_epsilon_resize_or_scale_is_caught(golden, right_network, resize, scale, epsilon,
                                                 caught):
    x = scale(resize(jnp.asarray(pictures()[:1], jnp.float32)))
    ours = right_network(inception.fold(seeded_state(), epsilon), x)
    assert (relative(ours, golden["pool_3"][:1]) > 1e-5) is caught


@pytest.mark.parametrize("name", [
    "Mixed_5b.branch_pool.bn.running_mean", "Conv2d_1a_3x3.bn.weight",
    "Mixed_7c.branch3x3_2a.conv.weight", "Mixed_6e.branch1x1.bn.bias"])
def test_a_swapped_tensor_is_caught(golden, right_network, name):
    state = dict(seeded_state())
    state[name] = state[name][::-1]
    x = (inception.resize_tf1(jnp.asarray(pictures()[:1], jnp.float32)) - 128) / 128
    assert relative(right_network(inception.fold(state), x), golden["pool_3"][:1]) > 1e-5


def test_flops_equal_what_the_compiler_counts(params):
    lowered = jax.jit(lambda p, x: inception.network(p, x)).lower(
        params, jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32))
    counted = lowered.cost_analysis()["flops"]
    assert abs(inception.flops_per_image() / counted - 1) < 0.06
    assert 1.0e10 < inception.flops_per_image() < 1.3e10
