// From logits to tokens, each row by its own parameters. Three kernels: the first, with several blocks for each row, changes the
// logits (bias, penalties, grammar) and sums them up by chunks; the second counts pieces of a row as its first truncation asks,
// where that looks at all of it; the third, with a block for each row, truncates and chooses. One multiprocessor alone takes 5
// to 15 us to look at 128k logits, so the third looks again only at groups of logits that have candidates, and where it draws
// from many, at one piece.
#include "best.cuh"
#include "sampling.cuh"

// Four logits from `index` on, -infinity behind the vocabulary.
struct Logits {
  const float* at;
  unsigned vocab;

  __device__ __forceinline__ Pack<float, 4> four(unsigned index) const {
    if (index + 4 <= vocab && reinterpret_cast<uintptr_t>(at + index) % 16 == 0) return load_pack<float, 4>(at + index);
    Pack<float, 4> logits;
#pragma unroll
    for (int i = 0; i < 4; ++i) logits.at[i] = index + i < vocab ? at[index + i] : -INFINITY;
    return logits;
  }
};

// --- The first kernel -------------------------------------------------------------------------------------------------

constexpr unsigned SCAN_THREADS = 256;
constexpr unsigned FOURS = CHUNK / 4 / SCAN_THREADS;

struct Changes {
  const uint32_t* biases;  // pairs of token and bits of an f32
  const uint16_t* counts;  // [slots, count_stride]
  unsigned count_stride;
  const uint32_t* masks;  // [masks, mask_stride], a bit for each token
  unsigned mask_stride;
};

__device__ __forceinline__ float penalized(float logit, unsigned count, const SamplingRow& row) {
  constexpr float MOST = 3.402823466e38f;
  if (count == 0) return logit;
  if (row.repetition_penalty != 1.0f) {
    logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    // An extreme penalty must not make a logit infinite.
    logit = fminf(fmaxf(logit, -MOST), MOST);
  }
  const unsigned generated = count & MOST_GENERATED;
  return generated > 0 ? logit - (row.frequency_penalty * generated + row.presence_penalty) : logit;
}

// The logits of this thread with all changes, in the order bias, penalties, grammar.
__device__ void change(Pack<float, 4> (&logits)[FOURS], float* shared, unsigned first, unsigned vocab,
                       const SamplingRow& row, const Changes& changes) {
  if (row.num_biases > 0) {
#pragma unroll
    for (unsigned i = 0; i < FOURS; ++i) store_pack(shared + (i * SCAN_THREADS + threadIdx.x) * 4, logits[i]);
    __syncthreads();
    // No token is there twice.
    for (unsigned i = threadIdx.x; i < row.num_biases; i += SCAN_THREADS) {
      const uint32_t* bias = changes.biases + 2 * static_cast<size_t>(row.first_bias + i);
      const unsigned place = bias[0] - first;
      if (place < CHUNK && bias[0] < vocab) shared[place] += __uint_as_float(bias[1]);
    }
    __syncthreads();
#pragma unroll
    for (unsigned i = 0; i < FOURS; ++i) logits[i] = load_pack<float, 4>(shared + (i * SCAN_THREADS + threadIdx.x) * 4);
  }
  const uint16_t* counts = changes.counts + static_cast<size_t>(row.slot) * changes.count_stride;
  const uint32_t* mask = changes.masks + static_cast<size_t>(row.mask) * changes.mask_stride;
#pragma unroll
  for (unsigned i = 0; i < FOURS; ++i) {
    const unsigned index = first + (i * SCAN_THREADS + threadIdx.x) * 4;
    if (index >= vocab) continue;
    if ((row.flags & ROW_HAS_PENALTIES) != 0) {
      const Pack<uint16_t, 4> of_four = load_pack<uint16_t, 4>(counts + index);
#pragma unroll
      for (int j = 0; j < 4; ++j) logits[i].at[j] = penalized(logits[i].at[j], of_four.at[j], row);
    }
    if (row.mask != NONE) {
      const uint32_t allowed = mask[index / 32] >> (index % 32);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((allowed >> j & 1) == 0) logits[i].at[j] = -INFINITY;
      }
    }
  }
}

// The greatest of each group of the chunk.
__device__ void store_group_maxima(const Pack<float, 4> (&logits)[FOURS], float* of_chunk) {
#pragma unroll
  for (unsigned i = 0; i < FOURS; ++i) {
    float max = fmaxf(fmaxf(logits[i].at[0], logits[i].at[1]), fmaxf(logits[i].at[2], logits[i].at[3]));
    max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 1));
    max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 2));
    const unsigned four = i * SCAN_THREADS + threadIdx.x;
    if (four % (GROUP / 4) == 0) of_chunk[four / (GROUP / 4)] = max;
  }
}

