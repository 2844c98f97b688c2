"""The paper's numbers hang together, and verdicts follow the bands."""

import itertools

import pytest

from ddpm_jax.configs import cifar10_improved, cifar10_table2
from ddpm_jax.reproduction import paper_results as paper
from ddpm_jax.reproduction.targets import TABLE_KEYS


def test_cells_are_those_of_the_configs():
    assert set(paper.CELLS) == {*cifar10_table2.CELLS, *cifar10_improved.CELLS}


def test_bands_hold_the_papers_value():
    for cell in paper.CELLS.values():
        assert cell.values.keys() == cell.bands.keys() and bool(cell.values) != cell.unstable
        for key, value in cell.values.items():
            assert paper.verdict(key, value, cell) == "PASS"
            assert paper.verdict(key, value * 1.2, cell) == "FAIL"
            assert paper.verdict(key, None, cell) == ""
    # published re-evaluations of the official weights: pass; without EMA: not
    best = paper.CELLS["eps_fixed_simple"]
    assert [paper.verdict("fid_train", v, best) for v in (3.212, 3.249, 12.3)] == [
        "PASS", "PASS", "FAIL"]


def test_bands_of_the_samplers_hold_what_was_published():
    """FIDs fall as calls rise, and the eta of less noise is better."""
    for chain in paper.CHAINS:
        assert chain.fids.keys() == chain.bands.keys()
        for calls, published in chain.fids.items():
            assert {paper.verdict(calls, v, chain) for v in published} <= {"PASS"}
        lowest = [min(v) for v in chain.fids.values() if v]
        assert lowest == sorted(lowest, reverse=True)
    for one, less in itertools.pairwise(paper.CHAINS[1:5]):
        assert all(one.fids[n] > less.fids[n] for n in (10, 20, 50, 100))


def test_table_4_ends_at_the_rate_and_distortion_of_the_text():
    steps, rate, rmse = paper.TABLE_4[0]
    assert (steps, round(rate, 2), round(rmse, 2)) == (1000, 1.78, 0.95)
    assert round(rate + 1.97, 2) == paper.SIMPLE["bpd_test"]
    assert [r for _, r, _ in paper.TABLE_4] == sorted((r for _, r, _ in paper.TABLE_4),
                                                      reverse=True)
    assert paper.rate_verdict(1.775, 0.96, rate, rmse) == "PASS"
    assert paper.rate_verdict(1.9, 0.95, rate, rmse) == "FAIL"
    assert paper.rate_verdict(1.775, 1.2, rate, rmse) == "FAIL"


def test_ours_takes_the_newest_step_and_names_fid_by_its_reference():
    def record(values, split=None):
        return {"values": values, "provenance": {"reference": {"split": split}} if split else {}}
    document = {
        "9": {"paper": {"ema a": record({"fid": 9.0}, "train")}},
        "10": {"paper": {"ema a": record({"fid": 3.0, "is_openai10": 9.4}, "train"),
                         "ema b": record({"fid": 5.0}, "test"),
                         "raw": record({"fid": 99.0}, "train"),
                         "ema c": record({"bpd_test": 3.7})},
               "monitor": {"ema": record({"fid": 1.0}, "train")}}}
    found = paper.ours(document, TABLE_KEYS)
    assert found == {"fid_train": 3.0, "fid_test": 5.0, "is": 9.4, "bpd_test": 3.7, "step": 10}
    assert paper.ours({}, TABLE_KEYS) == {}


@pytest.mark.parametrize("size", [32, 256])
def test_speed_is_the_papers(size):
    row = paper.V3_8[size]
    hours = 800_000 / row["steps_per_s"] / 3600
    assert (size, round(hours, 1)) in ((32, 10.6), (256, 101.0))
