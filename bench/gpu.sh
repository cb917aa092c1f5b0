#!/usr/bin/env bash
# Build, check and time on a machine with a GPU, from the repository's root:
#   bash bench/gpu.sh                    every part, in order of value; all limits together are 13 minutes
#   bash bench/gpu.sh step digits,xformers   these; parts with commas between them run at the same time, which is for
#                                        checks and not for times
#   bash bench/gpu.sh --dry-run [PART...]    on the CPU with tiny models: shows that the parts run, and no times
# Every part has a limit of its own, one that fails does not stop the others, and one that is done is not run again
# (build/gpu-done; --again does). Results go to bench/results/gpu-*.json and *-cuda.json; logs and a copy of the new
# results to $OUT (a temporary folder without it). A machine without network takes what it lacks from wheels in .whl/,
# and large libraries that were carried before from $KEPT (see onnxruntime-cuda).
set -u -o pipefail
OUT=${OUT:-$(mktemp -d)}
KEPT=${KEPT:-/tmp/kept}
DONE=build/gpu-done
DRY=
AGAIN=
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-/tmp/site}
# In order of value, with the seconds that each may take.
PARTS="build:45 tests:50 gpu-tests:50 step:100 counterfactual:110 xformers:45 onnxruntime-cuda:80 digits:50 kernels:50
    metrics:60 sanitizer:40 serve:40 models:60"

usage() {
    sed -n '2,11s/^# \?//p' "$0"
    echo "parts: $(for p in $PARTS; do echo -n "${p%:*} "; done)"
}

limit() { # PART
    for p in $PARTS; do [ "${p%:*}" = "$1" ] && echo "${p#*:}"; done
}

run() { # PART COMMAND...
    local name=$1 seconds started=$SECONDS code
    seconds=$(limit "$name")
    [ -n "$DRY" ] && seconds=600
    shift
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "== $name: exit $code after $((SECONDS - started)) of $seconds s
$(tail -n 12 "$OUT/$name.log" | cut -c1-400)"
    [ $code -eq 0 ] && [ -z "$DRY" ] && mkdir -p "$DONE" && touch "$DONE/$name"
    return $code
}

gpu() { # SUITE ARGUMENTS...
    local suite=$1
    shift
    python3 -m bench.gpu --suite "$suite" "$@" ${DRY:+--dry-run} --record
}