// Of a warp; `changed` may be the same as `raw`.
__device__ ChunkSummary summarize(const Pack<float, 4> (&raw)[FOURS], const Pack<float, 4> (&changed)[FOURS],
                                  unsigned first) {
  float raw_max = -INFINITY, sum = 0.0f;
  bool not_finite = false;
  Best best{-INFINITY, NONE};
#pragma unroll
  for (unsigned i = 0; i < FOURS; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw_max = fmaxf(raw_max, raw[i].at[j]);
      not_finite |= isnan(raw[i].at[j]) || raw[i].at[j] == INFINITY;
      const Best candidate{changed[i].at[j], first + (i * SCAN_THREADS + threadIdx.x) * 4 + j};
      if (candidate.beats(best)) best = candidate;
    }
  }
  raw_max = warp_max(raw_max);
  if (raw_max > -INFINITY) {
#pragma unroll
    for (unsigned i = 0; i < FOURS; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += __expf(raw[i].at[j] - raw_max);
    }
  }
  sum = warp_sum(sum);
  best = warp_best(best);
  return ChunkSummary{raw_max, sum, best.value, best.index, __any_sync(ALL_LANES, not_finite) ? 1u : 0u};
}

__device__ ChunkSummary joined(const ChunkSummary& a, const ChunkSummary& b) {
  ChunkSummary both = a;
  both.raw_max = fmaxf(a.raw_max, b.raw_max);
  if (both.raw_max > -INFINITY) {
    both.raw_sum = a.raw_sum * __expf(a.raw_max - both.raw_max) + b.raw_sum * __expf(b.raw_max - both.raw_max);
  }
  if (Best{b.max, b.argmax}.beats(Best{a.max, a.argmax})) {
    both.max = b.max;
    both.argmax = b.argmax;
  }
  both.not_finite = a.not_finite | b.not_finite;
  return both;
}

// Blocks: [chunks, rows]. `changed`: [rows, chunks * CHUNK], written where a row's logits are changed; the maxima of groups
// are of what is chosen from, and those of the raw logits where they differ and are asked for.
KERNEL(sampling_scan, 256)
(const float* logits, unsigned stride, unsigned vocab, const SamplingRow* rows, const uint32_t* biases,
 const uint16_t* counts, unsigned count_stride, const uint32_t* masks, unsigned mask_stride, float* changed,
 float* group_maxima, float* raw_group_maxima, ChunkSummary* summaries) {
  __shared__ float shared[CHUNK];
  __shared__ ChunkSummary of_warps[SCAN_THREADS / WARP];
  const unsigned chunk = blockIdx.x, first = chunk * CHUNK;
  const size_t chunk_of_all = static_cast<size_t>(blockIdx.y) * gridDim.x + chunk;
  const SamplingRow row = rows[blockIdx.y];
  if ((row.flags & ROW_IS_UNUSED) != 0) return;

  const Logits from{logits + static_cast<size_t>(blockIdx.y) * stride, vocab};
  Pack<float, 4> raw[FOURS], own[FOURS];
#pragma unroll
  for (unsigned i = 0; i < FOURS; ++i) own[i] = raw[i] = from.four(first + (i * SCAN_THREADS + threadIdx.x) * 4);
  if (changes_logits(row)) {
    change(own, shared, first, vocab, row, Changes{biases, counts, count_stride, masks, mask_stride});
    float* to = changed + chunk_of_all * CHUNK;
#pragma unroll
    for (unsigned i = 0; i < FOURS; ++i) store_pack(to + (i * SCAN_THREADS + threadIdx.x) * 4, own[i]);
    if (row.top_n > 0) store_group_maxima(raw, raw_group_maxima + chunk_of_all * (CHUNK / GROUP));
  }
  store_group_maxima(own, group_maxima + chunk_of_all * (CHUNK / GROUP));
  const ChunkSummary of_warp = summarize(raw, own, first);
  if (lane_id() == 0) of_warps[warp_id()] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    ChunkSummary all = of_warps[0];
    for (unsigned warp = 1; warp < SCAN_THREADS / WARP; ++warp) all = joined(all, of_warps[warp]);
    summaries[chunk_of_all] = all;
  }
}
EXPORT(sampling_scan)

// --- The second and the third kernel ----------------------------------------------------------------------------------

constexpr unsigned MAX_BINS = 2048;
// Candidates that are gathered to look at them more closely; where there are more, the row is read again.
constexpr unsigned MAX_GATHERED = 2048;

// Pieces of a row, at most: what the third kernel adds up.
constexpr unsigned MAX_PIECES = 8;

// A histogram of 64-bit sums, in two halves because shared memory adds 32 bits at once.
struct Bins {
  uint32_t low[MAX_BINS], high[MAX_BINS];

  __device__ __forceinline__ void add(unsigned bin, u64 weight) {
    if (weight == 0) return;
    const uint32_t half = static_cast<uint32_t>(weight);
    const uint32_t old = atomicAdd(&low[bin], half);
    const uint32_t carried = static_cast<uint32_t>(weight >> 32) + (old + half < old ? 1 : 0);
    if (carried != 0) atomicAdd(&high[bin], carried);
  }
  __device__ __forceinline__ void set(unsigned bin, u64 sum) {
    low[bin] = static_cast<uint32_t>(sum);
    high[bin] = static_cast<uint32_t>(sum >> 32);
  }
  __device__ __forceinline__ u64 of(unsigned bin) const { return static_cast<u64>(high[bin]) << 32 | low[bin]; }
};

struct Shared {
  uint32_t counts[MAX_BINS];
  Bins weights;
  uint32_t keys[MAX_GATHERED], ids[MAX_GATHERED];
  unsigned num_gathered;
  u64 of_warps[WARP];
  // Of what is kept, the weight of each piece, where that is known.
  u64 of_pieces[MAX_PIECES];
  // What one thread tells the others.
  uint32_t bin, ties, token;
  u64 before;
};

