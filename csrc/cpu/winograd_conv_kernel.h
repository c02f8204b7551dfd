// winograd_conv: forward (and, with other weights, backward-data) in the Winograd domain, with an epilogue.
// Included inside namespace rnndyn::<isa>; parameters are documented in winograd_conv.h, transforms in winograd_transform_kernel.h.
//
// Maths: y_p = sum over terms of x * W_p for each output phase p: per tile, Y = A^T [sum_terms sum_i (B^T d_i B) . (G w_i G^T)] A: for each of
//   a^2 frequencies one matrix product [tiles x C_in] [C_in x phases C_out], accumulated over terms before the one inverse transform.
// Precision: float32; relative error against float64 about 1e-6 (a = 5, 6) and 3e-6 (a = 8) in norm.
// Traffic: a block of B tiles is transformed into V (a^2 B C_in, of one term after another), multiplied into M (a^2 B C_out) and transformed
//   back by one thread. Small channel counts: B such that V and M stay in L2, and the packed weights stream past them once per block. Large
//   ones: B large, so that the weights are read seldom. Few tiles (small maps or batches): the threads share one block and split the
//   frequencies, so that each weight is read by one thread only.
// Determinism: every product is summed in the same order whatever the number of threads; bitwise repeatable.
// Limits: the forms of RNNDYN_BY_FORM.

// Rows of frequencies: all, or a pair of them.
template <int Patch>
struct AllRows {
  static constexpr int kCount = Patch;
  static constexpr int row(int k) { return k; }
};
template <int First, int Second>
struct TwoRows {
  static constexpr int kCount = First == Second ? 1 : 2;
  static constexpr int row(int k) { return k == 0 ? First : Second; }
};

template <int Patch, int Kernel>
struct Winograd {
  static constexpr int kOutputs = Patch - Kernel + 1;
  static constexpr int kFrequencies = Patch * Patch;

  int64_t samples, height, width, tiles_h, tiles_w, tiles;
  int pad;

  Winograd(int64_t n, int64_t h, int64_t w, int padding)
      : samples(n),
        height(h),
        width(w),
        tiles_h((h + kOutputs - 1) / kOutputs),
        tiles_w((w + kOutputs - 1) / kOutputs),
        tiles(n * tiles_h * tiles_w),
        pad(padding) {}

  struct Tile {
    int64_t sample, row, column;  // of its first output
  };
  Tile tile(int64_t index) const {
    const int64_t per_sample = tiles_h * tiles_w, within = index % per_sample;
    return {index / per_sample, within / tiles_w * kOutputs, within % tiles_w * kOutputs};
  }

