// winograd_conv: gradient of the weight in the Winograd domain, and all entry points by form. Included inside namespace rnndyn::<isa> after
// winograd_conv_kernel.h; parameters are documented in winograd_conv.h.
//
// Maths: dW = G^T [sum over tiles (B^T d B) . (A dy A^T)] G.
// On matrix units, where there are, from 32 tiles and 16 channels on: winograd_units_kernel.h. Else on vector units.
// Traffic: a block of tiles is transformed into V (a^2 B C_in) and Q (a^2 B C_out), which all threads read; sums of a^2 C_in C_out floats are
//   loaded and stored once per block, in the order in which they lie, and transformed once, at the end. Where all of them are larger than 12.5 MiB,
//   two rows of frequencies are taken at a time, from the first tile to the last: their sums are a third as large, and x and the gradient are
//   read three times. Where even these are larger, channels of the gradient are taken in parts, one after another, and x is transformed for each.
// Determinism: each frequency and panel is accumulated by one thread in one order, whatever the number of threads.

template <int Patch, int Kernel>
struct WinogradWeightGradSizes {
  Winograd<Patch, Kernel> w;
  int64_t in_padded, v_row, phase_channels, out_padded, panels, frequencies, block, blocks, steps, v_size, q_size,
      frequency_sums, sums_size;
  bool units, two_rows;
  static constexpr int64_t kMaxSums = 12800 * 1024 / sizeof(float);
  // 32 tiles of 16 channels before they are split: [frequencies, tiles, 16], an odd number of lines from frequency to frequency.
  static constexpr int64_t kFrequencyRoom = kUnitTiles * 16 + 16;

  explicit WinogradWeightGradSizes(const WinogradWeightGradParams& p) : w(p.samples, p.height, p.width, p.pad) {
    // (By shape alone, so that results do not depend on the number of threads.)
    units = kHasUnits && w.tiles >= kUnitTiles && p.in_channels >= 16 && p.out_channels >= 16;
    in_padded = round_up(p.in_channels, units ? kUnitTiles : kVectorFloats);
    phase_channels = round_up(p.out_channels, kGemmCols);
    out_padded = phase_channels * p.num_phases;
    panels = out_padded / kGemmCols;
    frequency_sums = odd_lines(in_padded * out_padded);  // [panels, C_in, NR]
    two_rows = w.kFrequencies * frequency_sums > kMaxSums;
    frequencies = two_rows ? 2 * Patch : w.kFrequencies;
    // A product reads a strip of V, one cache line per tile. An odd number of lines from tile to tile spreads it over all sets of the L1 cache;
    // 512 channels lie 2 KB apart and would share two of the 64.
    v_row = 16 * (round_up(in_padded, 16) / 16 | 1);
    // Up to 64 channels, what a block of 64 tiles makes is still in L2 when it is multiplied (measured on 28 x 28: 10 to 30% faster than 192).
    // With 128 the sums, loaded and stored for every block, are more than L2 holds (128 to 128 on 32 x 32: 192 tiles are 11% faster than 64).
    // (Over 192 tiles of 512 channels it was slower: perhaps as a product then walks as many pages as the first level of the TLB holds.)
    // On matrix units 64 tiles are the fastest (measured: 3% faster than 128, 15% than 192), and take the least memory; two rows of frequencies take
    // a third of it, and 96 tiles are as fast as 192.
    const int64_t many = units ? (two_rows ? 96 : 64) : p.in_channels <= 64 ? 64 : p.in_channels >= 512 ? 96 : 192;
    block = smaller(w.tiles, many);
    blocks = (w.tiles + block - 1) / block;
    v_size = frequencies * block * v_row;       // [frequencies, block, C_in]
    q_size = frequencies * block * out_padded;  // [frequencies, panels, block, NR]
    steps = ceil_div(block, kUnitTiles);
    if (units) {  // [frequencies, channels / 32, steps] products' worth of parts
      v_size = frequencies * in_padded / 32 * steps * kUnitStep / 4;
      q_size = frequencies * panels * steps * kUnitStep / 4;
    }
    sums_size = frequencies * frequency_sums;
  }
  int64_t room() const { return units ? frequencies * kFrequencyRoom : 0; }
};

// Some rows of frequencies, for all tiles. Called by all threads, each with a room of its own.
template <int Patch, int Kernel, typename Rows>
struct WinogradWeightGradRows {
  const WinogradWeightGradParams& p;
  const WinogradWeightGradSizes<Patch, Kernel>& s;
  static constexpr int kFrequencies = Rows::kCount * Patch, kTaps = Kernel * Kernel;

