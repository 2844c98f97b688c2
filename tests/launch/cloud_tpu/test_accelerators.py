import math
import subprocess
import sys

import pytest
from cloud_tpu import REPO, accelerators


@pytest.mark.parametrize("name, expected", [
    ("v2-8", (4, 1)), ("v3-32", (16, 4)), ("v4-16", (8, 2)), ("v5litepod-8", (8, 1)),
    ("v5litepod-16", (16, 4)), ("v5p-16", (8, 2)), ("v6e-256", (256, 64)), ("tpu7x-8", (4, 1))])
def test_accelerator_names_count_cores_or_chips(name, expected):
    piece = accelerators.parse_accelerator(name)
    assert (piece.chips, piece.hosts) == expected


def test_topologies_multiply_to_the_chips():
    for family, row in accelerators.TPUS.items():
        for size in row.sizes:
            piece = accelerators.parse_accelerator(f"{family}-{size}")
            assert math.prod(map(int, piece.topology.split("x"))) == piece.chips


def test_the_table_is_read_without_the_package_and_without_jax():
    program = (f"import sys; sys.path.insert(0, {str(REPO / 'launch')!r})\n"
               "from cloud_tpu import accelerators, __main__\n"
               "assert accelerators.parse_accelerator('v6e-16').hosts == 4\n"
               "assert not {'jax', 'numpy', 'ddpm_jax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
