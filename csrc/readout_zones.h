// Parameters of the readout_zones op: where representations over time lie among the zones of a linear readout.
//
// Every buffer is owned by the caller, who allocates it; a null pointer means "absent". Time steps and rows of inputs
// may be strided (strides in elements); within a row elements are contiguous. No output may alias an input, except as
// said at `cosine`.
#pragma once
#include <cstdint>

namespace rnndyn {

template <typename Real>
struct ReadoutZonesParams {
  int64_t timesteps, samples, dims, classes;  // T, N, D, C, each at least 1
  int num_threads;
  const Real* representations;  // [T, N, D], strides of time and rows below
  int64_t representation_time_stride, representation_stride;
  const Real* previous;  // [N, D] the step before the first, row stride below; or null: its `change` becomes NaN
  int64_t previous_stride;
  const Real* log_probs;  // [T, N, C], strides below; or null: predictions are those of the logits
  int64_t log_prob_time_stride, log_prob_stride;
  const int64_t* labels;         // [N], in [0, C)
  const Real* bias;              // [C] or null
  const Real* weight_norm;       // [C] ||w_c||
  const Real* inverse_distance;  // [C, C] 1 / ||w_c - w_j||, and 0 where that distance is 0
  // float32 only: [C, D], rows contiguous; and scratch for it in the kernel's order, kZonePadding-aligned in C. Null: the
  // caller has written the products r . w_c to `cosine`.
  const Real* weight;  // [C, D]
  Real* packed;        // [ceil(C / kZonePadding) * kZonePadding * D]
  // Out: cosine to w_c. In, where there is no `weight`: r . w_c.
  Real* cosine;  // [T, N, C]
  // Outputs, all written.
  int64_t* predicted;       // [T, N]
  Real* norm;               // [T, N]
  Real* cos_predicted;      // [T, N]
  Real* cos_label;          // [T, N]
  Real* margin;             // [T, N]
  Real* boundary_distance;  // [T, N]
  Real* change;             // [T, N]
};

constexpr int64_t kZonePadding = 16;  // the widest vector has 16 floats

}  // namespace rnndyn
