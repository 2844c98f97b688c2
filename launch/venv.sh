# Sourced by quickstart.sh, tests/run.sh and tests/lowest.sh: `make_venv FOLDER` makes a virtual
# environment there, also where Debian's python3 came without ensurepip. PYTHON names the Python; else
# it is the newest for which every dependency has wheels, because the newest JAX is the fastest: from
# the PATH, from pyenv or from uv, whether or not it is the python3 of the shell.
# shellcheck shell=bash

PYTHON_VERSIONS=${PYTHON_VERSIONS:-3.13 3.12 3.11 3.14}  # in the order in which they are tried

can_make_venv() {
    "$1" -c 'import importlib.util as util, sys, sysconfig
packages = util.find_spec("ensurepip") or util.find_spec("pip")
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")  # few wheels
sys.exit(sys.version_info < (3, 11) or not packages or bool(free_threaded))' >/dev/null 2>&1
}

find_python() {
    local candidate version
    if [ -n "${PYTHON:-}" ]; then
        if can_make_venv "$PYTHON"; then command -v "$PYTHON"; return 0; fi
        echo "error: PYTHON=$PYTHON is no Python >= 3.11 with ensurepip or pip; name another one," \
            "or unset PYTHON" >&2
        return 1
    fi
    for version in $PYTHON_VERSIONS; do
        for candidate in "python$version" \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
            "${XDG_DATA_HOME:-$HOME/.local/share}/uv/python/cpython-$version".*/bin/python3; do
            if can_make_venv "$candidate"; then command -v "$candidate"; return 0; fi
        done
    done
    if can_make_venv python3; then command -v python3; return 0; fi
    echo "error: no Python >= 3.11 with ensurepip or pip on the PATH, in pyenv or in uv; install one" \
        "(Debian, Ubuntu: apt-get install python3-venv), or name it: PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    local venv=$1 python
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return 0
    python=$(find_python) || return 1
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv" && return 0
    fi
    # No ensurepip: an empty environment, filled by the pip that the machine has.
    if "$python" -m pip --version >/dev/null 2>&1 \
        && "$python" -m venv --without-pip "$venv" \
        && "$python" -m pip --python "$venv/bin/python" install -q pip; then
        return 0
    fi
    echo "error: $python could not make a virtual environment in $venv" >&2
    return 1
}
