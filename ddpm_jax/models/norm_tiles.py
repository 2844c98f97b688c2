"""How a kernel for NVIDIA GPUs goes over [B,H,W,C]: plans, tiles, sums, and the call of Pallas.

A program owns one image, a block of channels and a share of the pixels; a thread loads 16 bytes at
once and keeps its sums in registers. Triton's tiles are powers of two: ``padded`` plans mask what a
tile has too much of, others take only shapes that fill their tiles.
"""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PLATFORMS = {"gpu", "cuda"}
H100 = "NVIDIA H100 80GB HBM3"  # the jax.Device.device_kind on which the kernels were measured
VECTOR = 16  # bytes that one thread loads at once
PROGRAMS = 1024  # that backward_sums aims at: about 8 for each of an H100's 132 processors
FUSED_PIXELS = 256  # of a map that is read twice by one program; from 1024 on it was slower
# Pixels, channels, warps of a step: the fastest of some 20 on an H100 (NOTES.md, "Plans").
_BLOCK, _FUSED_BLOCK, _PADDED_CHANNELS = (128, 128, 8), (128, 64, 4), 32


class Plan(NamedTuple):
    """How [B,P,C] is cut. block: channels of a program, in a tile of ``width``; splits: shares of
    the pixels; steps: of a program's loop, each of ``tiles`` tiles of ``rows`` pixels; warps: of a
    program; masked: tiles overhang the block, the channels or the pixels; interpret: run by JAX
    operations, on any platform."""

    block: int
    width: int
    splits: int
    steps: int
    tiles: int
    rows: int
    warps: int
    masked: bool
    interpret: bool


def missing() -> str:
    """Why these kernels cannot be had with the installed JAX, "" where they can."""
    try:
        triton()
    except ImportError:
        return f"JAX {jax.__version__} has no Triton backend of Pallas"
    return ""


def fastest(forms, measured, otherwise, device, cut) -> str:
    """The row of ``forms`` that ``measured`` has for a device, (kind, compute type), if it can run
    there; else ``otherwise``, a row without kernels. cut: XLA cuts the program for several devices.
    """
    form = measured.get(device, otherwise)
    return otherwise if forms[form].kernels and (cut or missing()) else form


def on_cuda(interpret, kernels, otherwise, *args):
    """kernels(*args) where the program is compiled for an NVIDIA GPU, or they are interpreted;
    otherwise(*args) elsewhere."""
    if interpret:
        return kernels(*args)
    return lax.platform_dependent(*args, cuda=kernels, default=otherwise)


def _power(limit, divides):
    """The largest power of two that is at most ``limit`` and divides ``divides``."""
    return min(1 << (limit.bit_length() - 1), divides & -divides)


def _ceil_power(n):
    return 1 << (n - 1).bit_length()


