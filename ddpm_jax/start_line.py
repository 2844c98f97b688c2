"""The line that a command prints at its start: what it runs on, in what precision, how fast the
same program was where it was measured, and which flag makes it faster."""

from typing import NamedTuple

import jax

from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.experiment import Experiment


class Measured(NamedTuple):
    """images_per_second of one device in training, or in one denoising step, where ``clip`` is
    None; norm: parallel.norm_kernel; images: of a step, on that device."""

    device_kind: str
    parameters: int
    dtype: str
    norm: str
    clip: str | None
    images: int
    images_per_second: int


H100 = "NVIDIA H100 80GB HBM3"
MEASURED = (  # docs/h100.md: versions and commands
    Measured(H100, 35_746_307, "bfloat16", "xla", "global", 128, 6827),
    Measured(H100, 35_746_307, "bfloat16", "xla", "global", 512, 8302),
    Measured(H100, 35_746_307, "bfloat16", "xla", None, 512, 27827),
)

# What XLA by default multiplies float32 in, by platform; elsewhere in float32.
_FLOAT32_PRODUCTS = {"tpu": "bfloat16", "gpu": "TF32"}
_BFLOAT16 = "--config.model.dtype=bfloat16 (factor unmeasured)"
_FASTER_DTYPES = {("gpu", "float32"): _BFLOAT16, ("tpu", "float32"): _BFLOAT16}
# By device, type and norm; the factor is of the kernels' prototype in a training step.
_FASTER_NORMS = {
    (H100, "bfloat16", "xla"): "--config.parallel.norm_kernel=triton (1.11 x with its prototype)"}
_GLOBAL_CLIP = {(H100, "bfloat16", 1): "1.09 x with 8 parts"}  # devices last


def training_line(exp: Experiment) -> str:
    """Of `ddpm train` and `ddpm bench step`. Without a clip of several parts on one device the
    program is that of the global clip."""
    train, num_devices = exp.config.train, exp.runner.num_devices
    images = max(1, train.batch_size // num_devices)
    parts = train.clip_replicas if train.clip_scope == "per_replica" else 1
    clip = f"clip {train.clip_norm:g} of {'the whole batch' if parts == 1 else f'{parts} parts'}"
    dtype = exp.config.model.dtype
    flags = [_FASTER_DTYPES.get((_device(exp).platform, dtype))]
    if exp.runner.num_virtual_devices == 1:  # kernels cannot be cut
        flags.append(_FASTER_NORMS.get((_device(exp).device_kind, dtype, exp.model.norm_form)))
    if parts > num_devices:
        factor = _GLOBAL_CLIP.get((_device(exp).device_kind, dtype, num_devices),
                                  "factor unmeasured")
        flags.append(f"--config.train.clip_scope=global ({factor})")
    return _line(exp, [clip if train.clip_norm else "no clip", f"{images} images a device"],
                 _measured(exp, "parts" if parts > num_devices else "global", images),
                 "images/s", flags)


def sampling_line(exp: Experiment, num_steps: int, batch: int, flags=()) -> str:
    """Of `ddpm sample` and `ddpm bench sample`; num_steps: of the chain; batch: on all devices."""
    images = max(1, batch // exp.runner.num_devices)
    return _line(exp, [f"{num_steps} denoising steps", f"{images} images a device"],
                 _measured(exp, None, images), "images/s a step", flags)


def _device(exp):
    return exp.runner.mesh.devices.flat[0]


def _measured(exp, clip, images) -> int | None:
    key = (_device(exp).device_kind, unet_work(exp.model).parameters, exp.config.model.dtype,
           exp.model.norm_form, clip, images)
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
