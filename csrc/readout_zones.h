// Parameters of the readout_zones op: where the representations of one time step lie among the zones of a linear
// readout.
//
// Every buffer is owned by the caller, who allocates it; a null pointer means "absent". Rows of [N, D] and [N, C]
// inputs may be strided (strides in elements); within a row elements are contiguous. No output may alias an input,
// except as said at `cosine`.
#pragma once
#include <cstdint>

namespace rnndyn {

template <typename Real>
struct ReadoutZonesParams {
  int64_t samples, dims, classes;  // N, D, C, each at least 1
  int num_threads;
  const Real* representations;  // [N, D], row stride below
  int64_t representation_stride;
  const Real* previous;  // [N, D] the step before, row stride below; or null: `change` becomes NaN
  int64_t previous_stride;
  const Real* log_probs;  // [N, C], row stride below; or null: predictions are those of the logits
  int64_t log_prob_stride;
  const int64_t* labels;         // [N], in [0, C)
  const Real* bias;              // [C] or null
  const Real* weight_norm;       // [C] ||w_c||
  const Real* inverse_distance;  // [C, C] 1 / ||w_c - w_j||, and 0 where that distance is 0
  // In: r . w_c, written by the caller. Out: cosine to w_c.
  Real* cosine;  // [N, C]
  // Outputs, all written.
  int64_t* predicted;       // [N]
  Real* norm;               // [N]
  Real* cos_predicted;      // [N]
  Real* cos_label;          // [N]
  Real* margin;             // [N]
  Real* boundary_distance;  // [N]
  Real* change;             // [N]
};

}  // namespace rnndyn
