// Attention of one query row per sequence over paged keys and values, cut along the keys (Dao et al. 2023, "Flash-Decoding").
//
// An item of work is one kv head of one sequence, up to 16 of its query heads as the rows of a tile (tensor cores have time
// for empty rows: what is waited for is memory), and one split of the positions. The warps of a block take units of positions
// in turn, each with a ring of its own in shared memory, so that nothing but the end of an item is a barrier for the block. The
// splits of a row are put together by the block that ends last.
//
// A launch has as many blocks as the device runs at once, which take items until none is left. Which items there are each
// block finds from the lengths in device memory (`Division`), so that one recorded launch serves every length.
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

// A kv head of a sequence, or 16 of its query heads, over one split of the positions.
struct Item {
  uint32_t sequence, head;
  uint32_t split, num_splits;  // num_splits 0: there is no such item
  uint32_t first_item;         // number of the sequence's first
};

// The query heads of an item.
struct QueryHeads {
  int first, num;

  __device__ __forceinline__ QueryHeads(int head, int parts, int group)
      : first(head / parts * group + head % parts * 16), num(min(16, group - head % parts * 16)) {}
};

// How a launch is divided into items. Blocks agree without a word, since what each finds depends on the lengths only.
//
// A chunk is what the warps of a block take in one turn, and all sequences are cut into pieces of about the same number of
// chunks. If there are no more pieces than the device runs in some number of turns, all take at most so many times what one
// takes; and, since blocks take them whenever they are free, at most an even part of all work and one piece. The number of
// turns is that for which the smaller of the two is least: short pieces end more evenly, but each costs what fills a ring, and
// what ends an item.
//
// Sequences without tokens, which only fill a batch up, have no part in this: with them the others are cut as without.
template <class KV, int D> struct Division {
  using Shape = DecodeShape<KV, D>;
  static constexpr int CHUNK = Shape::WARPS * Shape::UNIT;  // positions
  static constexpr int TURNS = 16;                          // that are compared; the host computes with the same
  // Less does not outweigh the merging of a piece.
  static constexpr uint32_t LEAST = CHUNK < 128 ? 128 / CHUNK : 1;
  // Chunks in whose time an item begins and ends: 2 us, in which a block that has half of a multiprocessor gets 32 KB.
  static constexpr uint32_t START = 32768 / (Shape::WARPS * 2 * Shape::HALF) > 1 ? 32768 / (Shape::WARPS * 2 * Shape::HALF) : 1;

  // What one warp finds for all of its block.
  struct Shared {
    uint32_t ends[WARP];  // pieces of the sequences up to and with those that this lane counts
    uint32_t piece;       // chunks
  };

  const uint32_t* kv_lens;
  uint32_t num_sequences, heads, max_positions;
  int window;
  Shared& shared;

  __device__ __forceinline__ int end_of(uint32_t sequence) const { return min(kv_lens[sequence], max_positions); }
  __device__ __forceinline__ int begin_of(int end) const { return window > 0 ? max(end - window, 0) : 0; }
  __device__ __forceinline__ static int units_of(int begin, int end) {
    return (end + Shape::UNIT - 1) / Shape::UNIT - begin / Shape::UNIT;
  }
  __device__ __forceinline__ uint32_t chunks_of(uint32_t sequence) const {
    const int end = end_of(sequence);
    return (units_of(begin_of(end), end) + Shape::WARPS - 1) / Shape::WARPS;
  }
  __device__ __forceinline__ static uint32_t pieces_of(uint32_t chunks, uint32_t piece) {
    return max((chunks + piece - 1) / piece, 1u);
  }
  // Sequences that a lane counts.
  __device__ __forceinline__ uint32_t each() const { return (num_sequences + WARP - 1) / WARP; }
  __device__ __forceinline__ uint32_t num_items() const { return shared.ends[WARP - 1] * heads; }

  // By one warp, for a device that runs `at_once` blocks.
  __device__ __forceinline__ void find(uint32_t at_once) const {
    const uint32_t first = min(lane_id() * each(), num_sequences), last = min(first + each(), num_sequences);
    uint64_t total = 0;
    uint32_t longest = 0, num_rows = 0;
#pragma unroll 4
    for (uint32_t sequence = first; sequence < last; ++sequence) {
      const uint32_t chunks = chunks_of(sequence);
      total += chunks, longest = max(longest, chunks), num_rows += chunks > 0;
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(ALL_LANES, total, offset);
      longest = max(longest, __shfl_xor_sync(ALL_LANES, longest, offset));
      num_rows += __shfl_xor_sync(ALL_LANES, num_rows, offset);
    }

    // Each lane looks at one number of turns, and at the shortest pieces of which there are surely no more than blocks in so
    // many turns: n chunks in pieces of m are at most (n - 1) / m + 1, and no row has more of them than the longest.
    const uint32_t num_least = max(heads * num_rows, 1u), turns = (num_least + at_once - 1) / at_once + lane_id();
    const uint32_t each_row = turns * at_once / num_least, room = turns * at_once - num_least;
    uint64_t shortest = (longest + each_row - 1) / each_row;
    if (room > 0) shortest = min(shortest, (heads * (total - num_rows) + room - 1) / room);
    const uint32_t own = max(max(static_cast<uint32_t>(shortest), LEAST), (longest + MAX_SPLITS - 1) / MAX_SPLITS);
    const float even = static_cast<float>(heads * total) / at_once, starts = turns * START;
    const float time = lane_id() < TURNS ? fminf(static_cast<float>(turns) * own + starts, even + own + starts) : INFINITY;
    const unsigned best = __ballot_sync(ALL_LANES, time == -warp_max(-time));
    const uint32_t piece = __shfl_sync(ALL_LANES, own, __ffs(best) - 1);

    uint32_t pieces = 0;
#pragma unroll 4
    for (uint32_t sequence = first; sequence < last; ++sequence) pieces += pieces_of(chunks_of(sequence), piece);
    shared.ends[lane_id()] = sum_up_to(pieces);
    shared.piece = piece;
    __syncwarp();
  }

  // The item of this number, by one warp.
  __device__ __forceinline__ void find_item(uint32_t number, Item& to) const {
    const uint32_t piece = number / heads;
    const int lane = __popc(__ballot_sync(ALL_LANES, shared.ends[lane_id()] <= piece));
    if (lane == WARP) {
      if (lane_id() == 0) to.num_splits = 0;
      return;
    }
    uint32_t before = lane > 0 ? shared.ends[lane - 1] : 0;
    for (uint32_t first = lane * each();; first += WARP) {
      const uint32_t sequence = first + lane_id();
      const uint32_t own = sequence < num_sequences ? pieces_of(chunks_of(sequence), shared.piece) : 0;
      const uint32_t end = before + sum_up_to(own), begin = end - own;
      if (begin <= piece && piece < end) to = Item{sequence, number % heads, piece - begin, own, begin * heads};
      if (__any_sync(ALL_LANES, piece < end)) return;
      before = __shfl_sync(ALL_LANES, end, WARP - 1);
    }
  }

 private:
  // Of the lanes up to this one.
  __device__ __forceinline__ static uint32_t sum_up_to(uint32_t x) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
      const uint32_t other = __shfl_up_sync(ALL_LANES, x, offset);
      if (lane_id() >= offset) x += other;
    }
    return x;
  }
};

