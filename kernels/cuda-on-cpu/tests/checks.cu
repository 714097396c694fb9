// Kernels for what test.cpp asserts of the engine, good ones and faulty ones.
#include "../../cuda/mma.cuh"

// Of 32 lanes each: sums by halving, prefix sums, the value of lane 5, and votes.
KERNEL(check_warp, 64)(const float* x, float* sums, uint32_t* prefixes, uint64_t* fifth, uint32_t* ballots) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  sums[i] = warp_sum(x[i]);
  unsigned prefix = 1;
  for (int delta = 1; delta < WARP; delta *= 2) {
    const unsigned below = __shfl_up_sync(ALL_LANES, prefix, delta);
    if (lane_id() >= delta) prefix += below;
  }
  prefixes[i] = prefix + __shfl_down_sync(ALL_LANES, lane_id(), 1) * 100;
  fifth[i] = __shfl_sync(ALL_LANES, static_cast<unsigned long long>(i) << 33, 5);
  ballots[i] = __ballot_sync(ALL_LANES, lane_id() % 3 == 0) ^ (__any_sync(ALL_LANES, lane_id() == 40) ? 0x1000 : 0) ^
               (__all_sync(ALL_LANES, lane_id() < 32) ? 1 << 31 : 0);
}
EXPORT(check_warp)

// out[i] = the sum over its block, by barriers and static shared memory.
KERNEL(check_block, 256)(const float* x, float* out) {
  __shared__ float scratch[WARP];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_sum(x[i], scratch);
}
EXPORT(check_block)

// Reverses a block through dynamic shared memory; without the barrier each thread reads what another has not written yet.
template <bool BARRIER> __device__ void reverse(float* x) {
  DYNAMIC_SHARED(float, kept);
  const int i = threadIdx.x, last = blockDim.x - 1;
  kept[i] = x[i];
  if (BARRIER) __syncthreads();
  x[i] = kept[last - i];
}
KERNEL(check_reverse, 1024)(float* x) { reverse<true>(x); }
EXPORT(check_reverse)
KERNEL(check_reverse_without_barrier, 1024)(float* x) { reverse<false>(x); }
EXPORT(check_reverse_without_barrier)

// What shared memory holds before it is written.
KERNEL(check_stale_shared, 32)(uint32_t* out) {
  __shared__ uint32_t kept[WARP];
  DYNAMIC_SHARED(uint32_t, dynamic);
  out[blockIdx.x * WARP + threadIdx.x] = kept[threadIdx.x] & dynamic[threadIdx.x];
  kept[threadIdx.x] = dynamic[threadIdx.x] = 7;
}
EXPORT(check_stale_shared)

KERNEL(check_divergent_barrier, 64)(float* x) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    x[0] = 1;
    __syncthreads();
  }
}
EXPORT(check_divergent_barrier)
KERNEL(check_missed_barrier, 64)(float* x) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  x[0] = 1;
}
EXPORT(check_missed_barrier)
KERNEL(check_ended_lane, 64)(float* x) {
  if (threadIdx.x == 35) return;
  x[threadIdx.x] = warp_sum(x[threadIdx.x]);
}
EXPORT(check_ended_lane)
KERNEL(check_divergent_warp, 32)(float* x) {
  x[0] = threadIdx.x < 16 ? __shfl_xor_sync(ALL_LANES, 1.0f, 1) : __shfl_sync(ALL_LANES, 1.0f, 1);
}
EXPORT(check_divergent_warp)

KERNEL(check_write, 32)(float* x, uint64_t index) { x[index] = 1.0f; }
EXPORT(check_write)
KERNEL(check_misaligned, 32)(float* x, uint32_t shift) { store_pack(x, load_pack<float, 2>(x + shift)); }
EXPORT(check_misaligned)
KERNEL(check_shared_bounds, 32)(float* x, uint32_t index) {
  __shared__ float kept[WARP];
  kept[index] = x[0];
  __syncwarp();
  x[0] = kept[0];
}
EXPORT(check_shared_bounds)
KERNEL(check_deep_stack, 32)(uint32_t* x) {
  volatile char local[300 << 10];
  for (uint32_t i = 0; i < sizeof(local); i += 64) local[sizeof(local) - 1 - i] = char(x[0]);
  x[0] = local[5];
}
EXPORT(check_deep_stack)

// Copies 32 x 16 bytes to shared memory and gives back what is there before and after the wait.
KERNEL(check_async_copy, 32)(const float4* from, float4* early, float4* late) {
  __shared__ float4 kept[WARP];
  kept[threadIdx.x] = make_float4(7, 7, 7, 7);
  __syncwarp();
  copy_async_16(&kept[threadIdx.x], &from[threadIdx.x], threadIdx.x != 9);
  copy_async_commit();
  copy_async_commit();
  early[threadIdx.x] = kept[threadIdx.x];
  copy_async_wait<1>();
  __syncwarp();
  late[threadIdx.x] = kept[threadIdx.x ^ 1];
}
EXPORT(check_async_copy)
KERNEL(check_forgotten_copy, 32)(const float4* from) {
  __shared__ float4 kept[WARP];
  copy_async_16(&kept[threadIdx.x], &from[threadIdx.x]);
  copy_async_commit();
}
EXPORT(check_forgotten_copy)

// c [16, 8] = a [16, 16] b [16, 8], all row-major, through shared memory and ldmatrix.
template <class T> __device__ void multiply(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T kept_a[16 * 16];
  __shared__ __align__(16) T kept_b[32 * 8];
  const int lane = lane_id();
  for (int i = lane; i < 16 * 16; i += WARP) kept_a[i] = a[i];
  for (int i = lane; i < 16 * 8; i += WARP) {
    kept_b[i] = b[i];
    kept_b[16 * 8 + i] = b[i];
  }
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  ldmatrix_x4(fragment_a, &kept_a[(lane % 16) * 16 + lane / 16 * 8]);
  ldmatrix_x4_trans(fragment_b, &kept_b[lane * 8]);
  const uint32_t first_b[2] = {fragment_b[0], fragment_b[1]};
  float d[4] = {};
  mma_m16n8k16(d, fragment_a, first_b, T());
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
KERNEL(check_mma_bf16, 32)(const bf16* a, const bf16* b, float* c) { multiply(a, b, c); }
EXPORT(check_mma_bf16)
KERNEL(check_mma_f16, 32)(const f16* a, const f16* b, float* c) { multiply(a, b, c); }
EXPORT(check_mma_f16)

KERNEL(check_atomics, 256)(uint32_t* counts, float* sum, int32_t* extremes) {
  atomicAdd(&counts[0], 1u);
  atomicOr(&counts[1], 1u << (threadIdx.x % 32));
  atomicCAS(&counts[2], threadIdx.x, threadIdx.x + 1);
  atomicAdd(sum, 0.5f);
  atomicMax(&extremes[0], int(threadIdx.x) - 100);
  atomicMin(&extremes[1], int(threadIdx.x) - 100);
}
EXPORT(check_atomics)

struct Several {
  int32_t a;
  double b;
};
KERNEL(check_parameters, 32)(float* out, int32_t a, Several several, uint64_t c, float d, int8_t e) {
  if (threadIdx.x == 0) out[blockIdx.x + blockIdx.y * gridDim.x + blockIdx.z * gridDim.x * gridDim.y] = a + several.a + float(several.b) + c + d + e;
}
EXPORT(check_parameters)

KERNEL(check_add, 256)(float* x, float y, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) x[i] += y;
}
EXPORT(check_add)
