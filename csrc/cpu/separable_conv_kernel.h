// separable_conv: a convolution of small groups and a 1 x 1 one, without the map in between. Included inside namespace rnndyn::<isa> after
// depthwise_conv_kernel.h and gemm_kernel.h; parameters are documented in depthwise_conv.h.
//
// Maths: y[i, j, o] = sum over c of w[c, o] m[i, j, c], with m as depthwise_conv makes it.
// Precision: float32, summed over c in order.
// Traffic: x and y once; a few rows of m stay in L2, as does w up to 256 to 256 channels. Bound by arithmetic: K^2 C + C C_out multiply-adds per
//   pixel.
// Threads: over samples, or parts of their rows where samples are fewer. Determinism: each sum by one thread, in one order.

static void separable_conv(const SeparableConvParams& p) {
  using Band = DepthwiseBand<float>;
  using Vec = Band::Vec;
  const Band b(p.depthwise.shape);
  const DepthwiseShape& s = p.depthwise.shape;
  const int64_t padded = round_up(p.out_channels, kGemmCols),
                pixels = smaller(Band::kRingRows, s.out_height) * s.out_width;
  // (A map's rows are cut into whole runs of a ring's rows, so that parts make what one would.)
  const int64_t runs = ceil_div(s.out_height, Band::kRingRows);
  const int64_t parts = s.samples >= s.num_threads ? 1 : smaller(runs, ceil_div(s.num_threads, s.samples));
#pragma omp parallel num_threads(s.num_threads)
  {
    void* room = nullptr;
    const int64_t weights = b.blocks * b.taps(), rings = b.blocks * b.ring_size(), between = pixels * s.channels,
                  last_panel = padded > p.out_channels ? pixels * kGemmCols : 0;
    if (posix_memalign(
            &room, 64,
            (weights + rings) * RNNDYN_VECTOR_BYTES + b.blocks * sizeof(Band::Source) + (between + last_panel) * 4))
      abort();
    Vec* weight = static_cast<Vec*>(room);
    Vec* ring = weight + weights;
    Band::Source* from = reinterpret_cast<Band::Source*>(ring + rings);
    float* middle = reinterpret_cast<float*>(from + b.blocks);
    float* rest = middle + between;
    for (int64_t i = 0; i < rings; ++i) ring[i] = Vec{};
    b.prepare(p.depthwise, weight, from);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.samples * parts; ++task) {
      const int64_t n = task / parts, part = task % parts;
      const int64_t first_row = runs * part / parts * Band::kRingRows,
                    last_row = smaller(s.out_height, runs * (part + 1) / parts * Band::kRingRows);
      b.rows_of(
          p.depthwise, n, first_row, last_row, 0, b.blocks, from, weight, ring, [&](int64_t) { return middle; },
          [&](int64_t first, int64_t last) {
            const int64_t count = (last - first) * s.out_width;
            float* y = p.y + (n * s.out_height + first) * s.out_width * p.out_channels;
            for (int64_t c = 0; c < padded; c += kGemmCols) {
              const bool whole = c + kGemmCols <= p.out_channels;
              gemm_panel(count, s.channels, middle, s.channels, 1, p.pointwise + c, p.pointwise_stride,
                         whole ? y + c : rest, whole ? p.out_channels : kGemmCols, false);
              for (int64_t i = 0; !whole && i < count; ++i)
                for (int64_t k = c; k < p.out_channels; ++k) y[i * p.out_channels + k] = rest[i * kGemmCols + k - c];
            }
          });
    }
    free(room);
  }
}
