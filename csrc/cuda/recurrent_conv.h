// Parameters of the fused recurrent convolution on CUDA, and of its weight gradient.
//
// Maps are channels-last and contiguous, [N, H, W, C], weights [C_out, K, K, C_in], both stored as T (Half, BFloat16); channels are multiples
// of 8 and addresses multiples of 16. The caller owns every buffer, on one device; a null pointer means "absent" or "not wanted".
// No output may alias an input, except that `value` may be the buffer of an `added` or of `drive`: a thread reads what it then writes over.
#pragma once
#include <cstdint>

#include "cuda/area_step.h"

namespace rnndyn::cuda {

constexpr int kMaxConvTerms = 8;

// A linear map of one tensor. With output pixel (h, w) and tap (i, j), it reads the pixel at row
//   convolution: h * stride + i - pad        transposed: (h + pad - i) / stride, where that divides
// and likewise the column. The gradient of a convolution's input is a transposed one of the same stride, and the other way round.
template <typename T>
struct ConvTerm {
  const T* x;       // [N, height, width, channels]
  const T* weight;  // [C_out, kernel, kernel, channels]
  int height, width, channels;
  int kernel, stride, pad;
  bool transposed;
};

// s = sum of the terms + bias + sum of `added`; value = s, or, where there is a drive, value = drive * (1 + s).
template <typename T>
struct RecurrentConvParams {
  int64_t samples;
  int height, width, channels;  // of the output
  int num_terms;                // at least 1
  ConvTerm<T> term[kMaxConvTerms];
  const float* bias;  // [C] or null
  int num_added;
  const T* added[kMaxTerms];  // [N, H, W, C] each
  const T* drive;             // [N, H, W, C] or null
  T* value;                   // [N, H, W, C]
  T* modulator_sum;           // [N, H, W, C] 1 + s, or null; with a drive only
  float* moments;  // [N, recurrent_conv_tiles().moment_groups.groups, 2] of the value, for area_step, or null
};

// The tile of output that a block computes: rows (pixels) and columns (channels); and how it leaves moments.
struct ConvTiles {
  int rows, columns;
  MomentGroups moment_groups;
};
ConvTiles recurrent_conv_tiles(int64_t samples, int height, int width, int channels);

template <typename T>
void launch_recurrent_conv(const RecurrentConvParams<T>& p, void* stream);

// grad_weight[a, i, j, b] = sum over samples and pixels (h, w) of rows[h, w, a] * gathered[h * stride + i - pad, w * stride + j - pad, b].
// Of a convolution, rows are the output's gradient and gathered is the input; of a transposed one, the other way round.
template <typename T>
struct ConvWeightGradParams {
  int64_t samples;
  const T* rows;  // [N, height, width, row_channels]
  int height, width, row_channels;
  const T* gathered;  // [N, gathered_height, gathered_width, gathered_channels]
  int gathered_height, gathered_width, gathered_channels;
  int kernel, stride, pad;
  int splits;          // of recurrent_conv_weight_grad_splits
  float* partial;      // [splits, row_channels, K, K, gathered_channels] scratch; null with one split
  float* grad_weight;  // [row_channels, K, K, gathered_channels] written
};

// Of the current device: as many as keep all of its multiprocessors at work.
template <typename T>
int recurrent_conv_weight_grad_splits(int64_t samples, int height, int width, int row_channels, int gathered_channels,
                                      int kernel);

template <typename T>
void launch_recurrent_conv_weight_grad(const ConvWeightGradParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
