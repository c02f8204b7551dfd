// area_step: interaction, layer normalisation, relu and pooling of one time step of one area; forward (backward: area_step_backward_kernel.h).
// Included by its family inside namespace rnndyn::<isa>; parameters are documented in area_step.h.
//
// Maths (per sample; b_i drives, m_j modulators, sums over the terms that are present):
//   additive        z = sum_i b_i + beta_b
//   multiplicative  z = (sum_i b_i + beta_b) * (1 + sum_j m_j + beta_m)
//   mean, var over (H, W, C);  y = (z - mean) * rstd * gamma + beta;  h = max(y, 0);  pooled = max2x2(h) or mean_HW(h)
//   backward: g = (dh + unpool(dpooled)) * [y > 0];  dgamma += g * xhat;  dbeta += g;  p = g * gamma
//             dz = rstd * (p - mean(p) - xhat * mean(p * xhat));  db = dz * (1 + m);  dm = dz * b
// Precision: sums of a row in Real, rows and chunks combined in double by Chan's parallel variance (no E[z^2] - E[z]^2).
// Traffic: forward reads each term once and writes value, state and pooled once (the second pass finds its sample in L2, and is the only one
//   after a convolution's epilogue);
//   backward reads the saved value and each gradient once, and writes dz once (g is parked in it between the passes, of which the second finds
//   both in L2). Both are bound by memory bandwidth: about 12 operations per element.
// Threads: over samples, or over chunks of rows where samples are fewer than threads. The backward pass gives each chunk of rows
//   to one thread for all samples, so that dgamma and dbeta need no atomics and no private copies, and takes both passes sample by sample.
// Determinism: chunks depend on the shape alone and are combined in order, so results do not depend on the thread count.
// Limits: at most kMaxTerms terms of each kind; the caller checks shapes.

template <typename Real>
inline void row_zero(Real* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Real(0);
}

template <typename Real>
inline void row_copy(Real* out, const Real* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}

template <typename Real>
inline void row_add(Real* out, const Real* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += in[i];
}

template <typename Real>
inline void row_add_channels(Real* out, const Real* channel_values, int64_t width, int64_t channels, Real scale) {
  for (int64_t w = 0; w < width; ++w) {
    Real* pixel = out + w * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) pixel[c] += scale * channel_values[c];
  }
}

// Sum of the terms at `offset` plus a bias per channel and a constant, into out [W * C].
template <typename Real>
inline void row_sum_terms(Real* out, const Real* const* terms, int num_terms, const Real* bias, Real constant,
                          int64_t offset, int64_t width, int64_t channels) {
  const int64_t n = width * channels;
  if (num_terms == 0) {
    row_zero(out, n);
  } else if (num_terms == 1) {
    if (out != terms[0] + offset) row_copy(out, terms[0] + offset, n);
  } else {
    const Real* first = terms[0] + offset;
    const Real* second = terms[1] + offset;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = first[i] + second[i];
    for (int k = 2; k < num_terms; ++k) row_add(out, terms[k] + offset, n);
  }
  if (bias != nullptr) row_add_channels(out, bias, width, channels, Real(1));
  if (constant != Real(0)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += constant;
  }
}

// Running count, mean and sum of squared deviations.
struct Moments {
  double count, mean, m2;
  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

template <typename Real>
inline void row_moments(const Real* row, int64_t n, Moments* moments) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += row[i];
  const Real centre = sum / Real(n);
  Real m2 = 0, rest = 0;
#pragma omp simd reduction(+ : m2, rest)
  for (int64_t i = 0; i < n; ++i) {
    const Real d = row[i] - centre;
    m2 += d * d;
    rest += d;  // what rounding of the sum left over: corrects both moments
  }
  const double shift = double(rest) / double(n);
  moments->merge(double(n), double(centre) + shift, double(m2) - double(rest) * shift);
}

// ---------------------------------------------------------------- forward

template <typename Real>
struct ForwardRows {
  const AreaStepForwardParams<Real>& p;
  int64_t row_size, map_size;

  explicit ForwardRows(const AreaStepForwardParams<Real>& params)
      : p(params), row_size(params.width * params.channels), map_size(params.height * params.width * params.channels) {}

