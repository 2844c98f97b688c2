import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.training import rng

DRAW = dict(image_shape=(4, 4, 1), num_timesteps=1000, dropout_shapes=[(2, 2, 1), (2, 2, 2)])


def test_an_example_draws_the_same_whoever_shares_its_batch():
    key = rng.run_key(3)
    whole = rng.draw(rng.example_keys(key, 5, jnp.arange(8)), **DRAW)
    part = rng.draw(rng.example_keys(key, 5, jnp.array([6, 2])), **DRAW)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[[6, 2]], b)


def test_steps_seeds_and_examples_differ():
    draws = [rng.draw(rng.example_keys(rng.run_key(seed), step, jnp.arange(4)), **DRAW)
             for seed, step in [(0, 0), (0, 1), (1, 0)]]
    noise = np.concatenate([d.noise.reshape(4, -1) for d in draws])
    assert np.abs(np.corrcoef(noise) - np.eye(12)).max() < 0.9
    assert len(np.unique(noise)) == noise.size


def test_distributions():
    d = rng.draw(rng.example_keys(rng.run_key(0), 0, jnp.arange(20_000)),
                 image_shape=(2, 2, 1), num_timesteps=10, dropout_shapes=[(1, 1, 1), (1, 1, 3)])
    counts = np.bincount(d.t, minlength=10)
    assert counts.shape == (10,) and np.abs(counts / 2000 - 1).max() < 0.12
    assert abs(float(d.flip.mean()) - 0.5) < 0.02
    assert abs(float(d.noise.mean())) < 0.02 and abs(float(d.noise.std()) - 1) < 0.02
    assert [b.shape for b in d.dropout_bits] == [(20_000, 1, 1, 1), (20_000, 1, 1, 3)]
    assert {b.dtype for b in d.dropout_bits} == {jnp.dtype(jnp.uint16)}
    bits = np.concatenate([b.reshape(20_000, -1) for b in d.dropout_bits], axis=1)
    assert np.abs(bits.mean(axis=0) / 32767.5 - 1).max() < 0.02
    assert np.abs(np.corrcoef(bits.T) - np.eye(4)).max() < 0.03  # blocks draw apart
    assert abs(np.corrcoef(d.t, d.noise[:, 0, 0, 0])[0, 1]) < 0.03


def test_image_noise_depends_on_seed_index_and_t_alone():
    key = rng.run_key(1)
    a = rng.image_noise(key, jnp.arange(5), -1, (2, 2, 1))
    b = rng.image_noise(key, jnp.array([4, 0]), jnp.int32(-1), (2, 2, 1))
    np.testing.assert_array_equal(np.asarray(a)[[4, 0]], b)
    assert not np.allclose(a, rng.image_noise(key, jnp.arange(5), 0, (2, 2, 1)))


@pytest.mark.parametrize("name", rng.GENERATORS)
def test_every_generator_draws(name):
    d = rng.draw(rng.example_keys(rng.run_key(0, name), 0, jnp.arange(3)), **DRAW)
    assert d.noise.shape == (3, 4, 4, 1) and bool(jnp.isfinite(d.noise).all())


def test_no_dropout_draws_no_bits():
    d = rng.draw(rng.example_keys(rng.run_key(0), 0, jnp.arange(3)),
                 **{**DRAW, "dropout_shapes": []})
    assert d.dropout_bits == () and jax.tree.leaves(d)[0].shape == (3,)
