// Writing keys and values to pages [num_blocks, kv_heads, block_size, head_dim], alone or with what comes before it: norm of
// queries and keys, and rotary position embedding.
#include "rotary.cuh"
#include "rows.cuh"

// Keys and values of a layer.
template <class KV> struct Pages {
  KV* keys;
  KV* values;
  unsigned num_slots;
  unsigned kv_heads;
  unsigned block_size;
  unsigned head_dim;

  // Of a head at a slot, the first element's place.
  __device__ size_t at(unsigned slot, unsigned head) const {
    const size_t block = slot / block_size;
    return ((block * kv_heads + head) * block_size + slot % block_size) * head_dim;
  }
};

template <int N, class KV, class T> __device__ void copy_pack(const T* from, KV* to) {
  const Pack<T, N> loaded = load_pack<T, N>(from);
  Pack<KV, N> stored;
#pragma unroll
  for (int i = 0; i < N; ++i) stored.at[i] = from_float<KV>(to_float(loaded.at[i]));
  store_pack(to, stored);
}

// Blocks: [rows, pieces of a row]. A slot beyond the last, as that of a row that only fills a batch up, is not written.
template <class T, class KV>
__device__ void write_kv(const T* keys, unsigned key_stride, const T* values, unsigned value_stride, const uint32_t* slots,
                         Pages<KV> pages) {
  constexpr int N = 16 / sizeof(T);
  const size_t row = blockIdx.x;
  const unsigned slot = slots[row], cols = pages.kv_heads * pages.head_dim;
  if (slot >= pages.num_slots) return;
  const T* key = keys + row * key_stride;
  const T* value = values + row * value_stride;
  if (in_packs<N>(keys, key_stride, pages.head_dim) && in_packs<N>(values, value_stride, pages.head_dim)) {
    for_packs<N>(cols, [&](unsigned col) {
      const size_t to = pages.at(slot, col / pages.head_dim) + col % pages.head_dim;
      copy_pack<N>(key + col, pages.keys + to);
      copy_pack<N>(value + col, pages.values + to);
    });
  } else {
    for_cols<N>(cols, [&](unsigned col) {
      const size_t to = pages.at(slot, col / pages.head_dim) + col % pages.head_dim;
      copy_pack<1>(key + col, pages.keys + to);
      copy_pack<1>(value + col, pages.values + to);
    });
  }
}

// `function(element)` for the elements of a head that belong to a lane: packs of N, or single ones.
template <int N, class Function> __device__ __forceinline__ void for_elements(unsigned head_dim, Function function) {
  for (unsigned element = lane_id() * N; element < head_dim; element += WARP * N) function(element);
}

// The lane's elements of a head in registers or wherever the caller keeps them, from and to memory.
template <int N, class T> __device__ void load_head(const T* from, float* to, unsigned head_dim) {
  for_elements<N>(head_dim, [&](unsigned element) {
    const Pack<T, N> loaded = load_pack<T, N>(from + element);
#pragma unroll
    for (int i = 0; i < N; ++i) to[element + i] = to_float(loaded.at[i]);
  });
}
template <int N, class T> __device__ void store_head(const float* from, T* to, unsigned head_dim) {
  for_elements<N>(head_dim, [&](unsigned element) {
    Pack<T, N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) stored.at[i] = from_float<T>(from[element + i]);
    store_pack(to + element, stored);
  });
}

// A warp's copy of a head, whose elements all lanes see.
__device__ __forceinline__ void normalize_head(float* head, unsigned head_dim, const float* weight, float eps) {
  float squares = 0.0f;
  for (unsigned i = lane_id(); i < head_dim; i += WARP) squares += head[i] * head[i];
  const float scale = rsqrtf(warp_sum(squares) / head_dim + eps);
  for (unsigned i = lane_id(); i < head_dim; i += WARP) head[i] = head[i] * scale * weight[i];
  __syncwarp();
}
__device__ __forceinline__ void rotate_head(float* head, const RotaryTables& tables, unsigned position) {
  if (position < tables.max_position) {
    const size_t angles = static_cast<size_t>(position) * tables.stride;
    for (unsigned pair = lane_id(); pair < tables.half; pair += WARP) {
      const float cos = tables.cos[angles + pair], sin = tables.sin[angles + pair];
      unsigned first, second;
      elements_of_pair(tables, pair, first, second);
      const float x = head[first], y = head[second];
      head[first] = x * cos - y * sin;
      head[second] = y * cos + x * sin;
    }
  }
  __syncwarp();
}

