// The fused recurrent convolution: an implicit matrix product on tensor cores over the concatenated channels of all terms.
//
// Maths: s = sum_k conv_k(x_k) + bias + sum added;  value = s, or drive * (1 + s);  moments of value per pixel and column tile.
//   Rows of the product are output pixels, columns output channels, and its depth runs over terms, taps and input channels in slabs of
//   32 channels of one tap. Rows are ordered by phase (parity of the output's row and column) where a term is transposed with stride 2,
//   so that a tile has one phase and walks only the taps that reach it: no product with a zero that upsampling would insert. The gradient
//   of the data is the same kernel on transposed terms.
// Precision: products of T, float32 sums in the order of the depth; the modulator is rounded to T before it multiplies (as area_step does).
// Traffic: each tile reads its pixels' neighbourhoods once per tap, from L2 but for the first; weights stay in L2. 128 x 128 x 32 slabs do 64
//   multiply-adds per byte brought to shared memory: bound by the tensor cores while tiles are full.
// Launch shape: a block of 256 threads per tile, the column tiles of the same pixels adjacent.
// Sync: one barrier per slab, which says that its copies have arrived and that the slab before, whose stage is refilled next, has been
//   used; then two around the epilogue's use of the stages.
// Determinism: yes; no atomics, no split of the depth.
// Limits: sm_80 and later; channels multiples of 8; strides 1 and 2, transposed stride 2 for all such terms alike; N H W below 2^31.
#include "cuda/recurrent_conv.h"

#include "cuda/area_step_terms.h"
#include "cuda/device.h"
#include "cuda/matrix_tile.h"

namespace rnndyn::cuda {
namespace {

// The rows of a block: pixels of one phase.
struct TilePlace {
  int phases;  // 1, or 2 per direction
  int phase_row, phase_column;
  int height, width;  // of the phase's grid
  int first_row;      // of the tile, among the phase's samples * height * width pixels
};

__host__ __device__ constexpr int grid_size(int size, int phases, int phase) {
  return (size - phase + phases - 1) / phases;
}

template <typename T>
__host__ __device__ __forceinline__ int num_phases(const RecurrentConvParams<T>& p) {
  for (int k = 0; k < p.num_terms; ++k)
    if (p.term[k].transposed && p.term[k].stride == 2) return 2;
  return 1;
}

template <typename T>
__device__ __forceinline__ TilePlace place_of_tile(const RecurrentConvParams<T>& p, int tile, int tile_rows) {
  const int phases = num_phases(p);
  for (int phase = 0;; ++phase) {
    const int height = grid_size(p.height, phases, phase / phases), width = grid_size(p.width, phases, phase % phases);
    const int tiles = int((p.samples * height * width + tile_rows - 1) / tile_rows);
    if (tile < tiles || phase == phases * phases - 1)
      return {phases, phase / phases, phase % phases, height, width, tile * tile_rows};
    tile -= tiles;
  }
}

// Walks the depth: terms, their taps that reach this phase, and slabs of channels.
template <typename T>
struct DepthCursor {
  int term, row, column, channel;  // row, column: the tap

  __device__ __forceinline__ static int first_tap(const ConvTerm<T>& t, int phase) {
    return t.transposed && t.stride == 2 ? (phase + t.pad) % 2 : 0;
  }
  __device__ __forceinline__ static int tap_step(const ConvTerm<T>& t) { return t.transposed ? t.stride : 1; }

