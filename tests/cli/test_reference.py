"""`ddpm reference`: what it refuses before any work (the statistics: tests/evaluation/)."""

import pytest

from ddpm_jax.cli import common, main


@pytest.mark.parametrize("words, message", [
    ([], "--dataset is missing"), (["--dataset=digits"], "--out is missing"),
    (["--dataset=digits", "--out=x.txt"], "must end in .npz"),
    (["--dataset=digits", "--out={tmp}/there.npz"], "exists; name another file or add --overwrite"),
    (["--dataset=nothing", "--out={tmp}/x.npz"], "data.name 'nothing' is unknown"),
    (["--dataset=digits", "--split=valid", "--out={tmp}/x.npz"], "valid"),
    (["--dataset=digits", "--out={tmp}/x.npz", "--num=0"], "--num=0 must be at least 1"),
    (["--dataset=digits", "--out={tmp}/x.npz", "--features=-1"], "--features=-1 must be"),
    (["--dataset=digits", "--out={tmp}/x.npz", "--protocol=best"], "--protocol=best"),
    (["--dataset=digits", "--out={tmp}/x.npz", "--inception_weights=/absent.npz"],
     "Looked for, in order: --inception_weights /absent.npz")])
def test_refused_in_one_line_and_nothing_written(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "join", lambda config=None: (None, None))
    (tmp_path / "there.npz").write_bytes(b"kept")
    assert main.main(["reference", *(w.format(tmp=tmp_path) for w in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddpm: error: ") and error.count("\n") == 1 and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_bytes() == b"kept"
