// Block tables that stay in device memory, and what is new in them.
#include "common.cuh"

// As `Run` in ops/attention/tables.rs: entries `first .. first + len` of row `row` are `ids[from ..]`.
struct Run {
  uint32_t row;
  uint32_t first;
  uint32_t len;
  uint32_t from;
};

// A block for each run. tables: [num_rows][stride]; the host has seen to it that runs lie within tables and ids.
KERNEL(block_tables_append, 128)
(const Run* runs, const uint32_t* ids, uint32_t* tables, uint32_t stride) {
  const Run run = runs[blockIdx.x];
  uint32_t* to = tables + static_cast<size_t>(run.row) * stride + run.first;
  for (uint32_t i = threadIdx.x; i < run.len; i += blockDim.x) to[i] = ids[run.from + i];
}
EXPORT(block_tables_append)
