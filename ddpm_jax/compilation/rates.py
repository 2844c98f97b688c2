"""How long a program's kernels take at the rates measured on a device, class by class.

A bandwidth alone does not rank the kernels of a GPU: XLA's reductions run at a tenth to a third of
it. Each class of hlo.CLASSES has the time that its kernels took in one measured program; what is
left of it after their launches, over the bytes (or FLOP) of the class in the same program, is the
class's rate. The result is an estimate, never a measurement.
"""

from typing import NamedTuple

from ddpm_jax.compilation import hardware

ESTIMATED = "estimated with measured rates"


class Rate(NamedTuple):
    """``kernels`` of a class took ``us`` microseconds in all, of which ``launch_us`` each do not
    depend on the size; ``work``: bytes that slices touch, or FLOP where the class counts them."""

    kernels: int
    us: float
    work: float
    launch_us: float

    @property
    def per_second(self) -> float:
        """Bytes or FLOP a second beyond the launches."""
        return self.work / (self.us - self.kernels * self.launch_us) * 1e6

    def seconds(self, kernels: int, work: float) -> float:
        return kernels * self.launch_us * 1e-6 + work / self.per_second


class Measured(NamedTuple):
    """Rates of one program on one device. device: a row of hardware.CHIPS; flops: classes whose
    work is FLOP."""

    device: str
    dtype: str
    commit: str
    date: str
    source: str
    classes: dict[str, Rate]
    flops: frozenset[str] = frozenset({"convolution"})


# Times: the streams of a profile of `ddpm bench step --config=cifar10`, batch 128, global clip,
# CUDA graphs off, JAX 0.11.2: 1,360 instructions, 18.83 ms, beside a step of 18.75 ms. Work: the
# same program compiled ahead of time by JAX 0.10.2 (commit 04d7f27), whose kernels carry the same
# names of operations for all but 0.5 % of that time. Launches: fitted to the shortest kernels.
H100 = Measured("h100", "bfloat16", "84ae50c", "2026-11-26", "cifar10, batch 128", {
    "convolution": Rate(155, 7240.0, 4193.734e9, 8.0),
    "elementwise": Rate(368, 2926.5, 6479.687e6, 1.3),
    "matrix product": Rate(131, 2103.4, 5137.138e6, 2.1),
    "reduction": Rate(474, 2120.2, 2779.111e6, 1.5),
    "reduction to several sums": Rate(48, 1736.9, 2015.002e6, 2.0),
    "reduction in a loop fusion": Rate(148, 1542.0, 1226.379e6, 1.1),
    "concatenation": Rate(26, 702.1, 1932.127e6, 1.5),
    "random bits": Rate(13, 463.4, 143.499e6, 1.2),
})
MEASURED = {(rates.device, rates.dtype): rates for rates in (H100,)}


def estimate(chip: hardware.Chip, dtype: str, by_class: dict[str, dict]) -> dict | None:
    """Seconds of one call on one device, from hlo.summary's by_class; None without rates of it.

    dtype: what the network computes in; by_class: rows with kernels, bytes_sliced and, of
    convolutions, flops. Collectives are left out. A class without a rate counts as elementwise.
    -> {'status', 'seconds', 'by_class': {class: seconds}, 'device_kind', 'commit', 'date'}
    """
    rates = MEASURED.get((chip.name, dtype))
    if rates is None:
        return None
    seconds = {}
    for kind, row in by_class.items():
        if kind == "collective":
            continue
        rate = rates.classes.get(kind, rates.classes["elementwise"])
        work = row.get("flops", 0) if kind in rates.flops else row["bytes_sliced"]
        seconds[kind] = rate.seconds(row["kernels"], work)
    return {"status": ESTIMATED, "seconds": sum(seconds.values()),
            "by_class": dict(sorted(seconds.items(), key=lambda item: -item[1])),
            "device_kind": chip.device_kinds[0], "dtype": rates.dtype, "commit": rates.commit,
            "date": rates.date, "source": rates.source}
