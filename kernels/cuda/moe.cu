// Mixture of experts: which experts a row goes to, the rows by expert, and the sum of what comes back. Nothing here is known
// to the host: what comes after reads offsets from device memory.
#include "best.cuh"
#include "rows.cuh"

// A warp for each row. `chosen`, `weights`: [rows, experts_per_row], the most likely first.
KERNEL(moe_choose, 128)
(const float* router_logits, unsigned stride, unsigned rows, unsigned experts, unsigned experts_per_row,
 unsigned renormalize, uint32_t* chosen, float* weights) {
  DYNAMIC_SHARED(float, shared);
  const unsigned row = blockIdx.x * (blockDim.x / WARP) + warp_id();
  if (row >= rows) return;
  const float* logits = router_logits + static_cast<size_t>(row) * stride;
  // Of each warp: what may still be chosen.
  float* const left = shared + warp_id() * experts;
  float max = -INFINITY;
  for (unsigned expert = lane_id(); expert < experts; expert += WARP) {
    const float logit = logits[expert];
    // NaN is chosen last; its row's weights are NaN by the sum below.
    left[expert] = isnan(logit) ? -INFINITY : logit;
    max = fmaxf(max, logit);
  }
  max = warp_max(max);
  float total = 0.0f;
  for (unsigned expert = lane_id(); expert < experts; expert += WARP) total += expf(logits[expert] - max);
  total = warp_sum(total);
  __syncwarp();
  uint32_t* const row_chosen = chosen + static_cast<size_t>(row) * experts_per_row;
  float* const row_weights = weights + static_cast<size_t>(row) * experts_per_row;
  float sum_of_chosen = 0.0f;
  for (unsigned place = 0; place < experts_per_row; ++place) {
    Best best{-INFINITY, ~0u};
    for (unsigned expert = lane_id(); expert < experts; expert += WARP) {
      const Best candidate{left[expert], expert};
      if (candidate.value == candidate.value && candidate.beats(best)) best = candidate;
    }
    best = warp_best(best);
    const float weight = expf(logits[best.index] - max);
    sum_of_chosen += weight;
    // Lane 0 reads below what it writes here.
    if (lane_id() == 0) {
      row_chosen[place] = best.index;
      row_weights[place] = weight;
      left[best.index] = NAN;  // never chosen again
    }
    __syncwarp();
  }
  if (lane_id() == 0) {
    const float divisor = renormalize ? sum_of_chosen : total;
    for (unsigned place = 0; place < experts_per_row; ++place) row_weights[place] /= divisor;
  }
}
EXPORT(moe_choose)

// A counting sort, stable, with a block for each expert, which finds by itself where the expert's rows begin: it counts the
// choices of lower experts. `starts`: [experts + 1]; `slots`: of each choice, its place among those sorted; `rows`: of each
// place, its row.
KERNEL(moe_group, 256)
(const uint32_t* chosen, unsigned num_choices, unsigned experts_per_row, uint32_t* starts, uint32_t* slots,
 uint32_t* rows) {
  constexpr int MAX_WARPS = 256 / WARP;
  __shared__ unsigned lower_of[MAX_WARPS], own_of[MAX_WARPS];
  const unsigned expert = blockIdx.x, num_warps = blockDim.x / WARP;
  // Each warp has neighbouring choices, so that the order of warps is that of choices.
  const unsigned per_warp = (num_choices + num_warps * WARP - 1) / (num_warps * WARP) * WARP;
  const unsigned first = warp_id() * per_warp, last = min(first + per_warp, num_choices);
  unsigned lower = 0, own = 0;
  for (unsigned begin = first; begin < last; begin += WARP) {
    const unsigned choice = begin + lane_id();
    const uint32_t its = choice < last ? chosen[choice] : ~0u;
    lower += __popc(__ballot_sync(ALL_LANES, its < expert));
    own += __popc(__ballot_sync(ALL_LANES, its == expert));
  }
  if (lane_id() == 0) {
    lower_of[warp_id()] = lower;
    own_of[warp_id()] = own;
  }
  __syncthreads();
  unsigned start = 0, next = 0, all_own = 0;
  for (unsigned warp = 0; warp < num_warps; ++warp) {
    start += lower_of[warp];
    all_own += own_of[warp];
    if (warp < static_cast<unsigned>(warp_id())) next += own_of[warp];
  }
  if (threadIdx.x == 0) {
    starts[expert] = start;
    if (expert == gridDim.x - 1) starts[expert + 1] = start + all_own;
  }
  next += start;
  for (unsigned begin = first; begin < last; begin += WARP) {
    const unsigned choice = begin + lane_id();
    const bool is_own = choice < last && chosen[choice] == expert;
    const unsigned ballot = __ballot_sync(ALL_LANES, is_own);
    if (is_own) {
      const unsigned slot = next + __popc(ballot & ((1u << lane_id()) - 1));
      slots[choice] = slot;
      rows[slot] = choice / experts_per_row;
    }
    next += __popc(ballot);
  }
}
EXPORT(moe_group)

template <int N, class T>
__device__ void combine_pack(const T* expert_out, unsigned stride, const uint32_t* slots, const float* weights,
                             unsigned experts_per_row, unsigned col, T* out) {
  float sum[N] = {};
  for (unsigned place = 0; place < experts_per_row; ++place) {
    const Pack<T, N> from = load_pack<T, N>(expert_out + static_cast<size_t>(slots[place]) * stride + col);
    const float weight = weights[place];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += weight * to_float(from.at[i]);
  }
  Pack<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.at[i] = from_float<T>(sum[i]);
  store_pack(out + col, to);
}

// Blocks: [rows, pieces of a row].
template <class T>
__device__ void combine(const T* expert_out, unsigned stride, const uint32_t* slots, const float* weights,
                        unsigned experts_per_row, unsigned out_stride, T* out, unsigned cols) {
  constexpr int N = 16 / sizeof(T);
  const size_t row = blockIdx.x;
  slots += row * experts_per_row;
  weights += row * experts_per_row;
  T* to = out + row * out_stride;
  if (in_packs<N>(expert_out, stride, cols) && in_packs<N>(out, out_stride, cols)) {
    for_packs<N>(cols, [&](unsigned col) {
      combine_pack<N>(expert_out, stride, slots, weights, experts_per_row, col, to);
    });
  } else {
    for_cols<N>(cols, [&](unsigned col) {
      combine_pack<1>(expert_out, stride, slots, weights, experts_per_row, col, to);
    });
  }
}

#define COMBINE(T)                                                                                                   \
  KERNEL(moe_combine_##T, 256)                                                                                       \
  (const T* expert_out, unsigned stride, const uint32_t* slots, const float* weights, unsigned experts_per_row,      \
   unsigned out_stride, T* out, unsigned cols) {                                                                     \
    combine<T>(expert_out, stride, slots, weights, experts_per_row, out_stride, out, cols);                          \
  }                                                                                                                  \
  EXPORT(moe_combine_##T)

COMBINE(f32)
COMBINE(f16)
COMBINE(bf16)