template <class T> struct Qkv {
  T* first;
  unsigned stride;
  unsigned rows;
  unsigned query_heads;
};
struct QueryKeyNorm {
  const float* query;  // null: none
  const float* key;
  float eps;
};

// A warp for each head of each row: queries in place, keys and values to the pages. `shared`: head_dim floats of each warp.
template <class T, class KV>
__device__ void rotary_write_kv(Qkv<T> qkv, QueryKeyNorm norm, const uint32_t* positions, RotaryTables tables,
                                const uint32_t* slots, Pages<KV> pages, float* shared) {
  constexpr int N = 4;
  const unsigned heads = qkv.query_heads + 2 * pages.kv_heads, head_dim = pages.head_dim;
  const unsigned index = blockIdx.x * (blockDim.x / WARP) + warp_id();
  if (index >= qkv.rows * heads) return;
  const unsigned row = index / heads, head = index % heads;
  const bool is_query = head < qkv.query_heads, is_value = head >= qkv.query_heads + pages.kv_heads;
  const unsigned slot = slots[row];
  // A row that only fills a batch up.
  if (slot >= pages.num_slots) return;
  T* const from = qkv.first + static_cast<size_t>(row) * qkv.stride + head * head_dim;
  float* const elements = shared + warp_id() * head_dim;
  const bool packs = in_packs<N>(qkv.first, qkv.stride, head_dim);
  if (packs) {
    load_head<N>(from, elements, head_dim);
  } else {
    load_head<1>(from, elements, head_dim);
  }
  __syncwarp();
  const float* weight = is_query ? norm.query : norm.key;
  if (!is_value && weight != nullptr) normalize_head(elements, head_dim, weight, norm.eps);
  if (!is_value) rotate_head(elements, tables, positions[row]);
  if (is_query) {
    if (packs) {
      store_head<N>(elements, from, head_dim);
    } else {
      store_head<1>(elements, from, head_dim);
    }
    return;
  }
  const unsigned kv_head = (head - qkv.query_heads) % pages.kv_heads;
  KV* const to = (is_value ? pages.values : pages.keys) + pages.at(slot, kv_head);
  if (head_dim % N == 0) {
    store_head<N>(elements, to, head_dim);
  } else {
    store_head<1>(elements, to, head_dim);
  }
}

#define KV_CACHE(T, KV)                                                                                              \
  KERNEL(write_kv_##T##_##KV, 256)                                                                                   \
  (const T* keys, unsigned key_stride, const T* values, unsigned value_stride, const uint32_t* slots, KV* key_pages, \
   KV* value_pages, unsigned num_slots, unsigned kv_heads, unsigned block_size, unsigned head_dim) {                 \
    const Pages<KV> pages{key_pages, value_pages, num_slots, kv_heads, block_size, head_dim};                        \
    write_kv(keys, key_stride, values, value_stride, slots, pages);                                                  \
  }                                                                                                                  \
  EXPORT(write_kv_##T##_##KV)                                                                                        \
  KERNEL(rotary_write_kv_##T##_##KV, 128)                                                                            \
  (unsigned qkv_stride, T* qkv, unsigned rows, unsigned query_heads, const float* query_norm, const float* key_norm, \
   float eps, const uint32_t* positions, const float* cos, const float* sin, unsigned table_stride,                  \
   unsigned max_position, unsigned half, uint32_t pairs, const uint32_t* slots, KV* key_pages, KV* value_pages,      \
   unsigned num_slots, unsigned kv_heads, unsigned block_size, unsigned head_dim) {                                  \
    DYNAMIC_SHARED(float, shared);                                                                                   \
    const Pages<KV> pages{key_pages, value_pages, num_slots, kv_heads, block_size, head_dim};                        \
    const RotaryTables tables{cos, sin, table_stride, max_position, half, static_cast<RotaryPairs>(pairs)};          \
    rotary_write_kv(Qkv<T>{qkv, qkv_stride, rows, query_heads}, QueryKeyNorm{query_norm, key_norm, eps}, positions,  \
                    tables, slots, pages, shared);                                                                   \
  }                                                                                                                  \
  EXPORT(rotary_write_kv_##T##_##KV)

#define KV_CACHE_OF(T) \
  KV_CACHE(T, f32)     \
  KV_CACHE(T, f16)     \
  KV_CACHE(T, bf16)    \
  KV_CACHE(T, f8)

KV_CACHE_OF(f32)
KV_CACHE_OF(f16)
KV_CACHE_OF(bf16)
