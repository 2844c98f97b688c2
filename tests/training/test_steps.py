"""The step as a pure function; the same step under every runner is in tests/parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import rng
from ddpm_jax.training import steps as S

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)


def linear_loss(params, x, draws):
    """A loss that sees images, t and noise, with a gradient that is easy to write down."""
    scale = 1.0 + draws.t.astype(jnp.float32) / 1000
    out = params["w"] * x.reshape(x.shape[0], -1).mean(1) * scale + params["b"]
    return (out - draws.noise.reshape(x.shape[0], -1).mean(1)) ** 2


def state(tx):
    return S.init_state({"w": jnp.float32(1.5), "b": jnp.float32(-0.5)}, tx)


def step(images=IMAGES, *, tx=None, clip=S.Clip(0.0, None), **kwargs):  # noqa: B008
    tx = tx or optax.sgd(1.0)
    settings = dict(loss_fn=linear_loss, tx=tx, ema_decay=0.99, num_timesteps=1000,
                    dropout_shapes=[], flip=False, clip=clip)
    return S.train_step(state(tx), jnp.asarray(images), rng.run_key(0), **{**settings, **kwargs})


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
    close(step(accumulation=accumulation)[0], step()[0])
    clipped = S.Clip(0.1, 4)
    close(step(accumulation=accumulation, clip=clipped)[0], step(clip=clipped)[0])


def test_global_clip():
    want = gradient(IMAGES, range(16))
    norm = float(optax.tree.norm(want))
    new, metrics = step(clip=S.Clip(norm / 3, None))
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
    new, metrics = step(heavy, clip=S.Clip(limit, 4))
    close(moved(new), want)
    close(metrics["grad_norm"], np.mean(norms))
    assert float(metrics["clip_fraction"]) == 0.25
    assert abs(moved(step(heavy, clip=S.Clip(limit, None))[0])["w"] - float(want["w"])) > 1e-3


def test_ema_copies_first_then_decays():
    tx = optax.sgd(1.0)
    settings = dict(loss_fn=linear_loss, tx=tx, ema_decay=0.9, num_timesteps=1000,
                    dropout_shapes=[], flip=False, clip=S.Clip(0.0, None))
    s1, _ = S.train_step(state(tx), jnp.asarray(IMAGES), rng.run_key(0), **settings)
    close(s1.ema_params, s1.params)
    s2, _ = S.train_step(s1, jnp.asarray(IMAGES), rng.run_key(0), **settings)
    close(s2.ema_params, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, s1.ema_params, s2.params))


def test_flips_mirror_half_of_the_images_left_to_right():
    keys = rng.example_keys(rng.run_key(0), 0, jnp.arange(16))
    flip = np.asarray(rng.draw(keys, image_shape=(4, 4, 1), num_timesteps=1000,
                               dropout_shapes=[]).flip)
    assert 0 < flip.sum() < 16
    mirrored = np.where(flip[:, None, None, None], IMAGES[:, :, ::-1], IMAGES)

    def left_column(params, x, draws):
        return (params["w"] * x[:, :, 0, 0].mean(1) - draws.noise[:, 0, 0, 0]) ** 2

    close(step(loss_fn=left_column, flip=True)[0].params,
          step(mirrored, loss_fn=left_column)[0].params)
    assert moved(step(loss_fn=left_column)[0]) != moved(step(loss_fn=left_column, flip=True)[0])


def test_many_steps_stop_where_told_and_equal_one_by_one():
    tx = optax.adam(1e-2)
    settings = dict(loss_fn=linear_loss, tx=tx, ema_decay=0.99, num_timesteps=1000,
                    dropout_shapes=[], flip=False, clip=S.Clip(1.0, 4))

    def one(s, i):
        return S.train_step(s, jnp.asarray(IMAGES), rng.run_key(0), **settings)

    program = jax.jit(lambda s, n: S.many_steps(one, s, n, most=5))
    looped, log = program(state(tx), 3)
    single, losses = state(tx), []
    for _ in range(3):
        single, m = jax.jit(lambda s: S.many_steps(one, s, 1, most=1))(single)
        losses.append(m["loss"][0])
    close(looped, single, rtol=1e-6)
    np.testing.assert_allclose(log["loss"], [*losses, 0, 0], rtol=1e-6)
    assert program._cache_size() == 1 and int(program(state(tx), 5)[0].step) == 5
    assert program._cache_size() == 1


def test_pixels_round_trip():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(256, 1, 1, 1)
    unit = S.to_unit_range(levels)
    assert float(unit.min()) == -1 and float(unit.max()) == 1
    np.testing.assert_array_equal(S.to_uint8(unit), levels)
    np.testing.assert_array_equal(S.to_uint8(jnp.array([-3.0, 3.0, 0.0])), [0, 255, 128])
