// Parameters of the amx_conv op: any convolution or transposed convolution, as matrix products of bfloat16 parts on matrix units, float32, CPU.
//
// Each float32 value is written as the sum of bfloat16 numbers, parts, each the nearest to what the ones before leave. With three parts, six
// products of parts and sums in float32 a result is as precise as float32; with two parts, three products, values have 16 to 17 bits; with one
// it is a bfloat16 convolution with float32 sums.
//
// A convolution is described by what it reads: output pixel (i, j) of a phase's grid sums over taps t the input pixel
// (in_step i + row_t, in_step j + column_t), zero outside the map, times the kernel element index_t. An ordinary convolution has one phase and
// in_step = stride; a transposed one has in_step 1 and stride^2 phases, one for each residue of the output's row and column.
#pragma once
#include <cstdint>

#include "winograd_conv.h"  // GridStrides

namespace rnndyn {

constexpr int kAmxMaxTaps = 128;   // per phase
constexpr int kAmxMaxPhases = 16;  // strides up to 4

struct AmxTap {
  int row, column, index;
};

// The grid of one phase of the result.
struct AmxPhase {
  int64_t height, width;
  int num_taps;
  AmxTap tap[kAmxMaxTaps];
  const uint16_t* packed;  // from amx_pack_weight; or null
  const float* weight;     // then the parameter, of which each thread packs a piece at a time
  float* y;                // [M, height, width, C_out], written, or added to
};

struct AmxConvParams {
  int64_t samples, in_height, in_width, in_channels, out_channels;
  int in_step;
  int parts;  // 1 to 3
  int num_phases, num_threads;
  bool accumulate;  // add to y
  const float* x;   // [M, in_height, in_width, C_in], contiguous
  GridStrides y_strides;
  int64_t out_stride, in_stride;  // of the parameter, where it is not packed ahead
  const AmxPhase* phase;
  const ConvEpilogue* epilogue;  // or null; then the phases' grids are all of y
  void* workspace;               // amx_conv_workspace(...) bytes, scratch, 64-byte aligned
};

// Weights of one phase, in the order in which they are read: [ceil(C_out / 32), ceil(C_in / 32), taps, parts, 2 tiles of 16 rows of 16 pairs].
struct AmxPackParams {
  int64_t out_channels, in_channels;
  int64_t out_stride, in_stride;  // of the parameter, whose kernels are contiguous
  int parts, num_threads;
  int num_taps;
  const AmxTap* tap;
  const float* weight;
  uint16_t* packed;  // amx_packed_size(...) elements, 64-byte aligned
};

// dW[tap][i, o] = sum over samples and the pixels of a grid of x[in_step pixel + tap][i] * grad[pixel][o].
struct AmxWeightGradParams {
  int64_t samples, in_height, in_width, in_channels;  // of x, which taps shift
  int64_t height, width, out_channels;                // of grad
  int in_step, parts, num_threads;
  bool accumulate;  // add to grad_weight
  int num_taps;
  const AmxTap* tap;
  const float* x;      // [M, in_height, in_width, C_in], contiguous
  const float* grad;   // [M, height, width, C_out], contiguous
  float* grad_weight;  // element o * out_stride + i * num_taps + index_t, written or added to
  int64_t out_stride;
  void* workspace;  // amx_weight_grad_workspace(...) bytes, scratch, 64-byte aligned
};

}  // namespace rnndyn
