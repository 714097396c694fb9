#!/usr/bin/env bash
# Packs what a machine with an NVIDIA GPU needs to check and measure the CUDA half: it needs a driver, cuBLAS and NCCL
# (those of PyTorch will do), but neither Rust nor this repository nor a network.
#
#   integration-tests/gpu-check/pack.sh       (make gpu-check calls it) makes target/gpu-check/gpu-check.tar.xz
#
# There: tar xf gpu-check.tar.xz && gpu-check/run.sh      (what it does: run.sh --help)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"
target=${CARGO_TARGET_DIR:-$root/target}
pack=$target/gpu-check/gpu-check
limit_mb=${GPU_CHECK_LIMIT_MB:-64}
cargo=${CARGO:-cargo}

rm -rf "$target/gpu-check"
mkdir -p "$pack/target/release/deps" "$pack/repository/integration-tests"

# The executables, from what cargo says that it built: `lamplighter`, each test that needs a GPU, the benchmarks.
flags=(--release --locked --workspace --features cuda)
$cargo build "${flags[@]}" --bins
$cargo test "${flags[@]}" --test 'cuda_*' --no-run --message-format=json >"$target/gpu-check/tests.json"
$cargo bench --profile release --locked --workspace --features cuda --bench shard --bench serving --bench device --no-run --message-format=json \
  >"$target/gpu-check/benches.json"
python3 - "$target/gpu-check" "$pack" <<'PYTHON'
import json, pathlib, shutil, subprocess, sys

folder, pack = map(pathlib.Path, sys.argv[1:])
metadata = json.loads(subprocess.check_output(["cargo", "metadata", "--format-version=1", "--no-deps", "--offline"]))
on_gpu = {
    (package["name"], target["name"])
    for package in metadata["packages"]
    for target in package["targets"]
    if "cuda" in target.get("required-features", [])
}
wanted = [(str(folder.parent / "release/lamplighter"), pack / "target/release/lamplighter")]
for name in ("tests", "benches"):
    for line in (folder / f"{name}.json").open():
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or not message.get("executable"):
            continue
        target = message["target"]
        package = message["package_id"].split("#")[-1].split("@")[0].split("/")[-1]
        package = package if not package[0].isdigit() else pathlib.Path(message["manifest_path"]).parent.name
        if name == "benches" and target["kind"] == ["bench"] and target["name"] in ("shard", "serving", "device"):
            wanted.append((message["executable"], pack / "target/release/deps" / f"bench-{target['name']}"))
        elif name == "tests" and "test" in target["kind"] and (
            (package, target["name"]) in on_gpu or any(target["name"] == of for _, of in on_gpu)
        ):
            wanted.append((message["executable"], pack / "target/release/deps" / f"test-{package}-{target['name']}"))
for source, destination in wanted:
    shutil.copy2(source, destination)
    subprocess.run(["strip", str(destination)], check=True)
    print(f"{destination.stat().st_size / 1e6:8.1f} MB  {destination.name}")
assert any(path.name.startswith("test-") for _, path in wanted), "no test that needs the feature cuda was built"
PYTHON

# What they read: the goldens, the demo model, and the scripts of the other program.
cp -r integration-tests/goldens integration-tests/demo-model "$pack/repository/integration-tests/"
mkdir -p "$pack/repository/integration-tests/reference" "$pack/repository/shard" "$pack/repository/kernels"
cp integration-tests/reference/bench_transformers.py "$pack/repository/integration-tests/reference/"
# Tests know their files by the path that they were compiled in.
printf '%s\n' "$root" >"$pack/built-in"
git rev-parse HEAD >"$pack/commit" 2>/dev/null || echo unknown >"$pack/commit"
git diff --quiet HEAD 2>/dev/null || echo "(with changes that are not committed)" >>"$pack/commit"
cp "$here/run.sh" "$here/summary.py" "$pack/"

tar -C "$target/gpu-check" -c gpu-check | xz -T0 -6 >"$target/gpu-check/gpu-check.tar.xz"
mb=$(($(stat -c %s "$target/gpu-check/gpu-check.tar.xz") / 1000000))
echo "$target/gpu-check/gpu-check.tar.xz: $mb MB"
if [ "$mb" -ge "$limit_mb" ]; then
  echo "That is more than $limit_mb MB. The largest parts are above: leave out tests by deleting them from $pack, and pack again with tar." >&2
  exit 1
fi
