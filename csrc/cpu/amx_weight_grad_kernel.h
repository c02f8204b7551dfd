// amx_conv: gradient of the weight. Included inside namespace rnndyn::<isa> after amx_conv_kernel.h; parameters are documented in amx_conv.h.
//
// Maths: dW[t][i, o] = sum over samples m and pixels (r, c) of x[m, s r + row_t, s c + column_t, i] grad[m, r, c, o]: products of x, channels by
//   pixels, with grad, pixels by channels, 32 x 32 sums at a time, the same split into parts as forward.
// Traffic: a band of rows of a group of samples is split and transposed once; then for each tap and 32 x 32 channels the sums are loaded, run
//   through the band's pixels and stored. Channels of x are taken in blocks whose part of the band stays in L2.
// Layout: pixels of a row run over (column, sample of the group), 32 to a tile. x: [C_in / 16, rows, residue, shift, pixels / 32, parts, tile of
//   16 channels by 32 pixels], once for every shift of columns, so that all tiles are aligned (measured: tiles across cache lines cost half
//   the speed); grad: [C_out / 32, rows, pixels / 32, parts, 2 tiles of 16 pairs of pixels by 16 channels]. Both are zero outside their maps.
// Threads take chunks of bands with sums of their own, then all chunks are added in order. The number of chunks depends on the shape alone, so
//   results do not depend on the number of threads.

struct AmxWeightGradSizes {
  AmxPhase phase;  // (its taps: for the layout)
  AmxLayout layout;
  int64_t groups, band, bands, chunks, split, in_tiles, in_pairs, out_pairs, steps, shifts, x_cell, x_tile, grad_row,
      sums;

  static AmxPhase as_phase(const AmxWeightGradParams& p) {
    AmxPhase phase{};
    phase.height = p.height, phase.width = p.width, phase.num_taps = p.num_taps;
    for (int t = 0; t < p.num_taps; ++t) phase.tap[t] = p.tap[t];
    return phase;
  }

  explicit AmxWeightGradSizes(const AmxWeightGradParams& p)
      : phase(as_phase(p)), layout(&phase, 1, p.samples, p.in_channels, p.in_step, 32) {
    // Loading and storing sums must be worth it: at least 32 steps of products per band, if there are.
    while (ceil_div(p.width * layout.group, 32) * p.height < 32 && 2 * layout.group <= p.samples) layout.grow();
    groups = ceil_div(p.samples, layout.group);
    in_pairs = ceil_div(p.in_channels, 32), in_tiles = 2 * in_pairs;
    out_pairs = ceil_div(p.out_channels, 32);
    steps = ceil_div(p.width * layout.group, 32);
    shifts = layout.columns - p.width + 1;
    x_cell = steps * p.parts * kTileBytes;
    grad_row = 2 * x_cell;
    const int64_t x_row = layout.step * layout.step * shifts * x_cell * in_tiles, both = x_row + grad_row * out_pairs;
    // (Of three parts, which are six products a step, half as many are enough.)
    const int64_t fit = larger(kAmxBandBytes / both - (layout.last_row - layout.first_row) / layout.step,
                               ceil_div(p.parts == 3 ? 16 : 32, steps));
    bands = ceil_div(p.height, smaller(fit, p.height));
    band = ceil_div(p.height, bands);
    bands = ceil_div(p.height, band);
    x_tile = layout.rows(band) * layout.step * shifts * x_cell;
    sums = p.num_taps * in_pairs * out_pairs * 1024;
    chunks = 8;
    while (chunks > 1 && (chunks > groups * bands || chunks * sums * 4 > 16 * 1024 * 1024)) chunks /= 2;
    split = smaller(out_pairs, ceil_div(p.num_threads, chunks));
  }
  // One row of 16 channels of x before it is shifted: a multiple of 32 pixels.
  int64_t row_pixels() const { return round_up(steps * 32 + (shifts - 1) * layout.group, 32); }
  int64_t thread_bytes(int64_t parts) const {
    return in_tiles * x_tile + band * grad_row * out_pairs + parts * 16 * row_pixels() * 2;
  }
};

// 32 pixels of 16 channels as pairs of pixels, tile row k is [16 channels][2 pixels], one tile per part. Pixels that are null count as zero.
static inline void amx_pack_pairs(const float* const* pixel, int64_t lanes, int parts, uint16_t* const* out) {
#ifdef RNNDYN_AMX
  const __mmask16 mask = first_lanes(lanes);
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int k = 0; k < 16; ++k) {
    __m512 x0 = pixel[2 * k] ? _mm512_maskz_loadu_ps(mask, pixel[2 * k]) : _mm512_setzero_ps();
    __m512 x1 = pixel[2 * k + 1] ? _mm512_maskz_loadu_ps(mask, pixel[2 * k + 1]) : _mm512_setzero_ps();
    for (int part = 0; part < parts; ++part)
      _mm512_store_si512(out[part] + k * 32, _mm512_permutexvar_epi16(interleave, next_part(x0, x1)));
  }
