#!/bin/sh
# setup.sh FOLDER: puts nvcc there, from PyPI, in about a minute. The build looks for it in target/cuda-toolkit; who has CUDA
# 12.8 or newer needs none of this.
set -eu
folder=${1:?the folder to install to}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "the wheels that are pinned here are for Linux on x86-64: install CUDA 12.8 or newer, and name its nvcc with NVCC=..." >&2
  exit 1
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
  echo "$python has no pip: install it (Debian: apt install python3-pip), or name another Python with PYTHON=..." >&2
  exit 1
fi
# nvcc preprocesses with it.
if ! command -v g++ >/dev/null; then
  echo "g++ is not installed (Debian: apt install g++)" >&2
  exit 1
fi

installed=$folder/requirements.txt
if cmp --silent "$here/requirements.txt" "$installed"; then
  echo "$folder is up to date"
  exit 0
fi
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
  --only-binary=:all: --require-hashes --target "$folder/wheels" --requirement "$here/requirements.txt"
for part in bin include lib nvvm; do
  mv "$folder/wheels/nvidia/cu13/$part" "$folder/"
done
rm -rf "$folder/wheels"
"$folder/bin/nvcc" --version | grep release
# Last, so that an interrupted set-up is begun anew.
cp "$here/requirements.txt" "$installed"