  // B^T d B of one tile: out[f * frequency_stride + c], of all frequencies or some rows of them. Meanwhile the pixels of the next tile are asked for,
  // or what lies `ahead` of this tile's, if that is not zero.
  template <typename Rows = AllRows<Patch>>
  void transform_input(const float* x, const GridStrides& strides, const Shift& shift, int64_t channels, int64_t index,
                       float* out, int64_t frequency_stride, int64_t ahead = 0) const {
    const Tile t = tile(index);
    const int64_t above = pad - shift.row, before = pad - shift.column, top = t.row - above, left = t.column - before;
    const float* corner = x + t.sample * strides.sample + top * strides.row + left * strides.column;
    const int64_t first_row = top < 0 ? -top : 0, last_row = smaller(Patch, height - top);
    const int64_t first_col = left < 0 ? -left : 0, last_col = smaller(Patch, width - left);
    const bool inside = first_row == 0 && first_col == 0 && last_row == Patch && last_col == Patch;
    const Tile after = tile(index + 1);
    const float* next = ahead != 0 ? corner + ahead
                                   : x + after.sample * strides.sample + (after.row - above) * strides.row +
                                         (after.column - before) * strides.column;
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      const int64_t lanes = channels - c;
      // (Of the next tile's pixels not those that this one shares with it. A prefetch past the map's end is harmless.)
      for (int i = 0; i < Patch; ++i)
#pragma GCC unroll 8
        for (int j = Patch - kOutputs; j < Patch; ++j)
          __builtin_prefetch(next + i * strides.row + j * strides.column + c, 0, 3);
      vec patch[Patch][Patch], half[Rows::kCount][Patch];
      if (inside && lanes >= kVectorFloats) {
        for (int i = 0; i < Patch; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < Patch; ++j) patch[i][j] = load(corner + i * strides.row + j * strides.column + c);
      } else {
        for (int i = 0; i < Patch; ++i)
          for (int j = 0; j < Patch; ++j)
            patch[i][j] = i >= first_row && i < last_row && j >= first_col && j < last_col
                              ? load_part(corner + i * strides.row + j * strides.column + c, lanes)
                              : vec{};
      }
      for (int j = 0; j < Patch; ++j) {
        vec column[Patch];
        input_1d<Patch>(&patch[0][j], Patch, column, 1);
#pragma GCC unroll 8
        for (int k = 0; k < Rows::kCount; ++k) half[k][j] = column[Rows::row(k)];
      }
      for (int k = 0; k < Rows::kCount; ++k) {
        vec row[Patch];
        input_1d<Patch>(&half[k][0], 1, row, 1);
#pragma GCC unroll 8
        for (int j = 0; j < Patch; ++j) store(out + (k * Patch + j) * frequency_stride + c, row[j]);
      }
    }
  }

  // A dy A^T of one tile, for the gradient of the weight, in panels of kGemmCols channels; outputs outside the grid count as zero. Rows
  // and `ahead` as above.
  template <typename Rows = AllRows<Patch>>
  void transform_gradient(const float* grad, const GridStrides& strides, int64_t channels, int64_t index, float* out,
                          int64_t frequency_stride, int64_t panel_stride, int64_t ahead = 0) const {
    const Tile t = tile(index);
    const float* corner = grad + t.sample * strides.sample + t.row * strides.row + t.column * strides.column;
    const int64_t rows = smaller(kOutputs, height - t.row), cols = smaller(kOutputs, width - t.column);
    const Tile after = tile(index + 1);
    const float* next =
        ahead != 0 ? corner + ahead
                   : grad + after.sample * strides.sample + after.row * strides.row + after.column * strides.column;
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      for (int i = 0; i < kOutputs; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kOutputs; ++j) __builtin_prefetch(next + i * strides.row + j * strides.column + c, 0, 3);
      vec patch[kOutputs][kOutputs], half[Rows::kCount][kOutputs];
      for (int i = 0; i < kOutputs; ++i)
        for (int j = 0; j < kOutputs; ++j)
          patch[i][j] =
              i < rows && j < cols ? load_part(corner + i * strides.row + j * strides.column + c, channels - c) : vec{};
      for (int j = 0; j < kOutputs; ++j) {
        vec column[Patch];
        gradient_1d<Patch, kOutputs>(&patch[0][j], kOutputs, column, 1);
#pragma GCC unroll 8
        for (int k = 0; k < Rows::kCount; ++k) half[k][j] = column[Rows::row(k)];
      }
      float* panel = out + c / kGemmCols * panel_stride + c % kGemmCols;
      for (int k = 0; k < Rows::kCount; ++k) {
        vec row[Patch];
        gradient_1d<Patch, kOutputs>(&half[k][0], 1, row, 1);
#pragma GCC unroll 8
        for (int j = 0; j < Patch; ++j) store(panel + (k * Patch + j) * frequency_stride, row[j]);
      }
    }
  }

  // A^T m A of one tile into y, and its epilogue, if any, with moments in a cell of its own, if wanted; m[f * frequency_stride + c].
  void transform_output(const float* m, int64_t frequency_stride, int64_t channels, int64_t index, float* y,
                        const GridStrides& strides, bool accumulate, const ConvEpilogue* epilogue,
                        LaneMoments* cell) const {
    const Tile t = tile(index);
    float* corner = y + t.sample * strides.sample + t.row * strides.row + t.column * strides.column;
    const int64_t rows = smaller(kOutputs, height - t.row), cols = smaller(kOutputs, width - t.column);
    const Tile after = tile(index + 1);
    float* next = y + after.sample * strides.sample + after.row * strides.row + after.column * strides.column;
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      // Stores to lines that are in no cache wait for them one by one (measured: 4x); so ask for the next tile's now.
      for (int i = 0; i < kOutputs; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kOutputs; ++j) __builtin_prefetch(next + i * strides.row + j * strides.column + c, 1, 3);
      for (int i = 0; epilogue != nullptr && i < kOutputs; ++i)
        for (int j = 0; j < kOutputs; ++j) epilogue_ask(*epilogue, next + i * strides.row + j * strides.column + c);
      vec values[Patch][Patch], half[kOutputs][Patch];
      for (int i = 0; i < Patch; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < Patch; ++j) values[i][j] = load(m + (i * Patch + j) * frequency_stride + c);
      for (int j = 0; j < Patch; ++j) output_1d<Patch, kOutputs>(&values[0][j], Patch, &half[0][j], Patch);
      for (int64_t i = 0; i < rows; ++i) {
        vec row[kOutputs];
        output_1d<Patch, kOutputs>(&half[i][0], 1, row, 1);
        for (int64_t j = 0; j < cols; ++j) {
          float* at = corner + i * strides.row + j * strides.column + c;
          store_part(at, accumulate ? row[j] + load_part(at, channels - c) : row[j], channels - c);
        }
      }
      if (epilogue != nullptr)
        epilogue_block(*epilogue, corner + c, rows, strides.row, cols, strides.column, c,
                       smaller(channels - c, kVectorFloats), cell);
    }
  }
};

