# Sourced by quickstart.sh and tests/run.sh: `make_venv FOLDER` makes a virtual environment there
# with a Python >= 3.11 and pip, also where Debian's python3 came without ensurepip.
# shellcheck shell=bash

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: no Python >= 3.11 on the PATH; install one, or name it: PYTHON=/path/to/python" >&2
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
    echo "error: $python can make no virtual environment: it has neither ensurepip nor pip." >&2
    echo "       Debian, Ubuntu: apt-get install python3-venv" >&2
    return 1
}
