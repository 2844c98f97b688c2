import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.training import packing as P
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.steps import init_state

SHAPES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), max_size=8)


def tree_of(shapes):
    start, tree = 0, {}
    for i, shape in enumerate([(2, 3), (3,), *shapes]):
        size = int(np.prod(shape))
        leaf = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        tree.setdefault(f"{i % 3}", {})[f"leaf{i}"] = leaf
        start += size
    return tree


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([P.AS_THEY_ARE, *P.ORDERS.values()]))
def test_round_trip(shapes, order):
    tree = tree_of(shapes)
    packed = P.pack(tree, order)
    assert len(packed.kernels) == len({x.shape for x in jax.tree.leaves(tree) if x.ndim > 1})
    assert sorted(np.concatenate([x.ravel() for x in jax.tree.leaves(packed)])) == list(range(
        sum(x.size for x in jax.tree.leaves(tree))))
    back = P.unpack(packed, jax.eval_shape(lambda: tree), order)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_a_tpu_keeps_kernels_as_it_reads_them():
    ohwi = np.arange(2 * 3 * 3 * 5.0).reshape(2, 3, 3, 5)
    packed = P.pack({"a": ohwi, "b": ohwi + 1, "c": np.zeros(4)}, P.ORDERS["tpu"])
    (stack,) = packed.kernels.values()
    assert stack.shape == (2, 3, 3, 5, 2)
    assert stack[1, 2, 0, 4, 1] == ohwi[1, 2, 0, 4] + 1


def test_a_state_keeps_its_scalars_and_gets_its_moments_back():
    tx = make_optimizer(learning_rate=1e-3, warmup_steps=2, b1=0.9, b2=0.999, eps=1e-8,
                        eps_rule="tensorflow")
    params = jax.tree.map(jnp.asarray, tree_of([(2, 2), (4,)]))
    state = init_state(params, tx)
    state = state._replace(step=jnp.int32(7), ema_params=jax.tree.map(lambda x: x + 1, params))
    packed = P.pack_state(state, params)
    assert isinstance(packed.opt_state[0].mu, P.Packed) and packed.step == 7
    assert jax.tree.structure(packed) == jax.tree.structure(init_state(P.pack(params), tx))
    back = P.unpack_state(packed, params)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_unpacked_arrays_are_their_own():
    """What is saved must outlive the packed state, whose buffers the next step is given."""
    params = tree_of([])
    state = {"count": jnp.int32(3), "params": P.pack(params)}
    out = jax.jit(lambda s: P.unpack_state(s, params))(state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    assert state["count"].is_deleted()
    assert out["count"] == 3
    jax.tree.map(np.testing.assert_array_equal, out["params"], params)


def test_kernels_are_cast_and_vectors_are_not():
    tree = tree_of([(2, 2)])
    cast = P.unpack(P.kernels_as(P.pack(tree), jnp.bfloat16), tree)
    assert {x.dtype for x in jax.tree.leaves(cast) if x.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(cast) if x.ndim == 1} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), cast, tree)
