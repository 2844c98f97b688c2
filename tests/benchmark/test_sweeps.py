import pytest

from ddpm_jax.benchmark import sweeps
from ddpm_jax.errors import UserError


@pytest.mark.parametrize("b", [-1.0, 0.0, 0.5, 2.0])
def test_the_exponent_of_a_power_law(b):
    x = [1, 2, 4, 8]
    assert sweeps.exponent(x, [3.0 * v**b for v in x]) == pytest.approx(b, abs=1e-12)


def test_no_exponent_without_values():
    assert sweeps.exponent([2, 2], [1, 3]) is None and sweeps.exponent([1, 2], [0, 3]) is None


def test_exponents_of_a_sweep():
    rows = [{"sweep": ["depth", v], "hlo": {"instructions": 10 * v}, "executable_bytes": None,
             "stablehlo": {"instructions": 7},
             "seconds": {s: {"cpu_s": float(v**2)} for s in sweeps.STAGES}} for v in (1, 2, 4)]
    head, [line] = sweeps.table([*rows, {"sweep": ["depth", 8], "why": "does not fit"}])
    assert dict(zip(head, line, strict=True)) == {
        "axis": "depth", "values": "1, 2, 4", "trace CPU-s": "2.00", "lower CPU-s": "2.00",
        "compile CPU-s": "2.00", "StableHLO": "0.00", "HLO": "1.00", "executable": "n/a"}


def test_an_unknown_axis():
    with pytest.raises(UserError, match="axes: hight is not known; known: batch"):
        sweeps.sweep(None, "cpu", "x", ["hight"])
