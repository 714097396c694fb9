// Attention of one query row per sequence over paged keys and values, cut along the keys (Dao et al. 2023, "Flash-Decoding").
//
// A block has one kv head of one sequence, up to 16 of its query heads as the rows of a tile (tensor cores have time for
// empty rows: what is waited for is memory), and one split of the positions. Its warps take units of positions in turn, each
// with a ring of its own in shared memory, so that nothing but the end is a barrier for the block. The splits of a row are
// put together by the block that ends last; which positions are a split is read from the length on the device, so that one
// recorded launch serves every length.
//
// What must be in flight to keep HBM3e (4.8 TB/s) busy for its ~0.8 us of loaded latency is 29 KB for each of 132
// multiprocessors: two blocks each with 4 warps x 2 units x 8 KB are 128 KB.
#include "attention.cuh"

constexpr int MAX_SPLITS = 64;

// The host computes the same: ops/attention/cuda.rs.
template <class KV, int D> struct DecodeShape {
  static constexpr int UNIT = sizeof(KV) == 1 || D <= 64 ? 32 : 16;  // positions
  static constexpr int HALF = UNIT * Rows<KV, D>::BYTES;             // bytes of its keys, and of its values
  static constexpr int STAGES = 2 * HALF <= 6144 ? 4 : 3;
  static constexpr int WARPS = 2 * HALF > 8192 ? 2 : 4;
};

// The query heads of a block as left operands; rows behind `num_rows` are zeros.
template <class T, class KV, int D>
__device__ __forceinline__ void load_queries(uint32_t (&a)[D / 16][4], const T* query, int num_rows) {
  using C = typename Compute<KV>::Type;
  const int quad = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_id() / 4 + 8 * half;
    const T* from = query + row * D;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      a[step][half] = a[step][half + 2] = 0;
      if (row < num_rows) {
        if constexpr (sizeof(KV) == 2) {
          a[step][half] = *reinterpret_cast<const uint32_t*>(from + 16 * step + 2 * quad);
          a[step][half + 2] = *reinterpret_cast<const uint32_t*>(from + 16 * step + 8 + 2 * quad);
        } else {
          const Pack<T, 4> four = load_pack<T, 4>(from + 16 * step + 4 * quad);
          const Pack<C, 2> even{{as_operand<C>(four.at[0]), as_operand<C>(four.at[2])}};
          const Pack<C, 2> odd{{as_operand<C>(four.at[1]), as_operand<C>(four.at[3])}};
          a[step][half] = *reinterpret_cast<const uint32_t*>(&even);
          a[step][half + 2] = *reinterpret_cast<const uint32_t*>(&odd);
        }
      }
    }
  }
}

// What one warp knows of its units.
template <class KV, int D> struct DecodeState {
  using C = typename Compute<KV>::Type;
  Softmax softmax;
  float sums[D / 8][4] = {};

  // Adds a unit that begins at `first_key`; keys outside `begin .. end` are not seen.
  __device__ __forceinline__ void add(const unsigned char* keys, const uint32_t (&queries)[D / 16][4], const Scoring& scoring,
                                      const float (&slopes)[2], int first_key, int begin, int end) {
    constexpr int UNIT = DecodeShape<KV, D>::UNIT;
    constexpr int GROUP = Compute<KV>::GROUP;
    float s[UNIT / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int first = 0; first < UNIT; first += GROUP) {
        uint32_t b[GROUP / 8][2];
        key_fragments<KV, D>(b, keys, first, step);
#pragma unroll
        for (int n = 0; n < GROUP / 8; ++n) mma_m16n8k16(s[first / 8 + n], queries[step], b[n], C());
      }
    }
    const int own[2] = {end - 1, end - 1};
    const float scale = finish_scores(s, scoring, Compute<KV>::UNSCALE, slopes, first_key, own);
    if (first_key < begin || first_key + UNIT > end) hide(s, scoring, first_key, own);
    float correction[2];
    softmax.weigh(s, scale, correction);
    correct(sums, correction);
    const unsigned char* values = keys + DecodeShape<KV, D>::HALF;
#pragma unroll
    for (int first = 0; first < UNIT; first += GROUP) {
      uint32_t a[GROUP / 16][4];
#pragma unroll
      for (int k = 0; k < GROUP / 16; ++k) weight_fragment<C>(a[k], s, first / 16 + k);
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t b[GROUP / 16][2][2];
        value_fragments<KV, D>(b, values, first, step);
#pragma unroll
        for (int k = 0; k < GROUP / 16; ++k) {
          mma_m16n8k16(sums[2 * step], a[k], b[k][0], C());
          mma_m16n8k16(sums[2 * step + 1], a[k], b[k][1], C());
        }
      }
    }
  }

  // To shared memory: `to` is `[16][D + 8]`, the sums relative to the maximum of each row.
  __device__ __forceinline__ void store(float* to, float* maxima, float* totals) {
    softmax.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_id() / 4 + 8 * half;
      if (lane_id() % 4 == 0) {
        maxima[row] = softmax.max[half];
        totals[row] = softmax.sum[half];
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) to[row * (D + 8) + column<KV>(n / 2, n % 2, e)] = sums[n][2 * half + e];
      }
    }
  }
};