// ---------------------------------------------------------------- sizes

// At least so many floats, an odd number of cache lines: the values of a tile, one per frequency, lie so far apart, and would share a few sets of
// the L1 cache if that were a multiple of 64 lines.
static inline int64_t odd_lines(int64_t floats) { return 16 * (round_up(floats, 16) / 16 | 1); }

struct WinogradBlocking {
  int64_t block;  // tiles per block
  bool shared;    // threads share a block and split its frequencies
};

static inline WinogradBlocking winograd_blocking(int64_t tiles, int64_t frequencies, int64_t channels_in,
                                                 int64_t channels_out, int threads) {
  // Half of 1.5 MB of the 2 MB L2 of current server cores (64 to 64 channels: 8% faster than all of it), or all of it for fewer than two row
  // blocks; smaller caches still profit, as V and M then come from L3 once each.
  const int64_t bytes_per_tile = frequencies * 4 * (channels_in + channels_out);
  const int64_t half = int64_t(768 * 1024) / bytes_per_tile / kGemmRows * kGemmRows;
  const int64_t whole = int64_t(1536 * 1024) / bytes_per_tile / kGemmRows * kGemmRows;
  const int64_t fit = half >= 2 * kGemmRows ? half : smaller(whole, 2 * kGemmRows);
  const int64_t block = fit >= 2 * kGemmRows ? smaller(fit, 8 * kGemmRows) : 8 * kGemmRows;
  const int64_t share = (tiles + threads - 1) / threads;
  const bool shared = threads > 1 && share < (fit >= 2 * kGemmRows ? 2 * kGemmRows : 4 * kGemmRows);
  if (shared) return {smaller(tiles, 8 * kGemmRows * threads), true};
  // Blocks of equal size, a whole number per thread.
  const int64_t per_thread = (share + block - 1) / block;
  return {(share + per_thread - 1) / per_thread, false};
}

// Whether a kernel with a missing first or last row or column has the weight zero at frequency f: such a row is the only one that the point 0,
// or infinity, sees.
template <int Patch>
static inline bool vanishes(const Vanishing& v, int64_t f) {
  return f / Patch == v.row || f % Patch == v.column;
}

// Sizes of a call, for its workspace and for itself.
template <int Patch, int Kernel>
struct WinogradConvSizes {
  Winograd<Patch, Kernel> w;
  int64_t phase_channels, channels_out, panels, block, blocks, m_frequency, v_size, m_size, cells_size, expanded_size;
  bool shared, by_taps;

  // Floats of V of a term, from frequency to frequency.
  int64_t v_frequency(const WinogradConvParams& p, int term) const {
    return odd_lines(block * round_up(p.term[term].channels, kVectorFloats));
  }

