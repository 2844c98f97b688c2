import json
import os
import subprocess
import sys

import pytest
from absl import flags
from xla_flags import xla_flags

from ddpm_jax.benchmark import matrix
from ddpm_jax.cli import bench, common, main
from ddpm_jax.errors import UserError


def ddpm(*words):
    return subprocess.run([sys.executable, "-m", "ddpm_jax", "bench", *words],
                          env={**os.environ, "XLA_FLAGS": xla_flags(1)}, capture_output=True,
                          text=True, check=False)


def test_help_and_bad_input(tmp_path):
    assert "ddpm bench compile --matrix" in ddpm("--help").stdout
    done = ddpm("stp", "--config=digits")
    assert done.returncode == 2
    known = "step|sample|data|eval|statistics|compile|sweep|corpus|history|page"
    assert f"ddpm: error: expected ddpm bench {known}" in done.stderr
    (tmp_path / "there.json").write_text("[]")
    done = ddpm("data", "--config=digits", f"--out={tmp_path}/there.json")
    assert done.returncode == 2 and "exists; name another file" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_written_is_named_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    for words, message in (
            (["compile", f"--out={tmp_path}/new", f"--github={tmp_path}"], "is a folder"),
            (["history", "--releases=0.10.2", f"--rows={tmp_path}"], "--rows=.* is a folder"),
            (["history", "--releases=0.10.2", f"--rows={tmp_path}/file/x"], "/file, which is a"),
            (["compile", f"--export={tmp_path}/file"], "--export=.* is a file"),
            (["corpus", f"--corpus={tmp_path}/file"], "--corpus=.* is a file"),
            (["history", "--compilations=0"], "compilations"),
            (["history", "--repeat", "0"], "compilations"),
            (["history", "--timeout=-1"], "timeout")):
        define = common.Definer(words)
        bench.define_flags(define)
        with pytest.raises((UserError, flags.Error), match=message):
            bench.main(define.values, define.parse())


def test_earlier_spellings_of_flags_are_read_and_not_listed(capsys):
    values = {}
    for words in (["--rounds=3", "--compilations", "2"], ["--repeats=3", "-repeat", "2"]):
        define = common.Definer(["step", *words, "--out=--repeat"])
        bench.define_flags(define)
        assert define.parse() == ["step"]
        values[words[0]] = define.values.rounds, define.values.compilations, define.values.out
    assert set(values.values()) == {(3, 2, "--repeat")}
    assert main.command(["bench", "--help"]) == 0
    assert "--repeat" not in capsys.readouterr().out


def test_data_in_the_common_format(tmp_path):
    done = ddpm("data", "--config=digits", "--seconds=0", f"--out={tmp_path}/data.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "data.json").read_text())
    assert {r["name"] for r in rows} == {"streamed", "resident, by numpy"}
    assert all(r["bench"] == "data" and r["images"] == 32 and r["mfu"] is None for r in rows)
    assert all(r["seconds"]["low"] <= r["seconds"]["median"] <= r["seconds"]["high"] for r in rows)
    assert "images/s" in done.stdout


@pytest.mark.slow
def test_features_are_a_share_of_sampling(tmp_path):
    from ddpm_jax import experiment
    from ddpm_jax.compilation.roofline import unet_work
    from ddpm_jax.config import load_config
    from ddpm_jax.evaluation.inception import network
    done = ddpm("eval", "--config=digits", "--seconds=0", "--rounds=1",
                "--config.sampler.batch_size=2", f"--out={tmp_path}/eval.json")
    assert done.returncode == 0, done.stderr
    rows = {r["name"]: r for r in json.loads((tmp_path / "eval.json").read_text())}
    config = load_config("digits")
    work = unet_work(experiment.network(config))
    one = network.flops_per_image() + 2 * 2048 ** 2
    first = rows["Inception-2015"]
    steps = config.diffusion.num_timesteps
    assert first["share_of_flops"] == pytest.approx(one / (steps * work.forward_flops), rel=1e-6)
    seconds = {name: r["seconds"]["median"] for name, r in rows.items()}
    assert first["share_of_time"] == pytest.approx(
        (seconds["Inception-2015"] + seconds["sums of features"])
        / (steps * seconds["denoising step"]))
    assert f"of the time of {steps} denoising steps" in done.stdout


@pytest.mark.slow
def test_compile_matrix_baseline_and_corpus(tmp_path):
    table = {"config": ["digits"], "topology": ["cpu:1"], "runner": ["jit"], "program": ["sample"],
             "set": ["model.ch=8", "model.ch_mult=(1,)", "model.num_res_blocks=1",
                     "model.num_groups=4", "model.attn_resolutions=()", "sampler.batch_size=8",
                     "diffusion.num_timesteps=10"]}
    (tmp_path / "m.json").write_text(json.dumps(table))
    # A baseline that had fewer instructions: what is measured now must be called a regression.
    [cell] = matrix.cells(str(tmp_path / "m.json"))
    large = dict.fromkeys(("instructions", "kernels", "bytes", "copies", "transposes"), 10 ** 9)
    baseline = {"cell": cell.name, "jaxpr_equations": 10**9, "stablehlo": large, "memory": {
        "peak": 10**12}, "executable_bytes": 10**12, "hlo": {
            **large, "instructions": 10, "collectives": {}}, "seconds": {
                stage: {"cpu_s": 10**6} for stage in ("trace", "lower", "compile")}}
    (tmp_path / "b.json").write_text(json.dumps([baseline]))
    first = ddpm("compile", f"--matrix={tmp_path}/m.json", f"--out={tmp_path}/a.json",
                 f"--export={tmp_path}/corpus", "--compilations=2", "--passes",
                 f"--github={tmp_path}/github.json", f"--baseline={tmp_path}/b.json")
    assert first.returncode == 1, first.stdout + first.stderr
    [regression] = [line for line in first.stdout.splitlines() if "REGRESSION" in line]
    assert "HLO instructions" in regression
    [row] = json.loads((tmp_path / "a.json").read_text())
    assert row["warm"]["compile"]["cpu_s"] < row["seconds"]["compile"]["cpu_s"]
    # Different hash seeds: the same key, the same program; read back from it.
    assert row["warm_cache"] == "hit" and row["repeats"]["cache_key"] == []
    assert row["cache_key"]["computation"] and len(row["repeats"]["executables"]) == 1
    assert "2 processes, 1 different executable;" in first.stdout
    # The passes take a part of the compilation, each once and exclusively.
    shares = {p["name"]: p["share"] for p in row["passes"]["passes"]}
    assert {"algsimp", "fusion", "layout-assignment"} <= set(shares) and sum(shares.values()) < 1
    github = json.loads((tmp_path / "github.json").read_text())
    assert {"name", "unit", "value"} <= set(github[0]) and len(github) > 10
    [entry] = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert (tmp_path / "corpus" / entry["files"][0]).read_text().startswith("module")