// Where the splits of the rows of a block are kept until all are done: `[rows of the launch][splits]` of D sums, and behind
// them as many maxima and totals.
template <int D> struct Partials {
  float* sums;
  float* maxima;
  int num_splits;

  __device__ __forceinline__ Partials(float* memory, size_t num_rows, int num_splits)
      : sums(memory), maxima(memory + num_rows * num_splits * D), num_splits(num_splits) {}
  __device__ __forceinline__ float* sums_of(size_t row, int split) const { return sums + (row * num_splits + split) * D; }
  __device__ __forceinline__ float* max_and_total_of(size_t row, int split) const {
    return maxima + (row * num_splits + split) * 2;
  }
};

template <class T> __device__ __forceinline__ void store_four(T* to, const float (&sums)[4], float factor) {
  Pack<T, 4> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = from_float<T>(sums[i] * factor);
  store_pack(to, four);
}

// All splits of the rows of a block, in their order, to the output. `weights`: shared, `[16][MAX_SPLITS]`.
template <class T, int D, int WARPS>
__device__ __forceinline__ void merge_splits(const Partials<D>& partials, size_t first_row, int num_rows, int num_active,
                                             const float* sinks, int first_head, float unscale, float* weights,
                                             float* normalizers, T* out) {
  for (int row = warp_id(); row < num_rows; row += WARPS) {
    float greatest = -INFINITY;
    for (int split = lane_id(); split < num_active; split += WARP) {
      greatest = fmaxf(greatest, partials.max_and_total_of(first_row + row, split)[0]);
    }
    greatest = warp_max(greatest);
    float total = 0.0f;
    for (int split = lane_id(); split < num_active; split += WARP) {
      const float* from = partials.max_and_total_of(first_row + row, split);
      const float weight = weight_of(from[0], greatest);
      weights[row * MAX_SPLITS + split] = weight;
      total += weight * from[1];
    }
    total = warp_sum(total);
    if (lane_id() == 0) normalizers[row] = normalizer(greatest, total, sinks, first_head + row, unscale);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_rows * (D / 4); i += WARPS * WARP) {
    const int row = i / (D / 4), at = i % (D / 4) * 4;
    float sums[4] = {};
#pragma unroll 8
    for (int split = 0; split < num_active; ++split) {
      const Pack<float, 4> four = load_pack<float, 4>(partials.sums_of(first_row + row, split) + at);
      const float weight = weights[row * MAX_SPLITS + split];
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = fmaf(weight, four.at[e], sums[e]);
    }
    store_four(out + row * D + at, sums, normalizers[row]);
  }
}

