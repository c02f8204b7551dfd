// Parameters of the area_step op on CUDA: one time step of one area, or many independent ones stacked as samples.
//
// As csrc/area_step.h, except that maps are stored as T (float, Half, BFloat16) while parameters, statistics and sums over time are
// float. Maps are channels-last and contiguous, [N, H, W, C]. The caller owns every buffer, on one device; a null pointer means
// "absent" or "not wanted". No output may alias an input, except that `value` may be the buffer of drive[0].
#pragma once
#include <cstdint>

namespace rnndyn::cuda {

constexpr int kMaxTerms = 6;

// Moments of groups of adjacent elements of a map, [N, groups, 2]: mean, and sum of squared deviations from it. Groups repeat with a period (the
// column tiles of a convolution, which leaves moments per pixel), all of `count` elements but the period's last.
struct MomentGroups {
  int groups, period, count, last_count;
};

template <typename T>
struct AreaStepForwardParams {
  int64_t samples;
  int height, width, channels;
  int num_drive;
  const T* drive[kMaxTerms];  // [N, H, W, C] each
  const float* drive_bias;    // [C] or null
  int num_modulator;
  const T* modulator[kMaxTerms];  // [N, H, W, C] each
  const float* modulator_bias;    // [C] or null
  bool modulator_complete;        // modulator[0] is 1 + sum already
  bool value_complete;            // value and moments are there already: a fused convolution left them
  const float* gamma;             // [H, W, C] or null: no norm
  const float* beta;              // [H, W, C]
  float eps;
  bool rectify;
  T* value;          // [N, H, W, C], required with a norm
  T* modulator_sum;  // [N, H, W, C] or null
  T* state;          // [N, H, W, C] or null
  T* max_pooled;     // [N, H / 2, W / 2, C] or null
  uint8_t* argmax;   // [N, H / 2, W / 2, C] or null
  T* mean_pooled;    // [N, C] or null
  float* mean;       // [N], required with a norm
  float* rstd;       // [N], required with a norm
  float* moments;    // [N, moment_groups.groups, 2], required with a norm; scratch, or with value_complete an input
  MomentGroups moment_groups;
};

template <typename T>
struct AreaStepBackwardParams {
  int64_t samples;
  int height, width, channels;
  int num_grad_state;
  const T* grad_state[kMaxTerms];  // [N, H, W, C] each, summed
  const T* grad_max_pooled;        // [N, H / 2, W / 2, C] or null
  const uint8_t* argmax;           // [N, H / 2, W / 2, C], required with grad_max_pooled
  const T* grad_mean_pooled;       // [N, C] or null
  bool multiplicative;
  const T* value;  // [N, H, W, C]; multiplicative: null, it is computed again
  int num_drive;
  const T* drive[kMaxTerms];  // [N, H, W, C] each
  const float* drive_bias;    // [C] or null
  const T* modulator_sum;     // [N, H, W, C] or null: it was 1
  const float* mean;          // [N]
  const float* rstd;          // [N]
  const float* gamma;         // [H, W, C] or null: no norm
  const float* beta;          // [H, W, C]
  bool rectify;
  T* grad_drive;          // [N, H, W, C] written, or null
  float* grad_drive_sum;  // [N, H, W, C] added to, or null
  T* grad_modulator;      // [N, H, W, C] written, or null
  float* grad_gamma;      // [H, W, C] added to, required with a norm
  float* grad_beta;       // [H, W, C] added to, required with a norm
  float* sums;            // [N, slots, 2] scratch, required with a norm
  float* affine;          // [splits, 2, H, W, C] scratch, required with a norm
  int slots, splits;      // of AreaStepScratch
};

// Sizes that the launches and their callers must agree on.
template <typename T>
MomentGroups area_step_moment_groups(int height, int width, int channels);

struct AreaStepScratch {
  int slots, splits;
};
template <typename T>
AreaStepScratch area_step_backward_scratch(int64_t samples, int height, int width, int channels);

template <typename T>
void launch_area_step_forward(const AreaStepForwardParams<T>& p, void* stream);
template <typename T>
void launch_area_step_backward(const AreaStepBackwardParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
