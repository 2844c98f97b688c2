#!/usr/bin/env bash
# Installs the lowest versions that setup.cfg allows and runs the tests of the core on them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

# uv asks its own list of authorities unless told to ask the machine, as pip does.
export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
unset PYTHONDONTWRITEBYTECODE  # as in tests/run.sh
venv=${DDPM_VENV_LOWEST:-.venv-tests-lowest}
PYTHON_VERSIONS="3.11 3.12 3.13" make_venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check uv
# A copy is installed, so that tests/run.sh can install this folder at the same time.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -r ddpm_jax setup.cfg pyproject.toml README.md LICENSE "$source"
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --resolution lowest-direct "$source" \
    'pytest>=8' 'hypothesis>=6.100' 'pytest-xdist>=3.6' 'pytest-timeout>=2.3'
# A third of the time to compile; newer releases do not know these flags.
export XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"$venv/bin/python" -m pytest -n 2 tests/training tests/test_checkpoints.py \
    "tests/test_train.py::test_a_run_cut_off_and_continued_is_bit_equal" -W ignore
