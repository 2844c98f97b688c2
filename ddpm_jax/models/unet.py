"""The paper's U-Net (Ho et al. 2020, App. B; official models/unet.py)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
    AttentionBlock,
    Conv3x3,
    Dense,
    GroupNorm,
    ResBlock,
    dense,
    depth_to_space,
    space_to_depth,
    timestep_embedding,
    upsample_nearest,
)


class Stage(NamedTuple):
    """One module of the U-Net in the order of execution.

    name: its parameters' name; kind: a row of ``_RUN``; size: side of its input; features_in,
    features: channels; pop: concatenate the newest skip to the input first; push: its output
    becomes a skip."""

    name: str
    kind: str
    size: int
    features_in: int
    features: int
    pop: bool = False
    push: bool = False


def layout(*, image_size, ch, ch_mult, num_res_blocks, attn_resolutions, space_to_depth=1):
    """The stages between conv_in and norm_out, as a list of Stage.

    Attention follows each block at the resolutions named, on the way up as on the way down
    (unet.py:131). Raises ValueError where the image cannot be halved often enough.
    """
    halvings = len(ch_mult) - 1
    if image_size % (space_to_depth * 2**halvings):
        raise ValueError(
            f"image size {image_size} is not divisible by {space_to_depth * 2**halvings} "
            f"(space_to_depth {space_to_depth}, {halvings} halvings for ch_mult {tuple(ch_mult)})"
        )
    size, c = image_size // space_to_depth, ch
    skips, stages = [ch], []

    def block(name, features_in, features, attn, **flags):
        attend = size in attn_resolutions
        last = dict(push=flags.pop("push", False))
        stages.append(Stage(name, "block", size, features_in, features, **flags,
                            **({} if attend else last)))
        if attend:
            stages.append(Stage(attn, "attention", size, features, features, **last))

    for i, mult in enumerate(ch_mult):
        for j in range(num_res_blocks):
            block(f"down_{i}_block_{j}", c, ch * mult, f"down_{i}_attn_{j}", push=True)
            c = ch * mult
            skips.append(c)
        if i < halvings:
            stages.append(Stage(f"down_{i}_downsample", "down", size, c, c, push=True))
            skips.append(c)
            size //= 2
    stages += [
        Stage("mid_block_1", "block", size, c, c),
        Stage("mid_attn", "attention", size, c, c),
        Stage("mid_block_2", "block", size, c, c),
    ]
    for i in reversed(range(len(ch_mult))):
        for j in range(num_res_blocks + 1):
            block(f"up_{i}_block_{j}", c + skips.pop(), ch * ch_mult[i], f"up_{i}_attn_{j}",
                  pop=True)
            c = ch * ch_mult[i]
        if i > 0:
            stages.append(Stage(f"up_{i}_upsample", "up", size, c, c))
            size *= 2
    return stages


# Run a stage's module on h; only blocks take the timestep and dropout.
_RUN = {
    "block": lambda module, h, projection, bits: module(h, projection, bits),
    "attention": lambda module, h, projection, bits: module(h),
    "down": lambda module, h, projection, bits: module(h),
    "up": lambda module, h, projection, bits: module(upsample_nearest(h)),
}


class UNet(nn.Module):
    """eps, x_0 or x_{t-1} from x_t and t: 35,746,307 parameters at the CIFAR-10 settings (the
    defaults), 113,673,219 at image_size 256, ch_mult (1,1,2,2,4,4)."""

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_groups: int = 32
    space_to_depth: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def stages(self):
        return layout(
            image_size=self.image_size,
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            attn_resolutions=self.attn_resolutions,
            space_to_depth=self.space_to_depth,
        )

    @nn.nowrap
    def dropout_shapes(self):
        """[H,W,C] of what each block drops out, in order; empty without dropout."""
        if not self.dropout:
            return []
        return [(s.size, s.size, s.features) for s in self.stages() if s.kind in _WITH_TIME]

    def setup(self):
        stages = self.stages()
        bad = [s.features for s in stages if s.features % self.num_groups]
        bad += [s.features_in for s in stages if s.features_in % self.num_groups]
        if bad or self.ch % self.num_groups:
            raise ValueError(
                f"{(bad or [self.ch])[0]} channels cannot be cut into {self.num_groups} groups "
                f"(ch {self.ch}, ch_mult {tuple(self.ch_mult)})"
            )
        pixels = self.space_to_depth**2
        embedding = 4 * self.ch
        checkpoint = nn.remat if self.remat else lambda module: module
        dtype, groups = self.dtype, self.num_groups
        make = {
            "block": lambda s: checkpoint(ResBlock)(
                s.features_in, s.features, embedding, groups, self.dropout, dtype, name=s.name
            ),
            "attention": lambda s: checkpoint(AttentionBlock)(
                s.features, groups, dtype, name=s.name
            ),
            "down": lambda s: Conv3x3(s.features, s.features, stride=2, dtype=dtype, name=s.name),
            "up": lambda s: Conv3x3(s.features, s.features, dtype=dtype, name=s.name),
        }
        self.temb_dense_0 = Dense(self.ch, embedding, dtype=dtype)
        self.temb_dense_1 = Dense(embedding, embedding, dtype=dtype)
        self.conv_in = Conv3x3(self.in_channels * pixels, self.ch, dtype=dtype)
        self.modules = [make[s.kind](s) for s in stages]
        self.norm_out = GroupNorm(stages[-1].features, groups)
        self.conv_out = Conv3x3(
            stages[-1].features, self.out_channels * pixels, init_scale=0.0, dtype=dtype
        )

    def __call__(self, x, t, dropout_bits=()):
        """x [B,H,W,in_channels] float, t int32 [B] -> float32 [B,H,W,out_channels].

        dropout_bits: empty (no dropout), or uint16 [B,H,W,C] for each of dropout_shapes(), an
        example's own: the result does not depend on who shares its batch. Raises ValueError on
        another shape of x.
        """
        expected = (self.image_size, self.image_size, self.in_channels)
        if x.shape[1:] != expected:
            raise ValueError(f"the model takes images {expected}, not {tuple(x.shape[1:])}")
        stages, shapes = self.stages(), self.dropout_shapes()
        if dropout_bits and [b.shape[1:] for b in dropout_bits] != shapes:
            raise ValueError(f"dropout_bits must have the shapes {shapes}")
        projections = self._projections(t)
        bits = iter(dropout_bits)
        h = self.conv_in(space_to_depth(x, self.space_to_depth))
        skips = [h]
        for stage, module in zip(stages, self.modules, strict=True):
            if stage.pop:
                h = jnp.concatenate([h, skips.pop()], axis=3)
            timed = stage.kind in _WITH_TIME
            h = _RUN[stage.kind](
                module, h, next(projections) if timed else None, next(bits, None) if timed else None
            )
            if stage.push:
                skips.append(h)
        h = self.conv_out(self.norm_out(h))
        return depth_to_space(h, self.space_to_depth).astype(jnp.float32)

    def _projections(self, t):
        """The timestep as every block wants it, [B,features] each, by one matrix product."""
        temb = self.temb_dense_0(timestep_embedding(t, self.ch))
        temb = jax.nn.silu(self.temb_dense_1(jax.nn.silu(temb)))
        blocks = [m for m, s in zip(self.modules, self.stages(), strict=True)
                  if s.kind in _WITH_TIME]
        kernel = jnp.concatenate([m.temb_proj.kernel for m in blocks], axis=1)
        bias = jnp.concatenate([m.temb_proj.bias for m in blocks])
        ends = list(_running_sum(m.features for m in blocks))
        return iter(jnp.split(dense(temb, kernel, bias, self.dtype), ends[:-1], axis=1))


_WITH_TIME = {"block"}


def _running_sum(numbers):
    total = 0
    for n in numbers:
        total += n
        yield total


def count_parameters(params) -> int:
    return sum(p.size for p in jax.tree.leaves(params))
