"""Group norm, SiLU and dropout as one differentiable operation, and its plain form.

Forward and backward pass are written by hand for the bytes they move: both read the activation once
for all sums and once to apply, keep only the activation itself (in the compute type) and a few
numbers a channel, and the barriers stop XLA from sharing a float32 copy of it between the two
reads. What each barrier and each form saves is measured in benchmarks/NOTES.md. ``FORMS`` has a row
for what XLA compiles, and others for the kernels of norm_kernels.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models import norm_kernels, norm_tiles
from ddpm_jax.models.norm_kernels import Act

DROPOUT_BITS = 16  # a probability is a multiple of 2**-16: 0.1 is drawn as 0.100006


def _mean_by_reshape(v, groups):
    shape = (*v.shape[:-1], groups, v.shape[-1] // groups)
    return jnp.broadcast_to(v.reshape(shape).mean(axis=-1, keepdims=True), shape).reshape(v.shape)


def _mean_by_product(v, groups):
    size = v.shape[-1] // groups
    group = jnp.arange(v.shape[-1]) // size
    same = (group[:, None] == group[None, :]).astype(v.dtype)
    return jnp.matmul(v, same, precision=lax.Precision.HIGHEST) / size


# A TPU would pad [B,groups,C/groups] to 8 or 16 times its size.
_GROUP_MEANS = {"tpu": _mean_by_product, "default": _mean_by_reshape}


def _group_mean(v, groups):
    """float32 [...,C] -> [...,C]: the mean of its group's values for every channel."""
    ways = {k: functools.partial(f, groups=groups) for k, f in _GROUP_MEANS.items()}
    return lax.platform_dependent(v, **ways)


def _channel_sums(x):
    """For each channel of x [B,H,W,C], float32 [B,C] each: its first pixel s, and the sums over the
    pixels of x - s and (x - s)^2. Unlike sums of x and x^2, these do not cancel where the mean is
    large compared with the deviation."""
    first = x[:, :1, :1, :].astype(jnp.float32)
    centred = x.astype(jnp.float32) - first
    return first[:, 0, 0], centred.sum(axis=(1, 2)), jnp.square(centred).sum(axis=(1, 2))


def _join_channels(sums, pixels, groups):
    """From ``_channel_sums``, float32 [B,C] each: the channel's own mean, its group's mean, its
    group's variance (channels' moments joined as in Chan et al. 1983)."""
    first, centred, square = sums[0], sums[1] / pixels, sums[2] / pixels
    channel = first + centred
    mean = _group_mean(channel, groups)
    variance = _group_mean(square - jnp.square(centred) + jnp.square(channel - mean), groups)
    return channel, mean, jnp.maximum(variance, 0.0)


def _drop(x, keep, kept):
    return x * keep * kept


def _kept(rate):
    """What dropout multiplies by."""
    return 1.0 / (1.0 - _threshold(rate) / 2**DROPOUT_BITS)


def _threshold(rate):
    return round(rate * 2**DROPOUT_BITS)


def _pixels(v):
    return v[:, None, None, :]


def _forward(x, keep, shift, scale, bias, act, stored=lambda v: v):
    # Without this barrier XLA joins the sums over pixels and channels and reads x again for each
    # (NOTES.md, "barrier after the pixel sums").
    x, (first, *sums) = lax.optimization_barrier((x, _channel_sums(x)))
    first = first if shift is None else first + shift
    channel, mean, variance = _join_channels((first, *sums), x.shape[1] * x.shape[2], act.groups)
    inverse = lax.rsqrt(variance + act.eps)
    factor = inverse * scale[None, :]
    offset = bias[None, :] - (mean if shift is None else mean - shift) * factor
    factor, offset = stored((factor, offset))
    y = x.astype(jnp.float32) * _pixels(factor) + _pixels(offset)
    if act.silu:
        y = y * jax.nn.sigmoid(y)
    if keep is not None:
        y = _drop(y, keep, act.kept)
    return x, y.astype(x.dtype), channel, mean, inverse


def _backward_sums(act, x, g, keep, centre, inverse, scale, bias):
    xhat, dy = _normalised_and_gradient(act, x, g, keep, centre, inverse, scale, bias)
    # Rows first: summed over both axes at once, dy is written as float32 and read back by XLA
    # (NOTES.md, "backward sums of the norm over rows").
    sums = lax.optimization_barrier((dy.sum(axis=1), (dy * xhat).sum(axis=1)))
    sum_dy, sum_dy_xhat = (v.sum(axis=1) for v in sums)
    # Without this barrier XLA reads x and g again for the sums over the batch and keeps a float32
    # dy (NOTES.md, "barrier after the pixel sums").
    return lax.optimization_barrier((x, g, sum_dy, sum_dy_xhat))


def _normalised_and_gradient(act, x, g, keep, centre, inverse, scale, bias):
    xhat = (x.astype(jnp.float32) - _pixels(centre)) * _pixels(inverse)
    dy = g.astype(jnp.float32)
    if keep is not None:
        dy = _drop(dy, keep, act.kept)
    if act.silu:
        y = xhat * scale[None, None, None, :] + bias[None, None, None, :]
        sigmoid = jax.nn.sigmoid(y)
        dy = dy * sigmoid * (1.0 + y * (1.0 - sigmoid))
    return xhat, dy


