#!/usr/bin/env bash
# All that needs a GPU, in one go of under ten minutes and without a network: build, self-test, tests,
# compute-sanitizer, benchmarks of ops, models and training. Results go to ${OUT:-benchmarks/results}:
# gpu.log, rows as they are measured, and the tuner's measurements, six files; benchmarks/plot.py and
# benchmarks/ops/plot.py draw them, on any machine.
#
# GPU_STAGES names the stages to run, in their order, such as "build models". MODELS_SECONDS is the time for
# benchmarks of models: from 200 on they take every case, tune, and time each layer. For the rest:
#   GPU_STAGES="build models" MODELS_SECONDS=480 benchmarks/gpu.sh
# The peers that compile take part from 200 seconds on, torch.compile's max-autotune and TensorRT, which
# search for minutes, only where MODELS_PEERS names them: MODELS_PEERS="max-autotune tensorrt".
# TRAINING_SECONDS is the time for training steps: from 200 on they are compiled too.
# racecheck is not among the stages that run by default: it takes minutes.
#
# Needs python3 with torch, triton, pybind11, setuptools, pytest, pytest-benchmark, hypothesis, matplotlib,
# click and rich (and uses pytest-xdist where it is), and cmake, ninja, a C++ compiler and nvcc. A stage that
# fails does not stop the later ones; the exit status is 1 if one failed, 2 if there is no GPU or no such
# stage.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

readonly ALL_STAGES="build doctor tests memcheck racecheck ops models training"
readonly DEFAULT_STAGES="build doctor tests memcheck ops models training"
readonly PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
GPU_STAGES=${GPU_STAGES:-$DEFAULT_STAGES}
MODELS_SECONDS=${MODELS_SECONDS:-45}
MODELS_PEERS=${MODELS_PEERS:-}
TRAINING_SECONDS=${TRAINING_SECONDS:-40}
# Kept from run to run, so that nothing is tuned twice.
SHELFKERN_CACHE=${SHELFKERN_CACHE:-$PWD/build/cache}

for name in $GPU_STAGES; do
    if [[ " $ALL_STAGES " != *" $name "* ]]; then
        echo "gpu.sh: GPU_STAGES has '$name', it may have $ALL_STAGES" >&2
        exit 2
    fi
done
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: there is no GPU that torch of $PYTHON can use on this machine" >&2
    exit 2
fi
mkdir -p "$OUT" "$SHELFKERN_CACHE" && OUT=$(cd "$OUT" && pwd) || exit 2
: >"$OUT/gpu.log"

summary=()
failed=0

# stage NAME SECONDS COMMAND...: runs a command for at most so long if its name is asked for, logs it, notes
# what became of it. Its status 77 means that it does not apply here, as in automake. Interrupted, pytest
# still reports.
stage() {
    local name=$1 limit=$2 begin=$SECONDS log status
    shift 2
    [[ " $GPU_STAGES " == *" $name "* ]] || return 0
    log=$(mktemp)
    echo "== $name" | tee -a "$OUT/gpu.log"
    timeout --signal=INT --kill-after=3 "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.log" "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) status=passed ;;
        77) status="skipped: $(tail -n 1 "$log")" ;;
        124 | 137) status="out of time after $limit s" ;;
        *) status="failed with status $status" ;;
    esac
    rm -f "$log"
    case $status in passed | skipped*) ;; *) failed=1 ;; esac
    summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$status")")
}

build() {
    SHELFKERN_CUDA=1 SHELFKERN_EMULATION=0 "$PYTHON" setup.py -q build_ext --inplace
}

# Tests on the device: first those of the clocks, which must have it to themselves, then the rest in several
# processes where pytest-xdist is there, for most of the time is Triton's compiler's.
device_tests() {
    local processes=() options=(-m gpu -q --tb=short -p no:cacheprovider) status=0
    "$PYTHON" -c 'import xdist' 2>/dev/null && processes=(-n 14)
    "$PYTHON" -m pytest tests/engine/test_tuning.py "${options[@]}" || status=1
    "$PYTHON" -m pytest tests --ignore tests/engine/test_tuning.py "${options[@]}" "${processes[@]}" || status=1
    return $status
}