  float* v() const { return p.workspace; }
  float* q() const { return p.workspace + s.v_size; }
  bool vanishes_at(int64_t f, int64_t panel) const {
    return vanishes<Patch>(p.vanishing[panel * kGemmCols / s.phase_channels],
                           Rows::row(int(f / Patch)) * Patch + f % Patch);
  }

#ifdef RNNDYN_AMX
  // 32 tiles from `first` on, of which `count` exist, and 16 channels, of x or, where those are past them, of the gradient, as a product takes them.
  void tiles(int64_t step, int64_t channels16, int64_t first, int64_t count, float* room) const {
    const bool of_x = channels16 < s.in_padded / 16;
    const int64_t c = (channels16 - (of_x ? 0 : s.in_padded / 16)) * 16;
    const int64_t phase = of_x ? 0 : c / s.phase_channels, from = of_x ? c : c % s.phase_channels;
    const int64_t channels = smaller(16, (of_x ? p.in_channels : p.out_channels) - from);
    for (int64_t i = 0; (count < kUnitTiles || channels < 16) && i < s.room(); ++i) room[i] = 0.0f;
    for (int64_t i = 0; i < smaller(count, channels > 0 ? kUnitTiles : 0);
         ++i) {  // (the next 16 channels are asked for)
      if (of_x)
        s.w.template transform_input<Rows>(p.x + from, p.x_strides, p.shift, channels, first + i, room + i * 16,
                                           s.kFrequencyRoom, 16);
      else
        s.w.template transform_gradient<Rows>(p.grad[phase] + from, p.grad_strides, channels, first + i, room + i * 16,
                                              s.kFrequencyRoom, 0, 16);
    }
    const int64_t blocks = of_x ? s.in_padded / 32 : s.panels;
    char* to =
        reinterpret_cast<char*>(of_x ? v() : q()) + (c / 32 * s.steps + step) * kUnitStep + c % 32 / 16 * kTileBytes;
    for (int64_t f = 0; f < kFrequencies; ++f)
      unit_tiles(room + f * s.kFrequencyRoom, of_x, to + f * blocks * s.steps * kUnitStep, 2 * kTileBytes);
  }
#endif

  void block_on_units(TileScope& scope, int64_t first, int64_t count, float* room) const {
#ifdef RNNDYN_AMX
    const int64_t steps = ceil_div(count, kUnitTiles), pairs = s.in_padded / 32;
    char *v_tiles = reinterpret_cast<char*>(v()), *q_tiles = reinterpret_cast<char*>(q());
#pragma omp for collapse(2) schedule(static)
    for (int64_t k = 0; k < steps; ++k)
      for (int64_t c = 0; c < (s.in_padded + s.out_padded) / 16; ++c)
        tiles(k, c, first + k * kUnitTiles, count - k * kUnitTiles, room);
    // (barrier: a frequency needs all tiles)
    __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
#pragma omp for collapse(2) schedule(static)
    for (int64_t f = 0; f < kFrequencies; ++f)
      for (int64_t panel = 0; panel < s.panels; ++panel)
        if (!vanishes_at(f, panel))
          for (int64_t i = 0; i < pairs; ++i)
            unit_sums(scope, v_tiles + (f * pairs + i) * s.steps * kUnitStep,
                      q_tiles + (f * s.panels + panel) * s.steps * kUnitStep, steps, first > 0,
                      p.sums + f * s.frequency_sums + (panel * pairs + i) * 1024);
    // (barrier: the next block writes v and q again)
#else
    (void)scope, (void)first, (void)count, (void)room;
#endif
  }

  void block_on_vectors(int64_t first, int64_t count) const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      s.w.template transform_input<Rows>(p.x, p.x_strides, p.shift, p.in_channels, first + i, v() + i * s.v_row,
                                         s.block * s.v_row);
      for (int phase = 0; phase < p.num_phases; ++phase)
        s.w.template transform_gradient<Rows>(p.grad[phase], p.grad_strides, p.out_channels, first + i,
                                              q() + phase * s.phase_channels * s.block + i * kGemmCols,
                                              s.block * s.out_padded, s.block * kGemmCols);
    }
    // (barrier: a frequency needs all tiles)
