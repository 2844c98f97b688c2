import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import jaxlib
import pytest

from ddpm_jax.benchmark import corpus, history, history_page, outputs
from ddpm_jax.errors import UserError

PROGRAM = "square_f32"


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Two releases of one tiny program; what is installed is this environment's jaxlib."""
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for name in (PROGRAM, history.REFERENCE_PROGRAM):
        (folder / f"{name}.mlir.bc").write_bytes(corpus.artifact(lowered))
        rows.append({"name": name, "files": {}, "targets": ["cpu"]})
    (folder / corpus.MANIFEST).write_text(json.dumps(rows))

    def install(python, target, packages, *, dependencies=False):
        if "jaxlib==9.9.9" in packages:
            raise UserError("cannot install jaxlib==9.9.9: no such release")
        pathlib.Path(target).mkdir(exist_ok=True)
        if any(p.startswith("jaxlib") for p in packages):
            (pathlib.Path(target) / "jaxlib").symlink_to(pathlib.Path(jaxlib.__file__).parent)

    monkeypatch.setattr(history, "install", install)
    monkeypatch.setenv("XLA_FLAGS", "")
    return history.plan("bytes", spec="9.9.9,0.10.1", programs=PROGRAM, corpus_folder=folder,
                        targets="cpu", repetitions=1, python=sys.executable, timeout=60,
                        folder=tmp_path / "environments")


def test_rows_are_made_once(plan, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = history.run(plan, file)
    assert rows == history.read(file)
    assert [(r["role"], r["release"], r["outcome"]) for r in rows] == [
        ("reference", "0.4.34", "ok"), ("measured", "0.10.1", "ok"), ("reference", "0.4.34", "ok"),
        ("reference", "0.4.34", "ok"), ("measured", "9.9.9", "error"),
        ("reference", "0.4.34", "ok")]
    assert "no such release" in rows[4]["message"]
    # Environments are gone but for what all share; nothing is left to do.
    assert [p.name for p in plan.folder.iterdir()] == ["needed"]
    assert history.run(plan, file) == rows
    # Killed while it wrote a row: that row, and no other, is made again.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:20])
    assert history.read(file) == rows[:4]
    again = history.run(plan, file)
    assert again[:4] == rows[:4] and again[-2]["release"] == "9.9.9"
    assert all(json.loads(line) for line in file.read_text().splitlines())
    [page, plot] = history_page.write(file)
    text = pathlib.Path(page).read_text()
    assert "0.10.1" in text and "9.9.9: error" in text and pathlib.Path(plot).exists()
    assert history.run(plan, tmp_path / "none.jsonl", seconds=-1) == []


def test_bad_input(plan, tmp_path):
    for keywords, message in ((dict(spec="x"), "not a release"), (dict(spec=","), "not a release"),
                              (dict(programs="y"), "programs: y is not known; known"),
                              (dict(python="no-such-python"), "not found")):
        with pytest.raises(UserError, match=message):
            history.plan("bytes", **{**dict(
                spec="0.10.1", programs="", corpus_folder=plan.corpus, targets="cpu",
                repetitions=1, python=None, timeout=1), **keywords})
    (tmp_path / "rows").write_text("[1]\n{}\n")
    with pytest.raises(UserError, match="line 1"):
        history.read(tmp_path / "rows")


def test_the_lowest_release_is_that_of_the_project():
    text = (history.ROOT / "setup.cfg").read_text()
    assert f"jax>={'.'.join(map(str, history.OLDEST_SUPPORTED))}," in text


def made_up(ratios, speed=(1.0, 1.0)):
    """Rows of one program on a machine whose speed changes: {release: [ratio of a repetition]}."""
    rows = []
    for release, values in ratios.items():
        for repetition, ratio in enumerate(values):
            batch, factor = f"bytes/{release}/{repetition}", speed[repetition % len(speed)]
            common = {"kind": "bytes", "batch": batch, "target": "cpu", "outcome": "ok"}
            reference = {"role": "reference", "release": "0.4.34", "program": "r", "repetition": 0,
                         "read": {"cpu_s": 0.0}}
            rows += [{**common, **reference, "compile": {"cpu_s": factor * seconds}}
                     for seconds in (1.5, 2.5)]
            rows.append({**common, "role": "measured", "release": release, "program": "p",
                         "repetition": repetition, "read": {"cpu_s": 0.0},
                         "compile": {"cpu_s": 2 * ratio * factor}, "instructions": 100,
                         "fusions": 5, "kernels": 7, "executable_bytes": 10**6})
    return rows


RATIOS = {"0.9.0": [5.0, 5.2], "0.9.1": [10.5, 10.0], "0.10.0": [10.0, 10.4], "0.10.1": [4.0, 4.1]}


def test_ratios_do_not_depend_on_the_speed_of_the_machine():
    steady = history_page.points(made_up(RATIOS), "bytes")["p cpu"]
    assert [p.ratio for p in steady.values()] == pytest.approx([5.0, 10.0, 10.0, 4.0])
    assert list(steady) == ["0.9.0", "0.9.1", "0.10.0", "0.10.1"]  # not by the alphabet
    busy = history_page.points(made_up(RATIOS, speed=(3.0, 1.0)), "bytes")["p cpu"]
    assert [p.ratio for p in busy.values()] == pytest.approx([p.ratio for p in steady.values()])
    assert history_page.spread(made_up(RATIOS, speed=(3.0, 1.0))) == pytest.approx(3.0)


def test_the_largest_steps_are_named(tmp_path):
    rows = made_up(RATIOS)
    steps = history_page.steps(history_page.points(rows, "bytes"))
    assert [(s.before, s.after) for s in steps] == [
        ("0.10.0", "0.10.1"), ("0.9.0", "0.9.1"), ("0.9.1", "0.10.0")]
    assert [s.times for s in steps[:2]] == pytest.approx([0.4, 2.0])
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    history_page.write(tmp_path / "h.jsonl")
    text = (tmp_path / "h.md").read_text()
    assert "| 0.9.0 -> **0.9.1** | p cpu | 5.00 -> 10.00 | 2.00 |" in text
    assert "| 0.10.0 -> **0.10.1** | p cpu | 10.00 -> 4.00 | 0.40 |" in text
    [row] = outputs.github_action_of_history(rows, "bytes")
    assert row == {"name": "bytes: p cpu", "unit": "ratio to the reference", "value": 4.0,
                   "extra": "release 0.10.1"}
