// Tensor cores and asynchronous copies, for sm_80 and newer (PTX ISA, "mma.sync", "ldmatrix", "cp.async").
#pragma once

#include "common.cuh"

#ifndef CUDA_ON_CPU

// d += a b, for a of 16 x 16, b of 16 x 8, d of 16 x 8, in the fragments of mma.sync.m16n8k16: all lanes of a warp call it.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned), and gets of each matrix the elements 2 * (l % 4), + 1 of row l / 4; of its transpose with `_trans`.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, zeros where `valid` is false; done when copy_async_wait says so (and seen by
// other threads after a barrier behind it).
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from_global, bool valid = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from_global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `PENDING` of this thread's committed groups are still under way.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

#endif

// Two floats as one register of a fragment, the first in the lower half.
template <class T> __device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<uint32_t*>(&pair);
}

// 16 bytes (aligned) that this kernel reads once: past the first-level cache, which they would only empty of what is read
// again.
__device__ __forceinline__ Pack<uint32_t, 4> load_once_16(const void* from) {
#ifdef CUDA_ON_CPU
  return load_pack<uint32_t, 4>(static_cast<const uint32_t*>(from));
#else
  Pack<uint32_t, 4> to;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to.at[0]), "=r"(to.at[1]), "=r"(to.at[2]), "=r"(to.at[3])
               : "l"(from));
  return to;
#endif
}

// Four bytes chosen from eight, `low` holding bytes 0 to 3 and `high` 4 to 7: byte i is the one that nibble i names.
__device__ __forceinline__ uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t nibbles) {
#ifdef CUDA_ON_CPU
  const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= ((bytes >> (8 * ((nibbles >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return chosen;
#else
  return __byte_perm(low, high, nibbles);
#endif
}

// 2^x with a relative error of 2^-22; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CUDA_ON_CPU
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}
