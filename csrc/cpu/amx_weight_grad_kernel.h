// amx_conv: gradient of the weight. Included inside namespace rnndyn::<isa> after amx_conv_kernel.h; parameters are documented in amx_conv.h.
//
// Maths: dW[t][i, o] = sum over samples m and pixels (r, c) of x[m, s r + row_t, s c + column_t, i] grad[m, r, c, o]: products of grad, channels
//   by pixels, with x, pixels by channels, 32 x 32 sums at a time, the same split into parts as forward.
// Traffic: a band of rows of a group of samples is split, of grad once, of x for 32 channels at a time, so that both stay in L2; then for each
//   tap and 32 channels of grad the sums are loaded, run through the band's pixels and stored.
// Layout: pixels of a row run over (column, sample of the group), 32 to a step. grad, whose channels are rows of tiles, is transposed sixteen by
//   sixteen: [C_out / 32, rows, steps, 2 times 16 channels, parts, tile of 16 channels by 32 pixels]; x, which taps shift, is not: [rows, residues
//   of the columns of taps, parts, 2 times 16 channels, pairs of pixels, 16 channels of a pair]. A shift by a column is one by half a group of lines
//   of 64 bytes; where that is no whole number, x is stored once for every column of taps, so that all tiles are aligned (measured: tiles across
//   cache lines cost half the speed). Both are zero outside their maps.
// Sums of more than 10 MiB are taken for a slice of the channels of x at a time; grad is split again for each.
// Threads take chunks of bands with sums of their own, then all chunks are added in order. Sums of more than 4 MiB are one chunk, of which threads take
//   channels, and the gradient is written as soon as its sums are complete, while they are in L2. The number of chunks depends on the shape alone,
//   so results do not depend on the number of threads.

constexpr int64_t kAmxGradBytes = 1408 * 1024;       // of the 2 MB L2, for a band of both
constexpr int64_t kAmxSumsBytes = 10 * 1024 * 1024;  // of a slice

struct AmxWeightGradSizes {
  AmxPhase phase;  // (its taps: for the layout)
  AmxLayout layout;
  int64_t groups, band, bands, chunks, split, slice, in_pairs, out_pairs, steps, step_bytes, grad_row, sums;
  int64_t x_half, x_column, x_row;  // bytes of a row: of 16 channels of a part, of all 32 and all parts, of all columns
  bool share_inputs;                // threads take channels of x, not of grad
  bool shifts;                      // taps whose columns differ by whole steps read the same lines
  // The columns of taps for which x is stored (the first of those that share lines); of each tap which, and how many lines on it starts.
  int num_columns, column[kAmxMaxTaps], column_of[kAmxMaxTaps];
  int64_t first_line[kAmxMaxTaps];

  static AmxPhase as_phase(const AmxWeightGradParams& p) {
    AmxPhase phase{};
    phase.height = p.height, phase.width = p.width, phase.num_taps = p.num_taps;
    for (int t = 0; t < p.num_taps; ++t) phase.tap[t] = p.tap[t];
    return phase;
  }

