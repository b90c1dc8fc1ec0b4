#!/usr/bin/env bash
# What only a GPU shows, in one command: benchmarks/gpu.sh DATA OUT
#
# DATA is the folder of CIFAR-100; figures, logs and runs go to OUT, which must not exist. Times the full recipe in each
# way to run its step, from process start to the final metrics and from an empty compiler cache, then the unaccelerated
# path; then training against the baseline; then training and inference by part; then the step of each recipe for large
# data, on noise, with its memory as counted beforehand and as the allocator has it. Before all that come the tests of
# what fake tensors cannot show (tests/test_fake_cuda.py): backward, optimizer, compiled steps, CUDA graphs, resuming.
# Environment variables shrink it: WAYS, SEEDS, EPOCHS, CRT_EPOCHS, DEVICE, ROUNDS, STEPS, BATCH and RECIPES. A trial on
# a CPU:
#
#     WAYS='eager plain' DEVICE=cpu EPOCHS=1 CRT_EPOCHS=1 ROUNDS=1 STEPS=2 BATCH=2 RECIPES= benchmarks/gpu.sh DATA OUT
set -euo pipefail
data=$(realpath "$1")
mkdir "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
rounds=${ROUNDS:-5}
steps=${STEPS:+--num-bench-iter $STEPS}
epochs=${EPOCHS:-180}
crt_epochs=${CRT_EPOCHS:-20}
schedule=(
    --epochs "$epochs" --warmup-epochs $((epochs > 5 ? 5 : 0))
    --crt-epochs "$crt_epochs" --crt-warmup-epochs $((crt_epochs > 5 ? 5 : 0)) --val-interval "$epochs"
)

python -m pytest tests/test_cuda.py 2>&1 | tee "$out/tests.txt" || echo 'tests/test_cuda.py fails'
for seed in ${SEEDS:-0}; do
    for way in ${WAYS:-eager bfloat16 compiled graphs plain}; do
        case $way in
            eager) options=(--no-torchcompile) ;;
            bfloat16) options=(--no-torchcompile --amp-dtype bfloat16) ;;
            compiled) options=(--torchcompile) ;;
            graphs) options=(--torchcompile --torchcompile-mode reduce-overhead) ;;
            plain) options=(--no-amp --no-channels-last --no-torchcompile --no-device-data --workers 8) ;;
            *) echo "WAYS: '$way' is not one of eager, bfloat16, compiled, graphs, plain" >&2; exit 2 ;;
        esac
        name=$way-$seed
        start=$(date +%s%N)
        if TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python train.py --hparams hparams/cifar100_lt_if100.yaml \
            --data-dir "$data" --device "$device" "${schedule[@]}" --output "$out/runs" --experiment "$name" \
            --seed "$seed" "${options[@]}" > "$out/$name.log" 2>&1; then
            echo "$name: $((($(date +%s%N) - start) / 1000000)) ms, $(grep 'stage_two ensemble' "$out/$name.log")"
        else
            echo "$name: failed, $(tail -n 1 "$out/$name.log")"
        fi | tee -a "$out/runs.txt"
    done
done
python benchmarks/ratio.py --data-dir "$data" --device "$device" --workers 8 --num-turns "$rounds" \
    $steps --results-file "$out/ratio.json" | tee "$out/ratio.txt"
for stage in 1 2; do
    python benchmarks/benchmark.py --hparams hparams/cifar100_lt_if100.yaml --data-dir "$data" --device "$device" \
        --stage "$stage" --num-rounds "$rounds" $steps --results-file "$out/resnet32-$stage.json" |
        tee "$out/resnet32-$stage.txt"
done
python benchmarks/benchmark.py --model resnet50_shike --compare resnet50 --batch-size "${BATCH:-64}" --device "$device" --amp \
    --channels-last --num-rounds "$rounds" $steps --results-file "$out/resnet50.json" |
    tee "$out/resnet50.txt"
for recipe in ${RECIPES-imagenet_lt_resnet50 imagenet_lt_resnext50 inat2018_resnet50 places_lt_resnet152}; do
    for bench in memory train; do
        python benchmarks/benchmark.py --hparams "$recipe" --bench "$bench" --device "$device" --num-rounds "$rounds" $steps \
            --results-file "$out/$recipe-$bench.json" | tee "$out/$recipe-$bench.txt"
    done
done
