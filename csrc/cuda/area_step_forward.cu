// area_step forward on CUDA: interaction, layer normalisation, relu and pooling of one time step of one area.
//
// Maths (per sample; b_i drives, m_j modulators):
//   additive        z = sum_i b_i + beta_b
//   multiplicative  z = (sum_i b_i + beta_b) * (1 + sum_j m_j + beta_m)
//   mean, var over (H, W, C);  y = (z - mean) * rstd * gamma + beta;  h = max(y, 0);  pooled = max2x2(h) or mean_HW(h)
// Precision: storage T, arithmetic float32; the modulator is rounded to T before it multiplies, so that backward, which reads the stored one,
//   computes the same z again. Moments are of the stored (rounded) z: of each chunk about its own mean, then merged
//   (no E[z^2] - E[z]^2). The 2x2 maximum compares stored states, the first of equal ones and any NaN winning, as in torch.
// Traffic: interact reads each term once and writes z and, if wanted, 1 + m; finish reads z, and once per share of the samples gamma
//   and beta, and writes state and pooled maps. About 12 operations per element, so bound by memory bandwidth.
// Launch shape: interact: a block per chunk of 4 vectors per thread, vectors of 16 bytes. statistics: a block per sample. finish: a
//   thread per 2x2 window and vector of channels, which walks a share of the samples with gamma and beta in registers. mean_pool: a block per sample and 32 vectors, 8 threads to a vector.
// Sync: block_sum only, and mean_pool's exchange.
// Determinism: sums in an order that depends on the shape alone; no atomics.
// Registers: where __launch_bounds__ names two blocks per multiprocessor, ptxas would else keep registers for more of them, and spill.
// Limits: kMaxTerms terms of each kind; H * W * C below 2^31.
#include "cuda/area_step.h"

#include "cuda/area_step_terms.h"
#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // per thread of interact: enough loads on their way to cover the memory's latency
constexpr int kPoolLanes = 32;

// Elements of a chunk.
template <typename T>
constexpr int kChunk = kThreads * kVectors * kWidest<T>;

// 1 + sum of modulators at an element and the N - 1 after it, of one pixel; channel: of the first.
template <int N, typename T>
__device__ __forceinline__ void modulator_at(const AreaStepForwardParams<T>& p, int64_t offset, int channel,
                                             float (&m)[N]) {
  sum_terms(p.modulator, p.num_modulator, p.modulator_bias, p.modulator_complete ? 0.0f : 1.0f, offset, channel, m);
}

template <int N, typename T>
__device__ __forceinline__ void interact_at(const AreaStepForwardParams<T>& p, int64_t offset, int channel,
                                            float (&z)[N]) {
  sum_terms(p.drive, p.num_drive, p.drive_bias, 0.0f, offset, channel, z);
  if (p.num_modulator > 0) {
    float m[N];
    modulator_at(p, offset, channel, m);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      m[j] = rounded<T>(m[j]);  // as backward will read it, which computes z again
      z[j] *= m[j];
    }
    if (p.modulator_sum != nullptr) store(p.modulator_sum + offset, m);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) area_step_interact_kernel(AreaStepForwardParams<T> p) {
  RNNDYN_SHARED(float, sums, kThreads / kWarp);
  RNNDYN_SHARED(float, squares, kThreads / kWarp);
  const int map = p.height * p.width * p.channels;
  const int chunks = p.moment_groups.groups;
  const int64_t n = blockIdx.x / chunks;
  const int chunk = int(blockIdx.x % chunks), first = chunk * kChunk<T>;
  const int count = min(kChunk<T>, map - first);
  constexpr int vectors = kChunk<T> / kThreads / N;
  float z[vectors][N];
  float sum = 0;
  RNNDYN_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const int element = first + (v * kThreads + int(threadIdx.x)) * N;
    if (element < first + count) {
      const int64_t offset = n * map + element;
      interact_at(p, offset, element % p.channels, z[v]);
      store(p.value + offset, z[v]);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) {
        z[v][j] = rounded<T>(z[v][j]);
        sum += z[v][j];
      }
    }
  }
  if (p.moments == nullptr) return;  // no norm
  const float mean = block_sum<kThreads>(sum, sums) / float(count);
  float square = 0;
  RNNDYN_UNROLL
  for (int v = 0; v < vectors; ++v) {
    if (first + (v * kThreads + int(threadIdx.x)) * N < first + count) {
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) square += (z[v][j] - mean) * (z[v][j] - mean);
    }
  }
  square = block_sum<kThreads>(square, squares);
  if (threadIdx.x == 0) {
    p.moments[2 * (n * chunks + chunk)] = mean;
    p.moments[2 * (n * chunks + chunk) + 1] = square;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) area_step_statistics_kernel(AreaStepForwardParams<T> p) {
  RNNDYN_SHARED(float, sums, kThreads / kWarp);
  RNNDYN_SHARED(float, squares, kThreads / kWarp);
  const MomentGroups g = p.moment_groups;
  const int64_t n = blockIdx.x;
  const float total = float(p.height * p.width * p.channels);
  const float* moments = p.moments + 2 * n * g.groups;
  float sum = 0;
  for (int i = int(threadIdx.x); i < g.groups; i += kThreads)
    sum += moments[2 * i] * float(i % g.period == g.period - 1 ? g.last_count : g.count);
  const float mean = block_sum<kThreads>(sum, sums) / total;
  float square = 0;
  for (int i = int(threadIdx.x); i < g.groups; i += kThreads) {
    const float count = float(i % g.period == g.period - 1 ? g.last_count : g.count), shift = moments[2 * i] - mean;
    square += moments[2 * i + 1] + count * shift * shift;
  }
  square = block_sum<kThreads>(square, squares);
  if (threadIdx.x == 0) {
    p.mean[n] = mean;
    p.rstd[n] = 1.0f / sqrtf(square / total + p.eps);
  }
}

