"""The gradients of a 3x3 convolution's kernel, one for each shard of a batch, as one kernel for
NVIDIA GPUs, written in Pallas for its Triton backend.

It is a product without operands of its own: of the pixels' gradients with the inputs that one tap
of the convolution sees, gathered as they are multiplied. cuDNN takes one call and two copied slices
a shard instead (benchmarks/NOTES.md, "Per-replica clip").
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models import norm_tiles

PIXELS, STAGES = 64, 3  # of a step of a program's loop; steps that are loaded ahead
PROGRAMS, STEPS = 600, 32  # splits give at most so many programs, and each at least so many steps
# The fastest plan of up to 15 on one H100 (JAX 0.11.2, bfloat16, 8 shards of 16 images), by pixels
# of a shard, input and output channels: rows, columns, splits, warps.
MEASURED = {
    (16384, 128, 128): (128, 128, 8, 8),
    (16384, 256, 128): (128, 128, 4, 8),
    (16384, 384, 128): (128, 128, 1, 8),
    (16384, 256, 256): (256, 128, 4, 8),
    (4096, 128, 256): (128, 128, 2, 8),
    (4096, 256, 256): (128, 128, 1, 4),
    (4096, 384, 256): (256, 128, 1, 8),
    (4096, 512, 256): (128, 128, 1, 4),
    (1024, 256, 256): (128, 128, 1, 4),
    (1024, 512, 256): (128, 256, 1, 8),
    (256, 256, 256): (128, 256, 1, 8),
    (256, 512, 256): (128, 128, 1, 4),
}


class Plan(NamedTuple):
    """rows, columns: output and input channels of a program's tile, which belongs to one shard and
    one tap; pixels: of a step of its loop; splits: programs that share the pixels of a tile; warps:
    of a program; interpret: run by JAX operations, on any platform."""

    rows: int
    columns: int
    pixels: int
    splits: int
    warps: int
    interpret: bool = False


def plan(x, g) -> Plan | None:
    """For x [S,b,H,W,in] and g [S,b,H',W',out], None where they do not fill the tiles or are not
    bfloat16."""
    shards, images, tall, wide, outputs = g.shape
    pixels, inputs = images * tall * wide, x.shape[-1]
    if (x.dtype != jnp.bfloat16 or inputs % 128 or outputs % 128 or pixels % PIXELS
            or PIXELS % wide):
        return None
    programs, steps, splits = 9 * shards * inputs * outputs // 128**2, pixels // PIXELS, 1
    while programs * splits * 2 <= PROGRAMS and steps % (2 * splits * STEPS) == 0:
        splits *= 2
    rows, columns, splits, warps = MEASURED.get((pixels, inputs, outputs), (128, 128, splits, 8))
    return Plan(rows, columns, PIXELS, splits, warps)


def _divided(a, b):
    quotient = lax.div(a, jnp.int32(b))
    return quotient, a - quotient * b


@functools.partial(jax.jit, static_argnums=(0, 1))  # one trace and one lowering a shape
def gradients(plan, stride, x, g):
    """x [S,b,H,W,in], g [S,b,H/stride,W/stride,out] -> [S,out,3,3,in], summed in float32, in x's
    type."""
    from jax.experimental import pallas as pl

    triton = norm_tiles.triton()
    shards, images, height, width, inputs = x.shape
    tall, wide, outputs = g.shape[2:]
    steps = images * tall * wide // (plan.pixels * plan.splits)
    border, blocks = int(stride == 1), inputs // plan.columns

    def kernel(x, g, out):
        tile, shard, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        tile, row = _divided(tile, outputs // plan.rows)
        tap, block = _divided(tile, blocks)
        down, right = (v - border for v in _divided(tap, 3))
        outs = row * plan.rows + lax.iota(jnp.int32, plan.rows)
        ins = block * plan.columns + lax.iota(jnp.int32, plan.columns)
        lines, columns = _divided(lax.iota(jnp.int32, plan.pixels), wide)
        w = columns * stride + right
        across = (w >= 0) & (w < width)

        def step(k, total):
            line = lax.div((part * steps + k) * plan.pixels, jnp.int32(wide)) + lines
            image, h = _divided(line, tall)
            h = h * stride + down
            inside = (h >= 0) & (h < height) & across
            a = triton.load(g.at[shard, (line * wide + columns)[:, None], outs[None, :]])
            b = triton.load(
                x.at[shard, ((image * height + h) * width + w)[:, None], ins[None, :]],
                mask=jnp.broadcast_to(inside[:, None], (plan.pixels, plan.columns)),
                other=jnp.zeros((), x.dtype))
            return total + lax.dot_general(a, b, (((0,), (0,)), ((), ())),
                                           preferred_element_type=jnp.float32)

        total = lax.fori_loop(0, steps, step, jnp.zeros((plan.rows, plan.columns), jnp.float32))
        triton.store(out.at[part, shard, outs[:, None], (tap * inputs + ins)[None, :]],
                     total.astype(out.dtype))

    kernel.__name__ = "filter_gradients"
    parts = pl.pallas_call(
        kernel, grid=(9 * blocks * (outputs // plan.rows), shards, plan.splits),
        out_shape=jax.ShapeDtypeStruct((plan.splits, shards, outputs, 9 * inputs),
                                       x.dtype if plan.splits == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=STAGES),
        interpret=plan.interpret, name="filter_gradients",
    )(x.reshape(shards, -1, inputs), g.reshape(shards, -1, outputs))
    whole = parts[0] if plan.splits == 1 else parts.sum(axis=0).astype(x.dtype)
    return whole.reshape(shards, outputs, 3, 3, inputs)