  // Interaction of one row into out; also keeps the modulator where wanted. scratch [W * C].
  void interact(int64_t n, int64_t r, Real* out, Real* scratch) const {
    const int64_t offset = n * map_size + r * row_size;
    if (p.num_drive == 1 && p.num_modulator == 1 && p.modulator_complete && p.modulator_sum == nullptr &&
        p.drive_bias == nullptr && p.modulator_bias == nullptr) {
      const Real *drive = p.drive[0] + offset, *m = p.modulator[0] + offset;
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) out[i] = drive[i] * m[i];
      return;
    }
    row_sum_terms(out, p.drive, p.num_drive, p.drive_bias, Real(0), offset, p.width, p.channels);
    if (p.num_modulator > 0) {
      Real* m = p.modulator_sum != nullptr ? p.modulator_sum + offset : scratch;
      row_sum_terms(m, p.modulator, p.num_modulator, p.modulator_bias, Real(p.modulator_complete ? 0 : 1), offset,
                    p.width, p.channels);
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) out[i] *= m[i];
    }
  }

  void moments(int64_t n, int64_t first_row, int64_t last_row, Real* scratch, Moments* out) const {
    *out = Moments{0, 0, 0};
    for (int64_t r = first_row; r < last_row; ++r) {
      Real* z = p.value + n * map_size + r * row_size;
      interact(n, r, z, scratch);
      row_moments(z, row_size, out);
    }
  }

  // Norm and relu of row r into out.
  void activate(int64_t n, int64_t r, Real mean, Real rstd, Real* out, Real* scratch) const {
    if (p.gamma != nullptr) {
      const Real* z = p.value != nullptr ? p.value + n * map_size + r * row_size : out;
      if (p.value == nullptr) interact(n, r, out, scratch);
      const Real* gamma = p.gamma + r * row_size;
      const Real* beta = p.beta + r * row_size;
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) out[i] = (z[i] - mean) * rstd * gamma[i] + beta[i];
    } else if (p.value != nullptr) {
      Real* z = p.value + n * map_size + r * row_size;
      interact(n, r, z, scratch);
      row_copy(out, z, row_size);
    } else {
      interact(n, r, out, scratch);
    }
    if (p.rectify) {
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) out[i] = out[i] < Real(0) ? Real(0) : out[i];  // NaN stays NaN
    }
  }

  // 2x2 maximum of two rows; the first of equal values wins and NaN wins over all, as in torch.
  void pool(int64_t n, int64_t pooled_row, const Real* upper, const Real* lower) const {
    const int64_t pooled_width = p.width / 2, channels = p.channels;
    const int64_t offset = (n * (p.height / 2) + pooled_row) * pooled_width * channels;
    for (int64_t w = 0; w < pooled_width; ++w) {
      const Real* a = upper + 2 * w * channels;
      const Real* b = a + channels;
      const Real* c = lower + 2 * w * channels;
      const Real* d = c + channels;
      Real* out = p.max_pooled + offset + w * channels;
      uint8_t* where = p.argmax != nullptr ? p.argmax + offset + w * channels : nullptr;
      if (where == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < channels; ++i)
          out[i] = larger_or_nan(larger_or_nan(larger_or_nan(a[i], b[i]), c[i]), d[i]);
        continue;
      }
      // Blocks of a constant length: with bytes among floats the compiler else leaves up to 63 channels to a scalar loop.
      int64_t i = 0;
      for (; i + 16 <= channels; i += 16) pool_block<16>(a + i, b + i, c + i, d + i, out + i, where + i);
      for (; i < channels; ++i) pool_block<1>(a + i, b + i, c + i, d + i, out + i, where + i);
    }
  }

  static Real larger_or_nan(Real best, Real x) { return (x > best || x != x) ? x : best; }

  template <int kCount>
  static void pool_block(const Real* a, const Real* b, const Real* c, const Real* d, Real* out, uint8_t* where) {
    int index[kCount];
#pragma omp simd
    for (int i = 0; i < kCount; ++i) {
      Real best = a[i];
      int k = 0;
      k = (b[i] > best || b[i] != b[i]) ? 1 : k;
      best = larger_or_nan(best, b[i]);
      k = (c[i] > best || c[i] != c[i]) ? 2 : k;
      best = larger_or_nan(best, c[i]);
      k = (d[i] > best || d[i] != d[i]) ? 3 : k;
      best = larger_or_nan(best, d[i]);
      out[i] = best;
      index[i] = k;
    }
    for (int i = 0; i < kCount; ++i) where[i] = uint8_t(index[i]);
  }

  // Second pass over the rows of one chunk. scratch holds two rows and one more; pixel_sum [C] collects the mean over the map.
  void finish(int64_t n, int64_t first_row, int64_t last_row, Real* scratch, Real* pixel_sum) const {
    const Real mean = p.gamma != nullptr ? p.mean[n] : Real(0), rstd = p.gamma != nullptr ? p.rstd[n] : Real(1);
    for (int64_t r = first_row; r < last_row; ++r) {
      Real* row =
          p.state != nullptr ? p.state + n * map_size + r * row_size : scratch + ((r - first_row) % 2) * row_size;
      activate(n, r, mean, rstd, row, scratch + 2 * row_size);
      if (pixel_sum != nullptr) {
        for (int64_t w = 0; w < p.width; ++w) row_add(pixel_sum, row + w * p.channels, p.channels);
      }
      // Chunks start at even rows, so the row above is of this chunk and, without a state, in the other scratch row.
      if (p.max_pooled != nullptr && r % 2 == 1) {
        const Real* upper = p.state != nullptr ? row - row_size : scratch;
        pool(n, r / 2, upper, row);
      }
    }
  }
};

