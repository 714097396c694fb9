// Attention of chunks of prompts over paged keys and values, their own among them (Dao 2023, "FlashAttention-2",
// arXiv:2307.08691).
//
// A block has the query rows of one kv head, token by token and head by head, up to ROWS of them, and walks over the keys
// that they see, KEYS at a time. While a warp multiplies queries and keys, the values are on their way, and the other way
// round; two blocks share a multiprocessor and fill each other's gaps. Queries are read from shared memory again and again,
// because registers hold sums and scores of two tiles of 16 rows: each fragment of keys and values serves both.
#include "attention.cuh"

// The host computes the same: ops/attention/cuda.rs.
template <int D> struct PrefillShape {
  static constexpr int WARPS = 4;
  static constexpr int TILES = D <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int ROWS = WARPS * TILES * 16;
  static constexpr int KEYS = 64;
};

// The rows `first_row ..` of a sequence's queries to shared memory, row `r` being head `r % group` of token `r / group`.
template <class T, class KV, int D>
__device__ __forceinline__ void stage_queries(unsigned char* to, const T* query, size_t stride, int group, int first_row,
                                              int num_rows) {
  using C = typename Compute<KV>::Type;
  using Shape = PrefillShape<D>;
  constexpr int CHUNKS = D / 8;
  for (int i = threadIdx.x; i < Shape::ROWS * CHUNKS; i += Shape::WARPS * WARP) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    Pack<T, 8> eight{};
    if (row < num_rows) {
      const int token = (first_row + row) / group, head = (first_row + row) % group;
      eight = load_pack<T, 8>(query + token * stride + head * D + chunk * 8);
    }
    if constexpr (sizeof(KV) == 2) {
      store_pack(reinterpret_cast<T*>(to + swizzled<CHUNKS>(row, chunk)), eight);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int at = element<KV>(chunk % 2 * 8 + e);
        C* place = reinterpret_cast<C*>(to + swizzled<CHUNKS>(row, chunk / 2 * 2 + at / 8));
        place[at % 8] = as_operand<C>(eight.at[e]);
      }
    }
  }
}

