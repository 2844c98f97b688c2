import math

import jax
import pytest
from jax._src.pallas.mosaic import tpu_info

from ddpm_jax.compilation import hardware

# The spread between vendors' pages and JAX's own table is largest for v3 (123 and 140 TFLOP/s).
TOLERANCE = 0.15
TPUS = [chip for chip in hardware.CHIPS.values() if chip.device_kinds[0].startswith("TPU")]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_agrees_with_jax_own_table(chip):
    for kind in chip.device_kinds:
        version = tpu_info.chip_version_from_device_kind(kind)
        if version is None and chip.name == "8t":
            pytest.skip("new in JAX 0.12")
        assert version is not None, kind
        cores = 2 if version.supports_megacore else 1
        info = tpu_info.get_tpu_info_for_chip(version, cores)
        # JAX's figures are of one tensor core; a device has `cores` of them.
        assert version.num_physical_tensor_cores_per_chip == cores * chip.devices_per_chip
        for ours, theirs in ((chip.bf16_flops, info.bf16_ops_per_second),
                             (chip.hbm_bytes, info.hbm_capacity_bytes),
                             (chip.hbm_bandwidth, info.mem_bw_bytes_per_second)):
            assert chip.per_device(ours) == pytest.approx(theirs * cores, rel=TOLERANCE)
        assert chip.matrix_unit == info.mxu_column_size


def test_every_tpu_jax_knows_is_in_the_table():
    left_out = {"v4i", "7"}  # v4i was never offered in the cloud; 7 is sold as 7x
    versions = {tpu_info.chip_version_from_device_kind(c.device_kinds[0]) for c in TPUS}
    known = {version.value for version in versions - {None}}
    assert {v.value for v in tpu_info.ChipVersion} - left_out == known


def test_look_up_and_unknown_kind():
    assert hardware.chip_of("NVIDIA H100 80GB HBM3").name == "h100"
    assert hardware.chip_of("TPU v5 lite").bf16_flops == 197e12
    assert hardware.chip_of(jax.devices()[0].device_kind) is None
    v3 = hardware.CHIPS["v3"]
    assert v3.per_device(v3.bf16_flops) == 61.5e12 and v3.per_device(None) is None
    kinds = [kind for chip in hardware.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds)) == len(hardware.BY_DEVICE_KIND)


@pytest.mark.parametrize(("chips", "dimensions", "shape"), [
    (1, 2, "1x1"), (4, 2, "2x2"), (8, 2, "2x4"), (16, 2, "4x4"), (32, 2, "4x8"), (256, 2, "16x16"),
    (1, 3, "1x1x1"), (4, 3, "2x2x1"), (8, 3, "2x2x2"), (16, 3, "2x2x4"), (32, 3, "2x4x4"),
    (64, 3, "4x4x4"), (256, 3, "4x8x8"), (4096, 3, "16x16x16"), (12, 2, None), (0, 3, None)])
def test_slice_shapes_as_google_sells_them(chips, dimensions, shape):
    assert hardware.torus(chips, dimensions) == shape


def test_a_tpu_row_is_named_once_and_each_size_is_a_slice():
    names = [name for chip in TPUS if chip.tpu for name in chip.tpu.names]
    assert len(names) == len(set(names)) == len(hardware.BY_TPU_NAME)
    for chip in filter(lambda chip: chip.tpu, TPUS):
        for size in chip.tpu.sizes:
            sides = hardware.torus(size // chip.tpu.cores, chip.tpu.dimensions).split("x")
            assert math.prod(map(int, sides)) * chip.tpu.cores == size
