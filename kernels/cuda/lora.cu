// Low-rank changes of linear layers: out[i] += scale * b (a x[i]) with the factors of row i's adapter, which the device alone
// knows; see ops/lora.rs. All forms leave rows without an adapter alone, and blocks that have nothing to do at once, so a
// recorded step serves any rows of any adapters, and costs two empty launches where there are none.
//
// Few rows (decode, as in Punica's BGMV): a block for each element of the hidden rows, a thread for each output. Any element
// type, size and alignment.
//
// More rows (prefill, its SGMV) of 16 bits: tiles of 16 rows on tensor cores. A tile is multiplied once for each adapter that
// its rows have, mostly one: sequences lie side by side. So neither the host nor another kernel has to find segments.

#include "dot.cuh"
#include "linear.cuh"
#include "mma.cuh"

// What an adapter does to one layer, as the host lays it out (ops/lora/cuda.rs). `rank` 0: nothing.
struct Change {
  uint64_t a;  // [rank, k]
  uint64_t b;  // [n, rank]
  uint32_t rank;
  uint32_t a_stride;
  uint32_t b_stride;
  float scale;
};

// Which rows have which, and where what is between the two factors lies: of part p from column p * rank on.
struct Batch {
  const uint32_t* slots;  // [rows]; not below num_adapters: none
  const Change* changes;  // [num_adapters, num_parts]
  uint32_t num_adapters;
  uint32_t num_parts;
  uint32_t rank;  // the greatest, a multiple of 16
  float* hidden;
  uint32_t hidden_stride;

  __device__ __forceinline__ bool has_adapter(uint32_t row) const { return slots[row] < num_adapters; }
  __device__ __forceinline__ const Change& change(uint32_t slot, uint32_t part) const {
    return changes[static_cast<size_t>(slot) * num_parts + part];
  }
  __device__ __forceinline__ float* hidden_row(uint32_t row) const {
    return hidden + static_cast<size_t>(row) * hidden_stride;
  }
};

#define LORA_BATCH                                                                                               \
  const uint32_t *slots, const Change *changes, uint32_t num_adapters, uint32_t num_parts, uint32_t rank, float *hidden, \
      uint32_t hidden_stride
#define LORA_BATCH_GIVEN {slots, changes, num_adapters, num_parts, rank, hidden, hidden_stride}

// Of the layers' outputs side by side, the part that has `column`, which becomes the output within it.
__device__ __forceinline__ uint32_t part_of(uint32_t& column, uint32_t n0, uint32_t n1) {
  uint32_t part = 0;
  if (column >= n0) {
    column -= n0;
    part = 1;
    if (column >= n1) {
      column -= n1;
      part = 2;
    }
  }
  return part;
}

constexpr int SHRINK_THREADS = 128;

// Blocks: rows, columns of the hidden rows.
template <class T>
__device__ __forceinline__ void shrink(const T* x, uint32_t x_stride, uint32_t k, const Batch& batch) {
  constexpr uint32_t N = 16 / sizeof(T);
  __shared__ float scratch[WARP];
  const uint32_t row = blockIdx.x, part = blockIdx.y / batch.rank, output = blockIdx.y % batch.rank;
  if (!batch.has_adapter(row)) return;
  const Change& change = batch.change(batch.slots[row], part);
  if (output >= change.rank) return;
  const T* a = reinterpret_cast<const T*>(change.a) + static_cast<size_t>(output) * change.a_stride;
  const T* from = x + static_cast<size_t>(row) * x_stride;
  const bool packed = is_packed(a, change.a_stride) && is_packed(x, x_stride);
  float sum = 0.0f;
  for (uint32_t at = threadIdx.x * N; at < k; at += SHRINK_THREADS * N) {
    const uint32_t count = min(k - at, N);
    float weights[N], values[N];
    widen(weights, a + at, count, packed);
    widen(values, from + at, count, packed);
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) sum = fmaf(weights[i], values[i], sum);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) batch.hidden_row(row)[blockIdx.y] = sum;
}

constexpr int EXPAND_THREADS = 256;

