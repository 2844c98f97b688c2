"""The one table of names: our parameter <-> the official TF1 variable <-> diffusers' key.

No other file knows the names or axis orders of other programs. Ours: 3x3 convolutions OHWI
[out,3,3,in], dense and 1x1 layers [in,out]. Official (hojonathanho/diffusion, commit 1e0dceb): HWIO
and [in,out] (nn.py:56,70,83; models/unet.py for the scopes). diffusers (UNet2DModel): OIHW,
[out,in], and [out,in,1,1] for the residual shortcut alone (resnet.py's conv_shortcut).

``model`` is a ``UNet``: its description gives the parameters and their shapes. Nothing here touches
a file. Inputs may be numpy arrays or ``Lazy``; outputs in another program's order are views with
permuted axes, not copies.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy, load
from ddpm_jax.models.layers import parameter_layers
from ddpm_jax.models.unet import UNet

SCOPE = "model"  # run_cifar.py:39
EMA_SUFFIX = "/ExponentialMovingAverage"  # tf.train.ExponentialMovingAverage's default name
ADAM_SUFFIXES = {"mu": "/Adam", "nu": "/Adam_1"}  # tf.train.AdamOptimizer's slots m and v
_RMSPROP_SUFFIXES = ("/RMSProp", "/RMSProp_1")  # the official code's other optimizer; not read
GLOBAL_STEP = "global_step"

# Modules of the U-Net: ours, official (None: absent there), diffusers. i: level from the finest; k:
# from the coarsest, as diffusers counts on the way up; j: place in the level.
_MODULES = {
    "temb_dense_0": ("temb/dense0", "time_embedding.linear_1"),
    "temb_dense_1": ("temb/dense1", "time_embedding.linear_2"),
    "class_embedding": (None, "class_embedding"),
    "conv_in": ("conv_in", "conv_in"),
    "down_{i}_block_{j}": ("down_{i}/block_{j}", "down_blocks.{i}.resnets.{j}"),
    "down_{i}_attn_{j}": ("down_{i}/attn_{j}", "down_blocks.{i}.attentions.{j}"),
    "down_{i}_downsample": ("down_{i}/downsample/conv", "down_blocks.{i}.downsamplers.0.conv"),
    "mid_block_1": ("mid/block_1", "mid_block.resnets.0"),
    "mid_attn": ("mid/attn_1", "mid_block.attentions.0"),
    "mid_block_2": ("mid/block_2", "mid_block.resnets.1"),
    "up_{i}_block_{j}": ("up_{i}/block_{j}", "up_blocks.{k}.resnets.{j}"),
    "up_{i}_attn_{j}": ("up_{i}/attn_{j}", "up_blocks.{k}.attentions.{j}"),
    "up_{i}_upsample": ("up_{i}/upsample/conv", "up_blocks.{k}.upsamplers.0.conv"),
    "norm_out": ("norm_out", "conv_norm_out"),
    "conv_out": ("conv_out", "conv_out"),
}
# Layers inside a block: ours, official, diffusers.
_LAYERS = {
    "norm1": ("norm1", "norm1"),
    "conv1": ("conv1", "conv1"),
    "temb_proj": ("temb_proj", "time_emb_proj"),
    "norm2": ("norm2", "norm2"),
    "conv2": ("conv2", "conv2"),
    "shortcut": ("nin_shortcut", "conv_shortcut"),
    "norm": ("norm", "group_norm"),
    "q": ("q", "to_q"),
    "k": ("k", "to_k"),
    "v": ("v", "to_v"),
    "proj_out": ("proj_out", "to_out.0"),
}
# Parameters of a norm, of any other layer: ours, official, diffusers.
_NORM_LEAVES = {"scale": ("gamma", "weight"), "bias": ("beta", "bias")}
_LEAVES = {"kernel": ("W", "weight"), "bias": ("b", "bias"), "table": (None, "weight")}
# Axes by rank: official, diffusers.
_AXES = {
    4: ((1, 2, 3, 0), (0, 3, 1, 2)),  # OHWI -> HWIO, OIHW
    2: ((0, 1), (1, 0)),  # [in,out] -> [in,out], [out,in]
    1: ((0,), (0,)),
}
_AS_CONVOLUTION = {"conv_shortcut"}  # diffusers stores this 1x1 layer as [out,in,1,1]
_AS_OURS = {"class_embedding"}  # [labels, features] everywhere

# Attention layers as diffusers named them before 0.12 (the released google/ddpm-* files) and as it
# fuses them (rows stacked, [3C, C]), each with the layers that it holds under their current names.
OLDER_ATTENTION = {"query": ("to_q",), "key": ("to_k",), "value": ("to_v",),
                   "proj_attn": ("to_out.0",), "to_qkv": ("to_q", "to_k", "to_v")}


class Foreign(NamedTuple):
    """Another program's name, axes and shape of one of our parameters: theirs is
    ``ours.transpose(axes).reshape(shape)``, where the reshape only appends axes of size 1."""

    name: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One parameter: our path and shape, and what it is called elsewhere (official None: the
    official code has none such)."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    official: Foreign | None
    diffusers: Foreign


def _module_names(name, levels):
    """The official and diffusers' name of the U-Net's module ``name``."""
    place = re.fullmatch(r"(down|up)_(\d+)_([a-z]+)(?:_(\d+))?", name)
    if place is None:
        return _MODULES[name]
    half, i, what, j = place.groups()
    row = _MODULES[f"{half}_{{i}}_{what}" + ("_{j}" if j else "")]
    return [text.format(i=i, j=j, k=levels - 1 - int(i)) for text in row]


def _entry(path, shape, leaf_names, levels):
    try:
        rows = [_module_names(path[0], levels), *(_LAYERS[p] for p in path[1:-1]),
                leaf_names[path[-1]]]
    except KeyError:
        raise UserError(f"{'.'.join(path)}: neither the official code nor diffusers has such a "
                        "layer; this model cannot be imported or exported") from None
    official, diffusers = zip(*rows, strict=True)
    axes = _AXES[len(shape)]
    if _AS_OURS & set(diffusers):
        axes = (tuple(range(len(shape))),) * 2
    shapes = [tuple(shape[a] for a in order) for order in axes]
    if len(shape) > 1 and _AS_CONVOLUTION & set(diffusers):
        shapes[1] += (1, 1)
    known = None not in official
    return Entry(path, shape,
                 Foreign("/".join((SCOPE, *official)), axes[0], shapes[0]) if known else None,
                 Foreign(".".join(diffusers), axes[1], shapes[1]))


def entries(model: UNet) -> list[Entry]:
    """Every parameter of ``model``, in the order in which the official code creates them.

    Raises UserError for a layer that has no name in the tables above.
    """
    table = []
    for path, layer in parameter_layers(model):
        shapes = layer.shapes()
        leaf_names = _NORM_LEAVES if "scale" in shapes else _LEAVES
        table += [_entry((*path, leaf), shape, leaf_names, len(model.ch_mult))
                  for leaf, shape in shapes.items()]
    return table


# ---- into our parameters ----


_FLOATS = ("float32", "float16", "bfloat16")


def _problems(found: Mapping, expected: Mapping) -> dict[str, list[str]]:
    """What is wrong with ``found`` {name: array}; expected: {name: shape}."""
    both = [n for n in expected if n in found]
    return {
        "missing": [n for n in expected if n not in found],
        "extra": sorted(n for n in found if n not in expected),
        "misshapen": [f"{n} is {tuple(found[n].shape)}, not {expected[n]}" for n in both
                      if tuple(found[n].shape) != expected[n]],
        "of another type": [f"{n} is {found[n].dtype}, not a float of at most 32 bits"
                            for n in both if str(found[n].dtype) not in _FLOATS],
    }


def _refuse(problems, what):
    counts = {kind: len(found) for kind, found in problems.items() if found}
    if counts:
        summary = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        details = "; ".join(f"{kind}: {', '.join(problems[kind])}" for kind in counts)
        raise UserError(f"{what} do not fit the model of this config ({summary}): {details}")


def _collect(source: Mapping, table: list[tuple[Entry, Foreign]], what: str) -> dict:
    """Nested params (float32, contiguous) from ``source`` {foreign name: array}.

    Checks names, shapes and types first and reads values only if all fit.
    """
    _refuse(_problems(source, {theirs.name: theirs.shape for _, theirs in table}), what)
    params, broken = {}, []
    for entry, theirs in table:
        array = np.asarray(load(source[theirs.name]), np.float32)
        array = array.reshape(array.shape[: len(theirs.axes)]).transpose(np.argsort(theirs.axes))
        if not np.isfinite(array).all():
            broken.append(theirs.name)
        params[entry.path] = np.ascontiguousarray(array)
    _refuse({"not finite": broken}, what)
    return unflatten_dict(params)


def params_from_variables(variables: Mapping, model: UNet) -> dict:
    """Our nested params (float32, contiguous) from {official variable name: array}.

    Raises UserError that lists every missing, extra and misshapen variable.
    """
    return _collect(variables, [(e, _official(e)) for e in entries(model)], "variables")


def params_from_state_dict(state_dict: Mapping, model: UNet) -> dict:
    """Our nested params (float32, contiguous) from a state dict of diffusers' UNet2DModel.

    Reads current, older and fused attention names. Raises UserError that lists every missing,
    extra and misshapen entry.
    """
    return _collect(current_names(state_dict), [(e, e.diffusers) for e in entries(model)],
                    "entries of the state dict")


# ---- out of our parameters ----


def plain_names(params: Mapping, model: UNet) -> dict:
    """{our path with dots: array}, as `ddpm export safetensors` writes them.

    Raises UserError where ``params`` are not the model's: missing, extra or misshapen.
    """
    found = flatten_dict(params, sep=".")
    expected = {".".join(e.path): e.shape for e in entries(model)}
    _refuse(_problems(found, expected), "parameters")
    return {name: np.asarray(found[name]) for name in expected}


def _official(entry) -> Foreign:
    if entry.official is None:
        raise UserError(f"{'.'.join(entry.path)}: the official code has no such layer; take a "
                        "config with model.num_classes=0")
    return entry.official


def _foreign(params, model, pick):
    ours, state = plain_names(params, model), {}
    for entry in entries(model):
        theirs = pick(entry)
        array = ours[".".join(entry.path)]
        state[theirs.name] = array.transpose(theirs.axes).reshape(theirs.shape)
    return state


def variables_from_params(params: Mapping, model: UNet) -> dict:
    """{official variable name: array} of our params; the inverse of ``params_from_variables``."""
    return _foreign(params, model, _official)


def state_dict_from_params(params: Mapping, model: UNet) -> dict:
    """{diffusers key: array} of our params, with current attention names; the inverse of
    ``params_from_state_dict``."""
    return _foreign(params, model, lambda entry: entry.diffusers)


# ---- other namings of the same ----


def _rows(value, part, parts):
    """Rows ``part``/``parts`` of an array, read when they are needed."""
    rows = value.shape[0] // parts
    return Lazy((rows, *value.shape[1:]), value.dtype,
                lambda: load(value)[part * rows : (part + 1) * rows])


_FIRST = "conv_in.weight"


def current_names(state_dict: Mapping) -> dict:
    """A state dict in any of diffusers' namings, under its current attention names and without a
    wrapper's prefix (``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile)."""
    first = next((k for k in state_dict if k.endswith(_FIRST)), _FIRST)
    renamed = {}
    for key, value in state_dict.items():
        key = key.removeprefix(first.removesuffix(_FIRST))
        layer, _, leaf = key.rpartition(".")
        block, _, name = layer.rpartition(".")
        layers = OLDER_ATTENTION.get(name) if ".attentions." in block else None
        if layers is None:
            renamed[key] = value
        for i, layer in enumerate(layers or ()):
            renamed[f"{block}.{layer}.{leaf}"] = _rows(value, i, len(layers))
    return renamed


def split_checkpoint(variables: Mapping) -> dict[str, dict]:
    """Official variables sorted by their role, each under the plain variable's name.

    -> {"params", "ema_params", "mu", "nu": {name: array}, "other": {name as stored: array}}; a part
    that the checkpoint lacks is empty. Everything of the model's scope that is none of the four
    stays in "params", where ``params_from_variables`` refuses it by name.
    """
    parts: dict[str, dict] = {"params": {}, "ema_params": {}, "mu": {}, "nu": {}, "other": {}}
    suffixes = {"ema_params": EMA_SUFFIX, **ADAM_SUFFIXES}
    for name, value in variables.items():
        part = next((p for p, s in suffixes.items() if name.endswith(s)), "params")
        if not name.startswith(f"{SCOPE}/") or name.endswith(_RMSPROP_SUFFIXES):
            parts["other"][name] = value
        else:
            parts[part][name.removesuffix(suffixes.get(part, ""))] = value
    return parts
