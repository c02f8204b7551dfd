// amx_conv: forward, backward-data and packing. Included inside namespace rnndyn::<isa>; parameters are documented in amx_conv.h.
//
// Maths: y[m, i, j, o] = sum over taps t and channels c of x[m, s i + row_t, s j + column_t, c] w[o, c, index_t], per phase, as matrix products of
//   rows (pixels and samples) by columns (output channels), 32 x 32 sums in registers over all taps and channels.
// Precision: relative error against float64 in norm with 3 parts 2e-7, as float32 has it; with 2 parts 4.5e-6; with 1 part that of bfloat16.
// Traffic: x is read and split once per band of rows, which then stays in L2; the packed weights (as large as float32 ones) stream from L2 or
//   L3 once per band and panel of 32 output channels, the next panel prefetched meanwhile. Sums never leave the registers. A step of 12 products of
//   tiles takes 192 cycles and 8 KB of loads, so the products are the limit.
// Layout: a band of x is stored as lines of 64 bytes, 32 channels of one part of one pixel of one sample: [C_in / 32, parts, rows, residue of
//   the column modulo in_step, columns, samples of the group]. So 16 neighbouring results of a row of a grid read 16 adjacent lines, whatever
//   the tap, and a few samples side by side fill tiles where maps are narrow. Outside the map lines are zero; taps that see only them are left out.
// Threads share bands of groups of samples, and panels where those are few. Determinism: each sum has one order, whatever the threads.
// Limits: kAmxMaxTaps, kAmxMaxPhases. With several parts infinity becomes NaN (times the zero of another part).

constexpr int64_t kAmxBandBytes = 896 * 1024;  // of the 2 MB L2; the rest is for a panel of weights

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Samples side by side so that the rows of a grid fill tiles: the fewest that waste at most a twentieth, or else that waste least.
static inline int64_t group_of_samples(int64_t samples, int64_t width, int64_t lines) {
  int64_t best = 1;
  double least = 2;
  for (int64_t n = 1; n <= smaller(samples, lines); n *= 2) {
    const double waste = double(ceil_div(width * n, lines) * lines) / double(width * n) - 1;
    if (waste < least - 1e-9) best = n, least = waste;
    if (waste <= 0.05) break;
  }
  return best;
}

// How a band of x lies in memory, in lines.
struct AmxLayout {
  int64_t first_row, last_row;   // of the taps
  int64_t first_shift, columns;  // of floor(column_t / step); columns stored per residue
  int64_t group, blocks, row_lines, step;

  template <class Phases>
  AmxLayout(const Phases* phases, int num_phases, int64_t samples, int64_t channels, int64_t in_step, int64_t lines)
      : step(in_step) {
    first_row = first_shift = 1 << 30, last_row = -(1 << 30);
    int64_t last_shift = -(1 << 30), width = 0;
    for (int p = 0; p < num_phases; ++p) {
      width = larger(width, phases[p].width);
      for (int t = 0; t < phases[p].num_taps; ++t) {
        const AmxTap& tap = phases[p].tap[t];
        const int64_t shift = floor_div(tap.column, step);
        first_row = smaller(first_row, tap.row), last_row = larger(last_row, tap.row);
        first_shift = smaller(first_shift, shift), last_shift = larger(last_shift, shift);
      }
    }
    group = group_of_samples(samples, width, lines);
    columns = width + last_shift - first_shift;
    row_lines = step * columns * group;
    blocks = ceil_div(channels, 32);
  }
  // Twice as many samples side by side.
  void grow() { group *= 2, row_lines *= 2; }
  int64_t rows(int64_t grid_rows) const { return (grid_rows - 1) * step + last_row - first_row + 1; }
  // Of a tap, relative to the line of its result.
  int64_t offset(const AmxTap& tap, int64_t group_now) const {
    const int64_t shift = floor_div(tap.column, step), residue = tap.column - shift * step;
    return (((tap.row - first_row) * step + residue) * columns + shift - first_shift) * group_now;
  }
};

struct AmxConvSizes {
  AmxLayout layout;
  int64_t height, groups, band, bands, panels, split, band_lines, pairs, depth, sums, cells;