// Blocks: rows, outputs by EXPAND_THREADS. Factors are loaded 16 bytes at a time where their rows begin there.
template <class T, class OUT>
__device__ __forceinline__ void expand(const Batch& batch, uint32_t n0, uint32_t n1, uint32_t n2, OUT* out,
                                       uint32_t out_stride) {
  constexpr uint32_t N = 16 / sizeof(T);
  const uint32_t row = blockIdx.x, column = blockIdx.y * EXPAND_THREADS + threadIdx.x;
  if (!batch.has_adapter(row) || column >= n0 + n1 + n2) return;
  uint32_t output = column;
  const uint32_t part = part_of(output, n0, n1);
  const Change& change = batch.change(batch.slots[row], part);
  if (change.rank == 0) return;
  const T* b = reinterpret_cast<const T*>(change.b) + static_cast<size_t>(output) * change.b_stride;
  const float* hidden = batch.hidden_row(row) + part * batch.rank;
  const bool packed = is_packed(b, change.b_stride);
  float sum = 0.0f;
  for (uint32_t at = 0; at < change.rank; at += N) {
    const uint32_t count = min(change.rank - at, N);
    float weights[N];
    widen(weights, b + at, count, packed);
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) {
      // Behind the rank there may be anything.
      if (i < count) sum = fmaf(weights[i], hidden[at + i], sum);
    }
  }
  put(out + static_cast<size_t>(row) * out_stride + column, change.scale * sum, true);
}

constexpr uint32_t TILE = 16;
constexpr int TILE_WARPS = 8;

// `function(slot)` for each adapter of the rows of this block's tile, in the order of its first rows: the same for all threads.
template <class Function> __device__ __forceinline__ void for_adapters(const Batch& batch, uint32_t rows, Function function) {
  const uint32_t first = blockIdx.x * TILE, here = min(rows - first, TILE);
  for (uint32_t i = 0; i < here; ++i) {
    if (!batch.has_adapter(first + i)) continue;
    const uint32_t slot = batch.slots[first + i];
    bool is_new = true;
    for (uint32_t before = 0; before < i; ++before) is_new = is_new && batch.slots[first + before] != slot;
    if (is_new) function(slot);
  }
}

// Blocks: rows by TILE, columns of the hidden rows by TILE. The warps deal out k; their sums are added in order. As in
// linear_few.cu, a lane takes 16 consecutive bytes of a row, and both operands have the same order of k.
template <class T>
__device__ __forceinline__ void shrink_tile(const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, const Batch& batch) {
  constexpr uint32_t UNIT = 32, PER_LANE = 8;
  __shared__ float sums[TILE_WARPS][TILE * TILE];
  const uint32_t first = blockIdx.x * TILE, column = blockIdx.y * TILE;
  const uint32_t part = column / batch.rank, first_output = column % batch.rank;
  const uint32_t at_row = lane_id() / 4, at_k = lane_id() % 4 * PER_LANE;
  const T* upper = x + static_cast<size_t>(min(first + at_row, rows - 1)) * x_stride + at_k;
  const T* lower = x + static_cast<size_t>(min(first + at_row + 8, rows - 1)) * x_stride + at_k;
  for_adapters(batch, rows, [&](uint32_t slot) {
    const Change& change = batch.change(slot, part);
    if (first_output >= change.rank) return;
    const T* a[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint32_t output = min(first_output + t * 8 + at_row, change.rank - 1);
      a[t] = reinterpret_cast<const T*>(change.a) + static_cast<size_t>(output) * change.a_stride + at_k;
    }
    float product[2][4] = {};
    for (uint32_t at = warp_id() * UNIT; at < k; at += TILE_WARPS * UNIT) {
      Pack<uint32_t, 4> from_upper{}, from_lower{}, from_a[2]{};
      if (at + at_k < k) {
        from_upper = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(upper + at));
        from_lower = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(lower + at));
#pragma unroll
        for (int t = 0; t < 2; ++t) from_a[t] = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(a[t] + at));
      }
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint32_t left[4] = {from_upper.at[pair], from_lower.at[pair], from_upper.at[pair + 1], from_lower.at[pair + 1]};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t right[2] = {from_a[t].at[pair], from_a[t].at[pair + 1]};
          mma_m16n8k16(product[t], left, right, T());
        }
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp_id()][(at_row + i / 2 * 8) * TILE + t * 8 + lane_id() % 4 * 2 + i % 2] = product[t][i];
      }
    }
    __syncthreads();
    const uint32_t row = first + threadIdx.x / TILE, output = threadIdx.x % TILE;
    if (row < rows && batch.slots[row] == slot && first_output + output < change.rank) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < TILE_WARPS; ++warp) sum += sums[warp][threadIdx.x];
      batch.hidden_row(row)[column + output] = sum;
    }
    __syncthreads();
  });
}

// Of a warp: four columns of mma.
constexpr uint32_t WARP_OUTPUTS = 32;

