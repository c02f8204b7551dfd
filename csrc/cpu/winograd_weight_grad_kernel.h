// winograd_conv: gradient of the weight in the Winograd domain, and all entry points by form. Included inside namespace rnndyn::<isa> after
// winograd_conv_kernel.h; parameters are documented in winograd_conv.h.
//
// Maths: dW = G^T [sum over tiles (B^T d B) . (A dy A^T)] G.
// On matrix units, where there are, from 32 tiles and 16 channels on: winograd_units_kernel.h. Else on vector units.
// Traffic: a block of tiles is transformed into V (a^2 B C_in) and Q (a^2 B C_out), which all threads read; sums of a^2 C_in C_out floats are
//   loaded and stored once per block, in the order in which they lie, and transformed once, at the end. Where they are larger than 10 MiB, the
//   channels of the gradient are taken in parts, one after another, and x is transformed once for each.
// Determinism: each frequency and panel is accumulated by one thread in one order, whatever the number of threads.

template <int Patch, int Kernel>
struct WinogradWeightGradSizes {
  Winograd<Patch, Kernel> w;
  int64_t in_padded, v_row, phase_channels, out_padded, panels, block, blocks, steps, v_size, q_size, sums_size;
  bool units;
  // 32 tiles of 16 channels before they are split: [a^2, tiles, 16], an odd number of lines from frequency to frequency.
  static constexpr int64_t kFrequencyRoom = kUnitTiles * 16 + 16, kRoom = Patch * Patch * kFrequencyRoom;

  explicit WinogradWeightGradSizes(const WinogradWeightGradParams& p) : w(p.samples, p.height, p.width, p.pad) {
    // (By shape alone, so that results do not depend on the number of threads.)
    units = kHasUnits && w.tiles >= kUnitTiles && p.in_channels >= 16 && p.out_channels >= 16;
    in_padded = round_up(p.in_channels, units ? kUnitTiles : kVectorFloats);
    phase_channels = round_up(p.out_channels, kGemmCols);
    out_padded = phase_channels * p.num_phases;
    panels = out_padded / kGemmCols;
    // A product reads a strip of V, one cache line per tile. An odd number of lines from tile to tile spreads it over all sets of the L1 cache;
    // 512 channels lie 2 KB apart and would share two of the 64.
    v_row = 16 * (round_up(in_padded, 16) / 16 | 1);
    // Up to 64 channels, what a block of 64 tiles makes is still in L2 when it is multiplied (measured on 28 x 28: 10 to 30% faster than 192).
    // With 128 the sums, loaded and stored for every block, are more than L2 holds (128 to 128 on 32 x 32: 192 tiles are 11% faster than 64).
    // (Over 192 tiles of 512 channels it was slower: perhaps as a product then walks as many pages as the first level of the TLB holds.)
    // On matrix units 64 tiles are the fastest (measured: 3% faster than 128, 15% than 192), and take the least memory.
    block = smaller(w.tiles, units || p.in_channels <= 64 ? 64 : p.in_channels >= 512 ? 96 : 192);
    blocks = (w.tiles + block - 1) / block;
    v_size = w.kFrequencies * block * v_row;       // [a^2, block, C_in]
    q_size = w.kFrequencies * block * out_padded;  // [a^2, panels, block, NR]
    steps = ceil_div(block, kUnitTiles);
    if (units) {  // [a^2, channels / 32, steps] products' worth of parts
      v_size = w.kFrequencies * in_padded / 32 * steps * kUnitStep / 4;
      q_size = w.kFrequencies * panels * steps * kUnitStep / 4;
    }
    sums_size = w.kFrequencies * in_padded * out_padded;  // [a^2, panels, C_in, NR]
  }
};

