import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import jaxlib
import pytest

from ddpm_jax.benchmark import corpus, environments, history, history_page, outputs
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
        content = corpus.artifact(lowered)
        (folder / f"{name}.mlir.bc").write_bytes(content)
        rows.append({"name": name, "targets": ["cpu"],
                     "files": {f"{name}.mlir.bc": {"sha256": corpus.digest(content)}}})
    (folder / corpus.MANIFEST).write_text(json.dumps(rows))

    def install(python, target, packages, *, dependencies=False):
        if "jaxlib==9.9.9" in packages:
            raise UserError("cannot install jaxlib==9.9.9: no such release")
        pathlib.Path(target).mkdir(exist_ok=True)
        if any(p.startswith("jaxlib") for p in packages):
            (pathlib.Path(target) / "jaxlib").symlink_to(pathlib.Path(jaxlib.__file__).parent)

    monkeypatch.setattr(environments, "install", install)
    monkeypatch.setattr(environments, "listed", lambda python: ("0.4.33", "0.10.1", "9.9.9"))
    monkeypatch.setenv("XLA_FLAGS", "")
    return history.plan("bytes", spec="9.9.9,0.10.1", programs=PROGRAM, corpus_folder=folder,
                        targets="cpu", repetitions=1, python=sys.executable, timeout=60,
                        folder=tmp_path / "environments")


def test_rows_are_made_once(plan, tmp_path):
    file = tmp_path / "rows.jsonl"
    (plan.folder / ".release.of_a_killed_run.partial").mkdir(parents=True)
    rows = history.run(plan, file)
    assert rows == history.read(file)
    assert [(r["role"], r["release"], r["outcome"]) for r in rows] == [
        ("reference", "0.4.34", "ok"), ("measured", "0.10.1", "ok"), ("reference", "0.4.34", "ok"),
        ("reference", "0.4.34", "ok"), ("measured", "9.9.9", "not installed"),
        ("reference", "0.4.34", "ok")]
    assert "no such release" in rows[4]["message"]
    # Environments are gone but for what all share. A release that could not be had is tried again.
    assert [p.name for p in plan.folder.iterdir()] == ["needed"]
    [page, plot] = history_page.write(file)
    text = pathlib.Path(page).read_text()
    assert "0.10.1" in text and pathlib.Path(plot).exists()
    assert "Not compiled: square_f32 cpu on 9.9.9: not installed (cannot install" in text
    tried = history.run(plan, file)
    assert tried[:6] == rows and tried[7]["release"] == "9.9.9" and len(tried) == 9
    assert history.run(plan._replace(releases=("0.10.1",)), file) == tried
    # Killed while it wrote a row: that row, and no other, is made again.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][:20])
    assert history.read(file) == rows[:4]
    again = history.run(plan, file)
    assert again[:4] == rows[:4] and again[-2]["release"] == "9.9.9"
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert history.run(plan, tmp_path / "none.jsonl", seconds=-1) == []


def test_bad_input(plan, tmp_path):
    (tmp_path / "no_python").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "no_python").chmod(0o755)
    for keywords, message in ((dict(spec="x"), "not a release"), (dict(spec=","), "not a release"),
                              (dict(spec="0.10.1,9.9.8"), "no jaxlib 9.9.8 .* has 0.4.33, 0.10.1"),
                              (dict(spec="0.4.33"), "0.4.33 is older than 0.4.34"),
                              (dict(programs="y"), "programs: y is not known; known"),
                              (dict(python="no-such-python"), "not found"),
                              (dict(python=str(tmp_path / "no_python")), "is no Python")):
        with pytest.raises(UserError, match=message):
            history.plan("bytes", **{**dict(
                spec="0.10.1", programs="", corpus_folder=plan.corpus, targets="cpu",
                repetitions=1, python=None, timeout=1), **keywords})
    assert history.releases("all", "bytes", sys.executable) == ("0.10.1", "9.9.9")


def test_rows_that_are_none_are_named_and_kept(tmp_path):
    file, good = tmp_path / "rows", [json.dumps(row) for row in made_up({"0.9.0": [5.0]})]
    no_seconds = {k: v for k, v in json.loads(good[1]).items() if k != "compile"}
    for bad, reason in (("[1]", "list"), ("{}", "no 'role'"), ("7", "int"), ("\0", "Expecting"),
                        (json.dumps(no_seconds), "no 'compile'")):
        text = "\n".join([*good, bad, ""])
        file.write_text(text)
        with pytest.raises(UserError, match=f"line 4 is not a row of a history .*{reason}"):
            history.read(file)
        assert file.read_text() == text
    with pytest.raises(UserError, match="directory"):
        history.read(tmp_path)


def test_a_last_row_without_its_newline_is_kept(tmp_path):
    file, (first, second, third) = tmp_path / "rows", made_up({"0.9.0": [5.0]})
    file.write_text(json.dumps(first) + "\n" + json.dumps(second))
    rows = history.read(file)
    history._append(file, rows, third)
    assert history.read(file) == rows == [first, second, third]