__device__ __forceinline__ u64 warp_sum_u64(u64 x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// Sum of what lower threads of the block have, and of all. All threads call it.
struct Scanned {
  u64 before;
  u64 total;
};
__device__ Scanned block_scan(Shared& shared, u64 own) {
  u64 inclusive = own;
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
    const u64 below = __shfl_up_sync(ALL_LANES, inclusive, offset);
    if (lane_id() >= offset) inclusive += below;
  }
  if (lane_id() == WARP - 1) shared.of_warps[warp_id()] = inclusive;
  __syncthreads();
  u64 before = inclusive - own, total = 0;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) {
    if (warp < static_cast<unsigned>(warp_id())) before += shared.of_warps[warp];
    total += shared.of_warps[warp];
  }
  __syncthreads();
  return Scanned{before, total};
}

// A row's logits, relative to the greatest, by temperature.
struct Row {
  Logits logits;
  const float* group_maxima;
  float max;
  float scale;

  __device__ __forceinline__ uint32_t key(float logit) const { return key_of_distance((max - logit) * scale); }
  __device__ __forceinline__ uint32_t key_of_id(uint32_t id) const { return key(logits.at[id]); }

  // `function(key, id)` of all with keys up to `last_key` among ids `first .. last`, both multiples of 4 or the end; spread
  // over `threads` of which this is `thread`.
  template <class Function>
  __device__ void each(unsigned first, unsigned last, unsigned thread, unsigned threads, uint32_t last_key,
                       Function function) const {
#pragma unroll 4
    for (unsigned index = first + 4 * thread; index < last; index += 4 * threads) {
      if (key(group_maxima[index / GROUP]) > last_key) continue;
      const Pack<float, 4> four = logits.four(index);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t its = key(four.at[i]);
        if (its <= last_key && index + i < last) function(its, index + i);
      }
    }
  }
  template <class Function> __device__ void each(uint32_t last_key, Function function) const {
    each(0, logits.vocab, threadIdx.x, blockDim.x, last_key, function);
  }
};

// The first candidates of an order by key, then by id.
struct Prefix {
  uint32_t last_key;
  uint32_t last_id;
  __device__ __forceinline__ bool has(uint32_t key, uint32_t id) const {
    return key < last_key || (key == last_key && id <= last_id);
  }
};

// From the most likely candidate on.
struct ByLikelihood {
  const Row& row;
  Prefix kept;

  template <class Function> __device__ void each(uint32_t last_key, Function function) const {
    row.each(min(last_key, kept.last_key), [&](uint32_t key, uint32_t id) {
      if (kept.has(key, id)) function(key, id);
    });
  }
  __device__ u64 weight(uint32_t key, uint32_t) const { return weight_of_key(key); }
};
// From the candidate on whose information is nearest to `center`, among those that are kept.
struct ByTypicality {
  const Row& row;
  Prefix kept;
  uint32_t center;

  __device__ __forceinline__ uint32_t distance(uint32_t key) const { return key > center ? key - center : center - key; }
  template <class Function> __device__ void each(uint32_t, Function function) const {
    row.each(kept.last_key, [&](uint32_t key, uint32_t id) {
      if (kept.has(key, id)) function(distance(key), id);
    });
  }
  __device__ u64 weight(uint32_t, uint32_t id) const { return weight_of_key(row.key_of_id(id)); }
};
// Those of one key in another order, by id. There are at most 2^20 ids.
constexpr unsigned ID_SHIFT = 12;
template <class Order> struct TiesById {
  const Order& order;
  uint32_t key;

  template <class Function> __device__ void each(uint32_t, Function function) const {
    order.each(key, [&](uint32_t its, uint32_t id) {
      if (its == key) function(id << ID_SHIFT, id);
    });
  }
  __device__ u64 weight(uint32_t, uint32_t id) const { return order.weight(key, id); }
};

// What reaches a target: candidates are counted, or their weights summed.
enum class Sum { Counts, Weights };

// Where the sum over an order reaches the target.
struct Reached {
  bool reached;    // if not, all together are less
  uint32_t key;    // where it is
  u64 left;        // how much of the target candidates of this very key are to give
  unsigned ties;   // how many they are
};

// Finds the bin in which the sum reaches `target(total)`, at least 1; false where there is none.
template <Sum SUM, class Target>
__device__ bool find_bin(Shared& shared, unsigned num_bins, Target target, u64& left) {
  const unsigned per_thread = num_bins / blockDim.x > 0 ? num_bins / blockDim.x : 1, first = threadIdx.x * per_thread;
  const auto sum_of = [&](unsigned bin) -> u64 {
    return SUM == Sum::Counts ? shared.counts[bin] : shared.weights.of(bin);
  };
  u64 own = 0;
  for (unsigned bin = first; bin < first + per_thread && bin < num_bins; ++bin) own += sum_of(bin);
  const Scanned scanned = block_scan(shared, own);
  const u64 wanted = target(scanned.total);
  if (wanted > scanned.total) return false;
  if (scanned.before < wanted && wanted <= scanned.before + own) {
    u64 before = scanned.before;
    unsigned bin = first;
    while (before + sum_of(bin) < wanted) before += sum_of(bin++);
    shared.bin = bin;
    shared.ties = shared.counts[bin];
    shared.before = before;
  }
  __syncthreads();
  left = wanted - shared.before;
  return true;
}

