#!/usr/bin/env bash
# Checks and measures the CUDA half on a machine with an NVIDIA GPU, from what pack.sh packed; writes one report.
#
#   run.sh [--results DIR] [--minutes N] [--resume] [STAGE ...]
#
# Stages, in this order where none is named:
#   environment   the GPU, its driver, the libraries
#   tests         every operation against the CPU's, models against the goldens, graphs on = off, NCCL, the server
#   memory        the operations again under compute-sanitizer, one after the other as far as its time goes
#   bench         sampling and other operations by themselves; one shard: loading, decode of 1 to 256 sequences behind 1k
#                 tokens, 8k contexts, prefill of 8 x 1k
#   serving       the same model through HTTP, behind 1k tokens too
#   transformers  the same weights in transformers: static cache with compilation, and its continuous batching
#
# --minutes: of the whole call (9). What there is no time left for is not begun, and the report says so.
# --resume: goes on with the results of an earlier call: what was ok is not done again. Stages that are named are added to those
# results, or replace them there.
# The report, DIR/report.md (DIR: results/), is written anew after each stage, so that a call that is cut off leaves what it
# found; each stage's output lies beside it. The exit code is 1 where a stage failed or was left out.
# --dry-run: on a machine without a GPU, by the emulated driver in $CUDA_ON_CPU: that this script works, not how fast a GPU is.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=$PWD/results
minutes=9
dry_run=false
resume=false
stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --results) mkdir -p "$2" && results=$(cd "$2" && pwd); shift ;;
    --minutes) minutes=$2; shift ;;
    --resume) resume=true ;;
    --dry-run) dry_run=true ;;
    --help | -h) sed -n '2,22p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    environment | tests | memory | bench | serving | transformers) stages+=("$1") ;;
    *) echo "unknown argument $1: run.sh --help" >&2; exit 2 ;;
  esac
  shift
