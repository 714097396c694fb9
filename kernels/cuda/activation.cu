// Element-wise activations and sums: a block for a piece of one row, 16 bytes a thread where rows are aligned for it.
#include "activation.cuh"
#include "rows.cuh"

// `function(x)` or, where there is a factor, `function(x) * factor`.
template <class T, int N>
__device__ void apply(Activation activation, const T* x, const T* factor, T* out, unsigned col) {
  const Pack<T, N> from = load_pack<T, N>(x + col);
  Pack<T, N> factors{};
  if (factor != nullptr) factors = load_pack<T, N>(factor + col);
  Pack<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = activated(activation, to_float(from.at[i]));
    to.at[i] = from_float<T>(factor != nullptr ? value * to_float(factors.at[i]) : value);
  }
  store_pack(out + col, to);
}

// Blocks: [rows, pieces of COLS_OF_PIECE columns].
template <class T>
__device__ void gated(Activation activation, const T* gate_up, unsigned gate_up_stride, unsigned out_stride, T* out,
                      unsigned cols) {
  constexpr int N = 16 / sizeof(T);
  const size_t row = blockIdx.x;
  const T* gate = gate_up + row * gate_up_stride;
  T* to = out + row * out_stride;
  if (in_packs<N>(gate_up, gate_up_stride, cols) && in_packs<N>(out, out_stride, cols)) {
    for_packs<N>(cols, [&](unsigned col) { apply<T, N>(activation, gate, gate + cols, to, col); });
  } else {
    for_cols<N>(cols, [&](unsigned col) { apply<T, 1>(activation, gate, gate + cols, to, col); });
  }
}

template <class T>
__device__ void activate(Activation activation, const T* x, unsigned x_stride, unsigned out_stride, T* out, unsigned cols) {
  constexpr int N = 16 / sizeof(T);
  const size_t row = blockIdx.x;
  const T* from = x + row * x_stride;
  T* to = out + row * out_stride;
  if (in_packs<N>(x, x_stride, cols) && in_packs<N>(out, out_stride, cols)) {
    for_packs<N>(cols, [&](unsigned col) { apply<T, N>(activation, from, nullptr, to, col); });
  } else {
    for_cols<N>(cols, [&](unsigned col) { apply<T, 1>(activation, from, nullptr, to, col); });
  }
}

template <class T, int N> __device__ void add_pack(float* x, const T* y) {
  Pack<float, N> sum = load_pack<float, N>(x);
  const Pack<T, N> added = load_pack<T, N>(y);
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] += to_float(added.at[i]);
  store_pack(x, sum);
}

template <class T>
__device__ void add(unsigned x_stride, float* x, const T* y, unsigned y_stride, unsigned cols) {
  constexpr int N = 4;
  const size_t row = blockIdx.x;
  float* to = x + row * x_stride;
  const T* from = y + row * y_stride;
  if (in_packs<N>(x, x_stride, cols) && in_packs<N>(y, y_stride, cols)) {
    for_packs<N>(cols, [&](unsigned col) { add_pack<T, N>(to + col, from + col); });
  } else {
    for_cols<N>(cols, [&](unsigned col) { add_pack<T, 1>(to + col, from + col); });
  }
}

#define ACTIVATIONS(T)                                                                                            \
  KERNEL(gated_##T, 256)                                                                                          \
  (uint32_t activation, const T* gate_up, unsigned gate_up_stride, unsigned out_stride, T* out, unsigned cols) {  \
    gated<T>(static_cast<Activation>(activation), gate_up, gate_up_stride, out_stride, out, cols);                \
  }                                                                                                               \
  EXPORT(gated_##T)                                                                                               \
  KERNEL(activate_##T, 256)                                                                                       \
  (uint32_t activation, const T* x, unsigned x_stride, unsigned out_stride, T* out, unsigned cols) {              \
    activate<T>(static_cast<Activation>(activation), x, x_stride, out_stride, out, cols);                         \
  }                                                                                                               \
  EXPORT(activate_##T)                                                                                            \
  KERNEL(add_f32_##T, 256)                                                                                        \
  (unsigned x_stride, float* x, const T* y, unsigned y_stride, unsigned cols) { add<T>(x_stride, x, y, y_stride, cols); } \
  EXPORT(add_f32_##T)

ACTIVATIONS(f32)
ACTIVATIONS(f16)
ACTIVATIONS(bf16)