// The state at an element of sample n; kNorm: with a norm, whose gamma and beta are those there. Without a value, which an area with no norm
// need not have, it is computed from the terms.
template <int kNorm, int N, typename T>
__device__ __forceinline__ void state_at(const AreaStepForwardParams<T>& p, int64_t n, int element, int channel,
                                         float mean, float rstd, const float (&gamma)[N], const float (&beta)[N],
                                         float (&h)[N]) {
  const int64_t offset = n * p.height * p.width * p.channels + element;
  if (kNorm == 0 && p.value == nullptr) {
    interact_at(p, offset, channel, h);
  } else {
    load(p.value + offset, h);
  }
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) {
    if (kNorm != 0) h[j] = normalised(h[j], mean, rstd, gamma[j], beta[j]);
    h[j] = rounded<T>(p.rectify && h[j] < 0 ? 0.0f : h[j]);  // NaN stays NaN
  }
}

template <typename T>
struct FinishLaunch {
  AreaStepForwardParams<T> p;
  int splits;  // shares of the samples
};

template <typename T, int N, int kNorm>
__global__ void __launch_bounds__(kThreads, 2) area_step_finish_kernel(FinishLaunch<T> l) {
  const AreaStepForwardParams<T>& p = l.p;
  const int groups = p.channels / N, columns = (p.width + 1) / 2, rows = (p.height + 1) / 2;
  const int blocks_per_map = int((int64_t(rows) * columns * groups + kThreads - 1) / kThreads);
  const int window = int(blockIdx.x % blocks_per_map) * kThreads + int(threadIdx.x);
  const int channel = window % groups * N, column = window / groups % columns * 2, row = window / groups / columns * 2;
  if (row >= p.height) return;
  float gamma[4][N], beta[4][N];
  RNNDYN_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int r = row + k / 2, c = column + k % 2;
    if (kNorm == 0 || r >= p.height || c >= p.width) continue;
    load(p.gamma + (r * p.width + c) * p.channels + channel, gamma[k]);
    load(p.beta + (r * p.width + c) * p.channels + channel, beta[k]);
  }
  const bool pools = p.max_pooled != nullptr && row + 1 < p.height && column + 1 < p.width;
  for (int64_t n = blockIdx.x / blocks_per_map; n < p.samples; n += l.splits) {
    const float mean = kNorm != 0 ? p.mean[n] : 0, rstd = kNorm != 0 ? p.rstd[n] : 1;
    float best[N];
    uint8_t where[N] = {};
    fill(best, 0);
    RNNDYN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int r = row + k / 2, c = column + k % 2;
      if (r >= p.height || c >= p.width) continue;
      const int element = (r * p.width + c) * p.channels + channel;
      float h[N];
      state_at<kNorm>(p, n, element, channel, mean, rstd, gamma[k], beta[k], h);
      if (p.state != nullptr) store(p.state + n * p.height * p.width * p.channels + element, h);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) {
        if (k == 0 || h[j] > best[j] || h[j] != h[j]) {
          best[j] = h[j];
          where[j] = uint8_t(k);
        }
      }
    }
    if (!pools) continue;
    const int64_t pooled = ((n * (p.height / 2) + row / 2) * (p.width / 2) + column / 2) * p.channels + channel;
    store(p.max_pooled + pooled, best);
    if (p.argmax != nullptr) store_bytes(p.argmax + pooled, where);
  }
}

