// Linear layers of any size, alignment and stride, an output a warp: what the kernels for tensor cores cannot do (f32, rows
// that do not begin at 16 bytes), and what is done around them.

#include "dot.cuh"
#include "linear.cuh"

// Rows of x that share a reading of the weights.
constexpr uint32_t ROWS = 4;
constexpr uint32_t WARPS = 8;

// Dot products of one row of weights with rows of x, of which `rows` are there. Lanes take 16 bytes of weights in turn; k
// need not be their multiple. A sum depends neither on the rows beside it nor on how elements are loaded.
template <class W, class T>
__device__ __forceinline__ void dot(float (&sums)[ROWS], const W* weight, const T* x, size_t x_stride, uint32_t rows,
                                    uint32_t k, bool packed) {
  constexpr uint32_t N = 16 / sizeof(W);
  for (uint32_t at = lane_id() * N; at < k; at += WARP * N) {
    const uint32_t count = min(k - at, N);
    float weights[N], values[N];
    widen(weights, weight + at, count, packed);
#pragma unroll
    for (uint32_t row = 0; row < ROWS; ++row) {
      if (row >= rows) break;
      widen(values, x + row * x_stride + at, count, packed);
#pragma unroll
      for (uint32_t i = 0; i < N; ++i) sums[row] = fmaf(weights[i], values[i], sums[row]);
    }
  }
#pragma unroll
  for (uint32_t row = 0; row < ROWS; ++row) sums[row] = warp_sum(sums[row]);
}

// Blocks: outputs by WARPS, rows by ROWS.
template <class W, class T, class OUT>
__device__ __forceinline__ void dots(const T* x, uint32_t x_stride, uint32_t rows, uint32_t k,
                                     const Part<W> (&parts)[MAX_PARTS], OUT* out, uint32_t out_stride, uint32_t adds) {
  const Place<W> place = place_of(parts, WARPS);
  const uint32_t output = place.first + warp_id(), first_row = blockIdx.y * ROWS;
  if (output >= place.part.n) return;
  const uint32_t here = min(rows - first_row, ROWS);
  float sums[ROWS] = {};
  dot(sums, place.part.weight + static_cast<size_t>(output) * place.part.stride,
      x + static_cast<size_t>(first_row) * x_stride, x_stride, here, k,
      is_packed(place.part.weight, place.part.stride) && is_packed(x, x_stride));
#pragma unroll
  for (uint32_t row = 0; row < ROWS; ++row) {
    if (row < here && lane_id() == static_cast<int>(row)) {
      put(out + static_cast<size_t>(first_row + row) * out_stride + place.column + output,
          finished(place.part, output, sums[row]), adds != 0);
    }
  }
}

// Blocks: rows, outputs by WARPS. A row's expert is the last that starts at or before it: `starts` has a start for each and
// the end. Rows behind the end are left as they are. `weight`: [num_experts * n, k], `scales` (or null): of its rows.
template <class W, class T, class OUT>
__device__ __forceinline__ void grouped_dots(const T* x, uint32_t x_stride, uint32_t k, const W* weight, uint32_t stride,
                                             uint32_t n, const float* scales, const uint32_t* starts,
                                             uint32_t num_experts, OUT* out, uint32_t out_stride) {
  const uint32_t row = blockIdx.x, output = blockIdx.y * WARPS + warp_id();
  if (output >= n || row >= starts[num_experts]) return;
  uint32_t expert = 0, end = num_experts;
  while (end - expert > 1) {
    const uint32_t middle = (expert + end) / 2;
    if (starts[middle] <= row) {
      expert = middle;
    } else {
      end = middle;
    }
  }
  const size_t weight_row = static_cast<size_t>(expert) * n + output;
  float sums[ROWS] = {};
  dot(sums, weight + weight_row * stride, x + static_cast<size_t>(row) * x_stride, 0, 1, k,
      is_packed(weight, stride) && is_packed(x, x_stride));
  if (lane_id() == 0) {
    const float scale = scales != nullptr ? scales[weight_row] : 1.0f;
    out[static_cast<size_t>(row) * out_stride + output] = from_float<OUT>(sums[0] * scale);
  }
}

