"""`ddpm import`: the command line, whole conversions, and their memory."""

import importlib
import pathlib
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

HELPERS = str(pathlib.Path(__file__).parents[1] / "interchange")
sys.path.insert(0, HELPERS)

from made_up import SMALL, assert_bit_equal, random_params, restore, small_config  # noqa: E402

from ddpm_jax import checkpoints, experiment  # noqa: E402
from ddpm_jax.cli import common, main  # noqa: E402
from ddpm_jax.config import differing_fields, load_config, to_json  # noqa: E402
from ddpm_jax.interchange import importing, parameter_names  # noqa: E402
from ddpm_jax.interchange.diffusers.write import write_folder  # noqa: E402


@pytest.mark.parametrize("words, message", [
    (["import", "torch", "--workdir=x"], "import torch: usage"),
    (["import", "official", "--workdir=x", "--path=y"], "--path is not read by import official"),
    (["import", "official", "--workdir=x", "--checkpoint=/no/such", "--config=cifar10"],
     "no file /no/such.index"),
])
def test_command_line_errors_are_one_line(tmp_path, words, message):
    done = subprocess.run([sys.executable, "-m", "ddpm_jax", *words], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def parsed(line):
    """The flags of a printed command line, as its subcommand reads them."""
    program, name, *words = shlex.split(line)
    define = common.Definer(words)
    importlib.import_module(f"ddpm_jax.cli.{name}").define_flags(define)
    define.values([program, *words])
    return define.values


@pytest.mark.parametrize("attention", [(8,), ()])
def test_the_printed_lines_can_be_pasted(tmp_path, attention):
    config = small_config(model={"attn_resolutions": attention},
                          diffusion={"first_log_variance": "floor", "variance": "fixed_small"})
    config.diffusion.schedule = {"name": "cosine"}
    exp = experiment.build_model(config, jax.devices()[:1])
    write_folder(tmp_path / "cifar10 of mine", random_params(exp.model), exp, to_json(config),
                 step=0, weights="", version="0")
    lines, run = [], tmp_path / "it's a run; $(here)"
    importing.import_diffusers(str(tmp_path / "cifar10 of mine"), workdir=run, verify=False,
                               say=lines.append)
    sample, train = (next(text.partition(": ")[2] for text in lines if text.startswith(start))
                     for start in ("to sample: ", "to train on: "))
    assert parsed(sample).workdir == parsed(train).workdir == str(run)
    stored = checkpoints.read_config(run)
    pasted = to_json(parsed(train).config)
    assert differing_fields(stored, pasted) == []
    assert {k: v for k, v in pasted.items() if k != "diffusion"} == {
        k: v for k, v in stored.items() if k != "diffusion"}
    assert any("--init_from=" in line for line in lines)
    assert stored["model"]["attn_resolutions"] == list(attention)
    assert stored["diffusion"]["schedule"]["name"] == "cosine"
    checkpoints.claim(run, pasted)


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_commands_end_to_end_with_real_tensorflow_and_diffusers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")
    pytest.importorskip("diffusers")
    from made_up_tf import write_checkpoint

    (tmp_path / "tf").mkdir()
    (tmp_path / "c.py").write_text("\n".join([
        "import sys", f"sys.path.insert(0, {HELPERS!r})", "from made_up import small_config",
        "", "def get_config():", "    return small_config()", ""]))
    prefix, held = write_checkpoint(tmp_path / "tf", SMALL, random_params(SMALL), step=790)

    monkeypatch.chdir(tmp_path)

    def ddpm(*words, status=0):
        returned = main.main(list(words))
        out, err = capsys.readouterr()
        assert returned == status, err
        return err + out

    said = ddpm("import", "official", f"--checkpoint={prefix}", "--config=c.py", "--workdir=run")
    assert "parity: PASS" in said and "step 790" in said
    assert "wrote back" in ddpm("export", "diffusers", "--workdir=run", "--out=back")
    said = ddpm("import", "diffusers", "--path=back", "--workdir=again")
    assert "parity: PASS" in said and "diffusers 0." in said
    state = restore(tmp_path / "again", small_config())
    expected = {k.removesuffix(parameter_names.EMA_SUFFIX): v for k, v in held.items()
                if k.endswith(parameter_names.EMA_SUFFIX)}
    assert_bit_equal(parameter_names.variables_from_params(state.params, SMALL), expected)
    ddpm("export", "safetensors", "--workdir=run", "--out=raw.safetensors", "--noema")
    assert "exists" in ddpm("export", "safetensors", "--workdir=run", "--out=raw.safetensors",
                            status=2)
    from safetensors.numpy import load_file
    raw = load_file(tmp_path / "raw.safetensors")
    np.testing.assert_array_equal(raw["conv_in.bias"], held["model/conv_in/b"])


MEASURE = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from ddpm_jax.config import load_config, to_json
from ddpm_jax.cli import export
from ddpm_jax.interchange import importing
config = load_config("lsun_church")
{}
status = dict(line.split(":", 1) for line in
              pathlib.Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 2**20)
"""


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_256_model_converts_in_little_memory(tmp_path):
    """A whole 114M-parameter checkpoint (weights, averages, moments: 1.8 GB), and back out."""
    from made_up_bundle import write_noise

    model = experiment.network(load_config("lsun_church"))
    plain = {e.official.name: e.official.shape for e in parameter_names.entries(model)}
    write_noise(tmp_path / "model.ckpt-5", {
        k + suffix: shape for k, shape in plain.items()
        for suffix in ("", parameter_names.EMA_SUFFIX, "/Adam", "/Adam_1")})

    def peak(call):  # VmHWM: ru_maxrss of a child starts at its parent's
        done = subprocess.run([sys.executable, "-c", MEASURE.format(call), HELPERS], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split()[-1])

    peaks = [
        peak("importing.import_official('model.ckpt-5', config, workdir='run', verify=False)"),
        peak("export.export_diffusers('run', 'church')"),
        peak("importing.import_diffusers('church', workdir='again', verify=False)"),
    ]
    print("peak GiB:", peaks)
    assert max(peaks) < 4.5  # 3.4 for the conversion, the rest for reading back what was saved