done
if [ ${#stages[@]} = 0 ]; then
  $resume || rm -rf "$results/outcomes"
  stages=(environment tests memory bench serving transformers)
  $dry_run && stages=(environment tests bench serving)
fi
mkdir -p "$results/outcomes"
report=$results/report.md
bin=$here/target/release
deadline=$(($(date +%s) + minutes * 60))

# The tests look for their files where they were compiled, and models that were made are used by all.
built_in=$(cat "$here/built-in")
mkdir -p "$here/target/bench-models"
if [ ! -e "$built_in" ]; then
  mkdir -p "$(dirname "$built_in")" && ln -sfn "$here/repository" "$built_in" \
    || { echo "cannot make $built_in, where the tests look for their files" >&2; exit 1; }
fi
[ -e "$here/repository/target" ] || ln -s "$here/target" "$here/repository/target"

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

# What is known so far.
write_report() {
  {
    echo "# CUDA on a GPU: what was checked and measured"
    echo
    echo "$(date -u +%Y-%m-%d), $(cat "$results/gpu" 2>/dev/null || echo "a GPU that was not asked"), commit $(paste -sd' ' "$here/commit")"
    echo
    "$python" "$here/summary.py" "$results"
  } >"$report.new" && mv "$report.new" "$report"
}

# outcome NAME WHAT VERDICT SECONDS: notes it, in the order of the first time.
outcome() {
  local number
  number=$(ls "$results/outcomes" | sed -n "s/-$1\$//p")
  [ -n "$number" ] || number=$(printf '%03d' "$(ls "$results/outcomes" | wc -l)")
  echo "| $1 | $2 | $3 | $4 |" >"$results/outcomes/$number-$1"
  echo "$1: $3, $4 s"
  write_report
}

# stage NAME SECONDS WHAT COMMAND...: runs it for at most so many seconds, keeps its output, and notes the outcome.
stage() {
  local name=$1 most=$2 what=$3 log start left rc verdict
  shift 3
  if $resume && grep -qs '| ok |' "$results"/outcomes/*-"$name"; then
    return 0
  fi
  log=$results/$name.log
  start=$(date +%s)
  left=$((deadline - start))
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 15 ]; then
    outcome "$name" "$what" "not begun: no time left (run.sh --resume)" 0
    return 0
  fi
  timeout --kill-after=10 "$most" "$@" >"$log" 2>&1
  rc=$?
  case $rc in
    0) verdict=ok ;;
    124 | 137) verdict="STOPPED after $most s" ;;
    *) verdict="FAILED (exit $rc)" ;;
  esac
  outcome "$name" "$what" "$verdict" "$(($(date +%s) - start))"
  [ "$rc" = 0 ] || { echo "--- the end of $log"; tail -n 25 "$log"; }
}

wants() { printf '%s\n' "${stages[@]}" | grep -qx "$1"; }

num_gpus=2
if ! $dry_run; then
  num_gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort | uniq -c | tr -s ' ' | paste -sd';' >"$results/gpu"
else
  echo "no GPU (emulated driver)" >"$results/gpu"
fi

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
  stage environment 120 "the GPU, its driver, the libraries" bash -c environment
fi
copy_gb_per_s=$(sed -n 's/^copy: \([0-9]*\) GB.*/\1/p' "$results/environment.log" 2>/dev/null)
copy=${copy_gb_per_s:+copy=$copy_gb_per_s}

if wants tests; then
  for test in "$bin"/deps/test-*; do
    name=$(basename "$test")
    if [ "$num_gpus" = 1 ] && [[ $name == *cuda_nodes ]]; then
      outcome "$name" "tests" "not run: it needs two GPUs" 0
      continue
    fi
    stage "$name" 300 "tests" "$test" ${TEST_FILTER:-} --test-threads "${TEST_THREADS:-4}"
  done
fi

if wants memory; then
  if command -v compute-sanitizer >/dev/null; then
    test=$(ls "$bin"/deps/test-*cuda_matches_cpu | head -1)
    # The shortest first.
    sanitize() {
      for module in activation embedding rotary norm kv_cache moe context lora sampling attention linear; do
        echo "$1 of $module: $(date -u +%T)"
        compute-sanitizer --tool "$1" --error-exitcode 9 "$test" --test-threads 1 "$module::" || exit
        echo "$1: $module is clean"
      done
    }
    export -f sanitize
    export test
    for tool in memcheck racecheck; do
      stage "$tool" 75 "operations under compute-sanitizer" bash -c "sanitize $tool"
    done
  else
    outcome memory "operations under compute-sanitizer" "not run: compute-sanitizer is not installed" 0
  fi
fi

# The smallest published shape on a CPU, Llama-3.1-8B's on a GPU.
if $dry_run; then shape=135m; else shape=8b; fi
if wants bench; then
  if $dry_run; then
    stage bench-device 300 "operations" "$bin/deps/bench-device" small
    # The smallest published shape is too much for an emulated GPU: that the benchmark starts and measures is seen on the CPU.
    stage bench-shard 300 "one shard" "$bin/deps/bench-shard" 135m decode=1 context=32 prefill=1x16 in-flight=1 --device cpu
  else
    stage bench-device 120 "operations" "$bin/deps/bench-device" $copy
    stage bench-shard 240 "one shard" "$bin/deps/bench-shard" $shape decode=1,8,32,64,256 context=1024 prefill=8x1024 $copy --device cuda
    stage bench-long 120 "one shard, 8k contexts" "$bin/deps/bench-shard" $shape decode=1,16 context=8192 prefill=1x8192 $copy --device cuda
    stage bench-eager 120 "one shard, without CUDA graphs" "$bin/deps/bench-shard" $shape decode=1,64 context=1024 prefill=1x1024 $copy \
      --device cuda --cuda-graphs 0
    stage bench-plain 120 "one shard, without custom kernels" "$bin/deps/bench-shard" $shape decode=1,64 context=1024 prefill=1x1024 $copy \
      --device cuda --disable-custom-kernels
  fi
fi

if wants serving; then
  if $dry_run; then
    stage bench-serving 300 "the demo model through HTTP" "$bin/deps/bench-serving" demo batches=1,2 prompt=64 --device cpu
  else
    stage bench-serving 240 "the same through HTTP" "$bin/deps/bench-serving" $shape batches=1,64,256 prompt=1024 --device cuda \
      --max-batch-size 256 --max-concurrent-requests 512
  fi
fi

if wants transformers && ! $dry_run; then
  # Made by the stage `bench`.
  model=$here/target/bench-models/Llama-3.1-8B-shape-BF16
  stage transformers 420 "the same weights in transformers" "$python" \
    "$here/repository/integration-tests/reference/bench_transformers.py" "$model" --device cuda --kinds prefill decode continuous
fi

write_report
echo "report: $report"
grep -qhvE '\| (ok|not run[^|]*) \|' "$results"/outcomes/* && exit 1
exit 0
