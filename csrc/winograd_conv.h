// Parameters of the winograd_conv op: convolutions of stride 1, and sub-pixel phases of stride 2, in the Winograd domain, float32, CPU.
//
// F(m x m, r x r) computes m x m outputs from an a x a patch, a = m + r - 1, with a^2 products per pair of channels in place of (m r)^2.
// Forms: a = 5: F(4, 2), points 0, 1, -1, 2, infinity; a = 6: F(4, 3) and F(2, 5), points 0, +-1, +-2, infinity; a = 8: F(6, 3) and F(4, 5),
// points 0, +-1, +-2, +-1/2, infinity; and F(5, 4) with the same points.
//
// A kernel of 7 x 7 is the sum of four of 4 x 4 or less (7 = 4 + 3), each of which reads the source 4 pixels further on: as terms of one
// convolution, F(5, 4) takes 9 products per output (the short ones vanish at infinity) where there were 49.
//
// A grid is a set of pixels [M, H, W] with their channels adjacent; strides let it be every second pixel of a larger map. That is how a
// transposed convolution of stride 2 is computed: as one convolution on the source's grid for each of its four output phases.
#pragma once
#include <cstdint>

#include "conv_epilogue.h"

namespace rnndyn {

constexpr int kMaxConvTerms = 8;
constexpr int kMaxPhases = 4;
constexpr int kMaxTaps = 25;

// The shape of a tile: patch = a, kernel = r, outputs per side = patch - kernel + 1.
struct WinogradForm {
  int patch, kernel;
};

// In elements; channels are adjacent.
struct GridStrides {
  int64_t sample, row, column;
};

// The frequencies, by row and by column of the patch, at which a transformed kernel is zero because its first or last taps are missing; -1: none.
struct Vanishing {
  int row, column;
};

// Pixels by which a kernel reads below and to the right of where the padding puts it.
struct Shift {
  int row, column;
};

// One summand: the convolution of a grid. Several summands share the inverse transform.
struct WinogradTerm {
  const float* x;  // grid [M, H, W, channels]
  GridStrides strides;
  int64_t channels;
  const float* packed;  // from winograd_pack_weight, [a^2, phases * ceil(C_out / NR), channels, NR]
  Vanishing vanishing;  // with one phase
  Shift shift;
  bool
      by_taps;  // packed has the taps, in the layout of winograd_taps_kernel.h, and is transformed as it is read: kernels of 3
};

struct WinogradConvParams {
  WinogradForm form;
  int pad;  // zero pixels above and to the left of a grid; below and to the right as many as the patches need
  int64_t samples, height, width, out_channels;
  int num_threads;
  int num_terms, num_phases;
  bool accumulate;  // add to y
  WinogradTerm term[kMaxConvTerms];
  float* y[kMaxPhases];             // one grid [M, H, W, C_out] per phase, written, or added to
  Vanishing vanishing[kMaxPhases];  // with several phases
  GridStrides y_strides;
  const ConvEpilogue* epilogue;  // or null
  float* workspace;              // winograd_conv_workspace(...) floats, scratch, 64-byte aligned
};

// Tap (u, v) of phase p is element `tap[p][u * r + v]` of a kernel of the parameter, or zero where that is -1.
struct WinogradPackParams {
  WinogradForm form;
  int num_phases;
  int64_t out_channels, in_channels;
  int64_t out_stride, in_stride;  // of the parameter, whose kernels are contiguous
  int tap[kMaxPhases][kMaxTaps];
  bool by_taps;  // only put in order, not transformed
  int num_threads;
  const float* weight;
  float* packed;
};

struct WinogradWeightGradParams {
  WinogradForm form;
  int pad;
  int64_t samples, height, width, in_channels, out_channels;
  int num_threads;
  bool accumulate;  // add to grad_weight
  int num_phases;
  const float* x;  // grid [M, H, W, C_in]
  GridStrides x_strides;
  Shift shift;                    // of the taps
  const float* grad[kMaxPhases];  // one grid [M, H, W, C_out] per phase
  GridStrides grad_strides;
  float* grad_weight;  // as the parameter; every element of it that is some phase's tap is written, or added to
  int64_t out_stride, in_stride;
  int tap[kMaxPhases][kMaxTaps];
  Vanishing vanishing[kMaxPhases];
  float* workspace;  // winograd_weight_grad_workspace(...) floats, scratch, 64-byte aligned
  float* sums;       // winograd_weight_grad_sums(...) floats, scratch, 64-byte aligned
};

}  // namespace rnndyn
