// What the kernels of linear layers share: the weights of a launch, and what is done to a sum before it is an output.
#pragma once

#include "common.cuh"

// One of the weights that are multiplied with the same rows: [n, k], rows `stride` elements apart. `scales` (of int8) and
// `bias` are [n] f32 or null.
template <class W> struct Part {
  const W* weight;
  uint32_t stride;
  uint32_t n;
  const float* scales;
  const float* bias;
};

constexpr int MAX_PARTS = 3;

// A kernel's arguments for its parts; those that are not there have n = 0.
#define LINEAR_PART(W, i) \
  const W *weight##i, uint32_t stride##i, uint32_t n##i, const float *scales##i, const float *bias##i
#define LINEAR_PARTS(W) LINEAR_PART(W, 0), LINEAR_PART(W, 1), LINEAR_PART(W, 2)
#define LINEAR_PARTS_GIVEN                                                                                   \
  {                                                                                                          \
    {weight0, stride0, n0, scales0, bias0}, {weight1, stride1, n1, scales1, bias1}, {                        \
      weight2, stride2, n2, scales2, bias2                                                                   \
    }                                                                                                        \
  }

// Where a block works: outputs from `first` on of `part`, whose own first output is column `column` of the result.
template <class W> struct Place {
  Part<W> part;
  uint32_t first;
  uint32_t column;
};

// Each part is covered by tiles of `outputs` of its own, one tile a block.
template <class W> __device__ __forceinline__ Place<W> place_of(const Part<W> (&parts)[MAX_PARTS], uint32_t outputs) {
  uint32_t tile = blockIdx.x, column = 0;
  Place<W> place{parts[0], 0, 0};
  bool found = false;
#pragma unroll
  for (int p = 0; p < MAX_PARTS; ++p) {
    const uint32_t tiles = (parts[p].n + outputs - 1) / outputs;
    if (!found && tile < tiles) {
      place = Place<W>{parts[p], tile * outputs, column};
      found = true;
    }
    tile -= found ? 0 : tiles;
    column += parts[p].n;
  }
  return place;
}

// Writes an output, or adds to it.
template <class OUT> __device__ __forceinline__ void put(OUT* to, float value, bool adds) {
  *to = from_float<OUT>(adds ? to_float(*to) + value : value);
}

// The scale, then the bias, as on the host.
template <class W> __device__ __forceinline__ float finished(const Part<W>& part, uint32_t output, float sum) {
  if (part.scales != nullptr) sum *= part.scales[output];
  if (part.bias != nullptr) sum += part.bias[output];
  return sum;
}