  // To the first term, from `term` on, that has taps here.
  __device__ __forceinline__ void enter(const RecurrentConvParams<T>& p, const TilePlace& place) {
    for (; term < p.num_terms; ++term) {
      const ConvTerm<T>& t = p.term[term];
      row = first_tap(t, place.phase_row), column = first_tap(t, place.phase_column), channel = 0;
      if (row < t.kernel && column < t.kernel) return;
    }
  }
  __device__ __forceinline__ bool done(const RecurrentConvParams<T>& p) const { return term >= p.num_terms; }
  __device__ __forceinline__ void advance(const RecurrentConvParams<T>& p, const TilePlace& place, int slab) {
    const ConvTerm<T>& t = p.term[term];
    channel += slab;
    if (channel < t.channels) return;
    channel = 0;
    column += tap_step(t);
    if (column < t.kernel) return;
    column = first_tap(t, place.phase_column);
    row += tap_step(t);
    if (row < t.kernel) return;
    ++term;
    enter(p, place);
  }
};

// The input's row for an output's: convolution or transposed.
template <typename T>
__device__ __forceinline__ int source(const ConvTerm<T>& t, int position, int tap) {
  return t.transposed ? (position + t.pad - tap) / t.stride : position * t.stride + tap - t.pad;
}

// Whether it lies inside. (Transposed, what is divided must not be negative: -1 / 2 would round to 0.)
template <typename T>
__device__ __forceinline__ bool reaches(const ConvTerm<T>& t, int position, int tap, int size) {
  if (t.transposed && position + t.pad < tap) return false;
  const int at = source(t, position, tap);
  return at >= 0 && at < size;
}

template <typename T, int kRows, int kColumns>
struct ConvKernel {
  using Tile = MatrixTile<kRows, kColumns>;
  using Chunk = Vector<T, 8>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kCopiesA = Tile::kChunksA / kThreads, kCopiesB = Tile::kChunksB / kThreads;
  static constexpr int kChunksPerRow = Tile::kDepth / kChunkElements;
  // The epilogue's sums lie where the stages were, in rows that are four floats apart from a multiple of the banks.
  static constexpr int kSumStride = kColumns + 4;
  static constexpr int kStageBytes = Tile::kStageBytes * Tile::kStages, kSumBytes = kRows * kSumStride * 4;
  static constexpr int kSharedBytes = kStageBytes > kSumBytes ? kStageBytes : kSumBytes;
  static constexpr int kLanesPerRow = kColumns / kChunkElements, kRowsPerPass = kThreads / kLanesPerRow;

  // Brings the cursor's slab to a stage. place[r]: sample, row and column of the pixel whose chunks this thread copies; sample -1: none.
  __device__ static __forceinline__ void copy_slab(const RecurrentConvParams<T>& p, const DepthCursor<T>& at,
                                                   const int (&sample)[kCopiesA], const int (&row)[kCopiesA],
                                                   const int (&column)[kCopiesA], int first_column, Chunk* a_tile,
                                                   Chunk* b_tile) {
    const ConvTerm<T>& t = p.term[at.term];
    const int chunk = int(threadIdx.x) % kChunksPerRow, tile_row = int(threadIdx.x) / kChunksPerRow;
    const int channel = at.channel + chunk * kChunkElements;
    RNNDYN_UNROLL
    for (int i = 0; i < kCopiesA; ++i) {
      const int y = source(t, row[i], at.row), x = source(t, column[i], at.column);
      const bool inside = sample[i] >= 0 && channel < t.channels && reaches(t, row[i], at.row, t.height) &&
                          reaches(t, column[i], at.column, t.width);
      const T* from = inside ? t.x + ((int64_t(sample[i]) * t.height + y) * t.width + x) * t.channels + channel : t.x;
      copy_async_16(a_tile + swizzled<kChunksPerRow>(tile_row + i * (kThreads / kChunksPerRow), chunk), from,
                    inside ? 16 : 0);
    }
    const int64_t tap = at.row * t.kernel + at.column;
    RNNDYN_UNROLL
    for (int i = 0; i < kCopiesB; ++i) {
      const int tile_column = tile_row + i * (kThreads / kChunksPerRow);
      const bool inside = first_column + tile_column < p.channels && channel < t.channels;
      const T* from =
          inside ? t.weight + ((first_column + tile_column) * int64_t(t.kernel * t.kernel) + tap) * t.channels + channel
                 : t.weight;
      copy_async_16(b_tile + swizzled<kChunksPerRow>(tile_column, chunk), from, inside ? 16 : 0);
    }
  }

