"""The line that a command prints at its start: what it runs on, in what precision, how fast the
same program was where it was measured, and which flag makes it faster."""

from typing import NamedTuple

import jax

from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.config_checks import clips_parts, kernel_form
from ddpm_jax.experiment import Experiment
from ddpm_jax.models import attention, fused_norm
from ddpm_jax.models.norm_tiles import H100


class Measured(NamedTuple):
    """images_per_second of one device in training, or in one denoising step, where ``clip`` is
    None. norm, attention: the row of parallel.norm_kernel, parallel.attention_kernel; clip: global,
    or the row of parallel.clip_kernel for several parts on the device; images: of a step, on that
    device."""

    device_kind: str
    parameters: int
    dtype: str
    norm: str
    attention: str
    clip: str | None
    images: int
    images_per_second: int


MEASURED = (  # BENCHMARKS.md, h100-a78cd02 and h100-2026-11-27
    Measured(H100, 35_746_307, "bfloat16", "triton", "triton", "global", 128, 7887),
    Measured(H100, 35_746_307, "bfloat16", "triton", "triton", "global", 512, 9656),
    Measured(H100, 35_746_307, "bfloat16", "triton", "triton", "kernels", 128, 7145),
    Measured(H100, 35_746_307, "bfloat16", "triton", "triton", None, 512, 31365),
    Measured(H100, 35_746_307, "bfloat16", "xla", "xla", "global", 128, 6791),
    Measured(H100, 35_746_307, "bfloat16", "xla", "xla", "global", 512, 8252),
    Measured(H100, 35_746_307, "bfloat16", "xla", "xla", None, 512, 27827),
    Measured(H100, 35_746_307, "float32", "triton", "xla", "global", 128, 3828),
    Measured(H100, 35_746_307, "float32", "xla", "xla", "global", 128, 3528),
    Measured(H100, 35_746_307, "float32", "xla", "xla", "convolutions", 128, 2748),
)

# What XLA by default multiplies float32 in, by platform; elsewhere in float32.
_FLOAT32_PRODUCTS = {"tpu": "bfloat16", "gpu": "TF32"}
# By kind of device or platform, and type: the flag that makes it faster, and by how much where it
# was measured, on the CIFAR-10 step (a CPU: on the digits').
_BFLOAT16, _GLOBAL = "--config.model.dtype=bfloat16", "--config.train.clip_scope=global"
_FASTER_DTYPES = {
    (H100, "float32"): f"{_BFLOAT16} (1.97 x)",
    ("gpu", "float32"): f"{_BFLOAT16} (factor unmeasured)",
    ("tpu", "float32"): f"{_BFLOAT16} (factor unmeasured)",
}
_FASTER_CLIPS = {
    (H100, "bfloat16"): f"{_GLOBAL} (1.10 x with 8 parts on one)",
    ("cpu", "float32"): f"{_GLOBAL} (1.15 to 1.3 x with 8 parts on one)",
}
_NORM = "--config.parallel.norm_kernel=triton"
_FASTER_KERNELS = {
    ("gpu", "bfloat16"): f"{_NORM} --config.parallel.attention_kernel=triton (1.16 x on an H100)",
    ("gpu", "float32"): f"{_NORM} (1.09 x on an H100)",
}


def _faster(table, exp, otherwise=None):
    device, dtype = _device(exp), exp.config.model.dtype
    return table.get((device.device_kind, dtype), table.get((device.platform, dtype), otherwise))


def _faster_kernels(exp):
    """The flags where kernels could run and none is chosen, as on a GPU that was not measured."""
    forms = fused_norm.FORMS[exp.model.norm_form], attention.FORMS[exp.model.attention_form]
    if any(form.kernels for form in forms) or exp.runner.num_virtual_devices > 1:
        return None
    return _faster(_FASTER_KERNELS, exp)


def training_line(exp: Experiment) -> str:
    """Of `ddpm train` and `ddpm bench step`. Without a clip of several parts on one device the
    program is that of the global clip."""
    train, num_devices = exp.config.train, exp.runner.num_devices
    images = max(1, train.batch_size // num_devices)
    parts = train.clip_replicas if clips_parts(train) else 1
    clip = f"clip {train.clip_norm:g} of {'the whole batch' if parts == 1 else f'{parts} parts'}"
    form = kernel_form("clip_kernel", exp.config, exp.runner)
    flags = [_faster(_FASTER_DTYPES, exp)]
    if parts > num_devices:
        flags.append(_faster(_FASTER_CLIPS, exp, f"{_GLOBAL} (factor unmeasured)"))
    flags.append(_faster_kernels(exp))
    return _line(exp, [clip if train.clip_norm else "no clip", f"{images} images a device"],
                 _measured(exp, form if parts > num_devices else "global", images),
                 "images/s", flags)


def sampling_line(exp: Experiment, num_steps: int, batch: int, flags=()) -> str:
    """Of `ddpm sample` and `ddpm bench sample`; num_steps: of the chain; batch: on all devices."""
    images = max(1, batch // exp.runner.num_devices)
    return _line(exp, [f"{num_steps} denoising steps", f"{images} images a device"],
                 _measured(exp, None, images), "images/s a step", [*flags, _faster_kernels(exp)])


def _device(exp):
    return exp.runner.mesh.devices.flat[0]


def _measured(exp, clip, images) -> int | None:
    key = (_device(exp).device_kind, unet_work(exp.model).parameters, exp.config.model.dtype,
           exp.model.norm_form, exp.model.attention_form, clip, images)
    found = [row.images_per_second for row in MEASURED if row[:-1] == key]
    return found[0] if found and exp.runner.num_devices == 1 else None


def _line(exp, facts, rate, unit, flags) -> str:
    device, dtype = _device(exp), exp.config.model.dtype
    products = jax.config.jax_default_matmul_precision or _FLOAT32_PRODUCTS.get(device.platform)
    if dtype == "float32" and products:
        dtype = f"float32 (products in {products})"
    speed = f"{rate:,} {unit} measured" if rate else "speed unmeasured here"
    faster = [f"faster: {' or '.join(filter(None, flags))}"] if any(flags) else []
    return "; ".join([f"{exp.runner.num_devices} x {device.device_kind} ({exp.runner.name})", dtype,
                      *facts, speed, *faster])
