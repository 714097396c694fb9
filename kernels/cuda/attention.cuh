// What the kernels of paged attention share: pages in shared memory, fragments of keys and values, the softmax as it goes.
//
// Pages hold PAGE positions of one kv head: `[num_blocks, kv_heads, PAGE, head_dim]`, keys and values in buffers of their own.
// A query row is one head of one token. The heads of a kv head are rows of the same tile, so that each key and value is read
// once for all of them.
#pragma once

#include "mma.cuh"

constexpr int PAGE = 32;
constexpr float LOG2_E = 1.4426950408889634f;

// The ids of sequences' blocks.
struct BlockTables {
  const uint32_t* entries;  // [num_rows][columns]
  const uint32_t* rows;     // of each sequence; null: its own number
  uint32_t columns, num_rows;

  __device__ __forceinline__ const uint32_t* of(int sequence) const {
    const uint32_t row = rows != nullptr ? min(rows[sequence], num_rows - 1) : static_cast<uint32_t>(sequence);
    return entries + static_cast<size_t>(row) * columns;
  }
};

// How scores are made, the same for the whole launch.
struct Scoring {
  float scale;         // of the dot products
  int window;          // a row sees that many positions at most, its own the last of them; 0: all
  float soft_cap;      // 0: none
  const float* slopes;  // ALiBi, [heads], or null
  const float* sinks;   // [heads], or null

  // The first position that the row at `own` sees.
  __device__ __forceinline__ int first_visible(int own) const { return window > 0 ? max(own + 1 - window, 0) : 0; }
  __device__ __forceinline__ float slope(int head) const { return slopes != nullptr ? slopes[head] * LOG2_E : 0.0f; }
};

// `cap * tanh(x / cap)` times log2(e), from the exponential, whose error is far below what 16 bits show.
__device__ __forceinline__ float capped(float x, float cap) {
  const float tanh_x = 1.0f - 2.0f / (exp2_approx(2.0f * LOG2_E * (x / cap)) + 1.0f);
  return cap * LOG2_E * tanh_x;
}

// What matrix products of these keys and values are computed in. 8-bit ones become f16 by moving bits, which leaves them
// too small by the factor 2^8 (the exponents' biases are 7 and 15); subnormal results are exact too. What was NaN is 480.
template <class KV> struct Compute {
  using Type = KV;
  static constexpr float UNSCALE = 1.0f;
  static constexpr int GROUP = 16;  // positions whose fragments are loaded at once
};
template <> struct Compute<f8> {
  using Type = f16;
  static constexpr float UNSCALE = 256.0f;
  static constexpr int GROUP = 32;
};

// Bytes 0 and 2, and bytes 1 and 3, of four f8 as pairs of f16, times 2^-8.
__device__ __forceinline__ uint32_t even_halves(uint32_t four) {
  return ((four << 8) & 0x80008000u) | ((four << 7) & 0x3f803f80u);
}
__device__ __forceinline__ uint32_t odd_halves(uint32_t four) { return (four & 0x80008000u) | ((four >> 1) & 0x3f803f80u); }

// Rows of `CHUNKS` times 16 bytes in shared memory, the chunks of a row so permuted that the same chunk of eight successive
// rows lies in different banks.
template <int CHUNKS> __device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;
  // In two parts, so that the compiler sees which steps of a loop over chunks differ by constants only.
  return 16 * (row * CHUNKS + (chunk & ~(SPAN - 1))) + 16 * ((chunk & (SPAN - 1)) ^ ((row / (8 / SPAN)) & (SPAN - 1)));
}

template <class KV, int D> struct Rows {
  static constexpr int CHUNKS = D * static_cast<int>(sizeof(KV)) / 16;
  static constexpr int CHUNK = 16 / static_cast<int>(sizeof(KV));  // elements
  static constexpr int BYTES = D * static_cast<int>(sizeof(KV));
};