  explicit AmxWeightGradSizes(const AmxWeightGradParams& p)
      : phase(as_phase(p)), layout(&phase, 1, p.samples, p.in_channels, p.in_step, 32), num_columns(0) {
    // Loading and storing sums must be worth it: at least so many steps of products per band, if there are. (Three parts are six products a step.)
    const int64_t least = p.parts == 3 ? 16 : 32;
    while (ceil_div(p.width * layout.group, 32) * p.height < least && 2 * layout.group <= p.samples) layout.grow();
    groups = ceil_div(p.samples, layout.group);
    in_pairs = ceil_div(p.in_channels, 32), out_pairs = ceil_div(p.out_channels, 32);
    steps = ceil_div(p.width * layout.group, 32);
    step_bytes = p.parts * 2 * kTileBytes, grad_row = steps * step_bytes;
    place_columns(p);
    const int64_t around = layout.rows(1) - layout.step;  // rows of x beyond those of grad
    const int64_t fit =
        larger((kAmxGradBytes - around * x_row) / (layout.step * x_row + grad_row * out_pairs), ceil_div(least, steps));
    bands = ceil_div(p.height, smaller(fit, p.height));
    band = ceil_div(p.height, bands);
    bands = ceil_div(p.height, band);
    sums = p.num_taps * in_pairs * out_pairs * 1024;
    chunks = out_pairs < 4 ? 4 : 2;  // (a few items of work at least)
    while (chunks > 1 && (chunks > groups * bands || chunks * sums * 4 > 8 * 1024 * 1024)) chunks /= 2;
    // (As many chunks as there are, whatever the slice.)
    slice = chunks > 1 ? in_pairs : larger(1, smaller(in_pairs, kAmxSumsBytes * in_pairs / (sums * 4)));
    sums = sums / in_pairs * slice;
    // (Both sides are split again for shares of the other: the larger one is x, if the sides differ.)
    share_inputs = chunks == 1 && slice >= p.num_threads;
    split = smaller(share_inputs ? slice : out_pairs, ceil_div(p.num_threads, chunks));
  }
  int64_t x_bytes() const { return layout.rows(band) * x_row; }
  // And the sums of 32 by 32 channels, and a row of them in the gradient's order.
  int64_t thread_bytes() const {
    return x_bytes() + band * grad_row * out_pairs + phase.num_taps * (4 * kTileBytes + 128);
  }

 private:
  void place_columns(const AmxWeightGradParams& p) {
    shifts = layout.group % 2 == 0 && p.width * layout.group % 32 == 0;
    for (int t = 0; t < p.num_taps; ++t) {
      int k = 0;
      while (k < num_columns &&
             (shifts ? (p.tap[t].column - column[k]) % p.in_step != 0 : p.tap[t].column != column[k]))
        ++k;
      column_of[t] = k;
      column[k] = k == num_columns ? p.tap[t].column : column[k] < p.tap[t].column ? column[k] : p.tap[t].column;
      num_columns = k == num_columns ? k + 1 : num_columns;
    }
    int64_t most = 0;
    for (int t = 0; t < p.num_taps; ++t) {
      first_line[t] = (p.tap[t].column - column[column_of[t]]) / p.in_step * layout.group / 2;
      most = larger(most, first_line[t]);
    }
    x_half = (steps * 16 + most) * 64;
    x_column = 2 * p.parts * x_half;
    x_row = num_columns * x_column;
  }
};

// A pair of pixels of 16 channels, [16 channels][2 pixels], one line per part, `stride` bytes apart. Pixels that are null count as zero.
static inline void amx_pack_pair(const float* first, const float* second, int64_t lanes, int parts, char* out,
                                 int64_t stride) {
#ifdef RNNDYN_AMX
  const __mmask16 mask = first_lanes(lanes);
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  __m512 x0 = first ? _mm512_maskz_loadu_ps(mask, first) : _mm512_setzero_ps();
  __m512 x1 = second ? _mm512_maskz_loadu_ps(mask, second) : _mm512_setzero_ps();
  for (int part = 0; part < parts; ++part)
    _mm512_store_si512(out + part * stride, _mm512_permutexvar_epi16(interleave, next_part(x0, x1)));
#else
  for (int c = 0; c < 16; ++c) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out) + c * 2;
    split_value(first && c < lanes ? first[c] : 0.0f, parts, to, stride / 2);
    split_value(second && c < lanes ? second[c] : 0.0f, parts, to + 1, stride / 2);
  }
#endif
}

