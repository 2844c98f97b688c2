"""Group norm's kernels for NVIDIA GPUs, written in Pallas for its Triton backend.

XLA's reductions over the pixels of [B,H,W,C] reach 2 to 25 % of an H100's bandwidth
(benchmarks/NOTES.md, "Norm kernels"). ``backward_sums`` replaces them for maps of any size;
``forward`` and ``backward`` are the whole norm of a small map, whose second read finds the first
one's data in the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models import norm_tiles as T


class Act(NamedTuple):
    """What follows the norm. kept: what dropout multiplies by."""

    groups: int
    eps: float
    silu: bool
    kept: float


# PTX: 1 / (1 + 2**(-log2(e) y)); a relative error of about 2**-22.
_SIGMOID = """{
 .reg .f32 t;
 mul.f32 t, $1, 0fBFB8AA3B;
 ex2.approx.ftz.f32 t, t;
 add.f32 t, t, 0f3F800000;
 rcp.approx.ftz.f32 $0, t;
}"""


def _sigmoid(y, plan):
    if plan.interpret:
        return 1.0 / (1.0 + jnp.exp(-y))
    [result] = T.triton().elementwise_inline_asm(
        _SIGMOID, args=[y], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(y.shape, y.dtype)])
    return result


def _group_means(v, size, plan):
    """[width] -> [width] in a kernel: of each channel, the mean of its group of ``size``."""
    if size == 1:
        return v
    if size & (size - 1):
        group = lax.iota(jnp.int32, plan.width) // size
        same = group[:, None] == group[None, :]
        return jnp.where(same, v[None, :], 0.0).sum(axis=1) * (1.0 / size)
    shape = (v.shape[0] // size, size)
    means = v.reshape(shape).sum(axis=1) * (1.0 / size)
    return jnp.broadcast_to(means[:, None], shape).reshape(v.shape)


def _gradient(plan, act, x, g, keep, centre, factor, bias):
    """-> x - centre, and g's gradient before SiLU and dropout; float32 tiles."""
    centred = x.astype(jnp.float32) - centre
    dy = g.astype(jnp.float32)
    if keep is not None:
        dy = jnp.where(keep, dy * act.kept, 0.0)
    if act.silu:
        y = centred * factor + bias
        sigmoid = _sigmoid(y, plan)
        dy = dy * (sigmoid * (1.0 + y * (1.0 - sigmoid)))
    return centred, dy


def backward_sums(plan, act, x, g, keep, centre, inverse, scale, bias):
    """x, g [B,H,W,C], keep bool [B,H,W,C] or None; centre, inverse float32 [B,C]; scale, bias [C].

    -> float32 [B,C] each, the sums over the pixels of dy and of dy * xhat.
    """

    def kernel(tiles, x, g, *rest):
        *masks, centre, inverse, scale, bias, sum_dy, sum_dy_xhat = rest
        columns = (tiles.row(centre), tiles.row(inverse) * tiles.row(scale), tiles.row(bias))

        def terms(_, x, g, keep=None):
            centred, dy = _gradient(plan, act, x, g, keep, *columns)
            return dy, dy * centred

        sums = T.add_up(tiles, [x, g, *masks], terms, 2)
        dy_xhat = sums[1] * tiles.vector(inverse)
        tiles.store_vector(sum_dy, sums[0])
        tiles.store_vector(sum_dy_xhat, dy_xhat)

    def run(images, per_image, per_channel):
        return T.joined(T.call(kernel, plan, [T.flat(v) for v in images], per_image, per_channel,
                             [None, None], "norm_backward_sums"))

    images = [v for v in (x, g, keep) if v is not None]
    return T.by_image(run)(images, [centre, inverse], [scale, bias])


