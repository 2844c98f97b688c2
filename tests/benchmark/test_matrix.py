import copy
import json

import pytest

from ddpm_jax.benchmark import matrix
from ddpm_jax.errors import UserError

CELL = "train_step/digits/jit/float32/O0/cpu:2"


def made_up(cell=CELL, **changes):
    """A report with round numbers; `changes` by 'a.b.c'."""
    row = {
        "cell": cell, "jaxpr_equations": 1000, "stablehlo": {"instructions": 2000},
        "hlo": {"instructions": 5000, "kernels": 300, "bytes": 10**9, "copies": 40, "transposes": 0,
                "collectives": {"all-reduce": {"count": 2, "bytes": 10**6}}},
        "memory": {"peak": 10**8}, "executable_bytes": 10**6,
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


def test_products_and_names():
    cells = matrix.cells("programs")
    assert len(cells) == 4 * 3 * 2
    assert len({c.name for c in cells}) == len(cells)
    assert cells[0].name.startswith("train_step/digits/jit/float32/O0/cpu:8/")
    words = matrix.command(cells[0], "out")
    assert "--topology=cpu:8" in words and "--config.sampler.batch_size=64" in words
    assert "--optimization_level=O0" in words


def test_bad_tables(tmp_path):
    with pytest.raises(UserError, match="small, absent, programs"):
        matrix.cells("nothing")
    for text in ('{"runners": ["jit"]}', '{"runner": "jit"}', "[1]", "{"):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(UserError, match="matrix"):
            matrix.cells(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text('{"runner": ["jit", "pmap"], "level": [null]}')
    assert [c.name.split("/")[2:5] for c in matrix.cells(str(tmp_path / "m.json"))] == [
        ["jit", "float32", "default"], ["pmap", "float32", "default"]]
    (tmp_path / "rows.json").write_text('[{"no": 1}]')
    with pytest.raises(UserError, match="not a result"):
        matrix.read(tmp_path / "rows.json")


@pytest.mark.parametrize(("change", "name"), [
    ({"hlo__collectives": {"all-reduce": {"count": 3, "bytes": 10**6}}}, "collectives 2 -> 3"),
    ({"hlo__instructions": 5200}, "HLO instructions 5,000 -> 5,200"),
    ({"hlo__kernels": 310}, "kernels 300 -> 310"),
    ({"memory__peak": 2 * 10**8}, "peak memory"),
    ({"hlo__bytes": 1.1e9}, "bytes moved"),
    ({"seconds__compile__cpu_s": 60.0}, "compile CPU seconds 20 -> 60")])
def test_a_planted_regression_is_named(change, name):
    lines = matrix.regressions([made_up(**change)], [made_up()])
    assert len(lines) == 1 and name in lines[0] and lines[0].startswith(CELL)
    # The other way round it got better, and that is no regression.
    assert matrix.regressions([made_up()], [made_up(**change)]) == []


def test_what_does_not_count_as_a_regression():
    assert matrix.regressions([made_up()], [made_up()]) == []
    assert matrix.regressions([made_up(seconds__compile__cpu_s=40.0)], [made_up()]) == []
    assert matrix.regressions([made_up(warm=None)], [made_up()]) == []
    assert matrix.regressions([made_up("another")], []) == []


def test_a_cell_that_fails_or_is_gone():
    failed = {"cell": CELL, "error": "ddpm: error: no"}
    assert "fails now (ddpm: error: no)" in matrix.regressions([failed], [made_up()])[0]
    assert "not measured any more" in matrix.regressions([], [made_up()])[0]
    assert matrix.regressions([made_up()], [failed]) == []
    assert CELL in matrix.table([failed, made_up("other")])


def test_the_corpus_keeps_equal_modules_once(tmp_path):
    source = tmp_path / "cold"
    source.mkdir()
    (source / "stablehlo.mlir").write_text("module {}")
    found = {"fingerprint": "abc", "stablehlo": {}, "compiler_options": {}, "versions": {}}
    first, second = matrix.cells("small")[:2]
    for cell in (first, second, first):
        matrix._export(source, tmp_path / "corpus", cell, found)
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert [r["cell"] for r in manifest] == [second.name, first.name]
    assert sorted(p.name for p in (tmp_path / "corpus").iterdir()) == [
        "manifest.json", "train_step-abc.mlir"]
