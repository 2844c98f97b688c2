"""Measuring: closed forms with an exact denoiser, and the same numbers on any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from ddpm_jax import experiment, programs
from ddpm_jax.config import load_config
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect, extract, measures, protocols, references, small_cnn
from ddpm_jax.evaluation.evaluate import check_options, evaluate_images, evaluate_run
from ddpm_jax.evaluation.features import Subject, bound_draws, image_draws, model_draws
from ddpm_jax.evaluation.inception import network, weights
from ddpm_jax.evaluation.make_reference import make_reference
from ddpm_jax.evaluation.monitor import periodic
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.records import write_records
from ddpm_jax.parallel.runners import RUNNERS

T = 6


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread():
    """OpenBLAS's threads wait for each other in a loop: tenfold slower where tests share cores."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def tiny_config(**fields):
    config = load_config("digits")
    config.update_from_flattened_dict({
        "model.ch": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1,
        "model.attn_resolutions": (), "diffusion.num_timesteps": T,
        "diffusion.schedule.beta_end": 0.9, "train.batch_size": 8,
        "train.clip_replicas": 8, "sampler.batch_size": 24,
        "eval.num": 30, "eval.bpd_num": 20, **fields})
    return config


def tiny(devices=1, **fields):
    """-> (experiment, untrained weights that are not the ones at zero) on some devices."""
    exp = experiment.build(tiny_config(**fields), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32),
                          exp.abstract_state.params)
    return exp, exp.runner.put("replicated", params)


# --- closed forms ----------------------------------------------------------------------------

SPREAD = 0.25


class ExactDenoiser:
    """E[eps | x_t] for pixels that are N(0, SPREAD^2), independent."""

    dtype = jnp.float32

    def __init__(self, schedule):
        self.schedule = schedule

    def apply(self, variables, x_t, t):
        del variables
        a = jnp.asarray(self.schedule.alphas_cumprod)[t][:, None, None, None]
        x_start = SPREAD ** 2 * jnp.sqrt(a) / (SPREAD ** 2 * a + 1 - a) * x_t
        return (x_t - jnp.sqrt(a) * x_start) / jnp.sqrt(1 - a)


@pytest.fixture(scope="module")
def gaussian_bound():
    """(measured, exp, betas) of the bound of 768 Gaussian pictures, 12 x 12."""
    exp, _ = tiny(8, **{"diffusion.num_timesteps": 30, "diffusion.schedule.beta_end": 0.3,
                        "diffusion.variance": "fixed_small"})
    exp = exp._replace(model=ExactDenoiser(exp.schedule), image_shape=(12, 12, 1))
    pixels = np.random.default_rng(0).standard_normal((768, 12, 12, 1)) * SPREAD
    images = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    sums = collect.collect(bound_draws(exp, {}, images, 3, 256, {}), num=768, batch=256)
    return measures.likelihood(sums), np.asarray(exp.betas, np.float64)


def closed_form(betas):
    """Posterior variance and error of x_0 given x_t, [T] each, in float64 from the equations."""
    a_bar = np.cumprod(1 - betas)
    a_prev = np.concatenate([[1.0], a_bar[:-1]])
    mse = SPREAD ** 2 * (1 - a_bar) / (SPREAD ** 2 * a_bar + 1 - a_bar)
    return a_bar, a_prev, mse, betas * (1 - a_prev) / (1 - a_bar)


def test_rmse_and_eps_loss_are_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar, _, mse, _ = closed_form(betas)
    np.testing.assert_allclose(measured["mse"][1:], mse[1:], rtol=0.02)
    assert measured["rmse"] == pytest.approx(127.5 * np.sqrt(mse[0]), rel=0.01)
    eps = np.array_split(a_bar / (1 - a_bar) * mse, measures.BUCKETS)
    np.testing.assert_allclose(measured["eps_loss"], [b.mean() for b in eps], rtol=0.01)


def test_rate_is_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar, a_prev, mse, variance = closed_form(betas)
    # Both Gaussians have the same variance: the KL is the gap of their means (eq. 8).
    coefficient = betas * np.sqrt(a_prev) / (1 - a_bar)
    terms = coefficient[1:] ** 2 * mse[1:] / (2 * variance[1:] * np.log(2))
    np.testing.assert_allclose(measured["terms"][1:], terms, rtol=0.02)
    assert measured["rate"] == pytest.approx(terms.sum(), rel=0.01)


