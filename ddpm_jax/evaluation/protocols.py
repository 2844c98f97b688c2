"""The two evaluation protocols of the paper's authors, by name.

`paper`: the reported numbers (appendix B: OpenAI's IS and TTUR's FID on 50,000 samples).
`monitor`: what the official TPU program computed during training (tfgan;
hojonathanho/diffusion, tpu_utils.py:76-109).
They share network and resize; numbers of one are never compared with those of the other.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ddpm_jax.training.steps import round_to_level


def truncate(x):
    """[-1,1] -> [0,255], rounded down: half a grey level darker on average."""
    return jnp.floor(jnp.clip((x + 1) * 127.5, 0, 255))


def keep_floats(x):
    """[-1,1] -> [0,255] without rounding, clipped: the official in-loop evaluation."""
    return (jnp.clip(x, -1, 1) + 1) * 127.5


QUANTISE = {"round": round_to_level, "truncate": truncate, "none": keep_floats}


class Protocol(NamedTuple):
    name: str
    quantise: str
    resize: str
    scale: str
    precision: str
    inception_score: str


PROTOCOLS = {
    "paper": Protocol("paper", "round", "tf1", "(x-128)/128", "highest", "is_openai10"),
    "monitor": Protocol("monitor", "none", "tf1", "(x-128)/128", "fast", "is_tfgan1"),
}


def describe(protocol: Protocol) -> str:
    """What a reference must share with the samples: resize, scale, precision of the network.

    Real images are integers already, so quantisation is a fact of the samples alone.
    """
    return f"resize={protocol.resize} scale={protocol.scale} precision={protocol.precision}"