// Where the splits of the rows of an item are kept until all are done: for each item `num_rows` times D sums, and behind them
// their maxima and totals.
template <int D> struct Partials {
  float* memory;
  size_t stride;  // from split to split
  int num_rows;

  __device__ __forceinline__ Partials(float* memory, const Item& item, uint32_t heads, int num_rows)
      : memory(memory + static_cast<size_t>(item.first_item + item.head) * size(num_rows)),
        stride(static_cast<size_t>(heads) * size(num_rows)),
        num_rows(num_rows) {}
  __device__ __forceinline__ float* sums_of(int row, int split) const { return memory + split * stride + row * D; }
  __device__ __forceinline__ float* max_and_total_of(int row, int split) const {
    return memory + split * stride + num_rows * D + row * 2;
  }
  __device__ __forceinline__ static int size(int num_rows) { return num_rows * D + 2 * 16; }
};

template <class T> __device__ __forceinline__ void store_four(T* to, const float (&sums)[4], float factor) {
  Pack<T, 4> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = from_float<T>(sums[i] * factor);
  store_pack(to, four);
}

// All splits of the rows of an item, in their order, to the output. `weights`: shared, `[16][MAX_SPLITS]`.
template <class T, int D, int WARPS>
__device__ __forceinline__ void merge_splits(const Partials<D>& partials, int num_rows, int num_splits, const float* sinks,
                                             int first_head, float unscale, float* weights, float* normalizers, T* out) {
  for (int row = warp_id(); row < num_rows; row += WARPS) {
    float greatest = -INFINITY;
    for (int split = lane_id(); split < num_splits; split += WARP) {
      greatest = fmaxf(greatest, partials.max_and_total_of(row, split)[0]);
    }
    greatest = warp_max(greatest);
    float total = 0.0f;
    for (int split = lane_id(); split < num_splits; split += WARP) {
      const float* from = partials.max_and_total_of(row, split);
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
    for (int split = 0; split < num_splits; ++split) {
      const Pack<float, 4> four = load_pack<float, 4>(partials.sums_of(row, split) + at);
      const float weight = weights[row * MAX_SPLITS + split];
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] = fmaf(weight, four.at[e], sums[e]);
    }
    store_four(out + row * D + at, sums, normalizers[row]);
  }
}

