#!/usr/bin/env bash
# From nothing to samples: makes a virtual environment, installs, trains a small model, evaluates it,
# draws samples and shows the run's page. Needs Python >= 3.11, pip and the package index; no root,
# no accelerator.
#
#   bash launch/quickstart.sh [digits|fashion] [--config.any.field=value ...]
#
# digits (default): scikit-learn's 8x8 digits, which come with that package. fashion: Fashion-MNIST,
# from Debian's package dataset-fashion-mnist where it is installed, else from the network.
# DDPM_VENV: where the environment goes (default .venv); PYTHON: which Python makes it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

images=digits
case ${1:-} in
    digits | fashion) images=$1 && shift ;;
    "" | --config.*) ;;
    *) echo "usage: bash launch/quickstart.sh [digits|fashion] [--config.FIELD=VALUE ...]" >&2
       exit 2 ;;
esac
run=runs/$images

venv=${DDPM_VENV:-.venv}
echo "== installing into $venv"
make_venv "$venv"
"$venv/bin/python" -m pip install -q -e .
ddpm=$venv/bin/ddpm
start=$(date +%s)

if [ "$images" = fashion ]; then
    config=fashion_mnist:small calls=100
    evaluation=(--metrics=bpd --splits=test --bpd_num=64)
    if ! "$ddpm" data info --name=fashion_mnist >/dev/null 2>&1; then
        echo "== preparing Fashion-MNIST"
        files=/usr/share/datasets/fashion-mnist
        [ -d $files ] || files=
        "$ddpm" data prepare --name=fashion_mnist ${files:+"--from=$files"}
    fi
else
    config=digits calls=20
    evaluation=(--metrics=bpd,offline,nn --splits=test --num=1000 --steps=20)
fi

echo "== training"
"$ddpm" train --config=$config --workdir="$run" "$@"
echo "== drawing 100 samples"
"$ddpm" sample --workdir="$run" --num=100 --steps="$calls" --out="$run/100-samples"
echo "== evaluating the model"
"$ddpm" evaluate --workdir="$run" "${evaluation[@]}"
page=$run/evaluation.html
if "$ddpm" report --workdir="$run" >/dev/null 2>&1; then
    page=$run/index.html
fi
cat <<END
== done in $(($(date +%s) - start)) s after the installation: $page
   samples   $run/100-samples/grid.png (from noise to image: progressive.png; arrays: samples.npz)
   numbers   $run/evaluation.html

   Commands to try next:
   $ddpm sample --workdir=$run --num=100 --out=$run/100-samples-of-all-timesteps
   $ddpm sample --workdir=$run --sampler=dpmpp_2m --steps=20 --num=100 --out=$run/100-samples-fast
   $ddpm reproduce table1 --dry_run
END
if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] && command -v xdg-open >/dev/null; then
    xdg-open "$page" >/dev/null 2>&1 &
elif [ "$(uname)" = Darwin ]; then
    open "$page"
fi
