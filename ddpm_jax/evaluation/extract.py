"""What is taken from images on the device, in the program that made them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.evaluation import collect, small_cnn
from ddpm_jax.evaluation.inception import network


class Extractor(NamedTuple):
    """apply(params, images float32 [B,H,W,C] in [0,255]) -> tuple of arrays [B,...] named by names.

    params: a tree that goes into the program as an argument (weights do not belong in its code).
    """
    names: tuple
    params: dict
    apply: Callable
    precision: str


def _channels(images):
    """Mean and mean square of each channel: [B,2C]."""
    return jnp.concatenate([images.mean((1, 2)), jnp.square(images).mean((1, 2))], axis=1)


# name of a part: (names of its outputs, function of its weights, the images and the precision)
PARTS = {
    "inception": (("pool_3",), lambda weights, images, precision: network.features(
        weights, images, precision=precision)),
    "classifier": (("cnn", "cnn_logits"), lambda weights, images, _: small_cnn.apply(
        weights, images)),
    "random": (("random",), lambda weights, images, _: small_cnn.random_apply(weights, images)),
    "channels": (("channels",), lambda weights, images, _: _channels(images)),
    "images": (("images",), lambda weights, images, _: jnp.round(images).astype(jnp.uint8)),
}


def make(params: dict, *, precision: str = "highest") -> Extractor:
    """params: {part of PARTS: its weights}."""
    parts = sorted(params)      # inside jit a dict comes back sorted by key
    names = tuple(name for part in parts for name in PARTS[part][0])

    def apply(params, images):
        out = ()
        for part in parts:
            result = PARTS[part][1](params[part], images, precision)
            out += tuple(result) if len(PARTS[part][0]) > 1 else (result,)
        return out

    return Extractor(names, dict(params), apply, precision)


def fingerprint(extractor: Extractor) -> str:
    """Names the weights, for the request of a collection."""
    leaves = [f"{i}:{np.asarray(x).sum(dtype=np.float64)!r}:{np.shape(x)}"
              for i, x in enumerate(jax.tree.leaves(extractor.params))]
    return collect.key({"names": sorted(extractor.params), "leaves": leaves})
