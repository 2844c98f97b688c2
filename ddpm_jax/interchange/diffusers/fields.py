"""The JSON fields of diffusers' UNet2DModel and DDPMScheduler, to and from those of our config.

A field that the paper's U-Net or chain does not have is refused by name; a field that is absent has
diffusers' default, which often differs from the paper's.
"""

from collections.abc import Mapping

import numpy as np

from ddpm_jax.diffusion.schedule import BETAS, zero_terminal_snr
from ddpm_jax.errors import UserError
from ddpm_jax.models.unet import UNet

FORMAT_VERSION = "0.30.0"  # diffusers whose field names the exported JSON files use

# Fields with (diffusers' default where absent, the values that mean the paper's model).
_UNET_FIXED = {  # models/unets/unet_2d.py, UNet2DModel.__init__
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-6,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
}
_DOWN_TYPES = ("DownBlock2D", "AttnDownBlock2D")  # without and with attention
_UP_TYPES = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
_UNET_READ = ("_class_name", "sample_size", "in_channels", "out_channels", "down_block_types",
              "up_block_types", "block_out_channels", "layers_per_block", "dropout",
              "attention_head_dim", "norm_num_groups", "attn_norm_num_groups",
              "time_embedding_dim", "num_train_timesteps", "num_class_embeds",
              # Bookkeeping of diffusers' EMAModel, whose folders are unet_ema/.
              "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
              "inv_gamma", "power", "collected_params")

# Ours, which diffusers ignores: the probability of training with the last label, which stands for
# none (without it every label of num_class_embeds is a class); and the law of trained_betas
# (without it they are listed).
_LABEL_DROPOUT = "_label_dropout"
_LAW = "_betas"

_SCHEDULER_FIXED = {  # schedulers/scheduling_ddpm.py, DDPMScheduler.__init__
    "thresholding": (False, (False,)),
    "clip_sample_range": (1.0, (1.0,)),
    "steps_offset": (0, (0,)),
    "rescale_betas_zero_snr": (False, (False, True)),
}
# Spacing matters to shortened chains only, the next two to thresholding; the last three are read by
# no DDPMScheduler: of versions before 0.8, and of other schedulers that a file was converted from.
_SCHEDULER_READ = ("_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
                   "trained_betas",
                   "variance_type", "clip_sample", "prediction_type", "predict_epsilon",
                   "timestep_spacing", "dynamic_thresholding_ratio", "sample_max_value",
                   "tensor_format", "set_alpha_to_one", "skip_prk_steps")
# Fields that every scheduler of diffusers trained in this way shares, whatever chain it samples by.
_TRAINING_FIXED = {f: _SCHEDULER_FIXED[f] for f in ("rescale_betas_zero_snr",)}

# Their beta law -> ours and which of their numbers it takes.
_LAWS = {
    "linear": ("linear", ("beta_start", "beta_end")),
    "scaled_linear": ("quad", ("beta_start", "beta_end")),
    "squaredcos_cap_v2": ("cosine", ()),
}
# fixed_small_log is the same deviation, computed through a logarithm (_get_variance there).
_VARIANCES = {
    "fixed_small": {"variance": "fixed_small", "first_log_variance": "floor"},
    "fixed_small_log": {"variance": "fixed_small", "first_log_variance": "floor"},
    "fixed_large": {"variance": "fixed_large", "first_log_variance": "next"},
    "learned_range": {"variance": "learned_range", "loss": "hybrid"},
}
_LEARNED = ("is a variance in diffusers' scheduler and a log-variance in the paper's code: such a "
            "model computes something else there")
_PREDICTIONS = {"epsilon": "eps", "sample": "x_start", "v_prediction": "v"}
_PREDICT_EPSILON = {True: "eps", False: "x_start"}


def _refuse_unknown(config, known, where):
    for field, value in config.items():
        if field not in known and not field.startswith("_") and value is not None:
            raise UserError(f"{where}: field {field}={value!r} is not one of the paper's model")


def _refuse_other(config, fixed, where):
    for field, (default, allowed) in fixed.items():
        value = config.get(field, default)
        if value not in allowed:
            absent = "" if field in config else " (diffusers' default; the field is absent)"
            raise UserError(f"{where}: {field}={value!r}{absent} is not what the paper's model "
                            f"has: {allowed[0]!r}")


def _class(config, expected, where):
    if config.get("_class_name") != expected:
        raise UserError(f"{where}: _class_name={config.get('_class_name')!r}, not {expected}")


def _row(table, config, field, default, where):
    value = config.get(field, default)
    if not isinstance(value, str) or value not in table:
        raise UserError(f"{where}: {field}={value!r} is not supported (known: {', '.join(table)})")
    return table[value]


def _integer(config, field, default, where):
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {field}={value!r} must be a positive whole number")
    return value


def _number(config, field, default, where):
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{where}: {field}={value!r} must be a number from 0 to 1")
    return float(value)


def _list(config, field, default, where):
    value = config.get(field, default)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {field}={value!r} must be a list with an entry for each level")
    return value


