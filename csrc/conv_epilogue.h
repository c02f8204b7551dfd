// What becomes of a convolution's results as they leave it: the interaction of an area and the statistics of its LayerNorm. A part of the
// winograd_conv and amx_conv ops, float32, CPU.
#pragma once
#include <cstdint>

#include "area_step.h"  // kMaxTerms

namespace rnndyn {

// The result of the convolution is one more drive or, with `modulates`, one more modulator of
//   value = (sum of drives + drive_bias) (1 + sum of modulators + modulator_bias),
// without the second factor where there is no modulator. Every map is [M, H, W, C] and contiguous, and so is the result; none of them overlaps it.
struct ConvEpilogue {
  float* value;  // where the convolution writes its result, and where the value is found after it
  int64_t channels;
  bool modulates;
  int num_drive, num_modulator;  // of the other terms
  const float* drive[kMaxTerms];
  const float* drive_bias;  // [C] or null
  const float* modulator[kMaxTerms];
  const float* modulator_bias;  // [C] or null
  float* modulator_sum;         // 1 + sum of modulators, kept for backward; or null
  // LayerNorm over (H, W, C): of the value, [M] each, written; null: none.
  float* mean;
  float* rstd;
  double eps;
};

}  // namespace rnndyn
