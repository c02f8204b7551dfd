// norm_step on CUDA, forward: drive, squashed modulator, norm per channel, activation.
//
// Maths: d = sum of drives + bias, m = sum of modulators + bias, s the logistic sigmoid, a the identity or relu, f the activation
//   z = a(d) * 2 s(m);  h = f((z - mean) * rstd * gamma + beta);  mean, rstd over (map, group) per sample, or per channel over all samples
// Precision: storage T, arithmetic float32. d and m are rounded to T before they are used, as backward reads the stored ones; z is not. Moments of a
//   thread's pixels by Welford's recurrence, those of threads, chunks and channels merged by Chan's formula in a fixed order, never E[z^2] - E[z]^2.
// Traffic: with statistics to be taken, each term is read once and the sums written (one term without a bias is its own sum), then the sums are
//   read again and h written; z is made again instead of being kept. Without: each term once, h once. Bound by memory bandwidth.
// Launch shape: a block takes a chunk of pixels and up to 32 vectors of channels; a block of the statistics, a group of a sample.
// Sync: between the levels of a tree over threads, in shared memory; passes are launches.
// Determinism: chunks depend on the shape alone, and no sum's order on the schedule.
// Limits: kMaxNormTerms terms of each kind; the caller checks shapes.
#include "cuda/norm_step_grid.h"

namespace rnndyn::cuda {
namespace {

template <typename T>
struct NormForwardLaunch {
  NormStepForwardParams<T> p;
  NormStepGrid grid;
};

// Of float alone: moments per chunk and channel, and what becomes of them.
template <typename Real>
struct NormStatisticsLaunch {
  NormStepRule rule;
  NormStepGrid grid;
  int groups;            // each a sample's, with channels / groups channels
  const float* moments;  // [samples, chunks, C, 2] mean, sum of squared deviations
  float *mean, *rstd, *variance;
};

// A bias of N channels, or zeros.
template <int N>
__device__ __forceinline__ void load_bias(const float* bias, int channel, float (&x)[N]) {
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) x[j] = bias != nullptr ? bias[channel + j] : 0.0f;
}

// The sum of terms and bias at one element; where it is kept it is written, or, `done`, was.
template <int N, typename T>
__device__ __forceinline__ void load_sum(const T* const (&terms)[kMaxNormTerms], int count, const float (&bias)[N],
                                         T* sum, bool done, int64_t at, float (&x)[N]) {
  if (sum != nullptr && done) return load(sum + at, x);
  fill(x, 0);
  if (count > 0) load(terms[0] + at, x);
  for (int k = 1; k < count; ++k) {
    float y[N];
    load(terms[k] + at, y);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) x[j] += y[j];
  }
  if (sum == nullptr) return;
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) x[j] += bias[j];
  store(sum + at, x);
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) x[j] = rounded<T>(x[j]);
}

template <int N, typename T>
struct NormBiases {
  float drive[N], modulator[N];

  __device__ __forceinline__ NormBiases(const NormStepForwardParams<T>& p, const NormPlace& at) {
    load_bias(p.drive_bias, at.channel, drive);
    load_bias(p.modulator_bias, at.channel, modulator);
  }

  // z of N channels.
  __device__ __forceinline__ void values(const NormStepForwardParams<T>& p, int64_t at, bool done,
                                         float (&z)[N]) const {
    load_sum(p.drive, p.num_drive, drive, p.drive_sum, done, at, z);
    if (p.rule.squash) {
      float m[N];
      load_sum(p.modulator, p.num_modulator, modulator, p.modulator_sum, done, at, m);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) z[j] = norm_value(p.rule, z[j], 2 * sigmoid(m[j]));
    } else {
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) z[j] = norm_value(p.rule, z[j], 1);
    }
  }
};

struct Moments {
  float count, mean, squares;

  // Chan's formula.
  __device__ __forceinline__ void merge(float other_count, float other_mean, float other_squares) {
    if (other_count == 0) return;
    const float total = count + other_count, delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count = total;
  }
};

// Sums where they are kept, and moments of each channel of a chunk.
template <typename T, int N>
__global__ void __launch_bounds__(kNormThreads, 2) norm_step_moments_kernel(NormForwardLaunch<T> l) {
  RNNDYN_SHARED(float, shared, kNormThreads * (2 * N + 1));
  const NormPlace at = norm_place<N>(l.p.rule, l.grid);
  float mean[N], squares[N], count = 0;
  fill(mean, 0);
  fill(squares, 0);
  if (at.active) {
    const NormBiases<N, T> biases(l.p, at);
    for (int i = at.row; i < at.pixels; i += at.rows) {
      float z[N];
      biases.values(l.p, at.first + int64_t(i) * l.p.rule.channels, false, z);
      count += 1;
      const float share = 1.0f / count;
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) {
        const float delta = z[j] - mean[j];
        mean[j] += delta * share;
        squares[j] += delta * (z[j] - mean[j]);
      }
    }
  }
  float* own = shared + int(threadIdx.x) * (2 * N + 1);
  own[2 * N] = count;
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) own[j] = mean[j], own[N + j] = squares[j];
  for (int span = at.rows / 2; span > 0; span /= 2) {
    __syncthreads();  // the other half's moments are there
    if (at.row >= span) continue;
    const float* other = own + span * l.grid.columns * (2 * N + 1);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      Moments m{count, mean[j], squares[j]};
      m.merge(other[2 * N], other[j], other[N + j]);
      own[j] = mean[j] = m.mean, own[N + j] = squares[j] = m.squares;
    }
    own[2 * N] = count = count + other[2 * N];
  }
  if (at.row > 0 || !at.active) return;
  const int64_t cell = (at.sample * l.grid.chunks + at.chunk) * l.p.rule.channels + at.channel;
  store_pairs(l.p.workspace + 2 * cell, mean, squares);
}

