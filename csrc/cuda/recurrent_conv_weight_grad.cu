// Weight gradient of the fused recurrent convolution: a matrix product on tensor cores whose depth is all pixels of all samples and steps.
//
// Maths: grad[a, i, j, b] = sum over n, h, w of rows[n, h, w, a] * gathered[n, h * stride + i - pad, w * stride + j - pad, b].
//   Rows of the product are the channels a, columns the channels b of one tap; the depth runs over pixels in slabs of 32.
// Precision: products of T, float32 sums.
// Traffic: a block reads its channels of both operands once for each of its pixels; blocks of other taps find them in L2. The splits' sums are
//   written and read once more, in float32.
// Launch shape: a block of 256 threads per tile and split of the depth; splits so that small weights fill the device too. Then a thread per
//   element and split sums in order.
// Sync: one barrier per slab, as in recurrent_conv_forward.cu.
// Determinism: yes on one kind of device; splits, of which there are as many as it holds at once, are summed in order, no atomics.
// Limits: sm_80 and later; channels multiples of 8; N H W below 2^31.
#include "cuda/recurrent_conv.h"

#include "cuda/area_step_terms.h"
#include "cuda/device.h"
#include "cuda/matrix_tile.h"

namespace rnndyn::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int64_t kLeastSlabs = 16;  // of a split: its sums cost a write and a read of the whole gradient
constexpr int64_t kMostSplits = 64;

// Division by a number that does not change, by multiplication: exact for dividends below 2^31.
struct Divisor {
  uint32_t divisor, factor, shift;
};