#ifdef RNNDYN_AMX
// 32 tiles from `first` on, of which `count` exist, and 16 channels, of x or, where those are past them, of the gradient, as a product takes them.
template <int Patch, int Kernel>
static void winograd_weight_grad_tiles(const WinogradWeightGradParams& p,
                                       const WinogradWeightGradSizes<Patch, Kernel>& s, int64_t step,
                                       int64_t channels16, int64_t first, int64_t count, char* v, char* q,
                                       float* room) {
  const bool of_x = channels16 < s.in_padded / 16;
  const int64_t c = (channels16 - (of_x ? 0 : s.in_padded / 16)) * 16;
  const int64_t phase = of_x ? 0 : c / s.phase_channels, from = of_x ? c : c % s.phase_channels;
  const int64_t channels = smaller(16, (of_x ? p.in_channels : p.out_channels) - from);
  for (int64_t i = 0; (count < kUnitTiles || channels < 16) && i < s.kRoom; ++i) room[i] = 0.0f;
  for (int64_t i = 0; i < smaller(count, channels > 0 ? kUnitTiles : 0); ++i) {
    if (of_x)
      s.w.transform_input(p.x + from, p.x_strides, p.shift, channels, first + i, room + i * 16, s.kFrequencyRoom);
    else
      s.w.transform_gradient(p.grad[phase] + from, p.grad_strides, channels, first + i, room + i * 16, s.kFrequencyRoom,
                             0);
  }
  const int64_t blocks = of_x ? s.in_padded / 32 : s.panels;
  char* to = (of_x ? v : q) + (c / 32 * s.steps + step) * kUnitStep + c % 32 / 16 * kTileBytes;
  for (int64_t f = 0; f < Patch * Patch; ++f)
    unit_tiles(room + f * s.kFrequencyRoom, of_x, to + f * blocks * s.steps * kUnitStep, 2 * kTileBytes);
}
#endif

