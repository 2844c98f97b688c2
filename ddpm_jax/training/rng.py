"""All randomness: pure functions of (key, step or t, global index of the example).

An example's draws never depend on the batch, device or host that it lands on, so a run is the same
on any number of devices. A cheaper generator (``rbg``) breaks that promise and is opt-in by name.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.training import importance

# Names as in jax.random.key; every generator but threefry2x32 depends on the device layout.
GENERATORS = {"threefry": "threefry2x32", "rbg": "rbg", "unsafe_rbg": "unsafe_rbg"}


class Draws(NamedTuple):
    """What one training step draws for B examples: t int32 [B] in 0 ... T-1; noise [B,H,W,C];
    flip bool [B]; dropout_bits: what each block drops out by, uint16 [B,H,W,C] each; drop_label
    bool [B], or None where labels are never dropped; weight float32 [B] of the example's loss,
    1 / (T p_t), or None where t is uniform."""

    t: jax.Array
    noise: jax.Array
    flip: jax.Array
    dropout_bits: tuple[jax.Array, ...]
    drop_label: jax.Array | None = None
    weight: jax.Array | None = None


def run_key(seed, generator="threefry"):
    """The run's key, the same on every host."""
    return jax.random.key(seed, impl=GENERATORS[generator])


def example_keys(key, step, index):
    """Keys [B] of the examples with global ``index`` int [B] in the batch of ``step``."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


def draw(keys, *, image_shape, num_timesteps, dropout_shapes, label_dropout=0.0,
         probabilities=None) -> Draws:
    """keys [B] -> Draws for images [B,*image_shape]. t is iid, and uniform (Alg. 1) unless it has
    ``probabilities`` [T].

    dropout_shapes: [H,W,C] of each block, empty without dropout. Drawn block by block, so that XLA
    makes the bits where they are used. label_dropout: the probability of drop_label.
    """
    cumulative = None if probabilities is None else jnp.cumsum(probabilities)

    def timestep(key):
        if cumulative is None:
            return jax.random.randint(key, (), 0, num_timesteps)
        return importance.timestep(cumulative, jax.random.uniform(key))

    def one(key):
        kt, kn, kf, kd = jax.random.split(key, 4)
        t = timestep(kt)
        return Draws(
            t=t,
            noise=jax.random.normal(kn, image_shape),
            flip=jax.random.bernoulli(kf),
            dropout_bits=tuple(
                jax.random.bits(jax.random.fold_in(kd, i), shape, jnp.uint16)
                for i, shape in enumerate(dropout_shapes)),
            # A fifth key beside those four, which stay as they are.
            drop_label=jax.random.bernoulli(jax.random.fold_in(key, 4), label_dropout)
            if label_dropout else None,
            weight=None if probabilities is None else 1.0 / (num_timesteps * probabilities[t]),
        )

    return jax.vmap(one)(keys)


def image_noise(key, index, t, image_shape):
    """Standard normal noise [B,*image_shape] of the images with global ``index`` int [B] at step t.

    t = -1 is the draw of x_T.
    """
    return jax.vmap(
        lambda i: jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, i), t + 1), image_shape
        )
    )(index)