def model_fields(config: Mapping, where="unet config", image_size=None) -> dict:
    """{'model': {...}, 'data': {...}} of our config from a UNet2DModel's config.json.

    image_size: where the file has none. Raises UserError naming the first field that the paper's
    U-Net does not have.
    """
    _class(config, "UNet2DModel", where)
    _refuse_unknown(config, {*_UNET_FIXED, *_UNET_READ}, where)
    _refuse_other(config, _UNET_FIXED, where)
    size = image_size if config.get("sample_size") is None else config["sample_size"]
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    size = _integer({"sample_size": size}, "sample_size", None, where)
    widths = [_integer({"block_out_channels": width}, "block_out_channels", None, where)
              for width in _list(config, "block_out_channels", [224, 448, 672, 896], where)]
    down = _list(config, "down_block_types", ["DownBlock2D"] + ["AttnDownBlock2D"] * 3, where)
    if any(w % widths[0] for w in widths):
        raise UserError(f"{where}: block_out_channels={widths} are no multiples of the first")
    if len(down) != len(widths):
        raise UserError(f"{where}: down_block_types={down} do not match {len(widths)} "
                        "block_out_channels")
    up = [_row(_UP_TYPES, {"down_block_types": kind}, "down_block_types", None, where)
          for kind in reversed(down)]
    attending = [i for i, kind in enumerate(down) if kind == _DOWN_TYPES[True]]
    groups = _integer(config, "norm_num_groups", 32, where)
    channels = _integer(config, "in_channels", 3, where)
    heads = {widths[i] for i in (*attending, -1)}  # channels of a head, where there is one head
    _refuse_other(config, {
        "up_block_types": (["AttnUpBlock2D"] * 3 + ["UpBlock2D"], (up,)),
        "attention_head_dim": (8, (None, *heads) if len(heads) == 1 else (None,)),
        "attn_norm_num_groups": (None, (None, groups)),
        "time_embedding_dim": (None, (None, 4 * widths[0])),
        "out_channels": (3, (channels, 2 * channels)),  # twice with a learned variance
    }, where)
    return {
        "model": {
            "ch": widths[0],
            "ch_mult": tuple(w // widths[0] for w in widths),
            "num_res_blocks": _integer(config, "layers_per_block", 2, where),
            "attn_resolutions": tuple(size >> i for i in attending),
            "dropout": _number(config, "dropout", 0.0, where),
            "num_groups": groups,
            "space_to_depth": 1,
            **_class_fields(config, where),
        },
        "data": {"image_size": size, "channels": channels},
    }


def _class_fields(config, where):
    if config.get("num_class_embeds") is None:
        return {"num_classes": 0}
    dropout = _number(config, _LABEL_DROPOUT, 0.0, where)
    labels = _integer(config, "num_class_embeds", None, where)
    if labels == 1 and dropout:
        raise UserError(f"{where}: num_class_embeds=1 is the label for none alone")
    return {"num_classes": labels - (dropout > 0), "label_dropout": dropout}


def chain_fields(config: Mapping, where="scheduler config") -> dict:
    """{'diffusion': {...}, 'sampler': {...}} of our config from a DDPMScheduler's config.

    Raises UserError naming the first field that the paper's chain does not have.
    """
    _class(config, "DDPMScheduler", where)
    _refuse_unknown(config, {*_SCHEDULER_FIXED, *_SCHEDULER_READ}, where)
    _refuse_other(config, _SCHEDULER_FIXED, where)
    if config.get("variance_type") == "learned":
        raise UserError(f"{where}: variance_type='learned' {_LEARNED}")
    return {
        "diffusion": {**_training_fields(config, where),
                      **_row(_VARIANCES, config, "variance_type", "fixed_small", where)},
        # None: clipped by the samplers that can.
        "sampler": {"clip_denoised": None if config.get("clip_sample", True) else False,
                    "steps": 0},
    }


def check_outputs(unet: Mapping, fields: Mapping, where) -> None:
    """Raise UserError where the UNet2DModel of ``fields`` has not the outputs that the chain's
    variance needs."""
    needed = fields["data"]["channels"] * (1 + (fields["diffusion"]["variance"] == "learned_range"))
    if unet.get("out_channels", 3) != needed:
        raise UserError(f"{where}: out_channels={unet.get('out_channels', 3)}, but the scheduler's "
                        f"variance_type needs {needed}")


def shared_chain_fields(config: Mapping, where="scheduler config") -> dict:
    """{'diffusion': {...}} from the config of any scheduler (DDIMScheduler, ...): timesteps, betas
    and prediction, which belong to training. The variance is not among them.

    Raises UserError as ``chain_fields``.
    """
    _refuse_other(config, _TRAINING_FIXED, where)
    return {"diffusion": _training_fields(config, where)}


def _training_fields(config, where):
    predict = _row(_PREDICTIONS, config, "prediction_type", "epsilon", where)
    if config.get("predict_epsilon") is not None:  # before 0.11, in the place of prediction_type
        predict = _PREDICT_EPSILON[bool(config["predict_epsilon"])]
    total = _integer(config, "num_train_timesteps", 1000, where)
    read = _law_fields if config.get("trained_betas") is None else _listed_fields
    return {"num_timesteps": total, "predict": predict, **read(config, total, where)}


def _law_fields(config, total, where):
    law, numbers = _row(_LAWS, config, "beta_schedule", "linear", where)
    betas = {n: _number(config, n, {"beta_start": 0.0001, "beta_end": 0.02}[n], where)
             for n in numbers}
    return {"schedule": {"name": law, **betas},
            "zero_terminal_snr": config.get("rescale_betas_zero_snr", False)}


def _listed_fields(config, total, where):
    """Of ``trained_betas``: the law that an export names beside them, where they are its; else
    they themselves."""
    betas = config["trained_betas"]
    if not isinstance(betas, list) or len(betas) != total or not all(
            isinstance(b, float | int) and 0 < b <= 1 for b in betas):
        raise UserError(f"{where}: trained_betas={str(betas)[:60]} must be a list of "
                        f"num_train_timesteps={total} numbers above 0 and at most 1")
    named = config.get(_LAW)
    try:
        schedule = dict(named["schedule"])
        law = BETAS[schedule["name"]](total, **{k: v for k, v in schedule.items() if k != "name"})
        found = zero_terminal_snr(law) if named["zero_terminal_snr"] else law
        if np.allclose(found, betas, rtol=1e-6, atol=0):
            return {"schedule": schedule, "zero_terminal_snr": bool(named["zero_terminal_snr"])}
    except (KeyError, TypeError, ValueError):  # of another program, or absent
        pass
    return {"schedule": {"name": "listed", "betas": tuple(map(float, betas))},
            "zero_terminal_snr": config.get("rescale_betas_zero_snr", False)}


def unet_config(model: UNet) -> dict:
    """config.json of the UNet2DModel that computes what ``model`` computes.

    Raises UserError naming the field that diffusers has no equal of.
    """
    if model.space_to_depth != 1:
        raise UserError(f"config.model.space_to_depth={model.space_to_depth}: UNet2DModel has no "
                        "space-to-depth; only 1 can be exported")
    attending = {s.size for s in model.stages()
                 if s.kind == "attention" and s.name.startswith("down_")}
    sizes = [model.image_size >> i for i in range(len(model.ch_mult))]
    down = [_DOWN_TYPES[size in attending] for size in sizes]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": FORMAT_VERSION,
        **{field: allowed[0] for field, (_, allowed) in _UNET_FIXED.items()},
        "attention_head_dim": None,
        "attn_norm_num_groups": None,
        "block_out_channels": [model.ch * m for m in model.ch_mult],
        "down_block_types": down,
        "dropout": float(model.dropout),
        "in_channels": model.in_channels,
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.num_groups,
        "num_class_embeds": model.num_labels or None,
        **({_LABEL_DROPOUT: model.label_dropout} if model.no_label is not None else {}),
        "num_train_timesteps": None,
        "out_channels": model.out_channels,
        "sample_size": model.image_size,
        "up_block_types": [_UP_TYPES[kind] for kind in reversed(down)],
    }


