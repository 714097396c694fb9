// Rows by index.
#include "rows.cuh"

template <class To, class From, int N> __device__ void convert_pack(const From* from, To* to) {
  const Pack<From, N> loaded = load_pack<From, N>(from);
  Pack<To, N> stored;
#pragma unroll
  for (int i = 0; i < N; ++i) stored.at[i] = from_float<To>(to_float(loaded.at[i]));
  store_pack(to, stored);
}

// out[i] = table[ids[i] - first_id], zeros where there is no such row.
template <int N, class From, class To>
__device__ void select_rows(const uint32_t* ids, unsigned first_id, const From* table, unsigned table_stride,
                            unsigned table_rows, unsigned out_stride, To* out, unsigned cols) {
  const size_t row = blockIdx.x;
  // Of an id below the first the difference wraps to one beyond the last.
  const unsigned id = ids[row] - first_id;
  const bool here = id < table_rows;
  const From* from = table + static_cast<size_t>(here ? id : 0) * table_stride;
  To* to = out + row * out_stride;
  if (in_packs<N>(table, table_stride, cols) && in_packs<N>(out, out_stride, cols)) {
    for_packs<N>(cols, [&](unsigned col) {
      if (here) {
        convert_pack<To, From, N>(from + col, to + col);
      } else {
        store_pack(to + col, Pack<To, N>{});
      }
    });
  } else {
    for_cols<N>(cols, [&](unsigned col) { to[col] = from_float<To>(here ? to_float(from[col]) : 0.0f); });
  }
}

// A token that was sampled on the device and that the host has not seen stands in `ids` as the number of its place in
// `last_tokens` with the top bit set.
KERNEL(resolve_ids, 256)
(const uint32_t* ids, unsigned rows, const uint32_t* last_tokens, unsigned num_places, uint32_t* out) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const uint32_t id = ids[row], place = id & 0x7fffffffu;
  out[row] = id == place ? id : place < num_places ? last_tokens[place] : 0;
}
EXPORT(resolve_ids)

#define ROWS_BY_INDEX(T)                                                                                          \
  KERNEL(embedding_##T##_f32, 256)                                                                                \
  (const uint32_t* ids, unsigned first_id, const T* table, unsigned table_stride, unsigned table_rows,            \
   unsigned out_stride, float* out, unsigned cols) {                                                              \
    select_rows<4>(ids, first_id, table, table_stride, table_rows, out_stride, out, cols);                        \
  }                                                                                                               \
  EXPORT(embedding_##T##_f32)                                                                                     \
  KERNEL(gather_rows_##T, 256)                                                                                    \
  (const uint32_t* rows, const T* x, unsigned x_stride, unsigned x_rows, unsigned out_stride, T* out,             \
   unsigned cols) {                                                                                               \
    select_rows<16 / sizeof(T)>(rows, 0u, x, x_stride, x_rows, out_stride, out, cols);                            \
  }                                                                                                               \
  EXPORT(gather_rows_##T)

ROWS_BY_INDEX(f32)
ROWS_BY_INDEX(f16)
ROWS_BY_INDEX(bf16)