#pragma omp for collapse(2) schedule(static)
    for (int64_t f = 0; f < kFrequencies; ++f)
      for (int64_t panel = 0; panel < s.panels; ++panel)
        if (!vanishes_at(f, panel))
          gemm_panel(p.in_channels, count, v() + f * s.block * s.v_row, 1, s.v_row,
                     q() + (f * s.panels + panel) * s.block * kGemmCols, kGemmCols,
                     p.sums + f * s.frequency_sums + panel * s.in_padded * kGemmCols, kGemmCols, first > 0);
    // (barrier: the next block writes v and q again)
  }

  // G^T M G, or these rows' share in it, of 16 channels of x and a vector of those of the gradient. What the sums lack where a kernel vanishes belongs
  // to taps that do not exist: it is read, and goes nowhere.
  void finish(int64_t first_out, int64_t first_in, bool accumulate) const {
    alignas(64) float taps[16 * kTaps][kVectorFloats];  // of each channel of x
    const int64_t phase = first_out / s.phase_channels, channel = first_out % s.phase_channels;
    const int64_t ins = smaller(16, p.in_channels - first_in), outs = smaller(kVectorFloats, p.out_channels - channel);
    const float* from = p.sums + (first_out / kGemmCols * s.in_padded + first_in) * kGemmCols + first_out % kGemmCols;
    for (int64_t i = 0; i < ins; ++i, from += kGemmCols) {
      vec half[Rows::kCount][Kernel];
      for (int k = 0; k < Rows::kCount; ++k) {
        vec row[Patch];
#pragma GCC unroll 8
        for (int b = 0; b < Patch; ++b) {
          const float* at = from + (k * Patch + b) * s.frequency_sums;
          __builtin_prefetch(at + 8 * kGemmCols, 0, 3);
          row[b] = load(at);
        }
        kernel_transposed_1d<Patch, Kernel>(row, 1, half[k], 1);
      }
#pragma GCC unroll 5
      for (int kw = 0; kw < Kernel; ++kw) {
        vec column[Patch] = {}, out[Kernel];
#pragma GCC unroll 8
        for (int k = 0; k < Rows::kCount; ++k) column[Rows::row(k)] = half[k][kw];
        kernel_transposed_1d<Patch, Kernel>(column, 1, out, 1);
#pragma GCC unroll 5
        for (int kh = 0; kh < Kernel; ++kh) store(taps[i * kTaps + kh * Kernel + kw], out[kh]);
      }
    }
    // Channels of the gradient as rows.
    alignas(64) float rows[kVectorFloats][16 * kTaps];
    if constexpr (kVectorFloats == 16) {
      for (int64_t t = 0; t < kTaps; ++t)
        amx_transpose(reinterpret_cast<const uint16_t*>(taps[t * 16]), reinterpret_cast<char*>(rows[0] + t * 16),
                      sizeof rows[0]);
    } else {
      for (int64_t t = 0; t < 16 * kTaps; ++t)
        for (int64_t o = 0; o < kVectorFloats; ++o) rows[o][t] = taps[t][o];
    }
    const int* tap = p.tap[phase];
    bool whole = p.in_stride == kTaps;
    for (int t = 0; t < kTaps; ++t) whole = whole && tap[t] == t;
    for (int64_t o = 0; o < outs; ++o) {
      float* to = p.grad_weight + (channel + o) * p.out_stride + first_in * p.in_stride;
      const float* sum = rows[o];
      if (whole) {
        for (int64_t t = 0; t < ins * kTaps; ++t) to[t] = accumulate ? to[t] + sum[t] : sum[t];
        continue;
      }
      for (int64_t i = 0; i < ins; ++i, sum += kTaps)
        for (int t = 0; t < kTaps; ++t)
          if (tap[t] >= 0) {
            float* at = to + i * p.in_stride + tap[t];
            *at = accumulate ? *at + sum[t] : sum[t];
          }
    }
  }

  void run(TileScope& scope, float* room, bool accumulate) const {
    for (int64_t first = 0; first < s.w.tiles; first += s.block) {
      const int64_t count = smaller(s.block, s.w.tiles - first);
      if (s.units)
        block_on_units(scope, first, count, room);
      else
        block_on_vectors(first, count);
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t out = 0; out < s.out_padded; out += kVectorFloats)
      for (int64_t in = 0; in < p.in_channels; in += 16) finish(out, in, accumulate);
    // (barrier: other rows write the sums again)
  }
};

