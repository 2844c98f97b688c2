"""The estimate at measured rates against the measured rows in benchmarks/, without compiling."""

import json
import pathlib

import pytest

from ddpm_jax.compilation import hardware, rates, report

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
H100 = hardware.CHIPS["h100"]


def compiled(program):
    """The report of a program compiled ahead of time."""
    rows = json.loads((BENCHMARKS / "h100-estimate.json").read_text())
    [row] = [r for r in rows if r["cell"] == program]
    return row


def measured(row):
    [found, *_] = json.loads((BENCHMARKS / f"{row}.json").read_text())
    return found["seconds"]["median"]


@pytest.mark.parametrize(("program", "row", "units"), [
    ("train_step, batch 128", "h100-84ae50c/step128", 1),
    ("train_step, batch 512", "h100-84ae50c/step512", 1),
    ("sample, batch 512", "h100-84ae50c/sample512", 1000),
    ("train_step, batch 128, norm's kernels", "h100-2026-11-27/step128", 1),
    ("train_step, batch 512, norm's kernels", "h100-2026-11-27/step512", 1),
    ("sample, batch 512, norm's kernels", "h100-2026-11-27/sample512", 1000)])
def test_the_estimate_is_near_what_was_measured(program, row, units):
    """The rates are those of the first; the others are predictions."""
    stored = compiled(program)
    found = rates.estimate(H100, "bfloat16", stored["hlo"]["by_class"])
    assert found["seconds"] / units == pytest.approx(measured(row), rel=0.15)
    assert found["status"] == "estimated with measured rates" and found["commit"] == "84ae50c"
    assert found["seconds"] == pytest.approx(sum(found["by_class"].values()))
    # Python 3.12 and later sum floats more exactly.
    seconds = pytest.approx(found["seconds"], rel=1e-12)
    assert stored["at_measured_rates"] == {**found, "seconds": seconds, "all_reduce_s": 0.0}
    [line] = [x for x in report.render(stored).splitlines() if x.startswith("at measured rates")]
    assert "a call: convolution " in line and "commit 84ae50c, 2026-11-26]" in line


def test_rates_by_hand():
    rate = rates.Rate(kernels=10, us=1020.0, work=3e9, launch_us=2.0)
    assert rate.per_second == pytest.approx(3e12)
    assert rate.seconds(5, 6e9) == pytest.approx(10e-6 + 2e-3)
    # Twice the work in as many kernels: only what lies beyond the launches doubles.
    convolution = rates.H100.classes["convolution"]
    one, two = (rates.estimate(H100, "bfloat16", {"convolution": {
        "kernels": 1, "bytes_sliced": 1, "flops": flops}})["seconds"] for flops in (1e9, 2e9))
    assert two - one == pytest.approx(1e9 / convolution.per_second)
    assert 600e12 < convolution.per_second < 798e12  # the card's measured matrix rate


def test_what_has_no_rate():
    rows = {"elementwise": {"kernels": 1, "bytes_sliced": 1}}
    assert rates.estimate(H100, "float32", rows) is None
    assert rates.estimate(hardware.CHIPS["v3"], "bfloat16", rows) is None
    alone = rates.estimate(H100, "bfloat16", rows)["seconds"]
    also = rates.estimate(H100, "bfloat16", {
        **rows, "collective": {"kernels": 1, "bytes_sliced": 10**9}})
    assert also["seconds"] == alone
    new = rates.estimate(H100, "bfloat16", {"a class of its own": rows["elementwise"]})
    assert new["seconds"] == alone
