"""Inception-2015, the network behind FID and IS, as pure functions on NHWC arrays.

The graph is `classify_image_graph_def.pb` (TensorFlow, December 2015), described here by one table
with torchvision's names. It differs from torchvision's InceptionV3: averaging branches leave the
padding out of the mean, Mixed_7c pools with max, there are 1008 classes and no auxiliary head.
Facts: TTUR fid.py, improved-gan model.py, pytorch-fid inception.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BN_EPSILON = 1e-3
SIZE = 299
FEATURES = 2048
CLASSES = 1008
PRECISIONS = {"highest": lax.Precision.HIGHEST, "fast": lax.Precision.DEFAULT}


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU."""
    name: str
    kernel: tuple
    features: int
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """3x3 window; `kind` is a row of POOLS."""
    kind: str
    stride: int = 1


class Split(NamedTuple):
    """Branches fed with the same input, joined along channels. `name` is '' inside a branch."""
    name: str
    branches: tuple


def _block_35(name, pool_features):
    return Split(name, (
        (Conv("branch1x1", (1, 1), 64),),
        (Conv("branch5x5_1", (1, 1), 48), Conv("branch5x5_2", (5, 5), 64)),
        (Conv("branch3x3dbl_1", (1, 1), 64), Conv("branch3x3dbl_2", (3, 3), 96),
         Conv("branch3x3dbl_3", (3, 3), 96)),
        (Pool("average"), Conv("branch_pool", (1, 1), pool_features))))


def _block_17(name, c):
    return Split(name, (
        (Conv("branch1x1", (1, 1), 192),),
        (Conv("branch7x7_1", (1, 1), c), Conv("branch7x7_2", (1, 7), c),
         Conv("branch7x7_3", (7, 1), 192)),
        (Conv("branch7x7dbl_1", (1, 1), c), Conv("branch7x7dbl_2", (7, 1), c),
         Conv("branch7x7dbl_3", (1, 7), c), Conv("branch7x7dbl_4", (7, 1), c),
         Conv("branch7x7dbl_5", (1, 7), 192)),
        (Pool("average"), Conv("branch_pool", (1, 1), 192))))


def _block_8(name, pool):
    return Split(name, (
        (Conv("branch1x1", (1, 1), 320),),
        (Conv("branch3x3_1", (1, 1), 384),
         Split("", ((Conv("branch3x3_2a", (1, 3), 384),), (Conv("branch3x3_2b", (3, 1), 384),)))),
        (Conv("branch3x3dbl_1", (1, 1), 448), Conv("branch3x3dbl_2", (3, 3), 384),
         Split("", ((Conv("branch3x3dbl_3a", (1, 3), 384),),
                    (Conv("branch3x3dbl_3b", (3, 1), 384),)))),
        (Pool(pool), Conv("branch_pool", (1, 1), 192))))


LAYERS = (
    Conv("Conv2d_1a_3x3", (3, 3), 32, 2, "VALID"),
    Conv("Conv2d_2a_3x3", (3, 3), 32, 1, "VALID"),
    Conv("Conv2d_2b_3x3", (3, 3), 64),
    Pool("max_valid", 2),
    Conv("Conv2d_3b_1x1", (1, 1), 80, 1, "VALID"),
    Conv("Conv2d_4a_3x3", (3, 3), 192, 1, "VALID"),
    Pool("max_valid", 2),
    _block_35("Mixed_5b", 32), _block_35("Mixed_5c", 64), _block_35("Mixed_5d", 64),
    Split("Mixed_6a", (
        (Conv("branch3x3", (3, 3), 384, 2, "VALID"),),
        (Conv("branch3x3dbl_1", (1, 1), 64), Conv("branch3x3dbl_2", (3, 3), 96),
         Conv("branch3x3dbl_3", (3, 3), 96, 2, "VALID")),
        (Pool("max_valid", 2),))),
    _block_17("Mixed_6b", 128), _block_17("Mixed_6c", 160), _block_17("Mixed_6d", 160),
    _block_17("Mixed_6e", 192),
    Split("Mixed_7a", (
        (Conv("branch3x3_1", (1, 1), 192), Conv("branch3x3_2", (3, 3), 320, 2, "VALID")),
        (Conv("branch7x7x3_1", (1, 1), 192), Conv("branch7x7x3_2", (1, 7), 192),
         Conv("branch7x7x3_3", (7, 1), 192), Conv("branch7x7x3_4", (3, 3), 192, 2, "VALID")),
        (Pool("max_valid", 2),))),
    _block_8("Mixed_7b", "average"), _block_8("Mixed_7c", "max"),
)


def conv_shapes() -> dict:
    """{name: (kh, kw, in, out)} of the 94 convolutions, in the graph's order."""
    shapes = {}

    def walk(steps, prefix, channels):
        for step in steps:
            if isinstance(step, Conv):
                shapes[prefix + step.name] = (*step.kernel, channels, step.features)
                channels = step.features
            elif isinstance(step, Split):
                inner = f"{step.name}." if step.name else prefix
                channels = sum(walk(branch, inner, channels) for branch in step.branches)
        return channels

    walk(LAYERS, "", 3)
    return shapes


def state_shapes() -> dict:
    """{name: shape} of the 472 tensors of the weights file: torchvision's names, OIHW kernels."""
    shapes = {}
    for name, (kh, kw, cin, cout) in conv_shapes().items():
        shapes[f"{name}.conv.weight"] = (cout, cin, kh, kw)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (cout,)
    return shapes | {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}


