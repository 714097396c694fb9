// Rotary position embedding, in place: a thread for some pairs of one head of one row.
#include "rotary.cuh"
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void turn(float cos, float sin, T& a, T& b) {
  const float x = to_float(a), y = to_float(b);
  a = from_float<T>(x * cos - y * sin);
  b = from_float<T>(y * cos + x * sin);
}

// Blocks: [rows, pieces of the row's pairs]. A position that the tables lack leaves its row as it is.
template <class T>
__device__ void rotary(unsigned x_stride, T* x, unsigned heads, unsigned head_dim, const uint32_t* positions,
                       RotaryTables tables) {
  constexpr int N = 16 / sizeof(T);
  const unsigned half = tables.half, position = positions[blockIdx.x];
  if (position >= tables.max_position) return;
  const float* cos = tables.cos + static_cast<size_t>(position) * tables.stride;
  const float* sin = tables.sin + static_cast<size_t>(position) * tables.stride;
  T* row = x + static_cast<size_t>(blockIdx.x) * x_stride;
  const bool packs = half % N == 0 && in_packs<N>(x, x_stride, head_dim);
  if (packs && tables.pairs == RotaryPairs::HalfApart) {
    for_packs<N>(heads * half, [&](unsigned index) {
      const unsigned pair = index % half;
      T* head = row + index / half * head_dim;
      Pack<T, N> a = load_pack<T, N>(head + pair), b = load_pack<T, N>(head + half + pair);
#pragma unroll
      for (int i = 0; i < N; ++i) turn(cos[pair + i], sin[pair + i], a.at[i], b.at[i]);
      store_pack(head + pair, a);
      store_pack(head + half + pair, b);
    });
  } else if (packs) {
    for_packs<N>(heads * half, [&](unsigned index) {
      const unsigned pair = index % half;
      T* at = row + index / half * head_dim + 2 * pair;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Pack<T, N> both = load_pack<T, N>(at + part * N);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const unsigned angle = pair + part * (N / 2) + i;
          turn(cos[angle], sin[angle], both.at[2 * i], both.at[2 * i + 1]);
        }
        store_pack(at + part * N, both);
      }
    });
  } else {
    for_cols<N>(heads * half, [&](unsigned index) {
      const unsigned pair = index % half;
      T* head = row + index / half * head_dim;
      unsigned first, second;
      elements_of_pair(tables, pair, first, second);
      turn(cos[pair], sin[pair], head[first], head[second]);
    });
  }
}

#define ROTARY(T)                                                                                                     \
  KERNEL(rotary_##T, 256)                                                                                             \
  (unsigned x_stride, T* x, unsigned heads, unsigned head_dim, const uint32_t* positions, const float* cos,           \
   const float* sin, unsigned table_stride, unsigned max_position, unsigned half, uint32_t pairs) {                   \
    const RotaryTables tables{cos, sin, table_stride, max_position, half, static_cast<RotaryPairs>(pairs)};           \
    rotary<T>(x_stride, x, heads, head_dim, positions, tables);                                                       \
  }                                                                                                                   \
  EXPORT(rotary_##T)

ROTARY(f32)
ROTARY(f16)
ROTARY(bf16)
