import copy

import pytest

from ddpm_jax.benchmark import matrix, repeats

CELL = "train_step/digits/jit/float32/O0/cpu:2"


def made_up(cell=CELL, **changes):
    """A report with round numbers; `changes` by 'a.b.c'."""
    row = {
        "cell": cell, "jaxpr_equations": 1000, "stablehlo": {"instructions": 2000},
        "hlo": {"instructions": 5000, "kernels": 300, "bytes": 10**9, "copies": 40, "transposes": 0,
                "collectives": {"all-reduce": {"count": 2, "bytes": 10**6}}},
        "memory": {"peak": 10**8}, "executable_bytes": 10**6, "optimized": "a",
        "seconds": {"trace": {"wall_s": 1.0, "cpu_s": 1.0}, "lower": {"wall_s": 1.0, "cpu_s": 1.0},
                    "compile": {"wall_s": 10.0, "cpu_s": 20.0}},
        "warm": {"compile": {"wall_s": 1.0, "cpu_s": 1.0}}}
    row = copy.deepcopy(row)
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = row
        for parent in parents:
            at = at[parent]
        at[last] = value
    return row


@pytest.mark.parametrize(("change", "name"), [
    ({"hlo__collectives": {"all-reduce": {"count": 3, "bytes": 10**6}}}, "collectives 2 -> 3"),
    ({"hlo__instructions": 5200}, "HLO instructions 5,000 -> 5,200"),
    ({"hlo__kernels": 310}, "kernels 300 -> 310"),
    ({"memory__peak": 2 * 10**8}, "peak memory"),
    ({"hlo__bytes": 1.1e9}, "bytes moved"),
    ({"seconds__compile__cpu_s": 60.0}, "compile CPU seconds 20 -> 60")])
def test_a_planted_regression_is_named(change, name):
    lines = repeats.regressions([made_up(**change)], [made_up()])
    assert len(lines) == 1 and name in lines[0] and lines[0].startswith(CELL)
    # The other way round it got better, and that is no regression.
    assert repeats.regressions([made_up()], [made_up(**change)]) == []


def test_what_does_not_count_as_a_regression():
    assert repeats.regressions([made_up()], [made_up()]) == []
    assert repeats.regressions([made_up(seconds__compile__cpu_s=40.0)], [made_up()]) == []
    assert repeats.regressions([made_up(warm=None)], [made_up()]) == []
    assert repeats.regressions([made_up("another")], []) == []


def test_a_cell_that_fails_or_is_gone():
    failed = {"cell": CELL, "error": "ddpm: error: no"}
    assert "fails now (ddpm: error: no)" in repeats.regressions([failed], [made_up()])[0]
    assert "not measured any more" in repeats.regressions([], [made_up()])[0]
    assert repeats.regressions([made_up()], [failed]) == []
    assert CELL in matrix.table([failed, made_up("other")])


def test_ranges_of_several_processes():
    key = {"computation": "1", "compile_options": "2"}
    reports = [made_up(cache_key=key), made_up(cache_key=key, optimized="b", hlo__kernels=290),
               made_up(cache_key=key | {"computation": "3"}, seconds__trace__cpu_s=1.5)]
    found = repeats.ranges(reports)
    assert found["count"] == 3 and found["executables"] == {"a": 2, "b": 1}
    assert found["metrics"]["kernels"] == [290, 300]
    assert found["metrics"]["trace CPU seconds"] == [1.0, 1.5]
    assert found["cache_key"] == ["computation"]
    [first, *programs] = repeats.notes([{**reports[0], "repeats": found}])
    assert "3 processes, 2 different executables; kernels 290 to 300; trace CPU seconds 1 to 1.5" \
        in first and first.endswith("parts of the cache's key that differ: computation")
    assert len(programs) == 2
    assert "nothing differs" in repeats.notes([made_up(repeats=repeats.ranges(reports[:1]))])[0]


def test_seconds_are_judged_by_their_spread():
    """Without repeats a trace may double; with a spread of 1 % it may grow by 15 %, with one of
    10 % by 30 %."""
    def measured(low, high):
        row = made_up(seconds__trace__cpu_s=low)
        return {**row, "repeats": {"metrics": {"trace CPU seconds": [low, high]}}}

    assert repeats.limit(made_up(), made_up(), "trace CPU seconds") == 3.0
    for spread, most in ((1.01, 1.15), (1.1, 1.3)):
        old = measured(1.0, spread)
        assert repeats.limit(old, measured(1, 1), "trace CPU seconds") == pytest.approx(most)
        assert repeats.regressions([measured(most - 0.01, most)], [measured(1.0, spread)]) == [] \
            or spread < 1.05
        assert "trace CPU seconds" in repeats.regressions([measured(most + 0.01, most + 0.01)],
                                                          [old])[0]


def test_counts_within_their_range_are_no_regression():
    old = made_up(repeats={"metrics": {"kernels": [300, 330]}})
    assert repeats.regressions([made_up(hlo__kernels=330)], [old]) == []
    assert repeats.regressions([made_up(hlo__kernels=340)], [old])


def test_a_regression_names_the_pass():
    def with_passes(seconds, cpu):
        return made_up(seconds__compile__cpu_s=cpu, passes={
            "compile_wall_s": 10.0, "stages": {"HLO_PASSES": 5.0}, "passes": [
                {"name": "fusion", "seconds": seconds, "runs": 3, "share": seconds / 10},
                {"name": "dce", "seconds": 0.5, "runs": 9, "share": 0.05}]})

    [line] = repeats.regressions([with_passes(4.0, 60.0)], [with_passes(1.0, 20.0)])
    assert line.endswith("; the pass that grew most: fusion 1 -> 4 s")
    head, fusion, dce = repeats.notes([with_passes(4.0, 60.0)])
    assert "HLO passes 45% of 10.00 s, HLO_PASSES 5.00 s" in head
    assert fusion.split() == ["40.0%", "4000.0", "ms", "3", "x", "fusion"] and "dce" in dce


def test_a_warm_program_that_was_compiled_again_is_named():
    rows = [made_up(warm_cache="hit"), made_up("other", warm_cache="miss"), made_up("absent")]
    [line] = repeats.misses(rows)
    assert line.startswith("other: compiled again")
