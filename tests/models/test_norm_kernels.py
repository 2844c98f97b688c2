"""The norm's kernels, interpreted, against the form that XLA compiles, and compiled for an H100."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import config

from ddpm_jax.compilation import parts, report
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, build_training
from ddpm_jax.models import fused_norm, norm_tiles
from ddpm_jax.parallel.runners import RUNNERS

# (B, H, W, C), groups, type; whether tiles fit without masks: the whole norm's, the sums'
SHAPES = [
    ((2, 8, 8, 64), 32, jnp.float32, True, True),  # groups of 2
    ((3, 4, 4, 384), 32, jnp.bfloat16, False, True),  # of 12: four to a tile of 64
    ((1, 7, 7, 96), 8, jnp.float32, False, False),  # 49 pixels in tiles of 32
    ((2, 3, 5, 10), 2, jnp.bfloat16, False, False),  # no power of two anywhere
    ((1, 20, 20, 40), 4, jnp.float32, False, False),  # too large for one kernel; 40 in a tile of 64
    ((1, 32, 32, 128), 1, jnp.bfloat16, False, True),  # several shares of the pixels; one group
    ((2, 2, 2, 33), 33, jnp.float32, False, False),  # groups of one channel
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for padded in (False, True):
        monkeypatch.setitem(fused_norm.FORMS, f"interpreted_{padded}",
                            fused_norm.kernels_form(padded, interpret=True))


def inputs(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    batch, channels = shape[0], shape[-1]

    def normal(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    x = (3 + normal(*shape) * jnp.linspace(0.5, 2, channels)[None, None, None, :]).astype(dtype)
    bits = jnp.asarray(rng.integers(0, 2**16, shape), jnp.uint16)
    return (x, normal(batch, channels), 1 + 0.3 * normal(channels), 0.3 * normal(channels), bits,
            normal(*shape).astype(dtype))


def value_and_gradients(form, groups, silu=True):
    def run(x, shift, scale, bias, bits, g):
        def act(*floats):
            return fused_norm.group_norm_act(*floats, bits, groups, 1e-6, silu, 0.1, form)

        y, back = jax.vjp(act, x, shift, scale, bias)
        return dict(zip("y dx dshift dscale dbias".split(), (y, *back(g)), strict=True))

    return run


def check(got, want, rounded=()):
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None
            continue
        assert got[name].dtype == expected.dtype
        a, b = (np.asarray(v, np.float64) for v in (got[name], expected))
        assert np.isfinite(a).all()
        distance = np.linalg.norm(a - b) / (np.linalg.norm(b) + 0.1)  # dshift may be 0
        assert distance < (1e-2 if name in rounded else 2e-5), name


@pytest.mark.parametrize(("shape", "groups", "dtype", "fused", "sums"), SHAPES)
def test_kernels_equal_what_xla_computes(shape, groups, dtype, fused, sums):
    args = inputs(shape, dtype)
    assert (norm_tiles.fused_plan(args[0], groups, padded=False) is not None) == fused
    assert (norm_tiles.sums_plan(args[0], padded=False) is not None) == sums
    want = jax.jit(value_and_gradients("xla", groups))(*args)
    got = jax.jit(value_and_gradients(f"interpreted_{not fused}", groups))(*args)
    check(got, want, rounded=("y", "dx") if dtype == jnp.bfloat16 else ())


def test_a_group_is_never_cut_and_only_padded_plans_overhang():
    for channels, groups in [(384, 32), (768, 32), (96, 8), (64, 32), (512, 1), (160, 1), (33, 11)]:
        x = jax.ShapeDtypeStruct((2, 8, 8, channels), jnp.bfloat16)
        for padded in (False, True):
            plan = norm_tiles.fused_plan(x, groups, padded)
            if plan is not None:
                assert plan.block % (channels // groups) == 0 and channels % plan.block == 0
                assert plan.width >= plan.block and plan.width & (plan.width - 1) == 0
                assert plan.rows * plan.tiles * plan.steps == 64
                assert padded or not plan.masked
        assert norm_tiles.sums_plan(x, padded=True) is not None
    assert norm_tiles.fused_plan(x, 1, padded=True).block == 33
    large = jax.ShapeDtypeStruct((2, 8, 8, 160), jnp.bfloat16)  # its means would need a large tile
    assert norm_tiles.fused_plan(large, 1, padded=True) is None


def test_without_swish_dropout_and_shift():
    x, _, scale, bias, _, g = inputs((2, 4, 4, 24), jnp.float32)
    args = x, None, scale, bias, None, g
    check(jax.jit(value_and_gradients("interpreted_True", 2, silu=False))(*args),
          jax.jit(value_and_gradients("xla", 2, silu=False))(*args))


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_vmap_over_images_and_over_channels_values(axes):
    """Also where those differ, which no step of ours has."""
    fn = norm_tiles.by_image(lambda images, per_image, per_channel: [
        images[0] * per_channel[0][None], images[0].sum(axis=1) + per_image[0]])
    rng = np.random.default_rng(0)
    x, scale = (rng.standard_normal((3, *shape) if axis == 0 else shape).astype(np.float32)
                for shape, axis in zip(((2, 4), (4,)), axes, strict=True))
    run = jax.vmap(lambda x, scale: fn([x], [x[:, 0]], [scale]), axes)
    one, two = run(x, scale)
    np.testing.assert_allclose(one, np.broadcast_to(
        x if axes[0] == 0 else x[None], (3, 2, 4)) * scale.reshape(-1, 1, 4), rtol=1e-6)
    np.testing.assert_allclose(two, np.broadcast_to(x.sum(-1) + x[..., 0], (3, 2)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 4, 24), (4, 20, 20, 16)])  # whole norm; sums
def test_under_vmap_the_shards_are_one_call(shape):
    """With a gradient of scale and bias for each shard."""
    x, shift, scale, bias, bits, g = inputs(shape, jnp.float32)
    cut = [v.reshape(2, 2, *v.shape[1:]) for v in (x, shift, bits, g)]
    x, shift, bits, g = cut
    run = {form: jax.jit(jax.vmap(value_and_gradients(form, 2), (0, 0, None, None, 0, 0)))
           for form in ("xla", "interpreted_True")}
    args = x, shift, scale, bias, bits, g
    check(run["interpreted_True"](*args), run["xla"](*args))
    calls = str(run["interpreted_True"].trace(*args).jaxpr).count("pallas_call[")
    assert calls == (2 if shape[1] == 4 else 1)


def test_on_a_cpu_every_form_is_that_of_xla():
    args = inputs((2, 8, 8, 64), jnp.float32)
    want, *got = (jax.jit(value_and_gradients(form, 32))(*args)
                  for form in ("xla", "triton", "triton_padded"))
    for form in got:
        jax.tree.map(np.testing.assert_array_equal, form, want)


@pytest.mark.parametrize(("field", "message"), [
    ({"parallel.norm_kernel": "triton"},
     r"config.parallel.norm_kernel=triton: .*NVIDIA.*the devices are cpu; take .*norm_kernel=xla"),
    ({"parallel.norm_kernel": "cuda"},
     "norm_kernel='cuda' is not known; known: auto, xla, stored, triton, "),
    ({"parallel.clip_kernel": "kernels"},
     r"config.parallel.clip_kernel=kernels: .*NVIDIA.*are cpu; take .*clip_kernel=convolutions"),
    ({"parallel.clip_kernel": "xla"},
     "clip_kernel='xla' is not known; known: auto, convolutions, turned, kernels")])
def test_kernels_that_cannot_run_are_one_line(field, message):
    with pytest.raises(UserError, match=message):
        build_training(build_model(config(**field), jax.devices()[:1]))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # JAX 0.11 on
def test_kernels_with_masks_compile_for_an_absent_h100(h100s, monkeypatch):
    looked_for = []
    finder = types.SimpleNamespace(find_spec=lambda name, *_: looked_for.append(name))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    runner = RUNNERS["shard_map"](h100s.devices[:1])
    places = "batch", "batch", "replicated", "replicated", "batch", "batch"
    args = [runner.abstract(place, jax.ShapeDtypeStruct(v.shape, v.dtype))
            for place, v in zip(places, inputs((2, 7, 7, 96), jnp.bfloat16), strict=True)]
    jitted = runner.compile(value_and_gradients("triton_padded", 8), places, ("batch",))
    with h100s.lowering():
        result = report.compile_and_report(jitted, args, programs_cache=False)
    assert not [name for name in looked_for if name.endswith(".tt")]  # once for each operation
    assert result.report["hlo"]["custom_calls"] == {"__gpu$xla.gpu.triton": 2}
    found = [origin for _, origin, name in parts.origins(result.compiled.as_text()).values()
             if name.endswith("/pallas_call")]
    named = [parts.part(k._replace(path=["jvp(UNet)", "norm1", *k.path])) for k in found]
    assert sorted(named) == ["norm kernels, backward", "norm kernels, forward"]


def test_auto_on_a_cpu_was_measured_in_float32_alone():
    found = {dtype: build_model(config(**{"model.dtype": dtype}), jax.devices()[:1]).model.norm_form
             for dtype in ("float32", "bfloat16")}
    assert found == {"float32": "stored", "bfloat16": "xla"}


@pytest.mark.peer
def test_auto_is_the_fastest_form_that_can_run(h100s, monkeypatch):
    def form(devices, dtype="bfloat16", **fields):
        return build_model(config(**{"model.dtype": dtype} | fields), devices).model.norm_form

    one, two = h100s.devices[:1], h100s.devices
    fastest = {dtype: fused_norm.FASTEST_FORMS.get((one[0].device_kind, dtype), "xla")
               for dtype in ("bfloat16", "float32")}
    assert fastest["bfloat16"] == "triton"  # or the table is of another device
    for dtype, expected in fastest.items():
        assert form(one, dtype) == form(two, dtype) == expected
    assert form(two, **{"parallel.runner": "jit"}) == "xla"
    assert form(one, **{"parallel.norm_kernel": "xla"}) == "xla"
    monkeypatch.setattr(norm_tiles, "missing", lambda: "no Triton")
    assert form(one) == "xla"


@pytest.mark.peer
def test_jit_on_several_gpus_cannot_cut_kernels(h100s):
    fields = {"parallel.norm_kernel": "triton", "parallel.runner": "jit"}
    assert build_model(config(**fields), h100s.devices[:1]).model.norm_form == "triton"
    with pytest.raises(UserError, match="jit cuts .* for 2 devices.*parallel.runner=shard_map, or"):
        build_model(config(**fields), h100s.devices)
