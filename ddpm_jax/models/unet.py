"""The paper's U-Net (Ho et al. 2020, App. B; hojonathanho/diffusion, commit 1e0dceb,
models/unet.py).

``layout`` is the one description of the network's arrangement, ``UNet.layers`` of its parameters.
Parameter names of other programs, multiply-adds, dropout shapes and diffusers' block types are
derived from them. A new kind of block is a class in layers.py, a row of ``KINDS`` and a line of
``layout``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
    AttentionBlock,
    Block,
    Conv3x3,
    Dense,
    Embedding,
    GroupNorm,
    ResBlock,
    depth_to_space,
    space_to_depth,
    time_projections,
    timestep_embedding,
    upsample_nearest,
)


class Stage(NamedTuple):
    """One module of the U-Net in the order of execution.

    name: its parameters' name; kind: a row of ``KINDS``; size: side of its output in pixels;
    features_in, features: channels; pop: concatenate the newest skip to the input first; push: its
    output becomes a skip."""

    name: str
    kind: str
    size: int
    features_in: int
    features: int
    pop: bool = False
    push: bool = False


def layout(*, image_size, ch, ch_mult, num_res_blocks, attn_resolutions, space_to_depth=1):
    """The stages between conv_in and norm_out, as a list of Stage.

    Attention follows each block at ``attn_resolutions`` (sides in pixels after space-to-depth), in
    both halves of the network (unet.py:131). Raises ValueError where the image cannot be halved
    often enough.
    """
    halvings = len(ch_mult) - 1
    if image_size % (space_to_depth * 2**halvings):
        raise ValueError(
            f"image size {image_size} is not divisible by {space_to_depth * 2**halvings} "
            f"(space_to_depth {space_to_depth}, {halvings} halvings for ch_mult {tuple(ch_mult)})"
        )
    size, c = image_size // space_to_depth, ch
    skips, stages = [ch], []

    def block(half, level, index, features_in, pop=False, push=False):
        features, attend = ch * ch_mult[level], size in attn_resolutions
        stages.append(Stage(f"{half}_{level}_block_{index}", "block", size, features_in, features,
                            pop=pop, push=push and not attend))
        if attend:
            stages.append(Stage(f"{half}_{level}_attn_{index}", "attention", size, features,
                                features, push=push))
        return features

    for i in range(len(ch_mult)):
        for j in range(num_res_blocks):
            c = block("down", i, j, c, push=True)
            skips.append(c)
        if i < halvings:
            size //= 2
            stages.append(Stage(f"down_{i}_downsample", "down", size, c, c, push=True))
            skips.append(c)
    stages += [
        Stage("mid_block_1", "block", size, c, c),
        Stage("mid_attn", "attention", size, c, c),
        Stage("mid_block_2", "block", size, c, c),
    ]
    for i in reversed(range(len(ch_mult))):
        for j in range(num_res_blocks + 1):
            c = block("up", i, j, c + skips.pop(), pop=True)
        if i > 0:
            size *= 2
            stages.append(Stage(f"up_{i}_upsample", "up", size, c, c))
    return stages


class Kind(NamedTuple):
    """A kind of stage. make(stage, unet) -> its module; run(module, h, projection, bits) -> h.

    timed: the module takes the timestep and drops out, and has a ``temb_proj`` for
    ``time_projections``; for other kinds projection and bits are None. products(stage):
    multiply-adds of one image's products that involve no parameter."""

    make: Callable
    run: Callable
    timed: bool = False
    products: Callable = lambda stage: 0


KINDS = {
    "block": Kind(
        lambda s, unet: unet.checkpoint(ResBlock)(
            s.features_in, s.features, 4 * unet.ch, unet.num_groups, unet.dropout, unet.dtype,
            unet.by_shard, unet.norm_form),
        lambda module, h, projection, bits: module(h, projection, bits),
        timed=True),
    "attention": Kind(
        lambda s, unet: unet.checkpoint(AttentionBlock)(s.features, unet.num_groups, unet.dtype,
                                                        unet.norm_form, unet.attention_form),
        lambda module, h, *_: module(h),
        products=lambda s: 2 * s.size**4 * s.features),  # the scores, and the mean of the values
    "down": Kind(
        lambda s, unet: Conv3x3(s.features_in, s.features, stride=2, dtype=unet.dtype,
                                by_shard=unet.by_shard),
        lambda module, h, *_: module(h)),
    "up": Kind(
        lambda s, unet: Conv3x3(s.features_in, s.features, dtype=unet.dtype,
                                by_shard=unet.by_shard),
        lambda module, h, *_: module(upsample_nearest(h))),
}


# The least value of each whole-numbered field; the timestep's embedding needs two frequencies.
_LEAST = {"image_size": 1, "in_channels": 1, "out_channels": 1, "ch": 4, "ch_mult": 1,
          "num_res_blocks": 1, "attn_resolutions": 1, "num_groups": 1, "space_to_depth": 1,
          "num_classes": 0}