template <class T, class KV, int D>
__device__ __forceinline__ void decode(const T* query, size_t query_stride, const KV* keys, const KV* values,
                                       const uint32_t* kv_lens, uint32_t num_sequences, const BlockTables& tables,
                                       uint32_t num_blocks, uint32_t kv_heads, uint32_t group, const Scoring& scoring,
                                       uint32_t at_once, float* partial_memory, uint32_t* counters, T* out, size_t out_stride) {
  using Shape = DecodeShape<KV, D>;
  constexpr int UNIT = Shape::UNIT, STAGES = Shape::STAGES, WARPS = Shape::WARPS, CHUNKS = Rows<KV, D>::CHUNKS;
  static_assert(WARPS * 16 * (D + 8) * 4 <= WARPS * STAGES * 2 * Shape::HALF && 16 * MAX_SPLITS * 4 <= STAGES * 2 * Shape::HALF,
                "what is merged has room in the rings");
  DYNAMIC_SHARED(unsigned char, rings);
  __shared__ float maxima[WARPS][16], totals[WARPS][16], normalizers[16];
  __shared__ typename Division<KV, D>::Shared found;
  __shared__ Item items[2];  // this one and the next
  __shared__ bool is_last;

  const int parts = (group + 15) / 16;  // of the query heads of a kv head
  const uint32_t heads = kv_heads * parts;
  const Division<KV, D> division{kv_lens, num_sequences, heads, tables.columns * PAGE, scoring.window, found};
  const int warp = warp_id(), lane = lane_id();
  if (warp == 0) {
    division.find(at_once);
    division.find_item(blockIdx.x, items[0]);
  }
  __syncthreads();

  for (int turn = 0; items[turn].num_splits != 0; turn ^= 1) {
    // The number of the next item, which is on its way while this one begins. Each item is followed by one such question, so
    // whoever asks last sets the counter to 0, for the next launch.
    uint32_t next = 0;
    if (threadIdx.x == 0) next = gridDim.x + atomicInc(counters, division.num_items() - 1);

    const int kv_head = items[turn].head / parts, sequence = items[turn].sequence;
    const int end = division.end_of(sequence), begin = division.begin_of(end);

    // The units of this warp: `unit(0 .. mine)`.
    int first_unit = begin / UNIT + warp, mine;
    {
      const int split = items[turn].split, num_splits = items[turn].num_splits, num_units = division.units_of(begin, end);
      const int chunks = (num_units + WARPS - 1) / WARPS, units_per_split = (chunks + num_splits - 1) / num_splits * WARPS;
      const int in_split = min(num_units - split * units_per_split, units_per_split);
      mine = max((in_split - warp + WARPS - 1) / WARPS, 0);
      first_unit += split * units_per_split;
    }
    const auto unit = [&](int i) { return first_unit + WARPS * i; };
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
    float slopes[2];
    {
      const QueryHeads own(items[turn].head, parts, group);
      load_queries<T, KV, D>(queries, query + sequence * query_stride + own.first * D, own.num);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        slopes[half] = row < own.num ? scoring.slope(own.first + row) : 0.0f;
      }
    }
    // The other warps read it behind the barriers at the end of this item.
    if (warp == 0) division.find_item(__shfl_sync(ALL_LANES, next, 0), items[turn ^ 1]);

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

    // The warps of the block. What the item is, is read again: registers are scarce where warps multiply.
    float* sums_of_warps = reinterpret_cast<float*>(rings);
    state.store(sums_of_warps + warp * 16 * (D + 8), maxima[warp], totals[warp]);
    __syncthreads();
    const Item item = items[turn];
    const QueryHeads own(item.head, parts, group);
    const int first_head = own.first, num_rows = own.num, split = item.split, num_splits = item.num_splits;
    const Partials<D> partials(partial_memory, item, heads, min(16, static_cast<int>(group)));
    T* out_rows = out + item.sequence * out_stride + first_head * D;
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
      if (num_splits == 1) {
        store_four(out_rows + row * D + at, sums,
                   normalizer(greatest, total, scoring.sinks, first_head + row, Compute<KV>::UNSCALE));
      } else {
        store_pack(partials.sums_of(row, split) + at, Pack<float, 4>{{sums[0], sums[1], sums[2], sums[3]}});
        if (at == 0) store_pack(partials.max_and_total_of(row, split), Pack<float, 2>{{greatest, total}});
      }
    }

    // The splits of the rows, by whoever is last: each releases what it wrote, the last acquires it.
    if (num_splits > 1) {
      __threadfence();
      __syncthreads();
      uint32_t* done = counters + 1 + item.sequence * heads + item.head;
      if (threadIdx.x == 0) is_last = atomicInc(done, num_splits - 1) == static_cast<uint32_t>(num_splits - 1);
      __syncthreads();
      if (is_last) {
        __threadfence();
        merge_splits<T, D, WARPS>(partials, num_rows, num_splits, scoring.sinks, first_head, Compute<KV>::UNSCALE,
                                  sums_of_warps, normalizers, out_rows);
      }
    }
    __syncthreads();  // the rings are free again
  }
}

