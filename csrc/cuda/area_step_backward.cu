// area_step backward on CUDA.
//
// Maths: g = (sum dh + unpool(dpooled) + dmean / HW) * [y > 0];  dgamma += g * xhat;  dbeta += g;  q = g * gamma
//        dz = rstd * (q - mean(q) - xhat * mean(q * xhat));  db = dz * (1 + m);  dm = dz * b;  without a norm dz = g
// Precision: storage T, arithmetic and all sums float32. g is computed in both passes, not parked: parking would round it to T, and with
//   one or two gradients to sum is no less traffic.
// Traffic: both passes read the gradients and the saved value (or drive and modulator); the second writes dz. Bound by memory bandwidth;
//   gamma and beta are read once per share of the samples.
// Launch shape: sums: a block per (256 vectors of the map, share of the samples), which keeps gamma, beta and their gradients in registers
//   while it walks its samples. affine: a thread per element, over the shares. finish: a block per (2 vectors per thread,
//   share of the samples), likewise.
// Sync: sums needs none: each warp leaves its part of mean(q) and mean(q * xhat). finish: block_sum.
// Determinism: sums in an order that depends on the shape alone; no atomics.
// Registers: where __launch_bounds__ names two blocks per multiprocessor, ptxas would else keep registers for more of them, and spill.
// Limits: kMaxTerms terms of each kind; H * W * C below 2^31.
#include "cuda/area_step.h"

#include "cuda/area_step_terms.h"
#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;              // per thread of finish, whose gamma and beta it keeps in registers
constexpr int64_t kWantedBlocks = 1024;  // of sums: a few per multiprocessor of the largest device

// Where a vector of N elements lies in the map.
struct Place {
  int element, channel, row, column;
};

template <typename T>
__device__ __forceinline__ Place place_of(const AreaStepBackwardParams<T>& p, int element) {
  const int pixel = element / p.channels;
  return {element, element - pixel * p.channels, pixel / p.width, pixel % p.width};
}

// Gradient of the state.
template <int N, typename T>
__device__ __forceinline__ void grad_state_at(const AreaStepBackwardParams<T>& p, int64_t n, const Place& at,
                                              float (&g)[N]) {
  const int64_t offset = n * p.height * p.width * p.channels + at.element;
  sum_terms(p.grad_state, p.num_grad_state, nullptr, 0.0f, offset, 0, g);
  if (p.grad_mean_pooled != nullptr) {
    float x[N];
    load(p.grad_mean_pooled + n * p.channels + at.channel, x);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) g[j] += x[j] / float(p.height * p.width);
  }
  const int row = at.row / 2, column = at.column / 2;
  if (p.grad_max_pooled != nullptr && row < p.height / 2 && column < p.width / 2) {
    const int64_t pooled = ((n * (p.height / 2) + row) * (p.width / 2) + column) * p.channels + at.channel;
    const uint8_t here = uint8_t(at.row % 2 * 2 + at.column % 2);
    float x[N];
    uint8_t where[N];
    load(p.grad_max_pooled + pooled, x);
    load_bytes(p.argmax + pooled, where);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) g[j] += where[j] == here ? x[j] : 0.0f;
  }
}

template <int N, typename T>
__device__ __forceinline__ void drive_at(const AreaStepBackwardParams<T>& p, int64_t offset, int channel,
                                         float (&b)[N]) {
  sum_terms(p.drive, p.num_drive, p.drive_bias, 0.0f, offset, channel, b);
}

