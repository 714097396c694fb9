#!/bin/sh
# Builds what `make bench` compares with: llama.cpp's llama-bench and llama-batched-bench, for this machine's processor, from the
# source that the llama-cpp-python package carries, and a Python environment that writes GGUF. The build, the tests and the
# server never need it. Takes a quarter of an hour on two cores, and 1 GB under target/llama-cpp/.
set -eu
version=0.3.36
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dir=$root/target/llama-cpp
mkdir -p "$dir"

[ -x "$dir/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  cmake==4.4.4 ninja==1.13.2 scikit-build-core==1.1.2 gguf==0.19.0 numpy==2.4.6
PATH=$dir/venv/bin:$PATH

if [ ! -x "$dir/bin/llama-batched-bench" ]; then
  # Its build system is asked for the package's name, but nothing is built by pip.
  [ -f "$dir/llama_cpp_python-$version.tar.gz" ] || pip download --quiet --disable-pip-version-check --dest "$dir" \
    --no-binary :all: --no-deps --no-build-isolation "llama-cpp-python==$version"
  tar -xzf "$dir/llama_cpp_python-$version.tar.gz" -C "$dir"
  cmake -G Ninja -S "$dir/llama_cpp_python-$version/vendor/llama.cpp" -B "$dir/build" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE="${GGML_NATIVE:-ON}" -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF >"$dir/cmake.log"
  ninja -C "$dir/build" llama-bench llama-batched-bench
  mkdir -p "$dir/bin"
  cp "$dir/build/bin/llama-bench" "$dir/build/bin/llama-batched-bench" "$dir/bin/"
fi
echo "ready: $dir/bin"
