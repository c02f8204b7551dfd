// depthwise_conv on CUDA: forward, and the gradient of the data.
//
// Maths: y[i, j, c] = b[c] + sum over (u, v) of w[u, v, c] x[s i + u - p, s j + v - q, c];  dx is a convolution of dy, dilated by s, with the
//   turned kernel.
// Precision: storage T, sums of all taps in float32, in the order of the taps.
// Traffic: x and y once, as rows that several outputs read meet in L1 and L2. Of square kernels 3, 5 and 7 of stride 1 a thread makes four outputs of
//   a row from K + 3 loads per row of the kernel; others one output, a load per tap. Bound by memory with K = 3, by loads from L1 beyond.
// Launch shape: a thread per vector of channels and one or four pixels of a row.
// Sync: none.
// Determinism: every element is computed by one thread in one order.
// Limits: kernels up to kMaxDepthwiseKernel; the caller checks shapes.
#include "cuda/depthwise_conv.h"

#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;   // 16 bytes of float, 8 of halves
constexpr int kOutputs = 4;  // of a thread, side by side, where the kernel is known

// Thread to row of outputs (of all samples), first column and first channel. False past the end.
template <int N, int kCount>
__device__ __forceinline__ bool place(const DepthwiseShape& s, int64_t* row, int* column, int* channel) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x), vectors = s.channels / N;
  const int64_t group = at / vectors, groups = (s.out_width + kCount - 1) / kCount;
  *row = group / groups;
  *column = int(group - *row * groups) * kCount;
  *channel = int(at - group * vectors) * N;
  return *row < s.samples * s.out_height;
}

template <int N, typename T>
__device__ __forceinline__ void load_bias(const DepthwiseConvParams<T>& p, int channel, float (&x)[N]) {
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) x[j] = p.bias != nullptr ? p.bias[channel + j] : 0.0f;
}

// Kernels kKernel x kKernel of step and dilation 1.
template <typename T, int N, int kKernel>
__global__ void __launch_bounds__(kThreads, 2) depthwise_conv_square_kernel(DepthwiseConvParams<T> p) {
  const DepthwiseShape& s = p.shape;
  int64_t row;
  int column, channel;
  if (!place<N, kOutputs>(s, &row, &column, &channel)) return;
  const int64_t sample = row / s.out_height;
  const int i = int(row - sample * s.out_height) - s.top, left = column - s.left;
  float sum[kOutputs][N];
  load_bias(p, channel, sum[0]);
  RNNDYN_UNROLL
  for (int o = 1; o < kOutputs; ++o) {
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) sum[o][j] = sum[0][j];
  }
  for (int u = 0; u < kKernel; ++u) {
    if (i + u < 0 || i + u >= s.in_height) continue;
    const T* x = p.x + ((sample * s.in_height + i + u) * s.in_width + left) * s.channels + channel;
    float w[kKernel][N];
    RNNDYN_UNROLL
    for (int v = 0; v < kKernel; ++v) load(p.weight + (u * kKernel + v) * s.channels + channel, w[v]);
    RNNDYN_UNROLL
    for (int t = 0; t < kKernel + kOutputs - 1; ++t) {
      if (left + t < 0 || left + t >= s.in_width) continue;
      float in[N];
      load(x + t * s.channels, in);
      RNNDYN_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        if (t < o || t - o >= kKernel) continue;
        RNNDYN_UNROLL
        for (int j = 0; j < N; ++j) sum[o][j] += w[t - o][j] * in[j];
      }
    }
  }
  T* y = p.y + (row * s.out_width + column) * s.channels + channel;
  RNNDYN_UNROLL
  for (int o = 0; o < kOutputs; ++o)
    if (column + o < s.out_width) store(y + o * s.channels, sum[o]);
}

// Any kernel, step and dilation.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) depthwise_conv_kernel(DepthwiseConvParams<T> p) {
  const DepthwiseShape& s = p.shape;
  int64_t row;
  int column, channel;
  if (!place<N, 1>(s, &row, &column, &channel)) return;
  const int64_t sample = row / s.out_height;
  const int i = int(row - sample * s.out_height) * s.step - s.top, j = column * s.step - s.left;
  float sum[N];
  load_bias(p, channel, sum);
  for (int u = 0; u < s.kernel_height; ++u) {
    const int r = (i + u) / s.dilation;
    if (i + u < 0 || r >= s.in_height || r * s.dilation != i + u) continue;
    for (int v = 0; v < s.kernel_width; ++v) {
      const int c = (j + v) / s.dilation;
      if (j + v < 0 || c >= s.in_width || c * s.dilation != j + v) continue;
      float in[N], w[N];
      load(p.x + ((sample * s.in_height + r) * s.in_width + c) * s.channels + channel, in);
      load(p.weight + (u * s.kernel_width + v) * s.channels + channel, w);
      RNNDYN_UNROLL
      for (int k = 0; k < N; ++k) sum[k] += w[k] * in[k];
    }
  }
  store(p.y + (row * s.out_width + column) * s.channels + channel, sum);
}

template <typename T>
void launch_grid(void (*kernel)(DepthwiseConvParams<T>), const char* name, const DepthwiseConvParams<T>& p, int vector,
                 int outputs, Stream stream) {
  const int64_t threads =
      p.shape.samples * p.shape.out_height * ceil_divide(p.shape.out_width, outputs) * (p.shape.channels / vector);
  launch(kernel, name, blocks(ceil_divide(threads, kThreads), name), kThreads, 0, stream, p);
}

}  // namespace

template <typename T>
void launch_depthwise_conv(const DepthwiseConvParams<T>& p, Stream stream) {
  const DepthwiseShape& s = p.shape;
  const char *name = "depthwise_conv_kernel", *square = "depthwise_conv_square_kernel";
  constexpr uintptr_t bytes = kVector * sizeof(T);
  auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  if (s.channels % kVector != 0 || !aligned(p.x) || !aligned(p.weight) || !aligned(p.y))
    return launch_grid<T>(depthwise_conv_kernel<T, 1>, name, p, 1, 1, stream);
  if (s.kernel_height == s.kernel_width && s.step == 1 && s.dilation == 1) {
    switch (s.kernel_width) {
      case 3:
        return launch_grid<T>(depthwise_conv_square_kernel<T, kVector, 3>, square, p, kVector, kOutputs, stream);
      case 5:
        return launch_grid<T>(depthwise_conv_square_kernel<T, kVector, 5>, square, p, kVector, kOutputs, stream);
      case 7:
        return launch_grid<T>(depthwise_conv_square_kernel<T, kVector, 7>, square, p, kVector, kOutputs, stream);
    }
  }
  launch_grid<T>(depthwise_conv_kernel<T, kVector>, name, p, kVector, 1, stream);
}

template void launch_depthwise_conv<float>(const DepthwiseConvParams<float>&, Stream);
template void launch_depthwise_conv<Half>(const DepthwiseConvParams<Half>&, Stream);
template void launch_depthwise_conv<BFloat16>(const DepthwiseConvParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
