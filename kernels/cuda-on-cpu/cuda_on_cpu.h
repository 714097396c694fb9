// CUDA's device language for a C++17 compiler: what common.cuh and mma.cuh let kernels use, and nothing that the engine
// does not do exactly. A new instruction of mma.cuh gets its twin at the end of this file.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "engine.h"
#include "types.h"

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other, launches too. The linker gathers these variables, and the engine poisons them.
#define __shared__ static

#define KERNEL(name, threads)                        \
  static constexpr unsigned name##_max_threads_ = (threads); \
  extern "C" void name

// The build names each source file's static shared memory for the linker (Makefile).
#define CUDA_ON_CPU_JOIN_(a, b) a##b
#define CUDA_ON_CPU_JOIN(a, b) CUDA_ON_CPU_JOIN_(a, b)
#define CUDA_ON_CPU_SHARED_BEGIN CUDA_ON_CPU_JOIN(cuda_on_cpu_shared_begin_, CUDA_ON_CPU_UNIT)
#define CUDA_ON_CPU_SHARED_END CUDA_ON_CPU_JOIN(cuda_on_cpu_shared_end_, CUDA_ON_CPU_UNIT)
extern "C" __attribute__((visibility("hidden"))) char CUDA_ON_CPU_SHARED_BEGIN[], CUDA_ON_CPU_SHARED_END[];

#define EXPORT(name)                                                                                      \
  __attribute__((constructor)) static void name##_register_() {                                           \
    cuda_on_cpu::register_kernel(cuda_on_cpu::kernel_of(#name, &name, name##_max_threads_,                \
                                                        CUDA_ON_CPU_SHARED_BEGIN, CUDA_ON_CPU_SHARED_END)); \
  }

#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_cpu::dynamic_shared())

// Where an intrinsic is called: the last parameter of each that waits.
#define CUDA_ON_CPU_SITE \
  cuda_on_cpu::Site site = { __builtin_FILE(), __builtin_LINE() }

// Set by the engine at each change of thread.
extern __attribute__((visibility("hidden"))) uint3 threadIdx, blockIdx;
extern __attribute__((visibility("hidden"))) dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

template <class... A> struct Invoke {
  static void run(void (*function)(), void** parameters) { run(function, parameters, std::index_sequence_for<A...>()); }
  template <size_t... I> static void run(void (*function)(), void** parameters, std::index_sequence<I...>) {
    (void)parameters;
    reinterpret_cast<void (*)(A...)>(function)(*static_cast<A*>(parameters[I])...);
  }
};
template <class... A>
Kernel kernel_of(const char* name, void (*function)(A...), unsigned max_threads, char* shared_begin, char* shared_end) {
  return Kernel{name,          reinterpret_cast<void (*)()>(function), &Invoke<A...>::run, {sizeof(A)...},
                {alignof(A)...}, max_threads,                            shared_begin,       shared_end};
}

template <class T> struct Shuffle {
  T value;
  unsigned source;
  T result;
  static void complete(void** states, unsigned mask) {
    for (unsigned lane = 0; lane < WARP_LANES; lane++) {
      if (!(mask >> lane & 1)) continue;
      auto* own = static_cast<Shuffle*>(states[lane]);
      auto* from = static_cast<Shuffle*>(states[own->source]);
      if (!from) fail(LAUNCH_FAILED, "lane %u shuffles from lane %u, which mask 0x%x leaves out", lane, own->source, mask);
      own->result = from->value;
    }
  }
};
unsigned this_lane();

// `segment`: the lanes of `width` that the own one is among.
template <class T> T shuffle(const char* what, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle<T> state{value, source, value};
  meet_warp(what, mask, &state, &Shuffle<T>::complete, site);
  return state.result;
}

struct Vote {
  bool predicate;
  unsigned ballot;
  static void complete(void** states, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < WARP_LANES; lane++)
      if ((mask >> lane & 1) && static_cast<Vote*>(states[lane])->predicate) ballot |= 1u << lane;
    for (unsigned lane = 0; lane < WARP_LANES; lane++)
      if (mask >> lane & 1) static_cast<Vote*>(states[lane])->ballot = ballot;
  }
};
inline unsigned vote(const char* what, unsigned mask, bool predicate, Site site) {
  Vote state{predicate, 0};
  meet_warp(what, mask, &state, &Vote::complete, site);
  return state.ballot;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::meet_block("__syncthreads", site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet_warp("__syncwarp", mask, nullptr, nullptr, site);
}
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
[[noreturn]] inline void __trap() { cuda_on_cpu::fail(cuda_on_cpu::LAUNCH_FAILED, "__trap"); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned first = cuda_on_cpu::this_lane() & ~(width - 1);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::this_lane(), source = lane ^ unsigned(lane_mask);
  const unsigned end = (lane & ~(width - 1)) + width;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, site);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::this_lane();
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) >= delta ? lane - delta : lane, site);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::this_lane();
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value,
                              (lane & (width - 1)) + delta < unsigned(width) ? lane + delta : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("__all_sync", mask, predicate, site) == mask;
}

