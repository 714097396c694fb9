// From logits to tokens, each row by its own parameters. Two kernels: the first, with several blocks for each row, changes
// the logits (bias, penalties, grammar) and sums them up by chunks; the second, with a block for each row, truncates and
// chooses. The second looks again only at groups of logits that have candidates.
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

// --- The second kernel ------------------------------------------------------------------------------------------------

constexpr unsigned MAX_BINS = 2048;
// Candidates that are gathered to look at them more closely; where there are more, the row is read again.
constexpr unsigned MAX_GATHERED = 2048;

struct Shared {
  // A histogram; 64-bit sums in two halves, because shared memory adds 32 bits at once.
  uint32_t counts[MAX_BINS], low[MAX_BINS], high[MAX_BINS];
  uint32_t keys[MAX_GATHERED], ids[MAX_GATHERED];
  unsigned num_gathered;
  u64 of_warps[WARP];
  // What one thread tells the others.
  uint32_t bin, ties, token;
  u64 before;
};

__device__ __forceinline__ void add_weight(Shared& shared, unsigned bin, u64 weight) {
  if (weight == 0) return;
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t old = atomicAdd(&shared.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < old ? 1 : 0);
  if (high != 0) atomicAdd(&shared.high[bin], high);
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
    return SUM == Sum::Counts ? shared.counts[bin] : static_cast<u64>(shared.high[bin]) << 32 | shared.low[bin];
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

// Three passes of a radix sort that only follows the bin in question. All threads of the block call it.
template <Sum SUM, class Order, class Target>
__device__ Reached reach(Shared& shared, const Order& order, Target target) {
  constexpr unsigned SHIFTS[3] = {21, 10, 0}, BINS[3] = {2048, 2048, 1024};
  uint32_t prefix = 0;
  u64 left = 0;
  bool gathered = false;
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const unsigned shift = SHIFTS[level], num_bins = BINS[level];
    for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
      shared.counts[bin] = shared.low[bin] = shared.high[bin] = 0;
    }
    __syncthreads();
    const auto count = [&](uint32_t key, uint32_t id) {
      if (level > 0 && key >> SHIFTS[level - 1] != prefix) return;
      const unsigned bin = (key >> shift) % num_bins;
      // Of weights, the number of ties is all that counts are for.
      if (SUM == Sum::Counts || level == 2) atomicAdd(&shared.counts[bin], 1u);
      if (SUM == Sum::Weights) add_weight(shared, bin, order.weight(key, id));
    };
    if (gathered) {
      for (unsigned i = threadIdx.x; i < shared.num_gathered; i += blockDim.x) count(shared.keys[i], shared.ids[i]);
    } else {
      order.each(level > 0 ? (prefix << SHIFTS[level - 1]) + ((1u << SHIFTS[level - 1]) - 1) : NONE, count);
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

// The shortest prefix whose sum reaches the target; `all` where there is none.
template <Sum SUM, class Order, class Target>
__device__ Prefix shortest(Shared& shared, const Order& order, Prefix all, Target target) {
  const Reached reached = reach<SUM>(shared, order, target);
  if (!reached.reached) return all;
  if (reached.ties == 1 || (SUM == Sum::Counts && reached.left >= reached.ties)) return Prefix{reached.key, NONE};
  const TiesById<Order> ties{order, reached.key};
  const Reached last = reach<SUM>(shared, ties, [&](u64) { return reached.left; });
  return Prefix{reached.key, last.reached ? last.key >> ID_SHIFT : NONE};
}

// A share of a sum of weights, rounded up.
struct Share {
  float share;
  __device__ u64 operator()(u64 total) const { return static_cast<u64>(ceil(static_cast<double>(share) * total)); }
};

// What truncations leave.
struct Kept {
  Prefix likely;
  bool is_typical;
  Prefix typical;  // by distance from the center
  uint32_t center;

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

__device__ Kept truncated(Shared& shared, const Row& row, const SamplingRow& parameters) {
  const Prefix all{FAR_KEY - 1, NONE};
  Kept kept{all, false, all, 0};
  if (parameters.top_k > 0 && parameters.top_k < row.logits.vocab) {
    const unsigned k = parameters.top_k;
    kept.likely = shortest<Sum::Counts>(shared, ByLikelihood{row, all}, all, [&](u64) { return static_cast<u64>(k); });
  }
  if (parameters.top_p < 1.0f) {
    kept.likely = shortest<Sum::Weights>(shared, ByLikelihood{row, kept.likely}, kept.likely, Share{parameters.top_p});
  }
  if (parameters.min_p_key < kept.likely.last_key) kept.likely = Prefix{parameters.min_p_key, NONE};
  if (parameters.typical_p < 1.0f) {
    kept.center = mean_key(shared, row, kept.likely);
    const ByTypicality order{row, kept.likely, kept.center};
    kept.typical = shortest<Sum::Weights>(shared, order, Prefix{NONE, NONE}, Share{parameters.typical_p});
    kept.is_typical = true;
  }
  return kept;
}

// Inverts the cumulative distribution of the kept candidates in order of id. All threads get the token.
__device__ uint32_t drawn(Shared& shared, const Row& row, const Kept& kept, double number) {
  // Each warp sums up neighbouring ids; then the whole block looks at those of one warp.
  const unsigned vocab = row.logits.vocab, num_warps = blockDim.x / WARP, fours = WARP * 4;
  const unsigned span = (vocab + num_warps * fours - 1) / (num_warps * fours) * fours;
  const unsigned first = min(warp_id() * span, vocab), last = min(first + span, vocab);
  u64 sum = 0;
  row.each(first, last, lane_id(), WARP, kept.likely.last_key, [&](uint32_t key, uint32_t id) {
    if (kept.has(key, id)) sum += weight_of_key(key);
  });
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  // Lane 0 speaks for its warp.
  const Scanned of_warp = block_scan(shared, lane_id() == 0 ? sum : 0);
  const u64 threshold = min(static_cast<u64>(number * static_cast<double>(of_warp.total)), of_warp.total - 1);
  if (lane_id() == 0 && of_warp.before <= threshold && threshold < of_warp.before + sum) {
    shared.bin = warp_id();
    shared.before = of_warp.before;
  }
  __syncthreads();
  const unsigned chosen_first = shared.bin * span, chosen_last = min(chosen_first + span, vocab);
  const u64 left = threshold - shared.before;
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
  const Prefix all{FAR_KEY, NONE};
  const Prefix top =
      shortest<Sum::Counts>(shared, ByLikelihood{raw, all}, all, [&](u64) { return static_cast<u64>(n); });
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

// A block of a power of two of threads for each row. The arrays are those of the first kernel.
KERNEL(sampling_choose, 1024)
(const float* logits, unsigned stride, unsigned vocab, unsigned chunks, const SamplingRow* rows, const float* changed,
 const float* group_maxima, const float* raw_group_maxima, const ChunkSummary* summaries, SampledRow* sampled) {
  __shared__ Shared shared;
  const size_t index = blockIdx.x;
  const SamplingRow row = rows[index];
  SampledRow& out = sampled[index];
  const bool is_unused = (row.flags & ROW_IS_UNUSED) != 0;
  ChunkSummary all{-INFINITY, 0.0f, -INFINITY, NONE, 0};
  double raw_sum = 0.0;
  if (!is_unused) {
    const ChunkSummary* of_row = summaries + index * chunks;
    for (unsigned chunk = 0; chunk < chunks; ++chunk) {
      const ChunkSummary one = of_row[chunk];
      all.raw_max = fmaxf(all.raw_max, one.raw_max);
      if (Best{one.max, one.argmax}.beats(Best{all.max, all.argmax})) {
        all.max = one.max;
        all.argmax = one.argmax;
      }
      all.not_finite |= one.not_finite;
    }
    for (unsigned chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
      const ChunkSummary one = of_row[chunk];
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
  const float* raw = logits + index * stride;
  const size_t groups = static_cast<size_t>(chunks) * (CHUNK / GROUP);
  const bool is_changed = changes_logits(row);
  const LogSoftmax softmax{all.raw_max, log(block_sum_f64(shared, raw_sum))};
  uint32_t token = row.token;
  if (token == NONE && row.temperature == 0.0f) token = all.argmax;
  if (token == NONE) {
    const Row from{Logits{is_changed ? changed + index * chunks * CHUNK : raw, vocab}, group_maxima + index * groups,
                   all.max, fminf(1.0f / row.temperature, 3.402823466e38f)};
    const Kept kept = truncated(shared, from, row);
    token = drawn(shared, from, kept, uniform(row.seed, row.position));
  }
  if (row.top_n > 0) {
    const float* maxima = (is_changed ? raw_group_maxima : group_maxima) + index * groups;
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
