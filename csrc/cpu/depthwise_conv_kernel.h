// depthwise_conv: forward, gradient of the data, gradient of the weight. Included by its family inside namespace rnndyn::<isa>; parameters
// are documented in depthwise_conv.h.
//
// Maths: y[i, j, c] = b[c] + sum over (u, v) and channels k of c's group of w[u, v, k, c] x[s i + u - p, s j + v - q, k];  dw[u, v, k, c] = sum over
//   samples and pixels of dy[i, j, c] x[s i + u - p, s j + v - q, k];  dx is a convolution of dy, dilated by s, with the turned kernel.
// Layout: rows of the map are copied into a ring of rows for each register of channels, with zeros left and right, so that no tap asks where the edge
//   is; in groups, pixel by pixel a register for each k, whose lanes hold what their channel of the result reads: one permutation of the group's
//   channels. Taps that see only rows of zeros are left out.
// Precision: forward and data sums of K^2 products in Real; the weight's: a row of pixels in Real, rows in double.
// Traffic: x and y once, a few rows at a time, in the order of memory, which prefetchers follow. With stride 1 and K = 3, 5 or 7 a row of the kernel and the
//   outputs side by side stay in registers, and each register of x is loaded once for K multiply-adds: bound by memory with K = 3, by arithmetic with K = 7.
//   The weight's gradient reads x once per register of channels, 64 bytes of every pixel; the next ones are asked for meanwhile.
// Threads: over samples and groups of registers of channels; the weight's gradient over registers of channels. Determinism: each sum by one
//   thread, in one order.
// Limits: kernels up to kMaxDepthwiseKernel; the caller checks shapes.

// Unsigned numbers as wide as a Real, for permutations.
template <typename Real>
struct DepthwiseIndex {
  typedef uint32_t Type;
};
template <>
struct DepthwiseIndex<double> {
  typedef uint64_t Type;
};

template <typename Real>
struct DepthwiseBand {
  typedef Real Vec __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  typedef Real Loose __attribute__((vector_size(RNNDYN_VECTOR_BYTES), aligned(sizeof(Real))));
  typedef typename DepthwiseIndex<Real>::Type Number;
  typedef Number Numbers __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  static constexpr int kLanes = RNNDYN_VECTOR_BYTES / sizeof(Real);
  static constexpr int kColumns =
      8;  // outputs of a row side by side: accumulators that hide the latency of multiply-adds
  static constexpr int64_t kBandBytes = 128 * 1024;

  const DepthwiseShape& s;
  int64_t blocks, width, pitch, rows, in_channels;  // registers of channels; columns and registers of a row of scratch;
                                                    // output rows of a band; channels of the map
  int inputs;                                       // channels that a channel of the result reads
  bool grouped;

  explicit DepthwiseBand(const DepthwiseShape& shape)
      : s(shape),
        in_channels(shape.channels / shape.group_out * shape.group_in),
        inputs(shape.group_in),
        grouped(inputs * shape.group_out > 1) {
    blocks = (s.channels + kLanes - 1) / kLanes;
    // Outputs are made some at a time, past the map's edge too.
    const int64_t side = wide() ? kWide : kColumns, columns = (s.out_width + side - 1) / side * side;
    width = (columns - 1) * s.step + s.kernel_width;
    pitch = width * inputs;
    rows = (kBandBytes / (pitch * RNNDYN_VECTOR_BYTES) - s.kernel_height) / s.step + 1;
    rows = rows < 1 ? 1 : rows > s.out_height ? s.out_height : rows;
  }

  int64_t scratch_rows() const { return (rows - 1) * s.step + s.kernel_height; }
  int64_t scratch_bytes() const { return scratch_rows() * pitch * RNNDYN_VECTOR_BYTES; }
  int64_t taps() const { return int64_t(s.kernel_height) * s.kernel_width * inputs; }
  int lanes(int64_t block) const {
    const int64_t left = s.channels - block * kLanes;
    return left < kLanes ? int(left) : kLanes;
  }

  static Vec read(const Real* p, int lanes) {
    if (lanes >= kLanes) return *reinterpret_cast<const Loose*>(p);
    Vec v = {};
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }
  static void write(Real* p, Vec v, int lanes) {
    if (lanes == kLanes) {
      *reinterpret_cast<Loose*>(p) = v;
    } else {
      for (int i = 0; i < lanes; ++i) p[i] = v[i];
    }
  }

