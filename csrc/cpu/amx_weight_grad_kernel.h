// amx_conv: gradient of the weight. Included inside namespace rnndyn::<isa> after amx_conv_kernel.h; parameters are documented in amx_conv.h.
//
// Maths: dW[t][i, o] = sum over samples m and pixels (r, c) of x[m, s r + row_t, s c + column_t, i] grad[m, r, c, o]: products of grad, channels
//   by pixels, with x, pixels by channels, 32 x 32 sums at a time, the same split into parts as forward.
// Traffic: a band of rows of a group of samples is split, of grad once, of x for 32 channels at a time, so that both stay in L2; then for each
//   tap and 32 channels of grad the sums are loaded, run through the band's pixels and stored.
// Layout: pixels of a row run over (column, sample of the group), 32 to a step. grad, whose channels are rows of tiles, is transposed sixteen by
//   sixteen: [C_out / 32, rows, steps, 2 times 16 channels, parts, tile of 16 channels by 32 pixels]; x, which taps shift, is not: [rows, columns
//   of taps, steps, parts, 2 tiles of 16 pairs of pixels by 16 channels], once for every column, so that all tiles are aligned (measured: tiles
//   across cache lines cost half the speed). Both are zero outside their maps.
// Sums of more than 10 MiB are taken for a slice of the channels of x at a time; grad is split again for each.
// Threads take chunks of bands with sums of their own, then all chunks are added in order. The number of chunks depends on the shape alone, so
//   results do not depend on the number of threads.

constexpr int64_t kAmxGradBytes = 1408 * 1024;       // of the 2 MB L2, for a band of both
constexpr int64_t kAmxSumsBytes = 10 * 1024 * 1024;  // of a slice

struct AmxWeightGradSizes {
  AmxPhase phase;  // (its taps: for the layout)
  AmxLayout layout;
  int64_t groups, band, bands, chunks, split, slice, in_pairs, out_pairs, steps, step_bytes, x_row, grad_row, sums;
  int num_columns, column[kAmxMaxTaps], column_of[kAmxMaxTaps];  // of the taps, each once, and where it stands

  static AmxPhase as_phase(const AmxWeightGradParams& p) {
    AmxPhase phase{};
    phase.height = p.height, phase.width = p.width, phase.num_taps = p.num_taps;
    for (int t = 0; t < p.num_taps; ++t) phase.tap[t] = p.tap[t];
    return phase;
  }

  explicit AmxWeightGradSizes(const AmxWeightGradParams& p)
      : phase(as_phase(p)), layout(&phase, 1, p.samples, p.in_channels, p.in_step, 32), num_columns(0) {
    for (int t = 0; t < p.num_taps; ++t) {
      int k = 0;
      while (k < num_columns && column[k] != p.tap[t].column) ++k;
      if (k == num_columns) column[num_columns++] = p.tap[t].column;
      column_of[t] = k;
    }
    // Loading and storing sums must be worth it: at least so many steps of products per band, if there are. (Three parts are six products a step.)
    const int64_t least = p.parts == 3 ? 16 : 32;
    while (ceil_div(p.width * layout.group, 32) * p.height < least && 2 * layout.group <= p.samples) layout.grow();
    groups = ceil_div(p.samples, layout.group);
    in_pairs = ceil_div(p.in_channels, 32), out_pairs = ceil_div(p.out_channels, 32);
    steps = ceil_div(p.width * layout.group, 32);
    step_bytes = p.parts * 2 * kTileBytes;
    x_row = num_columns * steps * step_bytes, grad_row = steps * step_bytes;
    const int64_t around = layout.rows(1) - layout.step;  // rows of x beyond those of grad
    const int64_t fit =
        larger((kAmxGradBytes - around * x_row) / (layout.step * x_row + grad_row * out_pairs), ceil_div(least, steps));
    bands = ceil_div(p.height, smaller(fit, p.height));
    band = ceil_div(p.height, bands);
    bands = ceil_div(p.height, band);
    sums = p.num_taps * in_pairs * out_pairs * 1024;
    chunks = 4;
    while (chunks > 1 && (chunks > groups * bands || chunks * sums * 4 > 16 * 1024 * 1024)) chunks /= 2;
    split = smaller(out_pairs, ceil_div(p.num_threads, chunks));
    // (As many chunks as there are, whatever the slice.)
    slice = chunks > 1 ? in_pairs : larger(1, smaller(in_pairs, kAmxSumsBytes * in_pairs / (sums * 4)));
    sums = sums / in_pairs * slice;
  }
  int64_t x_bytes() const { return layout.rows(band) * x_row; }
  int64_t thread_bytes() const { return x_bytes() + band * grad_row * out_pairs; }
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

// Rows [first, first + rows) of x, 32 of its channels.
static void amx_pack_inputs(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t group,
                            int64_t first, int64_t rows, int64_t in, char* out) {
  for (int64_t row = first; row < first + rows; ++row)
    for (int column = 0; column < s.num_columns; ++column)
      for (int64_t step = 0; step < s.steps; ++step, out += s.step_bytes) {
        const float* pixel[32];
        for (int64_t i = 0; i < 32; ++i) {
          const int64_t n = (step * 32 + i) % group, at = (step * 32 + i) / group,
                        col = at * p.in_step + s.column[column];
          const bool inside = at < p.width && row >= 0 && row < p.in_height && col >= 0 && col < p.in_width;
          pixel[i] = inside ? p.x + (((sample + n) * p.in_height + row) * p.in_width + col) * p.in_channels + in * 32
                            : nullptr;
          // (Of the next row, two lines of a pixel's many: the processor does not see what comes.)
          if (inside && column < p.in_step) {
            __builtin_prefetch(pixel[i] + p.in_width * p.in_channels, 0, 3);
            __builtin_prefetch(pixel[i] + p.in_width * p.in_channels + 16, 0, 3);
          }
        }
        for (int half = 0; half < 2; ++half) {
          uint16_t* tile_of[3];
          for (int part = 0; part < p.parts; ++part)
            tile_of[part] = reinterpret_cast<uint16_t*>(out + (2 * part + half) * kTileBytes);
          amx_pack_pairs(pixel, p.in_channels - in * 32 - half * 16, p.parts, tile_of);
          for (int64_t i = 0; i < 32; ++i)
            if (pixel[i]) pixel[i] += 16;
        }
      }
}

// One band of grad, of the pairs of tiles [first_pair, last_pair) of its channels.
static void amx_pack_grads(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t group,
                           int64_t first, int64_t rows, int64_t first_pair, int64_t last_pair, char* out) {
  alignas(64) uint16_t tiles[3][512];
  uint16_t* const tile_of[3] = {tiles[0], tiles[1], tiles[2]};
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
        char* at = out + (pair * s.band + r) * s.grad_row + step * s.step_bytes;
        for (int half = 0; half < 2; ++half) {
          amx_pack_pairs(pixel, p.out_channels - pair * 32 - half * 16, p.parts, tile_of);
          for (int part = 0; part < p.parts; ++part, at += kTileBytes) amx_transpose(tiles[part], at, 64);
          for (int64_t i = 0; i < 32; ++i)
            if (pixel[i]) pixel[i] += 16;
        }
      }
    }
}

