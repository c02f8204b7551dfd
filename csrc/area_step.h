// Parameters of the area_step op: one time step of one area (or of many independent time steps stacked as samples).
//
// Maps are channels-last and contiguous: [N, H, W, C] at (((n * H + h) * W + w) * C + c).
// Every buffer is owned by the caller, who allocates it; a null pointer means "absent" or "not wanted". Nothing is
// synchronised or allocated across calls. No output may alias an input, except that `value` may be the very buffer of
// drive[0], and `state` that of `value` (each element is read before it is written).
#pragma once
#include <cstdint>

namespace rnndyn {

constexpr int kMaxTerms = 6;

template <typename Real>
struct AreaStepForwardParams {
  int64_t samples, height, width, channels;
  int num_threads;
  // Drive terms, summed; with the multiplicative interaction, the bottom-up ones only.
  int num_drive;
  const Real* drive[kMaxTerms];  // [N, H, W, C] each
  const Real* drive_bias;        // [C] or null
  // Modulator terms of the multiplicative interaction: value = (sum of drives) * (1 + sum of modulators).
  int num_modulator;
  const Real* modulator[kMaxTerms];  // [N, H, W, C] each
  const Real* modulator_bias;        // [C] or null
  bool modulator_complete;           // modulator[0] is 1 + sum already, as a forward pass kept it
  // LayerNorm over (H, W, C) with an affine value per element; gamma == null: no norm.
  const Real* gamma;  // [H, W, C] or null
  const Real* beta;   // [H, W, C] or null
  double eps;
  bool rectify;
  // With a norm: mean and rstd are there already, and so is value, from a convolution's epilogue, and there are no terms; or value is null, and made
  // again from the terms.
  bool complete;
  // Outputs.
  Real* value;          // [N, H, W, C] value before the norm; required with a norm that is not complete, else optional
  Real* modulator_sum;  // [N, H, W, C] 1 + sum of modulators, kept for backward; or null
  Real* state;          // [N, H, W, C] after norm and relu, or null
  Real* max_pooled;     // [N, H / 2, W / 2, C] 2x2 maximum of the state, or null
  uint8_t* argmax;      // [N, H / 2, W / 2, C] position 2 * (row % 2) + (column % 2) of the first maximum, or null
  Real* mean_pooled;    // [N, C] mean of the state over the map, or null
  Real* mean;           // [N] of value over (H, W, C); required with a norm
  Real* rstd;           // [N] 1 / sqrt(variance + eps); required with a norm
};

template <typename Real>
struct AreaStepBackwardParams {
  int64_t samples, height, width, channels;
  int num_threads;
  // Gradients of the outputs; those absent count as zero.
  int num_grad_state;
  const Real* grad_state[kMaxTerms];  // [N, H, W, C] each, summed
  const Real* grad_max_pooled;        // [N, H / 2, W / 2, C] or null
  const uint8_t* argmax;              // [N, H / 2, W / 2, C], required with grad_max_pooled
  const Real* grad_mean_pooled;       // [N, C] or null
  // What the forward pass kept. Additive: value. Multiplicative: the drive terms and the modulator (null: it was 1).
  bool multiplicative;
  const Real* value;  // [N, H, W, C]
  int num_drive;
  const Real* drive[kMaxTerms];  // [N, H, W, C] each
  const Real* drive_bias;        // [C] or null
  const Real* modulator_sum;     // [N, H, W, C] or null
  const Real* mean;              // [N]
  const Real* rstd;              // [N]
  const Real* gamma;             // [H, W, C] or null: no norm
  const Real* beta;              // [H, W, C]
  bool rectify;
  // Outputs. grad_drive is also the scratch of the two-phase norm, so it is required with a norm.
  Real* grad_drive;      // [N, H, W, C] written; required with a norm
  Real* grad_drive_sum;  // [N, H, W, C] added to, or null: for drives used at several time steps
  Real* grad_modulator;  // [N, H, W, C] written, or null; multiplicative only
  Real* grad_gamma;      // [H, W, C] added to; required with a norm
  Real* grad_beta;       // [H, W, C] added to; required with a norm
  double* partial;       // [N, num_chunks(H, W, C), 2] scratch; required with a norm
};

// (static: a copy per instruction set, see cpu/kernels.h.) Rows of a map are grouped into chunks of an even number of rows, by shape alone: statistics are summed per chunk and
// the chunks in order, so a result does not depend on the number of threads.
static inline int64_t rows_per_chunk(int64_t width, int64_t channels) {
  const int64_t row = width * channels;
  const int64_t rows = row > 0 ? 8192 / row : 1;
  return rows < 2 ? 2 : rows - rows % 2;
}
static inline int64_t num_chunks(int64_t height, int64_t width, int64_t channels) {
  const int64_t rows = rows_per_chunk(width, channels);
  return (height + rows - 1) / rows;
}

}  // namespace rnndyn
