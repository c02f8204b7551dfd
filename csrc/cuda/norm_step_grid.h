// What the two passes of norm_step share: how threads take a map, the value before the norm, and sums over a block's rows of threads.
#pragma once
#include "cuda/activations.h"
#include "cuda/device.h"
#include "cuda/norm_step.h"

namespace rnndyn::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormVector = 4;              // 16 bytes of float, 8 of halves
constexpr int kNormPixelsPerThread = 8;     // at least, where there are so many
constexpr int kNormMostPerThread = 256;     // a sum of more of them in float32 would lose what matters
constexpr int64_t kNormWantedChunks = 512;  // from which on chunks grow instead

inline NormStepGrid norm_step_grid(const NormStepRule& r, int vector) {
  NormStepGrid g{};
  const bool per_sample = r.norm == NormKind::kGroup;
  g.samples = per_sample ? r.samples : 1;
  g.pixels = per_sample ? r.pixels : r.samples * r.pixels;
  const int64_t vectors = ceil_divide(r.channels, vector);
  g.columns = 1;
  while (g.columns < kWarp && g.columns < vectors) g.columns *= 2;
  g.column_blocks = int(ceil_divide(vectors, g.columns));
  const int64_t rows = kNormThreads / g.columns, wanted = ceil_divide(g.pixels, kNormWantedChunks * rows);
  const int64_t each = wanted < kNormPixelsPerThread ? kNormPixelsPerThread
                       : wanted > kNormMostPerThread ? kNormMostPerThread
                                                     : wanted;
  g.chunk = int(rows * each);
  g.chunks = ceil_divide(g.pixels, g.chunk);
  return g;
}

// Where a thread works: pixels row, row + rows, ... of a chunk, N channels from `channel` on.
struct NormPlace {
  int64_t sample, chunk, first;  // first: element of the chunk's first pixel, at `channel`
  int pixels, rows, row, channel;
  bool active;  // the channels are some
};

template <int N>
__device__ __forceinline__ NormPlace norm_place(const NormStepRule& r, const NormStepGrid& g) {
  const int64_t block = int64_t(blockIdx.x) / g.column_blocks;
  const int column_block = int(int64_t(blockIdx.x) - block * g.column_blocks);
  NormPlace at;
  at.sample = block / g.chunks;
  at.chunk = block - at.sample * g.chunks;
  at.rows = kNormThreads / g.columns;
  at.row = int(threadIdx.x) / g.columns;
  at.channel = (column_block * g.columns + int(threadIdx.x) - at.row * g.columns) * N;
  at.active = at.channel < r.channels;
  const int64_t pixel = at.chunk * g.chunk, left = g.pixels - pixel;
  at.pixels = int(left < g.chunk ? left : g.chunk);
  at.first = (at.sample * g.pixels + pixel) * r.channels + at.channel;
  return at;
}

// Statistics and affine values of N channels; without a norm those that change nothing.
template <int N>
struct NormRow {
  float mean[N], rstd[N], gamma[N], beta[N];

  __device__ __forceinline__ float normed(int j, float z) const { return (z - mean[j]) * rstd[j]; }
};

// Of one channel: where its statistics are.
__device__ __forceinline__ int64_t norm_statistic(const NormStepRule& r, int64_t sample, int channel) {
  return r.norm == NormKind::kGroup ? sample * r.groups + channel / (r.channels / r.groups) : channel;
}

template <int N, typename P>
__device__ __forceinline__ NormRow<N> norm_row(const P& p, const NormPlace& at) {
  NormRow<N> row;
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) {
    row.mean[j] = row.beta[j] = 0, row.rstd[j] = row.gamma[j] = 1;
    if (p.rule.norm == NormKind::kNone) continue;
    const int64_t k = norm_statistic(p.rule, at.sample, at.channel + j);
    row.mean[j] = p.mean[k], row.rstd[j] = p.rstd[k];
    row.gamma[j] = p.gamma[at.channel + j], row.beta[j] = p.beta[at.channel + j];
  }
  return row;
}

// The value before the norm; factor: what the drive is multiplied with.
__device__ __forceinline__ float norm_value(const NormStepRule& r, float drive, float factor) {
  return (r.rectify_drive ? rectified(drive) : drive) * factor;
}

// Where threads side by side along channels have one row of N numbers each, kFields of them: those of all rows, added to row 0 in a tree whose
// form depends on the number of rows alone.
template <int N, int kFields>
__device__ __forceinline__ void add_rows(const NormPlace& at, float* shared, float (&x)[kFields][N]) {
  constexpr int kSize = N * kFields;
  float* own = shared + int(threadIdx.x) * kSize;
  const int columns = kNormThreads / at.rows;
  RNNDYN_UNROLL
  for (int k = 0; k < kSize; ++k) own[k] = x[k / N][k % N];
  for (int span = at.rows / 2; span > 0; span /= 2) {
    __syncthreads();  // the other half's sums are there
    if (at.row >= span) continue;
    const float* other = own + span * columns * kSize;
    RNNDYN_UNROLL
    for (int k = 0; k < kSize; ++k) own[k] += other[k];
  }
  RNNDYN_UNROLL
  for (int k = 0; k < kSize; ++k) x[k / N][k % N] = own[k];
}

// Pairs (a, b) of N channels, side by side in memory.
template <int N>
__device__ __forceinline__ void store_pairs(float* to, const float (&a)[N], const float (&b)[N]) {
  float pairs[2 * N];
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) pairs[2 * j] = a[j], pairs[2 * j + 1] = b[j];
  store(to, pairs);
}

// Whether every buffer of maps lets threads take kNormVector channels at once.
template <typename T, typename... Pointers>
bool norm_step_wide(const NormStepRule& r, Pointers... pointers) {
  constexpr uintptr_t bytes = kNormVector * sizeof(T);
  return r.channels % kNormVector == 0 && ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

}  // namespace rnndyn::cuda
