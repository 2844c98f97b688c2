"""With made-up Inception weights and tiny counts; beside torch-fidelity."""

import jax
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier, image_files, protocols, references
from ddpm_jax.evaluation.evaluate import check_options, evaluate_run
from ddpm_jax.evaluation.inception import network, weights
from ddpm_jax.evaluation.make_reference import make_reference
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.session import Session


@pytest.mark.slow
def test_reference_then_fid_is_the_formula_on_the_same_features(
        seeded_weights, tmp_path, pictures, one_device, evaluate_images):
    some = np.random.default_rng(2).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    # Half a second an image: 4 and 7 of those that the test itself passes through the network.
    of_real, of_fake = [0, 1, 2, 3, 1], [3, 4, 5, 6, 0, 1, 2, 6, 4, 4]
    real, fake = some[of_real], some[of_fake]
    out = tmp_path / "ref.npz"
    options = Options(metrics=("fid", "is", "kid", "pr"), reference=str(out), batch_size=3,
                      inception_weights=str(seeded_weights))
    make_reference(pictures(real), options, out, one_device(), num_features=10)
    assert not (tmp_path / "ref.npz.shards").exists()
    values, provenance = evaluate_images(fake, options, 5)

    run = jax.jit(network.features)
    params = weights.load(seeded_weights).params
    features = np.concatenate([np.asarray(run(params, x[None])) for x in some])
    a, b = (features[i].astype(np.float64) for i in (of_real, of_fake))
    # Covariances u'u and v'v: the root of their product has the singular values of uv'.
    u, v = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    gap = (np.square(a.mean(0) - b.mean(0)).sum() + np.square(u).sum() + np.square(v).sum()
           - 2 * np.linalg.svd(u @ v.T, compute_uv=False).sum())
    assert values["fid"] == pytest.approx(gap, rel=1e-4)
    assert "10 samples and 5 reference images" in values["fid_warning"]
    assert values["kid_subset_size"] == 5 and 0 <= values["precision"] <= 1
    assert values["is_openai10"] == pytest.approx(1, abs=1e-6)      # one image a split
    assert provenance["reference"]["sha256"] == references.identity(references.load(out))
    assert provenance["protocol"] == "paper" and provenance["precision"] == "highest"

    with pytest.raises(UserError, match="protocol is .*--force"):
        evaluate_images(fake, options._replace(protocol="monitor"))
    with pytest.raises(UserError, match=r"image_shape is \(8, 8, 3\)"):
        evaluate_images(np.zeros((12, 16, 16, 3), np.uint8), options)
    _, forced = evaluate_images(np.zeros((2, 16, 16, 3), np.uint8),
                                options._replace(metrics=("kid",), force=True), 2)
    assert "forced: image_shape" in forced["warnings"][0]
    with pytest.raises(UserError, match="--num=11: there are only 10"):
        evaluate_images(fake, options._replace(num=11))


@pytest.mark.slow
def test_nan_stops_before_a_metric_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_epochs", lambda n: 1)
    model, session = tiny(1, tmp_path / "e")
    model = model._replace(params=jax.tree.map(lambda x: x * np.nan, model.params))
    options = Options(num=4, metrics=("offline",), classifier_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match="samples 0: .* is not finite"):
        evaluate_run(model, options, session)
    assert not list((tmp_path / "e").rglob("shard-*"))


@pytest.mark.parametrize("changes, message", [
    ({"metrics": ("fid2",)}, "--metrics=fid2 is not known; known: bpd, fid, is"),
    ({"metrics": ()}, "--metrics is empty"), ({"protocol": "x"}, "--protocol=x"),
    ({"quantise": "up"}, "--quantise=up"), ({"num": 0}, "--num=0 must be at least 1"),
    ({"seed": -1}, "--seed=-1"), ({"metrics": ("is",), "inception_weights": "/absent"},
                                  "Inception's weights are needed.*/absent"),
])
def test_bad_options_are_one_line(changes, message, evaluate_images):
    images = np.zeros((12, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=message):
        evaluate_images(images, Options()._replace(**changes))


def test_fid_without_a_reference_says_how_to_make_one(seeded_weights, evaluate_images):
    options = Options(metrics=("fid",), inception_weights=str(seeded_weights))
    with pytest.raises(UserError, match="--reference=FILE is missing.*ddpm reference"):
        evaluate_images(np.zeros((2, 8, 8, 3), np.uint8), options)


def small_reference(path, **arrays):
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048), **arrays)
    return str(path)


@pytest.mark.parametrize("metric, num, message", [
    ("is", 9, "--num=9: is needs 10 images or more"), ("fid", 1, "fid needs 2"),
    ("pr", 3, "pr needs 4"), ("kid", 1, "kid needs 2")])
def test_too_few_images_are_refused_before_weights_are_read(metric, num, message, evaluate_images):
    options = Options(metrics=(metric,), inception_weights="/absent")
    with pytest.raises(UserError, match=message):
        evaluate_images(np.zeros((num, 8, 8, 3), np.uint8), options)