#else
  for (int k = 0; k < 32; ++k)
    for (int c = 0; c < 16; ++c) {
      uint16_t split[3];
      split_value(pixel[k] && c < lanes ? pixel[k][c] : 0.0f, parts, split, 1);
      for (int part = 0; part < parts; ++part) out[part][k / 2 * 32 + c * 2 + k % 2] = split[part];
    }
#endif
}

// One band of x: rows [first, first + rows).
static void amx_pack_inputs(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t group,
                            int64_t first, int64_t rows, char* out, char* row_room) {
  const AmxLayout& l = s.layout;
  const int64_t row_pixels = s.row_pixels(), row_part = 16 * row_pixels * 2;
  alignas(64) uint16_t tiles[3][512];
  uint16_t* const tile_of[3] = {tiles[0], tiles[1], tiles[2]};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t residue = 0; residue < l.step; ++residue)
      for (int64_t tile = 0; tile < s.in_tiles; ++tile) {
        for (int64_t k = 0; k < row_pixels; k += 32) {
          const float* pixel[32];
          const int64_t row = first + r;
          int64_t n = k % group, column = (k / group + l.first_shift) * l.step + residue;
          for (int64_t i = 0; i < 32; ++i) {
            const bool inside = row >= 0 && row < p.in_height && column >= 0 && column < p.in_width;
            pixel[i] =
                inside ? p.x + (((sample + n) * p.in_height + row) * p.in_width + column) * p.in_channels + tile * 16
                       : nullptr;
            if (++n == group) n = 0, column += l.step;
          }
          amx_pack_pairs(pixel, p.in_channels - tile * 16, p.parts, tile_of);
          for (int part = 0; part < p.parts; ++part)
            amx_transpose(tiles[part], row_room + part * row_part + k * 2, row_pixels * 2);
        }
        char* at = out + tile * s.x_tile + (r * l.step + residue) * s.shifts * s.x_cell;
        for (int64_t shift = 0; shift < s.shifts; ++shift)
          for (int64_t step = 0; step < s.steps; ++step)
            for (int part = 0; part < p.parts; ++part, at += kTileBytes)
              for (int c = 0; c < 16; ++c)
                __builtin_memcpy(at + c * 64,
                                 row_room + part * row_part + (c * row_pixels + step * 32 + shift * group) * 2, 64);
      }
}

// One band of grad, of the pairs of tiles [first_pair, last_pair) of its channels.
static void amx_pack_grads(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t group,
                           int64_t first, int64_t rows, int64_t first_pair, int64_t last_pair, char* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t step = 0; step < s.steps; ++step) {
      const float* pixel[32];
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t n = (step * 32 + i) % group, column = (step * 32 + i) / group;
        pixel[i] =
            column < p.width
                ? p.grad + (((sample + n) * p.height + first + r) * p.width + column) * p.out_channels + first_pair * 32
                : nullptr;
      }
      for (int64_t pair = first_pair; pair < last_pair; ++pair) {
        char* at = out + (pair * s.band + r) * s.grad_row + step * p.parts * 2 * kTileBytes;
        for (int half = 0; half < 2; ++half) {
          uint16_t* tile_of[3];
          for (int part = 0; part < p.parts; ++part)
            tile_of[part] = reinterpret_cast<uint16_t*>(at + (2 * part + half) * kTileBytes);
          amx_pack_pairs(pixel, p.out_channels - pair * 32 - half * 16, p.parts, tile_of);
          for (int64_t i = 0; i < 32; ++i)
            if (pixel[i]) pixel[i] += 16;
        }
      }
    }
}

