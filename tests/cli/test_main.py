import json
import os
import pathlib
import socket
import subprocess
import sys
import tarfile

import pytest
from xla_flags import xla_flags

from ddpm_jax.cli import main

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "workdir-84ae50c"


def ddpm(*argv):
    return subprocess.run([sys.executable, "-m", "ddpm_jax", *argv], capture_output=True, text=True)


def test_help_lists_every_subcommand_without_importing_jax():
    code = ("import sys; from ddpm_jax.cli.main import main; main(['--help']); "
            "print('jax' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name in main.SUBCOMMANDS:
        assert f"  {name} " in out
    assert out.splitlines()[-1] == "False"


def test_every_subcommand_explains_itself_without_importing_jax():
    names = list(main.SUBCOMMANDS)
    code = ("import sys; from ddpm_jax.cli.main import main\n"
            f"for name in {names}: print('==', main([name, '--help']))\n"
            "print('JAX', 'jax' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name, text in zip(names, out.split("== 0\n"), strict=False):
        assert text.startswith(f"ddpm {name}") and "flags:" in text
    assert "JAX False" in out
    assert "  --config.train.clip_norm=1.0   the largest norm of a gradient; 0 = off\n" in out


@pytest.mark.parametrize("argv, message", [
    (["trian"], "no subcommand 'trian' (did you mean train?); known: train, sample"),
    (["help", "trian"], "did you mean train?"),
    (["train", "--workdir=/nonexistent/x"], "--config is missing"),
    (["train", "--config=digits"], "--workdir is missing"),
    (["train", "--config=nothing"], "packaged: celebahq256"),
    (["train", "--config=digits", "--config.model.chh=3"],
     "config has no field 'model.chh' (did you mean --config.model.ch"),
    (["train", "--config=digits", "--config.trian.steps=3"], "did you mean --config.train.steps?"),
    (["train", "--config=digits", "--config.diffusion.schedule.beta=3"], "config has no field"),
    (["train", "--config=digits", "--steps=5"], "did you mean --config.train.steps or"),
    (["train", "--config.train.steps=5"], "--config, which is missing"),
    (["sample", "--workdr=x"], "no flag --workdr here (did you mean --workdir?)"),
    (["train", "--config=digits", "--config.model.ch=many"], "--config.model.ch=many"),
    (["train", "--config=digits", "--workdir=/none/x", "here"], "unexpected argument 'here'"),
    (["sample", "--workdir=/nonexistent/run", "--out=/nonexistent/x"], "no run here"),
    (["train", "--nonsense=1"], "nonsense"),
])
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    line, = [line for line in err.splitlines() if line.startswith("ddpm: error:")]
    assert message in line and not out and "Traceback" not in err


def test_no_argument_prints_the_usage():
    done = ddpm()
    assert done.returncode == 2 and "usage: ddpm <subcommand>" in done.stdout
    assert ddpm("--version").stdout.strip().count(".") == 2


def test_help_of_a_subcommand(capsys):
    assert main.main(["help", "train"]) == 0
    text = capsys.readouterr().out
    assert main.main(["train", "--help"]) == 0 and text == capsys.readouterr().out


@pytest.mark.slow
def test_main_can_be_called_again(capsys):
    """As from a notebook: each call has its own flags and keeps its own changes."""
    for steps in (3, 4):
        words = ["compile", "--config=digits", f"--config.train.steps={steps}", "--topology=cpu:1",
                 "--config.model.ch=4", "--config.model.ch_mult=(1,)",
                 "--config.model.num_res_blocks=1", "--config.model.attn_resolutions=()",
                 "--config.model.num_groups=2", "--json", "--config.train.steps_per_dispatch=1"]
        assert main.main(words) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["about"]["config"] == "digits"
    assert main.main(["compile", "--config=digits"]) == 2
    assert "--topology is missing" in capsys.readouterr().err


@pytest.mark.parametrize("variable, value, message", [
    ("JAX_PLATFORMS", "wrong", "JAX_PLATFORMS=wrong: "), ("JAX_PLATFORMS", "cuda", "as this"),
    ("XLA_FLAGS", "--xla_no_such=1", "unknown: --xla_no_such=1; correct or unset it"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=many", "XLA cannot read it"),
    ("JAX_ENABLE_X64", "maybe", "JAX refuses a JAX_* variable"),
])
def test_a_wrong_environment_is_one_line_and_status_2(variable, value, message):
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_jax", "bench", "step", "--config=digits"],
        env={**os.environ, variable: value}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ddpm: error: ") and message in done.stderr


def test_nothing_is_written_about_a_gpu_that_is_not_there():
    """With the CUDA plugin installed, too; see tests of `start` for lines that stay."""
    assert ddpm("data", "info", "--name=digits").stderr == ""


def in_a_pod(folder, *commands):
    """Start the commands as processes 0, 1 of one pod -> their exit codes and what they wrote."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = []
    for i, command in enumerate(commands):
        with open(folder / f"log_{i}", "w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={
                **os.environ, "DDPM_COORD": f"127.0.0.1:{port}", "DDPM_PROC": str(i),
                "DDPM_NPROC": str(len(commands)), "DDPM_HEARTBEAT": "5",
                "XLA_FLAGS": xla_flags(1)}))
    try:
        codes = [p.wait(150) for p in running]  # without leave() it takes 300 s and more
    finally:
        for p in running:
            p.kill()
            p.wait()
    return codes, [(folder / f"log_{i}").read_text() for i in range(len(commands))]


@pytest.mark.multiprocess
def test_bad_input_on_one_host_ends_the_pod(tmp_path):
    """With 2 and one line there; the other host's end says that it lost a peer."""
    with tarfile.open(GOLDEN / "workdir.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "run").rename(tmp_path / "b")
    command = [sys.executable, "-m", "ddpm_jax", "train", "--config=digits"]
    codes, texts = in_a_pod(tmp_path, [*command, f"--workdir={tmp_path / 'a'}"],
                            [*command, f"--workdir={tmp_path / 'b'}"])
    assert codes[1] == 2 and "belongs to a run with another config" in texts[1], texts[1]
    assert "Traceback" not in texts[1]
    assert codes[0] in (134, -6), texts[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("cause, code", [
    ("RuntimeError('Gloo allreduce failed: Connection closed by peer')", 134),
    ("OSError(28, 'No space left on device')", 2),
])
def test_a_failed_save_in_a_pod_is_a_lost_peer_or_the_users(tmp_path, cause, code):
    program = (
        "import sys\n"
        "from ddpm_jax.cli import main\n"
        "from ddpm_jax.errors import UserError\n"
        "from ddpm_jax.parallel import pod\n"
        "pod.initialize()\n"
        "class Module:\n"
        "    define_flags = staticmethod(lambda define: None)\n"
        "    def main(values, words):\n"
        f"        raise UserError('saving step 3 failed') from {cause}\n"
        "sys.modules['ddpm_jax.cli.train'] = Module\n"
        "sys.exit(main.main(['train']))\n")
    codes, texts = in_a_pod(tmp_path, *[[sys.executable, "-c", program]] * 2)
    assert codes == [code, code], texts
    assert all("ddpm: error: saving step 3 failed" in text for text in texts)