  explicit AmxConvSizes(const AmxConvParams& p)
      : layout(p.phase, p.num_phases, p.samples, p.in_channels, p.in_step, 16), height(0) {
    int64_t taps = 1, width = 0, weights = 0;
    for (int k = 0; k < p.num_phases; ++k) {
      height = larger(height, p.phase[k].height), width = larger(width, p.phase[k].width);
      taps = larger(taps, p.phase[k].num_taps), weights += p.phase[k].num_taps;
    }
    panels = ceil_div(p.out_channels, 32);
    const int64_t block_bytes = taps * p.parts * 2 * kTileBytes;
    weights *= panels * layout.blocks * p.parts * 2 * kTileBytes;
    auto bytes_of = [&](int64_t rows) { return layout.rows(rows) * layout.row_lines * layout.blocks * p.parts * 64; };
    // Weights that do not stay in L2 are read once per band: so larger bands.
    while (weights > 1024 * 1024 && 2 * bytes_of(height) <= kAmxBandBytes &&
           p.samples >= 2 * layout.group * p.num_threads)
      layout.grow();
    groups = ceil_div(p.samples, layout.group);
    band = height;
    while (band > 1 && bytes_of(band) > kAmxBandBytes) band = ceil_div(band, 2);
    bands = ceil_div(height, band);
    // A whole number of bands per thread, if a few more bands give it.
    if (groups * bands < 8 * p.num_threads)
      for (int64_t more = bands; more <= smaller(2 * bands, height); ++more)
        if (groups * more % p.num_threads == 0) {
          bands = more;
          break;
        }
    band = ceil_div(height, bands);
    bands = ceil_div(height, band);
    split = groups * bands >= p.num_threads ? 1 : smaller(panels, ceil_div(p.num_threads, groups * bands));
    band_lines = layout.rows(band) * layout.row_lines + 32;  // (and what the last tile reads past the end)
    pairs = ceil_div(band * ceil_div(width * layout.group, 16), 2);
    // A panel goes past all tiles of a band, so a piece of it that stays in L2 at a time.
    const int64_t pieces = ceil_div(layout.blocks * block_bytes, larger(640 * 1024, block_bytes));
    depth = ceil_div(layout.blocks, pieces);
    sums = pieces > 1 ? pairs : 2;
    // Moments: one cell per row of a grid and panel, a sample's cells side by side.
    cells = 0;
    if (p.epilogue != nullptr && p.epilogue->mean != nullptr)
      for (int k = 0; k < p.num_phases; ++k) cells += p.phase[k].height * panels;
  }
  int64_t cells_bytes(const AmxConvParams& p) const {
    return round_up(p.samples * cells * int64_t(sizeof(LaneMoments)), 64);
  }
  int64_t line_bytes(const AmxConvParams& p) const { return layout.blocks * p.parts * band_lines * 64; }
  int64_t bytes(const AmxConvParams& p) const { return line_bytes(p) + sums * 4 * kTileBytes; }
};

// Rows [first, first + rows) of x, of `group` samples, as lines.
static void amx_pack_band(const AmxConvParams& p, const AmxConvSizes& s, int64_t sample, int64_t group, int64_t first,
                          int64_t rows, char* out) {
  const AmxLayout& l = s.layout;
  const int64_t part = s.band_lines * 64;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t residue = 0; residue < l.step; ++residue)
      for (int64_t k = 0; k < l.columns; ++k) {
        const int64_t row = first + r, column = (k + l.first_shift) * l.step + residue;
        const bool inside = row >= 0 && row < p.in_height && column >= 0 && column < p.in_width;
        char* line = out + ((r * l.step + residue) * l.columns + k) * group * 64;
        for (int64_t n = 0; n < group; ++n, line += 64) {
          const float* pixel = p.x + (((sample + n) * p.in_height + row) * p.in_width + column) * p.in_channels;
          for (int64_t b = 0; b < l.blocks; ++b) {
            char* hi = line + b * p.parts * part;
            split_bf16(inside ? pixel + b * 32 : p.x, inside ? p.in_channels - b * 32 : 0, p.parts, hi, part);
          }
        }
      }
}

// The taps through which tiles of results see anything, with where in a band and in a panel.
struct AmxActiveTaps {
  int count;
  int64_t offset[kAmxMaxTaps];  // bytes
  int position[kAmxMaxTaps];
};

