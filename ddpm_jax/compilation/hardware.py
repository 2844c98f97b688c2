"""The table of accelerators: a row for each, and what is looked up in it.

A row has what one chip can do at most, how compilers are told to describe a machine of it, and how
Google Cloud names and sells it. Data only, without JAX: `launch/` reads this file by its path, on
machines on which nothing is installed.

Vendors' figures, decimal units. TPU: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x};
v2 and v3 links from Jouppi et al., CACM 63(7), 2020. GPU: NVIDIA's data sheets, dense rates
(without sparsity). A figure that is not public is None, and what needs it prints n/a.
"""

from typing import NamedTuple

# What libtpu asks a Cloud TPU's metadata server for, and reports on stderr where there is none.
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}


class Tpu(NamedTuple):
    """How a TPU generation is named and sold.

    names: in accelerator names such as v5litepod-8; the first is that of the Cloud TPU API.
    platform: libtpu's name. cores: what one chip counts for in accelerator names (v3-8: cores,
    v6e-8: chips). dimensions: of the torus. options: for libtpu. sizes: the numbers in accelerator
    names that are sold. runtime: image of the Cloud TPU API, None: not served by it. machine:
    machine type of Compute Engine with 4 chips, None: not there. gke: node label, None: not
    rendered. zones: where Google has offered it (2026-11).
    """

    names: tuple[str, ...]
    platform: str
    cores: int
    dimensions: int
    sizes: tuple[int, ...]
    zones: tuple[str, ...]
    runtime: str | None = None
    machine: str | None = None
    gke: str | None = None
    multislice: bool = True
    options: dict = {}


