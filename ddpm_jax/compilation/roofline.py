"""Work counted by hand from the network's shape, and how fast a chip could do it at most.

Multiply-adds of convolutions, dense layers and attention are counted; normalisation, activations,
residual sums and the optimizer are not (they are bytes, not arithmetic). One multiply-add is two
FLOP. Everything here is an estimate: a bound from the data sheet, never a measurement.
"""

from typing import NamedTuple

from ddpm_jax.compilation import hardware

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


def unet_work(*, image_size: int, ch: int, ch_mult, num_res_blocks: int, attn_resolutions,
              in_channels: int = 3, out_channels: int = 3, space_to_depth: int = 1) -> Work:
    """`Work` of the U-Net of Ho et al. 2020 (diffusion_tf/models/unet.py) for one image.

    image_size: of the images; with space_to_depth = f the network sees image_size / f and
    f * f times the channels. attn_resolutions: side lengths, as the network sees them.
    """
    conv3x3 = conv1x1 = dense = attention = parameters = 0
    size = image_size // space_to_depth
    fold = space_to_depth**2
    embedding = 4 * ch

    def conv(inputs, outputs, side):
        nonlocal conv3x3, parameters
        conv3x3 += 9 * inputs * outputs * side**2
        parameters += 9 * inputs * outputs + outputs

    def pointwise(inputs, outputs, side):
        nonlocal conv1x1, parameters
        conv1x1 += inputs * outputs * side**2
        parameters += inputs * outputs + outputs

    def linear(inputs, outputs):
        nonlocal dense, parameters
        dense += inputs * outputs
        parameters += inputs * outputs + outputs

    def norm(channels):
        nonlocal parameters
        parameters += 2 * channels

    def block(inputs, outputs, side):
        norm(inputs)
        conv(inputs, outputs, side)
        linear(embedding, outputs)
        norm(outputs)
        conv(outputs, outputs, side)
        if inputs != outputs:
            pointwise(inputs, outputs, side)

    def attend(channels, side):
        nonlocal attention
        norm(channels)
        for _ in "qkvo":
            pointwise(channels, channels, side)
        attention += 2 * side**4 * channels  # the scores, and the mean of the values

    linear(ch, embedding)
    linear(embedding, embedding)
    conv(in_channels * fold, ch, size)
    skips, channels = [ch], ch
    levels = list(enumerate(ch_mult))
    for level, multiplier in levels:
        for _ in range(num_res_blocks):
            block(channels, ch * multiplier, size)
            channels = ch * multiplier
            if size in attn_resolutions:
                attend(channels, size)
            skips.append(channels)
        if level != levels[-1][0]:
            size //= 2
            conv(channels, channels, size)
            skips.append(channels)
    block(channels, channels, size)
    attend(channels, size)
    block(channels, channels, size)
    for level, multiplier in reversed(levels):
        for _ in range(num_res_blocks + 1):
            block(channels + skips.pop(), ch * multiplier, size)
            channels = ch * multiplier
            if size in attn_resolutions:
                attend(channels, size)
        if level:
            size *= 2
            conv(channels, channels, size)
    norm(channels)
    conv(channels, out_channels * fold, size)
    return Work(conv3x3, conv1x1, dense, attention, parameters)


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