constexpr int kStatisticsThreads = 128;

// Mean and 1 / deviation of a group, from its channels' moments in all chunks.
template <typename Real>
__global__ void __launch_bounds__(kStatisticsThreads) norm_step_statistics_kernel(NormStatisticsLaunch<Real> l) {
  RNNDYN_SHARED(float, shared, kStatisticsThreads * 3);
  const int64_t sample = int64_t(blockIdx.x) / l.groups;
  const int group = int(int64_t(blockIdx.x) - sample * l.groups), channels = l.rule.channels,
            width = channels / l.groups;
  Moments m{0, 0, 0};
  for (int64_t entry = int(threadIdx.x); entry < l.grid.chunks * width; entry += kStatisticsThreads) {
    const int64_t chunk = entry / width, left = l.grid.pixels - chunk * l.grid.chunk;
    const int channel = group * width + int(entry - chunk * width);
    float pair[2];
    load(l.moments + 2 * ((sample * l.grid.chunks + chunk) * channels + channel), pair);
    m.merge(float(left < l.grid.chunk ? left : l.grid.chunk), pair[0], pair[1]);
  }
  float* own = shared + int(threadIdx.x) * 3;
  own[0] = m.count, own[1] = m.mean, own[2] = m.squares;
  for (int span = kStatisticsThreads / 2; span > 0; span /= 2) {
    __syncthreads();  // the other half's moments are there
    if (int(threadIdx.x) >= span) continue;
    const float* other = own + span * 3;
    m.merge(other[0], other[1], other[2]);
    own[0] = m.count, own[1] = m.mean, own[2] = m.squares;
  }
  if (threadIdx.x > 0) return;
  const float variance = m.squares / m.count;
  l.mean[blockIdx.x] = m.mean;
  l.rstd[blockIdx.x] = 1.0f / sqrtf(variance + l.rule.eps);
  if (l.variance != nullptr) l.variance[blockIdx.x] = variance;
}

// Norm and activation.
template <typename T, int N>
__global__ void __launch_bounds__(kNormThreads, 2) norm_step_finish_kernel(NormForwardLaunch<T> l) {
  const NormPlace at = norm_place<N>(l.p.rule, l.grid);
  if (!at.active) return;
  const NormBiases<N, T> biases(l.p, at);
  const NormRow<N> row = norm_row<N>(l.p, at);
  const bool summed = l.p.rule.norm == NormKind::kGroup || l.p.rule.norm == NormKind::kBatch;
  for (int i = at.row; i < at.pixels; i += at.rows) {
    const int64_t element = at.first + int64_t(i) * l.p.rule.channels;
    float z[N];
    biases.values(l.p, element, summed, z);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) z[j] = activated(l.p.rule.activation, row.normed(j, z[j]) * row.gamma[j] + row.beta[j]);
    store(l.p.state + element, z);
  }
}

template <typename T, int N>
void launch_vectors(const NormStepForwardParams<T>& p, Stream stream) {
  const NormStepGrid g = norm_step_grid(p.rule, N);
  const NormForwardLaunch<T> l{p, g};
  const int64_t count = g.samples * g.chunks * g.column_blocks;
  if (p.rule.norm == NormKind::kGroup || p.rule.norm == NormKind::kBatch) {
    launch(norm_step_moments_kernel<T, N>, "norm_step_moments_kernel", blocks(count, "norm_step_moments_kernel"),
           kNormThreads, 0, stream, l);
    const int groups = p.rule.norm == NormKind::kGroup ? p.rule.groups : p.rule.channels;
    launch(norm_step_statistics_kernel<float>, "norm_step_statistics_kernel",
           blocks(g.samples * groups, "norm_step_statistics_kernel"), kStatisticsThreads, 0, stream,
           NormStatisticsLaunch<float>{p.rule, g, groups, p.workspace, p.mean, p.rstd, p.variance});
  }
  launch(norm_step_finish_kernel<T, N>, "norm_step_finish_kernel", blocks(count, "norm_step_finish_kernel"),
         kNormThreads, 0, stream, l);
}

}  // namespace

int64_t norm_step_workspace(const NormStepRule& rule) {
  int64_t most = 0;
  for (const int vector : {1, kNormVector}) {
    const NormStepGrid g = norm_step_grid(rule, vector);
    most = g.samples * (g.chunks + 2) > most ? g.samples * (g.chunks + 2) : most;
  }
  return 2 * rule.channels * most;
}

template <typename T>
void launch_norm_step_forward(const NormStepForwardParams<T>& p, Stream stream) {
  bool wide = norm_step_wide<T>(p.rule, p.drive_sum, p.modulator_sum, p.state);
  for (int k = 0; k < kMaxNormTerms; ++k) wide = wide && norm_step_wide<T>(p.rule, p.drive[k], p.modulator[k]);
  if (wide) return launch_vectors<T, kNormVector>(p, stream);
  launch_vectors<T, 1>(p, stream);
}

template void launch_norm_step_forward<float>(const NormStepForwardParams<float>&, Stream);
template void launch_norm_step_forward<Half>(const NormStepForwardParams<Half>&, Stream);
template void launch_norm_step_forward<BFloat16>(const NormStepForwardParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