  explicit WinogradConvSizes(const WinogradConvParams& p) : w(p.samples, p.height, p.width, p.pad) {
    int64_t most_in = 0;
    for (int k = 0; k < p.num_terms; ++k) most_in = larger(most_in, round_up(p.term[k].channels, kVectorFloats));
    phase_channels = round_up(p.out_channels, kGemmCols);
    channels_out = phase_channels * p.num_phases;
    panels = channels_out / kGemmCols;
    const WinogradBlocking blocking = winograd_blocking(w.tiles, w.kFrequencies, most_in, channels_out, p.num_threads);
    block = blocking.block;
    shared = blocking.shared;
    blocks = (w.tiles + block - 1) / block;
    m_frequency = odd_lines(block * channels_out);
    v_size = 0;
    for (int k = 0; k < p.num_terms; ++k) {
      const int64_t size = w.kFrequencies * v_frequency(p, k);
      v_size = shared ? v_size + size : larger(v_size, size);
    }
    m_size = w.kFrequencies * m_frequency;
    // Moments: one cell per tile and phase, a sample's cells side by side.
    const int64_t cells = p.epilogue != nullptr && p.epilogue->mean != nullptr ? w.tiles * p.num_phases : 0;
    cells_size = round_up(cells * kLaneMomentsFloats, 16);
    by_taps = false;
    for (int k = 0; k < p.num_terms; ++k) by_taps = by_taps || p.term[k].by_taps;
    expanded_size = by_taps ? kExpandedFloats<Patch> : 0;
  }
};

// ---------------------------------------------------------------- forward and backward-data

template <int Patch, int Kernel>
static void winograd_conv_form(const WinogradConvParams& p) {
  const WinogradConvSizes<Patch, Kernel> s(p);
  constexpr int kFrequencies = Patch * Patch;

  // Floats of V of one term.
  auto v_of = [&](int k) { return kFrequencies * s.v_frequency(p, k); };
  auto transform = [&](float* v, int k, int64_t first, int64_t i) {
    const WinogradTerm& term = p.term[k];
    const int64_t padded = round_up(term.channels, kVectorFloats);
    s.w.transform_input(term.x, term.strides, term.shift, term.channels, first + i, v + i * padded,
                        s.v_frequency(p, k));
  };
  // One frequency and panel of a term: `weight` has `depth` of its input channels, from channel `from` on.
  auto multiply_by = [&](const float* v, float* m, int k, int64_t count, int64_t f, int64_t panel, const float* weight,
                         int64_t from, int64_t depth, const float* next, int64_t next_floats) {
    float* out = m + f * s.m_frequency + panel * kGemmCols;
    const int phase = static_cast<int>(panel * kGemmCols / s.phase_channels);
    auto missing = [&](int term) {
      return vanishes<Patch>(p.num_phases > 1 ? p.vanishing[phase] : p.term[term].vanishing, f);
    };
    bool written = false;
    for (int before = 0; before < k; ++before) written = written || !missing(before);
    if (!missing(k)) {
      const int64_t padded = round_up(p.term[k].channels, kVectorFloats);
      gemm_panel(count, depth, v + f * s.v_frequency(p, k) + from, padded, 1, weight, kGemmCols, out, s.channels_out,
                 written || from > 0, reinterpret_cast<const char*>(next), 4 * next_floats);
    } else if (!written && k == p.num_terms - 1 && from == 0) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < kGemmCols; c += kVectorFloats) store(out + i * s.channels_out + c, vec{});
    }
  };
  auto multiply = [&](const float* v, float* m, int k, int64_t count, int64_t f, int64_t panel) {
    const int64_t channels = p.term[k].channels, floats = channels * kGemmCols;
    const float* weight = p.term[k].packed + (f * s.panels + panel) * floats;
    multiply_by(v, m, k, count, f, panel, weight, 0, channels, weight + floats, floats);
  };
  // A row of frequencies, whose weights are perhaps transformed first, chunk by chunk, into `expanded`.
  auto multiply_row = [&](const float* v, float* m, int k, int64_t count, int row, int64_t panel, float* expanded) {
    if (!p.term[k].by_taps) {
      for (int b = 0; b < Patch; ++b) multiply(v, m, k, count, row * Patch + b, panel);
      return;
    }
    if constexpr (Kernel == 3) {
      constexpr int64_t kTaps = Kernel * Kernel * kGemmCols;  // of a channel
      const TapRows<Patch, Kernel> read(row);
      const int64_t channels = p.term[k].channels;
      for (int64_t from = 0; from < channels; from += kTapsChunk) {
        const int64_t depth = smaller(kTapsChunk, channels - from);
        const float* taps = p.term[k].packed + (panel * channels + from) * kTaps;
        winograd_expand<Patch, Kernel>(taps, depth, row, expanded);
        // Of what the row reads of the next chunk (or of the next panel's first one) each frequency asks for a part.
        const int64_t left = channels - from - depth, after = smaller(kTapsChunk, left > 0 ? left : channels);
        const int64_t share = after * Kernel * kGemmCols * (read.last - read.first) / Patch;
        const float* next = taps + depth * kTaps + after * Kernel * kGemmCols * read.first;
        for (int b = 0; b < Patch; ++b)
          multiply_by(v, m, k, count, row * Patch + b, panel, expanded + b * kExpandedFrequency, from, depth,
                      next + b * share, share);
      }
    }
  };
  LaneMoments* cells = s.cells_size > 0 ? reinterpret_cast<LaneMoments*>(p.workspace) : nullptr;
  float* room = p.workspace + s.cells_size + s.expanded_size * p.num_threads;
  auto finish = [&](const float* m, int64_t first, int64_t i) {
    for (int phase = 0; phase < p.num_phases; ++phase) {
      LaneMoments* cell = cells != nullptr ? cells + (first + i) * p.num_phases + phase : nullptr;
      if (cell != nullptr) *cell = LaneMoments{};
      s.w.transform_output(m + i * s.channels_out + phase * s.phase_channels, s.m_frequency, p.out_channels, first + i,
                           p.y[phase], p.y_strides, p.accumulate, p.epilogue, cell);
    }
  };