class UNet(Block):
    """eps, x_0 or x_{t-1} from x_t and t: 35,746,307 parameters at the CIFAR-10 settings (the
    defaults), 113,673,219 at image_size 256, ch_mult (1,1,2,2,4,4).

    With num_classes a label's vector is added to the timestep's (Nichol & Dhariwal 2021). Where
    label_dropout, the probability of training without the label, is above 0 one more vector stands
    for no label (Ho & Salimans 2021).

    by_shard: a row of shard_gradients.FORMS where its gradients are taken under ``vmap`` over
    shards of a batch; norm_form: a row of fused_norm.FORMS, attention_form: of attention.FORMS."""

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
    num_classes: int = 0
    label_dropout: float = 0.1
    dtype: Any = jnp.float32
    by_shard: str = ""
    norm_form: str = "xla"
    attention_form: str = "xla"

    @property
    def no_label(self):
        """The label that stands for none, num_classes; or None where the network has no such one.
        """
        return self.num_classes if self.num_classes and self.label_dropout else None

    @property
    def num_labels(self):
        """The number of labels that the network takes, the one for none included."""
        return self.num_classes + (self.no_label is not None)

    @nn.nowrap
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
    def checkpoint(self, module):
        """The class ``module``, with its activations computed again in the backward pass if remat.
        """
        return nn.remat(module) if self.remat else module

    @nn.nowrap
    def layers(self):
        embedding, pixels, stages = 4 * self.ch, self.space_to_depth**2, self.stages()
        dtype, last = self.dtype, stages[-1].features
        conv = functools.partial(Conv3x3, dtype=dtype, by_shard=self.by_shard)
        return {
            "temb_dense_0": Dense(self.ch, embedding, dtype=dtype),
            "temb_dense_1": Dense(embedding, embedding, dtype=dtype),
            **({"class_embedding": Embedding(self.num_labels, embedding, dtype=dtype)}
               if self.num_classes else {}),
            "conv_in": conv(self.in_channels * pixels, self.ch),
            **{s.name: KINDS[s.kind].make(s, self) for s in stages},
            "norm_out": GroupNorm(last, self.num_groups, form=self.norm_form),
            "conv_out": conv(last, self.out_channels * pixels, init_scale=0.0),
        }

    @nn.nowrap
    def dropout_shapes(self):
        """[H,W,C] of the activations that each block drops out, in order; empty without dropout."""
        if not self.dropout:
            return []
        return [(s.size, s.size, s.features) for s in self.stages() if KINDS[s.kind].timed]

    @nn.nowrap
    def check(self):
        """Raise ValueError where the fields describe no network (see also ``layout``)."""
        for field, least in _LEAST.items():
            values = getattr(self, field)
            for value in values if isinstance(values, tuple) else (values,):
                if type(value) is not int or value < least:
                    raise ValueError(f"{field}={values} must be whole, and at least {least}")
        if not self.ch_mult:
            raise ValueError("ch_mult is empty; it has a number for each level")
        for channels in (self.ch, *(c for s in self.stages() for c in (s.features_in, s.features))):
            if channels % self.num_groups:
                raise ValueError(
                    f"{channels} channels cannot be cut into {self.num_groups} groups "
                    f"(ch {self.ch}, ch_mult {tuple(self.ch_mult)})")

    @nn.nowrap
    def check_attention(self):
        """Raise ValueError for attention at a resolution that no level has, where ``layout`` leaves
        it out. For new runs: those of older versions may have such a field."""
        sizes = [self.image_size // self.space_to_depth // 2**i for i in range(len(self.ch_mult))]
        if set(self.attn_resolutions) - set(sizes):
            raise ValueError(f"attn_resolutions={tuple(self.attn_resolutions)}: the levels have "
                             f"sides of {', '.join(map(str, sizes))} pixels")

    def setup(self):
        self.check()
        super().setup()

    def __call__(self, x, t, dropout_bits=(), labels=None):
        """x [B,H,W,in_channels] float, t int32 [B] -> float32 [B,H,W,out_channels].

        labels: int32 [B] below ``num_labels``, None without classes.

        dropout_bits: empty (no dropout), or uint16 [B,H,W,C] for each of dropout_shapes(), an
        example's own: its result does not depend on the rest of the batch. Raises ValueError on
        another shape of x, and where labels and classes do not go together.
        """
        expected = (self.image_size, self.image_size, self.in_channels)
        if x.shape[1:] != expected:
            raise ValueError(f"the model takes images {expected}, not {tuple(x.shape[1:])}")
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(f"a model of {self.num_classes} classes takes "
                             f"{'labels' if labels is None else 'no labels'}")
        shapes = self.dropout_shapes()
        if dropout_bits and [b.shape[1:] for b in dropout_bits] != shapes:
            raise ValueError(f"dropout_bits must have the shapes {shapes}")
        steps = [(s, KINDS[s.kind], getattr(self, s.name)) for s in self.stages()]
        temb = self.temb_dense_0(timestep_embedding(t, self.ch))
        temb = self.temb_dense_1(jax.nn.silu(temb))
        if labels is not None:
            temb = temb + self.class_embedding(labels)
        temb = jax.nn.silu(temb)
        projections = iter(time_projections([m for _, kind, m in steps if kind.timed], temb))
        bits = iter(dropout_bits)
        h = self.conv_in(space_to_depth(x, self.space_to_depth))
        skips = [h]
        for stage, kind, module in steps:
            if stage.pop:
                h = jnp.concatenate([h, skips.pop()], axis=3)
            timed = (next(projections), next(bits, None)) if kind.timed else (None, None)
            h = kind.run(module, h, *timed)
            if stage.push:
                skips.append(h)
        h = self.conv_out(self.norm_out(h))
        return depth_to_space(h, self.space_to_depth).astype(jnp.float32)
