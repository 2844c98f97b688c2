"""A run, half-drawn samples and a half-done evaluation that the code of commit 84ae50c left behind
(golden/make_workdir.py): still opened, resumed, sampled from, evaluated and finished."""

import json
import pathlib
import tarfile

import numpy as np
import pytest
from tiny_run import Stop, Watchdog

from ddpm_jax import checkpoints
from ddpm_jax import sample as sampling
from ddpm_jax import train as training
from ddpm_jax.config import from_json
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect, features, measures
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.session import session_of
from ddpm_jax.run_log import read_metrics

GOLDEN = pathlib.Path(__file__).parent / "golden" / "workdir-84ae50c"


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "workdir.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def drawn(folder):
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"]


@pytest.mark.parametrize("name, chosen", [("all", {}), ("raw", {"ema": False, "seed": 1})])
def test_it_draws_the_same_images(unpacked, expected, tmp_path, name, chosen):
    assert sampling.sample(
        unpacked / "run", tmp_path / "out", num=11, step=12, batch_size=8, **chosen)
    np.testing.assert_array_equal(drawn(tmp_path / "out"), expected[name])


def test_half_drawn_samples_are_finished(unpacked, expected):
    half = unpacked / "half"
    with pytest.raises(UserError, match="another request .workdir: '/tmp/golden-84ae50c/run' -> "):
        sampling.sample(unpacked / "run", half, num=11, step=12, batch_size=8)
    request = json.loads((half / "request.json").read_text())
    request["workdir"] = str(unpacked / "run")  # where it was drawn from, were it not moved
    (half / "request.json").write_text(json.dumps(request))
    shard = half / "shards" / "00000.npy"
    np.save(shard, np.load(shard) // 2)  # shows that the shard is used
    with pytest.raises(UserError, match="another request .num: 11 -> 12"):
        sampling.sample(unpacked / "run", half, num=12, step=12, batch_size=8)
    assert sampling.sample(unpacked / "run", half, num=11, step=12, batch_size=8)
    np.testing.assert_array_equal(drawn(half)[:8], expected["all"][:8] // 2)
    np.testing.assert_array_equal(drawn(half)[8:], expected["all"][8:])
    assert not (half / "shards").exists()


def test_the_bound_of_its_first_images_is_what_it_was(unpacked, expected):
    """An evaluation takes other images where it takes 24 now (evaluation/subset.py)."""
    exp, params, _, facts = sampling.load_run(unpacked / "run", step=12)
    session = session_of(exp)
    bound = features.of_bound(session, Model(exp, params, facts), session.sources["train"], 0, 8)
    found = measures.likelihood(collect.collect(bound, num=24, batch=8))
    assert found["bpd"] == pytest.approx(expected["bpd_train"].item(), rel=1e-6)


def test_it_resumes(unpacked, expected, capsys):
    folder = unpacked / "run"
    store = checkpoints.Checkpoints(folder, best="bpd_test")
    assert store.steps() == [4, 12] and sorted(store.scores) == [4, 8, 12]
    store.close()
    config = from_json(json.loads((folder / "config.json").read_text()))
    config.train.steps = 16
    assert training.train(config, folder, stop=Stop(), watchdog=Watchdog())
    assert f"resuming {folder} from step 12" in capsys.readouterr().err
    rows = read_metrics(folder / "metrics.jsonl")
    assert sorted({row["step"] for row in rows}) == [*range(2, 17, 2)]
    assert [r["loss"] for r in rows if r["step"] > 12] == pytest.approx(expected["losses"].tolist())
    config.model.ch = 8
    with pytest.raises(UserError, match="model.ch: 4 -> 8"):
        training.train(config, folder, stop=Stop(), watchdog=Watchdog())