def test_a_reference_without_enough_features_is_refused_before(
        seeded_weights, tmp_path, evaluate_images):
    options = Options(metrics=("kid",), inception_weights=str(seeded_weights),
                      reference=small_reference(tmp_path / "a.npz"))
    images = np.zeros((12, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="kid needs the reference's features.*--features=10000"):
        evaluate_images(images, options)
    few = small_reference(tmp_path / "b.npz", features=np.zeros((3, 2048), np.float32))
    with pytest.raises(UserError, match="pr needs the features of 4 real images .* has 3"):
        evaluate_images(images, options._replace(metrics=("pr",), reference=few))


class CollectedError(Exception):
    """The evaluation came as far as its first collection."""


@pytest.mark.parametrize("metrics, opens", [
    (("fid",), False), (("is",), False), (("bpd",), True), (("fid", "nn"), True)])
def test_data_are_opened_only_for_metrics_of_real_images(
        metrics, opens, tiny, seeded_weights, tmp_path, monkeypatch):
    def collect(*args, **kwargs):
        raise CollectedError

    monkeypatch.setattr(Session, "collect", collect)
    model, session = tiny(**{"data.name": "folder", "data.dir": str(tmp_path / "absent")})
    options = Options(metrics=metrics, inception_weights=str(seeded_weights), force=True,
                      reference=small_reference(tmp_path / "r.npz"))
    with pytest.raises(UserError if opens else CollectedError):
        evaluate_run(model, options, session)


def test_every_listed_split_has_its_bits_per_dim(tiny, tmp_path):
    from PIL import Image
    for split in ("train", "test", "validation"):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(folder / f"{i}.png")
    fields = {"data.name": "folder", "data.dir": str(tmp_path)}
    options = Options(metrics=("bpd",), splits=("validation",), batch_size=2)
    model, session = tiny(**fields)
    ((_, values, facts),), _ = evaluate_run(model, options, session)
    assert values["bpd_validation"] > 0 and facts["images"]["validation"]["n"] == 3
    assert "bpd_train" not in values and "bpd_test" not in values
    with pytest.raises(UserError, match="--splits=val: folder has no split 'val'; it has train"):
        evaluate_run(model, options._replace(splits=("val",)), session)
    # A split that cannot be read is an error, also where it was not asked for by name.
    for file in (tmp_path / "test" / "a").iterdir():
        file.write_bytes(b"damaged")
    model, session = tiny(**fields)
    with pytest.raises(UserError, match="not a readable image"):
        evaluate_run(model, options._replace(splits=None), session)


def test_every_protocol_is_described_by_what_references_store():
    for name in protocols.PROTOCOLS:
        assert check_options(Options(protocol=name)).name == name
    assert check_options(Options(quantise="truncate")).quantise == "truncate"


# --- beside torch-fidelity -------------------------------------------------------------------

def stub_torchvision(monkeypatch):
    """torch-fidelity imports torchvision, which does not import beside PyTorch's CPU build; what
    is used here (network, FID, IS) needs nothing of it."""
    import sys
    import types

    class Anything(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional",
                 "torchvision.models", "torchvision.datasets"):
        module = Anything(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["torchvision"].__version__ = "0.21.0"


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_fid_and_is_of_the_same_pngs_are_torch_fidelitys(
        seeded_weights, tmp_path, monkeypatch, pictures, one_device, evaluate_images):
    """Its own network (TF1 grid, bias-free logits), FID and IS on the same files and weights.

    By hand, with the real weights and torchvision:
    fidelity --isc --fid --samples-shuffle off --input1 A --input2 B
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    stub_torchvision(monkeypatch)
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from PIL import Image
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    state = {k: torch.from_numpy(np.array(v)) for k, v in np.load(seeded_weights).items()
             if k in network.state_shapes()}
    torch.save(state, tmp_path / "w.pth")
    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:32, 0:32] / 31
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for i in range(12):
            a, b, c = rng.random(3) * 9
            wave = np.stack([np.sin(a * x + b * y), np.cos(b * x - c * y), np.sin(c * x * y)], -1)
            image = np.clip(127 + 100 * wave + 15 * rng.standard_normal((32, 32, 3)), 0, 255)
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / name / f"{i:02d}.png")

    pngs = {n: image_files.open_images(tmp_path / n) for n in ("real", "fake")}
    batches = {n: np.stack([pngs[n].read(i) for i in range(count)])
               for n, count in (("real", 4), ("fake", 12))}

    def theirs(*names):
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(tmp_path / "w.pth"))
        with torch.no_grad():
            return {n: network(torch.from_numpy(batches[n]).permute(0, 3, 1, 2)) for n in names}

    # Features of made-up weights are nearly the same for all images: a last layer that looks at
    # what differs makes classes, and an inception score, of them.
    pool_3 = theirs("fake")["fake"][0]
    directions = torch.linalg.svd(pool_3 - pool_3.mean(0), full_matrices=False)
    state["fc.weight"] = (16 / directions.S[0]) * (
        torch.randn(1008, 12, generator=torch.Generator().manual_seed(0)) @ directions.Vh)
    torch.save(state, tmp_path / "w.pth")
    found = theirs("real", "fake")
    their_fid = fid_statistics_to_metric(*(fid_features_to_statistics(found[n][0])
                                           for n in ("fake", "real")), False)
    their_is = isc_features_to_metric(found["fake"][1], splits=10, shuffle=False)

    out = tmp_path / "ref.npz"
    options = Options(metrics=("fid", "is"), reference=str(out), batch_size=2,
                      inception_weights=str(tmp_path / "w.pth"), allow_unknown_weights=True)
    make_reference(pictures(batches["real"]), options, out, one_device(), num_features=0)
    ours, _ = evaluate_images(batches["fake"], options, 2)
    assert ours["fid"] == pytest.approx(their_fid["frechet_inception_distance"], rel=1e-3)
    assert their_is["inception_score_mean"] > 1.04
    assert ours["is_openai10"] == pytest.approx(their_is["inception_score_mean"], rel=1e-3)
    assert ours["is_openai10_std"] == pytest.approx(their_is["inception_score_std"], rel=1e-3)
