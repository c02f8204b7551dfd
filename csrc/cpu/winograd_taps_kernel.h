// Weights of winograd_conv that are kept as their taps and transformed as they are read: a^2 / r^2 times smaller than in the Winograd domain.
// Included inside namespace rnndyn::<isa>, after gemm_kernel.h.
//
// Maths: row a of G w G^T is (G_a w) G^T; rows are taken one by one, so that V of a row of frequencies stays in L2 for all panels.
// Layout: [panels, chunks of C_in, r, channels of the chunk, r, NR]: the first and the last row of frequencies read the first and the last
//   third of a chunk, the others all of it, as one stream, which the products before it bring into L2.
// Traffic: 42 floats for the 36 products of F(4, 3), 60 for the 64 of F(6, 3), and the transformed chunk (a kTapsChunk NR floats) written to L2
//   and read from there. With 64 tiles all of it takes 14% longer than transformed weights do, with 16 tiles as long (512 channels).
// Limits: kernels of 3 x 3. (Larger ones save less and cost more.)

constexpr int64_t kTapsChunk = 128;  // input channels whose weights are transformed together

// Floats of the transformed weights of a chunk, from frequency to frequency (an odd number of lines: else all would share a few sets of L1),
// and all of them.
constexpr int64_t kExpandedFrequency = kTapsChunk * kGemmCols + 16;
template <int Patch>
constexpr int64_t kExpandedFloats = Patch * kExpandedFrequency;

// What a row of frequencies reads of a chunk of taps, in rows of the kernel: [first, last).
template <int Patch, int Kernel>
struct TapRows {
  int first, last;
  explicit constexpr TapRows(int row) : first(row == Patch - 1 ? Kernel - 1 : 0), last(row == 0 ? 1 : Kernel) {}
};

// A row of G w G^T of some input channels of a panel: out[column * kExpandedFrequency + c * kGemmCols + lane].
template <int Patch, int Kernel, int Row>
static void winograd_expand_row(const float* taps, int64_t channels, float* out) {
  constexpr TapRows<Patch, Kernel> read(Row);
  constexpr int64_t ahead = 4;  // channels whose lines are asked for: loads and stores would wait for them one by one
  for (int64_t c = 0; c < channels; ++c, taps += Kernel * kGemmCols, out += kGemmCols)
#pragma GCC unroll 2
    for (int part = 0; part < kGemmCols; part += kVectorFloats) {
      vec column[Kernel], row[Patch];
#pragma GCC unroll 3
      for (int kw = 0; kw < Kernel; ++kw) {
        column[kw] = vec{};
#pragma GCC unroll 3
        for (int kh = read.first; kh < read.last; ++kh) {
          const float* tap = taps + (kh * channels * Kernel + kw) * kGemmCols + part;
          __builtin_prefetch(tap + 2 * ahead * Kernel * kGemmCols, 0, 3);
          column[kw] += (Row == Patch - 1 ? 1.0f : kernel_coefficient<Patch>(Row, kh)) * load(tap);
        }
      }
      kernel_1d<Patch, Kernel>(column, 1, row, 1);
#pragma GCC unroll 8
      for (int b = 0; b < Patch; ++b) {
        float* to = out + b * kExpandedFrequency + part;
        __builtin_prefetch(to + ahead * kGemmCols, 1, 3);
        store(to, row[b]);
      }
    }
}

template <int Patch, int Kernel, int Row = 0>
static inline void winograd_expand(const float* taps, int64_t channels, int row, float* out) {
  if (row == Row) return winograd_expand_row<Patch, Kernel, Row>(taps, channels, out);
  if constexpr (Row + 1 < Patch) winograd_expand<Patch, Kernel, Row + 1>(taps, channels, row, out);
}
