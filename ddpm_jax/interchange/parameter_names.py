"""The one table of names: our parameter <-> the official TF1 variable <-> diffusers' key.

Nothing else in the project knows the names or the axis orders of others. Ours: 3x3 convolutions
OHWI [out,3,3,in], dense and 1x1 layers [in,out]. Official (hojonathanho/diffusion): HWIO and
[in,out] (nn.py:56,70,83; unet.py for the scopes). diffusers (UNet2DModel): OIHW, [out,in], and
[out,in,1,1] for the residual shortcut alone (resnet.py's conv_shortcut).

Functions here touch no file. Inputs may be numpy arrays or ``Lazy``; outputs toward others are
views with permuted axes, not copies.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy, load

SCOPE = "model"  # run_cifar.py:39
EMA_SUFFIX = "/ExponentialMovingAverage"  # tf.train.ExponentialMovingAverage's default name
ADAM_SUFFIXES = {"mu": "/Adam", "nu": "/Adam_1"}  # tf.train.AdamOptimizer's slots m and v
_RMSPROP_SUFFIXES = ("/RMSProp", "/RMSProp_1")  # the official other optimizer; nothing here
GLOBAL_STEP = "global_step"


class Architecture(NamedTuple):
    """What decides which parameters exist and their shapes.

    ``image_size`` and the channels are those that the U-Net's first convolution sees: after
    space-to-depth where that is used.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    image_size: int
    in_channels: int
    out_channels: int


_OUTPUTS = {"learned": 2}  # variance: output channels / input channels, where not 1


def architecture(config) -> Architecture:
    """The Architecture of a config (``model``, ``data`` and ``diffusion.variance`` are read);
    an Architecture as it is."""
    if isinstance(config, Architecture):
        return config
    model, block = config["model"], config["model"]["space_to_depth"]
    channels = config["data"]["channels"] * block**2
    return Architecture(
        ch=model["ch"],
        ch_mult=tuple(model["ch_mult"]),
        num_res_blocks=model["num_res_blocks"],
        attn_resolutions=tuple(model["attn_resolutions"]),
        image_size=config["data"]["image_size"] // block,
        in_channels=channels,
        out_channels=channels * _OUTPUTS.get(config["diffusion"]["variance"], 1),
    )


class Layout(NamedTuple):
    """Axes that turn ours into theirs (``theirs = ours.transpose(axes)``); diffusers also appends
    ``ones`` axes of size 1."""

    official: tuple[int, ...]
    diffusers: tuple[int, ...]
    ones: int = 0


LAYOUTS = {
    "conv": Layout((1, 2, 3, 0), (0, 3, 1, 2)),  # OHWI -> HWIO, OIHW
    "dense": Layout((0, 1), (1, 0)),  # [in,out] -> [in,out], [out,in]
    "shortcut": Layout((0, 1), (1, 0), ones=2),  # [in,out] -> [in,out], [out,in,1,1]
    "vector": Layout((0,), (0,)),
}

# Leaves of each kind of module: ours, official, diffusers, layout.
_LEAVES = {
    "conv": (("kernel", "W", "weight", "conv"), ("bias", "b", "bias", "vector")),
    "dense": (("kernel", "W", "weight", "dense"), ("bias", "b", "bias", "vector")),
    "shortcut": (("kernel", "W", "weight", "shortcut"), ("bias", "b", "bias", "vector")),
    "norm": (("scale", "gamma", "weight", "vector"), ("bias", "beta", "bias", "vector")),
}

# Modules inside a residual and an attention block: ours, official, diffusers, kind.
_RESIDUAL = (
    ("norm1", "norm1", "norm1", "norm"),
    ("conv1", "conv1", "conv1", "conv"),
    ("temb_proj", "temb_proj", "time_emb_proj", "dense"),
    ("norm2", "norm2", "norm2", "norm"),
    ("conv2", "conv2", "conv2", "conv"),
)
_SHORTCUT = ("shortcut", "nin_shortcut", "conv_shortcut", "shortcut")
_ATTENTION = (
    ("norm", "norm", "group_norm", "norm"),
    ("q", "q", "to_q", "dense"),
    ("k", "k", "to_k", "dense"),
    ("v", "v", "to_v", "dense"),
    ("proj_out", "proj_out", "to_out.0", "dense"),
)
# diffusers before 0.12 (released google/ddpm-* files): older name -> current name.
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FUSED_ATTENTION = ("to_qkv", ("to_q", "to_k", "to_v"))  # rows stacked: [3C, C]


class Entry(NamedTuple):
    """One parameter: our path, the two foreign names, layout and our shape."""

    path: tuple[str, ...]
    official: str
    diffusers: str
    layout: Layout
    shape: tuple[int, ...]


def _module(kind, ours, official, diffusers, n_in, n_out):
    """Entries of one module; ours is a path, n_in is unused for norms."""
    shapes = {
        "conv": (n_out, 3, 3, n_in),
        "dense": (n_in, n_out),
        "shortcut": (n_in, n_out),
        "vector": (n_out,),
    }
    return [
        Entry((*ours, leaf), f"{SCOPE}/{official}/{theirs}", f"{diffusers}.{key}",
              LAYOUTS[layout], shapes[layout])
        for leaf, theirs, key, layout in _LEAVES[kind]
    ]


