import subprocess
import sys


def test_help_and_errors_on_the_command_line():
    words = [sys.executable, "-m", "ddpm_jax", "compile"]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True)
    assert "v5litepod-8" in done.stdout
    done = subprocess.run([*words, "--config=digits", "--topology=v12-8"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2 and "ddpm: error: topology: 'v12-8' is unknown" in done.stderr
    assert "Traceback" not in done.stderr.partition("ddpm: error")[2]
