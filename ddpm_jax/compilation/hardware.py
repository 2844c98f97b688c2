"""The table of chips: what one JAX device of each kind can do at most. Data, and one look-up.

Vendors' figures, decimal units. TPU: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x};
v2 and v3 links from Jouppi et al., CACM 63(7), 2020. GPU: NVIDIA's data sheets, dense rates
(without sparsity). A figure that is not public is None, and what needs it says n/a.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of chip. Rates are of the whole chip; `per_device` divides them.

    bf16_flops: peak bfloat16 FLOP/s; hbm_bytes: capacity; hbm_bandwidth: bytes/s;
    ici_bandwidth: bytes/s that leave one chip over all its links (NVLink on a GPU), one direction;
    dcn_bandwidth: bytes/s of one chip's share of its host's network; ici_chips: the most chips that
    the links join (8 GPUs of a node). device_kinds: what `jax.Device.device_kind` can say.
    """

    name: str
    device_kinds: tuple[str, ...]
    devices_per_chip: int
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float | None
    dcn_bandwidth: float | None
    ici_chips: int
    matrix_unit: int | None

    def per_device(self, rate: float | None) -> float | None:
        return None if rate is None else rate / self.devices_per_chip


T, G = 1e12, 1e9
CHIPS = {row[0]: Chip(*row) for row in (
    # name, device_kinds, devices a chip, bf16 FLOP/s, HBM bytes, HBM B/s, ICI B/s, DCN B/s,
    #  chips joined by ICI, side of a matrix unit
    ("v2", ("TPU v2",), 2, 46 * T, 16 * G, 700 * G, 248 * G, None, 256, 128),
    ("v3", ("TPU v3",), 2, 123 * T, 32 * G, 900 * G, 328 * G, None, 1024, 128),
    ("v4", ("TPU v4",), 1, 275 * T, 32 * G, 1200 * G, 270 * G, 6.25 * G, 4096, 128),
    ("v5e", ("TPU v5 lite", "TPU v5e"), 1, 197 * T, 16 * G, 819 * G, 200 * G, 3.125 * G, 256, 128),
    ("v5p", ("TPU v5", "TPU v5p"), 1, 459 * T, 95 * G, 2765 * G, 600 * G, 6.25 * G, 8960, 128),
    ("v6e", ("TPU v6 lite", "TPU v6e"), 1, 918 * T, 32 * G, 1638 * G, 400 * G, 12.5 * G, 256, 256),
    ("v7x", ("TPU7x",), 2, 2307 * T, 192 * G, 7380 * G, 600 * G, 12.5 * G, 9216, 256),
    ("8i", ("TPU8i",), 2, 1101 * T, 309 * G, 8600 * G, None, None, 1, 256),
    ("8t", ("TPU8t",), 1, 996 * T, 231 * G, 6400 * G, None, None, 1, 256),
    ("a100", ("NVIDIA A100-SXM4-80GB",), 1, 312 * T, 80 * G, 2039 * G, 300 * G, 25 * G, 8, None),
    ("h100", ("NVIDIA H100 80GB HBM3",), 1, 989 * T, 80 * G, 3350 * G, 450 * G, 50 * G, 8, None),
    ("h200", ("NVIDIA H200",), 1, 989 * T, 141 * G, 4800 * G, 450 * G, 50 * G, 8, None),
    ("b200", ("NVIDIA B200",), 1, 2250 * T, 180 * G, 7700 * G, 900 * G, 50 * G, 8, None),
)}
BY_DEVICE_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}


def chip_of(device_kind: str) -> Chip | None:
    """The row of a `jax.Device.device_kind`, or None: an unknown chip has no peak to divide by."""
    return BY_DEVICE_KIND.get(device_kind)