def test_prior_and_total_are_the_closed_form(gaussian_bound):
    measured, betas = gaussian_bound
    a_bar = closed_form(betas)[0][-1]
    # E KL(N(sqrt(a) x, 1-a) || N(0, 1)) over x ~ N(0, SPREAD^2)
    prior = 0.5 * (a_bar * SPREAD ** 2 + (1 - a_bar) - 1 - np.log(1 - a_bar)) / np.log(2)
    assert measured["prior"] == pytest.approx(prior, rel=0.02)
    parts = measured["rate"] + measured["distortion"] + measured["prior"]
    assert measured["bpd"] == pytest.approx(parts, rel=1e-5)


def test_distortion_is_the_integral_over_pixels_and_noise(gaussian_bound):
    from math import erf
    measured, betas = gaussian_bound
    a_bar, _, _, variance = closed_form(betas)
    a, sigma = a_bar[0], np.sqrt(variance[1])     # log variance at t = 0 is the one at t = 1
    rng = np.random.default_rng(1)
    x = np.clip(np.rint((rng.standard_normal(20_000) * SPREAD + 1) * 127.5), 0, 255) / 127.5 - 1
    x_t = np.sqrt(a) * x + np.sqrt(1 - a) * rng.standard_normal(20_000)
    mean = np.clip(SPREAD ** 2 * np.sqrt(a) / (SPREAD ** 2 * a + 1 - a) * x_t, -1, 1)
    phi = np.vectorize(lambda z: 0.5 * (1 + erf(z / np.sqrt(2))))
    high = np.where(x > 0.999, 1.0, phi((x + 1 / 255 - mean) / sigma))
    low = np.where(x < -0.999, 0.0, phi((x - 1 / 255 - mean) / sigma))
    expected = -np.mean(np.log2(np.maximum(high - low, 1e-12)))
    assert measured["distortion"] == pytest.approx(expected, rel=0.02)


def test_rate_distortion_ends_where_the_totals_are(gaussian_bound):
    measured, _ = gaussian_bound
    rate, rmse = measures.rate_distortion(measured["terms"], measured["prior"], measured["mse"])
    assert rate[-1] == pytest.approx(measured["rate"] + measured["prior"])
    assert rmse[-1] == pytest.approx(measured["rmse"])
    assert rate[0] == measured["prior"] and np.all(np.diff(rate) >= 0)
    assert rmse[0] == pytest.approx(127.5 * np.sqrt(measured["mse"][-1]))


# --- the same on any layout ------------------------------------------------------------------

def measure(devices, runner="shard_map"):
    """bits/dim of given images, features of given images, features of drawn ones."""
    exp, params = tiny(devices, **{"parallel.runner": runner})
    images = np.random.default_rng(1).integers(0, 256, (21, 8, 8, 1), dtype=np.uint8)
    bound = measures.likelihood(collect.collect(
        bound_draws(exp, params, images, 0, 8, {}), num=21, batch=8))
    extractor = extract.make({"random": small_cnn.random_params(1), "channels": {}})
    given = collect.collect(image_draws(exp.runner, images.__getitem__, 8)(extractor),
                            num=21, batch=8)
    draws = model_draws(exp, programs.sampling_chain(exp), params, 5, 10, images_kept=4,
                              memory={})
    drawn = collect.collect(draws(extractor, "none"), num=21, batch=10)
    return bound, given, drawn


@pytest.fixture(scope="module")
def on_one_device():
    return measure(1)


@pytest.mark.parametrize("devices, runner", [
    (8, "shard_map"), pytest.param(2, "shard_map", marks=pytest.mark.slow),
    pytest.param(4, "jit", marks=pytest.mark.slow),
    pytest.param(8, "pmap", marks=pytest.mark.slow)])
def test_numbers_do_not_depend_on_the_devices(on_one_device, devices, runner):
    bound, given, drawn = measure(devices, runner)
    for name in ("bpd", "rate", "rmse", "prior"):
        assert bound[name] == pytest.approx(on_one_device[0][name], rel=1e-6), name
    for name, a in given.items():
        np.testing.assert_allclose(a, on_one_device[1][name], rtol=1e-5, atol=1e-6)
    for name in ("random", "channels"):
        np.testing.assert_allclose(drawn[name], on_one_device[2][name], rtol=1e-3, atol=1e-3)
    real = on_one_device[1]["random"]
    distances = [small_cnn.distance(d["random"], real) for d in (drawn, on_one_device[2])]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_images_are_those_of_the_sampler_whatever_the_batch():
    exp, params = tiny(8)
    chain = programs.sampling_chain(exp)
    expected = np.asarray(programs.sample_program(exp, chain)(
        params, np.uint32(5), exp.runner.put("batch", np.arange(24, dtype=np.int32))))
    extractor = extract.make({"images": {}, "channels": {}})
    draws = model_draws(exp, chain, params, 5, 11, images_kept=13, memory={})
    found = collect.collect(draws(extractor, "round"), num=20, batch=11)
    np.testing.assert_array_equal(found["images"], expected[:13])       # only what is wanted
    assert len(found["channels"]) == 20
    np.testing.assert_allclose(found["channels"][:, 0], expected[:20].mean((1, 2, 3)), rtol=1e-5)


