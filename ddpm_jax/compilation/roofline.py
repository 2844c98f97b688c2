"""Work counted by hand from the network's shape, and how fast a chip could do it at most.

Multiply-adds of convolutions, dense layers and attention are counted; normalisation, activations,
residual sums and the optimizer are not (they are bytes, not arithmetic). One multiply-add is two
FLOP. Everything here is an estimate: a bound from the data sheet, never a measurement.
"""

import math
from typing import NamedTuple

from ddpm_jax.compilation import hardware
from ddpm_jax.models.layers import Conv1x1, Conv3x3, Dense, parameter_layers
from ddpm_jax.models.unet import KINDS, UNet

TRAIN_TO_FORWARD = 3  # a training step is the forward pass and two products as large in backward
ESTIMATED = "estimated"


class Work(NamedTuple):
    """Multiply-adds of one image's forward pass by kind of layer, and the parameter count."""

    conv3x3: int
    conv1x1: int
    dense: int
    attention: int
    parameters: int

    @property
    def macs(self) -> int:
        return self.conv3x3 + self.conv1x1 + self.dense + self.attention

    @property
    def forward_flops(self) -> int:
        return 2 * self.macs

    @property
    def train_flops(self) -> int:
        return TRAIN_TO_FORWARD * self.forward_flops


# Field of `Work` that a layer's multiply-adds count in, and whether it is applied at each pixel.
_KINDS = {Conv3x3: ("conv3x3", True), Conv1x1: ("conv1x1", True), Dense: ("dense", False)}


def unet_work(model: UNet) -> Work:
    """`Work` of the network for one image, from the description in models/."""
    stages = model.stages()
    finest = model.image_size // model.space_to_depth
    sizes = {s.name: s.size for s in stages}
    macs = dict.fromkeys(("conv3x3", "conv1x1", "dense"), 0)
    parameters = 0
    for path, layer in parameter_layers(model):
        shapes = layer.shapes()
        parameters += sum(map(math.prod, shapes.values()))
        if type(layer) in _KINDS:
            kind, at_each_pixel = _KINDS[type(layer)]
            pixels = sizes.get(path[0], finest)**2 if at_each_pixel else 1
            macs[kind] += math.prod(shapes["kernel"]) * pixels
    attention = sum(KINDS[s.kind].products(s) for s in stages)
    return Work(**macs, attention=attention, parameters=parameters)


def all_reduce_seconds(chip: hardware.Chip, chips: int, slices: int, payload: float):
    """Seconds to sum `payload` bytes over all chips: a ring inside each slice, then between them.

    2 payload (n - 1) / n bytes leave each of a slice's n chips; between slices the chips of a
    slice share the load. 0 for one chip; None where the network's rate is not known.
    """
    inside = chips // slices
    seconds = 0.0
    if inside > 1:
        if chip.ici_bandwidth is None:
            return None
        seconds += 2 * payload * (inside - 1) / inside / chip.ici_bandwidth
    if slices > 1:
        if chip.dcn_bandwidth is None:
            return None
        seconds += 2 * payload * (slices - 1) / slices / (inside * chip.dcn_bandwidth)
    return seconds


def roofline(chip: hardware.Chip, *, devices: int, slices: int = 1, flops: float,
             bytes_per_device: float | None = None, payload: float = 0.0) -> dict:
    """The least time of a program of `flops` over all devices, and what bounds it.

    bytes_per_device: what one device reads and writes, None where the compiler does not say;
    payload: bytes of one copy of what is summed over the devices. Nothing is assumed to overlap
    but memory with compute. -> {'compute_s', 'memory_s', 'all_reduce_s', 'seconds', 'bound',
    'intensity' (FLOP/byte), 'ridge' (where compute and memory meet), 'mfu' at the bound}.
    """
    peak = chip.per_device(chip.bf16_flops)
    compute = flops / devices / peak
    memory = None
    if bytes_per_device:
        memory = bytes_per_device / chip.per_device(chip.hbm_bandwidth)
    reduce = all_reduce_seconds(chip, max(1, devices // chip.devices_per_chip), slices, payload)
    parts = {"compute": compute, "memory": memory or 0.0, "all-reduce": reduce or 0.0}
    seconds = max(compute, memory or 0.0) + (reduce or 0.0)
    return {
        "status": ESTIMATED, "compute_s": compute, "memory_s": memory, "all_reduce_s": reduce,
        "seconds": seconds, "bound": max(parts, key=parts.get),
        "intensity": flops / devices / bytes_per_device if bytes_per_device else None,
        "ridge": chip.bf16_flops / chip.hbm_bandwidth,
        "mfu": compute / seconds if seconds else None,
    }


def at_mfu(chip: hardware.Chip, *, devices: int, flops: float, steps: int, mfu: float) -> dict:
    """Steps a second and chip-hours of `steps` steps of `flops` each if the chips ran at `mfu`."""
    seconds = flops / (devices * chip.per_device(chip.bf16_flops) * mfu)
    chips = max(1, devices // chip.devices_per_chip)
    return {"status": ESTIMATED, "mfu": mfu, "steps_per_s": 1 / seconds,
            "hours": steps * seconds / 3600, "chip_hours": chips * steps * seconds / 3600}