#pragma omp parallel num_threads(p.num_threads)
  {
    float* expanded = p.workspace + s.cells_size + s.expanded_size * omp_get_thread_num();
    if (s.shared) {
      float* v = room;
      float* m = v + s.v_size;
      for (int64_t b = 0; b < s.blocks; ++b) {
        const int64_t first = b * s.block, count = smaller(s.block, s.w.tiles - first);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
          float* at = v;
          for (int k = 0; k < p.num_terms; at += v_of(k++)) transform(at, k, first, i);
        }
        // (barrier: a frequency needs all tiles)
        if (s.by_taps) {
#pragma omp for collapse(2) schedule(static)
          for (int row = 0; row < Patch; ++row)
            for (int64_t panel = 0; panel < s.panels; ++panel) {
              const float* at = v;
              for (int k = 0; k < p.num_terms; at += v_of(k++)) multiply_row(at, m, k, count, row, panel, expanded);
            }
        } else {
#pragma omp for collapse(2) schedule(static)
          for (int64_t f = 0; f < kFrequencies; ++f)
            for (int64_t panel = 0; panel < s.panels; ++panel) {
              const float* at = v;
              for (int k = 0; k < p.num_terms; at += v_of(k++)) multiply(at, m, k, count, f, panel);
            }
        }
        // (barrier: a tile needs all frequencies)
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) finish(m, first, i);
        // (barrier: the next block writes v and m again)
      }
    } else {
      float* v = room + omp_get_thread_num() * (s.v_size + s.m_size);
      float* m = v + s.v_size;
#pragma omp for schedule(static)
      for (int64_t b = 0; b < s.blocks; ++b) {
        const int64_t first = b * s.block, count = smaller(s.block, s.w.tiles - first);
        for (int k = 0; k < p.num_terms; ++k) {
          for (int64_t i = 0; i < count; ++i) transform(v, k, first, i);
          if (s.by_taps) {
            for (int row = 0; row < Patch; ++row)
              for (int64_t panel = 0; panel < s.panels; ++panel) multiply_row(v, m, k, count, row, panel, expanded);
          } else {
            for (int64_t f = 0; f < kFrequencies; ++f)
              for (int64_t panel = 0; panel < s.panels; ++panel) multiply(v, m, k, count, f, panel);
          }
        }
        for (int64_t i = 0; i < count; ++i) finish(m, first, i);
      }
    }
    if (p.epilogue != nullptr) epilogue_end();
    // (barrier: a sample's statistics need all its tiles)
    if (cells != nullptr) {
      const int64_t per_sample = s.w.tiles_h * s.w.tiles_w * p.num_phases;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.samples; ++n) epilogue_statistics(*p.epilogue, n, cells + n * per_sample, per_sample);
    }
  }
}

template <int Patch, int Kernel>
static int64_t winograd_conv_workspace_form(const WinogradConvParams& p) {
  const WinogradConvSizes<Patch, Kernel> s(p);
  return s.cells_size + s.expanded_size * p.num_threads + (s.v_size + s.m_size) * (s.shared ? 1 : p.num_threads);
}