// Fragments for element `16 * step` and the next 15 of GROUP keys from `first` on, one for each eight keys. The elements of
// 8-bit keys are permuted: see `element`.
template <class KV, int D>
__device__ __forceinline__ void key_fragments(uint32_t (&b)[Compute<KV>::GROUP / 8][2], const unsigned char* keys, int first,
                                              int step) {
  const int lane = lane_id();
  uint32_t r[4];
  if constexpr (sizeof(KV) == 2) {
    ldmatrix_x4(r, keys + swizzled<Rows<KV, D>::CHUNKS>(first + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    b[0][0] = r[0], b[0][1] = r[1];
    b[1][0] = r[2], b[1][1] = r[3];
  } else {
    ldmatrix_x4(r, keys + swizzled<Rows<KV, D>::CHUNKS>(first + lane, step));
#pragma unroll
    for (int n = 0; n < 4; ++n) b[n][0] = even_halves(r[n]), b[n][1] = odd_halves(r[n]);
  }
}

// Where element `i` of each 16 of a query goes, so that it meets the same of the keys.
template <class KV> __device__ __forceinline__ constexpr int element(int i) {
  return sizeof(KV) == 2 ? i : i / 4 * 2 + i % 4 / 2 + i % 2 * 8;
}

// Fragments for GROUP values from `first` on and their elements `16 * step` and the next 15: for each 16 values two, whose
// columns are those of `column`.
template <class KV, int D>
__device__ __forceinline__ void value_fragments(uint32_t (&b)[Compute<KV>::GROUP / 16][2][2], const unsigned char* values,
                                                int first, int step) {
  const int lane = lane_id();
  uint32_t r[4];
  if constexpr (sizeof(KV) == 2) {
    ldmatrix_x4_trans(r, values + swizzled<Rows<KV, D>::CHUNKS>(first + lane % 16, 2 * step + lane / 16));
    b[0][0][0] = r[0], b[0][0][1] = r[1];
    b[0][1][0] = r[2], b[0][1][1] = r[3];
  } else {
    ldmatrix_x4_trans(r, values + swizzled<Rows<KV, D>::CHUNKS>(first + lane, step));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      b[k][0][0] = even_halves(r[2 * k]), b[k][0][1] = even_halves(r[2 * k + 1]);
      b[k][1][0] = odd_halves(r[2 * k]), b[k][1][1] = odd_halves(r[2 * k + 1]);
    }
  }
}

// The element of the output that is `e` (0 or 1) of this lane in tile `2 * step + half` of eight columns.
template <class KV> __device__ __forceinline__ int column(int step, int half, int e) {
  const int quad = lane_id() % 4;
  return 16 * step + (sizeof(KV) == 2 ? 8 * half + 2 * quad + e : 4 * quad + 2 * e + half);
}

// Products to scores in powers of two, up to the factor that is returned, which is positive. This lane has of eight keys each
// the columns 2 * (lane % 4), + 1, of rows lane / 4 (elements 0 and 1) and lane / 4 + 8 (2 and 3). `slopes`, `own`: of these
// two rows.
template <int TILES>
__device__ __forceinline__ float finish_scores(float (&s)[TILES][4], const Scoring& scoring, float unscale,
                                               const float (&slopes)[2], int first_key, const int (&own)[2]) {
  const float scale = scoring.scale * unscale;
  if (scoring.soft_cap <= 0.0f && scoring.slopes == nullptr && scale > 0.0f) return scale * LOG2_E;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = s[n][i] * scale;
      s[n][i] = scoring.soft_cap > 0.0f ? capped(score, scoring.soft_cap) : score * LOG2_E;
    }
  }
  if (scoring.slopes != nullptr) {
    const int key = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fmaf(slopes[i / 2], static_cast<float>(key + 8 * n + i % 2 - own[i / 2]), s[n][i]);
      }
    }
  }
  return 1.0f;
}