// Of a radix sort by key, from the highest bits on.
constexpr unsigned NUM_LEVELS = 3;
__device__ __forceinline__ unsigned level_shift(unsigned level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
__device__ __forceinline__ unsigned level_bins(unsigned level) { return level == 2 ? 1024 : MAX_BINS; }

__device__ __forceinline__ void clear_bins(Shared& shared, unsigned num_bins) {
  for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
    shared.counts[bin] = 0;
    shared.weights.set(bin, 0);
  }
  __syncthreads();
}

// What the second kernel has found.
struct Pieces {
  unsigned num;
  unsigned len;       // of each but the last, in logits
  const u64* bins;    // [num][MAX_BINS]: counts or weights of the first level; null where nothing is truncated by them
  const u64* sums;    // [num]: weights of all; null where bins are there, or nothing
};

// The first level of a whole row: what all pieces have.
template <Sum SUM> __device__ void add_pieces(Shared& shared, const Pieces& pieces) {
  for (unsigned bin = threadIdx.x; bin < MAX_BINS; bin += blockDim.x) {
    u64 sum = 0;
    for (unsigned piece = 0; piece < pieces.num; ++piece) sum += pieces.bins[piece * MAX_BINS + bin];
    // Of weights, how many they are is counted at the last level only.
    shared.counts[bin] = SUM == Sum::Counts ? static_cast<uint32_t>(sum) : 0;
    shared.weights.set(bin, sum);
  }
}

// Three passes of a radix sort that only follows the bin in question; where `pieces` has bins, the first pass is done. All
// threads of the block call it.
template <Sum SUM, class Order, class Target>
__device__ Reached reach(Shared& shared, const Order& order, Target target, const Pieces& pieces) {
  uint32_t prefix = 0;
  u64 left = 0;
  bool gathered = false;
#pragma unroll 1
  for (unsigned level = 0; level < NUM_LEVELS; ++level) {
    const unsigned shift = level_shift(level), num_bins = level_bins(level), above = level_shift(level - 1);
    const auto count = [&](uint32_t key, uint32_t id) {
      if (level > 0 && key >> above != prefix) return;
      const unsigned bin = (key >> shift) % num_bins;
      // Of weights, the number of ties is all that counts are for.
      if (SUM == Sum::Counts || level == 2) atomicAdd(&shared.counts[bin], 1u);
      if (SUM == Sum::Weights) shared.weights.add(bin, order.weight(key, id));
    };
    if (level == 0 && pieces.bins != nullptr) {
      add_pieces<SUM>(shared, pieces);
    } else {
      clear_bins(shared, num_bins);
      if (gathered) {
        for (unsigned i = threadIdx.x; i < shared.num_gathered; i += blockDim.x) count(shared.keys[i], shared.ids[i]);
      } else {
        order.each(level > 0 ? (prefix << above) + ((1u << above) - 1) : NONE, count);
      }
    }
    __syncthreads();
    const u64 still = left;
    const bool found =
        find_bin<SUM>(shared, num_bins, [&](u64 total) { return level > 0 ? still : max(target(total), u64(1)); }, left);
    if (!found) return Reached{false, 0, 0, 0};
    prefix = prefix * num_bins + shared.bin;
    const bool gathers = level == 0 && (SUM == Sum::Weights || shared.ties <= MAX_GATHERED);
    if (gathers) {
      if (threadIdx.x == 0) shared.num_gathered = 0;
      __syncthreads();
      order.each((prefix << shift) + ((1u << shift) - 1), [&](uint32_t key, uint32_t id) {
        if (key >> shift != prefix) return;
        const unsigned place = atomicAdd(&shared.num_gathered, 1u);
        if (place >= MAX_GATHERED) return;
        shared.keys[place] = key;
        shared.ids[place] = id;
      });
    }
    // Before the histogram is cleared, all have read `bin`, `ties` and `before`.
    const unsigned ties = shared.ties;
    __syncthreads();
    if (gathers) gathered = shared.num_gathered <= MAX_GATHERED;
    if (level == 2) return Reached{true, prefix, left, ties};
  }
  return Reached{false, 0, 0, 0};
}

// The shortest prefix whose sum reaches the target; `all` where there is none. `gathered`: whether the candidates of the bin
// in which it ends are in shared memory.
template <Sum SUM, class Order, class Target>
__device__ Prefix shortest(Shared& shared, const Order& order, Prefix all, Target target, const Pieces& pieces,
                           bool& gathered) {
  gathered = false;
  const Reached reached = reach<SUM>(shared, order, target, pieces);
  if (!reached.reached) return all;
  if (reached.ties == 1 || (SUM == Sum::Counts && reached.left >= reached.ties)) {
    gathered = SUM == Sum::Weights && shared.num_gathered <= MAX_GATHERED;
    return Prefix{reached.key, NONE};
  }
  const TiesById<Order> ties{order, reached.key};
  const Reached last = reach<SUM>(shared, ties, [&](u64) { return reached.left; }, Pieces{});
  return Prefix{reached.key, last.reached ? last.key >> ID_SHIFT : NONE};
}
template <Sum SUM, class Order, class Target>
__device__ Prefix shortest(Shared& shared, const Order& order, Prefix all, Target target) {
  bool gathered;
  return shortest<SUM>(shared, order, all, target, Pieces{}, gathered);
}

