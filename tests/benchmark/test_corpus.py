import json
import pathlib

import jax
import pytest
from tiny_run import FIELDS

from ddpm_jax.benchmark import corpus, outputs
from ddpm_jax.config import load_config
from ddpm_jax.errors import UserError

ENTRY = corpus.Entry("ddpm_tiny_flax_f32_bits_per_dim", "digits", "evaluate",
                     settings=corpus.ONE_STEP | FIELDS | {"sampler.batch_size": 2})


def test_what_changed_is_said(tmp_path):
    assert corpus.write(tmp_path, load_config, [ENTRY]) == [f"{ENTRY.name}: new"]
    artifact = (tmp_path / f"{ENTRY.name}.mlir.bc").read_bytes()
    text = (tmp_path / f"{ENTRY.name}.hlo").read_text()
    assert artifact[:4] == b"ML\xefR" and b".py" not in artifact
    assert text.startswith("HloModule")
    assert "metadata=" not in text and "constant({...})" not in text
    [line] = corpus.write(tmp_path, load_config, [ENTRY])
    assert "unchanged" in line
    other = ENTRY._replace(settings=ENTRY.settings | {"sampler.batch_size": 4})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{ENTRY.name}.mlir.bc.* with --overwrite") as caught:
        corpus.write(tmp_path, load_config, [other])
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    [line] = corpus.write(tmp_path, load_config, [other], texts=False, overwrite=True)
    assert "changed (made with jax" in line and f"{ENTRY.name}.mlir.bc" in line
    assert (tmp_path / f"{ENTRY.name}.hlo").read_text() == text

    names = outputs.xla_folder(tmp_path, tmp_path / "xla")
    assert sorted(names) == sorted(p.name for p in (tmp_path / "xla").iterdir())
    assert f'"{ENTRY.name}.hlo"' in (tmp_path / "xla/hlo_files.bzl").read_text()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="ddpm bench corpus"):
        corpus.read(tmp_path)
    (tmp_path / corpus.MANIFEST).write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(UserError, match="not a manifest"):
        corpus.read(tmp_path)


FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks/corpus"
COMMITTED = {r["name"]: r for r in corpus.read(FOLDER)}


@pytest.mark.parametrize("entry", corpus.ENTRIES, ids=lambda e: e.name)
def test_the_committed_corpus_is_that_of_the_table(entry):
    row = COMMITTED[entry.name]
    assert corpus.check(FOLDER, row)
    assert row["settings"] == entry.settings and row["targets"] == list(entry.targets)


@pytest.mark.skipif(jax.__version__ != COMMITTED[corpus.ENTRIES[0].name]["versions"]["jax"],
                    reason="the bytes are those of the JAX that wrote the corpus")
def test_the_committed_corpus_can_be_rebuilt():
    [entry] = [e for e in corpus.ENTRIES if e.name == "ddpm_digits_flax_f32_bits_per_dim"]
    found = corpus.digest(corpus.artifact(corpus.lower(entry, load_config(entry.config))))
    assert found == COMMITTED[entry.name]["files"][f"{entry.name}.mlir.bc"]["sha256"]


def test_names_tell_the_type_of_numbers():
    for entry in corpus.ENTRIES:
        dtype = entry.settings.get("model.dtype", "float32")
        assert f"_{ {'float32': 'f32', 'bfloat16': 'bf16'}[dtype] }_" in entry.name
