// The fragment layouts of ldmatrix and mma.sync.m16n8k16 (PTX ISA, "Warp-level matrix instructions"), for the SIMT harness.
#pragma once
#include <cstdint>

#include "simt/half.h"

namespace simt {

// Of four 8 x 8 matrices, lane l gets from each the pair at row l / 4, columns 2 (l % 4) and the next; transposed, the pair at
// column l / 4, rows 2 (l % 4) and the next.
inline void load_matrix_fragment(const uint16_t (&rows)[4][8][8], int lane, bool transposed, uint32_t* registers) {
  for (int i = 0; i < 4; ++i) {
    const int outer = lane / 4, inner = lane % 4 * 2;
    const uint16_t low = transposed ? rows[i][inner][outer] : rows[i][outer][inner];
    const uint16_t high = transposed ? rows[i][inner + 1][outer] : rows[i][outer][inner + 1];
    registers[i] = uint32_t(high) << 16 | low;
  }
}

// C [16, 8] += A [16, 16] B [16, 8]. Lane l has, with g = l / 4 and t = l % 4: of A rows g and g + 8 at columns 2 t, 2 t + 1 (registers 0
// and 1), and at columns 2 t + 8, 2 t + 9 (registers 2 and 3); of B column g at rows 2 t, 2 t + 1 (0) and 2 t + 8, 2 t + 9 (1); of C row g at columns
// 2 t, 2 t + 1 (0 and 1) and row g + 8 (2 and 3).
inline void mma_m16n8k16(const uint32_t* const (&a)[32], const uint32_t* const (&b)[32], float* const (&c)[32],
                         bool bf16) {
  float full_a[16][16], full_b[8][16];  // B by column
  auto unpack = [bf16](uint32_t word, int half) {
    const uint16_t bits = uint16_t(half != 0 ? word >> 16 : word);
    return bf16 ? bf16_bits_to_float(bits) : half_bits_to_float(bits);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) full_a[g + r % 2 * 8][2 * t + half + r / 2 * 8] = unpack(a[lane][r], half);
      for (int r = 0; r < 2; ++r) full_b[g][2 * t + half + r * 8] = unpack(b[lane][r], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += full_a[row][k] * full_b[column][k];
      c[lane][i] += sum;
    }
  }
}

}  // namespace simt