#define DOT(W, T, OUT)                                                                                            \
  KERNEL(linear_dot_##T##_##W##_##OUT, WARPS* WARP)                                                               \
  (const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, LINEAR_PARTS(W), OUT* out, uint32_t out_stride,      \
   uint32_t adds) {                                                                                               \
    const Part<W> parts[MAX_PARTS] = LINEAR_PARTS_GIVEN;                                                          \
    dots<W, T, OUT>(x, x_stride, rows, k, parts, out, out_stride, adds);                                          \
  }                                                                                                               \
  EXPORT(linear_dot_##T##_##W##_##OUT)                                                                            \
  KERNEL(linear_grouped_dot_##T##_##W##_##OUT, WARPS* WARP)                                                       \
  (const T* x, uint32_t x_stride, uint32_t k, const W* weight, uint32_t stride, uint32_t n, const float* scales,  \
   const uint32_t* starts, uint32_t num_experts, OUT* out, uint32_t out_stride) {                                 \
    grouped_dots<W, T, OUT>(x, x_stride, k, weight, stride, n, scales, starts, num_experts, out, out_stride);     \
  }                                                                                                               \
  EXPORT(linear_grouped_dot_##T##_##W##_##OUT)

DOT(f32, f32, f32)
DOT(i8, f32, f32)
DOT(f16, f16, f16)
DOT(f16, f16, f32)
DOT(i8, f16, f16)
DOT(i8, f16, f32)
DOT(bf16, bf16, bf16)
DOT(bf16, bf16, f32)
DOT(i8, bf16, bf16)
DOT(i8, bf16, f32)

// Each row of out becomes the bias, or has it added: what a product is then added to. Blocks: rows, columns by 256.
#define BIAS(OUT)                                                                               \
  KERNEL(linear_bias_##OUT, 256)                                                                \
  (const float* bias, OUT* out, uint32_t out_stride, uint32_t cols, uint32_t adds) {            \
    const uint32_t col = blockIdx.y * blockDim.x + threadIdx.x;                                 \
    if (col < cols) put(out + static_cast<size_t>(blockIdx.x) * out_stride + col, bias[col], adds != 0); \
  }                                                                                             \
  EXPORT(linear_bias_##OUT)

BIAS(f32)
BIAS(f16)
BIAS(bf16)

// Weights as they are multiplied: the integers times their output's scale, rounded to T; [n, k] without gaps. A block a row.
template <class T>
__device__ __forceinline__ void dequantize(const i8* values, uint32_t stride, const float* scales, uint32_t k, T* out) {
  constexpr int N = 16;
  const i8* row = values + static_cast<size_t>(blockIdx.x) * stride;
  T* to = out + static_cast<size_t>(blockIdx.x) * k;
  const float scale = scales[blockIdx.x];
  const bool packed = is_packed(values, stride) && k % N == 0;
  for (uint32_t at = threadIdx.x * N; at < k; at += blockDim.x * N) {
    if (packed) {
      const Pack<i8, N> pack = load_pack<i8, N>(row + at);
      constexpr int HALF = 16 / sizeof(T);
#pragma unroll
      for (int half = 0; half < N; half += HALF) {
        Pack<T, HALF> rounded;
#pragma unroll
        for (int i = 0; i < HALF; ++i) rounded.at[i] = from_float<T>(to_float(pack.at[half + i]) * scale);
        store_pack(to + at + half, rounded);
      }
    } else {
      for (uint32_t i = at; i < min(at + N, k); ++i) to[i] = from_float<T>(to_float(row[i]) * scale);
    }
  }
}

#define DEQUANTIZE(T)                                                                     \
  KERNEL(linear_dequantize_##T, 256)                                                      \
  (const i8* values, uint32_t stride, const float* scales, uint32_t k, T* out) {          \
    dequantize<T>(values, stride, scales, k, out);                                        \
  }                                                                                       \
  EXPORT(linear_dequantize_##T)

DEQUANTIZE(f32)
DEQUANTIZE(f16)
DEQUANTIZE(bf16)
