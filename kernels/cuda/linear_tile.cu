// Matrix products on tensor cores in tiles: for the experts of a mixture, whose rows lie grouped in one matrix, and for
// linear layers where there is no cuBLASLt.
//
// A block computes HEIGHT rows by 128 outputs, k in steps of 32 elements that a ring of cp.async stages brings into shared
// memory. A row of a step is 64 bytes, four chunks of 16; chunk c of row r lies at c ^ (r / 2 % 4), so that the eight rows
// that ldmatrix reads at once meet all banks. Blocks are laid out for the worst case over experts and leave at once where
// the device's row counts need fewer, so a launch does not depend on the routing and can be captured.

#include "linear.cuh"
#include "mma.cuh"

constexpr int WIDTH = 128;
constexpr int STEP = 32;
constexpr int WARPS = 8;

// What lies between two stages' barriers. Of all heights, the stages fit the 48 KB that need no opting in.
template <int HEIGHT> struct Shape {
  static constexpr int STAGES = HEIGHT == 128 ? 3 : 4;
  static constexpr int WARPS_DOWN = HEIGHT >= 64 ? 2 : 1;
  static constexpr int WARPS_ACROSS = WARPS / WARPS_DOWN;
  // Of a warp, in rows by 16 and outputs by 8.
  static constexpr int DOWN = HEIGHT / WARPS_DOWN / 16;
  static constexpr int ACROSS = WIDTH / WARPS_ACROSS / 8;
  static constexpr int STAGE = (HEIGHT + WIDTH) * STEP;
};

// Rows of a matrix, from `first` up to `end`.
template <class T> struct Rows {
  const T* from;
  size_t stride;
  uint32_t first;
  uint32_t end;
};

// Where element `chunk * 8` of a step's row lies.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * STEP + (chunk ^ ((row / 2) % 4)) * 8; }

// COUNT rows of one step, zeros beyond k and the last row.
template <int COUNT, class T>
__device__ __forceinline__ void load_rows(T* shared, const Rows<T>& rows, uint32_t k, uint32_t at) {
#pragma unroll
  for (int i = 0; i < COUNT * 4; i += WARPS * WARP) {
    const int piece = i + threadIdx.x, row = piece / 4, chunk = piece % 4;
    if (COUNT * 4 < WARPS * WARP && row >= COUNT) continue;
    const bool inside = rows.first + row < rows.end && at + chunk * 8 < k;
    const T* from = rows.from + (inside ? (rows.first + row) * rows.stride + at + chunk * 8 : 0);
    copy_async_16(shared + swizzled(row, chunk), from, inside);
  }
}

template <class T, int HEIGHT> struct TileProduct {
  using S = Shape<HEIGHT>;
  float sums[S::DOWN][S::ACROSS][4];

  __device__ __forceinline__ void run(T* shared, const Rows<T>& x, const Rows<T>& weights, uint32_t k) {
#pragma unroll
    for (int down = 0; down < S::DOWN; ++down) {
#pragma unroll
      for (int across = 0; across < S::ACROSS; ++across) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[down][across][i] = 0.0f;
      }
    }
    const int steps = (k + STEP - 1) / STEP;
#pragma unroll
    for (int step = 0; step < S::STAGES - 1; ++step) load(shared, x, weights, k, step, steps);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<S::STAGES - 2>();
      // What all have waited for is there for all, and all have left the stage that is filled next.
      __syncthreads();
      load(shared, x, weights, k, step + S::STAGES - 1, steps);
      multiply(shared + (step % S::STAGES) * S::STAGE);
    }
    copy_async_wait<0>();
  }

  // A group is committed in any case, so that waiting can count them.
  static __device__ __forceinline__ void load(T* shared, const Rows<T>& x, const Rows<T>& weights, uint32_t k, int step,
                                              int steps) {
    if (step < steps) {
      T* stage = shared + (step % S::STAGES) * S::STAGE;
      load_rows<HEIGHT>(stage, x, k, step * STEP);
      load_rows<WIDTH>(stage + HEIGHT * STEP, weights, k, step * STEP);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void multiply(const T* x) {
    const T* weights = x + HEIGHT * STEP;
    const int lane = lane_id();
#pragma unroll
    for (int chunk = 0; chunk < STEP / 8; chunk += 2) {
      uint32_t a[S::DOWN][4], b[S::ACROSS][2];
#pragma unroll
      for (int down = 0; down < S::DOWN; ++down) {
        ldmatrix_x4(a[down], x + swizzled(first_row() + down * 16 + lane % 16, chunk + lane / 16));
      }
#pragma unroll
      for (int across = 0; across < S::ACROSS; across += 2) {
        uint32_t pair[4];
        const int row = first_output() + across * 8 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(pair, weights + swizzled(row, chunk + lane / 8 % 2));
        b[across][0] = pair[0];
        b[across][1] = pair[1];
        b[across + 1][0] = pair[2];
        b[across + 1][1] = pair[3];
      }
#pragma unroll
      for (int down = 0; down < S::DOWN; ++down) {
#pragma unroll
        for (int across = 0; across < S::ACROSS; ++across) mma_m16n8k16(sums[down][across], a[down], b[across], T());
      }
    }
  }

  static __device__ __forceinline__ int first_row() { return warp_id() / S::WARPS_ACROSS * S::DOWN * 16; }
  static __device__ __forceinline__ int first_output() { return warp_id() % S::WARPS_ACROSS * S::ACROSS * 8; }
};

// The tile `tile` of HEIGHT rows among those of all experts, or none (`end` is 0): all threads find the same.
template <int HEIGHT>
__device__ __forceinline__ void find_tile(const uint32_t* starts, uint32_t num_experts, uint32_t tile, uint32_t& expert,
                                          uint32_t& first, uint32_t& end) {
  uint32_t tiles_before = 0;
  for (uint32_t base = 0; base < num_experts; base += WARP) {
    const uint32_t here = base + lane_id();
    const uint32_t rows = here < num_experts ? starts[here + 1] - starts[here] : 0;
    const uint32_t tiles = (rows + HEIGHT - 1) / HEIGHT;
    uint32_t up_to = tiles;  // Of this lane's expert and those of the lanes before it.
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
      const uint32_t other = __shfl_up_sync(ALL_LANES, up_to, offset);
      if (lane_id() >= offset) up_to += other;
    }
    const unsigned found = __ballot_sync(ALL_LANES, tile < tiles_before + up_to);
    if (found != 0) {
      const int lane = __ffs(found) - 1;
      const uint32_t before = tiles_before + __shfl_sync(ALL_LANES, up_to - tiles, lane);
      expert = base + lane;
      first = starts[expert] + (tile - before) * HEIGHT;
      end = starts[expert + 1];
      return;
    }
    tiles_before += __shfl_sync(ALL_LANES, up_to, WARP - 1);
  }
  expert = first = end = 0;
}