template <class T, class KV, int D>
__device__ __forceinline__ void decode(const T* query, size_t query_stride, const KV* keys, const KV* values,
                                       const uint32_t* kv_lens, const BlockTables& tables, uint32_t num_blocks,
                                       uint32_t kv_heads, uint32_t group, const Scoring& scoring, uint32_t min_positions,
                                       float* partial_memory, uint32_t* done, T* out, size_t out_stride) {
  using Shape = DecodeShape<KV, D>;
  constexpr int UNIT = Shape::UNIT, STAGES = Shape::STAGES, WARPS = Shape::WARPS, CHUNKS = Rows<KV, D>::CHUNKS;
  static_assert(WARPS * 16 * (D + 8) * 4 <= WARPS * STAGES * 2 * Shape::HALF && 16 * MAX_SPLITS * 4 <= STAGES * 2 * Shape::HALF,
                "what is merged has room in the rings");
  DYNAMIC_SHARED(unsigned char, rings);
  __shared__ float maxima[WARPS][16], totals[WARPS][16], normalizers[16];
  __shared__ bool is_last;

  const int parts = (group + 15) / 16;  // of the query heads of a kv head
  const int kv_head = blockIdx.x / parts, part = blockIdx.x % parts;
  const int first_head = kv_head * group + part * 16, num_rows = min(16, static_cast<int>(group) - part * 16);
  const int split = blockIdx.y, num_splits = gridDim.y, sequence = blockIdx.z;

  const int end = min(kv_lens[sequence], tables.columns * PAGE);
  const int begin = scoring.first_visible(end - 1);
  const int first_unit = begin / UNIT, num_units = (end + UNIT - 1) / UNIT - first_unit;
  const int least = max((num_units + num_splits - 1) / num_splits, static_cast<int>(min_positions) / UNIT);
  const int units_per_split = max((least + WARPS - 1) / WARPS, 1) * WARPS;
  const int num_active = max((num_units + units_per_split - 1) / units_per_split, 1);
  if (split >= num_active) return;

  // The units of this warp: `unit(0 .. mine)`.
  const int warp = warp_id(), lane = lane_id();
  const int in_split = min(num_units - split * units_per_split, units_per_split);
  const int mine = max((in_split - warp + WARPS - 1) / WARPS, 0);
  const auto unit = [&](int i) { return first_unit + split * units_per_split + warp + WARPS * i; };
  const uint32_t* table = tables.of(sequence);
  const auto page = [&](int i) { return i < mine ? min(table[unit(i) * UNIT / PAGE], num_blocks - 1) : 0u; };
  unsigned char* ring = rings + warp * STAGES * 2 * Shape::HALF;
  // Positions that are not seen are zeros: their weights are 0, but what lies in memory may be NaN.
  const auto request = [&](int i, uint32_t page_id) {
    const int first = unit(i) * UNIT;
    const size_t from = ((static_cast<size_t>(page_id) * kv_heads + kv_head) * PAGE + first % PAGE) * D;
    unsigned char* to = ring + i % STAGES * 2 * Shape::HALF;
#pragma unroll
    for (int c = 0; c < UNIT * CHUNKS / WARP; ++c) {
      const int chunk = c * WARP + lane, row = chunk / CHUNKS;
      const bool seen = first + row >= begin && first + row < end;
      const int place = swizzled<CHUNKS>(row, chunk % CHUNKS);
      copy_async_16(to + place, keys + from + chunk * Rows<KV, D>::CHUNK, seen);
      copy_async_16(to + Shape::HALF + place, values + from + chunk * Rows<KV, D>::CHUNK, seen);
    }
  };

  uint32_t next_page;
  {
    uint32_t pages[STAGES];
#pragma unroll
    for (int i = 0; i < STAGES; ++i) pages[i] = page(i);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
      if (i < mine) request(i, pages[i]);
      copy_async_commit();
    }
    next_page = pages[STAGES - 1];
  }
  uint32_t queries[D / 16][4];
  load_queries<T, KV, D>(queries, query + sequence * query_stride + first_head * D, num_rows);
  float slopes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    slopes[half] = row < num_rows ? scoring.slope(first_head + row) : 0.0f;
  }

  DecodeState<KV, D> state;
  for (int i = 0; i < mine; ++i) {
    copy_async_wait<STAGES - 2>();
    __syncwarp();
    if (i + STAGES - 1 < mine) request(i + STAGES - 1, next_page);
    copy_async_commit();
    next_page = page(i + STAGES);
    state.add(ring + i % STAGES * 2 * Shape::HALF, queries, scoring, slopes, unit(i) * UNIT, begin, end);
  }
  copy_async_wait<0>();
  __syncthreads();

  // The warps of the block.
  float* sums_of_warps = reinterpret_cast<float*>(rings);
  state.store(sums_of_warps + warp * 16 * (D + 8), maxima[warp], totals[warp]);
  __syncthreads();
  const Partials<D> partials(partial_memory, static_cast<size_t>(gridDim.z) * kv_heads * group, num_splits);
  const size_t first_row = static_cast<size_t>(sequence) * kv_heads * group + first_head;
  T* out_rows = out + sequence * out_stride + first_head * D;
  for (int i = threadIdx.x; i < num_rows * (D / 4); i += WARPS * WARP) {
    const int row = i / (D / 4), at = i % (D / 4) * 4;
    float greatest = -INFINITY, total = 0.0f, sums[4] = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) greatest = fmaxf(greatest, maxima[w][row]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = weight_of(maxima[w][row], greatest);
      total = fmaf(weight, totals[w][row], total);
      const Pack<float, 4> four = load_pack<float, 4>(sums_of_warps + (w * 16 + row) * (D + 8) + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = fmaf(weight, four.at[e], sums[e]);
    }
    if (num_active == 1) {
      store_four(out_rows + row * D + at, sums,
                 normalizer(greatest, total, scoring.sinks, first_head + row, Compute<KV>::UNSCALE));
    } else {
      store_pack(partials.sums_of(first_row + row, split) + at, Pack<float, 4>{{sums[0], sums[1], sums[2], sums[3]}});
      if (at == 0) store_pack(partials.max_and_total_of(first_row + row, split), Pack<float, 2>{{greatest, total}});
    }
  }
  if (num_active == 1) return;

  // The splits of the rows, by whoever is last: each release what it wrote, the last acquires it.
  __threadfence();
  __syncthreads();
  uint32_t* done_here = done + sequence * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) is_last = atomicAdd(done_here, 1u) == static_cast<uint32_t>(num_active - 1);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *done_here = 0;  // for the next launch
  merge_splits<T, D, WARPS>(partials, first_row, num_rows, num_active, scoring.sinks, first_head, Compute<KV>::UNSCALE,
                            sums_of_warps, normalizers, out_rows);
}