  // What a register of channels of the result reads of a pixel: channels first .. first + span - 1, its lanes from `base` of those on.
  struct Source {
    int64_t first;
    int span, lanes;
    Numbers base;
  };
  Source source(int64_t block) const {
    Source found{block * kLanes, lanes(block), lanes(block), {}};
    if (!grouped) return found;
    const int64_t group = block * kLanes / s.group_out;
    found.first = group * inputs;
    for (int i = 0; i < found.lanes; ++i) found.base[i] = Number(((block * kLanes + i) / s.group_out - group) * inputs);
    found.span = int(found.base[found.lanes - 1]) + inputs;
    return found;
  }
  // One register for each of the `inputs` of a pixel.
  void read_pixel(const Real* pixel, const Source& from, Vec* out) const {
    const Real* p = pixel + from.first;
    if (!grouped) {
      __builtin_prefetch(p + kLanes);
      *out = read(p, from.lanes);
      return;
    }
    if (from.span > 3 * kLanes) {
      for (int k = 0; k < inputs; ++k)
        for (int i = 0; i < kLanes; ++i) out[k][i] = i < from.lanes ? p[from.base[i] + k] : Real(0);
      return;
    }
    const Vec a = read(p, from.span), b = from.span > kLanes ? read(p + kLanes, from.span - kLanes) : a;
    if (from.span <= 2 * kLanes) {
      for (int k = 0; k < inputs; ++k) out[k] = __builtin_shuffle(a, b, from.base + Number(k));
      return;
    }
    const Vec c = read(p + 2 * kLanes, from.span - 2 * kLanes);
    for (int k = 0; k < inputs; ++k) {
      const Numbers at = from.base + Number(k);
      out[k] = at < Number(2 * kLanes) ? __builtin_shuffle(a, b, at) : __builtin_shuffle(c, at);
    }
  }

  // The input rows that output rows first .. first + count read, with zeros around and between.
  void fill(const Real* x, int64_t n, const Source& from, int64_t first, int64_t count, Vec* band) const {
    const int64_t needed = (count - 1) * s.step + s.kernel_height;
    for (int64_t r = 0; r < needed; ++r) {
      Vec* row = band + r * pitch;
      const int64_t at = first * s.step + r - s.top;
      const int64_t line = at >= 0 && at % s.dilation == 0 ? at / s.dilation : s.in_height;
      if (line >= s.in_height || s.dilation > 1) {
        for (int64_t j = 0; j < pitch; ++j) row[j] = Vec{};
        if (line >= s.in_height) continue;
      }
      const Real* in = x + ((n * s.in_height + line) * s.in_width) * in_channels;
      if (s.dilation > 1) {
        for (int64_t j = 0; j < s.in_width; ++j) {
          const int64_t column = j * s.dilation + s.left;
          if (column >= 0 && column < width) read_pixel(in + j * in_channels, from, row + column * inputs);
        }
        continue;
      }
      for (int64_t j = 0; j < width; ++j) {
        const int64_t column = j - s.left;
        if (column >= 0 && column < s.in_width) {
          read_pixel(in + column * in_channels, from, row + j * inputs);
        } else {
          for (int k = 0; k < inputs; ++k) row[j * inputs + k] = Vec{};
        }
      }
    }
  }

  // ---- forward: a ring of rows for each register of channels

  static constexpr int64_t kRingRows = 7;  // output rows that are made of a ring before the next register of channels
  static constexpr int kWide = RNNDYN_VECTOR_BYTES == 64 ? 14 : kColumns;  // accumulators, beside a row of the kernel

  int64_t ring_rows() const { return (kRingRows - 1) * s.step + s.kernel_height; }
  int64_t ring_size() const { return ring_rows() * pitch; }
  // Whether a row of the dilated map holds anything; row 0 is the first that the first output row reads.
  bool holds(int64_t row) const {
    const int64_t at = row - s.top;
    return at >= 0 && at % s.dilation == 0 && at / s.dilation < s.in_height;
  }

  // A row that holds something into the rings of some registers of channels. (What lies between and around its pixels is zero from the start.)
  void fill_row(const Real* x, int64_t n, int64_t row, const Source* from, int64_t count, Vec* rings) const {
    const Real* in = x + (n * s.in_height + (row - s.top) / s.dilation) * s.in_width * in_channels;
    Vec* to = rings + row % ring_rows() * pitch;
    for (int64_t j = 0; j < s.in_width; ++j) {
      const int64_t column = j * s.dilation + s.left;
      if (column < 0 || column >= width) continue;
      for (int64_t k = 0; k < count; ++k)
        read_pixel(in + j * in_channels, from[k], to + k * ring_size() + column * inputs);
    }
  }