class Chip(NamedTuple):
    """One kind of chip. Rates are of the whole chip; `per_device` divides them.

    device_kinds: what `jax.Device.device_kind` can be; bf16_flops: peak bfloat16 FLOP/s; hbm_bytes:
    capacity; hbm_bandwidth: bytes/s; ici_bandwidth: bytes/s that leave one chip over all its links
    (NVLink on a GPU), one direction; dcn_bandwidth: bytes/s of one chip's share of its host's
    network; ici_chips: the most chips that the links join (8 GPUs of a node); matrix_unit: side of
    a matrix unit; target: the GPU description in this folder that XLA compiles for.
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
    tpu: Tpu | None = None
    target: str | None = None

    def per_device(self, rate: float | None) -> float | None:
        return None if rate is None else rate / self.devices_per_chip


_V5E_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
_POWERS = tuple(2 ** i for i in range(3, 13))

T, G = 1e12, 1e9
CHIPS = {row[0]: Chip(*row) for row in (
    # name, device_kinds, devices a chip, bf16 FLOP/s, HBM bytes, HBM B/s, ICI B/s, DCN B/s,
    #  chips joined by ICI, side of a matrix unit
    ("v2", ("TPU v2",), 2, 46 * T, 16 * G, 700 * G, 248 * G, None, 256, 128,
     Tpu(("v2",), "v2", 2, 2, (8, 32, 128, 256, 512),
         ("us-central1-b", "us-central1-c", "us-central1-f", "europe-west4-a", "asia-east1-c"),
         "tpu-ubuntu2204-base", multislice=False)),
    ("v3", ("TPU v3",), 2, 123 * T, 32 * G, 900 * G, 328 * G, None, 1024, 128,
     Tpu(("v3",), "v3", 2, 2, (8, 32, 64, 128, 256, 512, 1024, 2048),
         ("us-central1-a", "us-central1-b", "us-east1-d", "europe-west4-a"),
         "tpu-ubuntu2204-base", multislice=False)),
    # Two cores that act as one device, as on real v4 machines; libtpu needs the option for it.
    ("v4", ("TPU v4",), 1, 275 * T, 32 * G, 1200 * G, 270 * G, 6.25 * G, 4096, 128,
     Tpu(("v4",), "v4", 2, 3, _POWERS, ("us-central2-b",), "tpu-ubuntu2204-base",
         gke="tpu-v4-podslice", options={"chip_config_name": "megacore"})),
    ("v5e", ("TPU v5 lite", "TPU v5e"), 1, 197 * T, 16 * G, 819 * G, 200 * G, 3.125 * G, 256, 128,
     Tpu(("v5litepod", "v5e"), "v5e", 1, 2, _V5E_SIZES,
         ("us-central1-a", "us-west1-c", "us-west4-a", "us-west4-b", "us-east1-c", "us-east5-a",
          "us-east5-b", "us-south1-a", "europe-west4-a", "europe-west4-b", "asia-southeast1-b"),
         "v2-alpha-tpuv5-lite", gke="tpu-v5-lite-podslice")),
    ("v5p", ("TPU v5", "TPU v5p"), 1, 459 * T, 95 * G, 2765 * G, 600 * G, 6.25 * G, 8960, 128,
     Tpu(("v5p",), "v5p", 2, 3, _POWERS, ("us-east5-a", "us-central1-a", "europe-west4-b"),
         "v2-alpha-tpuv5", "ct5p-hightpu-4t", "tpu-v5p-slice")),
    ("v6e", ("TPU v6 lite", "TPU v6e"), 1, 918 * T, 32 * G, 1638 * G, 400 * G, 12.5 * G, 256, 256,
     Tpu(("v6e",), "v6e", 1, 2, _V5E_SIZES,
         ("us-east1-d", "us-east5-a", "us-east5-b", "us-central1-b", "us-central2-b",
          "us-south1-a", "us-south1-b", "europe-west4-a", "asia-northeast1-b",
          "southamerica-west1-a"), "v2-alpha-tpuv6e", "ct6e-standard-4t", "tpu-v6e-slice")),
    ("v7x", ("TPU7x",), 2, 2307 * T, 192 * G, 7380 * G, 600 * G, 12.5 * G, 9216, 256,
     Tpu(("tpu7x", "v7x"), "tpu7x", 2, 3, _POWERS[:8], ("us-central1-c", "us-central1-ai1a"),
         None, "tpu7x-standard-4t", "tpu7x")),
    ("8i", ("TPU8i",), 2, 1101 * T, 309 * G, 8600 * G, None, None, 1, 256),
    ("8t", ("TPU8t",), 1, 996 * T, 231 * G, 6400 * G, None, None, 1, 256),
    ("a100", ("NVIDIA A100-SXM4-80GB",), 1, 312 * T, 80 * G, 2039 * G, 300 * G, 25 * G, 8, None),
    ("h100", ("NVIDIA H100 80GB HBM3",), 1, 989 * T, 80 * G, 3350 * G, 450 * G, 50 * G, 8, None,
     None, "h100.txtpb"),
    ("h200", ("NVIDIA H200",), 1, 989 * T, 141 * G, 4800 * G, 450 * G, 50 * G, 8, None),
    ("b200", ("NVIDIA B200",), 1, 2250 * T, 180 * G, 7700 * G, 900 * G, 50 * G, 8, None),
)}
BY_DEVICE_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}
BY_TPU_NAME = {name: chip for chip in CHIPS.values() if chip.tpu for name in chip.tpu.names}
BY_GPU_TARGET = {chip.name: chip for chip in CHIPS.values() if chip.target}


def chip_of(device_kind: str) -> Chip | None:
    """The row of a `jax.Device.device_kind`, or None: an unknown chip has no peak to divide by."""
    return BY_DEVICE_KIND.get(device_kind)


def torus(chips: int, dimensions: int) -> str | None:
    """The usual shape of a slice of `chips` chips, such as '2x4' or '4x4x8'; None if there is none.

    Sides are powers of two, as equal as they can be, the smallest first; 3-D slices of fewer than
    8 chips are flat (2x2x1), as they are sold.
    """
    exponent = chips.bit_length() - 1
    if chips < 1 or chips != 1 << exponent:
        return None
    if dimensions == 3 and chips <= 4:
        return {1: "1x1x1", 2: "1x2x1", 4: "2x2x1"}[chips]
    low, more = divmod(exponent, dimensions)
    return "x".join(str(1 << (low + (i >= dimensions - more))) for i in range(dimensions))
