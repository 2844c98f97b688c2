import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.shard_gradients import conv3x3, conv3x3_by_shard

SHARDS, RNG = 3, np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, SHARDS, 2, 4, 4, 3)), jnp.float32)  # two devices
KERNEL = jnp.asarray(RNG.normal(size=(5, 3, 3, 3)), jnp.float32)


def gradients(convolution, stride):
    """x [B,H,W,in] -> gradients of a loss of it in x and in the kernel."""
    def loss(x, kernel):
        y = convolution(x, kernel, stride)
        return (y * jnp.sin(y)).mean()

    return lambda x: jax.grad(loss, (0, 1))(x, KERNEL)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_those_of_each_shard(stride):
    by_shard, plain = (gradients(c, stride) for c in (conv3x3_by_shard, conv3x3))

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