// A share of a sum of weights, rounded up.
struct Share {
  float share;
  __device__ u64 operator()(u64 total) const { return static_cast<u64>(ceil(static_cast<double>(share) * total)); }
};

// All that have a weight.
__device__ __forceinline__ Prefix everything() { return Prefix{FAR_KEY - 1, NONE}; }

// What truncations leave.
struct Kept {
  Prefix likely;
  bool is_typical;
  Prefix typical;  // by distance from the center
  uint32_t center;
  bool knows_pieces;  // `Shared::of_pieces` are of what is kept

  __device__ __forceinline__ bool has(uint32_t key, uint32_t id) const {
    if (!likely.has(key, id)) return false;
    return !is_typical || typical.has(key > center ? key - center : center - key, id);
  }
};

__device__ double block_sum_f64(Shared& shared, double own) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) own += __shfl_xor_sync(ALL_LANES, own, offset);
  double* of_warps = reinterpret_cast<double*>(shared.of_warps);
  if (lane_id() == 0) of_warps[warp_id()] = own;
  __syncthreads();
  double sum = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += of_warps[warp];
  __syncthreads();
  return sum;
}

// Entropy minus the logarithm of the weights' sum is the mean distance from the most likely candidate.
__device__ uint32_t mean_key(Shared& shared, const Row& row, Prefix kept) {
  double weights = 0.0, products = 0.0;
  row.each(kept.last_key, [&](uint32_t key, uint32_t id) {
    if (!kept.has(key, id)) return;
    const double weight = static_cast<double>(weight_of_key(key));
    weights += weight;
    products += weight * key;
  });
  weights = block_sum_f64(shared, weights);
  products = block_sum_f64(shared, products);
  return static_cast<uint32_t>(products / weights);
}

// Of a prefix whose last bin is gathered, the weight of each piece.
__device__ void weigh_pieces(Shared& shared, const Pieces& pieces, Prefix prefix) {
  const unsigned num_bins = prefix.last_key >> level_shift(0);
  for (unsigned piece = 0; piece < pieces.num; ++piece) {
    u64 sum = 0;
    for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x) sum += pieces.bins[piece * MAX_BINS + bin];
    for (unsigned i = threadIdx.x; i < shared.num_gathered; i += blockDim.x) {
      const uint32_t key = shared.keys[i], id = shared.ids[i];
      if (id / pieces.len == piece && prefix.has(key, id)) sum += weight_of_key(key);
    }
    const u64 total = block_scan(shared, sum).total;
    if (threadIdx.x == 0) shared.of_pieces[piece] = total;
  }
  __syncthreads();
}

// The first `k` candidates are not behind the first `k` maxima of groups, which are fewer to count. Returns the end of the bin
// of the last of these.
__device__ Prefix bound_by_groups(Shared& shared, const Row& row, unsigned k) {
  const unsigned num_groups = (row.logits.vocab + GROUP - 1) / GROUP;
  clear_bins(shared, MAX_BINS);
  for (unsigned group = threadIdx.x; group < num_groups; group += blockDim.x) {
    const uint32_t key = row.key(row.group_maxima[group]);
    if (key <= everything().last_key) atomicAdd(&shared.counts[key >> level_shift(0)], 1u);
  }
  __syncthreads();
  u64 left;
  if (!find_bin<Sum::Counts>(shared, MAX_BINS, [&](u64) { return static_cast<u64>(k); }, left)) return everything();
  const Prefix bound{(shared.bin << level_shift(0)) + ((1u << level_shift(0)) - 1), NONE};
  // Before the histogram is cleared, all have read `bin`.
  __syncthreads();
  return bound.last_key < everything().last_key ? bound : everything();
}

// More are counted by the second kernel.
constexpr unsigned MOST_BY_GROUPS = 1024;

// What the pieces of a row are counted for.
enum class Counting { Nothing, Counts, Weights, Sum };

__device__ Counting counting(const SamplingRow& row, unsigned vocab) {
  if (row.token != NONE || row.temperature == 0.0f) return Counting::Nothing;
  if (row.top_k > 0 && row.top_k < vocab) return row.top_k > MOST_BY_GROUPS ? Counting::Counts : Counting::Nothing;
  if (row.top_p < 1.0f) return Counting::Weights;
  // The third kernel looks at all for that anyway.
  return row.typical_p < 1.0f ? Counting::Nothing : Counting::Sum;
}

// What is kept where nothing but `min_p` truncates.
__device__ __forceinline__ Prefix without_unlikely(Prefix kept, const SamplingRow& parameters) {
  return parameters.min_p_key < kept.last_key ? Prefix{parameters.min_p_key, NONE} : kept;
}