// Blocks of tiles are transformed by all threads; then each frequency is accumulated by one thread into its own sum.
template <int Patch, int Kernel>
static void winograd_weight_grad_part(const WinogradWeightGradParams& p) {
  const WinogradWeightGradSizes<Patch, Kernel> s(p);
  constexpr int kFrequencies = Patch * Patch;
  float* v = p.workspace;
  float* q = v + s.v_size;
  float* sums = p.sums;

#pragma omp parallel num_threads(p.num_threads)
  {
#ifdef RNNDYN_AMX
    TileScope scope(s.units);
    float* room = q + s.q_size + omp_get_thread_num() * (s.units ? s.kRoom : 0);
    for (int64_t b = 0; s.units && b < s.blocks; ++b) {
      const int64_t first = b * s.block, count = smaller(s.block, s.w.tiles - first);
      const int64_t steps = ceil_div(count, kUnitTiles), pairs = s.in_padded / 32;
      char *v_tiles = reinterpret_cast<char*>(v), *q_tiles = reinterpret_cast<char*>(q);
#pragma omp for collapse(2) schedule(static)
      for (int64_t c = 0; c < (s.in_padded + s.out_padded) / 16; ++c)
        for (int64_t k = 0; k < steps; ++k)
          winograd_weight_grad_tiles(p, s, k, c, first + k * kUnitTiles, count - k * kUnitTiles, v_tiles, q_tiles,
                                     room);
      // (barrier: a frequency needs all tiles)
      __asm__ volatile("" ::: "memory");  // (the compiler does not see what tile loads read)
#pragma omp for collapse(2) schedule(static)
      for (int64_t f = 0; f < kFrequencies; ++f)
        for (int64_t panel = 0; panel < s.panels; ++panel)
          if (!vanishes<Patch>(p.vanishing[panel * kGemmCols / s.phase_channels], f))
            for (int64_t i = 0; i < pairs; ++i)
              unit_sums(scope, v_tiles + (f * pairs + i) * s.steps * kUnitStep,
                        q_tiles + (f * s.panels + panel) * s.steps * kUnitStep, steps, b > 0,
                        sums + ((f * s.panels + panel) * pairs + i) * 1024);
      // (barrier: the next block writes v and q again)
    }
#endif
    for (int64_t b = 0; !s.units && b < s.blocks; ++b) {
      const int64_t first = b * s.block, count = smaller(s.block, s.w.tiles - first);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) {
        s.w.transform_input(p.x, p.x_strides, p.shift, p.in_channels, first + i, v + i * s.v_row, s.block * s.v_row);
        for (int phase = 0; phase < p.num_phases; ++phase)
          s.w.transform_gradient(p.grad[phase], p.grad_strides, p.out_channels, first + i,
                                 q + phase * s.phase_channels * s.block + i * kGemmCols, s.block * s.out_padded,
                                 s.block * kGemmCols);
      }
      // (barrier: a frequency needs all tiles)
#pragma omp for collapse(2) schedule(static)
      for (int64_t f = 0; f < kFrequencies; ++f)
        for (int64_t panel = 0; panel < s.panels; ++panel)
          // (What the sums lack where a kernel vanishes is not read below: it belongs to taps that do not exist.)
          if (!vanishes<Patch>(p.vanishing[panel * kGemmCols / s.phase_channels], f))
            gemm_panel(p.in_channels, count, v + f * s.block * s.v_row, 1, s.v_row,
                       q + (f * s.panels + panel) * s.block * kGemmCols, kGemmCols,
                       sums + (f * s.panels + panel) * s.in_padded * kGemmCols, kGemmCols, b > 0);
      // (barrier: the next block writes v and q again)
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t first_out = 0; first_out < s.out_padded; first_out += kVectorFloats) {
      for (int64_t i = 0; i < p.in_channels; ++i) {
        const int* tap = p.tap[first_out / s.phase_channels];
        const int64_t channel = first_out % s.phase_channels, panel = first_out / kGemmCols,
                      part = first_out % kGemmCols;
        vec half[Kernel][Patch];
        for (int b = 0; b < Patch; ++b) {
          vec column[Patch], out[Kernel];
          for (int a = 0; a < Patch; ++a)
            column[a] = load(sums + (((a * Patch + b) * s.panels + panel) * s.in_padded + i) * kGemmCols + part);
          kernel_transposed_1d<Patch, Kernel>(column, 1, out, 1);
          for (int kh = 0; kh < Kernel; ++kh) half[kh][b] = out[kh];
        }
        for (int kh = 0; kh < Kernel; ++kh) {
          vec out[Kernel];
          kernel_transposed_1d<Patch, Kernel>(half[kh], 1, out, 1);
          for (int64_t lane = 0; lane < smaller(kVectorFloats, p.out_channels - channel); ++lane)
            for (int kw = 0; kw < Kernel; ++kw)
              if (tap[kh * Kernel + kw] >= 0) {
                float* to = p.grad_weight + (channel + lane) * p.out_stride + i * p.in_stride + tap[kh * Kernel + kw];
                *to = p.accumulate ? *to + out[kw][lane] : out[kw][lane];
              }
        }
      }
    }
  }
}

// The channels of the gradient from `first` on, as many as make a part.
template <int Patch, int Kernel>
static WinogradWeightGradParams winograd_weight_grad_part_of(const WinogradWeightGradParams& p, int64_t first) {
  constexpr int64_t kMaxSums = 10 * 1024 * 1024 / sizeof(float);
  const int64_t parts = ceil_div(WinogradWeightGradSizes<Patch, Kernel>(p).sums_size, kMaxSums);
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

template <int Patch, int Kernel>
static int64_t winograd_weight_grad_workspace_form(const WinogradWeightGradParams& p) {
  const WinogradWeightGradSizes<Patch, Kernel> s(winograd_weight_grad_part_of<Patch, Kernel>(p, 0));
  return s.v_size + s.q_size + (s.units ? s.kRoom * p.num_threads : 0);
}
template <int Patch, int Kernel>
static int64_t winograd_weight_grad_sums_form(const WinogradWeightGradParams& p) {
  return WinogradWeightGradSizes<Patch, Kernel>(winograd_weight_grad_part_of<Patch, Kernel>(p, 0)).sums_size;
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