template <int Parts>
static void amx_weight_grad_of_band(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t first,
                                    int64_t rows, int64_t first_pair, int64_t last_pair, const char* x,
                                    const char* grad, float* sums, bool accumulate) {
  const AmxLayout& l = s.layout;
  const int64_t row_bytes = l.step * s.shifts * s.x_cell, block = larger(1, 448 * 1024 / (2 * s.x_tile));
  TileScope scope;
  for (int64_t low = 0; low < s.in_pairs; low += block)
    for (int64_t out = first_pair; out < last_pair; ++out)
      for (int64_t in = low; in < smaller(low + block, s.in_pairs); ++in)
        for (int t = 0; t < p.num_taps; ++t) {
          const AmxTap& tap = p.tap[t];
          const int64_t shift = floor_div(tap.column, l.step), residue = tap.column - shift * l.step;
          const char* a = x + 2 * in * s.x_tile + (tap.row - l.first_row) * row_bytes +
                          (residue * s.shifts + shift - l.first_shift) * s.x_cell;
          float* c = sums + ((out * s.in_pairs + in) * p.num_taps + t) * 1024;
          if (accumulate)
            tile_sums_load(scope, c, 128);
          else
            tile_sums_zero(scope);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = (first + r) * l.step + tap.row;
            if (row < 0 || row >= p.in_height) continue;
            const char* a_row = a + r * l.step * row_bytes;
            const char* b = grad + (out * s.band + r) * s.grad_row;
            for (int64_t k = 0; k < s.steps; ++k)
              tile_step<Parts>(scope, a_row + k * Parts * kTileBytes, a_row + k * Parts * kTileBytes + s.x_tile,
                               kTileBytes, b + k * Parts * 2 * kTileBytes);
          }
          // (The sums that come next, from where they rest.)
          for (int i = 0; accumulate && i < 64; ++i) __builtin_prefetch(c + 1024 + i * 16, 1, 3);
          tile_sums_store(scope, c, 128);
        }
}

static void amx_weight_grad(const AmxWeightGradParams& p) {
  const AmxWeightGradSizes s(p);
  const int64_t units = s.groups * s.bands;
  const auto of_band = p.parts == 3   ? amx_weight_grad_of_band<3>
                       : p.parts == 2 ? amx_weight_grad_of_band<2>
                                      : amx_weight_grad_of_band<1>;
  float* sums = static_cast<float*>(p.workspace);
  char* room = static_cast<char*>(p.workspace) + s.chunks * s.sums * 4;
#pragma omp parallel num_threads(p.num_threads)
  {
    char* x = room + omp_get_thread_num() * s.thread_bytes(p.parts);
    char* grad = x + s.in_tiles * s.x_tile;
    char* row_room = grad + s.band * s.grad_row * s.out_pairs;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.chunks * s.split; ++item) {
      const int64_t chunk = item / s.split, share = item % s.split;
      const int64_t first_pair = s.out_pairs * share / s.split, last_pair = s.out_pairs * (share + 1) / s.split;
      const int64_t begin = units * chunk / s.chunks, end = units * (chunk + 1) / s.chunks;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t sample = unit / s.bands * s.layout.group, first = unit % s.bands * s.band;
        const int64_t group = smaller(s.layout.group, p.samples - sample), rows = smaller(s.band, p.height - first);
        amx_pack_inputs(p, s, sample, group, first * s.layout.step + s.layout.first_row, s.layout.rows(rows), x,
                        row_room);
        amx_pack_grads(p, s, sample, group, first, rows, first_pair, last_pair, grad);
        __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
        of_band(p, s, first, rows, first_pair, last_pair, x, grad, sums + chunk * s.sums, unit > begin);
      }
    }
    // (barrier: all chunks are summed)
#pragma omp for collapse(2) schedule(static)
    for (int64_t out = 0; out < s.out_pairs; ++out)
      for (int64_t in = 0; in < s.in_pairs; ++in)
        for (int64_t half = 0; half < 32; half += 16) {
          // 16 output channels at a time: [taps, i, o] to [o, i, taps].
          const float* from = sums + (out * s.in_pairs + in) * p.num_taps * 1024 + half;
          const int64_t outs = smaller(16, p.out_channels - out * 32 - half);
          for (int64_t i = 0; i < smaller(32, p.in_channels - in * 32); ++i)
            for (int t = 0; t < p.num_taps; ++t) {
              alignas(64) float total[16] = {};
              for (int64_t chunk = 0; chunk < s.chunks; ++chunk)
                for (int o = 0; o < 16; ++o) total[o] += from[chunk * s.sums + t * 1024 + i * 32 + o];
              float* to =
                  p.grad_weight + (out * 32 + half) * p.out_stride + (in * 32 + i) * p.in_stride + p.tap[t].index;
              for (int64_t o = 0; o < outs; ++o) to[o * p.out_stride] = total[o];
            }
        }
  }
}

static int64_t amx_weight_grad_workspace(const AmxWeightGradParams& p) {
  const AmxWeightGradSizes s(p);
  return s.chunks * s.sums * 4 + s.thread_bytes(p.parts) * p.num_threads;
}