def _residual(ours, official, diffusers, n_in, n_out, temb):
    sizes = {"norm1": (n_in, n_in), "conv1": (n_in, n_out), "temb_proj": (temb, n_out),
             "norm2": (n_out, n_out), "conv2": (n_out, n_out), "shortcut": (n_in, n_out)}
    modules = _RESIDUAL if n_in == n_out else (*_RESIDUAL, _SHORTCUT)
    return [
        entry
        for name, theirs, key, kind in modules
        for entry in _module(kind, (ours, name), f"{official}/{theirs}", f"{diffusers}.{key}",
                             *sizes[name])
    ]


def _attention(ours, official, diffusers, channels):
    return [
        entry
        for name, theirs, key, kind in _ATTENTION
        for entry in _module(kind, (ours, name), f"{official}/{theirs}", f"{diffusers}.{key}",
                             channels, channels)
    ]


def entries(config) -> list[Entry]:
    """Every parameter of a config's U-Net, in the order in which the official code creates them.

    ``config`` here and below: a config, or an Architecture.
    """
    arch = architecture(config)
    temb = 4 * arch.ch
    levels = len(arch.ch_mult)
    table = _module("dense", ("temb_dense_0",), "temb/dense0", "time_embedding.linear_1",
                    arch.ch, temb)
    table += _module("dense", ("temb_dense_1",), "temb/dense1", "time_embedding.linear_2",
                     temb, temb)
    table += _module("conv", ("conv_in",), "conv_in", "conv_in", arch.in_channels, arch.ch)
    skips, now, size = [arch.ch], arch.ch, arch.image_size
    for i, mult in enumerate(arch.ch_mult):
        block = f"down_blocks.{i}"
        for j in range(arch.num_res_blocks):
            table += _residual(f"down_{i}_block_{j}", f"down_{i}/block_{j}",
                               f"{block}.resnets.{j}", now, arch.ch * mult, temb)
            now = arch.ch * mult
            skips.append(now)
            if size in arch.attn_resolutions:
                table += _attention(f"down_{i}_attn_{j}", f"down_{i}/attn_{j}",
                                    f"{block}.attentions.{j}", now)
        if i < levels - 1:
            table += _module("conv", (f"down_{i}_downsample",), f"down_{i}/downsample/conv",
                             f"{block}.downsamplers.0.conv", now, now)
            skips.append(now)
            size //= 2
    table += _residual("mid_block_1", "mid/block_1", "mid_block.resnets.0", now, now, temb)
    table += _attention("mid_attn", "mid/attn_1", "mid_block.attentions.0", now)
    table += _residual("mid_block_2", "mid/block_2", "mid_block.resnets.1", now, now, temb)
    for i in reversed(range(levels)):
        block = f"up_blocks.{levels - 1 - i}"  # theirs count from the coarsest
        out = arch.ch * arch.ch_mult[i]
        for j in range(arch.num_res_blocks + 1):
            table += _residual(f"up_{i}_block_{j}", f"up_{i}/block_{j}", f"{block}.resnets.{j}",
                               now + skips.pop(), out, temb)
            now = out
            if size in arch.attn_resolutions:
                table += _attention(f"up_{i}_attn_{j}", f"up_{i}/attn_{j}",
                                    f"{block}.attentions.{j}", now)
        if i > 0:
            table += _module("conv", (f"up_{i}_upsample",), f"up_{i}/upsample/conv",
                             f"{block}.upsamplers.0.conv", now, now)
            size *= 2
    table += _module("norm", ("norm_out",), "norm_out", "conv_norm_out", now, now)
    table += _module("conv", ("conv_out",), "conv_out", "conv_out", now, arch.out_channels)
    return table


def _permute(shape, axes, ones=0):
    return tuple(shape[a] for a in axes) + (1,) * ones


def _float32(value) -> np.ndarray:
    array = load(value)
    if array.dtype == np.float32:
        return array
    return array.astype(np.float32)


_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


def _is_float(dtype) -> bool:
    return np.dtype(dtype) in _FLOATS or str(dtype) == "bfloat16"


def _collect(source: Mapping, expected: list[tuple], what: str) -> dict:
    """Nested params from ``source``; expected rows: (path, name, axes back, their shape, ours).

    Looks at names, shapes and types first and reads values only if all fit.
    """
    names = {name for _, name, *_ in expected}
    problems = {
        "missing": [n for _, n, *_ in expected if n not in source],
        "extra": sorted(n for n in source if n not in names),
        "misshapen": [
            f"{n} is {tuple(source[n].shape)}, not {theirs}"
            for _, n, _, theirs, _ in expected
            if n in source and tuple(source[n].shape) != theirs
        ],
        "of another type": [
            f"{n} is {source[n].dtype}, not a float of at most 32 bits"
            for _, n, *_ in expected
            if n in source and not _is_float(source[n].dtype)
        ],
    }
    _refuse(problems, what)
    params: dict = {}
    broken = []
    for path, name, axes, _, ours in expected:
        array = _float32(source[name])
        array = np.ascontiguousarray(array.reshape(array.shape[: len(axes)]).transpose(axes))
        assert array.shape == ours
        if not np.isfinite(array).all():
            broken.append(name)
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = array
    _refuse({"not finite": broken}, what)
    return params


