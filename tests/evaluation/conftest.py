"""A tiny untrained model, made-up Inception weights, and few BLAS threads."""

import jax
import numpy as np
import pytest
import threadpoolctl
from tiny_run import digits

from ddpm_jax import experiment
from ddpm_jax.evaluation.evaluate import evaluate
from ddpm_jax.evaluation.features import Model, Subject, of_images
from ddpm_jax.evaluation.inception import network, weights
from ddpm_jax.evaluation.session import Session, session_of
from ddpm_jax.parallel.runners import RUNNERS

T = 6


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread():
    """OpenBLAS's threads wait for each other in a loop: tenfold slower where tests share cores."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def tiny_config(**fields):
    config = digits()
    config.update_from_flattened_dict({
        "model.ch": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1,
        "model.attn_resolutions": (), "diffusion.num_timesteps": T,
        "diffusion.schedule.beta_end": 0.9, "train.batch_size": 8,
        "train.clip_replicas": 8, "sampler.batch_size": 24,
        "eval.num": 30, "eval.bpd_num": 20, **fields})
    return config


@pytest.fixture(scope="session")
def tiny():
    """-> (Model with untrained weights that are not the ones at zero, Session) on some devices."""
    def build(devices=1, folder=None, **fields):
        exp = experiment.build_model(tiny_config(**fields), jax.devices()[:devices])
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32),
                              exp.abstract_params)
        model = Model(exp, exp.runner.put("replicated", params), {"step": 1, "weights": "ema"})
        return model, session_of(exp, folder=folder and str(folder))

    return build


@pytest.fixture(scope="session")
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


class Pictures:
    """As data.datasets.Source."""
    name, split, fingerprint, labels = "made-up", "train", "f", None

    def __init__(self, images):
        self._images, self.shape = images, images.shape[1:]

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i]


@pytest.fixture(scope="session")
def pictures():
    return Pictures


@pytest.fixture(scope="session")
def one_device():
    """-> a new Session on one device, with the fields given."""
    return lambda **fields: Session(RUNNERS["jit"](jax.devices()[:1]), **fields)


@pytest.fixture(scope="session")
def evaluate_images(one_device):
    """(images, options) -> (values, provenance) of given images."""
    def run(images, options, batch=4):
        session = one_device()
        subject = Subject("x", of_images(session, images.__getitem__, batch), {"samples": "x"},
                          len(images), batch, images.shape[1:])
        ((_, values, provenance),), _ = evaluate(subject, options, session)
        return values, provenance

    return run
