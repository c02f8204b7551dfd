// Parameters of the depthwise_conv op on CUDA: every channel by a kernel of its own; forward, gradient of the data (the same kernel on a dilated
// map) and gradient of the weight.
//
// As csrc/depthwise_conv.h, except that maps and kernels are stored as T (float, Half, BFloat16), and bias and the weight's gradient are float32.
// The caller owns every buffer, on one device; no output may alias an input.
#pragma once
#include "../depthwise_conv.h"  // (beside this one, which has the same name)

namespace rnndyn::cuda {

using rnndyn::DepthwiseShape;

template <typename T>
struct DepthwiseConvParams {
  DepthwiseShape shape;
  const T* x;         // [N, H, W, C]
  const T* weight;    // [KH, KW, C]
  const float* bias;  // [C] or null
  T* y;               // [N, H', W', C] written
};

template <typename T>
struct DepthwiseWeightGradParams {
  DepthwiseShape shape;  // dilation 1
  const T* x;            // [N, H, W, C]
  const T* grad;         // [N, H', W', C]
  int splits;
  float* partial;      // [splits, KH, KW, C] scratch; with one split null
  float* grad_weight;  // [KH, KW, C] written
};

// Into how many parts, summed afterwards, the pixels of the weight's gradient are cut, on the current device.
template <typename T>
int depthwise_weight_grad_splits(const DepthwiseShape& shape);

template <typename T>
void launch_depthwise_conv(const DepthwiseConvParams<T>& p, void* stream);
template <typename T>
void launch_depthwise_weight_grad(const DepthwiseWeightGradParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
