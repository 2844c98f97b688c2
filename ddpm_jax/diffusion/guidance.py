"""Classifier-free guidance (Ho & Salimans 2021)."""

import jax.numpy as jnp


def guided(denoise_fn, scale, no_label, variance):
    """``denoise_fn`` that moves its prediction away from that without a label:
    without + scale (with - without).

    scale is s of Imagen and diffusers (guidance_scale): 1 is the network itself, 0 its prediction
    without a label. Ho & Salimans' w is s - 1. eps, x_0 and v are linear in each other at one x_t,
    so that all of them are guided alike; a learned variance is that of the prediction with the
    label. denoise_fn: (x_t [B,H,W,C], t [B], labels=int32 [B]) -> output; variance: Variance, whose
    split tells the prediction from what else the output holds. One call of the network for both.
    """
    def denoise(x_t, t, *, labels):
        # An example's two rows lie side by side: a batch that is cut over devices stays so.
        pairs = jnp.stack([labels, jnp.full_like(labels, no_label)], axis=1).reshape(-1)
        output = denoise_fn(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), labels=pairs)
        prediction, extra = variance.split(output)
        conditional, unconditional = _apart(prediction)
        moved = unconditional + scale * (conditional - unconditional)
        return moved if extra is None else jnp.concatenate([moved, _apart(extra)[0]], axis=-1)

    return denoise


def _apart(rows):
    pairs = rows.reshape(-1, 2, *rows.shape[1:])
    return pairs[:, 0], pairs[:, 1]