def _backward(x, g, keep, shift, scale, bias, channel, mean, inverse, act, sums=_backward_sums):
    centre = mean if shift is None else mean - shift
    x, g, sum_dy, sum_dy_xhat = sums(act, x, g, keep, centre, inverse, scale, bias)
    pixels = x.shape[1] * x.shape[2]
    mean_dy, mean_dy_xhat = _mean_gradients(sum_dy, sum_dy_xhat, scale, pixels, act)
    xhat, dy = _normalised_and_gradient(act, x, g, keep, centre, inverse, scale, bias)
    dx = _pixels(inverse) * (
        dy * scale[None, None, None, :] - _pixels(mean_dy) - xhat * _pixels(mean_dy_xhat)
    )
    moments = channel, mean, inverse, mean_dy, mean_dy_xhat
    dshift = None if shift is None else _shift_gradient(sum_dy, scale, pixels, *moments)
    return dx.astype(x.dtype), dshift, sum_dy, sum_dy_xhat


def _mean_gradients(sum_dy, sum_dy_xhat, scale, pixels, act):
    both = jnp.stack([sum_dy, sum_dy_xhat]) * (scale[None, None, :] / pixels)
    return _group_mean(both, act.groups)


def _shift_gradient(sum_dy, scale, pixels, channel, mean, inverse, mean_dy, mean_dy_xhat):
    """The sum of dx over the pixels."""
    mean_xhat = (channel - mean) * inverse
    dshift = sum_dy * scale[None, :] - pixels * (mean_dy + mean_xhat * mean_dy_xhat)
    return inverse * dshift


def _backward_stored(x, g, keep, shift, scale, bias, channel, mean, inverse, act):
    """``_backward`` for a CPU, where xhat and dy are written for YNNPACK's sums anyway: they are
    read again, not computed again. The barriers make XLA write vectors of channels as well; in the
    loop over the pixels each of them costs a division of the channel's index by the group's size.
    """
    centre = mean if shift is None else mean - shift
    centre, factor = lax.optimization_barrier((centre, inverse))
    xhat, dy = lax.optimization_barrier(
        _normalised_and_gradient(act, x, g, keep, centre, factor, scale, bias))
    sum_dy, sum_dy_xhat = dy.sum(axis=(1, 2)), (dy * xhat).sum(axis=(1, 2))
    pixels = x.shape[1] * x.shape[2]
    mean_dy, mean_dy_xhat = _mean_gradients(sum_dy, sum_dy_xhat, scale, pixels, act)
    of_dy, of_xhat, offset = lax.optimization_barrier(
        (inverse * scale[None, :], inverse * mean_dy_xhat, inverse * mean_dy))
    dx = dy * _pixels(of_dy) - xhat * _pixels(of_xhat) - _pixels(offset)
    moments = channel, mean, inverse, mean_dy, mean_dy_xhat
    dshift = None if shift is None else _shift_gradient(sum_dy, scale, pixels, *moments)
    return dx.astype(x.dtype), dshift, sum_dy, sum_dy_xhat


class Form(NamedTuple):
    """One way of computing the norm; act: norm_kernels.Act.

    forward(x, keep, shift, scale, bias, act) -> x for ``backward``, the result, and float32 [B,C]
    each: the channel's own mean, its group's mean, 1 / deviation.
    kernels: it has some for NVIDIA GPUs, and uses XLA's operations for other platforms.
    backward(x, g, keep, shift, scale, bias, channel, mean, inverse, act) -> dx, dshift, and float32
    [B,C] each: the sums over the pixels of dy and dy * xhat."""

    forward: Callable
    backward: Callable
    kernels: bool = False


def kernels_form(padded, interpret=False) -> Form:
    """The kernels of norm_kernels.py where the program is compiled for an NVIDIA GPU and the shape
    has a plan; XLA's form elsewhere. padded, interpret: as in norm_tiles.Plan."""
    on_cuda = functools.partial(norm_tiles.on_cuda, interpret)

    def forward(*args):
        *arrays, act = args
        plan = norm_tiles.fused_plan(arrays[0], act.groups, padded, interpret)
        if plan is None:
            return _forward(*args)

        def kernels(x, *rest):
            x = lax.optimization_barrier(x)  # or what reads it later would repeat what makes it
            return x, *norm_kernels.forward(plan, act, x, *rest)

        return on_cuda(kernels, functools.partial(_forward, act=act), *arrays)

    def sums(act, *arrays):
        plan = norm_tiles.sums_plan(arrays[0], padded, interpret)
        if plan is None:
            return _backward_sums(act, *arrays)

        def kernels(x, g, *rest):
            x, g = lax.optimization_barrier((x, g))
            return x, g, *norm_kernels.backward_sums(plan, act, x, g, *rest)

        return on_cuda(kernels, functools.partial(_backward_sums, act), *arrays)

    def backward(*args):
        *arrays, act = args
        plan = norm_tiles.fused_plan(arrays[0], act.groups, padded, interpret)
        if plan is None:
            return _backward(*args, sums=sums)
        return on_cuda(functools.partial(norm_kernels.backward, plan, act),
                       functools.partial(_backward, act=act), *arrays)

    # Under jit, norms of one shape are traced and lowered once; to Triton, that takes 0.1 s each.
    return Form(jax.jit(forward, static_argnums=5), jax.jit(backward, static_argnums=9),
                kernels=True)