__host__ __device__ __forceinline__ Divisor make_divisor(uint32_t d) {
  uint32_t shift = 0;
  while (shift < 32 && (uint64_t(1) << shift) < d) ++shift;
  const uint64_t factor = ((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1;
  return {d, uint32_t(factor), shift};
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& d) {
  return (__umulhi(n, d.factor) + n) >> d.shift;
}

template <typename T>
struct WeightGradLaunch {
  ConvWeightGradParams<T> p;
  Divisor map, width;
  int slabs_per_split;
  float* out;  // [splits, row_channels, K, K, gathered_channels]
};

template <typename T, int kRows, int kColumns>
struct WeightGradKernel {
  using Tile = MatrixTile<kRows, kColumns>;
  using Chunk = Vector<T, 8>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kStageBytes * Tile::kStages;
  static constexpr int kChunksA = kRows / kChunkElements, kChunksB = kColumns / kChunkElements;  // of a pixel

  __device__ static __forceinline__ void copy_slab(const WeightGradLaunch<T>& l, int slab, int first_row,
                                                   int first_column, int tap_row, int tap_column, Chunk* a_tile,
                                                   Chunk* b_tile) {
    const ConvWeightGradParams<T>& p = l.p;
    const int64_t pixels = p.samples * p.height * p.width;
    RNNDYN_UNROLL
    for (int i = 0; i < Tile::kChunksA / kThreads; ++i) {
      const int index = int(threadIdx.x) + i * kThreads, depth = index / kChunksA, chunk = index % kChunksA;
      const int64_t pixel = int64_t(slab) * Tile::kDepth + depth;
      const int channel = first_row + chunk * kChunkElements;
      const bool inside = pixel < pixels && channel < p.row_channels;
      copy_async_16(a_tile + swizzled<kChunksA>(depth, chunk),
                    inside ? p.rows + pixel * p.row_channels + channel : p.rows, inside ? 16 : 0);
    }
    RNNDYN_UNROLL
    for (int i = 0; i < Tile::kChunksB / kThreads; ++i) {
      const int index = int(threadIdx.x) + i * kThreads, depth = index / kChunksB, chunk = index % kChunksB;
      const int64_t pixel = int64_t(slab) * Tile::kDepth + depth;
      const int channel = first_column + chunk * kChunkElements;
      const uint32_t n = divide(uint32_t(pixel), l.map), place = uint32_t(pixel) - n * l.map.divisor;
      const uint32_t h = divide(place, l.width), w = place - h * l.width.divisor;
      const int y = int(h) * p.stride + tap_row - p.pad, x = int(w) * p.stride + tap_column - p.pad;
      const bool inside = pixel < pixels && channel < p.gathered_channels && y >= 0 && y < p.gathered_height &&
                          x >= 0 && x < p.gathered_width;
      const T* from = inside ? p.gathered +
                                   ((int64_t(n) * p.gathered_height + y) * p.gathered_width + x) * p.gathered_channels +
                                   channel
                             : p.gathered;
      copy_async_16(b_tile + swizzled<kChunksB>(depth, chunk), from, inside ? 16 : 0);
    }
  }
};

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(256) recurrent_conv_weight_grad_kernel(WeightGradLaunch<T> l) {
  using Kernel = WeightGradKernel<T, kRows, kColumns>;
  using Tile = typename Kernel::Tile;
  using Chunk = typename Kernel::Chunk;
  const ConvWeightGradParams<T>& p = l.p;
  RNNDYN_DYNAMIC_SHARED(shared);
  Chunk* stages = reinterpret_cast<Chunk*>(shared);
  const int row_tiles = (p.row_channels + kRows - 1) / kRows,
            column_tiles = (p.gathered_channels + kColumns - 1) / kColumns;
  int block = int(blockIdx.x);
  const int first_row = block % row_tiles * kRows;
  block /= row_tiles;
  const int first_column = block % column_tiles * kColumns;
  block /= column_tiles;
  const int tap = block % (p.kernel * p.kernel), split = block / (p.kernel * p.kernel);
  const int slabs = int((p.samples * p.height * p.width + Tile::kDepth - 1) / Tile::kDepth);
  const int first_slab = split * l.slabs_per_split, last_slab = min(slabs, first_slab + l.slabs_per_split);

  int next = first_slab;
  auto copy_next = [&](int stage) {
    if (next < last_slab) {
      Chunk* tile = stages + stage * (Tile::kChunksA + Tile::kChunksB);
      Kernel::copy_slab(l, next, first_row, first_column, tap / p.kernel, tap % p.kernel, tile, tile + Tile::kChunksA);
      ++next;
    }
    commit_copies();  // a group even if it is empty: groups are counted
  };
  typename Tile::Accumulators sums;
  Tile::clear(sums);
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy_next(stage);
  int stage = 0;
  for (int slab = first_slab; slab < last_slab; ++slab) {
    wait_copies<Tile::kStages - 2>();  // this thread's copies of the slab have arrived
    __syncthreads();                   // everybody's have; and nobody uses the slab before any more
    copy_next((stage + Tile::kStages - 1) % Tile::kStages);
    const Chunk* tile = stages + stage * (Tile::kChunksA + Tile::kChunksB);
    Tile::template multiply<T, true>(tile, tile + Tile::kChunksA, sums);
    stage = (stage + 1) % Tile::kStages;
  }
  wait_copies<0>();

  const int lane = int(threadIdx.x) % kWarp;
  RNNDYN_UNROLL
  for (int i = 0; i < Tile::kFragmentRows; ++i) {
    RNNDYN_UNROLL
    for (int j = 0; j < Tile::kFragmentColumns; ++j) {
      const int column = first_column + Tile::first_column() + j * 8 + lane % 4 * 2;
      RNNDYN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + Tile::first_row() + i * 16 + lane / 4 + half * 8;
        if (row >= p.row_channels || column >= p.gathered_channels) continue;
        const float pair[2] = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
        const int64_t taps = p.kernel * p.kernel;
        store(l.out + ((int64_t(split) * p.row_channels + row) * taps + tap) * p.gathered_channels + column, pair);
      }
    }
  }
}

// A template only so that it has the parameters of its T.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) recurrent_conv_weight_sum_kernel(ConvWeightGradParams<T> p) {
  const int64_t size = int64_t(p.row_channels) * p.kernel * p.kernel * p.gathered_channels;
  const int64_t element = (int64_t(blockIdx.x) * kSumThreads + int(threadIdx.x)) * 4;
  if (element >= size) return;
  float sum[4];
  fill(sum, 0);
  for (int split = 0; split < p.splits; ++split) {
    float x[4];
    load(p.partial + split * size + element, x);
    RNNDYN_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += x[j];
  }
  store(p.grad_weight + element, sum);
}

