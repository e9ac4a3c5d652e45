#!/usr/bin/env bash
# All that needs a GPU, in one go of under eight minutes and without a network: build, self-test, tests,
# compute-sanitizer, benchmarks of ops and models. Results go to ${OUT:-benchmarks/results}.
#
# Needs python3 with torch, triton, pybind11, setuptools, pytest, pytest-benchmark and hypothesis, and
# cmake, ninja, a C++ compiler and nvcc. A stage that fails does not stop the later ones; the exit status
# is 1 if one failed, 2 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

readonly PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: there is no GPU that torch of $PYTHON can use on this machine" >&2
    exit 2
fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2

summary=()
failed=0

# stage NAME SECONDS COMMAND...: runs a command for at most so long, logs it, notes what became of it.
# Its status 77 means that it does not apply here, as in automake. Interrupted, pytest still reports.
stage() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=3 "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) status=passed ;;
        77) status="skipped: $(tail -n 1 "$OUT/gpu_$name.log")" ;;
        124 | 137) status="out of time after $limit s" ;;
        *) status="failed with status $status" ;;
    esac
    case $status in passed | skipped*) ;; *) failed=1 ;; esac
    summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$status")")
}

build() {
    SHELFKERN_CUDA=1 SHELFKERN_EMULATION=0 "$PYTHON" setup.py -q build_ext --inplace
}

# Tests on the device; status 5 of pytest is that there are none.
device_tests() {
    "$PYTHON" -m pytest -m gpu tests -q --tb=short -p no:cacheprovider
    local status=$?
    if [ $status -eq 5 ]; then
        echo "no tests are marked gpu"
        return 77
    fi
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
    # Each tensor an allocation of its own, so that what is beyond one is beyond all.
    found=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -c "$check" 2>&1)
    status=$?
    echo "$found"
    # As under a virtualised kernel driver.
    if grep -q "Device not supported" <<<"$found"; then
        echo "compute-sanitizer does not support this device here"
        return 77
    fi
    return $status
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
    "$PYTHON" benchmarks/ops/plot.py "$OUT"/ops_*.jsonl || status=1
    return $status
}

models() {
    if ! "$PYTHON" benchmarks/models.py --help | grep -q -e --device; then
        echo "benchmarks/models.py does not run on a GPU yet"
        return 77
    fi
    "$PYTHON" benchmarks/models.py --device cuda --out "$OUT/models_gpu.jsonl"
}

# Of benchmarks/ops: the seconds after which it skips the rest, and its status after a broken context.
OPS_BUDGET=130
CONTEXT_LOST=70
export PYTHON OUT OPS_BUDGET CONTEXT_LOST
export -f build device_tests sanitize ops models

# 450 seconds at most.
stage build 80 bash -c build
stage doctor 20 "$PYTHON" -m shelfkern doctor
stage tests 70 bash -c device_tests
stage memcheck 35 bash -c 'sanitize memcheck'
stage racecheck 35 bash -c 'sanitize racecheck'
stage ops 165 bash -c ops
stage models 45 bash -c models

printf '%s\n' '' "${summary[@]}"
exit $failed