// 16 results: row of the grid within the band, lines [first, first + 16) of (column, sample).
struct AmxResults {
  int64_t row, first;
};

template <int Parts>
static void amx_sum(TileScope& scope, const AmxActiveTaps& taps, int num_taps, int64_t blocks, const char* a0,
                    const char* a1, int64_t part, const char* b, const char* next, int64_t next_step) {
  constexpr int64_t kStep = Parts * 2 * kTileBytes;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int t = 0; t < taps.count; ++t) {
      for (int64_t i = 0; i < next_step; i += 64) __builtin_prefetch(next + i, 0, 2);
      next += next_step;
      tile_step<Parts>(scope, a0 + taps.offset[t], a1 + taps.offset[t], part, b + taps.position[t] * kStep);
    }
    a0 += Parts * part, a1 += Parts * part;
    b += num_taps * kStep;
  }
}

// One phase of a band that is packed already.
struct AmxBand {
  const AmxConvParams& p;
  const AmxConvSizes& s;
  const AmxPhase& phase;
  int64_t sample, group, first, rows;  // samples, and rows of the grid
  const char* lines;
  float* sums;         // [pairs, 32, 32], or of the last two pairs where all is summed at once
  LaneMoments* cells;  // of the phase's first row in sample 0, [rows, panels]; or null
  int64_t width_lines, row_tiles, tiles, offset[kAmxMaxTaps];

  AmxBand(const AmxConvParams& params, const AmxConvSizes& sizes, const AmxPhase& grid, int64_t first_sample,
          int64_t samples, int64_t first_row, int64_t num_rows, const char* x, float* scratch, LaneMoments* moments)
      : p(params),
        s(sizes),
        phase(grid),
        sample(first_sample),
        group(samples),
        first(first_row),
        rows(num_rows),
        lines(x),
        sums(scratch),
        cells(moments) {
    width_lines = phase.width * group;
    row_tiles = ceil_div(width_lines, 16);
    tiles = rows * row_tiles;
    for (int t = 0; t < phase.num_taps; ++t) offset[t] = s.layout.offset(phase.tap[t], group) * 64;
  }

  float* sum_of(int64_t pair) const { return sums + pair % s.sums * 1024; }

  AmxResults results(int64_t tile) const { return {tile / row_tiles, tile % row_tiles * 16}; }

  AmxActiveTaps active(const AmxResults& one, const AmxResults& two) const {
    // The rectangle of x that both see, but for the taps.
    const int64_t step = s.layout.step, top = (first + one.row) * step, bottom = (first + two.row) * step;
    const int64_t left = one.row == two.row ? one.first / group * step : 0;
    const int64_t right = one.row == two.row ? (two.first + 15) / group * step : p.in_width;
    AmxActiveTaps taps;
    taps.count = 0;
    for (int t = 0; t < phase.num_taps; ++t) {
      const AmxTap& tap = phase.tap[t];
      if (bottom + tap.row < 0 || top + tap.row >= p.in_height || right + tap.column < 0 ||
          left + tap.column >= p.in_width)
        continue;
      taps.offset[taps.count] = offset[t], taps.position[taps.count++] = t;
    }
    return taps;
  }

  // function(pixel of y, line, sample, column) for each result of a tile.
  template <class Function>
  void each_result(int64_t tile, int64_t panel, Function function) const {
    const AmxResults r = results(tile);
    int64_t n = r.first % group, column = r.first / group;
    float* y = phase.y + sample * p.y_strides.sample + (first + r.row) * p.y_strides.row + column * p.y_strides.column +
               panel * 32;
    for (int64_t line = 0; line < smaller(16, width_lines - r.first); ++line) {
      function(y + n * p.y_strides.sample, line, sample + n, column);
      if (++n == group) n = 0, ++column, y += p.y_strides.column;
    }
  }