template <typename Real>
void area_step_forward(const AreaStepForwardParams<Real>& p) {
  const ForwardRows<Real> rows(p);
  const int64_t chunk_rows = rows_per_chunk(p.width, p.channels);
  const int64_t chunks = num_chunks(p.height, p.width, p.channels);
  const int64_t num_tasks = p.samples * chunks;
  const bool norm = p.gamma != nullptr && !p.complete;
  const int64_t scratch_size = 3 * rows.row_size;
  Moments* moments = norm ? static_cast<Moments*>(malloc(sizeof(Moments) * num_tasks)) : nullptr;
  Real* pixel_sums =
      p.mean_pooled != nullptr ? static_cast<Real*>(calloc(num_tasks * p.channels, sizeof(Real))) : nullptr;

#pragma omp parallel num_threads(p.num_threads)
  {
    Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * scratch_size));

    auto first_pass = [&](int64_t n, int64_t k) {
      const int64_t first = k * chunk_rows, last = first + chunk_rows < p.height ? first + chunk_rows : p.height;
      rows.moments(n, first, last, scratch, moments + n * chunks + k);
    };
    auto statistics = [&](int64_t n) {
      Moments total{0, 0, 0};
      for (int64_t k = 0; k < chunks; ++k) {
        const Moments& m = moments[n * chunks + k];
        total.merge(m.count, m.mean, m.m2);
      }
      p.mean[n] = Real(total.mean);
      p.rstd[n] = Real(1.0 / __builtin_sqrt(total.m2 / total.count + p.eps));
    };
    auto second_pass = [&](int64_t n, int64_t k) {
      const int64_t first = k * chunk_rows, last = first + chunk_rows < p.height ? first + chunk_rows : p.height;
      rows.finish(n, first, last, scratch,
                  pixel_sums != nullptr ? pixel_sums + (n * chunks + k) * p.channels : nullptr);
    };
    auto mean_over_map = [&](int64_t n) {
      Real* out = p.mean_pooled + n * p.channels;
      row_zero(out, p.channels);
      for (int64_t k = 0; k < chunks; ++k) row_add(out, pixel_sums + (n * chunks + k) * p.channels, p.channels);
      const Real scale = Real(1) / Real(p.height * p.width);
#pragma omp simd
      for (int64_t c = 0; c < p.channels; ++c) out[c] *= scale;
    };

    if (p.samples >= p.num_threads) {
      // A whole sample per thread: its second pass finds in L2 what its first pass wrote.
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.samples; ++n) {
        if (norm) {
          for (int64_t k = 0; k < chunks; ++k) first_pass(n, k);
          statistics(n);
        }
        for (int64_t k = 0; k < chunks; ++k) second_pass(n, k);
        if (pixel_sums != nullptr) mean_over_map(n);
      }
    } else {
      if (norm) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tasks; ++task) first_pass(task / chunks, task % chunks);
        // (the implicit barrier: statistics need every chunk)
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p.samples; ++n) statistics(n);
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < num_tasks; ++task) second_pass(task / chunks, task % chunks);
      if (pixel_sums != nullptr) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p.samples; ++n) mean_over_map(n);
      }
    }
    free(scratch);
  }
  free(pixel_sums);
  free(moments);
}
