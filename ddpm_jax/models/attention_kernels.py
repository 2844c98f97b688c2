"""Attention's kernels for NVIDIA GPUs, written in Pallas for its Triton backend.

A program holds whole rows of the scores in registers, so softmax needs one pass. The probabilities
of at most 256 keys are no larger than the activation: they are kept, and the backward pass needs
four products instead of the seven of kernels that compute the scores again. q, k and v stay side by
side in one array [B,N,3C], and so do their gradients: each of the products before and behind them
is one for all three.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models import norm_tiles

TOKENS = 64, 256  # fewest and most
_LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    """A kernel's tiles. rows: of the result; step: of the sums' loop; width: channels of a block of
    the result; warps: of a program; stages: steps that are loaded ahead."""

    rows: int
    step: int
    width: int
    warps: int
    stages: int


class Plans(NamedTuple):
    """dense: the product of q, k and v; forward; scores, values: of the backward pass, the
    gradients of scores and q, and of k and v; interpret: run by JAX operations, on any platform."""

    dense: Plan
    forward: Plan
    scores: Plan
    values: Plan
    interpret: bool


def plans(x, interpret=False) -> Plans | None:
    """For x [B,N,C], None where it does not fill the tiles or is not bfloat16."""
    _, tokens, channels = x.shape
    low, high = TOKENS
    if (x.dtype != jnp.bfloat16 or channels % 64 or not low <= tokens <= high
            or tokens & (tokens - 1)):
        return None
    rows, width = min(128, tokens), 64 if channels % 128 else 128
    # The fastest of some ten each on an H100, at 256 tokens and channels (NOTES.md, "Attention").
    return Plans(dense=Plan(rows, 64, width, 8, 3), forward=Plan(rows, 64, 64, 8, 3),
                 scores=Plan(64, 64, 64, 4, 2), values=Plan(rows, 32, width, 8, 4),
                 interpret=interpret)


def _dot(a, b, over):
    """The product of two tiles, summed over the axes ``over`` in float32."""
    return lax.dot_general(a, b, ((over[:1], over[1:]), ((), ())),
                           preferred_element_type=jnp.float32)


def _sum(steps, term, shapes):
    """The sums of term(i) -> a tile for each of ``shapes``, over i below ``steps``."""
    def step(i, sums):
        return tuple(a + b for a, b in zip(sums, term(i), strict=True))

    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    return lax.fori_loop(0, steps, step, zeros) if steps > 1 else step(0, zeros)


def _each(steps, body):
    def step(i, carry):
        body(i)
        return carry

    lax.fori_loop(0, steps, step, jnp.int32(0))


def _call(kernel, name, plan, interpret, grid, out, args, aliases=None):
    """out: (shape, type) of each result; aliases: {an argument's index: its result's}."""
    from jax.experimental import pallas as pl

    triton = norm_tiles.triton()
    kernel.__name__ = name
    return list(pl.pallas_call(
        kernel, grid=grid, out_shape=[jax.ShapeDtypeStruct(*o) for o in out], interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        input_output_aliases=aliases or {}, name=name)(*args))


def _by_image(run, images, per_channel=()):
    return norm_tiles.by_image(lambda images, _, per_channel: run(*images, *per_channel))(
        list(images), [], list(per_channel))


@functools.partial(jax.jit, static_argnums=0)  # one trace and one lowering a shape, as below
def dense(plans, x, kernel, bias):
    """x [B,N,in] @ kernel [in,out] + bias float32 [out] -> [B,N,out] in x's type, summed in
    float32. XLA adds a bias in a pass of its own where it is no parameter of the program."""
    from jax.experimental import pallas as pl

    plan, outputs = plans.dense, kernel.shape[1]

    def body(x, kernel, bias, out):
        columns = pl.ds(pl.program_id(0) * plan.width, plan.width)
        rows = pl.ds(pl.program_id(1) * plan.rows, plan.rows)

        def term(i):
            at = pl.ds(i * plan.step, plan.step)
            return [_dot(x[rows, at], kernel[at, columns], (1, 0))]

        [total] = _sum(x.shape[1] // plan.step, term, [(plan.rows, plan.width)])
        out[rows, columns] = (total + bias[columns][None, :]).astype(out.dtype)

    def run(x, kernel, bias):
        flat = x.reshape(-1, x.shape[2])
        grid = outputs // plan.width, flat.shape[0] // plan.rows
        [out] = _call(body, "attention_dense", plan, plans.interpret, grid,
                      [((flat.shape[0], outputs), x.dtype)], [flat, kernel, bias])
        return [out.reshape(*x.shape[:2], outputs)]

    return _by_image(run, [x], [kernel.astype(x.dtype), bias])[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(plans, keep, qkv):
    """qkv [B,N,3C] -> [the result [B,N,C]], and the probabilities [B,N,N] where ``keep``."""
    from jax.experimental import pallas as pl

    plan, (tokens, c) = plans.forward, (qkv.shape[1], qkv.shape[2] // 3)

    def body(qkv, out, *kept):
        image, keys = pl.program_id(1), pl.ds(0, tokens)
        rows = pl.ds(pl.program_id(0) * plan.rows, plan.rows)

        def scores(i):
            q = qkv[image, rows, pl.ds(i * plan.step, plan.step)]
            k = qkv[image, keys, pl.ds(c + i * plan.step, plan.step)]
            return [_dot(q, k, (1, 1))]

        [s] = _sum(c // plan.step, scores, [(plan.rows, tokens)])
        p = jnp.exp2((s - jnp.max(s, axis=1, keepdims=True)) * (c**-0.5 * _LOG2_E))
        p = (p * (1.0 / jnp.sum(p, axis=1, keepdims=True))).astype(out.dtype)
        for ref in kept:
            ref[image, rows, keys] = p

        def result(i):
            v = qkv[image, keys, pl.ds(2 * c + i * plan.width, plan.width)]
            out[image, rows, pl.ds(i * plan.width, plan.width)] = _dot(
                p, v, (1, 0)).astype(out.dtype)

        _each(c // plan.width, result)

    def run(qkv):
        images = qkv.shape[0]
        widths = [c, tokens] if keep else [c]
        return _call(body, "attention_forward", plan, plans.interpret,
                     (tokens // plan.rows, images),
                     [((images, tokens, w), qkv.dtype) for w in widths], [qkv])

    return _by_image(run, [qkv])


@functools.partial(jax.jit, static_argnums=0)
def backward(plans, qkv, p, g):
    """qkv [B,N,3C], the probabilities p [B,N,N], the result's gradient g [B,N,C] -> qkv's gradient
    [B,N,3C], and its sums over the tokens, float32 [B,3C]."""
    dqkv, ds, of_q = _by_image(functools.partial(_backward_scores, plans), [qkv, p, g])
    dqkv, of_kv = _by_image(functools.partial(_backward_values, plans), [qkv, p, ds, g, dqkv])
    return dqkv, jnp.concatenate([of_q.sum(axis=1), of_kv.sum(axis=1)], axis=1)


def _backward_scores(plans, qkv, p, g):
    """-> qkv's gradient with that of q alone in it, that of q k^T [B,N,N], and sums of q's over
    blocks of rows, float32 [B,blocks,C]."""
    from jax.experimental import pallas as pl

    plan, (images, tokens, c) = plans.scores, g.shape

    def body(qkv, p, g, dqkv, ds_out, sums):
        block, image, keys = pl.program_id(0), pl.program_id(1), pl.ds(0, tokens)
        rows = pl.ds(block * plan.rows, plan.rows)

        def of_weights(i):
            v = qkv[image, keys, pl.ds(2 * c + i * plan.step, plan.step)]
            return [_dot(g[image, rows, pl.ds(i * plan.step, plan.step)], v, (1, 1))]

        [dp] = _sum(c // plan.step, of_weights, [(plan.rows, tokens)])
        weights = p[image, rows, keys].astype(jnp.float32)
        mean = jnp.sum(weights * dp, axis=1, keepdims=True)
        ds = (weights * (dp - mean) * c**-0.5).astype(g.dtype)
        ds_out[image, rows, keys] = ds

        def result(i):
            at = pl.ds(i * plan.width, plan.width)
            dq = _dot(ds, qkv[image, keys, pl.ds(c + i * plan.width, plan.width)], (1, 0))
            dqkv[image, rows, at] = dq.astype(dqkv.dtype)
            sums[image, block, at] = dq.sum(axis=0)

        _each(c // plan.width, result)

    blocks = tokens // plan.rows
    return _call(body, "attention_backward_scores", plan, plans.interpret, (blocks, images),
                 [(qkv.shape, qkv.dtype), (p.shape, p.dtype), ((images, blocks, c), jnp.float32)],
                 [qkv, p, g])


def _backward_values(plans, qkv, p, ds, g, dqkv):
    """-> dqkv, with the gradients of k and v written into it, and sums of these over blocks of
    rows, float32 [B,blocks,2C]."""
    from jax.experimental import pallas as pl

    plan, (images, tokens, c) = plans.values, g.shape

    def body(qkv, p, ds, g, _, dqkv, sums):
        row, at = pl.program_id(1), pl.program_id(0) * plan.width
        image = images - 1 - pl.program_id(2)  # what _backward_scores wrote last is in the cache
        keys, columns = pl.ds(row * plan.rows, plan.rows), pl.ds(at, plan.width)

        def terms(i):
            queries = pl.ds(i * plan.step, plan.step)
            return [_dot(ds[image, queries, keys], qkv[image, queries, columns], (0, 0)),
                    _dot(p[image, queries, keys], g[image, queries, columns], (0, 0))]

        totals = _sum(tokens // plan.step, terms, [(plan.rows, plan.width)] * 2)
        for i, total in enumerate(totals):
            dqkv[image, keys, pl.ds((1 + i) * c + at, plan.width)] = total.astype(dqkv.dtype)
            sums[image, row, pl.ds(i * c + at, plan.width)] = total.sum(axis=0)

    blocks = tokens // plan.rows
    return _call(body, "attention_backward_values", plan, plans.interpret,
                 (c // plan.width, blocks, images),
                 [(qkv.shape, qkv.dtype), ((images, blocks, 2 * c), jnp.float32)],
                 [qkv, p, ds, g, dqkv], aliases={4: 0})
