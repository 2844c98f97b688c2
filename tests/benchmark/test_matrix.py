import json

import pytest

from ddpm_jax.benchmark import matrix
from ddpm_jax.errors import UserError


def test_products_and_names():
    cells = matrix.cells("programs")
    assert len(cells) == 4 * 3 * 2
    assert len({c.name for c in cells}) == len(cells)
    assert cells[0].name.startswith("train_step/digits/jit/float32/O0/cpu:8/")
    words = matrix.command(cells[0], "out")
    assert "--topology=cpu:8" in words and "--config.sampler.batch_size=64" in words
    assert "--optimization_level=O0" in words
    settings = [c.settings for c in matrix.cells("cut") if c.topology == "h100:8"]
    assert len(settings) == 6 and settings[2] == (
        "train.clip_scope=global", "train.steps_per_dispatch=1", "parallel.shards=8",
        "parallel.cut=params")


def test_bad_tables(tmp_path):
    with pytest.raises(UserError, match="small, absent, programs, cut"):
        matrix.cells("nothing")
    for text in ('{"runners": ["jit"]}', '{"runner": "jit"}', "[1]", "{"):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(UserError, match="matrix"):
            matrix.cells(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text('{"runner": ["jit", "pmap"], "level": [null]}')
    assert [c.name.split("/")[2:5] for c in matrix.cells(str(tmp_path / "m.json"))] == [
        ["jit", "float32", "default"], ["pmap", "float32", "default"]]
    for text in ('[{"no": 1}]', '[{"cell": "c"}]', '[{"cell": "c", "jaxpr_equations": []}]', "[7]"):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(UserError, match="not a result"):
            matrix.read(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text('[{"cell": "c", "error": "no"}]')
    assert matrix.read(tmp_path / "rows.json") == [{"cell": "c", "error": "no"}]
    (tmp_path / "manifest.json").write_text('[{"name": "of another corpus"}]')
    with pytest.raises(UserError, match="export: .* is not one of"):
        matrix.run(matrix.cells("small"), export=tmp_path)


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