template <typename T, int kRows, int kColumns>
void launch_tiles(const ConvWeightGradParams<T>& p, Stream stream) {
  using Kernel = WeightGradKernel<T, kRows, kColumns>;
  const int64_t slabs = ceil_divide(p.samples * p.height * p.width, Kernel::Tile::kDepth);
  const int64_t tiles =
      ceil_divide(p.row_channels, kRows) * ceil_divide(p.gathered_channels, kColumns) * p.kernel * p.kernel;
  WeightGradLaunch<T> l{p, make_divisor(uint32_t(p.height * p.width)), make_divisor(uint32_t(p.width)),
                        int(ceil_divide(slabs, p.splits)), p.splits > 1 ? p.partial : p.grad_weight};
  launch(recurrent_conv_weight_grad_kernel<T, kRows, kColumns>, "recurrent_conv_weight_grad_kernel",
         blocks(tiles * p.splits, "recurrent_conv_weight_grad_kernel"), Kernel::kThreads, Kernel::kSharedBytes, stream,
         l);
  if (p.splits == 1) return;
  const int64_t size = int64_t(p.row_channels) * p.kernel * p.kernel * p.gathered_channels;
  launch(recurrent_conv_weight_sum_kernel<T>, "recurrent_conv_weight_sum_kernel",
         blocks(ceil_divide(size, 4 * kSumThreads), "recurrent_conv_weight_sum_kernel"), kSumThreads, 0, stream, p);
}

template <typename T, int kRows, int kColumns>
int64_t held_at_once() {
  using Kernel = WeightGradKernel<T, kRows, kColumns>;
  return blocks_at_once(recurrent_conv_weight_grad_kernel<T, kRows, kColumns>, "recurrent_conv_weight_grad_kernel",
                        Kernel::kThreads, Kernel::kSharedBytes);
}

bool small_tiles(int row_channels, int gathered_channels) { return row_channels <= 64 || gathered_channels <= 64; }

}  // namespace

template <typename T>
int recurrent_conv_weight_grad_splits(int64_t samples, int height, int width, int row_channels, int gathered_channels,
                                      int kernel) {
  const bool small = small_tiles(row_channels, gathered_channels);
  const int size = small ? 64 : 128;
  const int64_t tiles = ceil_divide(row_channels, size) * ceil_divide(gathered_channels, size) * kernel * kernel;
  const int64_t most = ceil_divide(ceil_divide(samples * height * width, 32), kLeastSlabs);
  return splits_of(tiles, small ? held_at_once<T, 64, 64>() : held_at_once<T, 128, 128>(), min(most, kMostSplits));
}

template <typename T>
void launch_recurrent_conv_weight_grad(const ConvWeightGradParams<T>& p, Stream stream) {
  if (p.row_channels % 8 != 0 || p.gathered_channels % 8 != 0)
    throw std::invalid_argument("recurrent_conv_weight_grad: expected channels that are multiples of 8");
  if (p.samples * p.height * p.width >= int64_t(1) << 31)
    throw std::invalid_argument("recurrent_conv_weight_grad: expected fewer than 2^31 pixels");
  require_aligned("recurrent_conv_weight_grad", p.rows, p.gathered, p.partial, p.grad_weight);
  if (small_tiles(p.row_channels, p.gathered_channels)) return launch_tiles<T, 64, 64>(p, stream);
  launch_tiles<T, 128, 128>(p, stream);
}

template int recurrent_conv_weight_grad_splits<Half>(int64_t, int, int, int, int, int);
template void launch_recurrent_conv_weight_grad<Half>(const ConvWeightGradParams<Half>&, Stream);
template int recurrent_conv_weight_grad_splits<BFloat16>(int64_t, int, int, int, int, int);
template void launch_recurrent_conv_weight_grad<BFloat16>(const ConvWeightGradParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
