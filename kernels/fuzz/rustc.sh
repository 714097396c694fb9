#!/bin/sh
# The compiler, as cargo's RUSTC_WRAPPER: the kernels, and neither their build script nor what they depend on, get libFuzzer's
# counters and comparisons. Flags for all would be the build script's too, or would compile the dependencies again.
case " $* " in
  *" --crate-name kernels "*)
    exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
      -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
      -Cllvm-args=-sanitizer-coverage-trace-compares ;;
  *) exec "$@" ;;
esac
