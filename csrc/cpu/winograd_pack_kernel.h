// Packing of weights for winograd_conv: transformed, [a^2, panels, C_in, NR], or as taps (winograd_taps_kernel.h).
// Included inside namespace rnndyn::<isa>, after winograd_taps_kernel.h; parameters are documented in winograd_conv.h.

template <int Patch, int Kernel>
static void winograd_pack_weight_form(const WinogradPackParams& p) {
  constexpr int64_t kTogether = 8;  // input channels: a few lines of memory of one output channel are read in a row
  const int64_t phase_panels = round_up(p.out_channels, kGemmCols) / kGemmCols, panels = phase_panels * p.num_phases;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.num_threads)
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t block = 0; block < p.in_channels; block += kTogether) {
      // The kernels of a panel's output channels, one lane each.
      float lanes[kTogether][Kernel * Kernel][kGemmCols] = {};
      const int* tap = p.tap[panel / phase_panels];
      const int64_t first = panel % phase_panels * kGemmCols, count = smaller(kGemmCols, p.out_channels - first);
      const int64_t ins = smaller(kTogether, p.in_channels - block);
      float* corner = p.packed + (panel * p.in_channels + block) * kGemmCols;
      // Its results lie in a^2 places, its kernels in as many as there are lanes: ask for the lines of these, and of the next block's kernels,
      // now. (Without, loads and stores wait for them one by one. A prefetch past the end is harmless.)
      for (int64_t f = 0; f < Patch * Patch && !p.by_taps; ++f)
        for (int64_t line = 0; line < ins * kGemmCols; line += 16)
          __builtin_prefetch(corner + f * panels * p.in_channels * kGemmCols + line, 1, 3);
      for (int64_t lane = 0; lane < count; ++lane) {
        const float* next = p.weight + (first + lane) * p.out_stride + (block + kTogether) * p.in_stride;
        for (int64_t line = 0; line < kTogether * Kernel * Kernel; line += 16) __builtin_prefetch(next + line, 0, 3);
      }
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t i = 0; i < ins; ++i) {
          const float* kernel = p.weight + (first + lane) * p.out_stride + (block + i) * p.in_stride;
          for (int k = 0; k < Kernel * Kernel; ++k)
            if (tap[k] >= 0) lanes[i][k][lane] = kernel[tap[k]];
        }
      if (p.by_taps) {
        const int64_t chunk = block / kTapsChunk * kTapsChunk, depth = smaller(kTapsChunk, p.in_channels - chunk);
        float* to = p.packed + (panel * p.in_channels + chunk) * Kernel * Kernel * kGemmCols;
        for (int64_t i = 0; i < ins; ++i)
          for (int kh = 0; kh < Kernel; ++kh)
            __builtin_memcpy(to + (kh * depth + block - chunk + i) * Kernel * kGemmCols, lanes[i][kh * Kernel],
                             sizeof(lanes[0][0]) * Kernel);
        continue;
      }
      for (int64_t i = 0; i < ins; ++i)
        for (int part = 0; part < kGemmCols; part += kVectorFloats) {
          vec half[Kernel][Patch];
          for (int kw = 0; kw < Kernel; ++kw) {
            vec column[Kernel], out[Patch];
            for (int kh = 0; kh < Kernel; ++kh) column[kh] = load(&lanes[i][kh * Kernel + kw][part]);
            kernel_1d<Patch, Kernel>(column, 1, out, 1);
            for (int a = 0; a < Patch; ++a) half[kw][a] = out[a];
          }
          float* to = corner + i * kGemmCols + part;
          for (int a = 0; a < Patch; ++a) {
            vec out[Patch];
            kernel_1d<Patch, Kernel>(&half[0][a], Patch, out, 1);
            for (int b = 0; b < Patch; ++b) store(to + (a * Patch + b) * panels * p.in_channels * kGemmCols, out[b]);
          }
        }
    }
  }
}
