"""The reverse process: one step a sampler, and the loops around it (Ho et al. 2020, Alg. 2).

Loops take ``predict_fn(x_t, t [B]) -> Prediction``, ``step_fn(prediction, x_t, t, noise)`` with the
schedule bound, and ``noise_fn(t) -> [B,H,W,C]``; t counts steps of the schedule at hand.
"""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.process import q_sample


def ancestral_step(schedule, prediction, x_t, t, noise):
    """x_t -> x_{t-1}, Alg. 2 line 4; t scalar int32, no noise at t = 0. -> [B,H,W,C]"""
    scale = jnp.where(t > 0, jnp.exp(0.5 * prediction.log_variance), 0.0)
    return prediction.mean + scale * noise


def ddim_step(schedule, prediction, x_t, t, noise):
    """x_t -> x_{t-1} without noise (Song et al. 2020, eq. 12 with sigma = 0). -> [B,H,W,C]"""
    previous = schedule.alphas_cumprod_prev[t]
    return jnp.sqrt(previous) * prediction.x_start + jnp.sqrt(1.0 - previous) * prediction.eps


SAMPLERS = {"ancestral": ancestral_step, "ddim": ddim_step}


def _one(predict_fn, step_fn, noise_fn, x_t, t):
    prediction = predict_fn(x_t, jnp.full(x_t.shape[0], t, jnp.int32))
    return step_fn(prediction, x_t, t, noise_fn(t)), prediction.x_start


def sample_loop(predict_fn, step_fn, noise_fn, x_T, num_timesteps):
    """lax.scan over t = num_timesteps-1 ... 0 from x_T [B,H,W,C]. -> x_0 [B,H,W,C]

    With num_timesteps < T it decodes x_t from the middle of the chain: started from copies of one
    x_t it gives the shared-latent pictures of Fig. 7.
    """
    def body(x_t, t):
        return _one(predict_fn, step_fn, noise_fn, x_t, t)[0], None

    return jax.lax.scan(body, x_T, jnp.arange(num_timesteps - 1, -1, -1))[0]


def sample_progressive(predict_fn, step_fn, noise_fn, x_T, num_timesteps, every):
    """As ``sample_loop``, keeping the x_0 predicted at t = 0, every, 2 every, ... (Fig. 6, 10).

    -> (x_0 [B,H,W,C], x_0 predictions [ceil(T/every),B,H,W,C] in the order of sampling,
    their t int32 [ceil(T/every)])
    """
    frames = -(-num_timesteps // every)
    ts = jnp.arange(frames - 1, -1, -1) * every
    first = num_timesteps - 1 - (frames - 1) * every  # steps before the first kept one

    def plain(i, carry):
        x_t, t = carry
        return _one(predict_fn, step_fn, noise_fn, x_t, t)[0], t - 1

    def block(carry, _):
        x_t, t, skip = carry
        x_t, t = jax.lax.fori_loop(0, skip, plain, (x_t, t))
        x_t, x_start = _one(predict_fn, step_fn, noise_fn, x_t, t)
        return (x_t, t - 1, jnp.int32(every - 1)), x_start

    carry = (x_T, jnp.int32(num_timesteps - 1), jnp.int32(first))
    (x_0, _, _), kept = jax.lax.scan(block, carry, None, length=frames)
    return x_0, kept, ts


def interpolate(schedule, x_start1, x_start2, t, weights, noise1, noise2):
    """Latents between two images at step t (Fig. 8): mixtures of the noised images, not of x_0.

    x_start1, x_start2, noise1, noise2 [H,W,C]; t int; weights [B] of the second image in [0, 1].
    -> x_t [B,H,W,C], to be decoded by ``sample_loop`` from t+1 steps (diffusion_utils.py:281)
    """
    both = q_sample(
        schedule,
        jnp.stack([x_start1, x_start2]),
        jnp.full(2, t, jnp.int32),
        jnp.stack([noise1, noise2]),
    )
    w = weights[:, None, None, None]
    return (1.0 - w) * both[:1] + w * both[1:]