// Rows [first, first + rows) of x, 32 of its channels.
static void amx_pack_inputs(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t first,
                            int64_t rows, int64_t in, char* out) {
  const int64_t group = s.layout.group, row_floats = p.in_width * p.in_channels, lanes = p.in_channels - in * 32;
  for (int64_t row = first; row < first + rows; ++row)
    for (int column = 0; column < s.num_columns; ++column, out += s.x_column) {
      int64_t n = 0, at = 0;
      const auto next_pixel = [&]() -> const float* {
        const int64_t col = at * p.in_step + s.column[column];
        const bool inside = sample + n < p.samples && (s.shifts || at < p.width) && row >= 0 && row < p.in_height &&
                            col >= 0 && col < p.in_width;
        const float* pixel =
            inside ? p.x + ((sample + n) * p.in_height + row) * row_floats + col * p.in_channels + in * 32 : nullptr;
        // (Of the next row, two lines of a pixel's many: the processor does not see what comes.)
        if (inside && column < p.in_step)
          __builtin_prefetch(pixel + row_floats, 0, 3), __builtin_prefetch(pixel + row_floats + 16, 0, 3);
        if (++n == group) n = 0, ++at;
        return pixel;
      };
      for (char* line = out; line < out + s.x_half; line += 64) {
        const float *one = next_pixel(), *two = next_pixel();
        amx_pack_pair(one, two, lanes, p.parts, line, 2 * s.x_half);
        amx_pack_pair(one ? one + 16 : one, two ? two + 16 : two, lanes - 16, p.parts, line + s.x_half, 2 * s.x_half);
      }
    }
}

// One band of grad, of the pairs of tiles [first_pair, last_pair) of its channels.
static void amx_pack_grads(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t sample, int64_t first,
                           int64_t rows, int64_t first_pair, int64_t last_pair, char* out) {
  alignas(64) uint16_t tiles[3][512];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t step = 0; step < s.steps; ++step) {
      const float* pixel[32];
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t n = (step * 32 + i) % s.layout.group, column = (step * 32 + i) / s.layout.group;
        pixel[i] =
            column < p.width && sample + n < p.samples
                ? p.grad + (((sample + n) * p.height + first + r) * p.width + column) * p.out_channels + first_pair * 32
                : nullptr;
      }
      for (int64_t pair = first_pair; pair < last_pair; ++pair) {
        char* at = out + (pair * s.band + r) * s.grad_row + step * s.step_bytes;
        for (int half = 0; half < 2; ++half) {
          for (int k = 0; k < 16; ++k)
            amx_pack_pair(pixel[2 * k], pixel[2 * k + 1], p.out_channels - pair * 32 - half * 16, p.parts,
                          reinterpret_cast<char*>(tiles[0] + k * 32), kTileBytes);
          for (int part = 0; part < p.parts; ++part, at += kTileBytes) amx_transpose(tiles[part], at, 64);
          for (int64_t i = 0; i < 32; ++i)
            if (pixel[i]) pixel[i] += 16;
        }
      }
    }
}

// Sums of 32 by 32 channels, [taps, o, i], to [o, i, taps] of the gradient. row: room for an o.
static void amx_weight_grad_end(const AmxWeightGradParams& p, int64_t in, int64_t out, const float* sums, float* row) {
  const int64_t count = smaller(32, p.in_channels - in * 32) * p.num_taps,
                outs = smaller(32, p.out_channels - out * 32);
  for (int64_t o = 0; o < outs; ++o) {
    float* to = p.grad_weight + (out * 32 + o) * p.out_stride + in * 32 * p.num_taps;
    for (int64_t k = 0; o + 1 < outs && k < count; k += 16) __builtin_prefetch(to + p.out_stride + k, 1, 3);
    for (int t = 0; t < p.num_taps; ++t) {
      float* tap = row + p.tap[t].index;
      for (int64_t i = 0; i < 32; ++i) tap[i * p.num_taps] = sums[t * 1024 + o * 32 + i];
    }
    for (int64_t k = 0; k < count; k += kVectorFloats) {
      vec sum = load(row + k);
      if (p.accumulate) sum += load_part(to + k, count - k);
      store_part(to + k, sum, count - k);
    }
  }
}