FORMS = {
    "xla": Form(_forward, _backward),
    "stored": Form(functools.partial(_forward, stored=lax.optimization_barrier), _backward_stored),
    "triton": kernels_form(padded=False),  # the form that was measured
    "triton_padded": kernels_form(padded=True),
}
PLAIN = "xla"  # has no kernels
# By jax.Device.device_kind and the compute type, where another row was measured to be
# the fastest (NOTES.md, "Norm kernels" and "The norm on a CPU").
FASTEST_FORMS = {("cpu", "float32"): "stored",
                 (norm_tiles.H100, "bfloat16"): "triton",
                 (norm_tiles.H100, "float32"): "triton"}


def fastest_form(device_kind, dtype, cut) -> str:
    """The row of FORMS for a device and a compute type; cut: XLA cuts the program for several
    devices."""
    return norm_tiles.fastest(FORMS, FASTEST_FORMS, PLAIN, (device_kind, dtype), cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def group_norm_act(x, shift, scale, bias, bits, groups, eps, silu, rate, form="xla"):
    """Group norm of x + shift, then SiLU where ``silu``, then dropout at ``rate`` where bits is
    not None.

    x [B,H,W,C] any float type; shift float32 [B,C] or None: added inside the norm, so it needs no
    extra pass over x; scale, bias float32 [C]; bits uint16 [B,H,W,C] or None; rate in [0, 1); form:
    a row of ``FORMS``. -> [B,H,W,C] in x's type.
    """
    return _group_norm_act_fwd(x, shift, scale, bias, bits, groups, eps, silu, rate, form)[0]


def _group_norm_act_fwd(x, shift, scale, bias, bits, groups, eps, silu, rate, form):
    # Without this barrier a TPU repeats threefry at each use and writes the compared bits as
    # float32 (NOTES.md, "and the mask behind a barrier").
    keep = None if bits is None else lax.optimization_barrier(bits >= _threshold(rate))
    act = Act(groups, eps, silu, _kept(rate))
    x, y, *moments = FORMS[form].forward(x, keep, shift, scale, bias, act)
    return y, (x, keep, shift, scale, bias, *moments)


def _group_norm_act_bwd(groups, eps, silu, rate, form, saved, g):
    x, *rest = saved
    dx, dshift, sum_dy, sum_dy_xhat = FORMS[form].backward(
        x, g, *rest, Act(groups, eps, silu, _kept(rate)))
    return dx, dshift, sum_dy_xhat.sum(axis=0), sum_dy.sum(axis=0), None


group_norm_act.defvjp(_group_norm_act_fwd, _group_norm_act_bwd)


def plain_group_norm_act(x, shift, scale, bias, bits, groups, eps, silu, rate):
    """``group_norm_act`` as the equations have it, differentiated by JAX: what the fused form is
    tested against. Statistics in two passes; float32 result."""
    b, h, w, c = x.shape
    x = x.astype(jnp.float32) + (0.0 if shift is None else _pixels(shift))
    grouped = x.reshape(b, h, w, groups, c // groups)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = jnp.square(grouped - mean).mean(axis=(1, 2, 4), keepdims=True)
    y = ((grouped - mean) / jnp.sqrt(variance + eps)).reshape(x.shape)
    y = y * scale[None, None, None, :] + bias[None, None, None, :]
    y = jax.nn.silu(y) if silu else y
    if bits is None:
        return y
    kept = 1 - round(rate * 2**DROPOUT_BITS) / 2**DROPOUT_BITS
    return jnp.where(bits >= (1 - kept) * 2**DROPOUT_BITS, y / kept, 0.0)


def create_parameters(layer):
    """The ``setup`` of a layer: its parameters of ``shapes()``, as attributes."""
    for name, shape in layer.shapes().items():
        setattr(layer, name, layer.param(name, layer.initializers()[name], shape))


class GroupNorm(nn.Module):
    """Group norm with eps 1e-6 (tf.contrib's default), then SiLU and dropout where enabled."""

    channels: int
    groups: int
    silu: bool = True
    rate: float = 0.0
    form: str = "xla"

    @nn.nowrap
    def shapes(self):
        return {"scale": (self.channels,), "bias": (self.channels,)}

    @nn.nowrap
    def initializers(self):
        return {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}

    def setup(self):
        create_parameters(self)

    def __call__(self, x, bits=None, shift=None):
        """x [B,H,W,C]; bits, shift: as in ``group_norm_act``."""
        return group_norm_act(
            x, shift, self.scale, self.bias, bits, self.groups, 1e-6, self.silu, self.rate,
            self.form)
