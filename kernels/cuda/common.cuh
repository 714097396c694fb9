// What all kernels share: element types, exports, conversions, vector loads, reductions.
//
// Kernels keep to what is declared here, in mma.cuh, and to CUDA's indices, barriers, warp shuffles and votes, and atomics:
// that part of the language is also what cuda-on-cpu/ gives, so the same sources run in tests on machines without a GPU.
#pragma once

#include <stdint.h>

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
// A kernel, by its plain name: KERNEL(rms_norm_f32_bf16, 256)(const float* x, ...) { ... } EXPORT(rms_norm_f32_bf16)
// `max_threads`: of a block. The name is the operation and its element types, as the host asks for it.
#define KERNEL(name, max_threads) extern "C" __global__ void __launch_bounds__(max_threads) name
#define EXPORT(name)
// Dynamic shared memory, 16-byte aligned, as a pointer to `type`.
#define DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_)
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;
using f8 = __nv_fp8_e4m3;  // what candle calls F8E4M3
using i8 = int8_t;
using f32 = float;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(f8 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(i8 x) { return static_cast<float>(x); }

// Rounds to nearest, ties to even; f8 saturates to its greatest finite value.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ f8 from_float<f8>(float x) { return f8(x); }

// `N` elements that are loaded and stored at once; the address is a multiple of their size.
template <class T, int N> struct __align__(sizeof(T) * N) Pack {
  T at[N];
};
template <class T, int N> __device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N> __device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x & (WARP - 1); }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

// Over the lanes of a warp; all lanes call it, and all get the result.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
  return x;
}

// Over a block of whole warps, one-dimensional; all threads call it, and all get the result. `scratch`: shared, of WARP
// floats, free again when the call returns.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  const int num_warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = warp_sum(lane_id() < num_warps ? scratch[lane_id()] : 0.0f);
  __syncthreads();
  return x;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
  const int num_warps = blockDim.x / WARP;
  x = warp_max(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = warp_max(lane_id() < num_warps ? scratch[lane_id()] : -INFINITY);
  __syncthreads();
  return x;
}
