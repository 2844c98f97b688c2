#!/usr/bin/env bash
# Everything that one GPU can show, row by row, each row a JSON file of FOLDER.
#
#   bash benchmarks/gpu.sh [--tiny] FOLDER [ROW ...]
#   bash benchmarks/gpu.sh --list
#
# A row whose file exists is skipped, so a call goes on where the last one ended; no row is started
# that would end more than LIMIT seconds (default 570) after the call began. Exit status: 0 all rows
# are there, 75 rows are left (call again), 1 a row failed. Then: ddpm bench page.
# --tiny: the same rows with a network of a few thousand weights, on a CPU, to test this script.
# DATA: folder of `ddpm data prepare --name=folder` with 32x32 images, for the rows start-* and
# train; without it they use made-up images. COMMIT: what the rows are of (default: git's). WORK: where
# traces, runs and the cache of the start rows go (default: FOLDER/work, which git ignores).
set -uo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
rows_of=("${PYTHON:-python}" "$home/benchmarks/gpu_rows.py")
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

# name, seconds that it takes on an H100 at most, function, its words
NORMS=(xla triton_padded)  # parallel.norm_kernel of some rows; all others: auto
rows() {
    cat <<END
step128 120 step
step512 150 step --config.train.batch_size=512
step128-50-a-dispatch 150 step --config.train.steps_per_dispatch=50
step128-paper-clip 200 step --config.train.clip_scope=per_replica
step128-paper-clip-convolutions 200 step --config.train.clip_scope=per_replica --config.parallel.clip_kernel=convolutions
step128-float32 150 step --config.model.dtype=float32
step128-float32-norm-xla 150 step --config.model.dtype=float32 --config.parallel.norm_kernel=xla
step128-float32-paper-clip 250 step --config.model.dtype=float32 --config.train.clip_scope=per_replica
sample512 100 sample
step128-diffusers 200 step --compare=diffusers
step128-diffusers-compiled 300 step --compare=diffusers_compiled
profile128 200 profile step
profile128-paper-clip 300 profile step --config.train.clip_scope=per_replica
profile-sample512 200 profile sample
$(for norm in "${NORMS[@]}"; do
    echo "step128-norm-$norm 150 step --config.parallel.norm_kernel=$norm"
    echo "step512-norm-$norm 200 step --config.train.batch_size=512 --config.parallel.norm_kernel=$norm"
    echo "sample512-norm-$norm 150 sample --config.parallel.norm_kernel=$norm"
    echo "profile128-norm-$norm 250 profile step --config.parallel.norm_kernel=$norm"
done)
step128-attention-xla 150 step --config.parallel.attention_kernel=xla
sample512-attention-xla 150 sample --config.parallel.attention_kernel=xla
start-cold 200 start
start-warm 100 start
train 560 train
celebahq256-step64 400 large
END
}

tiny=() config=cifar10 large=celebahq256 image=32 train_seconds=300 start_steps=1 chain=50
if [ "${1:-}" = --list ]; then rows; exit 0; fi
if [ "${1:-}" = --tiny ]; then
    shift
    config=digits large=digits image=8 train_seconds=30 chain=5
    # shellcheck disable=SC2054 # the comma is Python's
    tiny=(--config.model.ch=4 "--config.model.ch_mult=(1,)" --config.model.num_res_blocks=1
          "--config.model.attn_resolutions=()" --config.model.num_groups=2
          --config.train.batch_size=8 --config.diffusion.num_timesteps=10
          --config.sampler.batch_size=8)