// KEYS positions of keys, or of values, to shared memory. `pages`: of the positions, PAGE each. `seen`: whether a row of a
// page is wanted; the others become zeros.
template <class KV, int D, int KEYS, int THREADS, class Seen>
__device__ __forceinline__ void request_rows(unsigned char* to, const KV* cache, const uint32_t (&pages)[KEYS / PAGE],
                                             uint32_t kv_heads, int kv_head, const Seen& seen) {
  constexpr int CHUNKS = Rows<KV, D>::CHUNKS, PER_PAGE = PAGE * CHUNKS, ROWS_AT_ONCE = THREADS / CHUNKS;
#pragma unroll
  for (int page = 0; page < KEYS / PAGE; ++page) {
    const KV* from = cache + (static_cast<size_t>(pages[page]) * kv_heads + kv_head) * PAGE * D;
    if constexpr (THREADS % CHUNKS == 0 && ROWS_AT_ONCE % 8 == 0) {
      // All rows of a thread are permuted in the same way.
      const int row = threadIdx.x / CHUNKS, place = swizzled<CHUNKS>(row, threadIdx.x % CHUNKS);
#pragma unroll
      for (int first = 0; first < PAGE; first += ROWS_AT_ONCE) {
        if (ROWS_AT_ONCE <= PAGE || row < PAGE) {
          copy_async_16(to + place + (page * PAGE + first) * Rows<KV, D>::BYTES,
                        from + threadIdx.x * Rows<KV, D>::CHUNK + first * D, seen(page * PAGE + first + row));
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < (PER_PAGE + THREADS - 1) / THREADS; ++c) {
        const int chunk = c * THREADS + threadIdx.x, row = page * PAGE + chunk / CHUNKS;
        if (PER_PAGE % THREADS == 0 || chunk < PER_PAGE) {
          copy_async_16(to + swizzled<CHUNKS>(row, chunk % CHUNKS), from + chunk * Rows<KV, D>::CHUNK, seen(row));
        }
      }
    }
  }
}

// The positions from `first` on. Those outside `begin .. end` become zeros: what lies there may be NaN, and a weight of 0
// would not hide it.
template <class KV, int D, int KEYS, int THREADS>
__device__ __forceinline__ void request_tile(unsigned char* to, const KV* cache, const uint32_t (&pages)[KEYS / PAGE],
                                             uint32_t kv_heads, int kv_head, int first, int begin, int end) {
  if (first >= begin && first + KEYS <= end) {
    request_rows<KV, D, KEYS, THREADS>(to, cache, pages, kv_heads, kv_head, [](int) { return true; });
  } else {
    request_rows<KV, D, KEYS, THREADS>(to, cache, pages, kv_heads, kv_head,
                                       [=](int row) { return first + row >= begin && first + row < end; });
  }
}

template <class T, class KV, int D>
__device__ __forceinline__ void prefill(const T* query, size_t query_stride, const KV* keys, const KV* values,
                                        const uint32_t* query_starts, const uint32_t* kv_lens, const BlockTables& tables,
                                        uint32_t num_blocks, uint32_t group, uint32_t first_sequence, uint32_t num_rows,
                                        const Scoring& scoring, T* out, size_t out_stride) {
  using Shape = PrefillShape<D>;
  using C = typename Compute<KV>::Type;
  constexpr int TILES = Shape::TILES, ROWS = Shape::ROWS, KEYS = Shape::KEYS, THREADS = Shape::WARPS * WARP;
  constexpr int GROUP = Compute<KV>::GROUP;
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* query_tile = shared;
  unsigned char* key_tile = query_tile + ROWS * D * 2;
  unsigned char* value_tile = key_tile + KEYS * Rows<KV, D>::BYTES;

  const int kv_head = blockIdx.x, kv_heads = gridDim.x, sequence = first_sequence + blockIdx.y;
  const int first_token = min(query_starts[sequence], num_rows);
  const int num_tokens = static_cast<int>(min(query_starts[sequence + 1], num_rows)) - first_token;
  const int all_rows = num_tokens * group;
  // The last rows see the most keys, so they come first.
  const int tile = (all_rows + ROWS - 1) / ROWS - 1 - static_cast<int>(blockIdx.z);
  if (tile < 0) return;
  const int first_row = tile * ROWS, end_row = min(first_row + ROWS, all_rows);
  const int before = static_cast<int>(min(kv_lens[sequence], tables.columns * PAGE)) - num_tokens;  // the position of the first token
  const auto position = [&](int row) { return before + row / static_cast<int>(group); };

  const int begin = scoring.first_visible(position(first_row)), end = position(end_row - 1) + 1;
  const int first_tile = begin / KEYS, end_tile = (end + KEYS - 1) / KEYS;
  const uint32_t* table = tables.of(sequence);
  const auto load_pages = [&](uint32_t(&pages)[KEYS / PAGE], int tile) {
#pragma unroll
    for (int page = 0; page < KEYS / PAGE; ++page) {
      const int index = tile * (KEYS / PAGE) + page;
      pages[page] = index * PAGE < end ? min(table[index], num_blocks - 1) : 0u;
    }
  };
  uint32_t pages[KEYS / PAGE];
  load_pages(pages, first_tile);
  if (first_tile < end_tile) {
    request_tile<KV, D, KEYS, THREADS>(key_tile, keys, pages, kv_heads, kv_head, first_tile * KEYS, begin, end);
  }
  copy_async_commit();
  const int first_head = kv_head * group;
  stage_queries<T, KV, D>(query_tile, query + first_token * query_stride + first_head * D, query_stride, group, first_row,
                          end_row - first_row);

  // The rows of this warp, and those of this lane; rows behind the last see what the last sees.
  const int warp_row = first_row + warp_id() * TILES * 16;
  const bool is_idle = warp_row >= end_row;
  const int warp_first = position(min(warp_row, end_row - 1));
  const int warp_last = position(min(warp_row + TILES * 16, end_row) - 1);
  const auto row_of = [&](int t, int half) { return min(warp_row + t * 16 + lane_id() / 4 + 8 * half, end_row - 1); };

  Softmax softmax[TILES];
  float sums[TILES][D / 8][4] = {};
  for (int i = first_tile; i < end_tile; ++i) {
    const int first_key = i * KEYS;
    const bool is_seen = !is_idle && first_key <= warp_last && first_key + KEYS > scoring.first_visible(warp_first);
    copy_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody needs the values before these any more
    request_tile<KV, D, KEYS, THREADS>(value_tile, values, pages, kv_heads, kv_head, first_key, begin, end);
    copy_async_commit();
    load_pages(pages, i + 1);

    float s[TILES][KEYS / 8][4] = {};
    if (is_seen) {
#pragma unroll 2  // more only moves loads up, for which there are no registers
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          const int row = (warp_id() * TILES + t) * 16 + lane_id() % 16;
          ldmatrix_x4(a[t], query_tile + swizzled<D / 8>(row, 2 * step + lane_id() / 16));
        }
#pragma unroll
        for (int first = 0; first < KEYS; first += GROUP) {
          uint32_t b[GROUP / 8][2];
          key_fragments<KV, D>(b, key_tile, first, step);
#pragma unroll
          for (int n = 0; n < GROUP / 8; ++n) {
#pragma unroll
            for (int t = 0; t < TILES; ++t) mma_m16n8k16(s[t][first / 8 + n], a[t], b[n], C());
          }
        }
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // the values are there, and nobody needs the keys any more
    if (i + 1 < end_tile) {
      request_tile<KV, D, KEYS, THREADS>(key_tile, keys, pages, kv_heads, kv_head, first_key + KEYS, begin, end);
    }
    copy_async_commit();
    if (!is_seen) continue;

    const bool all_seen = first_key + KEYS - 1 <= warp_first && first_key >= scoring.first_visible(warp_last);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      // Only few tiles ask for positions: they would take registers that sums need.
      float slopes[2] = {};
      int own[2] = {};
      if (!all_seen || scoring.slopes != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          own[half] = position(row_of(t, half));
          slopes[half] = scoring.slope(first_head + row_of(t, half) % group);
        }
      }
      const float scale = finish_scores(s[t], scoring, Compute<KV>::UNSCALE, slopes, first_key, own);
      if (!all_seen) hide(s[t], scoring, first_key, own);
      float correction[2];
      softmax[t].weigh(s[t], scale, correction);
      correct(sums[t], correction);
    }
#pragma unroll
    for (int first = 0; first < KEYS; first += GROUP) {
      uint32_t a[TILES][GROUP / 16][4];
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int k = 0; k < GROUP / 16; ++k) weight_fragment<C>(a[t][k], s[t], first / 16 + k);
      }
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t b[GROUP / 16][2][2];
        value_fragments<KV, D>(b, value_tile, first, step);
