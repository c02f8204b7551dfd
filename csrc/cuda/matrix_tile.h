// The part of a matrix product that a block computes with tensor cores: tiles of both operands in shared memory, fragments in registers.
// Shared by recurrent_conv_forward.cu and recurrent_conv_weight_grad.cu, which bring the tiles there.
//
// A tile in shared memory is rows of 16-byte chunks (8 elements). Chunks are XORed with bits of the row's number, so that the eight rows
// that an ldmatrix reads at one chunk lie in eight different groups of banks, and cp.async still writes whole rows.
#pragma once
#include "cuda/device.h"
#include "cuda/tensor_core.h"

namespace rnndyn::cuda {

constexpr int kChunkElements = 8;

// Rows of four chunks (64 bytes): two of them fill the 32 banks, so the chunk changes with every second row. Wider rows: with every row.
template <int kChunksPerRow>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  if (kChunksPerRow == 4) return row * 4 + (chunk ^ (row >> 1 & 3));
  return row * kChunksPerRow + (chunk ^ (row & 7));
}

// kRows x kColumns outputs by kThreads, over slabs of kDepth.
template <int kRows_, int kColumns_>
struct MatrixTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kDepth = 32;
  static constexpr int kThreads = 256;
  static constexpr int kStages = 4;  // slabs in shared memory: three on their way while one is used
  // Warps, and what each computes.
  static constexpr int kWarpColumns = kColumns >= 128 ? 4 : 2, kWarpRows = kThreads / kWarp / kWarpColumns;
  static constexpr int kFragmentRows = kRows / kWarpRows / 16, kFragmentColumns = kColumns / kWarpColumns / 8;
  static_assert(kFragmentRows * 16 * kWarpRows == kRows && kFragmentColumns * 8 * kWarpColumns == kColumns,
                "whole fragments");
  static_assert(kFragmentColumns % 2 == 0, "fragments of B are loaded two by two");
  // 16-byte chunks of a slab.
  static constexpr int kChunksA = kRows * kDepth / kChunkElements, kChunksB = kColumns * kDepth / kChunkElements;
  static_assert(kChunksA % kThreads == 0 && kChunksB % kThreads == 0, "every thread copies equally many");
  static constexpr int kStageBytes = (kChunksA + kChunksB) * 16;

  using Accumulators = float[kFragmentRows][kFragmentColumns][4];

  __device__ static __forceinline__ void clear(Accumulators& c) {
    RNNDYN_UNROLL
    for (int i = 0; i < kFragmentRows; ++i) {
      RNNDYN_UNROLL
      for (int j = 0; j < kFragmentColumns; ++j) fill(c[i][j], 0);
    }
  }

  __device__ static __forceinline__ int first_row() {
    return int(threadIdx.x) / kWarp / kWarpColumns * kFragmentRows * 16;
  }
  __device__ static __forceinline__ int first_column() {
    return int(threadIdx.x) / kWarp % kWarpColumns * kFragmentColumns * 8;
  }

  // The products of a slab. kDepthFirst: tiles are [depth][rows] and [depth][columns]; else [rows][depth] and [columns][depth].
  template <typename T, bool kDepthFirst>
  __device__ static __forceinline__ void multiply(const Vector<T, 8>* a_tile, const Vector<T, 8>* b_tile,
                                                  Accumulators& c) {
    const int lane = int(threadIdx.x) % kWarp, row0 = first_row(), column0 = first_column();
    RNNDYN_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kFragmentRows][4];
      RNNDYN_UNROLL
      for (int i = 0; i < kFragmentRows; ++i) {
        // The four 8 x 8 matrices, in the order of mma's registers: rows 0-7 and 8-15 at depths 0-7, then both at depths 8-15.
        if (kDepthFirst) {
          const int depth = k + lane / 16 * 8 + lane % 8, row = row0 + i * 16 + lane / 8 % 2 * 8;
          load_matrix_x4_transposed(a_tile + swizzled<kRows / 8>(depth, row / 8), a[i]);
        } else {
          load_matrix_x4(a_tile + swizzled<kDepth / 8>(row0 + i * 16 + lane % 16, k / 8 + lane / 16), a[i]);
        }
      }
      RNNDYN_UNROLL
      for (int j = 0; j < kFragmentColumns; j += 2) {
        // Columns 0-7 at depths 0-7 and 8-15, then columns 8-15 at both: two fragments of B.
        uint32_t b[4];
        if (kDepthFirst) {
          const int depth = k + lane / 8 % 2 * 8 + lane % 8, column = column0 + j * 8 + lane / 16 * 8;
          load_matrix_x4_transposed(b_tile + swizzled<kColumns / 8>(depth, column / 8), b);
        } else {
          const int column = column0 + j * 8 + lane / 16 * 8 + lane % 8;
          load_matrix_x4(b_tile + swizzled<kDepth / 8>(column, k / 8 + lane / 8 % 2), b);
        }
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        RNNDYN_UNROLL
        for (int i = 0; i < kFragmentRows; ++i) {
          mma<T>(a[i], first, c[i][j]);
          mma<T>(a[i], second, c[i][j + 1]);
        }
      }
    }
  }
};

}  // namespace rnndyn::cuda
