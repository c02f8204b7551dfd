// channels_last: y[n, p, c] = x[n, c, p]. Included by its family inside namespace rnndyn::<isa>; parameters are documented in channels_last.h.
//
// Traffic: x and y once, in squares of a register by a register, whose rows are read and whose columns are written whole; lines of the next square
//   are asked for meanwhile. Bound by memory. Threads: over samples and registers of channels. Determinism: nothing is computed.

template <typename Real>
struct LayoutSquare {
  typedef Real Vec __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  typedef Real Loose __attribute__((vector_size(RNNDYN_VECTOR_BYTES), aligned(sizeof(Real))));
  typedef typename DepthwiseIndex<Real>::Type Number;
  typedef Number Numbers __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  static constexpr int kLanes = RNNDYN_VECTOR_BYTES / sizeof(Real);

  // Rows i and i + kLanes / 2 interleaved are rows 2 i and 2 i + 1 of the next stage: one rotation of the bits of (row, lane), and after log2(kLanes)
  // of them rows are lanes.
  static inline void transpose(Vec* rows) {
    Numbers low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = Number(i / 2 + i % 2 * kLanes);
      high[i] = Number(i / 2 + kLanes / 2 + i % 2 * kLanes);
    }
#pragma GCC unroll 4
    for (int stage = 1; stage < kLanes; stage *= 2) {
      Vec next[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes / 2; ++i) {
        next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
        next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
  }
};

template <typename Real>
void channels_last(const ChannelsLastParams<Real>& p) {
  using Square = LayoutSquare<Real>;
  constexpr int kLanes = Square::kLanes;
  const int64_t blocks = (p.channels + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t task = 0; task < p.samples * blocks; ++task) {
    const int64_t n = task / blocks, first = task % blocks * kLanes;
    const int64_t channels = p.channels - first < kLanes ? p.channels - first : kLanes;
    const Real* x = p.x + (n * p.channels + first) * p.pixels;
    Real* y = p.y + n * p.pixels * p.channels + first;
    int64_t pixel = 0;
    if (channels == kLanes) {
      for (; pixel + kLanes <= p.pixels; pixel += kLanes) {
        typename Square::Vec rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const Real* row = x + i * p.pixels + pixel;
          __builtin_prefetch(row + 4 * kLanes);
          __builtin_prefetch(y + (pixel + kLanes + i) * p.channels, 1);
          rows[i] = *reinterpret_cast<const typename Square::Loose*>(row);
        }
        Square::transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          *reinterpret_cast<typename Square::Loose*>(y + (pixel + i) * p.channels) = rows[i];
      }
    }
    for (; pixel < p.pixels; ++pixel)
      for (int64_t c = 0; c < channels; ++c) y[pixel * p.channels + c] = x[c * p.pixels + pixel];
  }
}