def test_rows_of_other_bytes_are_not_mixed(plan, tmp_path):
    row = {**made_up({"0.9.0": [5.0]})[1], "program": PROGRAM, "sha256": "0123456789abcdef"}
    (tmp_path / "rows").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="rows of another square_f32.mlir.bc .sha256 0123456789ab"):
        history.run(plan, tmp_path / "rows")
    program = plan.corpus / f"{PROGRAM}.mlir.bc"
    program.write_bytes(program.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the file of manifest.json"):
        history.run(plan, tmp_path / "new")
    program.unlink()
    with pytest.raises(UserError, match=f"cannot read .*{program.name}"):
        history.run(plan, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not plan.folder.exists()


def test_a_shared_installation_that_was_cut_off_is_not_used(tmp_path, monkeypatch):
    def cut_off(python, folder, packages, *, dependencies=False):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(environments, "install", cut_off)
    with pytest.raises(KeyboardInterrupt):
        environments.jaxlib(sys.executable, "0.10.1", tmp_path / "x", tmp_path, ())
    assert list(tmp_path.iterdir()) == []


def test_the_lowest_release_is_that_of_the_project():
    text = (environments.ROOT / "setup.cfg").read_text()
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
            before, after = ({**common, **reference, "compile": {"cpu_s": factor * seconds}}
                             for seconds in (1.5, 2.5))
            rows += [before, {**common, "role": "measured", "release": release, "program": "p",
                              "repetition": repetition, "read": {"cpu_s": 0.0},
                              "compile": {"cpu_s": 2 * ratio * factor}, "instructions": 100,
                              "fusions": 5, "kernels": 7, "executable_bytes": 10**6}, after]
    return rows


RATIOS = {"0.9.0": [5.0, 5.2], "0.9.1": [10.5, 10.0], "0.10.0": [10.0, 10.4], "0.10.1": [4.0, 4.1]}


def test_ratios_do_not_depend_on_the_speed_of_the_machine():
    steady = history_page.points(made_up(RATIOS), "bytes")["p cpu"]
    assert [p.ratio for p in steady.values()] == pytest.approx([5.0, 10.0, 10.0, 4.0])
    assert list(steady) == ["0.9.0", "0.9.1", "0.10.0", "0.10.1"]  # not by the alphabet
    busy = history_page.points(made_up(RATIOS, speed=(3.0, 1.0)), "bytes")["p cpu"]
    assert [p.ratio for p in busy.values()] == pytest.approx([5.2, 10.0, 10.4, 4.1])
    # A reference that other work slowed down makes no release cheap, once it is repeated.
    rows = made_up({"0.9.0": [5.0, 5.0]})
    rows[0]["compile"]["cpu_s"] *= 3
    assert history_page.points(rows, "bytes")["p cpu"]["0.9.0"].ratio == pytest.approx(5.0)
    assert history_page.spread(made_up(RATIOS, speed=(3.0, 1.0))) == pytest.approx(5.0)
    # A run that was killed after its first reference, on a slower machine, is without effect.
    rows = made_up(RATIOS)
    killed = [{**rows[0], "compile": {"cpu_s": 100.0}}, *rows]
    assert history_page.points(killed, "bytes") == history_page.points(rows, "bytes")


def test_the_largest_steps_are_named(tmp_path):
    rows = made_up(RATIOS)
    steps = history_page.steps(history_page.points(rows, "bytes"))
    assert [(s.before, s.after) for s in steps] == [
        ("0.10.0", "0.10.1"), ("0.9.0", "0.9.1"), ("0.9.1", "0.10.0")]
    assert [s.times for s in steps[:2]] == pytest.approx([0.4, 2.0])
    for row in rows:
        if row["release"] == "0.9.1":  # a compiler that does not show its program
            row |= dict.fromkeys(("instructions", "fusions", "kernels"))
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    history_page.write(tmp_path / "h.jsonl")
    text = (tmp_path / "h.md").read_text()
    assert "| 0.9.0 -> **0.9.1** | p cpu | 5.00 -> 10.00 | 2.00 | 100 -> unknown | 7 -> " in text
    assert "| 0.10.0 -> **0.10.1** | p cpu | 10.00 -> 4.00 | 0.40 |" in text
    assert "0.9.1 -> **0.10.0**" not in text  # less than the two references differ by, 1.67
    for row in rows:
        row["compile"]["cpu_s"] *= 1.6 if row["release"] == "0.9.0" else 1  # 2.0 becomes 1.25
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    history_page.write(tmp_path / "h.jsonl")
    assert "0.9.0 -> **0.9.1**" not in (tmp_path / "h.md").read_text()
    [row] = outputs.github_action_of_history(rows, "bytes")
    assert row == {"name": "bytes: p cpu", "unit": "ratio to the reference", "value": 4.0,
                   "extra": "release 0.10.1"}
