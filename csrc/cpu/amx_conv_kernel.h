// amx_conv: forward and backward-data. Included inside namespace rnndyn::<isa>; parameters are documented in amx_conv.h.
//
// Maths: y[m, i, j, o] = sum over taps t and channels c of x[m, s i + row_t, s j + column_t, c] w[o, c, index_t], per phase, as matrix products of
//   rows (pixels and samples) by columns (output channels), 32 x 32 sums in registers over all taps and channels.
// Precision: relative error against float64 in norm with 3 parts 2e-7, as float32 has it; with 2 parts 4.5e-6; with 1 part that of bfloat16.
// Traffic: x is read and split once per band of rows, which then stays in L2; the packed weights (as large as float32 ones) stream from L2 or
//   L3 once per band and panel of 32 output channels, as fast as the processor prefetches them by itself (asked for by instructions they came more
//   slowly: 10 to 25%). Sums never leave the registers. A step of 12 products of tiles takes 192 cycles and 8 KB of loads, so the products are the
//   limit.
//   Weights that are not packed ahead are read once per band as well, and split where they then stay in L2, a piece of a panel at a time: two
//   thirds of the traffic, for splitting them in every call.
// Layout: a band of x is stored as lines of 64 bytes, 32 channels of one part of one pixel of one sample: [C_in / 32, parts, rows, residue of
//   the column modulo in_step, columns, samples of the group]. So 16 neighbouring results of a row of a grid read 16 adjacent lines, whatever
//   the tap, and a few samples side by side fill tiles where maps are narrow; where there are no more samples, tiles go on into the next row, and
//   what they compute between rows is left out. Outside the map lines are zero; taps that see only them are left out.
// Threads share bands of groups of samples, and panels where those are few. Determinism: each sum has one order, whatever the threads.
// Limits: kAmxMaxTaps, kAmxMaxPhases. With several parts infinity becomes NaN (times the zero of another part).

constexpr int64_t kAmxBandBytes = 1152 * 1024;  // of the 2 MB L2; the rest is for a panel of weights

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
  int64_t height, groups, band, bands, panels, split, band_lines, pairs, depth, sums, cells, piece;

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
    // Weights that are larger than x are read by one thread each: threads share panels.
    const bool share_panels = groups * bands < p.num_threads && panels >= p.num_threads && weights > bytes_of(height);
    // Else a whole number of bands per thread, if a few more bands give it.
    if (groups * bands < 8 * p.num_threads && !share_panels)
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
    piece = p.phase[0].packed == nullptr ? depth * block_bytes : 0;
    // Moments: one cell per row of a grid and panel, a sample's cells side by side.
    cells = 0;
    if (p.epilogue != nullptr && p.epilogue->mean != nullptr)
      for (int k = 0; k < p.num_phases; ++k) cells += p.phase[k].height * panels;
  }
  int64_t cells_bytes(const AmxConvParams& p) const {
    return round_up(p.samples * cells * int64_t(sizeof(LaneMoments)), 64);
  }
  int64_t line_bytes(const AmxConvParams& p) const { return layout.blocks * p.parts * band_lines * 64; }
  int64_t bytes(const AmxConvParams& p) const { return line_bytes(p) + sums * 4 * kTileBytes + piece; }
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
            // (Two pixels ahead: so many lines are stored to that the processor does not look far itself.)
            if (inside) {
              __builtin_prefetch(pixel + b * 32 + 2 * l.step * p.in_channels, 0, 3);
              __builtin_prefetch(pixel + b * 32 + 2 * l.step * p.in_channels + 16, 0, 3);
            }
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

// 16 results: lines [first, first + 16) of (column, sample) of a row of the grid within the band, perhaps reaching into rows up to `last`.
struct AmxResults {
  int64_t row, last, first;
};

// Where the results of a pair of tiles go: asked for, some at each step, while they are computed. Stores to lines that are in no cache wait for
// them, and all asked for at once keep the loads of tiles waiting.
struct AmxTargets {
  int count;
  float* pixel[32];
};

