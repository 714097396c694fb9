// Linear layers for 1 to 16 rows of bf16 or f16: as fast as the weights come from memory.
//
// The weights are mma's left operand and go from global memory straight into its fragments. The order of k within an mma
// is free as long as both operands have the same, so a lane takes 16 consecutive bytes of a row where the fragment asks
// for four scattered pairs; four lanes take 64 bytes of one row, two loads a line of 128. Nothing is staged: a weight is
// used by one warp only, and so is an element of x within a block.
//
// The warps of a block share its outputs and deal out k, a line (`UNIT` elements) at a time; their sums are added in
// order of warps. What a row's result is added up from depends on n and k (by the number of warps) alone, so it is the same
// to the bit for 1 to 16 rows.
//
// Bytes in flight: a lane has 8 (with 64 outputs 16) loads of 16 bytes under way, a warp 4 (8) KB. 4.8 TB/s at 0.8 us are
// 3.8 MB, of an H200's 132 SMs 29 KB each: 8 warps ask for that much, and registers let 16 to 32 be resident.

#include "activation.cuh"
#include "linear.cuh"
#include "mma.cuh"

// A line of a row: what a warp takes of k at once.
constexpr int LINE_BYTES = 128;
using Bytes16 = Pack<uint32_t, 4>;

// 16 bytes of a row of weights, as registers of fragments: `PAIRS` pairs of elements of T.
template <class W, class T> struct Lane {
  static constexpr int PAIRS = 4;
  static __device__ __forceinline__ void widen(uint32_t (&pairs)[PAIRS], const Bytes16& from) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) pairs[i] = from.at[i];
  }
};

// Integers from -128 to 127 are exact in bf16 and f16.
template <class T> struct Lane<i8, T> {
  static constexpr int PAIRS = 8;
  static __device__ __forceinline__ void widen(uint32_t (&pairs)[PAIRS], const Bytes16& from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t biased = from.at[i] ^ 0x80808080u;  // value + 128, unsigned
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // 2^23 + byte, whose lowest byte is the integer: cheaper than a conversion.
        values[j] = __uint_as_float(choose_bytes(biased, 0x4B000000u, 0x7650u + j)) - (8388608.0f + 128.0f);
      }
      pairs[2 * i] = pair(values[0], values[1], T());
      pairs[2 * i + 1] = pair(values[2], values[3], T());
    }
  }
  // The upper halves of floats are exact here.
  static __device__ __forceinline__ uint32_t pair(float low, float high, bf16) {
    return choose_bytes(__float_as_uint(low), __float_as_uint(high), 0x7632u);
  }
  static __device__ __forceinline__ uint32_t pair(float low, float high, f16) { return pack_halves<f16>(low, high); }
};

