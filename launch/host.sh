#!/bin/sh
# Runs on every worker, copied there by launch/tpu.py. POSIX sh; needs nothing but coreutils,
# setsid and (for setup) a Python with pip or a network for uv.
#
#   host.sh setup DIR EXTRA       virtual environment with the wheel in DIR; once per content
#   host.sh start NAME [--replace] [--coordinate] [--key=KEY] [K=V ...] -- CMD ...    detached
#   host.sh status NAME           one line: ddpm-status host= state= rc= pid= attempt= key= last=
#   host.sh logs NAME [LINES]
#   host.sh stop NAME [SECONDS]   TERM to the whole group, KILL after SECONDS, then unlock
#   host.sh latest WORKDIR        newest checkpoint's step
#   host.sh unlock                removes a libtpu lock file that no process holds
#   host.sh run -- CMD ...        CMD in the virtual environment, attached
#
# State: $DDPM_HOME (default ~/ddpm): venv/, run/NAME/{pid,rc,log,attempt,key}.
set -eu

HOME_DIR=${DDPM_HOME:-$HOME/ddpm}
VENV=$HOME_DIR/venv
LOCK=${DDPM_TPU_LOCK:-/tmp/libtpu_lockfile}
WHO=${DDPM_HOST_NAME:-$(hostname)}

die() {
    echo "host.sh: error: $WHO: $1" >&2
    exit "${2:-1}"
}

boot_id() {
    cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

# Prints the pid of a live run, or nothing. A pid from before a reboot is not believed.
alive() {
    [ -f "$1/pid" ] || return 0
    read -r pid boot < "$1/pid" || return 0
    [ "$boot" = "$(boot_id)" ] || return 0
    # A zombie answers to kill -0 as well.
    case "$(ps -o stat= -p "$pid" 2>/dev/null)" in '' | Z*) return 0 ;; esac
    echo "$pid"
}

new_enough() {
    "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    for python in ${DDPM_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if new_enough "$python"; then
            "$python" -m venv "$VENV"
            return
        fi
    done
    echo "host.sh: $WHO: $(python3 --version 2>&1) on this image, 3.11 needed: uv provides it"
    uv=$(command -v uv || true)
    [ -n "$uv" ] || uv=$HOME_DIR/uv/bin/uv
    if [ ! -x "$uv" ]; then
        # A folder of its own: Debian and Ubuntu refuse pip the user's and the system's.
        python3 -m pip install --quiet --target "$HOME_DIR/uv" uv 2>/dev/null ||
            curl -LsSf https://astral.sh/uv/install.sh |
                UV_INSTALL_DIR="$HOME_DIR/uv/bin" sh >/dev/null ||
            die "no Python 3.11, and uv could not be installed: is there a way to the internet?"
    fi
    "$uv" venv --quiet --seed --python 3.11 "$VENV" || die "uv could not provide Python 3.11"
}

