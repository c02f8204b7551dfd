// trajectory_norms on CUDA: ||x[t, n]|| and ||x[t + 1, n] - x[t, n]|| of long rows, a block per sample and step.
//
// Maths: trajectory_norms.h.
// Precision: a thread sums runs of 16 vectors in float32 and the runs in double; threads are summed in float32.
// Traffic: the steps of a sample are adjacent blocks, so the step before is read from L2 while its own block reads it from memory. Bound by
//   memory bandwidth.
// Launch shape: 256 threads walk a row in vectors of 16 bytes, or elements where rows are not aligned to these.
// Sync: one __syncthreads in each of the two sums.
// Determinism: no sum crosses blocks; all sums in one order.
// Limits: the caller checks shapes and strides. NaN and infinite values come out as such.
#include "cuda/trajectory_norms.h"

#include <cmath>

#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 16;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) trajectory_norms_kernel(TrajectoryNormsParams<T> p) {
  RNNDYN_SHARED(float, scratch, 2 * kThreads / kWarp);
  const int64_t n = int64_t(blockIdx.x) / p.timesteps, t = int64_t(blockIdx.x) - n * p.timesteps;
  const T* now = p.values + t * p.step_stride + n * p.row_stride;
  const T* before = t > 0 ? now - p.step_stride : nullptr;
  double squares = 0, moved = 0;
  for (int64_t d = int64_t(threadIdx.x) * N; d < p.dims;) {
    float some_squares = 0, some_moved = 0;
    for (int k = 0; k < kTogether && d < p.dims; ++k, d += kThreads * N) {
      float x[N], y[N];
      load(now + d, x);
      if (before != nullptr) load(before + d, y);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) {
        some_squares += x[j] * x[j];
        if (before != nullptr) some_moved += (x[j] - y[j]) * (x[j] - y[j]);
      }
    }
    squares += double(some_squares), moved += double(some_moved);
  }
  const float norm = block_sum<kThreads>(float(squares), scratch);
  if (threadIdx.x == 0) p.norm[t * p.samples + n] = sqrt(double(norm));
  if (before == nullptr) return;  // (all threads of the block)
  const float change = block_sum<kThreads>(float(moved), scratch + kThreads / kWarp);
  if (threadIdx.x == 0) p.change[(t - 1) * p.samples + n] = sqrt(double(change));
}

}  // namespace

template <typename T>
void launch_trajectory_norms(const TrajectoryNormsParams<T>& p, Stream stream) {
  const dim3 grid = blocks(p.timesteps * p.samples, "trajectory_norms_kernel");
  constexpr int kWide = kWidest<T>;
  if (reinterpret_cast<uintptr_t>(p.values) % 16 == 0 && p.dims % kWide == 0 && p.step_stride % kWide == 0 &&
      p.row_stride % kWide == 0) {
    launch(trajectory_norms_kernel<T, kWide>, "trajectory_norms_kernel", grid, kThreads, 0, stream, p);
  } else {
    launch(trajectory_norms_kernel<T, 1>, "trajectory_norms_kernel", grid, kThreads, 0, stream, p);
  }
}

template void launch_trajectory_norms<float>(const TrajectoryNormsParams<float>&, Stream);
template void launch_trajectory_norms<Half>(const TrajectoryNormsParams<Half>&, Stream);
template void launch_trajectory_norms<BFloat16>(const TrajectoryNormsParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