#pragma unroll
        for (int k = 0; k < GROUP / 16; ++k) {
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            mma_m16n8k16(sums[t][2 * step], a[t][k], b[k][0], C());
            mma_m16n8k16(sums[t][2 * step + 1], a[t][k], b[k][1], C());
          }
        }
      }
    }
  }
  copy_async_wait<0>();

#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    softmax[t].finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + t * 16 + lane_id() / 4 + 8 * half;
      if (row < end_row) {
        const int token = first_token + row / static_cast<int>(group), head = first_head + row % static_cast<int>(group);
        const float factor =
            normalizer(softmax[t].max[half], softmax[t].sum[half], scoring.sinks, head, Compute<KV>::UNSCALE);
        T* to = out + token * out_stride + head * D;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          float four[2][2];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) four[n][e] = sums[t][2 * step + n][2 * half + e] * factor;
          }
          if constexpr (sizeof(KV) == 2) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              store_pack(to + column<KV>(step, n, 0), Pack<T, 2>{{from_float<T>(four[n][0]), from_float<T>(four[n][1])}});
            }
          } else {
            store_pack(to + column<KV>(step, 0, 0), Pack<T, 4>{{from_float<T>(four[0][0]), from_float<T>(four[1][0]),
                                                                from_float<T>(four[0][1]), from_float<T>(four[1][1])}});
          }
        }
      }
    }
  }
}

// Grid: kv heads, sequences from `first_sequence` on, tiles of rows of the longest.
// query, out: [num_rows][kv_heads * group * D]; query_starts: [all sequences + 1]; kv_lens: [all sequences]; block_tables:
// [num_tables][max_blocks], of the ids of `num_blocks` blocks; table_rows: [all sequences], or null (rows, lengths and ids
// beyond are taken for the last, so that no wrong one leaves the memory).
#define PREFILL(T, KV, D)                                                                                                      \
  KERNEL(attention_prefill_##D##_##T##_##KV, PrefillShape<D>::WARPS* WARP)                                                     \
  (const T* query, uint64_t query_stride, const KV* keys, const KV* values, const uint32_t* query_starts,                      \
   const uint32_t* kv_lens, const uint32_t* block_tables, uint32_t max_blocks, const uint32_t* table_rows,                     \
   uint32_t num_tables, uint32_t num_blocks, uint32_t group, uint32_t first_sequence, uint32_t num_rows, float scale,          \
   uint32_t window, float soft_cap, const float* slopes, const float* sinks, T* out, uint64_t out_stride) {                    \
    const Scoring scoring{scale, static_cast<int>(window), soft_cap, slopes, sinks};                                           \
    const BlockTables tables{block_tables, table_rows, max_blocks, num_tables};                                                \
    prefill<T, KV, D>(query, query_stride, keys, values, query_starts, kv_lens, tables, num_blocks, group, first_sequence,     \
                      num_rows, scoring, out, out_stride);                                                                     \
  }                                                                                                                            \
  EXPORT(attention_prefill_##D##_##T##_##KV)
#define PREFILL_TYPES(D) PREFILL(bf16, bf16, D) PREFILL(bf16, f8, D) PREFILL(f16, f16, D) PREFILL(f16, f8, D)
PREFILL_TYPES(64)
PREFILL_TYPES(80)
PREFILL_TYPES(96)
PREFILL_TYPES(128)
PREFILL_TYPES(256)