  // One row of outputs. rows: those of the ring under each row of the kernel, or null.
  template <int kWidth, int kSide>
  void output_row(const Vec* const* rows, const Vec* weight, Vec bias, Real* out, int channels) const {
    for (int64_t j = 0; j < s.out_width; j += kSide) {
      Vec acc[kSide];
#pragma GCC unroll 16
      for (int k = 0; k < kSide; ++k) acc[k] = bias;
      for (int u = 0; u < s.kernel_height; ++u) {
        if (rows[u] == nullptr) continue;
        if constexpr (kWidth > 0) {
          const Vec *row = rows[u] + j, *weights = weight + u * kWidth;
          // (Else the compiler keeps an address in a register for each of the pixels, and has too few.)
          __asm__("" : "+r"(row), "+r"(weights));
          Vec taps[kWidth];
#pragma GCC unroll 8
          for (int v = 0; v < kWidth; ++v) taps[v] = weights[v];
#pragma GCC unroll 32
          for (int i = 0; i < kSide + kWidth - 1; ++i) {
            const Vec x = row[i];
#pragma GCC unroll 8
            for (int v = 0; v < kWidth; ++v)
              if (i - v >= 0 && i - v < kSide) acc[i - v] += taps[v] * x;
          }
        } else {
          const Vec* row = rows[u] + j * s.step * inputs;
          const Vec* weights = weight + u * s.kernel_width * inputs;
          for (int64_t v = 0; v < s.kernel_width * inputs; ++v) {
            const Vec w = weights[v];
#pragma GCC unroll 16
            for (int k = 0; k < kSide; ++k) acc[k] += w * row[v + k * s.step * inputs];
          }
        }
      }
      const int64_t valid = s.out_width - j < kSide ? s.out_width - j : kSide;
      for (int64_t k = 0; k < valid; ++k) write(out + (j + k) * s.channels, acc[k], channels);
    }
  }

  typedef void (DepthwiseBand::*OutputRow)(const Vec* const*, const Vec*, Vec, Real*, int) const;
  template <int kWidth>
  OutputRow output_row_of() const {
    return wide() ? &DepthwiseBand::output_row<kWidth, kWide> : &DepthwiseBand::output_row<kWidth, kColumns>;
  }
  // Whether wide rows of accumulators waste less.
  bool wide() const {
    const int64_t few = (s.out_width + kColumns - 1) / kColumns * kColumns;
    return s.step == 1 && inputs == 1 && (s.out_width + kWide - 1) / kWide * kWide * 10 <= few * 11;
  }
  OutputRow output_row_for() const {
    if (s.step > 1 || inputs > 1) return &DepthwiseBand::output_row<0, kColumns>;
    switch (s.kernel_width) {
      case 3:
        return output_row_of<3>();
      case 5:
        return output_row_of<5>();
      case 7:
        return output_row_of<7>();
      default:
        return output_row_of<0>();
    }
  }

  // Weights and sources of all registers of channels.
  void prepare(const DepthwiseConvParams<Real>& p, Vec* weights, Source* from) const {
    for (int64_t block = 0; block < blocks; ++block) {
      from[block] = source(block);
      for (int64_t k = 0; k < taps(); ++k)
        weights[block * taps() + k] = read(p.weight + k * s.channels + block * kLanes, lanes(block));
    }
  }

  // Output rows first_row .. last_row - 1 of a sample and `count` registers of channels from `first` on. rings: zero where no pixel was ever put.
  // Some rows at a time go to place(row), [rows, W', C], and done(first row, row after the last) follows them.
  template <class Place, class Done>
  void rows_of(const DepthwiseConvParams<Real>& p, int64_t n, int64_t first_row, int64_t last_row, int64_t first,
               int64_t count, const Source* from, const Vec* weights, Vec* rings, Place place, Done done) const {
    const OutputRow make = output_row_for();
    int64_t filled = first_row * s.step;
    for (int64_t top = first_row; top < last_row; top += kRingRows) {
      const int64_t last = last_row - top < kRingRows ? last_row : top + kRingRows;
      Real* out = place(top);
      if (filled < top * s.step) filled = top * s.step;
      for (; filled < (last - 1) * s.step + s.kernel_height; ++filled)
        if (holds(filled)) fill_row(p.x, n, filled, from + first, count, rings);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t block = first + k;
        const Vec bias = p.bias != nullptr ? read(p.bias + block * kLanes, lanes(block)) : Vec{};
        for (int64_t r = top; r < last; ++r) {
          const Vec* rows[kMaxDepthwiseKernel];
          for (int u = 0; u < s.kernel_height; ++u)
            rows[u] =
                holds(r * s.step + u) ? rings + k * ring_size() + (r * s.step + u) % ring_rows() * pitch : nullptr;
          (this->*make)(rows, weights + block * taps(), bias,
                        out + (r - top) * s.out_width * s.channels + block * kLanes, lanes(block));
        }
      }
      done(top, last);
    }
  }

  // Adds a band's part of the weight's gradient to sums [KH, KW, I, lanes]. kWidth 0: any kernel.
  template <int kWidth>
  void products(const DepthwiseWeightGradParams<Real>& p, int64_t n, int64_t block, int64_t first, int64_t count,
                const Vec* band, double* sums) const {
    const int kernel = kWidth ? kWidth : s.kernel_width;
    const int channels = lanes(block);
    for (int64_t r = 0; r < count; ++r) {
      const Real* grad = p.grad + ((n * s.out_height + first + r) * s.out_width) * s.channels + block * kLanes;
      for (int u = 0; u < s.kernel_height; ++u)
        for (int k = 0; k < inputs; ++k) {
          const Vec* row = band + (r * s.step + u) * pitch + k;
          Vec acc[kWidth ? kWidth : kMaxDepthwiseKernel] = {};
          for (int64_t j = 0; j < s.out_width; ++j) {
            const Vec g = read(grad + j * s.channels, channels);
            __builtin_prefetch(grad + j * s.channels + kLanes);
#pragma GCC unroll 8
            for (int v = 0; v < kernel; ++v) acc[v] += g * row[(j * s.step + v) * inputs];
          }
          for (int v = 0; v < kernel; ++v) {
            double* out = sums + ((u * kernel + v) * inputs + k) * kLanes;
            for (int i = 0; i < kLanes; ++i) out[i] += double(acc[v][i]);
          }
        }
    }
  }
};

