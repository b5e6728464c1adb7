#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a GPU, in one command, from the repository's root:
#
#   benchmarks/gpu_session.sh [STAGE ...]      stages: info tests memcheck racecheck initcheck
#                                              synccheck bench report counters
#
# Without arguments all stages run. Each has a time limit of its own and prints its exit code (124:
# the limit was reached) and the end of its output; a stage that fails does not stop the next. What
# is kept goes to $OUT (default: a new temporary folder), ten files: session.log, bench.json,
# <gpu>.json, report.md, bandwidth.png, attention.png, decoding.png, host.png, ablation.png,
# <gpu>-counters.json.
#
# Settings, by environment: PYTHON; OUT; BENCHMARK_COMMIT (what the results say was measured, where
# there is no git); BENCH (files or -k arguments instead of the whole suite); SANITIZE (the -k
# expression of the tests under compute-sanitizer); PROCESSES (that share the tests); LIMIT_TESTS,
# LIMIT_SANITIZE (each tool), LIMIT_BENCH (seconds).
set -u -o pipefail

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
LIMIT_TESTS=${LIMIT_TESTS:-300}
LIMIT_SANITIZE=${LIMIT_SANITIZE:-240}
LIMIT_BENCH=${LIMIT_BENCH:-240}
SANITIZE=${SANITIZE:-"torch-cuda and not emulat and (test_case or out_of_range or past_the_cache
  or strided or neighbours or untouched or again or (flash and test_every_layout) or (attention and
  (test_options or test_decode or test_quantised_caches or test_block_sizes or test_head_sizes or
  test_ratios or test_long_sequences or test_same_bits or test_several or test_fp8_ds))
  or test_every_kind or test_many_tokens or test_worked or test_pairs or (merge and test_sizes))"}
# The order matters when time runs out. All other files follow these.
FIRST="benchmarks/bench_limits.py benchmarks/bench_host.py
  benchmarks/bench_reshape_and_cache_flash.py
  benchmarks/bench_copy_blocks.py benchmarks/bench_gather_cache.py
  benchmarks/bench_paged_attention.py benchmarks/bench_paged_attention_mla.py
  benchmarks/bench_quantised_writes.py benchmarks/bench_mla.py
  benchmarks/bench_reshape_and_cache.py benchmarks/bench_swap_blocks.py
  benchmarks/bench_ablation.py benchmarks/bench_growth.py benchmarks/bench_slot_mapping.py
  benchmarks/bench_start.py benchmarks/bench_alibi_slopes.py benchmarks/bench_packing.py
  benchmarks/bench_indexer.py"
OTHERS=$(printf '%s\n' benchmarks/bench_*.py | grep -vxF "$(printf '%s\n' $FIRST)")
BENCH=${BENCH:-"$FIRST $OTHERS"}

# Compiling takes longest, so the tests share the cores where pytest-xdist is there.
PROCESSES=${PROCESSES:-12}
PARALLEL=$("$PYTHON" -c 'import xdist, sys; print("-n", sys.argv[1])' "$PROCESSES" 2>/dev/null)

export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export CUPYCACHE_REQUIRE_GPU=1
mkdir -p "$OUT"
log="$OUT/session.log"
: >"$log"
summary=""
failed=0

# stage NAME SECONDS LINES COMMAND...: run, log everything, show the last LINES lines.
stage() {
  local name=$1 limit=$2 lines=$3 begun=$SECONDS code
  shift 3
  echo "=== $name" | tee -a "$log"
  # One that ignores the interrupt (pytest then still writes its results) is killed.
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$log.part" 2>&1 </dev/null
  code=$?
  cat "$log.part" >>"$log"
  tail -n "$lines" "$log.part"
  rm -f "$log.part"
  echo "=== $name: exit code $code" | tee -a "$log"
  summary+=$(printf '%-10s exit code %3d  %4d s' "$name" "$code" $((SECONDS - begun)))$'\n'
  [ "$code" -eq 0 ] || failed=1
}

info() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  "$PYTHON" - <<'END'
import importlib
import sys

print("python", sys.version.split()[0])
for name in ("numpy", "ml_dtypes", "cupy", "torch", "triton", "pytest", "pytest_benchmark",
             "hypothesis", "matplotlib", "vllm", "flashinfer", "sglang"):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
    else:
        print(name, getattr(module, "__version__", "?"))
import cupy

runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
print("CUDA runtime", runtime, "driver", driver, "NVRTC", cupy.cuda.nvrtc.getVersion())
END
}

# sanitized TOOL: the selection under compute-sanitizer. torch's caching allocator is switched off,
# so that each tensor ends where its own allocation does.
sanitized() {
  local tool=compute-sanitizer
  command -v $tool >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 exec "$tool" --tool "$1" --error-exitcode 9 \
    --target-processes all --report-api-errors no --print-limit 20 \
    "$PYTHON" -m pytest tests -m gpu -q --color=no --maxfail=5 --everything $PARALLEL \
    -k "$(echo $SANITIZE)"
}

bench() {
  # Its own limit ends it in order, well before the stage's.
  exec "$PYTHON" -m pytest $BENCH -q --color=no --time-limit=$((LIMIT_BENCH - 40)) \
    --benchmark-json="$OUT/bench.json"
}

report() {
  "$PYTHON" -m benchmarks.report "$OUT/bench.json" --results "$OUT" --plots "$OUT" \
    >"$OUT/report.md" && head -n 60 "$OUT/report.md"
}

counters() {
  PATH="$PATH:/usr/local/cuda/bin" "$PYTHON" -m benchmarks.counters --results "$OUT"
}

export -f info sanitized bench report counters
export PYTHON OUT SANITIZE BENCH LIMIT_BENCH PARALLEL

for name in "${@:-all}"; do
  case $name in
    all | info | tests | memcheck | racecheck | initcheck | synccheck | bench | report | counters) ;;
    *) echo "unknown stage: $name" >&2; exit 2 ;;
  esac
done
wanted() {
  local name
  for name in "${stages[@]}"; do
    if [ "$name" = all ] || [ "$name" = "$1" ]; then return 0; fi
  done
  return 1
}
stages=("${@:-all}")

wanted info && stage info 60 30 bash -c info
wanted tests && stage tests "$LIMIT_TESTS" 40 \
  "$PYTHON" -m pytest tests -m gpu -q --color=no --maxfail=20 --everything $PARALLEL
for tool in memcheck racecheck initcheck synccheck; do
  wanted $tool && stage $tool "$LIMIT_SANITIZE" 20 bash -c "sanitized $tool"
done
wanted bench && stage bench "$LIMIT_BENCH" 40 bash -c bench
wanted report && stage report 90 60 bash -c report
wanted counters && stage counters 90 60 bash -c counters

echo
printf "%s" "$summary" | tee -a "$log"
echo "results in $OUT: $(ls "$OUT" | tr "\n" " ")"
exit $failed
