#!/usr/bin/env bash
# Build, check and time on a machine with a GPU, from the repository's root:
#   bash bench/gpu.sh build kernels step counterfactual tests,gpu-tests,digits
# Parts with commas between them run at the same time, which is for checks and not for times. A part that fails does not
# stop the others. Results go to bench/results; logs and a copy of the new results to $OUT (a temporary folder without
# it). A machine without network takes what it lacks from wheels in .whl/.
set -u -o pipefail
OUT=${OUT:-$(mktemp -d)}
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-/tmp/site}

run() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    echo "== $name: exit $? after $((SECONDS - started)) s
$(tail -n 12 "$OUT/$name.log" | cut -c1-400)"
}

build() {
    compgen -G '.whl/*.whl' >/dev/null &&
        python3 -m pip install -q --no-index --no-deps --no-compile --target "$PYTHONPATH" .whl/*.whl
    python3 -m pip install -q --no-index --no-build-isolation --no-deps --target "$PYTHONPATH" .
}

models() {
    local model dtype batch
    for model in stable-diffusion-1.x cin256-v2; do
        for dtype in fp16 bf16; do
            for batch in 1 8; do
                python3 -m bench.real_models --model $model --dtype $dtype --batch $batch --record
            done
        done
    done
}

part() {
    case $1 in
        build) run build 180 bash -c "$(declare -f build); build" ;;
        tests) run tests 200 python3 -m pytest -q -n 10 -p no:cacheprovider tests/kernels --deselect \
            tests/kernels/test_compile_for_gpus.py ;;
        gpu-tests) run gpu-tests 150 python3 -m pytest -q -p no:cacheprovider -m gpu $(grep -rl mark.gpu tests) ;;
        kernels) run kernels 120 python3 -m bench.kernels --op all --seconds 1 --record ;;
        step) run step 150 python3 -m bench.gpu --suite step --record ;;
        inductor) run inductor 300 python3 -m bench.gpu --suite step --batches 1 --inductor ;;
        counterfactual) run counterfactual 150 python3 -m bench.gpu --suite counterfactual --record ;;
        digits) run digits 150 python3 -m bench.gpu --suite digits --record ;;
        metrics) run metrics 120 python3 -m bench.metrics --batch-size 1024 --record ;;
        models) run models 150 bash -c "$(declare -f models); models" ;;
        *) echo "unknown part: $1" ;;
    esac
}

for group in "$@"; do
    for name in ${group//,/ }; do
        part "$name" &
    done
    wait
done
tar -czf "$OUT/results.tar.gz" bench/results/*cuda*.json bench/results/gpu-*.json 2>/dev/null
tar -czf "$OUT/logs.tar.gz" -C "$OUT" --exclude "*.tar.gz" --warning=no-file-changed . && rm -f "$OUT"/*.log