// The sums of 32 channels of x.
template <int Parts>
static void amx_weight_grad_of_band(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t first,
                                    int64_t rows, int64_t first_pair, int64_t last_pair, const char* x,
                                    const char* grad, float* sums, bool accumulate) {
  const AmxLayout& l = s.layout;
  TileScope scope;
  for (int64_t out = first_pair; out < last_pair; ++out)
    for (int t = 0; t < p.num_taps; ++t) {
      const AmxTap& tap = p.tap[t];
      float* c = sums + (out * p.num_taps + t) * 1024;
      if (accumulate)
        tile_sums_load(scope, c, 128);
      else
        tile_sums_zero(scope);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = (first + r) * l.step + tap.row;
        if (row < 0 || row >= p.in_height) continue;
        const char* a = grad + (out * s.band + r) * s.grad_row;
        const char* b = x + (tap.row - l.first_row + r * l.step) * s.x_row + s.column_of[t] * s.grad_row;
        for (int64_t k = 0; k < s.steps; ++k, a += s.step_bytes, b += s.step_bytes)
          tile_step<Parts>(scope, a, a + Parts * kTileBytes, kTileBytes, b);
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
    char* x = room + omp_get_thread_num() * s.thread_bytes();
    char* grad = x + s.x_bytes();
    for (int64_t low = 0; low < s.in_pairs; low += s.slice) {
      const int64_t high = smaller(low + s.slice, s.in_pairs);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < s.chunks * s.split; ++item) {
        const int64_t chunk = item / s.split, share = item % s.split;
        const int64_t first_pair = s.out_pairs * share / s.split, last_pair = s.out_pairs * (share + 1) / s.split;
        const int64_t begin = units * chunk / s.chunks, end = units * (chunk + 1) / s.chunks;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t sample = unit / s.bands * s.layout.group, first = unit % s.bands * s.band;
          const int64_t group = smaller(s.layout.group, p.samples - sample), rows = smaller(s.band, p.height - first);
          amx_pack_grads(p, s, sample, group, first, rows, first_pair, last_pair, grad);
          for (int64_t in = low; in < high; ++in) {
            amx_pack_inputs(p, s, sample, group, first * s.layout.step + s.layout.first_row, s.layout.rows(rows), in,
                            x);
            __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
            of_band(p, s, first, rows, first_pair, last_pair, x, grad,
                    sums + chunk * s.sums + (in - low) * s.out_pairs * p.num_taps * 1024, unit > begin);
          }
        }
      }
      // (barrier: all chunks are summed)
#pragma omp for collapse(2) schedule(static)
      for (int64_t in = low; in < high; ++in)
        for (int64_t out = 0; out < s.out_pairs; ++out) {
          float* total = sums + ((in - low) * s.out_pairs + out) * p.num_taps * 1024;
          for (int64_t chunk = 1; chunk < s.chunks; ++chunk)
            for (int64_t i = 0; i < p.num_taps * 1024; i += kVectorFloats)
              store(total + i, load(total + i) + load(total + chunk * s.sums + i));
          // [taps, o, i] to [o, i, taps].
          const int64_t ins = smaller(32, p.in_channels - in * 32);
          for (int64_t o = 0; o < smaller(32, p.out_channels - out * 32); ++o)
            for (int t = 0; t < p.num_taps; ++t) {
              float* to = p.grad_weight + (out * 32 + o) * p.out_stride + in * 32 * p.in_stride + p.tap[t].index;
              const float* from = total + t * 1024 + o * 32;
              for (int64_t i = 0; i < ins; ++i)
                to[i * p.in_stride] = p.accumulate ? to[i * p.in_stride] + from[i] : from[i];
            }
        }
      // (barrier: the next slice takes the sums' room)
    }
  }
}

static int64_t amx_weight_grad_workspace(const AmxWeightGradParams& p) {
  const AmxWeightGradSizes s(p);
  return s.chunks * s.sums * 4 + s.thread_bytes() * p.num_threads;
}