  // Eight channels of a pixel, from their sums: interaction, stores, and the row's moments.
  __device__ static __forceinline__ void finish(const RecurrentConvParams<T>& p, int64_t pixel, int channel, int count,
                                                int column_tile, int column_tiles, float (&s)[8]) {
    const bool inside = pixel >= 0 && channel < p.channels;
    float sum = 0;
    if (inside) {
      const int64_t offset = pixel * p.channels + channel;
      if (p.bias != nullptr) {
        float x[8];
        load(p.bias + channel, x);
        RNNDYN_UNROLL
        for (int j = 0; j < 8; ++j) s[j] += x[j];
      }
      for (int k = 0; k < p.num_added; ++k) {
        float x[8];
        load(p.added[k] + offset, x);
        RNNDYN_UNROLL
        for (int j = 0; j < 8; ++j) s[j] += x[j];
      }
      if (p.drive != nullptr) {
        float x[8];
        load(p.drive + offset, x);
        RNNDYN_UNROLL
        for (int j = 0; j < 8; ++j) s[j] = rounded<T>(1 + s[j]);
        if (p.modulator_sum != nullptr) store(p.modulator_sum + offset, s);
        RNNDYN_UNROLL
        for (int j = 0; j < 8; ++j) s[j] *= x[j];
      }
      store(p.value + offset, s);
      RNNDYN_UNROLL
      for (int j = 0; j < 8; ++j) {
        s[j] = rounded<T>(s[j]);
        sum += s[j];
      }
    }
    if (p.moments == nullptr) return;
    // Over the lanes of a row, which are adjacent; lanes past the edge bring nothing.
    RNNDYN_UNROLL
    for (int bits = kLanesPerRow / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    const float mean = sum / float(count);
    float square = 0;
    if (inside) {
      RNNDYN_UNROLL
      for (int j = 0; j < 8; ++j) square += (s[j] - mean) * (s[j] - mean);
    }
    RNNDYN_UNROLL
    for (int bits = kLanesPerRow / 2; bits > 0; bits /= 2) square += __shfl_xor_sync(kAllLanes, square, bits);
    if (pixel >= 0 && threadIdx.x % kLanesPerRow == 0) {
      p.moments[2 * (pixel * column_tiles + column_tile)] = mean;
      p.moments[2 * (pixel * column_tiles + column_tile) + 1] = square;
    }
  }
};

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(256) recurrent_conv_kernel(RecurrentConvParams<T> p) {
  using Kernel = ConvKernel<T, kRows, kColumns>;
  using Tile = typename Kernel::Tile;
  using Chunk = typename Kernel::Chunk;
  RNNDYN_DYNAMIC_SHARED(shared);
  RNNDYN_SHARED(int, pixels, kRows);  // of the tile's rows, among the output's; -1 past the end
  Chunk* stages = reinterpret_cast<Chunk*>(shared);
  const int column_tiles = (p.channels + kColumns - 1) / kColumns, column_tile = int(blockIdx.x) % column_tiles;
  const int first_column = column_tile * kColumns;
  const TilePlace place = place_of_tile(p, int(blockIdx.x) / column_tiles, kRows);
  const int rows = int(p.samples) * place.height * place.width;

  // Sample -1 past the end.
  auto locate = [&](int tile_row, int* sample, int* row, int* column) {
    const int index = place.first_row + tile_row, map = place.height * place.width;
    *sample = index < rows ? index / map : -1;
    *row = index % map / place.width * place.phases + place.phase_row;
    *column = index % place.width * place.phases + place.phase_column;
  };
  int sample[Kernel::kCopiesA], row[Kernel::kCopiesA], column[Kernel::kCopiesA];
  RNNDYN_UNROLL
  for (int i = 0; i < Kernel::kCopiesA; ++i) {
    const int tile_row = (int(threadIdx.x) + i * Tile::kThreads) / Kernel::kChunksPerRow;
    locate(tile_row, &sample[i], &row[i], &column[i]);
    if (threadIdx.x % Kernel::kChunksPerRow == 0)
      pixels[tile_row] = sample[i] < 0 ? -1 : (sample[i] * p.height + row[i]) * p.width + column[i];
  }

  DepthCursor<T> next{0, 0, 0, 0};
  next.enter(p, place);
  auto copy_next = [&](int stage) {
    if (!next.done(p)) {
      Chunk* tile = stages + stage * (Tile::kChunksA + Tile::kChunksB);
      Kernel::copy_slab(p, next, sample, row, column, first_column, tile, tile + Tile::kChunksA);
      next.advance(p, place, Tile::kDepth);
    }
    commit_copies();  // a group even if it is empty: groups are counted
  };

  typename Tile::Accumulators sums;
  Tile::clear(sums);
  DepthCursor<T> used = next;
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy_next(stage);
  int stage = 0;
  for (; !used.done(p); used.advance(p, place, Tile::kDepth)) {
    wait_copies<Tile::kStages - 2>();  // this thread's copies of the slab have arrived
    __syncthreads();                   // everybody's have; and nobody uses the slab before any more
    copy_next((stage + Tile::kStages - 1) % Tile::kStages);
    const Chunk* tile = stages + stage * (Tile::kChunksA + Tile::kChunksB);
    Tile::template multiply<T, false>(tile, tile + Tile::kChunksA, sums);
    stage = (stage + 1) % Tile::kStages;
  }

  wait_copies<0>();
  __syncthreads();  // the stages are free
  float* sum_tile = reinterpret_cast<float*>(shared);
  const int lane = int(threadIdx.x) % kWarp;
  RNNDYN_UNROLL
  for (int i = 0; i < Tile::kFragmentRows; ++i) {
    RNNDYN_UNROLL
    for (int j = 0; j < Tile::kFragmentColumns; ++j) {
      const int fragment_row = Tile::first_row() + i * 16 + lane / 4,
                fragment_column = Tile::first_column() + j * 8 + lane % 4 * 2;
      RNNDYN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float pair[2] = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
        store(sum_tile + (fragment_row + half * 8) * Kernel::kSumStride + fragment_column, pair);
      }
    }
  }
  __syncthreads();  // whole rows of sums are there
  const int row_lane = int(threadIdx.x) % Kernel::kLanesPerRow;
  const int count = min(kColumns, p.channels - first_column);
  for (int r = int(threadIdx.x) / Kernel::kLanesPerRow; r < kRows; r += Kernel::kRowsPerPass) {
    float s[8];
    load(sum_tile + r * Kernel::kSumStride + row_lane * 8, s);
    Kernel::finish(p, pixels[r], first_column + row_lane * 8, count, column_tile, column_tiles, s);
  }
}

template <typename T, int kRows, int kColumns>
void launch_tiles(const RecurrentConvParams<T>& p, Stream stream) {
  const int phases = num_phases(p);
  int64_t tiles = 0;
  for (int phase = 0; phase < phases * phases; ++phase)
    tiles += ceil_divide(
        p.samples * grid_size(p.height, phases, phase / phases) * grid_size(p.width, phases, phase % phases), kRows);
  using Kernel = ConvKernel<T, kRows, kColumns>;
  launch(recurrent_conv_kernel<T, kRows, kColumns>, "recurrent_conv_kernel",
         blocks(tiles * ceil_divide(p.channels, kColumns), "recurrent_conv_kernel"), Kernel::kThreads,
         Kernel::kSharedBytes, stream, p);
}

}  // namespace

ConvTiles recurrent_conv_tiles(int64_t samples, int height, int width, int channels) {
  // Small tiles where large ones would leave multiprocessors without work (132 of them on the largest device), or most of a tile's columns empty.
  const int64_t large = ceil_divide(samples * height * width, 128) * ceil_divide(channels, 128);
  const int rows = large < 132 ? 64 : 128, columns = large < 132 || channels <= 64 ? 64 : 128;
  const int column_tiles = int(ceil_divide(channels, columns));
  return {
      rows, columns, {height * width * column_tiles, column_tiles, columns, channels - (column_tiles - 1) * columns}};
}

template <typename T>
void launch_recurrent_conv(const RecurrentConvParams<T>& p, Stream stream) {
  for (int k = 0; k < p.num_terms; ++k) {
    if (p.term[k].channels % 8 != 0 || p.channels % 8 != 0)
      throw std::invalid_argument("recurrent_conv: expected channels that are multiples of 8");
    if (p.term[k].stride < 1 || p.term[k].stride > 2)
      throw std::invalid_argument("recurrent_conv: expected a stride of 1 or 2");
    require_aligned("recurrent_conv", p.term[k].x, p.term[k].weight);
  }
  if (p.samples * p.height * p.width >= int64_t(1) << 31)
    throw std::invalid_argument("recurrent_conv: expected fewer than 2^31 pixels");
  require_aligned_terms("recurrent_conv", p.added, p.num_added);
  require_aligned("recurrent_conv", p.bias, p.drive, p.value, p.modulator_sum);
  const ConvTiles tiles = recurrent_conv_tiles(p.samples, p.height, p.width, p.channels);
  if (tiles.rows == 64) return launch_tiles<T, 64, 64>(p, stream);
  if (tiles.columns == 64) return launch_tiles<T, 128, 64>(p, stream);
  launch_tiles<T, 128, 128>(p, stream);
}

template void launch_recurrent_conv<Half>(const RecurrentConvParams<Half>&, Stream);
template void launch_recurrent_conv<BFloat16>(const RecurrentConvParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
