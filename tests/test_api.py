"""`import ddpm_jax as ddpm`: equal to the commands, callable again, nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import config

import ddpm_jax as ddpm
from ddpm_jax import sample as sampling
from ddpm_jax.cli.export import export_diffusers
from ddpm_jax.compilation.cache import count_compilations
from ddpm_jax.data.datasets import open_source
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.evaluate import evaluate_run
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.options import Options
from ddpm_jax.evaluation.session import session_of
from ddpm_jax.interchange import parameter_names
from ddpm_jax.training import rng


@pytest.fixture(scope="module")
def run(straight):
    return ddpm.load(straight)


def test_import_loads_nothing_and_parses_no_flags():
    code = ("import sys, ddpm_jax as ddpm; assert 'load' in dir(ddpm)\n"
            "print(*(m for m in ('jax', 'numpy', 'absl', 'logging') if m in sys.modules))\n"
            "try: ddpm.lode\nexcept AttributeError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code, "--nonsense=1"], capture_output=True,
                          text=True)
    assert done.stdout.splitlines() == ["", "module 'ddpm_jax' has no attribute 'lode'"], done


def test_train_is_module_and_function_whatever_is_imported_first():
    code = ("import ddpm_jax.train, ddpm_jax as ddpm; from ddpm_jax import train\n"
            "print(ddpm.train is train, callable(train), train.InitFrom.__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "InitFrom"], done.stderr


@pytest.mark.slow
def test_samples_are_those_of_the_command_and_a_second_call_compiles_nothing(
        run, straight, tmp_path):
    sampling.sample(straight, tmp_path / "out", num=11, batch_size=8, seed=3)
    expected = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    images = run.sample(11, seed=3, batch_size=8)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)
    with count_compilations() as compiled:
        np.testing.assert_array_equal(run.sample(3, seed=3, batch_size=8), expected[:3])
    assert not compiled
    last, frames = run.sample_progressive(2, seed=3, frames=5, batch_size=8)
    np.testing.assert_array_equal(last, expected[:2])
    assert frames.shape == (2, 5, 8, 8, 1)


@pytest.mark.slow
def test_bits_per_dim_are_those_of_evaluate(run):
    exp = run.experiment
    records, _ = evaluate_run(
        Model(exp, run.params, {"step": 12, "weights": "ema"}),
        Options(metrics=("bpd",), splits=("test",), batch_size=8), session_of(exp))
    source = open_source("digits", None, "test", image_size=8, channels=1)
    bound = run.bound(source.array(), batch_size=8)
    values = records[0][1]
    assert values["bpd_test"] == pytest.approx(bound.total.mean(dtype=np.float64), rel=1e-6)
    np.testing.assert_allclose(bound.terms.mean(0), values["terms_test"], rtol=1e-5)
    with pytest.raises(UserError, match=r"float32 \[20, 8, 8, 1\]; this run takes uint8 \[N, 8"):
        run.bits_per_dim(np.zeros((20, 8, 8, 1), np.float32))


def test_equations_network_and_schedule_in_a_loop_of_ones_own(run):
    """A term of the bound by hand, and the network built from outside."""
    images = open_source("digits", None, "test", image_size=8, channels=1).array()[:8]
    t = jnp.full(8, 4)
    noise = rng.image_noise(rng.run_key(0), jnp.arange(8), jnp.int32(4), (8, 8, 1))
    x_t = ddpm.diffusion.q_sample(run.schedule, jnp.asarray(images) / 127.5 - 1, t, noise)
    prediction = ddpm.diffusion.p_mean_variance(
        run.schedule, run.denoise_fn(x_t, t), x_t, t, clip_denoised=True,
        predict=ddpm.diffusion.PARAMETERIZATIONS["eps"],
        variance=ddpm.diffusion.VARIANCES["fixed_small"])
    error = ((prediction.x_start - jnp.asarray(images) / 127.5 + 1) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(error, run.bound(images, batch_size=8).mse[:, 4], rtol=1e-5)
    model = ddpm.models.UNet(image_size=8, in_channels=1, out_channels=1, ch=4, ch_mult=(1,),
                             num_res_blocks=1, attn_resolutions=(), num_groups=2)
    params = jax.eval_shape(model.init, jax.random.key(0), x_t, t)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, run.params)


def test_a_diffusers_folder_draws_the_same(run, straight, tmp_path):
    export_diffusers(straight, tmp_path / "exported")
    other = ddpm.load(tmp_path / "exported")
    np.testing.assert_array_equal(other.sample(8, seed=1), run.sample(8, seed=1))
    with pytest.raises(UserError, match="one set of weights"):
        ddpm.load(tmp_path / "exported", ema=False)
    with pytest.raises(UserError, match="step=3: .* is not a run"):
        ddpm.load(tmp_path / "exported", step=3)


def test_an_official_checkpoint(run, tmp_path):
    from interchange.made_up_bundle import write_noise
    shapes = {name: leaf.shape for name, leaf in parameter_names.variables_from_params(
        jax.tree.map(np.asarray, run.params), run.experiment.model).items()}
    write_noise(tmp_path / "model.ckpt-7", shapes)
    with pytest.raises(UserError, match='add config="cifar10"'):
        ddpm.load(tmp_path / "model.ckpt-7")
    other = ddpm.load(tmp_path / "model.ckpt-7", config=config())
    noise = np.random.default_rng(0).standard_normal(4, dtype=np.float32) / 30
    np.testing.assert_array_equal(other.params["conv_in"]["bias"], noise)
    assert other.facts["step"] == 7 and other.sample(2, batch_size=8).shape == (2, 8, 8, 1)


def test_what_is_no_model_is_refused(straight, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        ddpm.load(tmp_path)
    with pytest.raises(UserError, match="a run has its own config"):
        ddpm.load(straight, config="digits")
    with pytest.raises(UserError, match="did you mean --config.train.steps"):
        ddpm.load_config("digits", {"train.stepz": 3})
    with pytest.raises(UserError, match="config digits: .*field 'steps'"):
        ddpm.load_config("digits", {"train.steps": "many"})
    assert ddpm.load_config("digits", {"model.ch_mult": (1, 3)}).model.ch_mult == (1, 3)


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


@pytest.mark.slow
def test_training_resumes_also_outside_the_main_thread_and_leaves_no_handler(straight, tmp_path):
    before, threads = handlers(), set(threading.enumerate())
    shutil.copytree(straight, tmp_path / "run")
    runs = []
    thread = threading.Thread(target=lambda: runs.append(
        ddpm.train(config(**{"train.steps": 14}), tmp_path / "run")))
    thread.start()
    thread.join()
    assert runs[0].facts["step"] == 14
    assert ddpm.train(tmp_path / "run" / "config.json", tmp_path / "run").facts["step"] == 14
    assert handlers() == before
    assert not [t for t in set(threading.enumerate()) - threads if t.name.startswith("ddpm")]


def test_an_interrupt_saves_and_is_raised(tmp_path):
    before = handlers()
    fields = {"train.steps": 1_000_000, "train.log_every": 5, "checkpoint.every": 1000}

    def interrupt():
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
        ddpm.train(config(**fields), tmp_path)
    thread.join()
    assert handlers() == before
    assert ddpm.load(tmp_path).facts["step"] >= 5
