// Parameters of the depthwise_conv op: every channel of the result from the few channels of its group, one with a depthwise convolution; forward,
// gradient of the data (the same loop on a dilated map) and gradient of the weight.
//
// Maps are channels-last and contiguous. Output pixel (i, j) sums over taps (u, v) the pixel (step i + u - top, step j + v - left) of the input
// dilated by `dilation` (its pixel (i, j) at (dilation i, dilation j), zeros between and outside). Every buffer is the caller's.
#pragma once
#include <cstdint>

namespace rnndyn {

constexpr int kMaxDepthwiseKernel = 16;

struct DepthwiseShape {
  int64_t samples, channels;  // of the result
  int64_t in_height, in_width, out_height, out_width;
  int kernel_height, kernel_width;
  int step, dilation;
  int top, left;            // zeros before the first row and column
  int group_in, group_out;  // channels of a group in the map (I) and in the result
  int num_threads;
};

template <typename Real>
struct DepthwiseConvParams {
  DepthwiseShape shape;
  const Real* x;       // [N, H, W, C_in]
  const Real* weight;  // [KH, KW, I, C]
  const Real* bias;    // [C] or null
  Real* y;             // [N, H', W', C] written
};

struct SeparableConvParams {
  DepthwiseConvParams<float> depthwise;    // (its y is not used)
  int64_t out_channels, pointwise_stride;  // the stride a multiple of 32
  const float* pointwise;                  // [C, pointwise_stride], zero from out_channels on
  float* y;                                // [N, H', W', out_channels] written
};

template <typename Real>
struct DepthwiseWeightGradParams {
  DepthwiseShape shape;  // dilation 1
  const Real* x;         // [N, H, W, C_in]
  const Real* grad;      // [N, H', W', C]
  Real* grad_weight;     // [KH, KW, I, C] written
};

}  // namespace rnndyn
