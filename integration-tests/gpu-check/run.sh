#!/usr/bin/env bash
# Checks and measures the CUDA half on a machine with an NVIDIA GPU, from what pack.sh packed; writes one report.
#
#   run.sh [--results DIR] [--minutes N] [STAGE ...]
#
# Stages, in this order where none is named:
#   environment   the GPU, its driver, the libraries
#   tests         every operation against the CPU's, models against the goldens, graphs on = off, NCCL, the server
#   memory        the operations again under compute-sanitizer, the small shapes
#   bench         sampling and other operations by themselves; one shard: decode of 1 to 256 sequences behind 1k tokens, 8k contexts,
#                 prefill of 8 x 1k
#   serving       the same model through HTTP
#   transformers  the same weights in transformers: static cache with compilation, and its continuous batching
#
# --minutes: a stage that takes longer is stopped (9). Each stage's output lies in DIR (results/), and DIR/report.md says what
# became of each. The exit code is 1 where a stage failed.
# --dry-run: on a machine without a GPU, by the emulated driver in $CUDA_ON_CPU: that this script works, not how fast a GPU is.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=$PWD/results
minutes=9
dry_run=false
stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --results) mkdir -p "$2" && results=$(cd "$2" && pwd); shift ;;
    --minutes) minutes=$2; shift ;;
    --dry-run) dry_run=true ;;
    --help | -h) sed -n '2,17p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    environment | tests | memory | bench | serving | transformers) stages+=("$1") ;;
    *) echo "unknown argument $1: run.sh --help" >&2; exit 2 ;;
  esac
  shift
done
if [ ${#stages[@]} = 0 ]; then
  stages=(environment tests memory bench serving transformers)
  $dry_run && stages=(environment tests bench serving)
fi
mkdir -p "$results"
report=$results/report.md
bin=$here/target/release
failed=0

# The tests look for their files where they were compiled.
built_in=$(cat "$here/built-in")
if [ ! -e "$built_in" ]; then
  mkdir -p "$(dirname "$built_in")" && ln -sfn "$here/repository" "$built_in" \
    || { echo "cannot make $built_in, where the tests look for their files" >&2; exit 1; }
fi

python=${PYTHON:-python3}
if $dry_run; then
  : "${CUDA_ON_CPU:?--dry-run needs CUDA_ON_CPU, the folder of the emulated driver}"
  export LD_LIBRARY_PATH=$CUDA_ON_CPU
else
  # cuBLAS and NCCL of PyTorch, where the system has none.
  libraries=$("$python" - <<'PYTHON' 2>/dev/null
import glob, os
try:
    import nvidia
    roots = list(nvidia.__path__)
except ImportError:
    roots = []
print(":".join(sorted({os.path.dirname(p) for r in roots for p in glob.glob(os.path.join(r, "**", "lib*.so*"), recursive=True)
                       if os.path.basename(p).split(".so")[0] in ("libcublas", "libcublasLt", "libnccl", "libcudart", "libnvrtc")})))
PYTHON
  )
  export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH:-}
fi

# stage NAME WHAT COMMAND...: runs it with the time limit, keeps its output, and notes the outcome.
stage() {
  local name=$1 what=$2 log start seconds rc
  shift 2
  log=$results/$name.log
  start=$(date +%s)
  timeout --kill-after=10 "$((minutes * 60))" "$@" >"$log" 2>&1
  rc=$?
  seconds=$(($(date +%s) - start))
  case $rc in
    0) verdict=ok ;;
    124 | 137) verdict="STOPPED after $minutes minutes" ;;
    *) verdict="FAILED (exit $rc)" ;;
  esac
  [ "$rc" = 0 ] || failed=1
  echo "$name: $verdict, $seconds s"
  echo "| $name | $what | $verdict | $seconds |" >>"$report.stages"
  [ "$rc" = 0 ] || { echo "--- the end of $log"; tail -n 25 "$log"; }
}

# The lines of a log that belong in the report.
tables() {
  local name=$1
  [ -f "$results/$name.log" ] || return 0
  { echo; echo "### $name"; echo; grep -E '^(\||\*\*|[A-Za-z0-9.]+: )' "$results/$name.log" || echo "(nothing was measured)"; } >>"$report.tables"
}

rm -f "$report.stages" "$report.tables"
touch "$report.stages" "$report.tables"
wants() { printf '%s\n' "${stages[@]}" | grep -qx "$1"; }