// The product of TILES * 16 rows of weights with up to COLUMNS * 8 rows of x. Half a line of all of them is a stage; DEPTH
// stages (an even number) are on their way from memory while one is multiplied.
template <class W, class T, int TILES, int COLUMNS, int DEPTH> struct Few {
  static constexpr uint32_t LINE = LINE_BYTES / sizeof(W);
  static constexpr uint32_t HALF = LINE / 2;
  static constexpr uint32_t PER_LANE = 16 / sizeof(W);
  static constexpr int PAIRS = Lane<W, T>::PAIRS;
  static constexpr int X_LOADS = PAIRS / 4;

  struct Stage {
    Bytes16 weights[TILES][2];
    Bytes16 x[COLUMNS][X_LOADS];
  };

  // Where this lane begins in its rows: of a tile, lane / 4 and the one 8 further; of x, lane / 4 of each column.
  const W* weights[TILES][2];
  const T* x[COLUMNS];
  float sums[TILES][COLUMNS][4];

  // Rows of x beyond the last read it; what becomes of them touches no other's sums, and is not written.
  __device__ __forceinline__ void begin(const T* all_x, uint32_t x_stride, uint32_t rows) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const uint32_t row = min(static_cast<uint32_t>(c * 8 + lane_id() / 4), rows - 1);
      x[c] = all_x + static_cast<size_t>(row) * x_stride + lane_id() % 4 * PER_LANE;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][c][i] = 0.0f;
      }
    }
  }

  // Outputs beyond the last are treated alike.
  __device__ __forceinline__ void set_tile(int tile, const Part<W>& part, uint32_t first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t output = min(first + half * 8 + lane_id() / 4, part.n - 1);
      weights[tile][half] = part.weight + static_cast<size_t>(output) * part.stride + lane_id() % 4 * PER_LANE;
    }
  }

  __device__ __forceinline__ void accumulate(uint32_t k) {
    const uint32_t warps = blockDim.x / WARP, warp = warp_id();
    // Whole halves of all lines, of which this warp has those of every `warps`-th line.
    const uint32_t halves = k / HALF, lines = halves / 2;
    const bool is_last = lines % warps == warp;
    const int count = (lines > warp ? (lines - warp - 1) / warps + 1 : 0) * 2 + (is_last ? halves % 2 : 0);
    const uint32_t to_next = warps * LINE;
    uint32_t at = warp * LINE;
    Stage stages[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (d < count) load(stages[d], at + d / 2 * to_next + d % 2 * HALF);
    }
    int done = 0;
    for (; done + 2 * DEPTH <= count; done += DEPTH) {
      at += DEPTH / 2 * to_next;
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        multiply(stages[d]);
        load(stages[d], at + d / 2 * to_next + d % 2 * HALF);
      }
    }
    for (; done < count; done += DEPTH) {
      at += DEPTH / 2 * to_next;
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (done + d < count) multiply(stages[d]);
        if (done + d + DEPTH < count) load(stages[d], at + d / 2 * to_next + d % 2 * HALF);
      }
    }
    if (is_last && k % HALF != 0) {
      load_part(stages[0], halves * HALF, k);
      multiply(stages[0]);
    }
  }

  __device__ __forceinline__ void load(Stage& stage, uint32_t at) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) stage.weights[t][i] = load_once_16(weights[t][i] + at);
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
      for (int i = 0; i < X_LOADS; ++i) stage.x[c][i] = load_x(x[c] + at, i);
    }
  }

  // The lanes within k; zeros in the others.
  __device__ __forceinline__ void load_part(Stage& stage, uint32_t at, uint32_t k) const {
    stage = Stage{};
    if (at + lane_id() % 4 * PER_LANE < k) load(stage, at);
  }

  static __device__ __forceinline__ Bytes16 load_x(const T* from, int index) {
    return load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from) + 4 * index);
  }

  __device__ __forceinline__ void multiply(const Stage& stage) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      uint32_t upper[PAIRS], lower[PAIRS];
      Lane<W, T>::widen(upper, stage.weights[t][0]);
      Lane<W, T>::widen(lower, stage.weights[t][1]);
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair += 2) {
        const uint32_t a[4] = {upper[pair], lower[pair], upper[pair + 1], lower[pair + 1]};
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const Bytes16& from = stage.x[c][pair / 4];
          const uint32_t b[2] = {from.at[pair % 4], from.at[pair % 4 + 1]};
          mma_m16n8k16(sums[t][c], a, b, T());
        }
      }
    }
  }
};

// The sums of a block's warps. Rows of x are padded so that a warp's stores meet no bank twice.
template <int TILES, int COLUMNS> struct Sums {
  static constexpr int OUTPUTS = TILES * 16;
  static constexpr int STRIDE = OUTPUTS + 4;
  static constexpr int PER_WARP = COLUMNS * 8 * STRIDE;

  static __device__ __forceinline__ void store(float* shared, const float (&sums)[TILES][COLUMNS][4]) {
    float* to = shared + warp_id() * PER_WARP;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int output = t * 16 + lane_id() / 4 + (i / 2) * 8, row = c * 8 + (lane_id() % 4) * 2 + i % 2;
          to[row * STRIDE + output] = sums[t][c][i];
        }
      }
    }
  }

  static __device__ __forceinline__ float total(const float* shared, int row, int output) {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / WARP); ++warp) {
      sum += shared[warp * PER_WARP + row * STRIDE + output];
    }
    return sum;
  }
};

// Shared memory is dynamic, `warps * PER_WARP` floats: see few.rs, which chooses the number of warps.
template <class W, class T, class OUT, int TILES, int COLUMNS, int DEPTH>
__device__ __forceinline__ void few(const T* x, uint32_t x_stride, uint32_t rows, uint32_t k,
                                    const Part<W> (&parts)[MAX_PARTS], OUT* out, uint32_t out_stride, uint32_t adds) {
  using Shared = Sums<TILES, COLUMNS>;
  DYNAMIC_SHARED(float, shared);
  const Place<W> place = place_of(parts, Shared::OUTPUTS);
  Few<W, T, TILES, COLUMNS, DEPTH> product;
  product.begin(x, x_stride, rows);
#pragma unroll
  for (int t = 0; t < TILES; ++t) product.set_tile(t, place.part, place.first + t * 16);
  product.accumulate(k);
  Shared::store(shared, product.sums);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < rows * Shared::OUTPUTS; i += blockDim.x) {
    const uint32_t row = i / Shared::OUTPUTS, in_tile = i % Shared::OUTPUTS, output = place.first + in_tile;
    if (output < place.part.n) {
      const float value = finished(place.part, output, Shared::total(shared, row, in_tile));
      put(out + static_cast<size_t>(row) * out_stride + place.column + output, value, adds != 0);
    }
  }
}

