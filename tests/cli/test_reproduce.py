"""`ddpm reproduce`: costs and the paper's values without a run; a whole target on digits."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from xla_flags import xla_flags

TINY = ("train.steps=4,train.steps_per_dispatch=4,train.log_every=2,train.batch_size=8,model.ch=8,"
        "model.ch_mult=[1],model.num_res_blocks=1,model.attn_resolutions=[],diffusion.num_timesteps=4,"
        "eval.sample_every=0,sampler.batch_size=24")


LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.py"


def ddpm(*words, expect=0, around=()):
    done = subprocess.run([*around, sys.executable, "-m", "ddpm_jax", "reproduce",
                           *map(str, words)],
                          env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1",
                               "XLA_FLAGS": xla_flags(1)},
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout


def test_dry_run_has_costs_the_papers_values_and_bands(capsys):
    from ddpm_jax.cli import main
    assert main.main(["reproduce", "table1", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +800,000 +3\.8\de\+18 +10\.58", out)       # 10.6 h (paper, app. B)
    assert re.search(r"L_simple.*fid_train +3\.17 +3\.1 to 3\.35", out)
    assert re.search(r"L_simple.*fid_test +5\.24 +5\.1 to 5\.4", out)
    assert "PASS" not in out and "FAIL" not in out


def test_dry_run_of_table_2_says_what_the_paper_found_unstable(capsys):
    from ddpm_jax.cli import main
    assert main.main(["reproduce", "table2", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count("unstable") == 2 and out.count(" train ") == 6


def test_dry_run_of_the_successors_table(capsys):
    from ddpm_jax.cli import main
    assert main.main(["reproduce", "improved", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cosine, L_hybrid +bpd_test +3\.17 +3\.1066 to 3\.2334", out)
    assert re.search(r"cifar10_improved:linear +train +500,000", out) and "PASS" not in out


def test_dry_run_of_the_samplers_and_a_run_beside_them(capsys, tmp_path):
    """Numbers of one sampler are not those of another, nor of the paper's chain."""
    from ddpm_jax.cli import main
    from ddpm_jax.evaluation.records import write_records
    train = {"reference": {"split": "train"}}
    write_records(tmp_path / "eps_fixed_simple/evaluation.json", 790_000, "paper", [
        ("ema, a", {"fid": 6.6}, train | {"sampler": "ddim", "sampler_steps": 20,
                                          "chain": "DDIM, 20 network calls"}),
        ("ema, b", {"fid": 9.0}, train | {"sampler": "ddim", "sampler_steps": 50})])
    assert main.main(["reproduce", "fast", "--dry_run", f"--workdir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    # 5 % or 0.15 round the numbers of Song et al. and of Li et al.
    assert re.search(r"DDIM +fid_train, 20 calls +6\.84 and 6\.94 +6\.493 to 7\.287 +6\.6.+SS", out)
    assert re.search(r"DPM-Solver-3 +fid_train, 50 calls +3\.49 +3\.3155 to 3\.6645", out)
    assert re.search(r"UniPC-2 +fid_train, 20 calls +not published +0 to 4\.15", out)
    # 1,358 calls for each of 50,000 images; 3.82e18 are 3 calls for each of 128 x 800,000
    assert re.search(r"sample +8\.4\de\+17", out)
    assert "FAIL" not in out
    assert main.main(["reproduce", "table1", "--dry_run", f"--workdir={tmp_path}"]) == 0
    assert "6.6" not in capsys.readouterr().out.split("verdict")[1]


def test_verdicts_where_a_run_exists(capsys, tmp_path):
    from ddpm_jax.cli import main
    from ddpm_jax.evaluation.records import write_records
    facts = {"reference": {"split": "train"}}
    write_records(tmp_path / "eps_fixed_simple/evaluation.json", 800_000, "paper", [
        ("ema, a", {"fid": 3.2, "is_openai10": 9.0}, facts), ("ema, b", {"bpd_test": 3.76}, {})])
    assert main.main(["reproduce", "table1", "--dry_run", f"--workdir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.split()[-1] for line in lines if line.endswith(("PASS", "FAIL"))]
    assert verdicts == ["FAIL", "PASS", "PASS"]      # is, fid_train, bpd_test


@pytest.mark.parametrize("words, message", [
    ([], "expected one of table1"), (["table9"], "expected one of table1"),
    (["fig7", "--dry_run", "--set=train.stepz=3"], "--set=train.stepz=3"),
    (["fig7", "--dry_run", "--config=nowhere"], "no such file, nor a packaged config"),
    (["fig7"], "--workdir is missing")])
def test_bad_input_is_one_line(words, message, capsys):
    from ddpm_jax.cli import main
    assert main.main(["reproduce", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddpm: error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_targets_end_to_end_on_digits(tmp_path, classifiers):
    words = ("--config=digits", f"--workdir={tmp_path}", f"--set={TINY}", "--num=40",
             "--bpd_num=16", f"--classifier_dir={classifiers}")
    for target in ("fig10", "nearest", "table4"):
        ddpm(target, *words)
        page = (tmp_path / f"{target}.html").read_text()
        assert "no verdict" in page and ">PASS<" not in page and ">FAIL<" not in page
    assert 'class="scrub"' in (tmp_path / "fig10.html").read_text()
    assert "RMSE [0,255]" in (tmp_path / "table4.html").read_text()
    steps = list((tmp_path / "eps_fixed_simple" / "checkpoints").iterdir())
    assert [p.name for p in steps if p.name.isdigit()] == ["4"]       # trained once for all


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_draw_and_score_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("--config=digits", f"--set={TINY}", "--num=20", f"--classifier_dir={tmp_path}/c")
    for target in ("fig7", "fig8", "fig10"):
        ddpm(target, *words, f"--workdir={one}")
    two.mkdir()
    shutil.copytree(one / "eps_fixed_simple", two / "eps_fixed_simple")
    shutil.rmtree(two / "eps_fixed_simple" / "evaluation")
    for target in ("fig7", "fig8", "fig10"):
        ddpm(target, *words, f"--workdir={two}", around=(
            sys.executable, LOCAL, "--processes=2", "--devices=1",
            f"--logdir={tmp_path}/{target}", "--"))
    pictures = sorted(p.name for p in one.glob("*.png"))
    assert pictures == ["fig10-progressive.png", "fig7-shared_latents.png",
                        "fig8-interpolation.png"]
    for name in pictures:
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
        assert np.abs(a - b).max() <= 1 and a.std() > 1, name
    labels = [re.findall(r">([0-9.]+)</text>", (folder / "fig10.html").read_text())
              for folder in (one, two)]
    assert labels[0] and [float(x) for x in labels[1]] == pytest.approx(
        [float(x) for x in labels[0]], rel=1e-2)
