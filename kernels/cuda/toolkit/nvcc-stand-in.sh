#!/bin/sh
# Takes nvcc's place where code for a GPU is not wanted: to check and lint the Rust code of the feature `cuda`, and to test it
# with the driver that computes on the CPU, which brings the kernels itself. A real driver refuses what this writes.
set -eu
if [ "${1:-}" = --version ]; then
  echo "stand-in for nvcc, release 13.0, V13.0.0"
  exit 0
fi
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then
    # Ends with a zero byte, so that a driver that takes it for text finds the end.
    printf 'no code: nvcc was not there when this was built\0' >"$2"
    exit 0
  fi
  shift
done
echo "the stand-in for nvcc was not told where to write (-o)" >&2
exit 1
