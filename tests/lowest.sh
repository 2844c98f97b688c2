#!/usr/bin/env bash
# Installs the lowest versions that setup.cfg allows and runs the tests of the core on them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

venv=${DDPM_VENV_LOWEST:-.venv-tests-lowest}
make_venv "$venv"
"$venv/bin/python" - > "$venv/lowest.txt" <<'END'
import configparser

config = configparser.ConfigParser()
config.read("setup.cfg")
for line in config["options"]["install_requires"].split():
    name, _, bounds = line.partition(">=")
    print(f"{name}=={bounds.split(',')[0]}" if bounds else name)
END
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$venv/lowest.txt" pytest hypothesis
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -e .
"$venv/bin/python" -m pytest tests/training tests/test_checkpoints.py \
    "tests/test_run.py::test_a_run_cut_off_and_continued_is_bit_equal" -p no:warnings
