// Parameters of the norm_step op: one time step of an area with a squashed modulator, a norm with an affine value per channel, or an activation
// beyond relu (or of many independent time steps stacked as samples, where the norm does not join samples).
//
// Maps are channels-last and contiguous: [N, P, C] with P = H * W pixels. Every buffer is owned by the caller, who allocates it; a null pointer
// means "absent" or "not wanted". No output may alias an input, except that `drive_sum` may be the very buffer of drive[0] and `modulator_sum`
// that of modulator[0], and, backward, `grad_drive` that of `drive` and `grad_modulator` that of `modulator`: each element is read before it
// is written.
#pragma once
#include <cstdint>

#include "gate_step.h"  // GateActivation

namespace rnndyn {

constexpr int kMaxNormTerms = 6;

// kGroup: over the map and a group of channels, per sample; kBatch: per channel over samples and map; kFixed: given mean and rstd per channel.
enum class NormKind : int { kNone, kGroup, kBatch, kFixed };

struct NormStepShape {
  int64_t samples, pixels, channels, groups;
  NormKind norm;
  GateActivation activation;
  bool rectify_drive, squash;  // squash: times 2 s(modulator)
  double eps;
  int num_threads;
};

template <typename Real>
struct NormStepForwardParams {
  NormStepShape shape;
  int num_drive, num_modulator;             // no drive at all counts as zero
  const Real* drive[kMaxNormTerms];         // [N, P, C] each
  const Real* modulator[kMaxNormTerms];     // [N, P, C] each; with squash at least one, or a bias
  const Real *drive_bias, *modulator_bias;  // [C] or null
  const Real *gamma, *beta;                 // [C], with a norm
  Real *drive_sum, *modulator_sum;          // [N, P, C] or null: the sums, with biases, for the backward pass
  Real* state;                              // [N, P, C]
  Real *mean, *rstd;                        // [N, groups] or [C] written; kFixed: [C] read
  Real* variance;                           // [C] biased, kBatch only, or null
  double* workspace;                        // norm_step_workspace(...) doubles, scratch
};

template <typename Real>
struct NormStepBackwardParams {
  NormStepShape shape;
  const Real* grad_state;             // [N, P, C]
  const Real *drive, *modulator;      // [N, P, C] sums, as the forward pass kept them; drive null: zero
  const Real *gamma, *beta;           // [C]
  const Real *mean, *rstd;            // as the forward pass made them
  Real *grad_drive, *grad_modulator;  // [N, P, C] written, or null
  Real *grad_gamma, *grad_beta;       // [C] written; with a norm
  // [C] written, or null: the sums over samples and pixels of the gradients of drive and modulator. With a drive, and with squash.
  Real *grad_drive_bias, *grad_modulator_bias;
  double* workspace;  // norm_step_workspace(...) doubles, scratch
};

}  // namespace rnndyn
