"""Features without downloaded weights: a small classifier's, and those of a random network.

The distance in the classifier's features is `FD-cnn@<hash8>`, in the random ones `FD-rand@<seed>`.
Both are regression signals for one dataset and one set of weights: never FID, and not comparable
with published numbers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.evaluation.frechet import frechet_distance
from ddpm_jax.evaluation.moments import mean_and_cov

WIDTHS = (32, 64, 128)
SMALL_SIDE = 16          # images up to this side get half the widths
FEATURES = 128
LARGEST_SIDE = 64
CONFIDENT = 0.9
OUTPUT_BATCH = 256


class Outputs(NamedTuple):
    """features float32 [B,128]; logits float32 [B,classes]."""
    features: jax.Array
    logits: jax.Array


class Classifier(nn.Module):
    """Two 3x3 convolutions a stage, halving until the side is at most 4; then one dense layer."""
    classes: int

    @nn.compact
    def __call__(self, x):
        stage, share = 0, 2 if max(x.shape[1:3]) <= SMALL_SIDE else 1
        while True:
            width = WIDTHS[min(stage, len(WIDTHS) - 1)] // share
            for _ in range(2):
                x = nn.relu(nn.Conv(width, (3, 3), kernel_init=nn.initializers.he_normal())(x))
            if min(x.shape[1:3]) <= 4:
                break
            x = nn.max_pool(x, (2, 2), (2, 2))
            stage += 1
        x = nn.relu(nn.Dense(FEATURES, name="features")(x.reshape(len(x), -1)))
        return Outputs(x, nn.Dense(self.classes, name="logits")(x))


def scaled(images):
    """uint8 [B,H,W,C] in [0,255] -> float32 in [-1,1], at most 64 pixels a side."""
    x = jnp.asarray(images).astype(jnp.float32) / 127.5 - 1
    factor = -(-max(x.shape[1:3]) // LARGEST_SIDE)
    return nn.avg_pool(x, (factor, factor), (factor, factor)) if factor > 1 else x


def apply(params, images) -> Outputs:
    """The network on uint8 or float images [B,H,W,C] in [0,255]; for use inside jit."""
    classes = params["logits"]["bias"].shape[0]
    return Classifier(classes).apply({"params": params}, scaled(images))


def random_apply(params, images):
    """Means over each stage of a random network: float32 [B, 224], for use inside jit."""
    x, out = scaled(images), []
    for kernel in params:
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST)
        x = nn.relu(x)
        out.append(x.mean((1, 2)))
        if min(x.shape[1:3]) > 1:
            x = nn.max_pool(x, (2, 2), (2, 2))
    return jnp.concatenate(out, axis=1)


def random_params(channels: int, seed: int = 0) -> list:
    """Kernels of the random network: numpy, the same on every machine."""
    rng = np.random.default_rng(seed)
    sizes = [channels, *WIDTHS]
    return [(rng.standard_normal((3, 3, a, b)) * np.sqrt(2 / (9 * a))).astype(np.float32)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)]


_apply = jax.jit(apply)


def outputs(params, images) -> Outputs:
    """The network on uint8 images [N,H,W,C], in batches of one size: numpy float32."""
    n, size = len(images), min(OUTPUT_BATCH, len(images))
    batches = [_apply(params, np.take(images, np.arange(s, s + size), axis=0, mode="clip"))
               for s in range(0, n, size)]
    return Outputs(*(np.concatenate([np.asarray(x) for x in rows])[:n]
                     for rows in zip(*batches, strict=True)))


def distance(features_a, features_b) -> float:
    """Frechet distance between two sets of features [N,D]."""
    return frechet_distance(*mean_and_cov(features_a), *mean_and_cov(features_b))
