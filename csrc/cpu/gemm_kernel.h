// Register-blocked matrix product: C[r, n] (+)= sum_k A[r, k] B[k, n] for up to kGemmRows rows and kGemmCols columns.
// Included inside namespace rnndyn::<isa>, after winograd_transform_kernel.h (vector type).
//
// AVX-512: 14 x 32, 28 accumulators + 2 of B + 1 of A in 32 registers; 16 loads feed 28 fused multiply-adds per k, so two FMA ports are the
// limit as long as B's panel streams from L2. AVX2: 6 x 16 (12 + 2 + 1 of 16 registers). Portable (128-bit): 6 x 8.

constexpr int kGemmRows = RNNDYN_GEMM_ROWS;
constexpr int kGemmCols = 2 * kVectorFloats;

template <int Rows>
static void gemm_rows(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth,
                      float* c, int64_t c_row, bool accumulate, const char* next, int64_t next_step) {
  vec acc[Rows][2];
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    acc[r][0] = accumulate ? load(c + r * c_row) : vec{};
    acc[r][1] = accumulate ? load(c + r * c_row + kVectorFloats) : vec{};
  }
  // One base pointer per three rows: base, base + stride and base + 2 * stride are single addressing modes.
  constexpr int kBases = (Rows + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_row;
  for (int64_t k = 0; k < depth; ++k) {
    const vec b0 = load(b), b1 = load(b + kVectorFloats);
    b += b_depth;
    __builtin_prefetch(next, 0, 2);
    next += next_step;
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      const float value = base[r / 3][(r % 3) * a_row];
      acc[r][0] += value * b0;
      acc[r][1] += value * b1;
    }
#pragma GCC unroll 5
    for (int i = 0; i < kBases; ++i) base[i] += a_depth;
  }
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
    store(c + r * c_row, acc[r][0]);
    store(c + r * c_row + kVectorFloats, acc[r][1]);
  }
}

typedef void (*GemmRows)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool,
                         const char*, int64_t);

template <int Rows>
static inline GemmRows gemm_for(int64_t rows) {
  if constexpr (Rows == 1) {
    return gemm_rows<1>;
  } else {
    return rows >= Rows ? gemm_rows<Rows> : gemm_for<Rows - 1>(rows);
  }
}

// Any number of rows, kGemmCols columns; the row blocks are of nearly equal size. While it runs it brings `next_bytes` of what comes next into L2,
// a share per row block: where weights are read once, from L3, the hardware's own prefetch comes too late (measured: 1.3x).
static inline void gemm_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                              const float* b, int64_t b_depth, float* c, int64_t c_row, bool accumulate,
                              const char* next, int64_t next_bytes) {
  const int64_t blocks = (rows + kGemmRows - 1) / kGemmRows;
  const int64_t step = next_bytes / larger(1, depth * blocks);
  for (int64_t i = 0, first = 0; i < blocks; ++i) {
    const int64_t count = (rows - first + blocks - i - 1) / (blocks - i);
    gemm_for<kGemmRows>(count)(depth, a + first * a_row, a_row, a_depth, b, b_depth, c + first * c_row, c_row,
                               accumulate, next + i * (depth * step), step);
    first += count;
  }
}

// The same; what comes next is the panel that follows b in memory.
static inline void gemm_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                              const float* b, int64_t b_depth, float* c, int64_t c_row, bool accumulate) {
  gemm_panel(rows, depth, a, a_row, a_depth, b, b_depth, c, c_row, accumulate,
             reinterpret_cast<const char*>(b + depth * b_depth), depth * kGemmCols * 4);
}
