// Kernels that go through the columns of rows: blocks are [rows, pieces of a row], each thread takes N columns of a piece.
#pragma once

#include "common.cuh"

// Whether each row of `stride` elements from `first` on, of which `cols` count, is whole packs of N at addresses for them.
template <int N, class T> __device__ __forceinline__ bool in_packs(const T* first, unsigned stride, unsigned cols) {
  return stride % N == 0 && cols % N == 0 && reinterpret_cast<uintptr_t>(first) % (N * sizeof(T)) == 0;
}

// `function(col)` for the pack of this thread.
template <int N, class Function> __device__ __forceinline__ void for_packs(unsigned cols, Function function) {
  const unsigned col = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (col < cols) function(col);
}

// `function(col)` for N single columns of this thread, neighbours beside those of the next thread.
template <int N, class Function> __device__ __forceinline__ void for_cols(unsigned cols, Function function) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned col = (blockIdx.y * N + i) * blockDim.x + threadIdx.x;
    if (col < cols) function(col);
  }
}