// The sums of 32 channels of x.
template <int Parts>
static void amx_weight_grad_of_band(const AmxWeightGradParams& p, const AmxWeightGradSizes& s, int64_t first,
                                    int64_t rows, int64_t first_pair, int64_t last_pair, const char* x,
                                    const char* grad, int64_t in, float* sums, bool accumulate, float* total) {
  const AmxLayout& l = s.layout;
  TileScope scope;
  const bool complete = total != nullptr;  // then the sums go there, and on to the gradient
  for (int64_t out = first_pair; out < last_pair; ++out) {
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
        const char* b =
            x + (tap.row - l.first_row + r * l.step) * s.x_row + s.column_of[t] * s.x_column + s.first_line[t] * 64;
        for (int64_t k = 0; k < s.steps; ++k, a += s.step_bytes, b += kTileBytes) {
          tile_step<Parts>(scope, a, a + Parts * kTileBytes, kTileBytes, b, s.x_half);
          tile_stay_awake(scope);
        }
      }
      // (The sums that come next, from where they rest.)
      for (int i = 0; accumulate && i < 64; ++i) __builtin_prefetch(c + 1024 + i * 16, 1, 3);
      tile_sums_store(scope, complete ? total + t * 1024 : c, 128);
    }
    __asm__ volatile("" ::: "memory");  // (nor what tile stores write)
    if (complete) amx_weight_grad_end(p, in, out, total, total + p.num_taps * 1024);
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
    float* total = reinterpret_cast<float*>(grad + s.band * s.grad_row * s.out_pairs);
    for (int64_t low = 0; low < s.in_pairs; low += s.slice) {
      const int64_t high = smaller(low + s.slice, s.in_pairs);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < s.chunks * s.split; ++item) {
        const int64_t chunk = item / s.split, share = item % s.split, ins = high - low;
        const int64_t first_pair = s.share_inputs ? 0 : s.out_pairs * share / s.split;
        const int64_t last_pair = s.share_inputs ? s.out_pairs : s.out_pairs * (share + 1) / s.split;
        const int64_t first_in = s.share_inputs ? low + ins * share / s.split : low;
        const int64_t last_in = s.share_inputs ? low + ins * (share + 1) / s.split : high;
        const int64_t begin = units * chunk / s.chunks, end = units * (chunk + 1) / s.chunks;
        for (int64_t unit = begin; unit < end && first_in < last_in; ++unit) {
          const int64_t sample = unit / s.bands * s.layout.group, first = unit % s.bands * s.band;
          const int64_t rows = smaller(s.band, p.height - first);
          amx_pack_grads(p, s, sample, first, rows, first_pair, last_pair, grad);
          for (int64_t in = first_in; in < last_in; ++in) {
            amx_pack_inputs(p, s, sample, first * s.layout.step + s.layout.first_row, s.layout.rows(rows), in, x);
            __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
            of_band(p, s, first, rows, first_pair, last_pair, x, grad, in,
                    sums + chunk * s.sums + (in - low) * s.out_pairs * p.num_taps * 1024, unit > begin,
                    s.chunks == 1 && unit + 1 == end ? total : nullptr);
          }
        }
      }
      // (barrier: all chunks are summed, or the next slice takes the sums' room)
      if (s.chunks == 1) continue;
#pragma omp for collapse(2) schedule(static)
      for (int64_t in = low; in < high; ++in)
        for (int64_t out = 0; out < s.out_pairs; ++out) {
          const float* from = sums + ((in - low) * s.out_pairs + out) * p.num_taps * 1024;
          for (int64_t i = 0; i < p.num_taps * 1024; i += kVectorFloats) {
            vec sum = load(from + i);
            for (int64_t chunk = 1; chunk < s.chunks; ++chunk) sum += load(from + chunk * s.sums + i);
            store(total + i, sum);
          }
          amx_weight_grad_end(p, in, out, total, total + p.num_taps * 1024);
        }
    }
  }
}

static int64_t amx_weight_grad_workspace(const AmxWeightGradParams& p) {
  const AmxWeightGradSizes s(p);
  return s.chunks * s.sums * 4 + s.thread_bytes() * p.num_threads;
}