build() {
    [ -n "$DRY" ] && return 0
    compgen -G '.whl/*.whl' >/dev/null &&
        python3 -m pip install -q --no-index --no-deps --no-compile --target "$PYTHONPATH" .whl/*.whl
    python3 -m pip install -q --no-index --no-build-isolation --no-deps --target "$PYTHONPATH" .
}

tests() {
    python3 -m pytest -q ${DRY:+--collect-only} -n 10 -p no:cacheprovider tests/kernels \
        --deselect tests/kernels/test_compile_for_gpus.py
}

gpu_tests() {
    # shellcheck disable=SC2046
    python3 -m pytest -q ${DRY:+--collect-only} -p no:cacheprovider -m gpu $(grep -rl mark.gpu tests)
}

# Reads and writes outside of buffers: one small shape of every operation.
sanitizer() {
    local checked="python3 -m pytest -q -p no:cacheprovider tests/kernels -k"
    local what="agrees_with_the_reference and triton and 16"
    if [ -n "$DRY" ]; then
        $checked "$what" --collect-only
    elif ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on this machine (CUDA toolkit): nothing was checked" && return 1
    else
        compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all $checked "$what" -x
    fi
}

# xformers' wheels link against CUDA 12's runtime: .whl/ holds nvidia-cuda-runtime-cu12, whose folder goes on the path.
# Without it xformers takes itself to be built without CUDA, and every operator says no.
xformers() {
    local libraries
    libraries=$(python3 -c 'import sysconfig, glob, os
for root in (os.environ["PYTHONPATH"], sysconfig.get_paths()["purelib"]):
    print(":".join(glob.glob(root + "/nvidia/cuda_runtime/lib")), end=":")')
    LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:-} gpu xformers --batches 1,8 --rounds 5
}

# onnxruntime-gpu is built for CUDA 13. Its provider's library has 255 MB, more than can be carried at once. Where the
# wheel was fetched (cp312, x86_64):
#   unzip -d build/ort onnxruntime_gpu-*.whl && cd build/ort/onnxruntime/capi
#   python TOOLS/thin_cuda_library.py libonnxruntime_providers_cuda.so thin.so 90   # blanks other cards' machine code
#   xz -T0 thin.so                                                                   # 52 MB: carry it in the first call:
#   mkdir -p $KEPT && xz -dc thin.so.xz > $KEPT/libonnxruntime_providers_cuda.so
# and the rest of the wheel (build/ort without that file) as .ort/ in the next call, on the same machine. For the test
# machine only, never shipped.
onnxruntime_cuda() {
    if [ -z "$DRY" ] && [ -d .ort ]; then
        rm -rf "$PYTHONPATH/onnxruntime" && cp -r .ort/onnxruntime "$PYTHONPATH/" &&
            cp "$KEPT/libonnxruntime_providers_cuda.so" "$PYTHONPATH/onnxruntime/capi/" || return 1
    fi
    gpu onnxruntime --batches 1,16 --rounds 5
}

kernels() {
    if [ -n "$DRY" ]; then
        python3 -m bench.kernels --op consensus --seconds 0.1
    else
        python3 -m bench.kernels --op all --seconds 1 --record && python3 -m bench.kernels --tune --seconds 1
    fi
}

metrics() {
    python3 -m bench.metrics ${DRY:+--dry-run} --batch-size 1024 --record
}

serve() {
    [ -n "$DRY" ] && python3 -m bench.serve --help && return
    python3 -m bench.serve --sections latency,throughput --record &&
        for name in latency throughput; do mv "bench/results/serve-$name.json" "bench/results/gpu-serve-$name.json"; done
}

models() {
    gpu models --rounds 3 || return
    [ -n "$DRY" ] && return
    for model in stable-diffusion-1.x cin256-v2; do
        python3 -m bench.real_models --model $model --dtype fp16 --batch 8 --record || return
    done
}

part() {
    if [ -z "$DRY$AGAIN" ] && [ -e "$DONE/$1" ]; then
        echo "== $1: done before; --again runs it again"
        return
    fi
    local command=${1//-/_}
    case $1 in
        step) command="gpu step --batches 1,8" ;;
        counterfactual) command="gpu counterfactual --rounds 5" ;;
        digits) command="gpu digits" ;;
    esac
    run "$1" bash -c "set -u -o pipefail; DRY=$DRY KEPT=$KEPT
$(declare -f gpu build tests gpu_tests sanitizer xformers onnxruntime_cuda kernels metrics serve models)
$command"
}

while [ $# -gt 0 ] && [ "${1#--}" != "$1" ]; do
    case $1 in
        --dry-run) DRY=1 ;;
        --again) AGAIN=1 ;;
        --help) usage && exit ;;
        *) echo "unknown option: $1; expected --dry-run, --again or --help" >&2 && exit 2 ;;
    esac
    shift
done
[ $# -eq 0 ] && set -- $(for p in $PARTS; do echo "${p%:*}"; done)
for group in "$@"; do
    for name in ${group//,/ }; do
        [ -n "$(limit "$name")" ] || { echo "unknown part: $name; expected some of$(usage | tail -n 1)" >&2 && exit 2; }
    done
done
failed=0
for group in "$@"; do
    running=()
    for name in ${group//,/ }; do
        part "$name" &
        running+=($!)
    done
    for id in "${running[@]}"; do wait "$id" || failed=1; done
done
if [ -z "$DRY" ]; then
    tar -czf "$OUT/results.tar.gz" bench/results/*cuda*.json bench/results/gpu-*.json 2>/dev/null
    tar -czf "$OUT/logs.tar.gz" -C "$OUT" --exclude "*.tar.gz" --warning=no-file-changed . && rm -f "$OUT"/*.log
fi
exit $failed
