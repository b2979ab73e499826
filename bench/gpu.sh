#!/usr/bin/env bash
# The speed matrix on one GPU, within 9 minutes: bash bench/gpu.sh. Results go to $OUT, or to bench/results/gpu, one
# line for each cell, so that whatever there was time for is kept; what bench/results/gpu holds is not measured again.
# --dry-run goes through the same stages on the CPU: a tiny model, a few cells of each, torch.compile without Inductor,
# of AOTInductor the arguments alone.
# The status is 1 if a cell failed or is wrong, or a stage was ended.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
kept=bench/results/gpu/speed.jsonl
out=${OUT:-bench/results/gpu}
budget=${SECONDS_IN_ALL:-490} # of 540; a stage that hangs is ended 20 seconds after its time
status=0
on=(--device cuda --dtype bfloat16)
instead=()
if [ "${1:-}" = --dry-run ]; then # the last value of an option counts; those before it are checked all the same
    instead=(--device cpu --dtype float32 --config tiny --layers 1 --tokens 8 --r 8 --repeats 3 --cell-seconds 0.1
        --backend eager --shapes "decode 1,training" --contenders "live auto,LoRA")
    kept=
    out=${OUT:-$(mktemp -d)}
fi

mkdir -p "$out" || exit 1
if [ -f "$kept" ] && [ ! -e "$out/speed.jsonl" ]; then cp "$kept" "$out/speed.jsonl"; fi

# stage SECONDS ARGUMENTS...: at most so long, and no longer than what is left of the whole
stage() {
    local limit=$1 left=$((budget - SECONDS))
    shift
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -lt 20 ]; then echo "no time is left for: $*"; return; fi
    local minutes="$((limit / 60)).$(printf %02d $((limit % 60 * 100 / 60)))"
    echo "== $* (at most $minutes minutes, at $SECONDS s)"
    timeout --signal=INT --kill-after=10 $((limit + 20)) \
        "$python" -m bench speed --out "$out/speed.jsonl" --minutes "$minutes" --cell-seconds 1.5 "$@" \
        ${instead[@]+"${instead[@]}"} || status=1
}

first="base,live auto,live lowrank,residual hooks,LoRA,merged,folded"
inplace="base,live auto,live lowrank,residual hooks,LoRA,merged,live output,live pair,live dense,PiSSA,PSOFT"
some="prefill,decode 1,training"
stage 130 "${on[@]}" --config qwen3-0.6b --runtimes eager --contenders "$inplace"
stage 200 "${on[@]}" --config qwen3-0.6b --layers 4 --runtimes eager,compile,max-autotune --shapes "$some"
stage 90 "${on[@]}" --config qwen3-4b --layers 4 --runtimes eager,compile --shapes "$some" --contenders "$first"
stage 60 "${on[@]}" --config qwen3-0.6b --layers 4 --runtimes aoti --shapes "prefill,decode 1"
stage 400 "${on[@]}" --config qwen3-0.6b --layers 4 --runtimes eager,compile,max-autotune
echo "done at $SECONDS s: $out/speed.jsonl"
exit $status