def _cut_pixels(pixels, step, padded):
    """-> (pixels of a step, steps, whether the last overhangs)"""
    divides = _power(step, pixels)
    if divides >= 4 or not padded:
        return divides, pixels // divides, False
    step = min(step, _ceil_power(pixels))
    return step, -(-pixels // step), pixels % step > 0


def _finish(x, block, width, splits, step, steps, warps, masked, interpret):
    rows = min(step, max(1, 32 * warps * (VECTOR // x.dtype.itemsize) // width))
    return Plan(block, width, splits, steps, step // rows, rows, warps, masked, interpret)


def sums_plan(x, padded, interpret=False) -> Plan | None:
    """The Plan of ``backward_sums`` for x [B,H,W,C], None where the shape does not suit."""
    batch, pixels, channels = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    step, width, warps = _BLOCK
    least = 64 // x.dtype.itemsize  # 64 bytes in a row
    width = _power(width, channels)
    overhang = width < least
    if overhang:
        width = min(_BLOCK[1], max(least, _ceil_power(channels)))
    step, steps, more = _cut_pixels(pixels, step, padded)
    if (overhang and not padded) or step < 4 and not padded:
        return None
    splits = max(1, PROGRAMS // (batch * -(-channels // width)))
    splits = 1 if more else _power(splits, steps)
    return _finish(x, width, width, splits, step, steps // splits, warps, overhang or more,
                   interpret)


def fused_plan(x, groups, padded, interpret=False) -> Plan | None:
    """The Plan of ``forward`` and ``backward``, whose programs hold whole groups and all pixels of
    x [B,H,W,C], None where the shape does not suit."""
    pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
    size = channels // groups
    step, width, warps = _FUSED_BLOCK
    if size & (size - 1) == 0:
        block, most = max(_power(width, channels), size), 512
    else:  # the fewest groups that are at least 32 channels
        block = size * next((n for n in range(1, groups + 1)
                             if groups % n == 0 and n * size >= _PADDED_CHANNELS), groups)
        most = 128  # their means take a tile [width, width]
    width = _ceil_power(block)
    step, steps, more = _cut_pixels(pixels, step, padded)
    masked = more or width > block
    if (pixels > FUSED_PIXELS or width > most
            or not padded and (masked or step < 4 or width < VECTOR // x.dtype.itemsize)):
        return None
    return _finish(x, block, width, 1, step, steps, warps, masked, interpret)


class Tiles:
    """A program's view of its blocks: loads and stores, with masks where the plan has them."""

    def __init__(self, plan, pixels, channels):
        from jax.experimental import pallas as pl

        self.plan, self.pixels, self.ds = plan, pixels, pl.ds
        if plan.masked:
            lanes = lax.iota(jnp.int32, plan.width)
            left = channels - pl.program_id(0) * plan.block
            self.lanes, self.inside = lanes, (lanes < plan.block) & (lanes < left)

    def vector(self, ref):
        """[width] of a block of channels; 0 where it overhangs."""
        if not self.plan.masked:
            return ref[...]
        return triton().load(ref.at[self.lanes], mask=self.inside,
                             other=jnp.zeros((), ref.dtype))

    def row(self, ref):
        return self.vector(ref)[None, :]

    def store_vector(self, ref, value):
        if self.plan.masked:
            triton().store(ref.at[self.lanes], value, mask=self.inside)
        else:
            ref[...] = value

    def _at(self, start):
        rows = start + lax.iota(jnp.int32, self.plan.rows)[:, None]
        return (rows, self.lanes[None, :]), (rows < self.pixels) & self.inside[None, :]

    def load(self, ref, start):
        """[rows, width] of the pixels from ``start``; 0 where they overhang."""
        if not self.plan.masked:
            return ref[self.ds(start, self.plan.rows), :]
        where, mask = self._at(start)
        return triton().load(ref.at[where], mask=mask, other=jnp.zeros((), ref.dtype))

    def store(self, ref, start, value):
        if self.plan.masked:
            where, mask = self._at(start)
            triton().store(ref.at[where], value, mask=mask)
        else:
            ref[self.ds(start, self.plan.rows), :] = value

    def inside_tile(self, start):
        """Which elements are pixels of the map, or None where all are."""
        return self._at(start)[1] if self.plan.masked else None


@functools.cache
def triton():
    from jax.experimental.pallas import triton
    from jaxlib.triton import dialect

    # MLIR imports the module of each operation's dialect by this name. jaxlib has none of Triton's,
    # and looking for it in vain, at each operation, was 40 % of the lowering (NOTES.md, "Warm
    # start").
    sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
    return triton


def call(kernel, plan, images, per_image, per_channel, outputs, name, first=False):
    """Run ``kernel`` on a grid of (channel block, pixel share, image).

    images: [B,P,C]; per_image: [B,C]; per_channel: [C]. outputs: a type for a result [B,P,C], None
    for sums float32 [B,splits,C]. kernel(tiles, *refs) sees each cut to its program's part, without
    the dimension of images; ``first``: and the first pixel of images[0] before all others.
    """
    from jax.experimental import pallas as pl

    batch, pixels, channels = images[0].shape
    block, share = plan.block, pixels // plan.splits

    def whole(c, s, b):
        return b, s, c

    pixel_block = pl.BlockSpec((None, share, block), whole)
    first_block = [pl.BlockSpec((None, None, block), lambda c, s, b: (b, 0, c))] if first else []

    def run(*refs):
        kernel(Tiles(plan, pixels, channels), *refs)

    run.__name__ = name
    return pl.pallas_call(
        run,
        grid=(-(-channels // block), plan.splits, batch),
        in_specs=[
            *first_block,
            *[pixel_block for _ in images],
            *[pl.BlockSpec((None, block), lambda c, s, b: (b, c)) for _ in per_image],
            *[pl.BlockSpec((block,), lambda c, s, b: (c,)) for _ in per_channel],
        ],
        out_specs=[pl.BlockSpec((None, None, block), whole) if dtype is None else pixel_block
                   for dtype in outputs],
        out_shape=[
            jax.ShapeDtypeStruct((batch, plan.splits, channels), jnp.float32)
            if dtype is None else jax.ShapeDtypeStruct((batch, pixels, channels), dtype)
            for dtype in outputs],
        compiler_params=triton().CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=plan.interpret,
        name=name,
    )(*(images[:1] if first else []), *images, *per_image, *per_channel)


def add_up(tiles, refs, terms, count):
    """``count`` sums over a program's pixels of terms(inside, *tiles [rows,width]) -> arrays.

    The loads of a step come before its sums, so that many are under way at once.
    """
    plan = tiles.plan

    def step(i, sums):
        starts = [i * (plan.rows * plan.tiles) + j * plan.rows for j in range(plan.tiles)]
        loaded = [[tiles.load(ref, start) for ref in refs] for start in starts]
        for start, values in zip(starts, loaded, strict=True):
            terms_ = terms(tiles.inside_tile(start), *values)
            sums = tuple(a + b for a, b in zip(sums, terms_, strict=True))
        return sums

    sums = tuple(jnp.zeros((plan.rows, plan.width), jnp.float32) for _ in range(count))
    sums = lax.fori_loop(0, plan.steps, step, sums) if plan.steps > 1 else step(0, sums)
    return [v.sum(axis=0) for v in sums]


def each_tile(tiles, refs, out, value):
    """out = value(*tiles), the last tiles first: after ``add_up`` they are nearest."""
    plan = tiles.plan

    def step(i, carry):
        start = (plan.steps - 1 - i) * (plan.rows * plan.tiles)
        starts = [start + j * plan.rows for j in range(plan.tiles)]
        loaded = [[tiles.load(ref, start) for ref in refs] for start in starts]
        for start, values in zip(starts, loaded, strict=True):
            tiles.store(out, start, value(*values).astype(out.dtype))
        return carry

    if plan.steps > 1:
        lax.fori_loop(0, plan.steps, step, jnp.int32(0))
    else:
        step(0, None)


def flat(v):
    """[B,H,W,C] -> [B,P,C]"""
    return v.reshape(v.shape[0], v.shape[1] * v.shape[2], v.shape[3])


def joined(sums):
    """Each [B,splits,C] -> [B,C]."""
    return [v[:, 0] if v.shape[1] == 1 else v.sum(axis=1) for v in sums]


def by_image(fn):
    """fn(images, per_image, per_channel) -> list of [B,...], under ``vmap`` over images of shared
    channels' values, as one call for all images: the grid has no dimension left. Of channels'
    values that are not shared, a call after another."""
    of_all = jax.custom_batching.custom_vmap(fn)

    @of_all.def_vmap
    def rule(size, batched, images, per_image, per_channel):
        def each(values, flags):
            return [v if b else jnp.broadcast_to(v, (size, *v.shape))
                    for v, b in zip(values, flags, strict=True)]

        def as_one(values, flags):
            return [v.reshape(-1, *v.shape[2:]) for v in each(values, flags)]

        if any(batched[2]):
            args = [each(values, flags) for values, flags in zip(
                (images, per_image, per_channel), batched, strict=True)]
            out = lax.map(lambda args: of_all(*args), args)
            return out, [True for _ in out]
        out = of_all(as_one(images, batched[0]), as_one(per_image, batched[1]), per_channel)
        cut = [v.reshape(size, -1, *v.shape[1:]) for v in out]
        return cut, [True for _ in out]

    return of_all
