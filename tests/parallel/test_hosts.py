"""What processes exchange: indices and rows of a batch."""

import jax
import numpy as np
import pytest

from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.runners import RUNNERS


@pytest.mark.parametrize("name", RUNNERS)
def test_indices_go_to_the_devices_and_come_back_in_order(name):
    runner = RUNNERS[name](jax.devices())
    double = runner.compile(lambda i: 2 * i, ("batch",), ("batch",))
    rows = hosts.all_rows(runner, double(hosts.local_indices(runner, 5, 11)))
    assert len(rows) % len(jax.devices()) == 0
    np.testing.assert_array_equal(rows[:11], 2 * np.arange(5, 16))