template <typename T, int N, int kNorm>
__global__ void __launch_bounds__(kThreads, 2) area_step_mean_pool_kernel(AreaStepForwardParams<T> p) {
  constexpr int parts = kThreads / kPoolLanes;
  RNNDYN_SHARED(float, sums, kThreads* N);
  const int vectors = p.channels / N, blocks_per_sample = (vectors + kPoolLanes - 1) / kPoolLanes;
  const int64_t n = blockIdx.x / blocks_per_sample;
  const int lane = int(threadIdx.x) % kPoolLanes, part = int(threadIdx.x) / kPoolLanes;
  const int channel = (int(blockIdx.x % blocks_per_sample) * kPoolLanes + lane) * N;
  const float mean = kNorm != 0 ? p.mean[n] : 0, rstd = kNorm != 0 ? p.rstd[n] : 1;
  float sum[N];
  fill(sum, 0);
  if (channel < p.channels) {
    for (int pixel = part; pixel < p.height * p.width; pixel += parts) {
      float h[N], gamma[N], beta[N];
      if (kNorm != 0) {
        load(p.gamma + pixel * p.channels + channel, gamma);
        load(p.beta + pixel * p.channels + channel, beta);
      }
      state_at<kNorm>(p, n, pixel * p.channels + channel, channel, mean, rstd, gamma, beta, h);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) sum[j] += h[j];
    }
  }
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) sums[(part * N + j) * kPoolLanes + lane] = sum[j];
  __syncthreads();  // the parts' sums are there
  if (part > 0 || channel >= p.channels) return;
  for (int other = 1; other < parts; ++other) {
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += sums[(other * N + j) * kPoolLanes + lane];
  }
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) sum[j] /= float(p.height * p.width);
  store(p.mean_pooled + n * p.channels + channel, sum);
}

template <typename T, int N, int kNorm>
void launch_outputs(const AreaStepForwardParams<T>& p, Stream stream) {
  const int64_t vectors = p.channels / N;
  const bool modulator_left = p.value == nullptr && p.modulator_sum != nullptr;
  if (p.state != nullptr || p.max_pooled != nullptr || modulator_left) {
    const int64_t windows = int64_t((p.height + 1) / 2) * ((p.width + 1) / 2) * vectors;
    const char* name = "area_step_finish_kernel";
    const int64_t blocks_per_map = ceil_divide(windows, kThreads);
    const int splits =
        splits_of(blocks_per_map, blocks_at_once(area_step_finish_kernel<T, N, kNorm>, name, kThreads, 0), p.samples);
    launch(area_step_finish_kernel<T, N, kNorm>, name, blocks(blocks_per_map * splits, name), kThreads, 0, stream,
           FinishLaunch<T>{p, splits});
  }
  if (p.mean_pooled == nullptr) return;
  AreaStepForwardParams<T> mean = p;
  mean.modulator_sum = nullptr;  // written above
  launch(area_step_mean_pool_kernel<T, N, kNorm>, "area_step_mean_pool_kernel",
         blocks(p.samples * ceil_divide(vectors, kPoolLanes), "area_step_mean_pool_kernel"), kThreads, 0, stream, mean);
}

template <typename T, int N>
void launch_vectors(const AreaStepForwardParams<T>& p, Stream stream) {
  if (p.value != nullptr && !p.value_complete) {
    launch(area_step_interact_kernel<T, N>, "area_step_interact_kernel",
           blocks(p.samples * p.moment_groups.groups, "area_step_interact_kernel"), kThreads, 0, stream, p);
  }
  if (p.gamma != nullptr) {
    launch(area_step_statistics_kernel<T>, "area_step_statistics_kernel",
           blocks(p.samples, "area_step_statistics_kernel"), kThreads, 0, stream, p);
  }
  if (p.gamma != nullptr) return launch_outputs<T, N, 1>(p, stream);
  launch_outputs<T, N, 0>(p, stream);
}

}  // namespace

template <typename T>
MomentGroups area_step_moment_groups(int height, int width, int channels) {
  const int64_t map = int64_t(height) * width * channels;
  const int groups = int(ceil_divide(map, kChunk<T>));
  return {groups, groups, kChunk<T>, int(map - int64_t(groups - 1) * kChunk<T>)};
}

template <typename T>
void launch_area_step_forward(const AreaStepForwardParams<T>& p, Stream stream) {
  if (p.channels % kWidest<T> != 0) return launch_vectors<T, 1>(p, stream);
  require_aligned_terms("area_step", p.drive, p.num_drive);
  require_aligned_terms("area_step", p.modulator, p.num_modulator);
  require_aligned("area_step", p.drive_bias, p.modulator_bias, p.gamma, p.beta, p.value, p.modulator_sum, p.state,
                  p.max_pooled, p.mean_pooled);
  require_aligned_bytes<T>("area_step", p.argmax);
  launch_vectors<T, kWidest<T>>(p, stream);
}

#define RNNDYN_INSTANTIATE(T)                                      \
  template MomentGroups area_step_moment_groups<T>(int, int, int); \
  template void launch_area_step_forward<T>(const AreaStepForwardParams<T>&, Stream);
RNNDYN_INSTANTIATE(float)
RNNDYN_INSTANTIATE(Half)
RNNDYN_INSTANTIATE(BFloat16)

}  // namespace rnndyn::cuda
