"""Arrays that stay in their file."""

import numpy as np

from ddpm_jax.formats.lazy import Lazy, bfloat16_to_float32, load, map_bytes


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.array([0.0, -1.0, 3.140625, 1e30, np.inf], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(bfloat16_to_float32(bits), exact)
    assert bfloat16_to_float32(np.array([0x4049], np.uint16))[0] == 3.140625


def test_load_reads_lazy_and_passes_arrays(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(np.arange(10, dtype="<f4").tobytes())
    lazy = Lazy((3,), np.dtype("<f4"), lambda: np.array(map_bytes(path, 8, "<f4", 3)))
    np.testing.assert_array_equal(load(lazy), [2.0, 3.0, 4.0])
    np.testing.assert_array_equal(load([1, 2]), [1, 2])
    assert map_bytes(path, 40, "<f4", 0).shape == (0,)