# The self-test runs every kernel at small sizes.
sanitize() {
    local check='
import sys
from shelfkern.ops import selftest
results = [r for r in selftest.run_all() if r.backend in ("cuda", "triton")]
print(*results, sep="\n")
sys.exit(any(result.failed for result in results))'
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed"
        return 77
    fi
    local found status
    found=$(mktemp)
    # Each tensor an allocation of its own, so that what is beyond one is beyond all.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -c "$check" 2>&1 |
        tee "$found"
    status=${PIPESTATUS[0]}
    # As under a virtualised kernel driver.
    if grep -q "Device not supported" "$found"; then
        echo "compute-sanitizer does not support this device here"
        status=77
    fi
    rm -f "$found"
    return "$status"
}

# Again after a kernel that broke the CUDA context, which is noted and then avoided.
ops() {
    local broken status
    broken=$(mktemp)
    while
        "$PYTHON" -m pytest benchmarks/ops -m quick --device cuda --seconds 0.05 --budget "$OPS_BUDGET" \
            --avoid "$broken" --results "$OUT" -q --tb=short --benchmark-quiet -p no:cacheprovider
        status=$?
        [ $status -eq "$CONTEXT_LOST" ]
    do :; done
    [ ! -s "$broken" ] || status=1
    rm -f "$broken"
    return $status
}

# Again after a kernel that broke the CUDA context, whose row says so: the rest goes on without it.
models() {
    local out="$OUT/models_gpu.jsonl" options=(--device cuda) peers="cudnn eager autocast" peer left status
    if [ "$MODELS_SECONDS" -ge 200 ]; then
        options+=(--breakdown)
        peers+=" compile reduce-overhead"
    else
        options+=(--quick --no-tune --case-seconds 0.3)
    fi
    for peer in $peers $MODELS_PEERS; do options+=(--peers "$peer"); done
    SECONDS=0
    while
        # Kept back for imports, before its clock starts.
        left=$((MODELS_SECONDS - SECONDS - 12))
        "$PYTHON" benchmarks/models.py "${options[@]}" --seconds "$left" --out "$out"
        status=$?
        options+=(--resume)
        [ $status -eq "$CONTEXT_LOST" ] && [ $left -gt 20 ]
    do :; done
    return $status
}

training() {
    local options=(--device cuda)
    [ "$TRAINING_SECONDS" -ge 200 ] || options+=(--dtype bfloat16 --case-seconds 0.5 --variant eager
        --variant "eager channels_last" --variant shelfkern)
    # Kept back: for imports before its clock starts.
    "$PYTHON" benchmarks/training.py "${options[@]}" --seconds $((TRAINING_SECONDS - 12)) \
        --out "$OUT/training_gpu.jsonl"
}

# Of benchmarks/ops: the seconds after which it skips the rest, and its status after a broken context.
OPS_BUDGET=115
CONTEXT_LOST=70
export PYTHON OUT OPS_BUDGET CONTEXT_LOST MODELS_SECONDS MODELS_PEERS TRAINING_SECONDS SHELFKERN_CACHE
# What was printed before a stage ran out of time is kept.
export PYTHONUNBUFFERED=1
export -f build device_tests sanitize ops models training

# With 45 s for models and 40 s for training 580 seconds at most, racecheck not counted.
stage build 80 bash -c build
stage doctor 45 "$PYTHON" -m shelfkern doctor
stage tests 150 bash -c device_tests
stage memcheck 70 bash -c 'sanitize memcheck'
stage racecheck 120 bash -c 'sanitize racecheck'
stage ops 150 bash -c ops
stage models "$MODELS_SECONDS" bash -c models
stage training "$TRAINING_SECONDS" bash -c training

cp -f "$SHELFKERN_CACHE"/tuning-*.json "$OUT" 2>/dev/null
printf '%s\n' '' "${summary[@]}" | tee -a "$OUT/gpu.log"
exit $failed