template <int Parts, bool kPair>
static void amx_sum(TileScope& scope, const AmxActiveTaps& taps, int num_taps, int64_t blocks, const char* a0,
                    const char* a1, int64_t part, const char* b, const AmxTargets& targets) {
  constexpr int64_t kStep = Parts * 2 * kTileBytes;
  const int at_once = static_cast<int>(ceil_div(targets.count, larger(1, blocks * taps.count)));
  int asked = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int t = 0; t < taps.count; ++t) {
      for (const int last = static_cast<int>(smaller(targets.count, asked + at_once)); asked < last; ++asked)
        __builtin_prefetch(targets.pixel[asked], 1, 3), __builtin_prefetch(targets.pixel[asked] + 16, 1, 3);
      tile_step<Parts, kPair>(scope, a0 + taps.offset[t], a1 + taps.offset[t], part, b + taps.position[t] * kStep);
      tile_stay_awake(scope);
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
  uint16_t* piece;     // of a panel, where weights are not packed ahead
  LaneMoments* cells;  // of the phase's first row in sample 0, [rows, panels]; or null
  int64_t row_lines, width_lines, row_tiles, tiles, offset[kAmxMaxTaps];
  bool flat;  // tiles reach into the next row

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
        piece(reinterpret_cast<uint16_t*>(scratch + sizes.sums * kTileBytes)),
        cells(moments) {
    row_lines = s.layout.step * s.layout.step * s.layout.columns * group;
    width_lines = phase.width * group;
    row_tiles = ceil_div(width_lines, 16);
    tiles = rows * row_tiles;
    const int64_t flat_tiles = ceil_div((rows - 1) * row_lines + width_lines, 16);
    flat = flat_tiles < tiles;
    if (flat) tiles = flat_tiles;
    for (int t = 0; t < phase.num_taps; ++t) offset[t] = s.layout.offset(phase.tap[t], group) * 64;
  }

  float* sum_of(int64_t pair) const { return sums + pair % s.sums * 1024; }

  AmxResults results(int64_t tile) const {
    if (!flat) return {tile / row_tiles, tile / row_tiles, tile % row_tiles * 16};
    return {tile * 16 / row_lines, smaller((tile * 16 + 15) / row_lines, rows - 1), tile * 16 % row_lines};
  }

  AmxActiveTaps active(const AmxResults& one, const AmxResults& two) const {
    // The rectangle of x that both see, but for the taps.
    const int64_t step = s.layout.step, top = (first + one.row) * step, bottom = (first + two.last) * step;
    const int64_t left = one.row == two.last ? one.first / group * step : 0;
    // (A grid may be wider than x: that of a transposed convolution without padding.)
    const int64_t right = (one.row == two.last ? (two.first + 15) / group : phase.width - 1) * step;
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

  // function(pixel of y, line, sample, row, column) for each result of a tile.
  template <class Function>
  void each_result(int64_t tile, int64_t panel, Function function) const {
    const AmxResults r = results(tile);
    for (int64_t row = r.row, line = 0, skip = r.first; row <= r.last; ++row, line += row_lines - skip, skip = 0) {
      int64_t n = skip % group, column = skip / group;
      float* y = phase.y + sample * p.y_strides.sample + (first + row) * p.y_strides.row + column * p.y_strides.column +
                 panel * 32;
      for (int64_t at = line; at < smaller(16, line + width_lines - skip); ++at) {
        function(y + n * p.y_strides.sample, at, sample + n, row, column);
        if (++n == group) n = 0, ++column, y += p.y_strides.column;
      }
    }
  }

  void write(int64_t pair, int64_t panel, const float* from) const {
    const int64_t channels = smaller(32, p.out_channels - panel * 32);
    for (int half = 0; half < 2 && 2 * pair + half < tiles; ++half)
      each_result(2 * pair + half, panel, [&](float* y, int64_t line, int64_t n, int64_t row_of, int64_t column) {
        const float* row = from + (half * 16 + line) * 32;
        for (int64_t c = 0; c < channels; c += kVectorFloats) {
          vec value = load(row + c);
          if (p.accumulate) value += load_part(y + c, channels - c);
          store_part(y + c, value, channels - c);
        }
        if (p.epilogue == nullptr) return;
        LaneMoments* cell = nullptr;
        if (cells != nullptr) {
          cell = cells + n * s.cells + (first + row_of) * s.panels + panel;
          if (column == 0) *cell = LaneMoments{};  // (a thread walks a row from its first column on)
        }
        epilogue_block(*p.epilogue, y, 1, 0, 1, 0, panel * 32, channels, cell);
      });
  }

  // Sums of a pair of tiles, or of the last one alone.
  template <int Parts>
  void sum(TileScope& scope, int64_t pair, const char* x, int64_t blocks, const char* b,
           const AmxTargets& targets) const {
    const bool both = 2 * pair + 1 < tiles;
    const AmxResults one = results(2 * pair), two = both ? results(2 * pair + 1) : one;
    const int64_t part = s.band_lines * 64;
    const char *a0 = x + (one.row * row_lines + one.first) * 64, *a1 = x + (two.row * row_lines + two.first) * 64;
    (both ? amx_sum<Parts, true> : amx_sum<Parts, false>)(scope, active(one, two), phase.num_taps, blocks, a0, a1, part,
                                                          b, targets);
  }

  // Blocks of a panel's weights.
  const char* weights(int64_t panel, int64_t low, int64_t blocks) const {
    const int64_t block_size = phase.num_taps * p.parts * kTileBytes;
    if (phase.packed != nullptr)
      return reinterpret_cast<const char*>(phase.packed + (panel * s.layout.blocks + low) * block_size);
    const AmxPackParams pack{p.out_channels, p.in_channels, p.out_stride, p.in_stride, p.parts, 1,
                             phase.num_taps, phase.tap,     phase.weight, nullptr};
    for (int64_t k = 0; k < blocks; ++k) amx_pack_block(pack, panel, low + k, piece + k * block_size);
    __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
    return reinterpret_cast<const char*>(piece);
  }

  void panel(TileScope& scope, int64_t panel) const {
    const AmxLayout& l = s.layout;
    const int64_t part = s.band_lines * 64, pairs = ceil_div(tiles, 2);
    for (int64_t low = 0; low < l.blocks; low += s.depth) {
      const int64_t blocks = smaller(s.depth, l.blocks - low);
      const bool last = low + blocks == l.blocks;
      const char* b = weights(panel, low, blocks);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        AmxTargets targets;
        targets.count = 0;
        for (int64_t tile = 2 * pair; last && tile < smaller(2 * pair + 2, tiles); ++tile)
          each_result(tile, panel,
                      [&](float* y, int64_t, int64_t, int64_t, int64_t) { targets.pixel[targets.count++] = y; });
        const char* x = lines + low * p.parts * part;
        float* to = sum_of(pair);
        if (low > 0)
          tile_sums_load(scope, to, 128);
        else
          tile_sums_zero(scope);
        if (p.parts == 3)
          sum<3>(scope, pair, x, blocks, b, targets);
        else if (p.parts == 2)
          sum<2>(scope, pair, x, blocks, b, targets);
        else
          sum<1>(scope, pair, x, blocks, b, targets);
        // (The sums of the pair before are written while the last products of this one are under way.)
        if (last && pair > 0) write(pair - 1, panel, sum_of(pair - 1));
        tile_sums_store(scope, to, 128);
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
    if (p.epilogue != nullptr) epilogue_end();
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