  void write(int64_t pair, int64_t panel, const float* from) const {
    const int64_t channels = smaller(32, p.out_channels - panel * 32);
    for (int half = 0; half < 2 && 2 * pair + half < tiles; ++half)
      each_result(2 * pair + half, panel, [&](float* y, int64_t line, int64_t n, int64_t column) {
        const float* row = from + (half * 16 + line) * 32;
        for (int64_t c = 0; c < channels; c += kVectorFloats) {
          vec value = load(row + c);
          if (p.accumulate) value += load_part(y + c, channels - c);
          store_part(y + c, value, channels - c);
        }
        if (p.epilogue == nullptr) return;
        LaneMoments* cell = nullptr;
        if (cells != nullptr) {
          cell = cells + n * s.cells + (first + results(2 * pair + half).row) * s.panels + panel;
          if (column == 0) *cell = LaneMoments{};  // (a thread walks a row from its first column on)
        }
        epilogue_block(*p.epilogue, y, 1, 0, 1, 0, panel * 32, channels, cell);
      });
  }

  void panel(TileScope& scope, int64_t panel) const {
    const AmxLayout& l = s.layout;
    const int64_t part = s.band_lines * 64, block_bytes = phase.num_taps * p.parts * 2 * kTileBytes,
                  pairs = ceil_div(tiles, 2);
    const char* b = reinterpret_cast<const char*>(phase.packed) + panel * l.blocks * block_bytes;
    const auto sum_of_parts = p.parts == 3 ? amx_sum<3> : p.parts == 2 ? amx_sum<2> : amx_sum<1>;
    for (int64_t low = 0; low < l.blocks; low += s.depth) {
      const int64_t blocks = smaller(s.depth, l.blocks - low);
      const bool last = low + blocks == l.blocks;
      // Meanwhile the weights that come next are brought into L2, a share per step.
      const bool more = !last || panel + 1 < s.panels;
      const int64_t next_step = more ? ceil_div(p.parts * 2 * kTileBytes, pairs * 64) * 64 : 0;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const AmxResults one = results(2 * pair), two = results(smaller(2 * pair + 1, tiles - 1));
        const AmxActiveTaps taps = active(one, two);
        // Stores to lines that are in no cache wait for them; so ask for them now.
        if (last)
          for (int half = 0; half < 2 && 2 * pair + half < tiles; ++half)
            each_result(2 * pair + half, panel, [](float* y, int64_t, int64_t, int64_t) {
              __builtin_prefetch(y, 1, 3), __builtin_prefetch(y + 16, 1, 3);
            });
        const char* x = lines + low * p.parts * part;
        const int64_t row_bytes = l.step * l.step * l.columns * group * 64;
        float* sum = sum_of(pair);
        if (low > 0)
          tile_sums_load(scope, sum, 128);
        else
          tile_sums_zero(scope);
        sum_of_parts(scope, taps, phase.num_taps, blocks, x + one.row * row_bytes + one.first * 64,
                     x + two.row * row_bytes + two.first * 64, part, b + low * block_bytes,
                     b + (low + blocks) * block_bytes + pair * blocks * phase.num_taps * next_step, next_step);
        // (The sums of the pair before are written while the last products of this one are under way.)
        if (last && pair > 0) write(pair - 1, panel, sum_of(pair - 1));
        tile_sums_store(scope, sum, 128);
      }
      if (last) write(pairs - 1, panel, sum_of(pairs - 1));
    }
  }
};

static void amx_conv(const AmxConvParams& p) {
  const AmxConvSizes s(p);
  const AmxLayout& l = s.layout;
#pragma omp parallel num_threads(p.num_threads)
  {
    TileScope scope;
    LaneMoments* cells = s.cells > 0 ? static_cast<LaneMoments*>(p.workspace) : nullptr;
    char* lines = static_cast<char*>(p.workspace) + s.cells_bytes(p) + omp_get_thread_num() * s.bytes(p);
    float* sums = reinterpret_cast<float*>(lines + s.line_bytes(p));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.groups * s.bands * s.split; ++item) {
      const int64_t share = item % s.split, first = item / s.split % s.bands * s.band,
                    sample = item / s.split / s.bands * l.group;
      const int64_t group = smaller(l.group, p.samples - sample), rows = smaller(s.band, s.height - first);
      amx_pack_band(p, s, sample, group, first * l.step + l.first_row, l.rows(rows), lines);
      __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
      for (int64_t panel = s.panels * share / s.split; panel < s.panels * (share + 1) / s.split; ++panel) {
        LaneMoments* of_phase = cells;
        for (int k = 0; k < p.num_phases; ++k) {
          const int64_t phase_rows = smaller(rows, p.phase[k].height - first);
          if (phase_rows > 0)
            AmxBand(p, s, p.phase[k], sample, group, first, phase_rows, lines, sums, of_phase).panel(scope, panel);
          if (of_phase != nullptr) of_phase += p.phase[k].height * s.panels;
        }
      }
    }
    // (barrier: a sample's statistics need all its rows and panels)
    if (cells != nullptr) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.samples; ++n) epilogue_statistics(*p.epilogue, n, cells + n * s.cells, s.cells);
    }
  }
}

