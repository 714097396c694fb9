// What the ranks' all-gather leaves side by side: [world_size, rows, cols] becomes [rows, world_size * cols].

#include "common.cuh"

// Blocks: rows in x, ranks in y.
template <class T>
__device__ __forceinline__ void gather_cols(const T* parts, uint32_t rows, uint32_t cols, T* out, uint32_t out_stride) {
  const T* from = parts + (static_cast<size_t>(blockIdx.y) * rows + blockIdx.x) * cols;
  T* to = out + static_cast<size_t>(blockIdx.x) * out_stride + static_cast<size_t>(blockIdx.y) * cols;
  constexpr uint32_t N = 16 / sizeof(T);
  const bool packed = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0 && cols % N == 0;
  if (packed) {
    for (uint32_t at = threadIdx.x * N; at < cols; at += blockDim.x * N) store_pack(to + at, load_pack<T, N>(from + at));
  } else {
    for (uint32_t at = threadIdx.x; at < cols; at += blockDim.x) to[at] = from[at];
  }
}

#define GATHER_COLS(T)                                                                    \
  KERNEL(gather_cols_##T, 256)                                                            \
  (const T* parts, uint32_t rows, uint32_t cols, T* out, uint32_t out_stride) {           \
    gather_cols<T>(parts, rows, cols, out, out_stride);                                   \
  }                                                                                       \
  EXPORT(gather_cols_##T)

GATHER_COLS(f32)
GATHER_COLS(f16)
GATHER_COLS(bf16)
