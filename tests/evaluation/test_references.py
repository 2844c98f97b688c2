"""Round trip, foreign files, and what may not be mixed."""

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import references


def reference(**changes):
    rng = np.random.default_rng(0)
    facts = {"mu": rng.random(2048), "sigma": np.eye(2048), "n": 50_000, "dataset": "cifar10",
             "split": "train", "protocol": "resize=tf1", "weights_sha256": "ab",
             "images_sha256": "cd", "image_shape": (32, 32, 3),
             "features": rng.random((5, 2048), np.float32), "versions": "x"}
    return references.Reference(**facts | changes)


def test_round_trip(tmp_path):
    path = tmp_path / "r.npz"
    references.save(path, reference())
    found = references.load(path)
    for name, value in reference()._asdict().items():
        if name != "path":
            np.testing.assert_array_equal(getattr(found, name), value)
    assert references.identity(found) == references.identity(reference())
    assert references.identity(found) != references.identity(reference(mu=np.zeros(2048)))
    with pytest.raises(UserError, match="exists"):
        references.save(path, reference())
    references.save(path, reference(n=3), overwrite=True)
    assert references.load(path).n == 3


def test_matching_facts_pass_without_a_word():
    assert references.check(reference(), protocol="resize=tf1", weights_sha256="ab",
                            dataset="cifar10", image_shape=(32, 32, 3), n=None) == []


@pytest.mark.parametrize("expected", [
    {"protocol": "resize=half-pixel"}, {"weights_sha256": "ef"}, {"dataset": "digits"},
    {"image_shape": (64, 64, 3)}, {"n": 49_920}, {"split": "test"}])
def test_a_difference_is_refused_and_named(expected):
    name, = expected
    with pytest.raises(UserError, match=f"{name} is .*--force"):
        references.check(reference(), **expected)
    assert references.check(reference(), force=True, **expected)[0].startswith(f"forced: {name}")


def test_foreign_statistics_load_with_a_warning(tmp_path):
    np.savez(tmp_path / "ttur.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    found = references.load(tmp_path / "ttur.npz")
    assert found.protocol is None and found.n is None
    warning, = references.check(found, protocol="resize=tf1", dataset="cifar10")
    assert "unknown protocol" in warning


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(3)}, "no sigma"), ({"x": np.zeros(3)}, "no mu and no sigma"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit"),
    ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite")])
def test_other_files_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        references.load(tmp_path / "x.npz")
    with pytest.raises(UserError, match="2048"):
        references.check(references.Reference(np.zeros(3), np.eye(3)))


def test_text_and_pickles_are_refused(tmp_path):
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(UserError, match="not a readable"):
        references.load(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", mu=np.array([{}], object), sigma=np.eye(1))
    with pytest.raises(UserError, match="not a readable"):
        references.load(tmp_path / "y.npz")