// Grid: kv heads x parts of 16 query heads, splits, sequences.
// query, out: [sequences][kv_heads * group * D]; kv_lens: [sequences]; block_tables: [num_tables][max_blocks], of the ids of
// `num_blocks` blocks; table_rows: [sequences], or null (rows, lengths and ids beyond are taken for the last, so that no wrong
// one leaves the memory); a split has at least `min_positions`; partials: [sequences][heads][splits][D + 2]; done:
// [sequences][grid.x], 0 before and after.
#define DECODE(T, KV, D)                                                                                                       \
  KERNEL(attention_decode_##D##_##T##_##KV, DecodeShape<KV COMMA D>::WARPS* WARP)                                              \
  (const T* query, uint64_t query_stride, const KV* keys, const KV* values, const uint32_t* kv_lens,                           \
   const uint32_t* block_tables, uint32_t max_blocks, const uint32_t* table_rows, uint32_t num_tables, uint32_t num_blocks,    \
   uint32_t kv_heads, uint32_t group, float scale, uint32_t window, float soft_cap, const float* slopes, const float* sinks,   \
   uint32_t min_positions, float* partials, uint32_t* done, T* out, uint64_t out_stride) {                                     \
    const Scoring scoring{scale, static_cast<int>(window), soft_cap, slopes, sinks};                                           \
    const BlockTables tables{block_tables, table_rows, max_blocks, num_tables};                                                \
    decode<T, KV, D>(query, query_stride, keys, values, kv_lens, tables, num_blocks, kv_heads, group, scoring, min_positions,  \
                     partials, done, out, out_stride);                                                                         \
  }                                                                                                                            \
  EXPORT(attention_decode_##D##_##T##_##KV)
#define COMMA ,
#define DECODE_TYPES(D) DECODE(bf16, bf16, D) DECODE(bf16, f8, D) DECODE(f16, f16, D) DECODE(f16, f8, D)
DECODE_TYPES(64)
DECODE_TYPES(80)
DECODE_TYPES(96)
DECODE_TYPES(128)
DECODE_TYPES(256)