// Takes keys that the two rows at positions `own` do not see out of the softmax, whatever their scores are.
template <int TILES>
__device__ __forceinline__ void hide(float (&s)[TILES][4], const Scoring& scoring, int first_key, const int (&own)[2]) {
  const int first = first_key + lane_id() % 4 * 2;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int begin = scoring.first_visible(own[row]) - first, end = own[row] - first;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * n + e < begin || 8 * n + e > end) s[n][2 * row + e] = -INFINITY;
      }
    }
  }
}

// 2^(x - max), 0 for what is hidden or where nothing has been seen.
__device__ __forceinline__ float weight_of(float x, float max) { return exp2_approx(x - (max == -INFINITY ? 0.0f : max)); }

// What two rows of a tile know of the keys so far (Milakov & Gimelshein 2018, arXiv:1805.02867): the greatest score, the
// same in the four lanes of a row, and this lane's part of the sum of the weights.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Scores times `scale` to weights; `correction`: by which what was summed so far is to be multiplied.
  template <int TILES>
  __device__ __forceinline__ void weigh(float (&s)[TILES][4], float scale, float (&correction)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float greatest = -INFINITY;
#pragma unroll
      for (int n = 0; n < TILES; ++n) greatest = fmaxf(greatest, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
      greatest = fmaxf(greatest, __shfl_xor_sync(ALL_LANES, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(ALL_LANES, greatest, 2));
      greatest = fmaxf(max[row], greatest * scale);
      const float base = greatest == -INFINITY ? 0.0f : greatest;
      correction[row] = exp2_approx(max[row] - base);
      max[row] = greatest;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          s[n][i] = exp2_approx(fmaf(s[n][i], scale, -base));
          total += s[n][i];
        }
      }
      sum[row] = fmaf(sum[row], correction[row], total);
    }
  }

  // The sums of the lanes of a row, once all keys were seen.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(ALL_LANES, sum[row], 1);
      sum[row] += __shfl_xor_sync(ALL_LANES, sum[row], 2);
    }
  }
};

// The weights of 16 keys, tiles `2 * step` and the next, as the left operand of the product with their values.
template <class C, int TILES> __device__ __forceinline__ void weight_fragment(uint32_t (&a)[4], const float (&s)[TILES][4], int step) {
  a[0] = pack_halves<C>(s[2 * step][0], s[2 * step][1]);
  a[1] = pack_halves<C>(s[2 * step][2], s[2 * step][3]);
  a[2] = pack_halves<C>(s[2 * step + 1][0], s[2 * step + 1][1]);
  a[3] = pack_halves<C>(s[2 * step + 1][2], s[2 * step + 1][3]);
}

// What sums of weighted values are multiplied by to give the output: for a row whose weights, relative to `max`, add up to
// `sum`, and whose sink takes its part. 0 for a row without keys.
__device__ __forceinline__ float normalizer(float max, float sum, const float* sinks, int head, float unscale) {
  if (sum == 0.0f) return 0.0f;
  if (sinks == nullptr) return unscale / sum;
  const float sink = sinks[head] * LOG2_E;
  const float greatest = fmaxf(max, sink);
  const float correction = exp2_approx(max - greatest);
  return unscale * correction / fmaf(sum, correction, exp2_approx(sink - greatest));
}

// Elements of a query, of type T, as the products take them; what is beyond the range of f16 becomes its greatest number.
template <class C, class T> __device__ __forceinline__ C as_operand(T x) {
  const float wide = to_float(x);
  return from_float<C>(isnan(wide) ? wide : fminf(fmaxf(wide, -65504.0f), 65504.0f));
}
template <> __device__ __forceinline__ bf16 as_operand<bf16, bf16>(bf16 x) { return x; }
template <> __device__ __forceinline__ f16 as_operand<f16, f16>(f16 x) { return x; }

// Sums of weighted values to a new maximum; mostly it is the old one.
template <int TILES> __device__ __forceinline__ void correct(float (&sums)[TILES][4], const float (&correction)[2]) {
  if (!__any_sync(ALL_LANES, correction[0] != 1.0f || correction[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= correction[i / 2];
  }
}
