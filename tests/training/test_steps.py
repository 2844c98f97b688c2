"""The step as a pure function; the same step under every runner is in tests/parallel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import rng
from ddpm_jax.training import steps as S
from ddpm_jax.training.gradients import Clip, mean_gradient

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)


def linear_loss(params, x, draws):
    """Depends on images, t and noise, with a gradient that is easy to write down. -> [B]"""
    scale = 1.0 + draws.t.astype(jnp.float32) / 1000
    out = params["w"] * x.reshape(x.shape[0], -1).mean(1) * scale + params["b"]
    return (out - draws.noise.reshape(x.shape[0], -1).mean(1)) ** 2


def state(tx):
    return S.init_state({"w": jnp.float32(1.5), "b": jnp.float32(-0.5)}, tx)


def settings(tx, *, loss=linear_loss, clip=Clip(0.0, None), micro_batches=1, **kwargs):  # noqa: B008
    def loss_fn(params, batch, draws, named=None):
        losses = loss(params, S.to_unit_range(batch.images), draws)
        return losses.mean(), losses

    return dict(loss_fn=loss_fn, tx=tx, ema_decay=0.99, num_timesteps=1000, dropout_shapes=[],
                flip=False, gradient=functools.partial(
                    mean_gradient, clip=clip, micro_batches=micro_batches)) | kwargs


def step(images=IMAGES, *, tx=None, **kwargs):
    tx = tx or optax.sgd(1.0)
    batch = S.Batch(jnp.asarray(images))
    return S.train_step(state(tx), batch, rng.run_key(0), **settings(tx, **kwargs))


def gradient(images, index):
    """The mean gradient of the examples ``index``, by autodiff of the whole, unsharded loss."""
    keys = rng.example_keys(rng.run_key(0), 0, jnp.arange(16))
    draws = rng.draw(keys, image_shape=(4, 4, 1), num_timesteps=1000, dropout_shapes=[])
    start = {"w": jnp.float32(1.5), "b": jnp.float32(-0.5)}
    return jax.grad(lambda p: linear_loss(p, S.to_unit_range(jnp.asarray(images)), draws)[
        np.asarray(index)].mean())(start)


def moved(new):
    return jax.tree.map(lambda a, b: float(a - b), {"w": 1.5, "b": -0.5}, new.params)


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-5, **kw}), a, b)


def test_plain_step_is_the_mean_gradient():
    new, metrics = step()
    want = gradient(IMAGES, range(16))
    close(moved(new), want)
    close(metrics["grad_norm"], optax.tree.norm(want))
    assert int(new.step) == 1 and float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulation_changes_nothing(accumulation):
    close(step(micro_batches=accumulation)[0], step()[0])
    clipped = Clip(0.1, 4)
    close(step(micro_batches=accumulation, clip=clipped)[0], step(clip=clipped)[0])


def test_global_clip():
    want = gradient(IMAGES, range(16))
    norm = float(optax.tree.norm(want))
    new, metrics = step(clip=Clip(norm / 3, None))
    close(moved(new), jax.tree.map(lambda g: g / 3, want))
    assert float(metrics["clip_fraction"]) == 1
    close(metrics["grad_norm"], norm)


def test_replica_clip_clips_each_part_before_the_mean():
    heavy = IMAGES.copy()
    heavy[:4] = 255  # one heavy shard: clipping it alone differs from clipping the mean
    parts = [gradient(heavy, range(4 * i, 4 * i + 4)) for i in range(4)]
    norms = [float(optax.tree.norm(g)) for g in parts]
    limit = sorted(norms)[2] * 1.01
    scaled = [jax.tree.map(lambda g, n=n: g * min(1, limit / n), part)
              for part, n in zip(parts, norms, strict=True)]
    want = jax.tree.map(lambda *g: sum(g) / 4, *scaled)
    new, metrics = step(heavy, clip=Clip(limit, 4))
    close(moved(new), want)
    close(metrics["grad_norm"], np.mean(norms))
    assert float(metrics["clip_fraction"]) == 0.25
    assert abs(moved(step(heavy, clip=Clip(limit, None))[0])["w"] - float(want["w"])) > 1e-3


def test_ema_copies_first_then_decays():
    tx = optax.sgd(1.0)
    ours = settings(tx, ema_decay=0.9)
    s1, _ = S.train_step(state(tx), S.Batch(jnp.asarray(IMAGES)), rng.run_key(0), **ours)
    close(s1.ema_params, s1.params)
    s2, _ = S.train_step(s1, S.Batch(jnp.asarray(IMAGES)), rng.run_key(0), **ours)
    close(s2.ema_params, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, s1.ema_params, s2.params))


def test_flips_mirror_half_of_the_images_left_to_right():
    keys = rng.example_keys(rng.run_key(0), 0, jnp.arange(16))
    flip = np.asarray(rng.draw(keys, image_shape=(4, 4, 1), num_timesteps=1000,
                               dropout_shapes=[]).flip)
    assert 0 < flip.sum() < 16
    mirrored = np.where(flip[:, None, None, None], IMAGES[:, :, ::-1], IMAGES)

    def left_column(params, x, draws):
        return (params["w"] * x[:, :, 0, 0].mean(1) - draws.noise[:, 0, 0, 0]) ** 2

    close(step(loss=left_column, flip=True)[0].params,
          step(mirrored, loss=left_column)[0].params)
    assert moved(step(loss=left_column)[0]) != moved(step(loss=left_column, flip=True)[0])


def test_pixels_round_trip():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(256, 1, 1, 1)
    unit = S.to_unit_range(levels)
    assert float(unit.min()) == -1 and float(unit.max()) == 1
    np.testing.assert_array_equal(S.to_uint8(unit), levels)
    np.testing.assert_array_equal(S.to_uint8(jnp.array([-3.0, 3.0, 0.0])), [0, 255, 128])
