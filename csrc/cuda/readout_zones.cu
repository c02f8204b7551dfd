// readout_zones on CUDA: norm, change, predicted class, margin, boundary distance and cosines of representations, a warp per sample and step.
//
// Maths (per row; l_c = w_c . r + b_c, the products w_c . r given):
//   p = argmax_c l_c, or of the log-probabilities where given; the first on ties
//   norm = ||r||;  change = ||r - previous||;  cosine_c = w_c . r / (||w_c|| ||r||), 0 where a norm is 0
//   margin = l_p - max_{j != p} l_j;  boundary_distance = min_{j != p} (l_p - l_j) / ||w_p - w_j||
// Precision: float32.
// Traffic: reads r and the products once; previous and the [C, C] table's row come from L2 (the rows of one step lie together); writes
//   the cosines over the products. Bound by memory bandwidth.
// Launch shape: 8 warps to a block, one row each; lanes walk D in vectors of 16 bytes, then C.
// Sync: one __syncwarp, between the last reads of the products and the writes over them.
// Determinism: no sum crosses rows; shuffles in one order.
// Limits: the caller checks shapes, labels and strides. A row with NaN gets class 0 and a NaN norm.
#include "cuda/readout_zones.h"

#include <limits>

#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ __forceinline__ float warp_min(float x) {
  RNNDYN_UNROLL
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x = fminf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// The first of the largest entries; 0 if none compares.
__device__ __forceinline__ int first_argmax(const float* scores, const float* bias, int classes, int lane) {
  float best = -kInfinity;
  int where = classes;
  for (int c = lane; c < classes; c += kWarp) {
    const float score = bias != nullptr ? scores[c] + bias[c] : scores[c];
    if (score > best || (score == best && c < where)) best = score, where = c;
  }
  RNNDYN_UNROLL
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, bits);
    const int there = __shfl_xor_sync(kAllLanes, where, bits);
    if (other > best || (other == best && there < where)) best = other, where = there;
  }
  return where < classes ? where : 0;
}

__device__ __forceinline__ float ratio(float numerator, float denominator) {
  return denominator > 0 ? numerator / denominator : 0.0f;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) readout_zones_kernel(ReadoutZonesParams<T> p) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kRows + int(threadIdx.x) / kWarp;
  if (row >= p.timesteps * p.samples) return;
  const int64_t t = row / p.samples, n = row - t * p.samples;

  const T* now = p.representations + t * p.time_stride + n * p.sample_stride;
  const T* before = t > 0 ? now - p.time_stride : p.previous != nullptr ? p.previous + n * p.previous_stride : nullptr;
  float squares = 0, change = 0;
  for (int d = lane * N; d < p.dims; d += kWarp * N) {
    float x[N], y[N];
    load(now + d, x);
    if (before != nullptr) load(before + d, y);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      squares += x[j] * x[j];
      if (before != nullptr) change += (x[j] - y[j]) * (x[j] - y[j]);
    }
  }
  const float norm = sqrtf(warp_sum(squares));
  change = before != nullptr ? sqrtf(warp_sum(change)) : nanf("");

  float* product = p.cosine + row * p.classes;
  const int predicted = p.log_probs != nullptr ? first_argmax(p.log_probs + row * p.classes, nullptr, p.classes, lane)
                                               : first_argmax(product, p.bias, p.classes, lane);
  const int label = int(p.labels[n]);
  const float product_predicted = product[predicted], product_label = product[label];
  const float own = product_predicted + (p.bias != nullptr ? p.bias[predicted] : 0.0f);
  const float* inverse_distance = p.inverse_distance + int64_t(predicted) * p.classes;
  float margin = kInfinity, boundary = kInfinity;
  __syncwarp();  // no lane writes a product that another still reads: `predicted` and `label` may be any lane's
  for (int c = lane; c < p.classes; c += kWarp) {
    if (c != predicted) {
      const float difference = own - (product[c] + (p.bias != nullptr ? p.bias[c] : 0.0f));
      const float inverse = inverse_distance[c];
      if (difference < margin) margin = difference;
      if (inverse > 0 && difference * inverse < boundary) boundary = difference * inverse;
    }
    product[c] = ratio(product[c], norm * p.weight_norm[c]);
  }
  margin = warp_min(margin);
  boundary = warp_min(boundary);
  if (lane > 0) return;
  p.predicted[row] = predicted;
  p.norm[row] = norm;
  p.cos_predicted[row] = ratio(product_predicted, norm * p.weight_norm[predicted]);
  p.cos_label[row] = ratio(product_label, norm * p.weight_norm[label]);
  p.margin[row] = margin;
  p.boundary_distance[row] = boundary;
  p.change[row] = change;
}

}  // namespace

template <typename T>
void launch_readout_zones(const ReadoutZonesParams<T>& p, Stream stream) {
  auto wide = [&](const T* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % kWidest<T> == 0;
  };
  const dim3 grid = blocks(ceil_divide(p.timesteps * p.samples, kRows), "readout_zones_kernel");
  if (p.dims % kWidest<T> == 0 && wide(p.representations, p.sample_stride) && p.time_stride % kWidest<T> == 0 &&
      wide(p.previous, p.previous_stride)) {
    launch(readout_zones_kernel<T, kWidest<T>>, "readout_zones_kernel", grid, kThreads, 0, stream, p);
  } else {
    launch(readout_zones_kernel<T, 1>, "readout_zones_kernel", grid, kThreads, 0, stream, p);
  }
}

template void launch_readout_zones<float>(const ReadoutZonesParams<float>&, Stream);
template void launch_readout_zones<Half>(const ReadoutZonesParams<Half>&, Stream);
template void launch_readout_zones<BFloat16>(const ReadoutZonesParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
