// depthwise_conv on CUDA: the gradient of the weight.
//
// Maths: dw[u, v, c] = sum over samples and pixels of dy[i, j, c] x[s i + u - p, s j + v - q, c].
// Precision: storage T, sums float32: a thread adds the pixels of its rows in order, threads of a block are added in a tree, blocks in order.
// Traffic: x and dy are read once for each row of the kernel, from L2 after the first. Of square kernels 3, 5 and 7 of stride 1 a thread keeps a
//   row of the kernel and the window of x that slides along a row of pixels in registers, two loads per K products; others a tap per block.
// Launch shape: a block takes up to 32 vectors of channels, one row of the kernel (or one tap), and a part of the rows of pixels of all samples.
// Sync: between the levels of a tree over threads, in shared memory; the parts are added by a second launch.
// Determinism: parts depend on the shape and the kind of device alone, and no sum's order on the schedule.
// Limits: kernels up to kMaxDepthwiseKernel; the caller checks shapes.
#include "cuda/depthwise_conv.h"
#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;         // 16 bytes of float, 8 of halves
constexpr int64_t kLeastRows = 4;  // of pixels, of a thread

template <typename T>
struct Launch {
  DepthwiseWeightGradParams<T> p;
  int columns;        // threads side by side along channels, a power of two up to 32
  int column_blocks;  // that take all channels
  float* out;         // [splits, KH, KW, C]
};

int columns_of(int64_t vectors) {
  int columns = 1;
  while (columns < kWarp && columns < vectors) columns *= 2;
  return columns;
}

// kKernel: both sides of the kernel, with step 1, a block per row of it; 0: any kernel and step, a block per tap.
// Seven taps of float32 and their window take more registers on sm_100 than two blocks leave for a thread.
template <typename T, int N, int kKernel>
__global__ void __launch_bounds__(kThreads, kKernel == 7 && sizeof(T) == 4 ? 1 : 2)
    depthwise_weight_grad_kernel(Launch<T> l) {
  constexpr int kTaps = kKernel == 0 ? 1 : kKernel, kSize = kTaps * N;
  RNNDYN_SHARED(float, shared, kThreads* kSize);
  const DepthwiseShape& s = l.p.shape;
  const int rows_of_taps = kKernel == 0 ? s.kernel_height * s.kernel_width : kKernel;
  const int block = int(blockIdx.x), tap_row = block / l.column_blocks % rows_of_taps;
  const int split = block / l.column_blocks / rows_of_taps;
  const int row = int(threadIdx.x) / l.columns, rows = kThreads / l.columns;
  const int channel = (block % l.column_blocks * l.columns + int(threadIdx.x) % l.columns) * N;
  const int u = kKernel == 0 ? tap_row / s.kernel_width : tap_row, v = kKernel == 0 ? tap_row % s.kernel_width : 0;
  const int width = int(s.in_width);
  float sum[kTaps][N];
  RNNDYN_UNROLL
  for (int k = 0; k < kTaps; ++k) fill(sum[k], 0);
  if (channel < s.channels) {
    for (int64_t at = int64_t(split) * rows + row; at < s.samples * s.out_height; at += int64_t(l.p.splits) * rows) {
      const int64_t sample = at / s.out_height;
      const int i = int(at - sample * s.out_height) * s.step + u - s.top;
      if (i < 0 || i >= s.in_height) continue;
      const T* x = l.p.x + (sample * s.in_height + i) * s.in_width * s.channels + channel;
      const T* grad = l.p.grad + at * s.out_width * s.channels + channel;
      float window[kTaps][N];  // columns j - left .. of x
      RNNDYN_UNROLL
      for (int k = 0; k < kTaps; ++k) fill(window[k], 0);
      if (kKernel > 0) {
        RNNDYN_UNROLL
        for (int k = 0; k < kTaps - 1; ++k) {
          const int c = k - s.left;
          if (c >= 0 && c < width) load(x + c * s.channels, window[k + 1]);
        }
      }
      for (int j = 0; j < s.out_width; ++j) {
        RNNDYN_UNROLL
        for (int k = 0; k < kTaps - 1; ++k) {
          RNNDYN_UNROLL
          for (int n = 0; n < N; ++n) window[k][n] = window[k + 1][n];
        }
        const int c = j * s.step + v - s.left + kTaps - 1;
        fill(window[kTaps - 1], 0);
        if (c >= 0 && c < width) load(x + c * s.channels, window[kTaps - 1]);
        float g[N];
        load(grad + j * s.channels, g);
        RNNDYN_UNROLL
        for (int k = 0; k < kTaps; ++k) {
          RNNDYN_UNROLL
          for (int n = 0; n < N; ++n) sum[k][n] += g[n] * window[k][n];
        }
      }
    }
  }
  float* own = shared + int(threadIdx.x) * kSize;
  RNNDYN_UNROLL
  for (int k = 0; k < kSize; ++k) own[k] = sum[k / N][k % N];
  for (int span = rows / 2; span > 0; span /= 2) {
    __syncthreads();  // the other half's sums are there
    if (row >= span) continue;
    const float* other = own + span * l.columns * kSize;
    RNNDYN_UNROLL
    for (int k = 0; k < kSize; ++k) own[k] += other[k];
  }
  if (row > 0 || channel >= s.channels) return;
  const int64_t taps = int64_t(s.kernel_height) * s.kernel_width, first = split * taps + int64_t(tap_row) * kTaps;
  RNNDYN_UNROLL
  for (int k = 0; k < kTaps; ++k) {
    float total[N];
    RNNDYN_UNROLL
    for (int n = 0; n < N; ++n) total[n] = own[k * N + n];
    store(l.out + (first + k) * s.channels + channel, total);
  }
}

