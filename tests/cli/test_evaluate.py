"""`ddpm evaluate` as processes: one, several, killed and started again."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import digits
from xla_flags import xla_flags

from ddpm_jax import checkpoints, experiment
from ddpm_jax.config import to_json

FIELDS = {
    "model.ch": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1, "model.attn_resolutions": (),
    "diffusion.num_timesteps": 4, "diffusion.schedule.beta_end": 0.9, "train.batch_size": 8,
    "train.clip_replicas": 8, "sampler.batch_size": 8}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps that never happened: random weights at step 2."""
    folder = tmp_path_factory.mktemp("run")
    config = digits()
    config.update_from_flattened_dict(FIELDS)
    exp = experiment.build_model(config)
    checkpoints.claim(folder, to_json(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32),
                          exp.abstract_params)
    state = experiment.new_state(experiment.build_training(exp))
    placed = exp.runner.put("replicated", params)
    store = checkpoints.Checkpoints(folder)
    store.save(2, state._replace(params=placed, ema_params=placed), to_json(config))
    store.wait()
    store.close()
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices):
    """For a process of its own with that many CPU devices."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1",
            "XLA_FLAGS": xla_flags(devices)}


def start(*words, devices=1, env=None):
    return subprocess.Popen([sys.executable, "-m", "ddpm_jax", *map(str, words)], text=True,
                            env=environment(devices) | (env or {}), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process, expect=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, err[-3000:]
    return out, err


def numbers(folder):
    """{metric: number} of all records of evaluation.json."""
    document = json.loads((pathlib.Path(folder) / "evaluation.json").read_text())
    return {name: value for record in document["2"]["paper"].values()
            for name, value in record["values"].items() if isinstance(value, float)}


WORDS = ("--metrics=bpd,offline,nn", "--num=44", "--bpd_num=20", "--splits=test")


@pytest.fixture(scope="module")
def expected(workdir, classifiers, tmp_path_factory):
    """The numbers of one process with one device, and what it printed."""
    out = tmp_path_factory.mktemp("one")
    printed, _ = finish(start("evaluate", f"--workdir={workdir}", *WORDS, f"--out={out}",
                              f"--classifier_dir={classifiers}"))
    return out, printed


def forget(workdir):
    import shutil
    shutil.rmtree(pathlib.Path(workdir) / "evaluation", ignore_errors=True)


@pytest.mark.slow
def test_one_process_writes_numbers_pictures_and_provenance(expected, workdir):
    out, printed = expected
    shown = json.loads(printed)["2"]["paper"]
    assert len(shown) == 2
    found = numbers(out)
    assert 1 < found["bpd_test"] < 1e4 and found["nn_pixels_median_distance"] > 0
    assert not [k for k in found if k.startswith("fid")] and "NaN" not in printed
    assert {"evaluation.html", "nearest_pixels.png", "nearest_features.png"} <= {
        p.name for p in out.iterdir()}
    document = json.loads((out / "evaluation.json").read_text())
    samples = next(r for r in document["2"]["paper"].values() if "FD-rand@0" in r["values"])
    facts = samples["provenance"]
    assert (facts["num"], facts["seed"], facts["step"], facts["weights"]) == (44, 0, 2, "ema")
    assert facts["quantise"] == "round" and facts["versions"]["jax"] == jax.__version__


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_four_devices_give_the_same(expected, workdir, classifiers, tmp_path):
    forget(workdir)
    port = free_port()
    processes = [start("evaluate", f"--workdir={workdir}", *WORDS, f"--out={tmp_path}",
                       f"--classifier_dir={classifiers}", devices=4,
                       env={"DDPM_COORD": f"127.0.0.1:{port}", "DDPM_NPROC": "2",
                            "DDPM_PROC": str(i)}) for i in range(2)]
    outputs = [finish(p) for p in processes]
    assert "bpd" not in outputs[1][0] + outputs[1][1]      # only the first one speaks
    one, two = numbers(expected[0]), numbers(tmp_path)
    assert one.keys() == two.keys()
    for name, value in one.items():
        tight = name.endswith("_test") or "real_vs_real" in name
        assert two[name] == pytest.approx(value, rel=1e-6 if tight else 1e-4, abs=1e-7), name


@pytest.mark.slow
def test_sigterm_then_the_same_command_gives_the_same(expected, workdir, classifiers, tmp_path):
    forget(workdir)
    words = ("evaluate", f"--workdir={workdir}", *WORDS, f"--out={tmp_path}",
             f"--classifier_dir={classifiers}")
    process = start(*words)
    folder = pathlib.Path(workdir) / "evaluation" / "2"
    deadline = time.time() + 120
    while not list(folder.glob("samples-*/shard-00000.npz")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    finish(process, expect=42)
    assert not (tmp_path / "evaluation.json").exists()
    shards = {p: p.stat().st_mtime_ns for p in folder.rglob("shard-*.npz")}
    assert shards
    finish(start(*words))
    assert all(p.stat().st_mtime_ns == t for p, t in shards.items())     # none made twice
    assert numbers(tmp_path) == numbers(expected[0])


@pytest.mark.slow
def test_samples_of_an_npz_beside_a_dataset(classifiers, tmp_path):
    from sklearn.datasets import load_digits
    images = np.rint(load_digits().images[:64] * 255 / 16).astype(np.uint8)[..., None]
    np.savez(tmp_path / "s.npz", images)
    finish(start("evaluate", f"--samples={tmp_path}/s.npz", "--metrics=offline,nn",
                 "--dataset=digits", f"--out={tmp_path}/out", f"--classifier_dir={classifiers}"))
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (step, protocols), = document.items()
    assert step.startswith("samples-")
    (_, record), = protocols["paper"].items()
    values = record["values"]
    key = next(k for k in values if k.startswith("FD-cnn@") and "_" not in k)
    assert values[f"{key}_equal_n"] < 3 * values[f"{key}_real_vs_real"]


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_message_and_no_number(classifiers, tmp_path):
    """The shell's limit on a file's size stands for the disk; compilations are not cached."""
    np.savez(tmp_path / "s.npz", np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8))
    words = ("evaluate", f"--samples={tmp_path}/s.npz", "--metrics=offline", "--dataset=digits",
             f"--out={tmp_path}/out", f"--classifier_dir={classifiers}")
    finish(start(*words, "--num=8"))      # the classifier is there
    before = (tmp_path / "out" / "evaluation.json").read_text()
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", sys.executable, "-m", "ddpm_jax", *words],
        env=environment(1) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, capture_output=True,
        text=True, timeout=200)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert re.match(r"ddpm: error: cannot write .*shard-00000.npz: File too large", last), last
    assert "Traceback" not in done.stderr.partition("compilation cache")[2]
    assert (tmp_path / "out" / "evaluation.json").read_text() == before
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("content, message", [
    ("{", "evaluation.json is not JSON"), ("[]", "is not the JSON of an evaluation"),
    (None, "out is a file; name a folder")])
def test_results_that_cannot_be_written_are_refused_before_the_work(content, message, tmp_path,
                                                                   capsys):
    from ddpm_jax.cli import main
    out = tmp_path / "out"
    if content is None:
        out.write_text("x")
    else:
        out.mkdir()
        (out / "evaluation.json").write_text(content)
    words = ["evaluate", "--samples=/absent", "--metrics=is"]
    assert main.main([*words, f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert main.main([*words, "--keep_images"]) == 2
    assert "--keep_images needs --out" in capsys.readouterr().err


def test_a_second_command_with_the_same_results_is_refused(tmp_path, monkeypatch, capsys):
    from ddpm_jax.cli import common, main
    from ddpm_jax.evaluation.records import only_writer
    monkeypatch.setattr("ddpm_jax.storage.lock.GRACE_S", 0.0)
    monkeypatch.setattr(common, "join", lambda config=None: (None, None))
    np.save(tmp_path / "s.npy", np.zeros((4, 8, 8, 1), np.uint8))
    words = ["evaluate", f"--samples={tmp_path}/s.npy", "--metrics=nn", "--dataset=digits",
             f"--out={tmp_path}/out", f"--classifier_dir={tmp_path}"]
    with only_writer(f"{tmp_path}/out", "--out"):
        assert main.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"ddpm: error: --out=.*out is in use by process \d+ on .*: wait for it", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, message", [
    ((), "--workdir=DIR .* or --samples=FOLDER_OR_NPZ is missing"),
    (("--samples=x.npz",), "bpd is of a model"),
    (("--samples=/absent", "--metrics=nn"), "/absent: no such folder"),
    (("--workdir=/absent", "--metrics=fid,x"), "--metrics=x is not known"),
    (("--workdir=/absent",), "no run here"),
    (("extra", "--workdir=/absent"), "unexpected argument 'extra'"),
    (("--samples=x", "--metrics=fid", "--sampler=ddim"), "--sampler has no effect .* of --samples"),
    (("--samples=x", "--metrics=fid", "--seed=1"), "--seed has no effect"),
    (("--samples=x", "--metrics=fid", "--noema"), "--ema has no effect"),
    (("--samples=x", "--metrics=fid", "--dataset=digits"), "--dataset has no effect"),
    (("--samples=x", "--metrics=fid", "--quantise=round"), "--quantise has no effect"),
    (("--workdir=x", "--metrics=bpd", "--num=5"), "--num has no effect on --metrics=bpd of --work"),
    (("--workdir=x", "--metrics=bpd", "--reference=r.npz"), "--reference has no effect"),
    (("--workdir=x", "--metrics=fid", "--splits=test"), "--splits has no effect"),
    (("--workdir=x", "--metrics=fid", "--data_dir=d"), "--data_dir has no effect"),
    (("--workdir=x", "--metrics=offline", "--dataset=digits"), "--dataset has no effect"),
    (("--workdir=x", "--metrics=offline", "--crop=5"), "--crop has no effect"),
    (("--workdir=x", "--metrics=nn", "--overwrite"), "--overwrite has no effect"),
    (("--workdir=/absent", "--metrics=offline", "--bpd_num=5", "--splits=test", "--data_dir=d",
      "--seed=1", "--num=9", "--sampler=ddim", "--steps=3", "--keep_images"), "no run here"),
    (("--workdir=/absent", "--metrics=nn", "--crop=5", "--classifier_dir=c"), "no run here"),
])
def test_bad_input_is_one_line(words, message, capsys, monkeypatch):
    from ddpm_jax.cli import common, main
    monkeypatch.setattr(common, "join", lambda config=None: (None, None))
    assert main.main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddpm: error: ") and error.count("\n") == 1
    assert re.search(message, error), error
