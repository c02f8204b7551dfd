// Activations and their slopes in device code, float32.
#pragma once
#include "../gate_step.h"  // GateActivation
#include "cuda/device.h"

namespace rnndyn::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float rectified(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN

__device__ __forceinline__ float activated(GateActivation activation, float x) {
  switch (activation) {
    case GateActivation::kRelu:
      return rectified(x);
    case GateActivation::kElu:
      return x > 0.0f ? x : expm1f(x);
    case GateActivation::kTanh:
      return tanhf(x);
    default:
      return x;
  }
}

// At x, where the activation is y.
__device__ __forceinline__ float activation_slope(GateActivation activation, float x, float y) {
  switch (activation) {
    case GateActivation::kRelu:
      return x > 0.0f ? 1.0f : 0.0f;
    case GateActivation::kElu:
      return x > 0.0f ? 1.0f : y + 1.0f;
    case GateActivation::kTanh:
      return 1.0f - y * y;
    default:
      return 1.0f;
  }
}

}  // namespace rnndyn::cuda
