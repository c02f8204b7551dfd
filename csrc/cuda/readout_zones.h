// Parameters of the readout_zones op on CUDA: where representations lie among the zones of a linear readout, all time steps in one launch.
//
// Representations are stored as T (float, Half, BFloat16), everything else is float. The caller owns every buffer, on one device; a null
// pointer means "absent". Rows may lie apart (strides in elements); within a row elements are contiguous. No output may alias an input,
// except as said at `cosine`.
#pragma once
#include <cstdint>

namespace rnndyn::cuda {

template <typename T>
struct ReadoutZonesParams {
  int64_t timesteps, samples;  // T, N
  int dims, classes;           // D, C, each at least 1
  const T* representations;    // [T, N, D], strides below
  int64_t time_stride, sample_stride;
  const T* previous;  // [N, D] the step before the first, row stride below; or null: the first `change` becomes NaN
  int64_t previous_stride;
  const float* log_probs;         // [T, N, C], or null: predictions are those of the logits
  const int64_t* labels;          // [N], in [0, C)
  const float* bias;              // [C] or null
  const float* weight_norm;       // [C] ||w_c||
  const float* inverse_distance;  // [C, C] 1 / ||w_c - w_j||, and 0 where that distance is 0
  float* cosine;                  // [T, N, C] in: r . w_c, written by the caller; out: cosine to w_c
  // Outputs, all written, [T, N].
  int64_t* predicted;
  float *norm, *cos_predicted, *cos_label, *margin, *boundary_distance, *change;
};

template <typename T>
void launch_readout_zones(const ReadoutZonesParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
