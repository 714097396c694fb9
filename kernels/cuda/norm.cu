// RMS normalization and layer normalization, a block for each row; of heads, a warp for each. All sums in f32.
#include "common.cuh"

// How many packs of a row each thread keeps in registers; what lies behind them in a wider row is read again.
constexpr int KEPT_PACKS = 4;

// Where a row's elements come from: `load` may store as well, and is called once for each pack, by the thread that later asks
// for it again.
struct Plain {
  const float* x;
  template <int N> __device__ Pack<float, N> load(unsigned col) const { return load_pack<float, N>(x + col); }
  template <int N> __device__ Pack<float, N> again(unsigned col) const { return load_pack<float, N>(x + col); }
};
// residual += x.
template <class T> struct Added {
  float* residual;
  const T* x;
  template <int N> __device__ Pack<float, N> load(unsigned col) const {
    Pack<float, N> sum = load_pack<float, N>(residual + col);
    const Pack<T, N> added = load_pack<T, N>(x + col);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.at[i] += to_float(added.at[i]);
    store_pack(residual + col, sum);
    return sum;
  }
  template <int N> __device__ Pack<float, N> again(unsigned col) const { return load_pack<float, N>(residual + col); }
};

// A row of `cols`, spread over the threads of a block in packs of N.
template <int N, class Source> struct Row {
  Source source;
  unsigned cols;
  Pack<float, N> kept[KEPT_PACKS];

  __device__ unsigned col(int pack) const { return (pack * blockDim.x + threadIdx.x) * N; }

  __device__ void load() {
#pragma unroll
    for (int pack = 0; pack < KEPT_PACKS; ++pack) {
      if (col(pack) < cols) kept[pack] = source.template load<N>(col(pack));
    }
  }
  // `function(col, values)` of each pack. The first time, with `FIRST`, what is not kept is loaded.
  template <bool FIRST, class Function> __device__ void each(Function function) {
#pragma unroll
    for (int pack = 0; pack < KEPT_PACKS; ++pack) {
      if (col(pack) < cols) function(col(pack), kept[pack]);
    }
    for (int pack = KEPT_PACKS; col(pack) < cols; ++pack) {
      const Pack<float, N> values =
          FIRST ? source.template load<N>(col(pack)) : source.template again<N>(col(pack));
      function(col(pack), values);
    }
  }
};

template <int N, class T, class Source>
__device__ void rms_norm_row(Source source, const float* weight, float eps, T* out, unsigned cols, float* scratch) {
  Row<N, Source> row{source, cols};
  row.load();
  float squares = 0.0f;
  row.template each<true>([&](unsigned, const Pack<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) squares += values.at[i] * values.at[i];
  });
  const float scale = rsqrtf(block_sum(squares, scratch) / cols + eps);
  row.template each<false>([&](unsigned col, const Pack<float, N>& values) {
    const Pack<float, N> weights = load_pack<float, N>(weight + col);
    Pack<T, N> normed;
#pragma unroll
    for (int i = 0; i < N; ++i) normed.at[i] = from_float<T>(values.at[i] * scale * weights.at[i]);
    store_pack(out + col, normed);
  });
}

template <int N, class T, class Source>
__device__ void layer_norm_row(Source source, const float* weight, const float* bias, float eps, T* out, unsigned cols,
                               float* scratch) {
  Row<N, Source> row{source, cols};
  row.load();
  float sum = 0.0f;
  row.template each<true>([&](unsigned, const Pack<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += values.at[i];
  });
  const float mean = block_sum(sum, scratch) / cols;
  float squares = 0.0f;
  row.template each<false>([&](unsigned, const Pack<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (values.at[i] - mean) * (values.at[i] - mean);
  });
  const float scale = rsqrtf(block_sum(squares, scratch) / cols + eps);
  row.template each<false>([&](unsigned col, const Pack<float, N>& values) {
    const Pack<float, N> weights = load_pack<float, N>(weight + col);
    Pack<float, N> biases{};
    if (bias != nullptr) biases = load_pack<float, N>(bias + col);
    Pack<T, N> normed;
#pragma unroll
    for (int i = 0; i < N; ++i) normed.at[i] = from_float<T>((values.at[i] - mean) * scale * weights.at[i] + biases.at[i]);
    store_pack(out + col, normed);
  });
}

// Whether each row of `stride` elements from `first` on begins where a pack of 4 may be loaded.
template <class T> __device__ __forceinline__ bool in_fours(const T* first, unsigned stride) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(first) % (4 * sizeof(T)) == 0;
}

template <class T>
__device__ void rms_norm(const float* x, unsigned x_stride, const float* weight, float eps, unsigned out_stride, T* out,
                         unsigned cols) {
  __shared__ float scratch[WARP];
  const size_t row = blockIdx.x;
  const Plain source{x + row * x_stride};
  T* to = out + row * out_stride;
  if (cols % 4 == 0 && in_fours(x, x_stride) && in_fours(weight, 0) && in_fours(out, out_stride)) {
    rms_norm_row<4>(source, weight, eps, to, cols, scratch);
  } else {
    rms_norm_row<1>(source, weight, eps, to, cols, scratch);
  }
}