// Threads change only where they wait, so plain reads and writes are atomic.
template <class T> T atomicAdd(T* at, std::common_type_t<T> x) { const T old = *at; *at = old + x; return old; }
template <class T> T atomicSub(T* at, std::common_type_t<T> x) { const T old = *at; *at = old - x; return old; }
template <class T> T atomicMax(T* at, std::common_type_t<T> x) { const T old = *at; if (x > old) *at = x; return old; }
template <class T> T atomicMin(T* at, std::common_type_t<T> x) { const T old = *at; if (x < old) *at = x; return old; }
template <class T> T atomicExch(T* at, std::common_type_t<T> x) { const T old = *at; *at = x; return old; }
template <class T> T atomicOr(T* at, std::common_type_t<T> x) { const T old = *at; *at = old | x; return old; }
template <class T> T atomicAnd(T* at, std::common_type_t<T> x) { const T old = *at; *at = old & x; return old; }
template <class T> T atomicXor(T* at, std::common_type_t<T> x) { const T old = *at; *at = old ^ x; return old; }
template <class T> T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) { const unsigned old = *at; *at = old >= limit ? 0 : old + 1; return old; }

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T x) { *to = x; }

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_of<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits_of<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_of<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_of<float>(x); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; bit++) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
// Products of four bytes each, summed onto c.
inline int __dp4a(int a, int b, int c) {
  for (int shift = 0; shift < 32; shift += 8) c += int(int8_t(a >> shift)) * int(int8_t(b >> shift));
  return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned chosen = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned which = selector >> (4 * i);
    unsigned byte = unsigned(bytes >> (8 * (which & 7))) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    chosen |= byte << (8 * i);
  }
  return chosen;
}

// glibc declares some of these names for itself.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define CUDA_ON_CPU_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; }        \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// The twins of mma.cuh.

namespace cuda_on_cpu {

template <class T> inline float half_of(uint32_t pair, int which) {
  T x;
  x.__x = uint16_t(pair >> (16 * which));
  return float(x);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": lane l has group l / 4 and place l % 4.
template <class T> struct Mma16816 {
  float (*d)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
  static void complete(void** states, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const auto& own = *static_cast<Mma16816*>(states[lane]);
      const int group = lane / 4, place = lane % 4;
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++)
          a[group + 8 * (i % 2)][place * 2 + half + 8 * (i / 2)] = half_of<T>((*own.a)[i], half);
        for (int i = 0; i < 2; i++) b[place * 2 + half + 8 * i][group] = half_of<T>((*own.b)[i], half);
      }
    }
    float product[16][8] = {};
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++) product[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
      auto& d = *static_cast<Mma16816*>(states[lane])->d;
      for (int i = 0; i < 4; i++) d[i] += product[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
  }
};

struct LoadMatrices {
  uint32_t* r;
  const uint16_t* row;
  // `transposed`: of each matrix its transpose.
  template <bool TRANSPOSED> static void complete(void** states, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
      auto& own = *static_cast<LoadMatrices*>(states[lane]);
      for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int half = 0; half < 2; half++) {
          const int row = lane / 4, column = lane % 4 * 2 + half;
          pair[half] = TRANSPOSED ? static_cast<LoadMatrices*>(states[matrix * 8 + column])->row[row]
                                  : static_cast<LoadMatrices*>(states[matrix * 8 + row])->row[column];
        }
        own.r[matrix] = uint32_t(pair[1]) << 16 | pair[0];
      }
    }
  }
};
inline void load_matrices(const char* what, uint32_t* r, const void* row, Complete complete, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail(MISALIGNED_ADDRESS, "%s at %s:%d: the row at %p is not 16-byte aligned", what, site.file, site.line, row);
  if (!is_shared(row, 16))
    fail(ILLEGAL_ADDRESS, "%s at %s:%d: the row at %p is not in shared memory", what, site.file, site.line, row);
  LoadMatrices state{r, static_cast<const uint16_t*>(row)};
  meet_warp(what, 0xffffffffu, &state, complete, site);
}

}  // namespace cuda_on_cpu

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::Mma16816<T> state{&d, &a, &b};
  cuda_on_cpu::meet_warp("mma_m16n8k16", 0xffffffffu, &state, &cuda_on_cpu::Mma16816<T>::complete, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrices("ldmatrix_x4", r, row, &cuda_on_cpu::LoadMatrices::complete<false>, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::load_matrices("ldmatrix_x4_trans", r, row, &cuda_on_cpu::LoadMatrices::complete<true>, site);
}
inline void copy_async_16(void* to_shared, const void* from_global, bool valid = true, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::copy_async(to_shared, from_global, 16, valid, site);
}
inline void copy_async_commit() { cuda_on_cpu::copy_async_close_group(); }
template <int PENDING> inline void copy_async_wait() { cuda_on_cpu::copy_async_wait_group(PENDING); }
