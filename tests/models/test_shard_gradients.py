import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.compilation import parts, report, topology
from ddpm_jax.models import filter_kernels, shard_gradients
from ddpm_jax.models.shard_gradients import conv3x3, conv3x3_by_shard, fastest_form
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.runners import RUNNERS

H100 = "NVIDIA H100 80GB HBM3"
SHARDS, RNG = 3, np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, SHARDS, 2, 4, 4, 8)), jnp.float32)  # two devices
KERNEL = jnp.asarray(RNG.normal(size=(16, 3, 3, 8)), jnp.float32)


def interpreted(splits):
    """Two tiles of eight output channels for each tap; splits: programs of each."""
    return lambda x, g, stride: filter_kernels.gradients(
        filter_kernels.Plan(8, 8, g.shape[2] * g.shape[3] // splits, splits, 1, interpret=True),
        stride, x, g)


FORMS = {
    "convolutions": ("convolutions", None),
    "turned": ("turned", None),
    "kernels": ("kernels", interpreted(1)),
    "split": ("kernels", interpreted(2)),
}


def gradients(convolution, stride):
    """x [B,H,W,in] -> gradients of a loss of it in x and in the kernel."""
    def loss(x, kernel):
        y = convolution(x, kernel, stride)
        return (y * jnp.sin(y)).mean()

    return lambda x: jax.grad(loss, (0, 1))(x, KERNEL)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_each_shard(name, stride, monkeypatch):
    form, replaced = FORMS[name]
    if replaced is not None:
        monkeypatch.setitem(shard_gradients.FORMS, form, shard_gradients.Form(replaced))
    by_shard = gradients(functools.partial(conv3x3_by_shard, form=form), stride)
    plain = gradients(conv3x3, stride)

    @jax.jit
    def compared(x):
        want = jax.tree.map(lambda *g: jnp.stack(g), *map(plain, x[0]))
        return want, (jax.vmap(by_shard)(x[0]),
                      jax.tree.map(lambda g: g[0], jax.vmap(jax.vmap(by_shard))(x)))

    want, found = compared(X)
    for got in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_shards_are_one_convolution_but_for_their_kernels_gradients():
    def groups(function, x):
        text = str(jax.make_jaxpr(function)(x))
        found = re.findall(r"(?:feature|batch)_group_count=(\d+)", text)
        assert len(found) == 2 * text.count("conv_general_dilated[") > 0
        return list(map(int, found))

    by_shard, plain = (gradients(c, 1) for c in (conv3x3_by_shard, conv3x3))
    assert groups(jax.vmap(by_shard), X[0]) == [1] * 2 * (2 + SHARDS)
    assert max(groups(jax.vmap(plain), X[0])) == SHARDS  # vmap's own rule
    assert groups(by_shard, X[0, 0]) == groups(plain, X[0, 0]) == [1] * 2 * 3


@pytest.mark.parametrize("inputs, outputs, stride", [(3, 16, 1), (3, 16, 2), (16, 3, 1)])
def test_few_channels_make_one_product(inputs, outputs, stride):
    x = jnp.asarray(RNG.normal(size=(SHARDS, 2, 4, 4, inputs)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(outputs, 3, 3, inputs)), jnp.float32)

    def gradient(convolution, x):
        return jax.grad(lambda kernel: jnp.sin(convolution(x, kernel, stride)).sum())(kernel)

    @jax.jit
    def both():
        by_shard = functools.partial(conv3x3_by_shard, form="kernels")
        return (jax.vmap(functools.partial(gradient, by_shard))(x),
                jnp.stack([gradient(conv3x3, x) for x in x]))

    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


def test_plans_fill_their_tiles():
    """Of the CIFAR-10 model at batch 128, for all convolutions but the first and the last."""
    def planned(images, size, inputs, outputs, dtype=jnp.bfloat16):
        x, g = (jax.ShapeDtypeStruct((8, images, size, size, c), dtype) for c in (inputs, outputs))
        plan = filter_kernels.plan(x, g)
        if plan is not None:
            assert outputs % plan.rows == inputs % plan.columns == plan.pixels % size == 0
            assert images * size * size % (plan.pixels * plan.splits) == 0
        return plan

    stages = [s for s in UNet().stages() if s.kind != "attention"]
    assert all(planned(16, s.size, s.features_in, s.features) for s in stages)
    assert planned(64, 32, 128, 128).splits > 1
    assert planned(16, 32, 3, 128) is planned(16, 32, 128, 6) is planned(16, 28, 128, 128) is None
    assert planned(16, 32, 128, 128, jnp.float32) is None


def test_only_a_measured_device_has_kernels():
    assert fastest_form(H100, "bfloat16", cut=False) == "kernels"
    others = [(H100, "bfloat16", True), (H100, "float32", False), ("cpu", "bfloat16", False)]
    assert {fastest_form(*row) for row in others} == {"convolutions"}


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # JAX 0.11 on
def test_all_shards_are_one_kernel_of_an_absent_h100():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="the CUDA plugin is not installed")
    h100 = topology.describe("h100:1")
    runner = RUNNERS["shard_map"](h100.devices)
    assert fastest_form(h100.devices[0].device_kind, "bfloat16", cut=False) == "kernels"

    def kernel_gradients(x, kernel):
        def loss(kernel, x):
            return conv3x3_by_shard(x, kernel, 1, "kernels").astype(jnp.float32).std()

        with jax.named_scope("transpose(UNet)"):
            return jax.vmap(jax.grad(loss), (None, 0))(kernel, x)

    shapes = {"batch": (8, 1, 8, 8, 128), "replicated": (128, 3, 3, 128)}
    args = [runner.abstract(place, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
            for place, shape in shapes.items()]
    jitted = runner.compile(kernel_gradients, tuple(shapes), ("batch",))
    with h100.lowering():
        result = report.compile_and_report(jitted, args, programs_cache=False)
    assert result.report["hlo"]["custom_calls"]["__gpu$xla.gpu.triton"] == 1
    found = [parts.part(origin) for _, origin, name in
             parts.origins(result.compiled.as_text()).values() if name.endswith("/pallas_call")]
    assert found == ["convolution, filter gradient"]