def scheduler_config(config: Mapping, betas) -> dict:
    """scheduler_config.json of the DDPMScheduler that walks a config's full chain.

    betas float64 [T]: written out for the laws that diffusers does not have.
    Raises UserError naming the field that diffusers has no equal of.
    """
    diffusion, schedule = config["diffusion"], dict(config["diffusion"]["schedule"])
    law = schedule.pop("name")
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if diffusion["predict"] not in predictions:
        raise UserError(f"config.diffusion.predict={diffusion['predict']}: diffusers' scheduler "
                        f"has only {', '.join(predictions)}")
    if diffusion["variance"] == "learned":
        raise UserError(f"config.diffusion.variance=learned {_LEARNED}; only learned_range can be "
                        "exported")
    theirs = next((t for t, (ours, numbers) in _LAWS.items()
                   if ours == law and set(schedule) <= set(numbers)), None)
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": FORMAT_VERSION,
        **{field: allowed[0] for field, (_, allowed) in _SCHEDULER_FIXED.items()},
        "num_train_timesteps": diffusion["num_timesteps"],
        "beta_start": schedule.get("beta_start", 0.0001),
        "beta_end": schedule.get("beta_end", 0.02),
        "beta_schedule": theirs or "linear",
        "trained_betas": None if theirs else [float(b) for b in betas],
        **({} if theirs or "betas" in schedule else {_LAW: {
            field: diffusion[field] for field in ("schedule", "zero_terminal_snr")}}),
        "rescale_betas_zero_snr": bool(theirs) and diffusion["zero_terminal_snr"],
        "variance_type": diffusion["variance"],
        "clip_sample": config["sampler"]["clip_denoised"] is not False,
        "prediction_type": predictions[diffusion["predict"]],
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
    }
