// Attention over paged keys and values for any head size and any element types, without tensor cores: what the tests of the
// other kernels and small models in f32 need. Slower by far than attention_decode.cu and attention_prefill.cu.
#include "attention.cuh"

constexpr int PLAIN_WARPS = 4;
constexpr int MAX_PER_LANE = 16;  // elements of a head in one lane: heads of up to 512

// A block has one head of one token; its warps take 32 positions in turn. A lane computes the score of one position, and
// then sums the values of all 32 for its own elements.
template <class T, class KV>
__device__ __forceinline__ void attend(const T* query, size_t query_stride, const KV* keys, const KV* values,
                                       const uint32_t* query_starts, const uint32_t* kv_lens, const BlockTables& tables,
                                       uint32_t num_blocks, uint32_t num_rows, int kv_heads, int head_dim,
                                       const Scoring& scoring, T* out, size_t out_stride) {
  DYNAMIC_SHARED(float, shared);  // the query, then the sums of each warp: [1 + PLAIN_WARPS][head_dim]
  __shared__ float weights[PLAIN_WARPS][PAGE], maxima[PLAIN_WARPS], totals[PLAIN_WARPS];
  const int row = blockIdx.x, sequence = blockIdx.y, head = blockIdx.z, num_heads = gridDim.z;
  const int kv_head = head / (num_heads / kv_heads), warp = warp_id(), lane = lane_id();
  const int first_token = min(query_starts[sequence], num_rows);
  const int num_tokens = static_cast<int>(min(query_starts[sequence + 1], num_rows)) - first_token;
  if (row >= num_tokens) return;
  const int own = static_cast<int>(min(kv_lens[sequence], tables.columns * PAGE)) - num_tokens + row;
  const int begin = scoring.first_visible(own), end = own + 1;
  const uint32_t* table = tables.of(sequence);
  const T* from = query + (first_token + row) * query_stride + head * head_dim;
  for (int d = threadIdx.x; d < head_dim; d += PLAIN_WARPS * WARP) shared[d] = to_float(from[d]);
  __syncthreads();

  float greatest = -INFINITY, total = 0.0f, sums[MAX_PER_LANE] = {};
  const float slope = scoring.slope(head);
  for (int page = begin / PAGE + warp; page * PAGE < end; page += PLAIN_WARPS) {
    const size_t first = (static_cast<size_t>(min(table[page], num_blocks - 1)) * kv_heads + kv_head) * PAGE * head_dim;
    const int position = page * PAGE + lane;
    float score = -INFINITY;
    if (position >= begin && position < end) {
      const KV* key = keys + first + lane * head_dim;
      float product = 0.0f;
      for (int d = 0; d < head_dim; ++d) product = fmaf(shared[d], to_float(key[d]), product);
      product *= scoring.scale;
      score = scoring.soft_cap > 0.0f ? capped(product, scoring.soft_cap) : product * LOG2_E;
      score = fmaf(slope, static_cast<float>(position - own), score);
    }
    const float before = greatest;
    greatest = fmaxf(greatest, warp_max(score));
    const float correction = weight_of(before, greatest), weight = weight_of(score, greatest);
    total = fmaf(total, correction, weight);
    weights[warp][lane] = weight;
    __syncwarp();
    const int first_place = max(begin - page * PAGE, 0), end_place = min(end - page * PAGE, PAGE);
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; ++i) {
      const int d = i * WARP + lane;
      if (d < head_dim) {
        float sum = sums[i] * correction;
        for (int place = first_place; place < end_place; ++place) {
          sum = fmaf(weights[warp][place], to_float(values[first + place * head_dim + d]), sum);
        }
        sums[i] = sum;
      }
    }
    __syncwarp();
  }
  total = warp_sum(total);
  if (lane == 0) {
    maxima[warp] = greatest;
    totals[warp] = total;
  }
  float* sums_of_warps = shared + head_dim;
#pragma unroll
  for (int i = 0; i < MAX_PER_LANE; ++i) {
    const int d = i * WARP + lane;
    if (d < head_dim) sums_of_warps[warp * head_dim + d] = sums[i];
  }
  __syncthreads();
  float of_all = -INFINITY, factors[PLAIN_WARPS], sum_of_all = 0.0f;
#pragma unroll
  for (int w = 0; w < PLAIN_WARPS; ++w) of_all = fmaxf(of_all, maxima[w]);
#pragma unroll
  for (int w = 0; w < PLAIN_WARPS; ++w) {
    factors[w] = weight_of(maxima[w], of_all);
    sum_of_all = fmaf(factors[w], totals[w], sum_of_all);
  }
  const float factor = normalizer(of_all, sum_of_all, scoring.sinks, head, 1.0f);
  T* to = out + (first_token + row) * out_stride + head * head_dim;
  for (int d = threadIdx.x; d < head_dim; d += PLAIN_WARPS * WARP) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < PLAIN_WARPS; ++w) sum = fmaf(factors[w], sums_of_warps[w * head_dim + d], sum);
    to[d] = from_float<T>(sum * factor);
  }
}

// Grid: rows of the longest sequence, sequences, heads.
// query, out: [num_rows][heads * head_dim]; query_starts: [sequences + 1]; kv_lens: [sequences]; block_tables:
// [num_tables][max_blocks], of the ids of `num_blocks` blocks; table_rows: [sequences], or null (rows, lengths and ids beyond
// are taken for the last, so that no wrong one leaves the memory).
#define ATTENTION(T, KV)                                                                                                       \
  KERNEL(attention_##T##_##KV, PLAIN_WARPS* WARP)                                                                              \
  (const T* query, uint64_t query_stride, const KV* keys, const KV* values, const uint32_t* query_starts,                      \
   const uint32_t* kv_lens, const uint32_t* block_tables, uint32_t max_blocks, const uint32_t* table_rows,                     \
   uint32_t num_tables, uint32_t num_blocks, uint32_t num_rows, uint32_t kv_heads, uint32_t head_dim, float scale,             \
   uint32_t window, float soft_cap, const float* slopes, const float* sinks, T* out, uint64_t out_stride) {                    \
    const Scoring scoring{scale, static_cast<int>(window), soft_cap, slopes, sinks};                                           \
    const BlockTables tables{block_tables, table_rows, max_blocks, num_tables};                                                \
    attend<T, KV>(query, query_stride, keys, values, query_starts, kv_lens, tables, num_blocks, num_rows, kv_heads, head_dim,  \
                  scoring, out, out_stride);                                                                                   \
  }                                                                                                                            \
  EXPORT(attention_##T##_##KV)
#define ATTENTION_TYPES(T) ATTENTION(T, f32) ATTENTION(T, f16) ATTENTION(T, bf16) ATTENTION(T, f8)
ATTENTION_TYPES(f32)
ATTENTION_TYPES(f16)
ATTENTION_TYPES(bf16)