def forward(plan, act, x, keep, shift, scale, bias):
    """-> the result [B,H,W,C], and float32 [B,C] each: the channel's own mean, its group's mean,
    1 / deviation; means with the shift."""
    pixels, size = x.shape[1] * x.shape[2], x.shape[3] // act.groups

    def kernel(tiles, first, x, *rest):
        rest = list(rest)
        masks = [] if keep is None else [rest.pop(0)]
        moved = 0.0 if shift is None else tiles.vector(rest.pop(0))
        scale, bias, out, channel_out, mean_out, inverse_out = rest
        first = tiles.vector(first).astype(jnp.float32)

        def terms(inside, x):
            centred = x.astype(jnp.float32) - first[None, :]
            centred = centred if inside is None else jnp.where(inside, centred, 0.0)
            return centred, centred * centred

        sums, squares = T.add_up(tiles, [x], terms, 2)
        centred = sums * (1.0 / pixels)
        channel = first + centred + moved
        mean = _group_means(channel, size, plan)
        away = channel - mean
        square = squares * (1.0 / pixels) - centred * centred + away * away
        inverse = lax.rsqrt(jnp.maximum(_group_means(square, size, plan), 0.0) + act.eps)
        factor = inverse * tiles.vector(scale)
        offset = tiles.vector(bias) - (mean - moved) * factor
        for ref, value in ((channel_out, channel), (mean_out, mean), (inverse_out, inverse)):
            tiles.store_vector(ref, value)
        factor, offset = factor[None, :], offset[None, :]

        def value(x, keep=None):
            y = x.astype(jnp.float32) * factor + offset
            if act.silu:
                y = y * _sigmoid(y, plan)
            return y if keep is None else jnp.where(keep, y * act.kept, 0.0)

        T.each_tile(tiles, [x, *masks], out, value)

    def run(images, per_image, per_channel):
        y, *rest = T.call(kernel, plan, [T.flat(v) for v in images], per_image, per_channel,
                         [images[0].dtype, None, None, None], "norm_forward", first=True)
        return [y.reshape(images[0].shape), *T.joined(rest)]

    images = [v for v in (x, keep) if v is not None]
    return T.by_image(run)(images, [] if shift is None else [shift], [scale, bias])


def backward(plan, act, x, g, keep, shift, scale, bias, channel, mean, inverse):
    """-> dx, dshift (None where shift is), the sums over the pixels of dy and dy * xhat."""
    pixels, size = x.shape[1] * x.shape[2], x.shape[3] // act.groups

    def kernel(tiles, x, g, *rest):
        rest = list(rest)
        masks = [] if keep is None else [rest.pop(0)]
        moved = 0.0 if shift is None else tiles.vector(rest.pop(0))
        channel, mean, inverse, scale, bias, out, sum_dy_out, sum_dy_xhat_out, *dshift = rest
        centre = tiles.vector(mean) - moved
        inverse, scale = tiles.vector(inverse), tiles.vector(scale)
        columns = [v[None, :] for v in (centre, inverse * scale, tiles.vector(bias))]

        def terms(_, x, g, keep=None):
            centred, dy = _gradient(plan, act, x, g, keep, *columns)
            return dy, dy * centred

        sum_dy, sum_dy_xhat = T.add_up(tiles, [x, g, *masks], terms, 2)
        sum_dy_xhat = sum_dy_xhat * inverse
        mean_dy = _group_means(sum_dy * scale * (1.0 / pixels), size, plan)
        mean_dy_xhat = _group_means(sum_dy_xhat * scale * (1.0 / pixels), size, plan)
        tiles.store_vector(sum_dy_out, sum_dy)
        tiles.store_vector(sum_dy_xhat_out, sum_dy_xhat)
        if dshift:
            mean_xhat = (tiles.vector(channel) - tiles.vector(mean)) * inverse
            tiles.store_vector(dshift[0], inverse * (
                sum_dy * scale - pixels * (mean_dy + mean_xhat * mean_dy_xhat)))
        constant, slope = (inverse * mean_dy)[None, :], (inverse * inverse * mean_dy_xhat)[None, :]

        def value(x, g, keep=None):
            centred, dy = _gradient(plan, act, x, g, keep, *columns)
            return dy * columns[1] - constant - centred * slope

        T.each_tile(tiles, [x, g, *masks], out, value)

    shifts = [] if shift is None else [shift]

    def run(images, per_image, per_channel):
        dx, *rest = T.call(kernel, plan, [T.flat(v) for v in images], per_image, per_channel,
                          [images[0].dtype, None, None, *[None for _ in shifts]], "norm_backward")
        return [dx.reshape(images[0].shape), *T.joined(rest)]

    images = [v for v in (x, g, keep) if v is not None]
    dx, sum_dy, sum_dy_xhat, *dshift = T.by_image(run)(
        images, [*shifts, channel, mean, inverse], [scale, bias])
    return dx, dshift[0] if dshift else None, sum_dy, sum_dy_xhat