def fold(state: dict, epsilon: float = BN_EPSILON) -> dict:
    """Batch norm folded into the kernels, in float64, then float32.

    state: arrays of `state_shapes()`. -> {name: {'kernel' HWIO, 'bias' [out]}, 'fc': ...}.
    """
    params = {}
    for name in conv_shapes():
        weight, bias, mean, var = (np.asarray(state[f"{name}.bn.{part}"], np.float64)
                                   for part in ("weight", "bias", "running_mean", "running_var"))
        scale = weight / np.sqrt(var + epsilon)
        kernel = np.asarray(state[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
        params[name] = {"kernel": (kernel * scale).astype(np.float32),
                        "bias": (bias - mean * scale).astype(np.float32)}
    params["fc"] = {"kernel": np.ascontiguousarray(np.asarray(state["fc.weight"], np.float32).T),
                    "bias": np.asarray(state["fc.bias"], np.float32)}
    return params


def resize_tf1(images, size: int = SIZE):
    """TF1's bilinear grid: align_corners=False without half-pixel centres, no antialiasing.

    images: float [B,H,W,C] -> [B,size,size,C]. Bit-exact with tf.compat.v1.image.resize_bilinear
    outside jit; a fused multiply-add may move it by 5e-5 of 255 inside.
    """
    def axis(n):
        position = np.arange(size, dtype=np.float32) * (np.float32(n) / np.float32(size))
        low = np.floor(position).astype(np.int32)
        return low, np.minimum(low + 1, n - 1), position - low.astype(np.float32)

    y0, y1, fy = axis(images.shape[1])
    x0, x1, fx = axis(images.shape[2])
    fx, fy = fx[None, None, :, None], fy[None, :, None, None]
    rows0, rows1 = jnp.take(images, y0, axis=1), jnp.take(images, y1, axis=1)
    top0, top1 = jnp.take(rows0, x0, axis=2), jnp.take(rows0, x1, axis=2)
    low0, low1 = jnp.take(rows1, x0, axis=2), jnp.take(rows1, x1, axis=2)
    top = top0 + (top1 - top0) * fx
    low = low0 + (low1 - low0) * fx
    return top + (low - top) * fy


def _window(x, init, operation, stride, padding):
    return lax.reduce_window(x, np.asarray(init, x.dtype), operation, (1, 3, 3, 1),
                             (1, stride, stride, 1), padding)


def average_pool(x, stride=1):
    """3x3 mean over the pixels inside the image only (count_include_pad=False)."""
    def count(n):
        inside = np.full(n, 3.0, np.float32)
        inside[[0, -1]] -= 1
        return inside
    counts = count(x.shape[1])[:, None] * count(x.shape[2])[None, :]
    return _window(x, 0, lax.add, stride, "SAME") / counts[None, :, :, None].astype(x.dtype)


def max_pool(x, stride=1):
    """3x3 maximum, padded with -inf."""
    return _window(x, -np.inf, lax.max, stride, "SAME")


def max_pool_valid(x, stride=2):
    """3x3 maximum without padding."""
    return _window(x, -np.inf, lax.max, stride, "VALID")


POOLS = {"average": average_pool, "max": max_pool, "max_valid": max_pool_valid}


def network(params: dict, x, *, precision: str = "highest") -> jax.Array:
    """pool_3 [B,2048] of x: float [B,299,299,3], already scaled to (image - 128) / 128. The last
    layer is applied in `scores`, with and without its bias."""
    passes = PRECISIONS[precision]

    def run(steps, prefix, x):
        for step in steps:
            if isinstance(step, Conv):
                p = params[prefix + step.name]
                x = lax.conv_general_dilated(
                    x, jnp.asarray(p["kernel"], x.dtype), (step.stride, step.stride), step.padding,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=passes)
                x = jax.nn.relu(x + jnp.asarray(p["bias"], x.dtype)[None, None, None, :])
            elif isinstance(step, Pool):
                x = POOLS[step.kind](x, step.stride)
            else:
                inner = f"{step.name}." if step.name else prefix
                x = jnp.concatenate([run(branch, inner, x) for branch in step.branches], axis=-1)
        return x

    return jnp.mean(run(LAYERS, "", x), axis=(1, 2))


def features(params: dict, images, *, precision: str = "highest") -> jax.Array:
    """pool_3 [B,2048] float32: resize, scale, network. images: uint8 or float [B,H,W,1 or 3] in
    [0,255].

    precision: 'highest' for a number to report; 'fast' lets the device round its multiplications
    (bf16 on TPU, TF32 on recent NVIDIA chips): a monitor, to be compared only with itself.
    """
    x = images.astype(jnp.float32)
    if x.shape[-1] == 1:
        x = jnp.repeat(x, 3, axis=-1)
    return network(params, (resize_tf1(x) - 128.0) / 128.0, precision=precision)


def flops_per_image() -> float:
    """Multiplications and additions of pool_3 of one image, from the table (about 11.4e9)."""
    total = 0.0

    def walk(steps, shape):
        nonlocal total
        h, w, c = shape
        for step in steps:
            if isinstance(step, Split):
                outs = [walk(branch, (h, w, c)) for branch in step.branches]
                h, w, c = outs[0][0], outs[0][1], sum(o[2] for o in outs)
                continue
            valid = step.kind == "max_valid" if isinstance(step, Pool) else step.padding == "VALID"
            kh, kw = (3, 3) if isinstance(step, Pool) else step.kernel
            if valid:
                h, w = (h - kh) // step.stride + 1, (w - kw) // step.stride + 1
            if isinstance(step, Conv):
                total += 2.0 * h * w * kh * kw * c * step.features
                c = step.features
        return h, w, c

    walk(LAYERS, (SIZE, SIZE, 3))
    return total