def _refuse(problems, what):
    counts = {kind: len(found) for kind, found in problems.items() if found}
    if counts:
        summary = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        details = "; ".join(f"{kind}: {', '.join(problems[kind])}" for kind in counts)
        raise UserError(f"{what} do not fit the model of this config ({summary}): {details}")


def _leaf(params, path):
    for part in path:
        params = params[part]
    return params


def _check_params(params, table):
    """Refuses a tree that is not the model's: a leaf missing, extra or misshapen."""
    def walk(node, path=()):
        if isinstance(node, Mapping):
            for key, child in node.items():
                yield from walk(child, (*path, key))
        else:
            yield path, node

    found = dict(walk(params))
    expected = {entry.path: entry.shape for entry in table}
    def dotted(paths):
        return [".".join(p) for p in paths]

    _refuse({
        "missing": dotted(p for p in expected if p not in found),
        "extra": dotted(p for p in found if p not in expected),
        "misshapen": [f"{'.'.join(p)} is {tuple(found[p].shape)}, not {expected[p]}"
                      for p in expected if p in found and tuple(found[p].shape) != expected[p]],
    }, "parameters")


def params_from_variables(variables: Mapping, config) -> dict:
    """Our nested params (float32, contiguous) from {official variable name: array}.

    Raises UserError that lists every missing, extra and misshapen variable.
    """
    return _collect(
        variables,
        [(e.path, e.official, np.argsort(e.layout.official),
          _permute(e.shape, e.layout.official), e.shape) for e in entries(config)],
        "variables",
    )


def variables_from_params(params: Mapping, config) -> dict:
    """{official variable name: array} of our params; the inverse of ``params_from_variables``."""
    table = entries(config)
    _check_params(params, table)
    return {e.official: np.asarray(_leaf(params, e.path)).transpose(e.layout.official)
            for e in table}


def params_from_state_dict(state_dict: Mapping, config) -> dict:
    """Our nested params (float32, contiguous) from a state dict of diffusers' UNet2DModel.

    Reads current, older and fused attention names. Raises UserError that lists every missing,
    extra and misshapen entry.
    """
    return _collect(
        current_names(state_dict),
        [(e.path, e.diffusers, np.argsort(e.layout.diffusers),
          _permute(e.shape, e.layout.diffusers, e.layout.ones), e.shape) for e in entries(config)],
        "entries of the state dict",
    )


def state_dict_from_params(params: Mapping, config) -> dict:
    """{diffusers key: array} of our params, with current attention names.

    The inverse of ``params_from_state_dict``.
    """
    table = entries(config)
    _check_params(params, table)
    state = {}
    for e in table:
        array = np.asarray(_leaf(params, e.path)).transpose(e.layout.diffusers)
        state[e.diffusers] = array.reshape(array.shape + (1,) * e.layout.ones)
    return state


def plain_names(params: Mapping, config) -> dict:
    """{our path with dots: array}, as `ddpm export safetensors` writes them."""
    table = entries(config)
    _check_params(params, table)
    return {".".join(e.path): np.asarray(_leaf(params, e.path)) for e in table}


def older_names(state_dict: Mapping) -> dict:
    """The same state dict under the attention names that diffusers used before 0.12."""
    older = {new: old for old, new in OLDER_ATTENTION.items()}
    return {_rename(key, older): value for key, value in state_dict.items()}


def _rename(key, names):
    head, dot, leaf = key.rpartition(".")
    for old, new in names.items():
        if ".attentions." in head and head.endswith(f".{old}"):
            return f"{head.removesuffix(old)}{new}{dot}{leaf}"
    return key


def _third(value, part):
    """Rows ``part``/3 of a fused array, still unread where it was."""
    rows = value.shape[0] // 3
    shape = (rows, *value.shape[1:])
    return Lazy(shape, value.dtype, lambda: load(value)[part * rows : (part + 1) * rows])


def current_names(state_dict: Mapping) -> dict:
    """The state dict under current attention names, whatever naming it came with."""
    fused, parts = FUSED_ATTENTION
    renamed = {}
    for key, value in state_dict.items():
        head, _, leaf = key.rpartition(".")
        if ".attentions." in head and head.endswith(f".{fused}"):
            for i, part in enumerate(parts):
                renamed[f"{head.removesuffix(fused)}{part}.{leaf}"] = _third(value, i)
        else:
            renamed[_rename(key, OLDER_ATTENTION)] = value
    return renamed


def split_checkpoint(variables: Mapping) -> dict[str, dict]:
    """Official variables sorted by what they are, each under the plain variable's name.

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