# --- with Inception, tiny counts -------------------------------------------------------------

@pytest.fixture(scope="module")
def seeded_weights(tmp_path_factory):
    """A converted file with weights of the right shapes, made up."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in network.state_shapes().items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.05
        state[name] = (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
        if name.endswith(("bn.weight", "running_var")):
            state[name] = np.ones(shape, np.float32)
    path = tmp_path_factory.mktemp("inception") / "w.npz"
    np.savez(path, **state, source_sha256=np.array("made up"), fingerprint=np.zeros((8, 2048)),
             state_sha256=np.array(weights.state_sha256(state)))
    return path


def image_subject(images, batch=4):
    runner = RUNNERS["jit"](jax.devices()[:1])
    return Subject(
        image_draws(runner, images.__getitem__, batch, memory={}), {"samples": "x"},
        len(images), batch, images.shape[1:], {}, runner)


class Pictures:
    """As data.datasets.Source."""
    name, split, fingerprint, labels = "made-up", "train", "f", None

    def __init__(self, images):
        self._images, self.shape = images, images.shape[1:]

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i]


@pytest.mark.slow
def test_reference_then_fid_is_the_formula_on_the_same_features(seeded_weights, tmp_path):
    rng = np.random.default_rng(2)
    real, fake = (rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8) for _ in range(2))
    out = tmp_path / "ref.npz"
    options = Options(metrics=("fid", "is", "kid", "pr"), reference=str(out), batch_size=4,
                            inception_weights=str(seeded_weights))
    make_reference(Pictures(real), options, out, features=10)
    assert not (tmp_path / "ref.npz.shards").exists()
    values, _, provenance = evaluate_images(image_subject(fake), options)

    run = jax.jit(network.features)
    params = weights.load(seeded_weights).params
    a, b = (np.concatenate([np.asarray(run(params, x[None]).pool_3) for x in images])
            for images in (real, fake))
    from ddpm_jax.evaluation.frechet import frechet_distance
    gap = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert values["fid"] == pytest.approx(gap, rel=1e-4)
    assert "10 samples and 10 reference images" in values["fid_warning"]
    assert values["kid_subset_size"] == 10 and 0 <= values["precision"] <= 1
    assert values["is_openai10"] == pytest.approx(1, abs=1e-6)      # one image a split
    assert provenance["reference"]["sha256"] == references.identity(references.load(out))
    assert provenance["protocol"] == "paper" and provenance["precision"] == "highest"

    with pytest.raises(UserError, match="protocol is .*--force"):
        evaluate_images(image_subject(fake), options._replace(protocol="monitor"))
    with pytest.raises(UserError, match=r"image_shape is \(8, 8, 3\)"):
        evaluate_images(image_subject(np.zeros((3, 16, 16, 3), np.uint8)), options)
    forced = evaluate_images(image_subject(np.zeros((3, 16, 16, 3), np.uint8)),
                                   options._replace(metrics=("fid",), force=True))
    assert "forced: image_shape" in forced[2]["warnings"][0]
    with pytest.raises(UserError, match="--num=11: there are only 10"):
        evaluate_images(image_subject(fake), options._replace(num=11))


def test_nan_stops_before_a_metric_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(small_cnn, "default_epochs", lambda n: 1)
    exp, params = tiny(1)
    params = jax.tree.map(lambda x: x * np.nan, params)
    options = Options(num=4, metrics=("offline",), classifier_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match="samples 0: .* is not finite"):
        evaluate_run(exp, params, options, facts={"step": 1, "weights": "ema"},
                           folder=str(tmp_path / "e"))
    assert not list((tmp_path / "e").rglob("shard-*"))


@pytest.mark.parametrize("changes, message", [
    ({"metrics": ("fid2",)}, "--metrics=fid2 is not known; known: fid, is"),
    ({"metrics": ()}, "--metrics is empty"), ({"protocol": "x"}, "--protocol=x"),
    ({"quantise": "up"}, "--quantise=up"), ({"num": 0}, "--num=0 must be at least 1"),
    ({"seed": -1}, "--seed=-1"), ({"metrics": ("is",), "inception_weights": "/absent"},
                                  "Inception's weights are needed.*/absent"),
])
def test_bad_options_are_one_line(changes, message):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=message):
        evaluate_images(image_subject(images), Options()._replace(**changes))


def test_fid_without_a_reference_says_how_to_make_one(seeded_weights):
    options = Options(metrics=("fid",), inception_weights=str(seeded_weights))
    with pytest.raises(UserError, match="--reference=FILE is missing.*ddpm reference"):
        evaluate_images(image_subject(np.zeros((2, 8, 8, 3), np.uint8)), options)


@pytest.mark.slow
def test_periodic_gives_the_same_numbers_twice_and_compiles_once(tmp_path, monkeypatch):
    monkeypatch.setattr(small_cnn, "default_epochs", lambda n: 1)
    exp, params = tiny(1, **{"eval.metrics": "offline"})
    evaluate = periodic(classifier_dir=str(tmp_path))
    first = evaluate(exp, params, 10)
    compiled = []
    monkeypatch.setattr(type(exp.runner), "compile", compiled.append, raising=False)
    assert evaluate(exp, params, 20) == first and not compiled
    assert {"bpd_test", "FD-cnn", "FD-rand@0", "rate_test", "eps_loss_test_0"} <= first.keys()
    assert all(np.isfinite(v) for v in first.values())
    assert not any(k.startswith("fid") for k in first)


def test_records_are_kept_beside_each_other(tmp_path):
    path = tmp_path / "evaluation.json"
    write_records(path, 7, "paper", [("ema", {"bpd": 1.0}, {"seed": 0})])
    write_records(path, 7, "monitor", [("ema", {"fid": 2.0}, {})])
    found = write_records(path, 7, "paper", [("ema", {"kid": 3.0}, {"seed": 0})])
    assert found["7"]["paper"]["ema"]["values"] == {"bpd": 1.0, "kid": 3.0}
    assert found["7"]["monitor"]["ema"]["values"] == {"fid": 2.0}
    assert "jax" in found["7"]["paper"]["ema"]["provenance"]["versions"]


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
def test_fid_and_is_of_the_same_pngs_are_torch_fidelitys(seeded_weights, tmp_path, monkeypatch):
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

    from ddpm_jax.evaluation import files
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

    pngs = {n: files.open_images(tmp_path / n) for n in ("real", "fake")}
    batches = {n: np.stack([p.read(i) for i in range(p.size)]) for n, p in pngs.items()}

    def theirs():
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(tmp_path / "w.pth"))
        with torch.no_grad():
            return {n: network(torch.from_numpy(b).permute(0, 3, 1, 2))
                    for n, b in batches.items()}

    # Features of made-up weights are nearly the same for all images: a last layer that looks at
    # what differs makes classes, and an inception score, of them.
    pool_3 = theirs()["fake"][0]
    directions = torch.linalg.svd(pool_3 - pool_3.mean(0), full_matrices=False)
    state["fc.weight"] = (16 / directions.S[0]) * (
        torch.randn(1008, 12, generator=torch.Generator().manual_seed(0)) @ directions.Vh)
    torch.save(state, tmp_path / "w.pth")
    found = theirs()
    their_fid = fid_statistics_to_metric(*(fid_features_to_statistics(found[n][0])
                                           for n in ("fake", "real")), False)
    their_is = isc_features_to_metric(found["fake"][1], splits=10, shuffle=False)

    out = tmp_path / "ref.npz"
    options = Options(metrics=("fid", "is"), reference=str(out), batch_size=2,
                            inception_weights=str(tmp_path / "w.pth"), allow_unknown_weights=True)
    make_reference(Pictures(batches["real"]), options, out, features=0)
    ours, _, _ = evaluate_images(image_subject(batches["fake"], 2), options)
    assert ours["fid"] == pytest.approx(their_fid["frechet_inception_distance"], rel=1e-3)
    assert their_is["inception_score_mean"] > 1.04
    assert ours["is_openai10"] == pytest.approx(their_is["inception_score_mean"], rel=1e-3)
    assert ours["is_openai10_std"] == pytest.approx(their_is["inception_score_std"], rel=1e-3)