static int64_t amx_conv_workspace(const AmxConvParams& p) {
  const AmxConvSizes s(p);
  return s.cells_bytes(p) + s.bytes(p) * p.num_threads;
}

// ---------------------------------------------------------------- weights

static int64_t amx_packed_size(const AmxPackParams& p) {
  return ceil_div(p.out_channels, 32) * ceil_div(p.in_channels, 32) * p.num_taps * p.parts * kTileBytes;
}

#ifdef RNNDYN_AMX

// 16 floats `stride` apart; those beyond the first `lanes` are not read and count as zero.
static inline __m512 amx_lanes(const float* from, int64_t stride, int64_t lanes) {
  const __mmask16 mask = first_lanes(lanes);
  if (stride == 1) return _mm512_maskz_loadu_ps(mask, from);
  const __m512i step = _mm512_mullo_epi32(_mm512_set1_epi32(int(stride)),
                                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, step, from, 4);
}

// A tile of weights: row i / 2 holds a pair of input channels for each of 16 output channels; parts kTileBytes elements apart. The channels
// that are nearer in memory fill the lanes.
static inline void amx_pack_tile(const AmxPackParams& p, const float* from, int64_t outs, int64_t ins, uint16_t* out) {
  if (p.out_stride < p.in_stride) {
    alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    for (int64_t i = 0; i < 32; i += 2) {
      __m512 x0 = amx_lanes(from + i * p.in_stride, p.out_stride, i < ins ? outs : 0);
      __m512 x1 = amx_lanes(from + (i + 1) * p.in_stride, p.out_stride, i + 1 < ins ? outs : 0);
      for (int part = 0; part < p.parts; ++part)
        _mm512_storeu_si512(out + part * kTileBytes + i * 16, _mm512_permutexvar_epi16(interleave, next_part(x0, x1)));
    }
    return;
  }
  alignas(64) uint16_t rows[3][512];
  for (int64_t o = 0; o < 16; ++o) {
    const float* row = from + o * p.out_stride;
    __m512 x0 = amx_lanes(row, p.in_stride, o < outs ? ins : 0);
    __m512 x1 = amx_lanes(row + 16 * p.in_stride, p.in_stride, o < outs ? ins - 16 : 0);
    for (int part = 0; part < p.parts; ++part) _mm512_store_si512(rows[part] + o * 32, next_part(x0, x1));
  }
  for (int part = 0; part < p.parts; ++part)
    amx_transpose(rows[part], reinterpret_cast<char*>(out + part * kTileBytes), 64);
}

#else

static inline void amx_pack_tile(const AmxPackParams& p, const float* from, int64_t outs, int64_t ins, uint16_t* out) {
  for (int64_t o = 0; o < 16; ++o)
    for (int64_t i = 0; i < 32; ++i)
      split_value(o < outs && i < ins ? from[o * p.out_stride + i * p.in_stride] : 0.0f, p.parts,
                  out + i / 2 * 32 + o * 2 + i % 2, kTileBytes);
}

#endif

static void amx_pack_weight(const AmxPackParams& p) {
  const int64_t blocks = ceil_div(p.in_channels, 32), panels = ceil_div(p.out_channels, 32);
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.num_threads)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t block = 0; block < blocks; ++block)
      for (int half = 0; half < 2; ++half)
        for (int t = 0; t < p.num_taps; ++t) {
          uint16_t* out = p.packed + ((panel * blocks + block) * p.num_taps + t) * p.parts * kTileBytes;
          const int64_t first_out = panel * 32 + half * 16, outs = smaller(16, larger(0, p.out_channels - first_out));
          const float* from = p.weight + first_out * p.out_stride + block * 32 * p.in_stride + p.tap[t].index;
          amx_pack_tile(p, from, outs, smaller(32, p.in_channels - block * 32), out + half * (kTileBytes / 2));
        }
}
