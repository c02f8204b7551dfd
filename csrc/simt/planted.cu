// Kernels with a fault each, and without it, which tests run to see that the harness reports it. `fault` is a parameter, so that the
// compiler cannot see it.
#include "cuda/device.h"
#include "cuda/tensor_core.h"
#include "simt/planted.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 64;
using Chunk = Vector<Half, 8>;

// out[i] = in[i] + in[i + 1]
__global__ void neighbours_kernel(PlantedParams p) {
  RNNDYN_SHARED(float, tile, kThreads + 1);
  const int i = int(threadIdx.x);
  tile[i] = 0;
  if (i == 0 && p.fault != Planted::kUnwrittenShared) tile[kThreads] = 0;
  if (p.fault == Planted::kReturnBeforeBarrier && i == 63) return;
  if (p.fault == Planted::kDivergentBarrier && i < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  tile[i] = p.in[i];
  if (i == 0 && p.fault != Planted::kUnwrittenShared)
    tile[kThreads] = p.in[kThreads + (p.fault == Planted::kRead ? 1 : 0)];
  if (p.fault != Planted::kMissingBarrier) __syncthreads();  // the neighbour's element is there
  const float sum = tile[i] + tile[i + 1];
  p.out[i + (p.fault == Planted::kWrite ? 1 : 0)] = sum;
  if (p.fault == Planted::kSharedBounds && i == 63) tile[i + 2] = sum;
  if (p.fault == Planted::kWriteAfterRead) tile[i] = sum;  // the thread before may still read it
  if (p.fault == Planted::kInput) const_cast<float*>(p.in)[i] = sum;
}

// out[i] = the sum of a warp's in
__global__ void warp_kernel(PlantedParams p) {
  RNNDYN_SHARED(float, mine, kThreads);
  const int i = int(threadIdx.x);
  float x = p.in[i];
  if (p.fault == Planted::kDivergentShuffle) {
    if (i % 32 < 31) x = warp_sum(x);
  } else {
    x = warp_sum(x);
  }
  mine[i] = 0;
  __syncwarp();
  mine[i] = x;
  if (p.fault != Planted::kMissingWarpBarrier) __syncwarp();  // all lanes have written
  x = mine[i ^ 1];
  if (__all_sync(kAllLanes, x == mine[i])) p.out[i] = x;
}

// out[i] = in[i], four at a time
__global__ void vector_kernel(PlantedParams p) {
  const int i = int(threadIdx.x);
  if (i >= kThreads / 4) return;
  float x[4];
  load(p.in + 4 * i + (p.fault == Planted::kMisaligned ? 1 : 0), x);
  store(p.out + 4 * i, x);
  if (p.fault == Planted::kUnwrittenOutput) p.out[4 * i] += p.out[(4 * i + 4) % kThreads];
}

// Shared memory by cp.async; out[i] = in[i]
__global__ void copy_kernel(PlantedParams p) {
  RNNDYN_DYNAMIC_SHARED(bytes);
  float* tile = reinterpret_cast<float*>(bytes);
  const int i = int(threadIdx.x);
  if (i < kThreads / 4) copy_async_16(tile + 4 * i, p.in + 4 * i, 16);
  commit_copies();
  if (p.fault != Planted::kMissingWait) wait_copies<0>();
  __syncthreads();  // every thread's copies have arrived
  p.out[i] = tile[i];
}

// out [16, 8] = A [16, 16] B [8, 16]^T, halves, by one warp
__global__ void matrix_kernel(PlantedParams p) {
  RNNDYN_SHARED(Chunk, tile, 48);  // A: two chunks of 8 per row; then B
  const int i = int(threadIdx.x);
  for (int k = i; k < 48; k += kWarp) tile[k] = reinterpret_cast<const Chunk*>(p.in)[k];
  __syncthreads();  // A and B are there
  uint32_t a[4], b[4];
  const int wrong = p.fault == Planted::kFragment ? 1 : 0;
  // Matrices: rows 0 to 7 and 8 to 15 of the first chunk, then of the second.
  load_matrix_x4(&tile[2 * (i % 16) + (i / 16 ^ wrong)], a);
  load_matrix_x4(&tile[32 + 2 * (i % 8) + i / 8 % 2], b);
  float c[4] = {0, 0, 0, 0};
  const uint32_t pair[2] = {b[0], b[1]};
  mma<Half>(a, pair, c);
  const int row = i / 4, column = 2 * (i % 4);
  for (int k = 0; k < 4; ++k) p.out[(row + k / 2 * 8) * 8 + column + k % 2] = c[k];
}

// out[i] = in[i] by 48 KiB of dynamic shared memory, and 256 bytes of static shared memory besides
constexpr size_t kDynamicBytes = 48 * 1024;
__global__ void resources_kernel(PlantedParams p) {
  RNNDYN_DYNAMIC_SHARED(bytes);
  RNNDYN_SHARED(int, source, kThreads);
  const int i = int(threadIdx.x);
  if (i >= kThreads) return;
  float* tile = reinterpret_cast<float*>(bytes);
  source[i] = i;
  tile[i] = p.in[source[i]];
  p.out[i] = tile[i];
}

void launch_resources(const PlantedParams& p) {
  const char* name = "resources_kernel";
  if (p.fault == Planted::kNoOptIn) return start(resources_kernel, name, dim3(1), kThreads, kDynamicBytes, nullptr, p);
  const dim3 grid = p.fault == Planted::kGrid ? dim3(1, 65536) : dim3(1);
  const int threads = p.fault == Planted::kThreads ? 1056 : kThreads;
  const size_t bytes = p.fault == Planted::kSharedLimit ? 99 * 1024 : kDynamicBytes;
  launch(resources_kernel, name, grid, threads, bytes, nullptr, p);
}

}  // namespace

void launch_planted(const char* which, const PlantedParams& p) {
  const std::string name = which;
  const int blocks = p.fault == Planted::kOtherBlock ? 2 : 1;  // that write the same elements
  if (name == "neighbours")
    return launch(neighbours_kernel, "neighbours_kernel", dim3(blocks), kThreads, 0, nullptr, p);
  if (name == "warp") return launch(warp_kernel, "warp_kernel", dim3(1), kThreads, 0, nullptr, p);
  if (name == "vector") return launch(vector_kernel, "vector_kernel", dim3(1), kThreads, 0, nullptr, p);
  if (name == "copy") return launch(copy_kernel, "copy_kernel", dim3(1), kThreads, kThreads * 4, nullptr, p);
  if (name == "matrix") return launch(matrix_kernel, "matrix_kernel", dim3(1), kWarp, 0, nullptr, p);
  if (name == "resources") return launch_resources(p);
  throw std::invalid_argument("planted: no kernel '" + name + "'");
}

}  // namespace rnndyn::cuda