setup() {
    dir=$1
    extra=$2
    if [ -f "$VENV/stamp" ] && cmp -s "$dir/stamp" "$VENV/stamp"; then
        echo "host.sh: $WHO: environment is up to date"
        return
    fi
    for run in "$HOME_DIR"/run/*; do
        [ -z "$(alive "$run")" ] ||
            die "$(basename "$run") is running; stop it before a new setup" 3
    done
    mkdir -p "$HOME_DIR"
    free=$(df -Pm "$HOME_DIR" | awk 'NR == 2 {print $4}')
    [ "$free" -ge "${DDPM_NEED_MB:-5000}" ] ||
        die "disk: $free MB free in $HOME_DIR, ${DDPM_NEED_MB:-5000} needed"
    rm -rf "$VENV"
    make_venv
    wheel=$dir/$(sed -n 2p "$dir/stamp")
    [ -f "$wheel" ] || die "no wheel in $dir"
    set --
    [ ! -f "$dir/constraints.txt" ] || set -- -c "$dir/constraints.txt"
    # shellcheck disable=SC2086  # DDPM_PIP_ARGS is a list
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" \
        ${DDPM_PIP_ARGS:-} "$wheel${extra:+[$extra]}" || die "pip could not install $wheel"
    cp "$dir/stamp" "$VENV/stamp"
    echo "host.sh: $WHO: installed $(basename "$wheel") with $("$VENV/bin/python" --version)"
}

metadata() {
    curl -sf -H 'Metadata-Flavor: Google' \
        "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# On machines of Compute Engine JAX finds no worker number by itself; the metadata has one.
coordinate() {
    workers=$(metadata worker-network-endpoints) || workers=
    DDPM_PROC=$(metadata worker-id) || DDPM_PROC=
    [ -n "$workers" ] && [ -n "$DDPM_PROC" ] ||
        die "no worker-id in the metadata: set DDPM_COORD, DDPM_NPROC, DDPM_PROC with --env"
    DDPM_NPROC=$(echo "$workers" | tr ',' '\n' | grep -c .)
    # Each is a host name, or NAME:ID:ADDRESS.
    DDPM_COORD=$(echo "$workers" | cut -d, -f1 | awk -F: '{print $NF}'):${JAX_COORDINATOR_PORT:-8476}
    export DDPM_PROC DDPM_NPROC DDPM_COORD
}

start() {
    name=$1
    shift
    run=$HOME_DIR/run/$name
    replace=
    key=-
    while [ $# -gt 0 ]; do
        case $1 in
        --replace) replace=1 ;;
        --key=*) key=${1#--key=} ;;
        --coordinate) coordinate ;;
        --) shift && break ;;
        *=*) export "${1?}" ;;
        *) die "start: what is $1?" 2 ;;
        esac
        shift
    done
    [ $# -gt 0 ] || die "start: no command after --" 2
    pid=$(alive "$run")
    if [ -n "$pid" ]; then
        [ -n "$replace" ] || die "$name is running (pid $pid); stop it, or --replace" 3
        stop "$name" 60
    fi
    mkdir -p "$run"
    rm -f "$run/rc" "$run/pid"
    attempt=$(($(cat "$run/attempt" 2>/dev/null || echo 0) + 1))
    echo "$attempt" > "$run/attempt"
    echo "$key" > "$run/key"
    echo "host.sh: attempt $attempt, $(date -u +%Y-%m-%dT%H:%M:%SZ): $*" >> "$run/log"
    export PATH="$VENV/bin:$PATH" JAX_COORDINATOR_PORT="${JAX_COORDINATOR_PORT:-8476}"
    export PYTHONUNBUFFERED=1
    cd "$HOME_DIR" # configs/ is there
    # The shell that writes rc must outlive the TERM that `stop` sends to the group.
    # shellcheck disable=SC2016  # expanded by the inner shell
    RUN=$run BOOT=$(boot_id) setsid sh -c '
        trap : TERM
        echo "$$ $BOOT" > "$RUN/pid.new" && mv "$RUN/pid.new" "$RUN/pid"
        "$@" && rc=0 || rc=$?
        echo "$rc" > "$RUN/rc.new" && mv "$RUN/rc.new" "$RUN/rc"
    ' ddpm "$@" < /dev/null >> "$run/log" 2>&1 &
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        if [ -f "$run/pid" ]; then
            echo "host.sh: $WHO: started $name, attempt $attempt"
            return
        fi
        sleep 0.5
    done
    die "$name did not start; see $run/log"
}

status() {
    run=$HOME_DIR/run/$1
    pid=$(alive "$run")
    rc=-
    if [ -n "$pid" ]; then
        state=running
    elif [ -f "$run/rc" ]; then
        state=exited
        rc=$(cat "$run/rc")
    elif [ -f "$run/pid" ]; then
        state=lost
    else
        state=absent
    fi
    last=$(tail -n 1 "$run/log" 2>/dev/null | cut -c1-200 || true)
    echo "ddpm-status host=$WHO state=$state rc=$rc pid=${pid:--}" \
        "attempt=$(cat "$run/attempt" 2>/dev/null || echo 0)" \
        "key=$(cat "$run/key" 2>/dev/null || echo -) last=$last"
}

stop() {
    run=$HOME_DIR/run/$1
    left=${2:-60}
    pid=$(alive "$run")
    if [ -n "$pid" ]; then
        kill -s TERM -- "-$pid" 2>/dev/null || true
        while [ -n "$(alive "$run")" ] && [ "$left" -gt 0 ]; do
            sleep 1
            left=$((left - 1))
        done
        if [ -n "$(alive "$run")" ]; then
            kill -s KILL -- "-$pid" 2>/dev/null || true
            sleep 0.2
        fi
    fi
    unlock
    echo "host.sh: $WHO: $1 is not running"
}

unlock() {
    [ -e "$LOCK" ] || return 0
    for maps in /proc/[0-9]*/maps; do
        if grep -q 'libtpu\.so' "$maps" 2>/dev/null; then
            echo "host.sh: $WHO: the TPU is held by pid $(echo "$maps" | cut -d/ -f3)" >&2
            return 0
        fi
    done
    rm -f "$LOCK" 2>/dev/null || sudo -n rm -f "$LOCK" 2>/dev/null ||
        die "cannot remove the stale lock $LOCK: sudo rm $LOCK"
    echo "host.sh: $WHO: removed the stale lock $LOCK"
}

latest() {
    # shellcheck disable=SC2010  # names that are not numbers are temporary folders
    ls "$1/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1
}

[ $# -gt 0 ] || die "which: setup, start, status, logs, stop, latest, unlock, run?" 2
what=$1
shift
case $what in
setup | start | status | stop | unlock | latest) "$what" "$@" ;;
logs) tail -n "${2:-40}" "$HOME_DIR/run/$1/log" 2>/dev/null || die "no log of $1" ;;
run)
    shift
    PATH="$VENV/bin:$PATH" exec "$@"
    ;;
*) die "no such command: $what" 2 ;;
esac