// out = activation(gate) * up, for parts 0 (gate) and 1 (up) of one size: half of a block's tiles are of each.
template <class W, class T, int TILES, int COLUMNS, int DEPTH>
__device__ __forceinline__ void few_gated(const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, const Part<W>& gate,
                                          const Part<W>& up, T* out, uint32_t out_stride, uint32_t activation) {
  using Shared = Sums<TILES, COLUMNS>;
  constexpr uint32_t OUTPUTS = Shared::OUTPUTS / 2;
  DYNAMIC_SHARED(float, shared);
  const uint32_t first = blockIdx.x * OUTPUTS;
  Few<W, T, TILES, COLUMNS, DEPTH> product;
  product.begin(x, x_stride, rows);
#pragma unroll
  for (int t = 0; t < TILES / 2; ++t) {
    product.set_tile(t, gate, first + t * 16);
    product.set_tile(TILES / 2 + t, up, first + t * 16);
  }
  product.accumulate(k);
  Shared::store(shared, product.sums);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < rows * OUTPUTS; i += blockDim.x) {
    const uint32_t row = i / OUTPUTS, in_tile = i % OUTPUTS, output = first + in_tile;
    if (output < gate.n) {
      const float gate_value = finished(gate, output, Shared::total(shared, row, in_tile));
      const float up_value = finished(up, output, Shared::total(shared, row, OUTPUTS + in_tile));
      out[static_cast<size_t>(row) * out_stride + output] =
          from_float<T>(activated(static_cast<Activation>(activation), gate_value) * up_value);
    }
  }
}

// linear_few_TILESxCOLUMNS: 16 * TILES outputs a block, up to 8 * COLUMNS rows.
#define FEW(W, T, OUT, TILES, COLUMNS, DEPTH, MAX_WARPS)                                                      \
  KERNEL(linear_few_##TILES##x##COLUMNS##_##T##_##W##_##OUT, MAX_WARPS* WARP)                                  \
  (const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, LINEAR_PARTS(W), OUT* out, uint32_t out_stride,   \
   uint32_t adds) {                                                                                           \
    const Part<W> parts[MAX_PARTS] = LINEAR_PARTS_GIVEN;                                                      \
    few<W, T, OUT, TILES, COLUMNS, DEPTH>(x, x_stride, rows, k, parts, out, out_stride, adds);                \
  }                                                                                                           \
  EXPORT(linear_few_##TILES##x##COLUMNS##_##T##_##W##_##OUT)

#define FEW_GATED(W, T, TILES, COLUMNS, DEPTH)                                                                \
  KERNEL(linear_gated_##TILES##x##COLUMNS##_##T##_##W##_##T, 8 * WARP)                                         \
  (const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, LINEAR_PART(W, 0), LINEAR_PART(W, 1), T* out,     \
   uint32_t out_stride, uint32_t activation) {                                                                \
    const Part<W> gate = {weight0, stride0, n0, scales0, bias0}, up = {weight1, stride1, n1, scales1, bias1}; \
    few_gated<W, T, TILES, COLUMNS, DEPTH>(x, x_stride, rows, k, gate, up, out, out_stride, activation);      \
  }                                                                                                           \
  EXPORT(linear_gated_##TILES##x##COLUMNS##_##T##_##W##_##T)

#define FEW_OUT(W, T, OUT)    \
  FEW(W, T, OUT, 1, 1, 4, 16) \
  FEW(W, T, OUT, 2, 1, 4, 8)  \
  FEW(W, T, OUT, 2, 2, 2, 16) \
  FEW(W, T, OUT, 4, 2, 2, 8)

#define FEW_ALL(W, T)         \
  FEW_OUT(W, T, T)            \
  FEW_OUT(W, T, f32)          \
  FEW_GATED(W, T, 2, 1, 4)    \
  FEW_GATED(W, T, 2, 2, 2)    \
  FEW_GATED(W, T, 4, 2, 2)

FEW_ALL(bf16, bf16)
FEW_ALL(f16, f16)
FEW_ALL(i8, bf16)
FEW_ALL(i8, f16)