// A template only so that it has the parameters of its T.
template <typename T>
__global__ void __launch_bounds__(kThreads) depthwise_weight_sum_kernel(DepthwiseWeightGradParams<T> p) {
  const int64_t size = p.shape.channels * p.shape.kernel_height * p.shape.kernel_width;
  const int64_t element = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  if (element >= size) return;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partial[split * size + element];
  p.grad_weight[element] = sum;
}

template <typename T, int N, int kKernel>
void launch_kernel(const DepthwiseWeightGradParams<T>& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  const int64_t vectors = s.channels / N;
  Launch<T> l{p, columns_of(vectors), 0, p.splits > 1 ? p.partial : p.grad_weight};
  l.column_blocks = int(ceil_divide(vectors, l.columns));
  const int64_t rows_of_taps = kKernel == 0 ? s.kernel_height * s.kernel_width : kKernel;
  launch(depthwise_weight_grad_kernel<T, N, kKernel>, "depthwise_weight_grad_kernel",
         blocks(l.column_blocks * rows_of_taps * p.splits, "depthwise_weight_grad_kernel"), kThreads, 0, stream, l);
  if (p.splits == 1) return;
  const int64_t size = s.channels * s.kernel_height * s.kernel_width;
  launch(depthwise_weight_sum_kernel<T>, "depthwise_weight_sum_kernel",
         blocks(ceil_divide(size, kThreads), "depthwise_weight_sum_kernel"), kThreads, 0, stream, p);
}

}  // namespace

template <typename T>
int depthwise_weight_grad_splits(const DepthwiseShape& s) {
  const int64_t vectors = ceil_divide(s.channels, kVector), columns = columns_of(vectors);
  const int64_t most = ceil_divide(s.samples * s.out_height, kThreads / columns * kLeastRows);
  const int square = s.kernel_height == s.kernel_width && s.step == 1 ? int(s.kernel_width) : 0;
  auto splits = [&](void (*kernel)(Launch<T>), int64_t rows_of_taps) {
    return splits_of(ceil_divide(vectors, columns) * rows_of_taps,
                     blocks_at_once(kernel, "depthwise_weight_grad_kernel", kThreads, 0), most);
  };
  if (square == 3) return splits(depthwise_weight_grad_kernel<T, kVector, 3>, 3);
  if (square == 5) return splits(depthwise_weight_grad_kernel<T, kVector, 5>, 5);
  if (square == 7) return splits(depthwise_weight_grad_kernel<T, kVector, 7>, 7);
  return splits(depthwise_weight_grad_kernel<T, kVector, 0>, s.kernel_height * s.kernel_width);
}

template <typename T>
void launch_depthwise_weight_grad(const DepthwiseWeightGradParams<T>& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  constexpr uintptr_t bytes = kVector * sizeof(T);
  auto aligned = [](const void* address, uintptr_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; };
  const bool wide = s.channels % kVector == 0 && aligned(p.x, bytes) && aligned(p.grad, bytes) &&
                    aligned(p.partial, 16) && aligned(p.grad_weight, 16);
  if (!wide) return launch_kernel<T, 1, 0>(p, stream);
  if (s.kernel_height == s.kernel_width && s.step == 1) {
    switch (s.kernel_width) {
      case 3:
        return launch_kernel<T, kVector, 3>(p, stream);
      case 5:
        return launch_kernel<T, kVector, 5>(p, stream);
      case 7:
        return launch_kernel<T, kVector, 7>(p, stream);
    }
  }
  launch_kernel<T, kVector, 0>(p, stream);
}

template int depthwise_weight_grad_splits<float>(const DepthwiseShape&);
template void launch_depthwise_weight_grad<float>(const DepthwiseWeightGradParams<float>&, Stream);
template int depthwise_weight_grad_splits<Half>(const DepthwiseShape&);
template void launch_depthwise_weight_grad<Half>(const DepthwiseWeightGradParams<Half>&, Stream);
template int depthwise_weight_grad_splits<BFloat16>(const DepthwiseShape&);
template void launch_depthwise_weight_grad<BFloat16>(const DepthwiseWeightGradParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