template <int Patch, int Kernel>
static void winograd_weight_grad_part(const WinogradWeightGradParams& p) {
  const WinogradWeightGradSizes<Patch, Kernel> s(p);
#pragma omp parallel num_threads(p.num_threads)
  {
    TileScope scope(s.units);
    float* room = p.workspace + s.v_size + s.q_size + omp_get_thread_num() * s.room();
    if (s.two_rows) {
      WinogradWeightGradRows<Patch, Kernel, TwoRows<1, 2>>{p, s}.run(scope, room, p.accumulate);
      WinogradWeightGradRows<Patch, Kernel, TwoRows<3, Patch == 5 ? 3 : 4>>{p, s}.run(scope, room, true);
      if constexpr (Patch == 8) WinogradWeightGradRows<Patch, Kernel, TwoRows<5, 6>>{p, s}.run(scope, room, true);
      WinogradWeightGradRows<Patch, Kernel, TwoRows<0, Patch - 1>>{p, s}.run(scope, room, true);
    } else {
      WinogradWeightGradRows<Patch, Kernel, AllRows<Patch>>{p, s}.run(scope, room, p.accumulate);
    }
  }
}

// The channels of the gradient from `first` on, as many as make a part.
template <int Patch, int Kernel>
static WinogradWeightGradParams winograd_weight_grad_part_of(const WinogradWeightGradParams& p, int64_t first) {
  const WinogradWeightGradSizes<Patch, Kernel> s(p);
  const int64_t parts = ceil_div(s.sums_size, s.kMaxSums);
  WinogradWeightGradParams part = p;
  part.out_channels = smaller(round_up(ceil_div(p.out_channels, parts), kGemmCols), p.out_channels - first);
  for (int phase = 0; phase < p.num_phases; ++phase) part.grad[phase] += first;
  part.grad_weight += first * p.out_stride;
  return part;
}

template <int Patch, int Kernel>
static void winograd_weight_grad_form(const WinogradWeightGradParams& p) {
  for (int64_t first = 0; first < p.out_channels;) {
    const WinogradWeightGradParams part = winograd_weight_grad_part_of<Patch, Kernel>(p, first);
    winograd_weight_grad_part<Patch, Kernel>(part);
    first += part.out_channels;
  }
}

// The most that any part asks for: the last one has fewer channels, and may take all rows of frequencies at a time, or no matrix units.
template <int Patch, int Kernel, class Size>
static int64_t winograd_weight_grad_most(const WinogradWeightGradParams& p, Size size) {
  int64_t most = 0;
  for (int64_t first = 0; first < p.out_channels;) {
    const WinogradWeightGradParams part = winograd_weight_grad_part_of<Patch, Kernel>(p, first);
    most = larger(most, size(WinogradWeightGradSizes<Patch, Kernel>(part)));
    first += part.out_channels;
  }
  return most;
}
template <int Patch, int Kernel>
static int64_t winograd_weight_grad_workspace_form(const WinogradWeightGradParams& p) {
  return winograd_weight_grad_most<Patch, Kernel>(
      p, [&](const auto& s) { return s.v_size + s.q_size + s.room() * p.num_threads; });
}
template <int Patch, int Kernel>
static int64_t winograd_weight_grad_sums_form(const WinogradWeightGradParams& p) {
  return winograd_weight_grad_most<Patch, Kernel>(p, [](const auto& s) { return s.sums_size; });
}

// ---------------------------------------------------------------- by form

// The caller has checked that the form is one of these.
#define RNNDYN_BY_FORM(function, p)                                      \
  if (p.form.patch == 5) return function<5, 2>(p);                       \
  if (p.form.patch == 6 && p.form.kernel == 3) return function<6, 3>(p); \
  if (p.form.patch == 8 && p.form.kernel == 3) return function<8, 3>(p); \
  if (p.form.patch == 6) return function<6, 5>(p);                       \
  if (p.form.kernel == 4) return function<8, 4>(p);                      \
  return function<8, 5>(p);

static void winograd_conv(const WinogradConvParams& p) { RNNDYN_BY_FORM(winograd_conv_form, p) }
static int64_t winograd_conv_workspace(const WinogradConvParams& p) { RNNDYN_BY_FORM(winograd_conv_workspace_form, p) }
static void winograd_pack_weight(const WinogradPackParams& p) { RNNDYN_BY_FORM(winograd_pack_weight_form, p) }
static void winograd_weight_grad(const WinogradWeightGradParams& p) { RNNDYN_BY_FORM(winograd_weight_grad_form, p) }
static int64_t winograd_weight_grad_workspace(const WinogradWeightGradParams& p) {
  RNNDYN_BY_FORM(winograd_weight_grad_workspace_form, p)
}
static int64_t winograd_weight_grad_sums(const WinogradWeightGradParams& p) {
  RNNDYN_BY_FORM(winograd_weight_grad_sums_form, p)
}
static int64_t winograd_packed_size(const WinogradPackParams& p) {
  const int64_t each = p.by_taps ? p.form.kernel : p.form.patch;
  return each * each * p.num_phases * round_up(p.out_channels, kGemmCols) * p.in_channels;
}