fi
[ $# -ge 1 ] || { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
folder=$1 && shift
mkdir -p "$folder" || exit 2
work=${WORK:-$folder/work} limit=${LIMIT:-570}
mkdir -p "$work" && echo "*" >"$work/.gitignore" || exit 2
measure=(--seconds=20 --rounds=20)
[ ${#tiny[@]} = 0 ] || measure=(--seconds=0 --rounds=3)
common=("--config=$config" --config.model.dtype=bfloat16 --config.train.clip_scope=global
        --config.train.steps_per_dispatch=1)

# Each function writes the file $out; "${tiny[@]}" comes last, so that it decides.
step() { "${ddpm[@]}" bench step "${common[@]}" "${measure[@]}" --out="$out" "$@" "${tiny[@]}"; }

sample() {
    "${ddpm[@]}" bench sample "${common[@]}" "${measure[@]}" --config.sampler.batch_size=512 \
        --config.sampler.steps=$chain --out="$out" "$@" "${tiny[@]}"
}

profile() {
    local what=$1 && shift
    rm -rf "$work/trace-$name"
    "$what" --profile="$work/trace-$name" "$@"
}

large() {
    "${ddpm[@]}" bench step "--config=$large" --config.model.dtype=bfloat16 "${measure[@]}" \
        --config.train.clip_scope=global --config.train.steps_per_dispatch=1 \
        --config.train.batch_size=64 --out="$out" "$@" "${tiny[@]}"
}

data_flags() {  # -> flags: the prepared set DATA, or one of made-up images
    local data=${DATA:-}
    if [ -z "$data" ] && [ ${#tiny[@]} = 0 ]; then
        data=$work/data
        [ -d "$data/folder" ] || {
            "${rows_of[@]}" pictures "$work/pictures" $image &&
            "${ddpm[@]}" data prepare --name=folder --dir="$data" --from="$work/pictures" \
                --image_size=$image || return 1
        }
    fi
    flags=()
    [ -z "$data" ] || flags=(--config.data.name=folder "--config.data.dir=$data")
}

start() {  # from the command's start to its first step; cold: with an empty compilation cache
    data_flags || return 1
    [ "$name" != start-cold ] || rm -rf "$work/cache"
    rm -rf "$work/start"
    JAX_COMPILATION_CACHE_DIR=$work/cache "${rows_of[@]}" command "$out" start "$name" "train 1/" -- \
        "${ddpm[@]}" train "${common[@]}" "${flags[@]}" --workdir="$work/start" \
        --config.train.steps=$start_steps --config.eval.sample_every=0 "${tiny[@]}"
}

train() {  # five minutes of training, then 100 samples
    data_flags || return 1
    "${ddpm[@]}" train "${common[@]}" "${flags[@]}" --workdir="$work/run" \
        --config.train.steps_per_dispatch=50 --config.train.log_every=100 \
        --config.train.steps=1000000 --config.checkpoint.every=1000000 \
        --config.eval.sample_every=0 --config.optimizer.warmup_steps=500 \
        --config.ema.decay=0.999 "${tiny[@]}" &
    local run=$!
    (sleep "${TRAIN_SECONDS:-$train_seconds}"; kill -TERM $run 2>/dev/null) &
    local timer=$!
    wait $run  # SIGTERM: it saves and ends
    kill $timer 2>/dev/null
    rm -rf "$work/samples"
    "${rows_of[@]}" command "$work/sample.json" sample samples100 "" -- \
        "${ddpm[@]}" sample --workdir="$work/run" --num=100 --out="$work/samples" || return 1
    cp "$work/samples/grid.png" "$folder/train-samples.png"
    "${rows_of[@]}" run "$out" "$work/run" "$work/sample.json"
}

began=$SECONDS failed=() left=() chosen=" $* "
while read -r name seconds function words; do
    [ "$chosen" = "  " ] || [[ $chosen = *" $name "* ]] || continue
    out=$folder/$name.json
    [ ! -e "$out" ] || { echo "== $name: $out exists"; continue; }
    [ ${#tiny[@]} = 0 ] || seconds=0
    rest=$((limit - SECONDS + began))
    if [ "$seconds" -gt $rest ]; then left+=("$name"); continue; fi
    ddpm=(timeout $((rest + 20)) "${PYTHON:-python}" -m ddpm_jax)
    echo "== $name"
    before=$SECONDS
    # shellcheck disable=SC2086 # words are flags
    if $function $words </dev/null && [ -e "$out" ]; then
        "${rows_of[@]}" stamp "$out" "$home" || exit 1
        echo "== $name: $((SECONDS - before)) s"
    else
        failed+=("$name")
        echo "== $name: FAILED" >&2
    fi
done < <(rows)
echo "== failed: ${failed[*]:-none}; left for the next call: ${left[*]:-none}"
[ ${#failed[@]} = 0 ] || exit 1
[ ${#left[@]} = 0 ] || exit 75