// Blocks: rows by TILE, outputs of each part by TILE_WARPS * WARP_OUTPUTS.
template <class T, class OUT>
__device__ __forceinline__ void expand_tile(uint32_t rows, const Batch& batch, uint32_t n0, uint32_t n1, uint32_t n2,
                                            OUT* out, uint32_t out_stride) {
  constexpr uint32_t OUTPUTS = TILE_WARPS * WARP_OUTPUTS;
  const uint32_t tiles0 = (n0 + OUTPUTS - 1) / OUTPUTS, tiles1 = (n1 + OUTPUTS - 1) / OUTPUTS;
  uint32_t tile = blockIdx.y;
  const uint32_t part = part_of(tile, tiles0, tiles1);
  const uint32_t n = part == 0 ? n0 : part == 1 ? n1 : n2;
  const uint32_t first_output = tile * OUTPUTS + warp_id() * WARP_OUTPUTS;
  if (first_output >= n) return;
  const uint32_t first = blockIdx.x * TILE, at_row = lane_id() / 4, at_pair = lane_id() % 4 * 2;
  const float* upper = batch.hidden_row(min(first + at_row, rows - 1)) + part * batch.rank;
  const float* lower = batch.hidden_row(min(first + at_row + 8, rows - 1)) + part * batch.rank;
  OUT* const to = out + (part > 0 ? n0 : 0) + (part > 1 ? n1 : 0);
  for_adapters(batch, rows, [&](uint32_t slot) {
    const Change& change = batch.change(slot, part);
    if (change.rank == 0) return;
    float product[4][4] = {};
    for (uint32_t at = 0; at < change.rank; at += 16) {
      uint32_t left[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Ranks are even: a pair is there or not.
        const uint32_t k = at + half * 8 + at_pair;
        if (k < change.rank) {
          left[2 * half] = pack_halves<T>(upper[k], upper[k + 1]);
          left[2 * half + 1] = pack_halves<T>(lower[k], lower[k + 1]);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t output = min(first_output + t * 8 + at_row, n - 1);
        const T* b = reinterpret_cast<const T*>(change.b) + static_cast<size_t>(output) * change.b_stride;
        uint32_t right[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t k = at + half * 8 + at_pair;
          if (k < change.rank) right[half] = *reinterpret_cast<const uint32_t*>(b + k);
        }
        mma_m16n8k16(product[t], left, right, T());
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = first + at_row + half * 8;
      if (row >= rows || batch.slots[row] != slot) continue;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t output = first_output + t * 8 + at_pair + i;
          if (output < n) {
            put(to + static_cast<size_t>(row) * out_stride + output, change.scale * product[t][2 * half + i], true);
          }
        }
      }
    }
  });
}

#define SHRINK(T)                                                                            \
  KERNEL(lora_shrink_##T, SHRINK_THREADS)                                                    \
  (const T* x, uint32_t x_stride, uint32_t k, LORA_BATCH) {                                  \
    shrink<T>(x, x_stride, k, LORA_BATCH_GIVEN);                                             \
  }                                                                                          \
  EXPORT(lora_shrink_##T)

#define EXPAND(T, OUT)                                                                       \
  KERNEL(lora_expand_##T##_##OUT, EXPAND_THREADS)                                            \
  (LORA_BATCH, uint32_t n0, uint32_t n1, uint32_t n2, OUT* out, uint32_t out_stride) {       \
    expand<T, OUT>(LORA_BATCH_GIVEN, n0, n1, n2, out, out_stride);                           \
  }                                                                                          \
  EXPORT(lora_expand_##T##_##OUT)

#define SHRINK_TILE(T)                                                                       \
  KERNEL(lora_shrink_tile_##T, TILE_WARPS* WARP)                                             \
  (const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, LORA_BATCH) {                   \
    shrink_tile<T>(x, x_stride, rows, k, LORA_BATCH_GIVEN);                                  \
  }                                                                                          \
  EXPORT(lora_shrink_tile_##T)

#define EXPAND_TILE(T, OUT)                                                                  \
  KERNEL(lora_expand_tile_##T##_##OUT, TILE_WARPS* WARP)                                     \
  (uint32_t rows, LORA_BATCH, uint32_t n0, uint32_t n1, uint32_t n2, OUT* out, uint32_t out_stride) { \
    expand_tile<T, OUT>(rows, LORA_BATCH_GIVEN, n0, n1, n2, out, out_stride);                \
  }                                                                                          \
  EXPORT(lora_expand_tile_##T##_##OUT)

SHRINK(f32)
SHRINK(f16)
SHRINK(bf16)
EXPAND(f32, f32)
EXPAND(f16, f16)
EXPAND(f16, f32)
EXPAND(bf16, bf16)
EXPAND(bf16, f32)
SHRINK_TILE(f16)
SHRINK_TILE(bf16)
EXPAND_TILE(f16, f16)
EXPAND_TILE(f16, f32)
EXPAND_TILE(bf16, bf16)
EXPAND_TILE(bf16, f32)