template <class T>
__device__ void add_rms_norm(unsigned residual_stride, float* residual, const T* x, unsigned x_stride, const float* weight,
                             float eps, unsigned out_stride, T* out, unsigned cols) {
  __shared__ float scratch[WARP];
  const size_t row = blockIdx.x;
  const Added<T> source{residual + row * residual_stride, x + row * x_stride};
  T* to = out + row * out_stride;
  if (cols % 4 == 0 && in_fours(residual, residual_stride) && in_fours(x, x_stride) && in_fours(weight, 0) &&
      in_fours(out, out_stride)) {
    rms_norm_row<4>(source, weight, eps, to, cols, scratch);
  } else {
    rms_norm_row<1>(source, weight, eps, to, cols, scratch);
  }
}

template <class T>
__device__ void layer_norm(const float* x, unsigned x_stride, const float* weight, const float* bias, float eps,
                           unsigned out_stride, T* out, unsigned cols) {
  __shared__ float scratch[WARP];
  const size_t row = blockIdx.x;
  const Plain source{x + row * x_stride};
  T* to = out + row * out_stride;
  if (cols % 4 == 0 && in_fours(x, x_stride) && in_fours(weight, 0) && in_fours(bias, 0) && in_fours(out, out_stride)) {
    layer_norm_row<4>(source, weight, bias, eps, to, cols, scratch);
  } else {
    layer_norm_row<1>(source, weight, bias, eps, to, cols, scratch);
  }
}

template <class T>
__device__ void add_layer_norm(unsigned residual_stride, float* residual, const T* x, unsigned x_stride,
                               const float* weight, const float* bias, float eps, unsigned out_stride, T* out,
                               unsigned cols) {
  __shared__ float scratch[WARP];
  const size_t row = blockIdx.x;
  const Added<T> source{residual + row * residual_stride, x + row * x_stride};
  T* to = out + row * out_stride;
  if (cols % 4 == 0 && in_fours(residual, residual_stride) && in_fours(x, x_stride) && in_fours(weight, 0) &&
      in_fours(bias, 0) && in_fours(out, out_stride)) {
    layer_norm_row<4>(source, weight, bias, eps, to, cols, scratch);
  } else {
    layer_norm_row<1>(source, weight, bias, eps, to, cols, scratch);
  }
}

// A warp for each head of each row, in place.
template <class T>
__device__ void rms_norm_heads(unsigned stride, T* x, const float* weight, float eps, unsigned rows, unsigned heads,
                               unsigned head_dim) {
  constexpr int KEPT = 8;
  const unsigned index = blockIdx.x * (blockDim.x / WARP) + warp_id();
  if (index >= rows * heads) return;
  T* head = x + static_cast<size_t>(index / heads) * stride + index % heads * head_dim;
  float kept[KEPT];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const unsigned at = i * WARP + lane_id();
    kept[i] = at < head_dim ? to_float(head[at]) : 0.0f;
    squares += kept[i] * kept[i];
  }
  for (unsigned at = KEPT * WARP + lane_id(); at < head_dim; at += WARP) {
    squares += to_float(head[at]) * to_float(head[at]);
  }
  const float scale = rsqrtf(warp_sum(squares) / head_dim + eps);
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const unsigned at = i * WARP + lane_id();
    if (at < head_dim) head[at] = from_float<T>(kept[i] * scale * weight[at]);
  }
  for (unsigned at = KEPT * WARP + lane_id(); at < head_dim; at += WARP) {
    head[at] = from_float<T>(to_float(head[at]) * scale * weight[at]);
  }
}

#define NORMS(T)                                                                                                       \
  KERNEL(rms_norm_f32_##T, 1024)                                                                                       \
  (const float* x, unsigned x_stride, const float* weight, float eps, unsigned out_stride, T* out, unsigned cols) {    \
    rms_norm<T>(x, x_stride, weight, eps, out_stride, out, cols);                                                      \
  }                                                                                                                    \
  EXPORT(rms_norm_f32_##T)                                                                                             \
  KERNEL(add_rms_norm_##T, 1024)                                                                                       \
  (unsigned residual_stride, float* residual, const T* x, unsigned x_stride, const float* weight, float eps,           \
   unsigned out_stride, T* out, unsigned cols) {                                                                       \
    add_rms_norm<T>(residual_stride, residual, x, x_stride, weight, eps, out_stride, out, cols);                       \
  }                                                                                                                    \
  EXPORT(add_rms_norm_##T)                                                                                             \
  KERNEL(layer_norm_f32_##T, 1024)                                                                                     \
  (const float* x, unsigned x_stride, const float* weight, const float* bias, float eps, unsigned out_stride, T* out,  \
   unsigned cols) {                                                                                                    \
    layer_norm<T>(x, x_stride, weight, bias, eps, out_stride, out, cols);                                              \
  }                                                                                                                    \
  EXPORT(layer_norm_f32_##T)                                                                                           \
  KERNEL(add_layer_norm_##T, 1024)                                                                                     \
  (unsigned residual_stride, float* residual, const T* x, unsigned x_stride, const float* weight, const float* bias,   \
   float eps, unsigned out_stride, T* out, unsigned cols) {                                                            \
    add_layer_norm<T>(residual_stride, residual, x, x_stride, weight, bias, eps, out_stride, out, cols);               \
  }                                                                                                                    \
  EXPORT(add_layer_norm_##T)                                                                                           \
  KERNEL(rms_norm_heads_##T, 128)                                                                                      \
  (unsigned stride, T* x, const float* weight, float eps, unsigned rows, unsigned heads, unsigned head_dim) {          \
    rms_norm_heads<T>(stride, x, weight, eps, rows, heads, head_dim);                                                  \
  }                                                                                                                    \
  EXPORT(rms_norm_heads_##T)

NORMS(f32)
NORMS(f16)
NORMS(bf16)