__device__ Kept truncated(Shared& shared, const Row& row, const SamplingRow& parameters, const Pieces& pieces) {
  const Prefix all = everything();
  Kept kept{all, false, all, 0, false};
  bool gathered = false;
  const bool has_top_k = parameters.top_k > 0 && parameters.top_k < row.logits.vocab;
  if (has_top_k) {
    const unsigned k = parameters.top_k;
    const Prefix among = k > MOST_BY_GROUPS ? all : bound_by_groups(shared, row, k);
    kept.likely = shortest<Sum::Counts>(shared, ByLikelihood{row, among}, all, [&](u64) { return static_cast<u64>(k); },
                                        pieces, gathered);
  }
  if (parameters.top_p < 1.0f) {
    kept.likely = shortest<Sum::Weights>(shared, ByLikelihood{row, kept.likely}, kept.likely, Share{parameters.top_p},
                                         has_top_k ? Pieces{} : pieces, gathered);
    if (gathered && !has_top_k && parameters.min_p_key >= kept.likely.last_key) {
      weigh_pieces(shared, pieces, kept.likely);
      kept.knows_pieces = true;
    }
  } else if (pieces.sums != nullptr) {
    if (threadIdx.x < pieces.num) shared.of_pieces[threadIdx.x] = pieces.sums[threadIdx.x];
    __syncthreads();
    kept.knows_pieces = true;
  }
  kept.likely = without_unlikely(kept.likely, parameters);
  if (parameters.typical_p < 1.0f) {
    kept.knows_pieces = false;
    kept.center = mean_key(shared, row, kept.likely);
    const ByTypicality order{row, kept.likely, kept.center};
    kept.typical = shortest<Sum::Weights>(shared, order, Prefix{NONE, NONE}, Share{parameters.typical_p});
    kept.is_typical = true;
  }
  return kept;
}

// The place within a sum that a number in [0, 1) points to.
__device__ __forceinline__ u64 threshold_of(double number, u64 total) {
  return min(static_cast<u64>(number * static_cast<double>(total)), total - 1);
}

// Inverts the cumulative distribution of the kept candidates in order of id. All threads get the token.
__device__ uint32_t drawn(Shared& shared, const Row& row, const Kept& kept, double number, const Pieces& pieces) {
  // First of all the piece, where their weights are known.
  unsigned begin = 0, end = row.logits.vocab;
  u64 left = 0;
  if (kept.knows_pieces) {
    u64 total = 0;
    for (unsigned piece = 0; piece < pieces.num; ++piece) total += shared.of_pieces[piece];
    left = threshold_of(number, total);
    unsigned piece = 0;
    while (shared.of_pieces[piece] <= left) left -= shared.of_pieces[piece++];
    begin = piece * pieces.len;
    end = min(begin + pieces.len, end);
  }
  // Each warp sums up neighbouring ids; then the whole block looks at those of one warp.
  const unsigned num_warps = blockDim.x / WARP, fours = WARP * 4;
  const unsigned span = (end - begin + num_warps * fours - 1) / (num_warps * fours) * fours;
  const unsigned first = min(begin + warp_id() * span, end), last = min(first + span, end);
  u64 sum = 0;
  row.each(first, last, lane_id(), WARP, kept.likely.last_key, [&](uint32_t key, uint32_t id) {
    if (kept.has(key, id)) sum += weight_of_key(key);
  });
  sum = warp_sum_u64(sum);
  // Lane 0 speaks for its warp.
  const Scanned of_warp = block_scan(shared, lane_id() == 0 ? sum : 0);
  const u64 threshold = kept.knows_pieces ? left : threshold_of(number, of_warp.total);
  if (lane_id() == 0 && of_warp.before <= threshold && threshold < of_warp.before + sum) {
    shared.bin = warp_id();
    shared.before = of_warp.before;
  }
  __syncthreads();
  const unsigned chosen_first = begin + shared.bin * span, chosen_last = min(chosen_first + span, end);
  left = threshold - shared.before;
  const unsigned per_thread = (span + blockDim.x - 1) / blockDim.x;
  const unsigned own_first = min(chosen_first + threadIdx.x * per_thread, chosen_last);
  const unsigned own_last = min(own_first + per_thread, chosen_last);
  u64 own = 0;
  const auto weight_of = [&](unsigned id) -> u64 {
    const uint32_t key = row.key_of_id(id);
    return kept.has(key, id) ? weight_of_key(key) : 0;
  };
  for (unsigned id = own_first; id < own_last; ++id) own += weight_of(id);
  const Scanned of_thread = block_scan(shared, own);
  if (of_thread.before <= left && left < of_thread.before + own) {
    u64 before = of_thread.before;
    unsigned id = own_first;
    while (before + weight_of(id) <= left) before += weight_of(id++);
    shared.token = id;
  }
  __syncthreads();
  return shared.token;
}

struct LogSoftmax {
  double max;
  double log_sum;
  __device__ float of(float logit) const { return fminf(static_cast<float>(logit - max - log_sum), 0.0f); }
};

__device__ void write_top(Shared& shared, const Row& raw, unsigned top_n, const LogSoftmax& softmax, SampledRow& out) {
  const unsigned n = min(min(top_n, MAX_TOP_N), raw.logits.vocab);
  const Prefix all{FAR_KEY, NONE}, bound = bound_by_groups(shared, raw, n);
  // Where less than `n` have a weight, others are reported too.
  const Prefix among = bound.last_key < everything().last_key ? bound : all;
  const Prefix top =
      shortest<Sum::Counts>(shared, ByLikelihood{raw, among}, all, [&](u64) { return static_cast<u64>(n); });
  if (threadIdx.x == 0) shared.num_gathered = 0;
  __syncthreads();
  raw.each(top.last_key, [&](uint32_t key, uint32_t id) {
    if (top.has(key, id)) shared.ids[atomicAdd(&shared.num_gathered, 1u)] = id;
  });
  __syncthreads();
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
    const Best own{raw.logits.at[shared.ids[i]], shared.ids[i]};
    unsigned rank = 0;
    for (unsigned j = 0; j < n; ++j) rank += Best{raw.logits.at[shared.ids[j]], shared.ids[j]}.beats(own) ? 1 : 0;
    out.top_tokens[rank] = own.index;
    out.top_logprobs[rank] = softmax.of(own.value);
  }
  if (threadIdx.x == 0) out.num_top = n;
  __syncthreads();
}

