#!/usr/bin/env bash
# Installs the lowest versions that setup.cfg allows and runs the tests of the core on them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

venv=${DDPM_VENV_LOWEST:-.venv-tests-lowest}
make_venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check uv
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --resolution lowest-direct -e . \
    'pytest>=8' 'hypothesis>=6.100' 'pytest-xdist>=3.6'
"$venv/bin/python" -m pytest -n 2 tests/training tests/test_checkpoints.py \
    "tests/test_run.py::test_a_run_cut_off_and_continued_is_bit_equal" -p no:warnings