// Blocks: tiles of rows, outputs by WIDTH. `weight`: [num_experts * n, k]. `starts`: of each expert the first of the `rows`,
// and the end of all; null where there is one weight.
template <class T, class OUT, int HEIGHT>
__device__ __forceinline__ void tile_product(const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, const T* weight,
                                             uint32_t stride, uint32_t n, const uint32_t* starts, uint32_t num_experts,
                                             OUT* out, uint32_t out_stride, uint32_t adds) {
  using S = Shape<HEIGHT>;
  uint32_t expert = 0, first = blockIdx.x * HEIGHT, end = rows;
  if (starts != nullptr) find_tile<HEIGHT>(starts, num_experts, blockIdx.x, expert, first, end);
  end = min(end, rows);
  if (first >= end) return;
  const uint32_t first_output = blockIdx.y * WIDTH;
  DYNAMIC_SHARED(T, shared);
  TileProduct<T, HEIGHT> product;
  product.run(shared, {x, x_stride, first, end}, {weight + static_cast<size_t>(expert) * n * stride, stride, first_output, n},
              k);
#pragma unroll
  for (int down = 0; down < S::DOWN; ++down) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = first + product.first_row() + down * 16 + half * 8 + lane_id() / 4;
      if (row >= end) continue;
#pragma unroll
      for (int across = 0; across < S::ACROSS; ++across) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t output = first_output + product.first_output() + across * 8 + lane_id() % 4 * 2 + i;
          if (output < n) {
            put(out + static_cast<size_t>(row) * out_stride + output, product.sums[down][across][half * 2 + i], adds != 0);
          }
        }
      }
    }
  }
}

#define TILE(T, OUT, HEIGHT)                                                                                       \
  KERNEL(linear_tile_##HEIGHT##_##T##_##OUT, WARPS* WARP)                                                          \
  (const T* x, uint32_t x_stride, uint32_t rows, uint32_t k, const T* weight, uint32_t stride, uint32_t n,         \
   const uint32_t* starts, uint32_t num_experts, OUT* out, uint32_t out_stride, uint32_t adds) {                   \
    tile_product<T, OUT, HEIGHT>(x, x_stride, rows, k, weight, stride, n, starts, num_experts, out, out_stride,    \
                                 adds);                                                                            \
  }                                                                                                                \
  EXPORT(linear_tile_##HEIGHT##_##T##_##OUT)

#define TILE_HEIGHTS(T, OUT) \
  TILE(T, OUT, 16)           \
  TILE(T, OUT, 64)           \
  TILE(T, OUT, 128)

TILE_HEIGHTS(bf16, bf16)
TILE_HEIGHTS(bf16, f32)
TILE_HEIGHTS(f16, f16)
TILE_HEIGHTS(f16, f32)
