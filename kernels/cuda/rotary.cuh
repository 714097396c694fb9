// Which elements are turned together, and the angles of all positions.
#pragma once

#include "common.cuh"

// As `RotaryPairs` in ops/rotary.rs, in its order.
enum class RotaryPairs : uint32_t { HalfApart, Adjacent };

// f32 [max_position, half] each, row by row.
struct RotaryTables {
  const float* cos;
  const float* sin;
  unsigned stride;
  unsigned max_position;
  unsigned half;
  RotaryPairs pairs;
};

// Of a head's elements those of pair `pair`.
__device__ __forceinline__ void elements_of_pair(const RotaryTables& tables, unsigned pair, unsigned& first,
                                                 unsigned& second) {
  const bool adjacent = tables.pairs == RotaryPairs::Adjacent;
  first = adjacent ? 2 * pair : pair;
  second = adjacent ? 2 * pair + 1 : pair + tables.half;
}
