#!/usr/bin/env bash
# From nothing to samples: makes a virtual environment, installs, trains on scikit-learn's
# handwritten digits (they come with that package), samples and evaluates. Needs Python >= 3.11, pip
# and the package index; no root, no accelerator. Output: runs/digits.
#
#   bash launch/quickstart.sh [--config.any.field=value ...]     e.g. --config.train.steps=500
#
# DDPM_VENV: where the environment goes (default .venv); PYTHON: which Python makes it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

venv=${DDPM_VENV:-.venv}
echo "== installing into $venv"
make_venv "$venv"
"$venv/bin/python" -m pip install -q -e .
start=$(date +%s)

echo "== training on the digits"
"$venv/bin/ddpm" train --config=configs/digits.py --workdir=runs/digits "$@"
echo "== sampling 1,000 digits"
"$venv/bin/ddpm" sample --workdir=runs/digits --num=1000 --out=runs/digits/drawn
echo "== evaluating them with a small classifier trained on the real digits"
"$venv/bin/ddpm" evaluate --samples=runs/digits/drawn/samples.npz --dataset=digits \
    --metrics=offline --num=1000 --out=runs/digits/judged
cat <<END
== done in $(($(date +%s) - start)) s after the installation
   samples      runs/digits/drawn/grid.png (all: samples.npz; along the chain: progressive.png)
   loss curve   runs/digits/loss.png
   metrics      runs/digits/metrics.jsonl, runs/digits/judged/
END