// The value before the norm: kept, or computed again and rounded as forward rounded it.
template <int N, typename T>
__device__ __forceinline__ void value_at(const AreaStepBackwardParams<T>& p, int64_t offset, int channel,
                                         float (&z)[N]) {
  if (!p.multiplicative) {
    load(p.value + offset, z);
    return;
  }
  drive_at(p, offset, channel, z);
  if (p.modulator_sum != nullptr) {
    float m[N];
    load(p.modulator_sum + offset, m);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) z[j] *= m[j];
  }
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) z[j] = rounded<T>(z[j]);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) area_step_sums_kernel(AreaStepBackwardParams<T> p) {
  const int map = p.height * p.width * p.channels;
  const int tiles = p.slots / (kThreads / kWarp), tile = int(blockIdx.x % tiles), split = int(blockIdx.x / tiles);
  const int element = (tile * kThreads + int(threadIdx.x)) * N;
  const bool inside = element < map;
  const Place at = place_of(p, inside ? element : 0);
  float gamma[N], beta[N], grad_gamma[N], grad_beta[N];
  fill(grad_gamma, 0);
  fill(grad_beta, 0);
  if (inside) {
    load(p.gamma + element, gamma);
    load(p.beta + element, beta);
  }
  const int slot = tile * (kThreads / kWarp) + int(threadIdx.x) / kWarp;
  for (int64_t n = split; n < p.samples; n += p.splits) {
    float q = 0, qx = 0;
    if (inside) {
      const float mean = p.mean[n], rstd = p.rstd[n];
      float z[N], g[N];
      value_at(p, n * map + element, at.channel, z);
      grad_state_at(p, n, at, g);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) {
        const float xhat = (z[j] - mean) * rstd;
        if (p.rectify && normalised(z[j], mean, rstd, gamma[j], beta[j]) <= 0) g[j] = 0;
        grad_gamma[j] += g[j] * xhat;
        grad_beta[j] += g[j];
        q += g[j] * gamma[j];
        qx += g[j] * gamma[j] * xhat;
      }
    }
    q = warp_sum(q);
    qx = warp_sum(qx);
    if (threadIdx.x % kWarp == 0) {
      p.sums[2 * (n * p.slots + slot)] = q;
      p.sums[2 * (n * p.slots + slot) + 1] = qx;
    }
  }
  if (inside) {
    store(p.affine + (2 * int64_t(split)) * map + element, grad_gamma);
    store(p.affine + (2 * int64_t(split) + 1) * map + element, grad_beta);
  }
}

// A template only so that it has the parameters of its T.
template <typename T>
__global__ void __launch_bounds__(kThreads) area_step_affine_kernel(AreaStepBackwardParams<T> p) {
  const int map = p.height * p.width * p.channels, element = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (element >= map) return;
  float gamma = 0, beta = 0;
  for (int split = 0; split < p.splits; ++split) {
    gamma += p.affine[2 * int64_t(split) * map + element];
    beta += p.affine[(2 * int64_t(split) + 1) * map + element];
  }
  p.grad_gamma[element] += gamma;
  p.grad_beta[element] += beta;
}

// The gradients at N adjacent elements of sample n: of the sum of drives, and of modulators. q, qx: means over the map.
template <int N, typename T>
__device__ __forceinline__ void finish_at(const AreaStepBackwardParams<T>& p, int64_t n, const Place& at, float mean_q,
                                          float mean_qx, const float (&gamma)[N], const float (&beta)[N]) {
  const int64_t offset = n * p.height * p.width * p.channels + at.element;
  float z[N], g[N];
  grad_state_at(p, n, at, g);
  if (p.gamma != nullptr || p.rectify) value_at(p, offset, at.channel, z);
  if (p.gamma != nullptr) {
    const float mean = p.mean[n], rstd = p.rstd[n];
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      const bool masked = p.rectify && normalised(z[j], mean, rstd, gamma[j], beta[j]) <= 0;
      g[j] = rstd * ((masked ? 0.0f : g[j] * gamma[j]) - mean_q - (z[j] - mean) * rstd * mean_qx);
    }
  } else if (p.rectify) {
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) g[j] = z[j] <= 0 ? 0.0f : g[j];
  }
  if (p.multiplicative && p.grad_modulator != nullptr) {
    float b[N];
    drive_at(p, offset, at.channel, b);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) b[j] *= g[j];
    store(p.grad_modulator + offset, b);
  }
  if (p.multiplicative && p.modulator_sum != nullptr) {
    float m[N];
    load(p.modulator_sum + offset, m);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) g[j] *= m[j];
  }
  if (p.grad_drive != nullptr) store(p.grad_drive + offset, g);
  if (p.grad_drive_sum != nullptr) {
    float sum[N];
    load(p.grad_drive_sum + offset, sum);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += g[j];
    store(p.grad_drive_sum + offset, sum);
  }
}