gpu="no GPU (emulated driver)"
copy_gb_per_s=
if wants environment; then
  environment() {
    date -u
    if ! $dry_run; then
      nvidia-smi || exit 1
      ldconfig -p | grep -E 'libcuda.so|libnccl|libcublasLt' || true
    fi
    for file in "$bin"/lamplighter "$bin"/deps/*; do
      ldd "$file" | grep -q 'not found' && { echo "$file lacks libraries:"; ldd "$file"; exit 1; }
    done
    "$bin/lamplighter" --version || exit 1
    if ! $dry_run; then
      "$python" - <<'PYTHON'
import torch
x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda"); y = torch.empty_like(x)
y.copy_(x); torch.cuda.synchronize()
best = 1e9
for _ in range(5):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(); y.copy_(x); b.record(); torch.cuda.synchronize()
    best = min(best, a.elapsed_time(b))
print(f"copy: {2 * x.numel() / best / 1e6:.0f} GB/s, read and written")
del x, y
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16); b = torch.randn_like(a)
for _ in range(3): a @ b
s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
s.record()
for _ in range(10): a @ b
e.record(); torch.cuda.synchronize()
print(f"product: {2 * 8192**3 * 10 / s.elapsed_time(e) / 1e9:.0f} TFLOP/s, bf16, 8192 x 8192 x 8192")
PYTHON
    fi
  }
  export -f environment
  export dry_run bin python
  stage environment "the GPU, its driver, the libraries" bash -c environment
  tables environment
  $dry_run || gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c | tr -s ' ' | paste -sd';')
  copy_gb_per_s=$(sed -n 's/^copy: \([0-9]*\) GB.*/\1/p' "$results/environment.log")
fi

if wants tests; then
  for test in "$bin"/deps/test-*; do
    name=$(basename "$test")
    stage "$name" "tests" "$test" ${TEST_FILTER:-} --test-threads "${TEST_THREADS:-4}"
    grep -E '^test result' "$results/$name.log" | sed "s/^/$name: /" >>"$report.tables" || true
  done
fi

if wants memory; then
  if command -v compute-sanitizer >/dev/null; then
    test=$(ls "$bin"/deps/test-*cuda_matches_cpu | head -1)
    for tool in memcheck racecheck; do
      CUDA_CHECK_CASES=1 stage "$tool" "operations under compute-sanitizer" \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$test" --test-threads 1
    done
  else
    echo "| memory | operations under compute-sanitizer | not run: compute-sanitizer is not installed | 0 |" >>"$report.stages"
  fi
fi

# The demo's shape on a CPU, Llama-3.1-8B's on a GPU.
if $dry_run; then shape=135m long="" ; else shape=8b; fi
if wants bench; then
  if $dry_run; then
    stage bench-device "operations" "$bin/deps/bench-device" small
    # The smallest published shape is too much for an emulated GPU: that the benchmark starts and measures is seen on the CPU.
    stage bench-shard "one shard" "$bin/deps/bench-shard" 135m decode=1 context=32 prefill=1x16 in-flight=1 --device cpu
  else
    copy=${copy_gb_per_s:+copy=$copy_gb_per_s}
    stage bench-device "operations" "$bin/deps/bench-device" $copy
    stage bench-shard "one shard" "$bin/deps/bench-shard" $shape decode=1,8,32,64,256 context=1024 prefill=8x1024 $copy --device cuda
    stage bench-long "one shard, 8k contexts" "$bin/deps/bench-shard" $shape decode=1,16 context=8192 prefill=1x8192 $copy --device cuda
    stage bench-eager "one shard, without CUDA graphs" "$bin/deps/bench-shard" $shape decode=1,64 context=1024 prefill=1x1024 $copy \
      --device cuda --cuda-graphs 0
  fi
  for name in bench-device bench-shard bench-long bench-eager; do tables $name; done
fi

if wants serving; then
  if $dry_run; then
    stage bench-serving "the demo model through HTTP" "$bin/deps/bench-serving" demo batches=1,2 --device cpu
  else
    stage bench-serving "the same through HTTP" "$bin/deps/bench-serving" $shape batches=1,64,256 --device cuda \
      --max-batch-size 256 --max-concurrent-requests 512
  fi
  tables bench-serving
fi

if wants transformers && ! $dry_run; then
  model=$here/target/bench-models/Llama-3.1-8B-shape-BF16
  stage transformers "the same weights in transformers" "$python" "$here/repository/integration-tests/reference/bench_transformers.py" \
    "$model" --device cuda --kinds prefill decode continuous
  { echo; echo "### transformers"; echo; echo '```'; grep '^{' "$results/transformers.log"; echo '```'; } >>"$report.tables"
fi

{
  echo "# CUDA on a GPU: what was checked and measured"
  echo
  echo "$(date -u +%Y-%m-%d), $gpu, commit $(paste -sd' ' "$here/commit")"
  echo
  echo "| stage | what | outcome | seconds |"
  echo "|---|---|---|---|"
  cat "$report.stages"
  cat "$report.tables"
} >"$report"
rm -f "$report.stages" "$report.tables"
echo "report: $report"
exit $failed