// Grid: of any size; `at_once` blocks are what the device runs at once.
// query, out: [sequences][kv_heads * group * D]; kv_lens: [sequences]; block_tables: [num_tables][max_blocks], of the ids of
// `num_blocks` blocks; table_rows: [sequences], or null (rows, lengths and ids beyond are taken for the last, so that no wrong
// one leaves the memory); partials: as `Partials`, for kv heads x parts of 16 query heads x sequences items and TURNS * at_once
// more; counters: of items, and of the splits that are done, [sequences][kv heads x parts], all 0 before and after.
#define DECODE(T, KV, D)                                                                                                       \
  KERNEL(attention_decode_##D##_##T##_##KV, DecodeShape<KV COMMA D>::WARPS* WARP)                                              \
  (const T* query, uint64_t query_stride, const KV* keys, const KV* values, const uint32_t* kv_lens, uint32_t num_sequences,   \
   const uint32_t* block_tables, uint32_t max_blocks, const uint32_t* table_rows, uint32_t num_tables, uint32_t num_blocks,    \
   uint32_t kv_heads, uint32_t group, float scale, uint32_t window, float soft_cap, const float* slopes, const float* sinks,   \
   uint32_t at_once, float* partials, uint32_t* counters, T* out, uint64_t out_stride) {                                       \
    const Scoring scoring{scale, static_cast<int>(window), soft_cap, slopes, sinks};                                           \
    const BlockTables tables{block_tables, table_rows, max_blocks, num_tables};                                                \
    decode<T, KV, D>(query, query_stride, keys, values, kv_lens, num_sequences, tables, num_blocks, kv_heads, group, scoring,  \
                     at_once, partials, counters, out, out_stride);                                                            \
  }                                                                                                                            \
  EXPORT(attention_decode_##D##_##T##_##KV)
#define COMMA ,
#define DECODE_TYPES(D) DECODE(bf16, bf16, D) DECODE(bf16, f8, D) DECODE(f16, f16, D) DECODE(f16, f8, D)
DECODE_TYPES(64)
DECODE_TYPES(80)
DECODE_TYPES(96)
DECODE_TYPES(128)
DECODE_TYPES(256)
