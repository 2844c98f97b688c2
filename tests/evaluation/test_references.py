"""Round trip, foreign files, and what may not be mixed."""

import os
import pickle
import zipfile

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


# ---- files of other tools ----


def statistics():
    rng = np.random.default_rng(1)
    return rng.random(2048), np.diag(rng.random(2048))


def ttur(path, mu, sigma):
    np.savez(path.with_suffix(".npz"), mu=mu, sigma=sigma)
    return path.with_suffix(".npz")


def short_names(path, mu, sigma):
    np.savez_compressed(path.with_suffix(".npz"), m=mu[None].astype(np.float32), s=sigma)
    return path.with_suffix(".npz")


def adm(path, mu, sigma):
    np.savez(path.with_suffix(".npz"), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma,
             arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    return path.with_suffix(".npz")


def dict_in_npy(path, mu, sigma):
    np.save(path.with_suffix(".npy"), {"mu": mu, "sigma": sigma}, allow_pickle=True)
    return path.with_suffix(".npy")


def edm2(path, mu, sigma):
    path.with_suffix(".pkl").write_bytes(pickle.dumps(
        {"fid": {"mu": mu, "sigma": sigma},
         "fd_dinov2": {"mu": mu[:9], "sigma": sigma[:9, :9]}}, 4))
    return path.with_suffix(".pkl")


def torch_fidelity(path, mu, sigma):
    torch = pytest.importorskip("torch")
    torch.save({"mu": mu, "sigma": sigma}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def tensors(path, mu, sigma):
    torch = pytest.importorskip("torch")
    torch.save({"mu": torch.from_numpy(mu), "sigma": torch.from_numpy(sigma)},
               path.with_suffix(".pth"))
    return path.with_suffix(".pth")


@pytest.mark.parametrize("write", [
    ttur, short_names, adm, dict_in_npy, edm2, pytest.param(torch_fidelity, marks=pytest.mark.peer),
    pytest.param(tensors, marks=pytest.mark.peer)])
def test_files_of_other_tools(write, tmp_path):
    mu, sigma = statistics()
    found = references.load(write(tmp_path / "x", mu, sigma))
    np.testing.assert_allclose(found.mu, mu, rtol=1e-6)
    np.testing.assert_array_equal(found.sigma, sigma)
    assert found.protocol is None and found.n is None and found.features is None


def test_features_give_the_statistics(tmp_path):
    pool_3 = np.random.default_rng(0).random((5, 2048), np.float32)
    np.savez(tmp_path / "x.npz", pool_3=pool_3)
    found = references.load(tmp_path / "x.npz")
    np.testing.assert_allclose(found.sigma, np.cov(pool_3.astype(np.float64), rowvar=False),
                               atol=1e-12)
    assert found.n == 5 and found.features.shape == (5, 2048)


def test_a_file_of_another_layout_shows_its_names(tmp_path):
    np.savez(tmp_path / "x.npz", mean=np.zeros(3), cov=np.eye(3))
    with pytest.raises(UserError, match=r"no mu and no sigma \(it has mean, cov\)"):
        references.load(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match="no mapping with mu and sigma"):
        references.load(tmp_path / "x.npy")


def test_a_folder_names_the_command(tmp_path):
    with pytest.raises(UserError, match=f"ddpm reference --dataset=folder --data_dir={tmp_path}"):
        references.load(tmp_path)


@pytest.mark.parametrize("ending", [".pkl", ".npy", ".pt"])
def test_code_in_a_reference_is_refused_and_not_run(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Exploit:
        def __reduce__(self):
            return os.system, ("touch EXECUTED",)

    file, value = tmp_path / f"x{ending}", {"mu": Exploit(), "sigma": 1}
    if ending == ".npy":
        np.save(file, value, allow_pickle=True)
    elif ending == ".pkl":
        file.write_bytes(pickle.dumps(value))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value, 2))
    with pytest.raises(UserError, match=r"refused.*system"):
        references.load(file)
    assert not (tmp_path / "EXECUTED").exists()
