// Functions that are applied to each element, for the kernels of activations and those that end in one.
#pragma once

#include "common.cuh"

// As `Activation` in ops/activation.rs, in its order.
enum class Activation : uint32_t { Silu, Gelu, GeluTanh, Relu, SquaredRelu };

__device__ __forceinline__ float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::Silu:
      return x / (1.0f + __expf(-x));
    case Activation::Gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::GeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::Relu:
      // Unlike the greater of both, what is not a number stays so.
      return x < 0.0f ? 0.0f : x;
    default: {
      const float positive = x < 0.0f ? 0.0f : x;
      return positive * positive;
    }
  }
}
