// Where the greatest value is.
#pragma once

#include "common.cuh"

// The greatest of a warp's values and of equal ones that with the lowest index; all lanes get it.
struct Best {
  float value;
  unsigned index;
  __device__ __forceinline__ bool beats(const Best& other) const {
    return value > other.value || (value == other.value && index < other.index);
  }
};
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(ALL_LANES, best.value, offset), __shfl_xor_sync(ALL_LANES, best.index, offset)};
    if (other.beats(best)) best = other;
  }
  return best;
}