template <typename T>
struct BackwardFinishLaunch {
  AreaStepBackwardParams<T> p;
  int splits;  // shares of the samples
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) area_step_backward_finish_kernel(BackwardFinishLaunch<T> l) {
  const AreaStepBackwardParams<T>& p = l.p;
  RNNDYN_SHARED(float, scratch, kThreads / kWarp);
  RNNDYN_SHARED(float, more_scratch, kThreads / kWarp);
  const int map = p.height * p.width * p.channels;
  constexpr int tile_size = kThreads * kVectors * N;
  const int tiles = (map + tile_size - 1) / tile_size;
  const int first = (int(blockIdx.x % tiles) * kThreads * kVectors + int(threadIdx.x)) * N;
  float gamma[kVectors][N], beta[kVectors][N];
  RNNDYN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int element = first + v * kThreads * N;
    if (p.gamma == nullptr || element >= map) continue;
    load(p.gamma + element, gamma[v]);
    load(p.beta + element, beta[v]);
  }
  for (int64_t n = blockIdx.x / tiles; n < p.samples; n += l.splits) {
    float mean_q = 0, mean_qx = 0;
    if (p.gamma != nullptr) {
      for (int slot = int(threadIdx.x); slot < p.slots; slot += kThreads) {
        mean_q += p.sums[2 * (n * p.slots + slot)];
        mean_qx += p.sums[2 * (n * p.slots + slot) + 1];
      }
      // Two barriers: either scratch is written again, for the next sample, only behind the other one's.
      mean_q = block_sum<kThreads>(mean_q, scratch) / float(map);
      mean_qx = block_sum<kThreads>(mean_qx, more_scratch) / float(map);
    }
    RNNDYN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int element = first + v * kThreads * N;
      if (element < map) finish_at(p, n, place_of(p, element), mean_q, mean_qx, gamma[v], beta[v]);
    }
  }
}

template <typename T, int N>
void launch_vectors(const AreaStepBackwardParams<T>& p, Stream stream) {
  const int64_t map = int64_t(p.height) * p.width * p.channels;
  if (p.gamma != nullptr) {
    launch(area_step_sums_kernel<T, N>, "area_step_sums_kernel",
           blocks(ceil_divide(map, kThreads * N) * p.splits, "area_step_sums_kernel"), kThreads, 0, stream, p);
    launch(area_step_affine_kernel<T>, "area_step_affine_kernel",
           blocks(ceil_divide(map, kThreads), "area_step_affine_kernel"), kThreads, 0, stream, p);
  }
  const char* name = "area_step_backward_finish_kernel";
  const int64_t tiles = ceil_divide(map, kThreads * kVectors * N);
  const int splits =
      splits_of(tiles, blocks_at_once(area_step_backward_finish_kernel<T, N>, name, kThreads, 0), p.samples);
  launch(area_step_backward_finish_kernel<T, N>, name, blocks(tiles * splits, name), kThreads, 0, stream,
         BackwardFinishLaunch<T>{p, splits});
}

}  // namespace

template <typename T>
AreaStepScratch area_step_backward_scratch(int64_t samples, int height, int width, int channels) {
  const int64_t map = int64_t(height) * width * channels;
  const int64_t vector = channels % kWidest<T> == 0 ? kWidest<T> : 1, tiles = ceil_divide(map, kThreads * vector);
  int64_t splits = kWantedBlocks / tiles;
  splits = splits < 1 ? 1 : splits > 64 ? 64 : splits;
  return {int(tiles * (kThreads / kWarp)), int(splits < samples ? splits : samples)};
}

template <typename T>
void launch_area_step_backward(const AreaStepBackwardParams<T>& p, Stream stream) {
  if (p.channels % kWidest<T> != 0) return launch_vectors<T, 1>(p, stream);
  require_aligned_terms("area_step", p.grad_state, p.num_grad_state);
  require_aligned_terms("area_step", p.drive, p.num_drive);
  require_aligned("area_step", p.grad_max_pooled, p.grad_mean_pooled, p.value, p.drive_bias, p.modulator_sum, p.gamma,
                  p.beta, p.grad_drive, p.grad_drive_sum, p.grad_modulator, p.affine);
  require_aligned_bytes<T>("area_step", p.argmax);
  launch_vectors<T, kWidest<T>>(p, stream);
}

#define RNNDYN_INSTANTIATE(T)                                                     \
  template AreaStepScratch area_step_backward_scratch<T>(int64_t, int, int, int); \
  template void launch_area_step_backward<T>(const AreaStepBackwardParams<T>&, Stream);
RNNDYN_INSTANTIATE(float)
RNNDYN_INSTANTIATE(Half)
RNNDYN_INSTANTIATE(BFloat16)

}  // namespace rnndyn::cuda
