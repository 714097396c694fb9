// The element and vector types of CUDA's language, and its conversions: all round to nearest, ties to even.
#pragma once

#include <stdint.h>
#include <string.h>

namespace cuda_on_cpu {
template <class To, class From> inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float float_of_bf16(uint16_t bits) { return bits_of<float>(uint32_t(bits) << 16); }

inline uint16_t bf16_of_float(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the one NaN that the device's conversion gives
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float float_of_f16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude > 0x7c00u) return bits_of<float>(0x7fffffffu);
  if (magnitude == 0x7c00u) return bits_of<float>(sign | 0x7f800000u);
  // As a float's bits this is the number times 2^-112, subnormal numbers too; the product is exact.
  const float scaled = bits_of<float>(magnitude << 13) * 0x1p112f;
  return bits_of<float>(bits_of<uint32_t>(scaled) | sign);
}

inline uint16_t f16_of_float(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;  // NaN, as the device gives it
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // from 65520 on: rounds to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: added to 0.5, a unit in the last place is 2^-24, that of f16's subnormal numbers.
    const float rounded = bits_of<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bits_of<uint32_t>(rounded) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13));
}

inline float float_of_e4m3(uint8_t bits) {
  const uint32_t sign = uint32_t(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7f) return bits_of<float>(0x7fffffffu);
  const float scaled = bits_of<float>(magnitude << 20) * 0x1p120f;
  return bits_of<float>(bits_of<uint32_t>(scaled) | sign);
}

// Saturates to 448, infinity too; NaN stays NaN.
inline uint8_t e4m3_of_float(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  const uint8_t sign = uint8_t((bits >> 24) & 0x80u);
  if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7eu);
  if (magnitude < 0x3c800000u) {
    // Below 2^-6: added to 2^14, a unit in the last place is 2^-9, that of the subnormal numbers.
    const float rounded = bits_of<float>(magnitude) + 0x1p14f;
    return uint8_t(sign | (bits_of<uint32_t>(rounded) - bits_of<uint32_t>(0x1p14f)));
  }
  const uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1) - 0x3c000000u) >> 20;
  return uint8_t(sign | (rounded > 0x7eu ? 0x7eu : rounded));
}
}  // namespace cuda_on_cpu

struct __nv_bfloat16 {
  uint16_t __x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : __x(cuda_on_cpu::bf16_of_float(x)) {}
  operator float() const { return cuda_on_cpu::float_of_bf16(__x); }
};
struct __half {
  uint16_t __x;
  __half() = default;
  __half(float x) : __x(cuda_on_cpu::f16_of_float(x)) {}
  operator float() const { return cuda_on_cpu::float_of_f16(__x); }
};
struct __nv_fp8_e4m3 {
  uint8_t __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float x) : __x(cuda_on_cpu::e4m3_of_float(x)) {}
  explicit operator float() const { return cuda_on_cpu::float_of_e4m3(__x); }
};

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::float_of_bf16(x.__x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __half2float(__half x) { return cuda_on_cpu::float_of_f16(x.__x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half(float x) { return __half(x); }

#define CUDA_ON_CPU_VECTOR(T, name, align2, align4)                                                          \
  struct name##1 { T x; };                                                                                   \
  struct alignas(align2) name##2 { T x, y; };                                                                \
  struct name##3 { T x, y, z; };                                                                             \
  struct alignas(align4) name##4 { T x, y, z, w; };                                                          \
  inline name##2 make_##name##2(T x, T y) { return name##2{x, y}; }                                          \
  inline name##3 make_##name##3(T x, T y, T z) { return name##3{x, y, z}; }                                  \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4{x, y, z, w}; }
CUDA_ON_CPU_VECTOR(signed char, char, 2, 4)
CUDA_ON_CPU_VECTOR(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTOR(short, short, 4, 8)
CUDA_ON_CPU_VECTOR(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTOR(int, int, 8, 16)
CUDA_ON_CPU_VECTOR(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTOR(float, float, 8, 16)
CUDA_ON_CPU_VECTOR(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTOR(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTOR(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
