#!/usr/bin/env bash
# What only a GPU shows, in one command: benchmarks/gpu.sh DATA OUT
#
# DATA is the folder of CIFAR-100; figures, logs and runs go to OUT, which must not exist. Times the full recipe in each
# way to run its step, from process start to the final metrics, beside the unaccelerated path; then training against
# the baseline, and training and inference by part. SEEDS, EPOCHS, CRT_EPOCHS, DEVICE, BATCH and ROUNDS (environment)
# shrink it for a trial, for example DEVICE=cpu EPOCHS=1 CRT_EPOCHS=1 ROUNDS=1 BATCH=2.
set -euo pipefail
data=$(realpath "$1")
mkdir "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
epochs=${EPOCHS:-180}
crt_epochs=${CRT_EPOCHS:-20}
warmup=$((epochs > 5 ? 5 : 0))
crt_warmup=$((crt_epochs > 5 ? 5 : 0))

run() {  # NAME OPTIONS...: a whole run, its seconds and top-1 to runs.txt
    local name=$1 start seconds
    shift
    start=$(date +%s.%N)
    python train.py --hparams hparams/cifar100_lt_if100.yaml --data-dir "$data" --device "$device" \
        --epochs "$epochs" --warmup-epochs "$warmup" --crt-epochs "$crt_epochs" --crt-warmup-epochs "$crt_warmup" \
        --val-interval "$epochs" --output "$out/runs" --experiment "$name" "$@" > "$out/$name.log" 2>&1
    seconds=$(echo "$(date +%s.%N) - $start" | bc)
    python - "$name" "$seconds" "$out/runs/$name/metrics.json" >> "$out/runs.txt" <<'PY'
import json, sys
name, seconds, path = sys.argv[1:]
stages = json.load(open(path))
print(f'{name}: {float(seconds):.1f} s,', ', '.join(f"{s} top-1 {m['top1']} in {m['seconds']} s" for s, m in stages.items()))
PY
    tail -n 1 "$out/runs.txt"
}

for seed in ${SEEDS:-0}; do
    run "eager-$seed" --seed "$seed" --no-torchcompile
    run "compiled-$seed" --seed "$seed"
    run "graphs-$seed" --seed "$seed" --torchcompile-mode reduce-overhead
    run "bfloat16-$seed" --seed "$seed" --amp-dtype bfloat16
    run "plain-$seed" --seed "$seed" --no-amp --no-channels-last --no-torchcompile --no-device-data --workers 8
done
python benchmarks/ratio.py --data-dir "$data" --device "$device" --workers 8 --num-turns "${ROUNDS:-5}" \
    --results-file "$out/ratio.json" | tee "$out/ratio.txt"
for stage in 1 2; do
    python benchmark.py --hparams hparams/cifar100_lt_if100.yaml --data-dir "$data" --device "$device" --stage "$stage" \
        --num-rounds "${ROUNDS:-5}" --results-file "$out/resnet32-$stage.json" | tee "$out/resnet32-$stage.txt"
done
python benchmark.py --model resnet50_shike --compare resnet50 --batch-size "${BATCH:-64}" --device "$device" \
    --amp --channels-last --num-rounds "${ROUNDS:-5}" --results-file "$out/resnet50.json" | tee "$out/resnet50.txt"