// What both kernels know of a row from the first one.
__device__ ChunkSummary joined_chunks(const ChunkSummary* of_row, unsigned chunks) {
  ChunkSummary all{-INFINITY, 0.0f, -INFINITY, NONE, 0};
  Best best{-INFINITY, NONE};
  // Each warp for itself: to wait for memory once is all that this costs.
  for (unsigned chunk = lane_id(); chunk < chunks; chunk += WARP) {
    const ChunkSummary one = of_row[chunk];
    all.raw_max = fmaxf(all.raw_max, one.raw_max);
    if (Best{one.max, one.argmax}.beats(best)) best = Best{one.max, one.argmax};
    all.not_finite |= one.not_finite;
  }
  best = warp_best(best);
  all.raw_max = warp_max(all.raw_max);
  all.max = best.value;
  all.argmax = best.index;
  all.not_finite = __any_sync(ALL_LANES, all.not_finite != 0) ? 1 : 0;
  return all;
}

// Of the first kernel, as both others get them.
struct Scan {
  const float* logits;
  unsigned stride, vocab, chunks;
  const float* changed;
  const float* group_maxima;
  const ChunkSummary* summaries;

  __device__ ChunkSummary joined(size_t index) const { return joined_chunks(summaries + index * chunks, chunks); }
  __device__ const float* raw(size_t index) const { return logits + index * stride; }
  __device__ size_t groups() const { return static_cast<size_t>(chunks) * (CHUNK / GROUP); }
  // What is chosen from.
  __device__ Row row(size_t index, const SamplingRow& parameters, float max) const {
    const float* from = changes_logits(parameters) ? changed + index * chunks * CHUNK : raw(index);
    return Row{Logits{from, vocab}, group_maxima + index * groups(), max,
               fminf(1.0f / parameters.temperature, 3.402823466e38f)};
  }
};

constexpr unsigned COUNT_THREADS = 512;

// The second kernel. Blocks: [pieces, rows]. `piece_bins`: [rows, pieces, MAX_BINS]; `piece_sums`: [rows, pieces]. The other
// arrays are those of the first kernel.
KERNEL(sampling_count, 512)
(const float* logits, unsigned stride, unsigned vocab, unsigned chunks, unsigned piece_chunks, const SamplingRow* rows,
 const float* changed, const float* group_maxima, const ChunkSummary* summaries, u64* piece_bins, u64* piece_sums) {
  __shared__ Bins bins;
  __shared__ u64 of_warps[COUNT_THREADS / WARP];
  const size_t index = blockIdx.y, piece = index * gridDim.x + blockIdx.x;
  const SamplingRow parameters = rows[index];
  const Counting wanted = counting(parameters, vocab);
  if (wanted == Counting::Nothing) return;
  const Scan scan{logits, stride, vocab, chunks, changed, group_maxima, summaries};
  const ChunkSummary all = scan.joined(index);
  if (all.not_finite != 0 || all.max == -INFINITY) return;
  const Row row = scan.row(index, parameters, all.max);
  const unsigned first = blockIdx.x * piece_chunks * CHUNK, last = min(first + piece_chunks * CHUNK, vocab);
  if (wanted == Counting::Sum) {
    u64 own = 0;
    row.each(first, last, threadIdx.x, COUNT_THREADS, without_unlikely(everything(), parameters).last_key,
             [&](uint32_t key, uint32_t) { own += weight_of_key(key); });
    own = warp_sum_u64(own);
    if (lane_id() == 0) of_warps[warp_id()] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      u64 sum = 0;
      for (unsigned warp = 0; warp < COUNT_THREADS / WARP; ++warp) sum += of_warps[warp];
      piece_sums[piece] = sum;
    }
    return;
  }
  for (unsigned bin = threadIdx.x; bin < MAX_BINS; bin += COUNT_THREADS) bins.low[bin] = bins.high[bin] = 0;
  __syncthreads();
  row.each(first, last, threadIdx.x, COUNT_THREADS, everything().last_key, [&](uint32_t key, uint32_t) {
    const unsigned bin = key >> level_shift(0);
    if (wanted == Counting::Counts) {
      atomicAdd(&bins.low[bin], 1u);
    } else {
      bins.add(bin, weight_of_key(key));
    }
  });
  __syncthreads();
  for (unsigned bin = threadIdx.x; bin < MAX_BINS; bin += COUNT_THREADS) piece_bins[piece * MAX_BINS + bin] = bins.of(bin);
}
EXPORT(sampling_count)

