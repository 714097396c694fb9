// Rows as floats, for sums without tensor cores.
#pragma once

#include "common.cuh"

// The first `count` of `N` elements, in loads of 16 bytes where `packed` and all are there; zeros behind them.
template <uint32_t N, class E>
__device__ __forceinline__ void widen(float (&to)[N], const E* from, uint32_t count, bool packed) {
  if (packed && count >= N) {
    constexpr uint32_t PACK = 16 / sizeof(E);
#pragma unroll
    for (uint32_t first = 0; first < N; first += PACK) {
      const Pack<E, PACK> pack = load_pack<E, PACK>(from + first);
#pragma unroll
      for (uint32_t i = 0; i < PACK; ++i) to[first + i] = to_float(pack.at[i]);
    }
  } else {
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class E> __device__ __forceinline__ bool is_packed(const E* matrix, uint32_t stride) {
  return (reinterpret_cast<uintptr_t>(matrix) | (stride * sizeof(E))) % 16 == 0;
}