template <typename Real>
void depthwise_conv(const DepthwiseConvParams<Real>& p) {
  using Band = DepthwiseBand<Real>;
  using Vec = typename Band::Vec;
  using Source = typename Band::Source;
  const Band b(p.shape);
  const DepthwiseShape& s = p.shape;
  const int64_t taps = b.taps();
  // Registers of channels that go together: as many as fit in half of L2, if there are enough samples for all threads.
  int64_t together = 512 * 1024 / (b.ring_size() * RNNDYN_VECTOR_BYTES);
  together = together < 1 ? 1 : together > b.blocks ? b.blocks : together;
  while (together > 1 && s.samples * ((b.blocks + together - 1) / together) < s.num_threads)
    together = (together + 1) / 2;
  const int64_t groups = (b.blocks + together - 1) / together;
#pragma omp parallel num_threads(s.num_threads)
  {
    void* room = nullptr;
    const int64_t weights = b.blocks * taps, rings = together * b.ring_size();
    if (posix_memalign(&room, 64, (weights + rings) * RNNDYN_VECTOR_BYTES + b.blocks * sizeof(Source))) abort();
    Vec* weight = static_cast<Vec*>(room);
    Vec* ring = weight + weights;
    Source* from = reinterpret_cast<Source*>(ring + rings);
    for (int64_t i = 0; i < rings; ++i) ring[i] = Vec{};
    b.prepare(p, weight, from);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.samples * groups; ++task) {
      const int64_t n = task / groups, first = task % groups * together;
      b.rows_of(
          p, n, 0, s.out_height, first, b.blocks - first < together ? b.blocks - first : together, from, weight, ring,
          [&](int64_t row) { return p.y + (n * s.out_height + row) * s.out_width * s.channels; },
          [](int64_t, int64_t) {});
    }
    free(room);
  }
}

template <typename Real>
void depthwise_weight_grad(const DepthwiseWeightGradParams<Real>& p) {
  using Band = DepthwiseBand<Real>;
  using Vec = typename Band::Vec;
  const Band b(p.shape);
  const DepthwiseShape& s = p.shape;
  const int64_t taps = b.taps();
#pragma omp parallel num_threads(s.num_threads)
  {
    void* room = nullptr;
    if (posix_memalign(&room, 64, b.scratch_bytes())) abort();
    Vec* band = static_cast<Vec*>(room);
    double* sums = static_cast<double*>(malloc(sizeof(double) * taps * Band::kLanes));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < b.blocks; ++block) {
      const typename Band::Source from = b.source(block);
      for (int64_t k = 0; k < taps * Band::kLanes; ++k) sums[k] = 0;
      for (int64_t n = 0; n < s.samples; ++n) {
        for (int64_t first = 0; first < s.out_height; first += b.rows) {
          const int64_t count = s.out_height - first < b.rows ? s.out_height - first : b.rows;
          b.fill(p.x, n, from, first, count, band);
          switch (s.kernel_width) {
            case 3:
              b.template products<3>(p, n, block, first, count, band, sums);
              break;
            case 5:
              b.template products<5>(p, n, block, first, count, band, sums);
              break;
            case 7:
              b.template products<7>(p, n, block, first, count, band, sums);
              break;
            default:
              b.template products<0>(p, n, block, first, count, band, sums);
          }
        }
      }
      const int channels = b.lanes(block);
      for (int64_t k = 0; k < taps; ++k) {
        for (int i = 0; i < channels; ++i)
          p.grad_weight[k * s.channels + block * Band::kLanes + i] = Real(sums[k * Band::kLanes + i]);
      }
    }
    free(sums);
    free(room);
  }
}
