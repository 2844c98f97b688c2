"""Attention's kernels, interpreted, against XLA's form, and compiled for an absent H100."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import config

from ddpm_jax.compilation import parts, report
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model
from ddpm_jax.models import attention, attention_kernels
from ddpm_jax.models.layers import AttentionBlock
from ddpm_jax.parallel.runners import RUNNERS


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setitem(attention.FORMS, "interpreted", attention.kernels_form(interpret=True))


def inputs(images, tokens, channels, dtype=jnp.bfloat16, of_kernels=jnp.float32):
    """h, and of q, k, v a list of (kernel, bias); the gradient of the result."""
    rng = np.random.default_rng(channels)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    layers = [(normal(channels, channels, scale=1.5 * channels**-0.5).astype(of_kernels),
               normal(channels)) for _ in "qkv"]
    h, g = normal(images, tokens, channels), normal(images, tokens, channels)
    return h.astype(dtype), layers, g.astype(dtype)


class Layer(types.SimpleNamespace):
    def __call__(self, h):
        bias = self.bias.astype(h.dtype)[None, None, :]
        return jnp.matmul(h, self.kernel.astype(h.dtype)) + bias


def result_and_gradients(form):
    def attend(h, layers):
        return attention.FORMS[form].attend(h, [Layer(kernel=k, bias=b) for k, b in layers])

    def run(h, layers, g):
        out, back = jax.vjp(attend, h, layers)
        dh, of_layers = back(g.astype(out.dtype))
        return {"out": out, "dh": dh} | {
            f"d{name} {n}": v for n, of_layer in zip("qkv", of_layers, strict=True)
            for name, v in zip(("kernel", "bias"), of_layer, strict=True)}

    return run


def distances(got, want):
    # A bias of k changes nothing: what its gradient consists of is rounding.
    a, b = ({k: np.asarray(v, np.float64) for k, v in r.items() if k != "dbias k"}
            for r in (got, want))
    return {k: np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k]) for k in b}


@pytest.mark.parametrize(("shape", "of_kernels"), [
    ((2, 64, 64), jnp.float32), ((1, 128, 192), jnp.bfloat16), ((1, 256, 128), jnp.float32)])
def test_kernels_are_as_near_to_float32_as_what_xla_computes(shape, of_kernels):
    h, layers, g = inputs(*shape, of_kernels=of_kernels)
    assert attention_kernels.plans(h) is not None
    exact = jax.jit(result_and_gradients("xla"))(h.astype(jnp.float32), layers, g)
    got, plain = (jax.jit(result_and_gradients(form))(h, layers, g)
                  for form in ("interpreted", "xla"))
    of_plain = distances(plain, exact)
    for name, distance in distances(got, exact).items():
        assert got[name].dtype == plain[name].dtype and got[name].shape == plain[name].shape
        assert distance < min(2e-2, 1.1 * of_plain[name]), name
    assert np.linalg.norm(got["dbias k"]) < 1e-2 * np.linalg.norm(got["dbias q"])


def test_under_vmap_the_shards_are_one_call_of_each_kernel():
    """With gradients of the layers for each shard."""
    h, layers, g = inputs(4, 64, 64)
    h, g = (v.reshape(2, 2, *v.shape[1:]) for v in (h, g))
    one = jax.jit(result_and_gradients("interpreted"))
    of_all = jax.jit(jax.vmap(one, (0, None, 0)))
    got = of_all(h, layers, g)
    for i in range(2):
        want = one(h[i], layers, g[i])
        for name in want:
            np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (
                got[name][i], want[name])), rtol=1e-2, atol=1e-2, err_msg=name)
    assert str(of_all.trace(h, layers, g).jaxpr).count("pallas_call[") == 4


@pytest.mark.parametrize(("shape", "dtype"), [
    ((2, 16, 64), jnp.bfloat16),  # too few tokens for a tile
    ((2, 100, 64), jnp.bfloat16), ((1, 1024, 64), jnp.bfloat16), ((1, 64, 96), jnp.bfloat16),
    ((1, 64, 64), jnp.float32)])
def test_other_shapes_and_types_have_the_program_of_xla(shape, dtype):
    args = inputs(*shape, dtype)
    triton, xla = (str(jax.jit(result_and_gradients(form)).trace(*args).jaxpr)
                   for form in ("triton", "xla"))
    assert triton == xla


def test_on_a_cpu_every_form_is_that_of_xla():
    args = inputs(2, 64, 64)
    want, got = (jax.jit(result_and_gradients(form))(*args) for form in ("xla", "triton"))
    assert max(distances(got, want).values()) < 1e-2


@pytest.mark.parametrize(("field", "message"), [
    ({"parallel.attention_kernel": "triton"},
     "attention_kernel=triton: .*NVIDIA.*the devices are cpu; take .*attention_kernel=xla"),
    ({"parallel.attention_kernel": "flash"},
     "attention_kernel='flash' is not known; known: auto, xla, triton")])
def test_kernels_that_cannot_run_are_one_line(field, message):
    with pytest.raises(UserError, match=f"config.parallel.{message}"):
        build_model(config(**field), jax.devices()[:1])


@pytest.mark.peer
def test_only_a_measured_device_has_kernels(h100s, monkeypatch):
    def form(devices, **fields):
        return build_model(config(**{"model.dtype": "bfloat16"} | fields), devices
                           ).model.attention_form

    one, two = h100s.devices[:1], h100s.devices
    assert form(jax.devices()[:1]) == "xla"
    assert form(one, **{"parallel.attention_kernel": "triton"}) == "triton"
    monkeypatch.setitem(attention.FASTEST_FORMS, (one[0].device_kind, "bfloat16"), "triton")
    assert form(one) == form(two) == "triton"
    assert form(two, **{"parallel.runner": "jit"}) == "xla"
    assert form(one, **{"model.dtype": "float32"}) == "xla"


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # JAX 0.11 on
def test_a_block_compiles_for_an_absent_h100(h100s):
    block = AttentionBlock(128, 32, jnp.bfloat16, form="triton")
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((1, 16, 16, 128))))
    runner = RUNNERS["shard_map"](h100s.devices[:1])

    def step(params, x):
        y, back = jax.vjp(block.apply, params, x)
        return back(y)

    args = [runner.abstract("replicated", params), runner.abstract(
        "batch", jax.ShapeDtypeStruct((2, 16, 16, 128), jnp.bfloat16))]
    jitted = runner.compile(step, ("replicated", "batch"), ("replicated", "batch"))
    with h100s.lowering():
        result = report.compile_and_report(jitted, args, programs_cache=False)
    hlo = result.report["hlo"]
    assert hlo["custom_calls"] == {"__gpu$xla.gpu.triton": 4} and hlo["copies"] == 0
    found = [origin for _, origin, name in parts.origins(result.compiled.as_text()).values()
             if name.endswith("/pallas_call")]
    named = [parts.part(k._replace(path=["jvp(UNet)", "mid_attn", *k.path])) for k in found]
    assert sorted(named) == ["attention, backward"] * 2 + ["attention, forward"] * 2
