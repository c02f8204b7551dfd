// Parameters of the norm_step op on CUDA: one time step of an area with a squashed modulator, a norm with an affine value per channel, or an
// activation beyond relu.
//
// As csrc/norm_step.h (norms, activations, which buffers may be the same), except that maps are stored as T (float, Half, BFloat16) and
// everything else is float32. Maps are channels-last and contiguous, [N, P, C] with P = H * W pixels. The caller owns every buffer, on one device;
// a null pointer means "absent" or "not wanted".
#pragma once
#include "../norm_step.h"  // (beside this one, which has the same name)

namespace rnndyn::cuda {

using rnndyn::GateActivation;
using rnndyn::kMaxNormTerms;
using rnndyn::NormKind;

// How threads share a map: a block takes a chunk of pixels of a sample and some channels. Where statistics do not belong to a sample, all pixels
// of the batch count as one sample's.
struct NormStepGrid {
  int64_t samples, pixels;
  int columns;        // threads side by side along channels, a power of two up to 32
  int column_blocks;  // that take all channels
  int chunk;          // pixels
  int64_t chunks;     // of a sample
};

struct NormStepRule {
  int64_t samples, pixels;
  int channels, groups;  // groups: of channels, with NormKind::kGroup
  NormKind norm;
  GateActivation activation;
  bool rectify_drive, squash;  // squash: times 2 s(modulator)
  float eps;
};

template <typename T>
struct NormStepForwardParams {
  NormStepRule rule;
  int num_drive, num_modulator;              // no drive at all counts as zero
  const T* drive[kMaxNormTerms];             // [N, P, C] each
  const T* modulator[kMaxNormTerms];         // [N, P, C] each; with squash at least one
  const float *drive_bias, *modulator_bias;  // [C] or null
  const float *gamma, *beta;                 // [C], with a norm
  T *drive_sum, *modulator_sum;              // [N, P, C], required with several terms or a bias
  T* state;                                  // [N, P, C]
  float *mean, *rstd;                        // [N, groups] or [C] written; kFixed: [C] read
  float* variance;                           // [C] biased, kBatch only, or null
  float* workspace;                          // norm_step_workspace(...) floats, scratch
};

template <typename T>
struct NormStepBackwardParams {
  NormStepRule rule;
  const T* grad_state;             // [N, P, C]
  const T *drive, *modulator;      // [N, P, C] sums, as the forward pass kept them; drive null: zero
  const float *gamma, *beta;       // [C]
  const float *mean, *rstd;        // as the forward pass made them
  T *grad_drive, *grad_modulator;  // [N, P, C] written, or null
  float *grad_gamma, *grad_beta;   // [C] written; with a norm
  float* workspace;                // norm_step_workspace(...) floats, scratch
};

// Floats of scratch that either pass takes.
int64_t norm_step_workspace(const NormStepRule& rule);

template <typename T>
void launch_norm_step_forward(const NormStepForwardParams<T>& p, void* stream);
template <typename T>
void launch_norm_step_backward(const NormStepBackwardParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