// The third kernel. A block of a power of two of threads for each row; the arrays are those of the other two.
KERNEL(sampling_choose, 1024)
(const float* logits, unsigned stride, unsigned vocab, unsigned chunks, unsigned num_pieces, unsigned piece_chunks,
 const SamplingRow* rows, const float* changed, const float* group_maxima, const float* raw_group_maxima,
 const ChunkSummary* summaries, const u64* piece_bins, const u64* piece_sums, SampledRow* sampled) {
  __shared__ Shared shared;
  const size_t index = blockIdx.x;
  const SamplingRow row = rows[index];
  SampledRow& out = sampled[index];
  const Scan scan{logits, stride, vocab, chunks, changed, group_maxima, summaries};
  const bool is_unused = (row.flags & ROW_IS_UNUSED) != 0;
  ChunkSummary all{-INFINITY, 0.0f, -INFINITY, NONE, 0};
  double raw_sum = 0.0;
  if (!is_unused) {
    all = scan.joined(index);
    for (unsigned chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
      const ChunkSummary one = summaries[index * chunks + chunk];
      if (one.raw_max > -INFINITY) raw_sum += one.raw_sum * expf(one.raw_max - all.raw_max);
    }
  }
  const bool not_finite = all.not_finite != 0 || all.raw_max == -INFINITY;
  const bool is_empty = row.token == NONE && all.max == -INFINITY;
  if (is_unused || not_finite || is_empty) {
    if (threadIdx.x == 0) {
      out.token = NONE;
      out.logprob = 0.0f;
      out.status = is_unused ? UNUSED : not_finite ? NOT_FINITE : NOTHING_ALLOWED;
      out.num_top = 0;
    }
    return;
  }
  const float* raw = scan.raw(index);
  const LogSoftmax softmax{all.raw_max, log(block_sum_f64(shared, raw_sum))};
  uint32_t token = row.token;
  if (token == NONE && row.temperature == 0.0f) token = all.argmax;
  if (token == NONE) {
    const Row from = scan.row(index, row, all.max);
    const Counting counted = counting(row, vocab);
    Pieces pieces{num_pieces, piece_chunks * CHUNK, nullptr, nullptr};
    if (counted == Counting::Sum) {
      pieces.sums = piece_sums + index * num_pieces;
    } else if (counted != Counting::Nothing) {
      pieces.bins = piece_bins + index * num_pieces * MAX_BINS;
    }
    const Kept kept = truncated(shared, from, row, pieces);
    token = drawn(shared, from, kept, uniform(row.seed, row.position), pieces);
  }
  if (row.top_n > 0) {
    const float* maxima = (changes_logits(row) ? raw_group_maxima : group_maxima) + index * scan.groups();
    write_top(shared, Row{Logits{raw, vocab}, maxima, all.raw_max, 1.0f}, row.top_n, softmax, out);
  } else if (threadIdx.x == 0) {
    out.num_top = 0;
  }
  if (threadIdx.x == 0) {
    out.token = token;
    out.logprob = softmax.of(raw[token]);
    out.status = CHOSEN;
  }
}
EXPORT(sampling_choose)

// --- What is kept of chosen tokens ------------------------------------------------------------------------------------

// One more of a token that was generated, as far as 15 bits count.
__device__ void count_generated(uint16_t* counts, uint32_t token) {
  uint32_t* word = reinterpret_cast<uint32_t*>(counts) + token / 2;
  const unsigned shift = token % 2 * 16;
  uint32_t seen = *word;
  while ((seen >> shift & MOST_GENERATED) != MOST_GENERATED) {
    const uint32_t before = atomicCAS(word, seen, seen + (1u << shift));
    if (before == seen) break;
    seen = before;
  }
}

// Tokens to the places of their sequences, and to their counts where there are any. What is NONE has no effect.
KERNEL(sampling_commit, 256)
(const uint32_t* tokens, unsigned token_stride, const uint32_t* slots, unsigned slot_stride, unsigned rows, unsigned vocab,
 uint32_t* last_tokens, unsigned num_slots, uint16_t* counts, unsigned count_stride) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const uint32_t token = tokens[static_cast<size_t>(row) * token_stride];
  const uint32_t slot = slots[static_cast<size_t>(row) * slot_stride];
  if (token >= vocab || slot >= num_slots) return;
  last_tokens[slot] = token;
  if (counts != nullptr) count_generated(counts + static_cast<size_t>(slot) * count_stride, token);
}
EXPORT(sampling_commit)

// One block: a slot's counts are those of a sequence that begins with `prompt` and has generated `generated` already.
KERNEL(sampling_recount, 1024)
(uint16_t* counts, unsigned count_stride, unsigned vocab, const uint32_t* prompt, unsigned prompt_len,
 const uint32_t* generated, unsigned generated_len) {
  uint32_t* words = reinterpret_cast<uint32_t*>(counts);
  for (unsigned i = threadIdx.x; i < count_stride / 2; i += blockDim.x) words[i] = 0;
  __syncthreads();
  for (unsigned i = threadIdx.x; i < prompt_len; i += blockDim.x) {
    const uint32_t token = prompt[i];
    if (token < vocab) atomicOr(&words[token / 2], IN_PROMPT << (token % 2 * 16));
  }
  for (unsigned i = threadIdx.x; i < generated_len; i += blockDim.x) {
    if (generated[i] < vocab) count_generated(counts, generated[i]);
  }
}
EXPORT(sampling_recount)
