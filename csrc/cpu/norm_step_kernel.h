// norm_step: drive, squashed modulator, norm per channel, activation; forward and backward. Included by its family inside namespace
// rnndyn::<isa>, after gate_math_kernel.h (activations) and area_step_kernel.h (Moments); parameters are documented in norm_step.h.
//
// Maths: d = sum of drives + bias, m = sum of modulators + bias, s the logistic sigmoid, a the identity or relu, f the activation
//   z = a(d) * 2 s(m);  y = (z - mean) * rstd * gamma + beta;  h = f(y);  mean, rstd over (map, group) per sample, or per channel over all samples
//   backward: g = dh f'(y);  dbeta = sum g;  dgamma = sum g xhat;  p = g gamma
//             dz = rstd (p - mean(p) - xhat mean(p xhat)), with means as the statistics;  dd = dz 2 s(m) a'(d);  dm = dz a(d) 2 s(m) (1 - s(m))
// Precision: moments of a chunk about its own mean in Real, chunks combined in double by Chan's formula; sums of the backward pass: a
//   chunk in Real, chunks in double.
// Traffic: forward reads every term once, writes the sums that are kept, z and state once (z is parked in the state: the second pass finds a
//   sample of it in L2, or where statistics are given a chunk in L1). Backward reads gradient and sums twice and writes each gradient once. Bound by memory.
// Threads: samples, or chunks where samples are fewer; a batch norm: chunks. Determinism: chunks of pixels depend on the shape alone and are
//   combined in order.
// Limits: at most kMaxNormTerms terms of each kind; the caller checks shapes.

static inline int64_t norm_chunk_pixels(const NormStepShape& s) {
  // (At most 256: so many numbers a sum in float32 takes without loss of what matters.)
  int64_t pixels = 16384 / s.channels;
  pixels = pixels < 16 ? 16 : pixels > 256 ? 256 : pixels;
  return pixels > s.pixels ? s.pixels : pixels;
}
static inline int64_t norm_chunks(const NormStepShape& s) {
  const int64_t size = norm_chunk_pixels(s);
  return (s.pixels + size - 1) / size;
}

// Doubles: two per channel of every chunk, and two per channel of every sample.
static inline int64_t norm_step_workspace(const NormStepShape& s) {
  return 2 * s.channels * s.samples * (norm_chunks(s) + 1);
}

// Pixels that go through the first pass together: their sums and values stay in L1.
static inline int64_t few_pixels(const NormStepShape& s) { return s.channels >= 2048 ? 1 : 2048 / s.channels; }
constexpr int kMaxFewGroups = 8;

// Sum of terms and bias of n pixels at `offset`: where it lies, in `kept`, or in `scratch`, if it is not kept.
template <typename Real>
inline const Real* norm_sum(const Real* const* terms, int num_terms, const Real* bias, Real* kept, Real* scratch,
                            int64_t offset, int64_t pixels, int64_t channels) {
  if (num_terms == 1 && bias == nullptr && kept == nullptr) return terms[0] + offset;
  Real* sum = kept != nullptr ? kept + offset : scratch;
  row_sum_terms(sum, terms, num_terms, bias, Real(0), offset, pixels, channels);
  return sum;
}

template <bool kSquash, typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> norm_value(const Several<Real, K>& drive,
                                                         const Several<Real, K>& modulator, bool rectify) {
  const Several<Real, K> a = rectify ? if_negative<Real, K>(drive, Real(0), drive) : drive;
  if constexpr (kSquash) return a * (Real(2) * sigmoid(modulator));
  return a;
}

// Per-channel statistics of one sample, as rows [C].
template <typename Real>
inline void norm_rows(const NormStepShape& s, int64_t n, const Real* mean, const Real* rstd, Real* mean_row,
                      Real* rstd_row) {
  const int64_t size = s.channels / s.groups;
  for (int64_t c = 0; c < s.channels; ++c) {
    const int64_t k = s.norm == NormKind::kGroup ? n * s.groups + c / size : c;
    mean_row[c] = mean[k], rstd_row[c] = rstd[k];
  }
}

// ---------------------------------------------------------------- forward

template <typename Real, GateActivation kActivation, bool kSquash>
struct NormForward {
  const NormStepForwardParams<Real>& p;
  const NormStepShape& s;
  int64_t chunk, chunks;

  explicit NormForward(const NormStepForwardParams<Real>& params)
      : p(params), s(params.shape), chunk(norm_chunk_pixels(s)), chunks(norm_chunks(s)) {}

  double* moments(int64_t n, int64_t k) const { return p.workspace + (n * chunks + k) * 2 * s.channels; }
  int64_t count(int64_t k) const { return (k + 1) * chunk < s.pixels ? chunk : s.pixels - k * chunk; }

  // z of one chunk, parked in the state, and its moments: per channel (batch) or per group. Pixels go a few at a time, which stay in L1
  // from the sums to the moments. scratch: the rest of it, after 3 rows, for sums that are not kept.
  void first_pass(int64_t n, int64_t k, Real* scratch) const {
    const int64_t pixels = count(k), start = (n * s.pixels + k * chunk) * s.channels, few = few_pixels(s);
    Moments total[kMaxFewGroups] = {};
    const bool one_by_one = s.norm == NormKind::kGroup && s.groups <= kMaxFewGroups;
    for (int64_t first = 0; first < pixels; first += few) {
      const int64_t now = pixels - first < few ? pixels - first : few, offset = start + first * s.channels;
      value(offset, now, scratch + 3 * s.channels);
      if (one_by_one) group_moments(p.state + offset, now, 0, s.groups, total);
    }
    double* out = moments(n, k);
    if (s.norm == NormKind::kBatch) {
      channel_moments(p.state + start, pixels, scratch, out);
    } else if (s.norm == NormKind::kGroup) {
      for (int64_t g = 0; g < s.groups; ++g) {
        Moments* of_group = one_by_one ? total + g : total;
        if (!one_by_one) *of_group = Moments{0, 0, 0}, group_moments(p.state + start, pixels, g, g + 1, of_group);
        out[2 * g] = of_group->mean, out[2 * g + 1] = of_group->m2;
      }
    }
  }

  // z of some pixels into the state; without a norm the state itself.
  void value(int64_t offset, int64_t pixels, Real* scratch) const {
    const int64_t size = pixels * s.channels;
    Real* z = p.state + offset;
    const bool rectify = s.rectify_drive;
    if (p.num_drive == 0 && p.drive_bias == nullptr) return row_zero(z, size);  // (which activations leave as it is)
    const Real* d = norm_sum(p.drive, p.num_drive, p.drive_bias, p.drive_sum, scratch, offset, pixels, s.channels);
    const Real* m = kSquash ? norm_sum(p.modulator, p.num_modulator, p.modulator_bias, p.modulator_sum, scratch + size,
                                       offset, pixels, s.channels)
                            : nullptr;
    const bool active = s.norm == NormKind::kNone;
    each_run<Real>(size, [&](auto run) RNNDYN_INLINED {
      const auto value = norm_value<kSquash>(run.read(d), run.read(kSquash ? m : d), rectify);
      run.write(z, active ? activate<kActivation>(value) : value);
    });
  }

  // Moments of groups first .. last - 1 over some pixels are added to those before.
  void group_moments(const Real* z, int64_t pixels, int64_t first, int64_t last, Moments* out) const {
    const int64_t width = s.channels / s.groups, size = pixels * s.channels;
    if (s.groups == 1) {
      for (int64_t i = 0; i < size; i += 1024) row_moments(z + i, size - i < 1024 ? size - i : 1024, out);
      return;
    }
    for (int64_t g = first; g < last; ++g)
      for (int64_t i = 0; i < pixels; ++i) row_moments(z + i * s.channels + g * width, width, out + g - first);
  }

  // Mean and sum of squared deviations of each channel over the pixels of a chunk. scratch: 3 rows.
  void channel_moments(const Real* z, int64_t pixels, Real* scratch, double* out) const {
    const int64_t c = s.channels;
    Real *centre = scratch, *m2 = scratch + c, *rest = scratch + 2 * c;
    row_zero(scratch, 3 * c);
    for (int64_t i = 0; i < pixels; ++i) row_add(centre, z + i * c, c);
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) centre[j] /= Real(pixels);
    for (int64_t i = 0; i < pixels; ++i) {
      const Real* row = z + i * c;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        const Real delta = row[j] - centre[j];
        m2[j] += delta * delta, rest[j] += delta;
      }
    }
    for (int64_t j = 0; j < c; ++j) {
      const double shift = double(rest[j]) / double(pixels);
      out[j] = double(centre[j]) + shift, out[c + j] = double(m2[j]) - double(rest[j]) * shift;
    }
  }

  void group_statistics(int64_t n) const {
    const int64_t width = s.channels / s.groups;
    for (int64_t g = 0; g < s.groups; ++g) {
      Moments total{0, 0, 0};
      for (int64_t k = 0; k < chunks; ++k) {
        const double* m = moments(n, k) + 2 * g;
        total.merge(double(count(k) * width), m[0], m[1]);
      }
      p.mean[n * s.groups + g] = Real(total.mean);
      p.rstd[n * s.groups + g] = Real(1.0 / __builtin_sqrt(total.m2 / total.count + s.eps));
    }
  }

  void channel_statistics(int64_t c) const {
    Moments total{0, 0, 0};
    for (int64_t n = 0; n < s.samples; ++n) {
      for (int64_t k = 0; k < chunks; ++k) {
        const double* m = moments(n, k);
        total.merge(double(count(k)), m[c], m[s.channels + c]);
      }
    }
    p.mean[c] = Real(total.mean);
    p.rstd[c] = Real(1.0 / __builtin_sqrt(total.m2 / total.count + s.eps));
    if (p.variance != nullptr) p.variance[c] = Real(total.m2 / total.count);
  }

  // Norm and activation of one chunk, in place. scratch: 2 rows.
  void second_pass(int64_t n, int64_t k, Real* scratch) const {
    const int64_t c = s.channels, pixels = count(k);
    Real* z = p.state + (n * s.pixels + k * chunk) * c;
    if (s.norm == NormKind::kNone) return;
    Real *mean = scratch, *rstd = scratch + c;
    norm_rows(s, n, p.mean, p.rstd, mean, rstd);
    const Real *gamma = p.gamma, *beta = p.beta;
    for (int64_t i = 0; i < pixels; ++i) {
      Real* row = z + i * c;
      each_run<Real>(c, [&](auto run) RNNDYN_INLINED {
        const auto y = (run.read(row) - run.read(mean)) * run.read(rstd) * run.read(gamma) + run.read(beta);
        run.write(row, activate<kActivation>(y));
      });
    }
  }

  void run() const {
    const int64_t tasks = s.samples * chunks;
    const bool by_sample = s.samples >= s.num_threads && s.norm != NormKind::kBatch;
#pragma omp parallel num_threads(s.num_threads)
    {
      Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * (3 + 2 * few_pixels(s)) * s.channels));
      if (s.norm == NormKind::kNone || s.norm == NormKind::kFixed) {
        // No statistics to wait for: the second pass of a chunk finds it in L1.
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
          first_pass(task / chunks, task % chunks, scratch);
          second_pass(task / chunks, task % chunks, scratch);
        }
      } else if (by_sample) {
        // A whole sample per thread: its second pass finds in L2 what its first pass wrote.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.samples; ++n) {
          for (int64_t k = 0; k < chunks; ++k) first_pass(n, k, scratch);
          if (s.norm == NormKind::kGroup) group_statistics(n);
          for (int64_t k = 0; k < chunks; ++k) second_pass(n, k, scratch);
        }
      } else {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) first_pass(task / chunks, task % chunks, scratch);
        // (the implicit barrier: statistics need every chunk, and the second pass the statistics)
        if (s.norm == NormKind::kGroup) {
#pragma omp for schedule(static)
          for (int64_t n = 0; n < s.samples; ++n) group_statistics(n);
        } else if (s.norm == NormKind::kBatch) {
#pragma omp for schedule(static)
          for (int64_t c = 0; c < s.channels; ++c) channel_statistics(c);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) second_pass(task / chunks, task % chunks, scratch);
      }
      free(scratch);
    }
  }
};

// ---------------------------------------------------------------- backward

template <typename Real, GateActivation kActivation, bool kSquash>
struct NormBackward {
  const NormStepBackwardParams<Real>& p;
  const NormStepShape& s;
  int64_t chunk, chunks;

  explicit NormBackward(const NormStepBackwardParams<Real>& params)
      : p(params), s(params.shape), chunk(norm_chunk_pixels(s)), chunks(norm_chunks(s)) {}

  double* sums(int64_t n, int64_t k) const { return p.workspace + (n * chunks + k) * 2 * s.channels; }
  double* totals(int64_t n) const { return p.workspace + (s.samples * chunks + n) * 2 * s.channels; }
  int64_t count(int64_t k) const { return (k + 1) * chunk < s.pixels ? chunk : s.pixels - k * chunk; }

  // Sums over one chunk of g and g xhat, per channel. scratch: 4 rows.
  void first_pass(int64_t n, int64_t k, Real* scratch) const {
    const int64_t c = s.channels, pixels = count(k), offset = (n * s.pixels + k * chunk) * c;
    Real *mean = scratch, *rstd = scratch + c, *sum = scratch + 2 * c, *product = scratch + 3 * c;
    norm_rows(s, n, p.mean, p.rstd, mean, rstd);
    row_zero(sum, 2 * c);
    const Real *gamma = p.gamma, *beta = p.beta;
    const bool rectify = s.rectify_drive, driven = p.drive != nullptr;
    for (int64_t i = 0; i < pixels; ++i) {
      const Real* d = driven ? p.drive + offset + i * c : gamma;  // (any row: its values are not used)
      const Real* m = kSquash && p.modulator != nullptr ? p.modulator + offset + i * c : gamma;
      const Real* grad = p.grad_state + offset + i * c;
      each_run<Real>(c, [&](auto run) RNNDYN_INLINED {
        typedef typename decltype(run)::Values Values;
        const Values z = driven ? norm_value<kSquash>(run.read(d), run.read(m), rectify) : Values(Real(0));
        // The same expression as in the forward pass, so that the slope sees the same rounding.
        const Values xhat = (z - run.read(mean)) * run.read(rstd), y = xhat * run.read(gamma) + run.read(beta);
        const Values g = run.read(grad) * slope<kActivation>(y, activate<kActivation>(y));
        run.write(sum, run.read(sum) + g);
        run.write(product, run.read(product) + g * xhat);
      });
    }
    double* out = sums(n, k);
    for (int64_t j = 0; j < 2 * c; ++j) out[j] = double(sum[j]);
  }

  void total(int64_t n) const {
    double* out = totals(n);
    for (int64_t j = 0; j < 2 * s.channels; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += sums(n, k)[j];
      out[j] = sum;
    }
  }

  // Means of p and p xhat over what the statistics of sample n are taken from, as rows [C].
  void means(int64_t n, Real* mean_p, Real* mean_px) const {
    const int64_t c = s.channels, width = c / s.groups;
    if (s.norm == NormKind::kGroup) {
      for (int64_t g = 0; g < s.groups; ++g) {
        double a = 0, b = 0;
        for (int64_t j = g * width; j < (g + 1) * width; ++j) {
          a += double(p.gamma[j]) * totals(n)[j], b += double(p.gamma[j]) * totals(n)[c + j];
        }
        for (int64_t j = g * width; j < (g + 1) * width; ++j) {
          mean_p[j] = Real(a / double(width * s.pixels)), mean_px[j] = Real(b / double(width * s.pixels));
        }
      }
    } else if (s.norm == NormKind::kBatch) {
      const double size = double(s.samples * s.pixels);
      for (int64_t j = 0; j < c; ++j) {
        mean_p[j] = Real(double(p.gamma[j]) * double(p.grad_beta[j]) / size);
        mean_px[j] = Real(double(p.gamma[j]) * double(p.grad_gamma[j]) / size);
      }
    } else {
      row_zero(mean_p, c), row_zero(mean_px, c);
    }
  }

  // Gradients of drive and modulator over one chunk, and their sums per channel, where those are wanted, in place of the chunk's sums that the
  // first pass took. scratch: 10 rows.
  void second_pass(int64_t n, int64_t k, Real* scratch) const {
    const int64_t c = s.channels, pixels = count(k), offset = (n * s.pixels + k * chunk) * c;
    Real *mean = scratch, *rstd = scratch + c, *mean_p = scratch + 2 * c, *mean_px = scratch + 3 * c;
    const bool normed = s.norm != NormKind::kNone, rectify = s.rectify_drive;
    const Real *gamma = scratch + 4 * c, *beta = scratch + 5 * c;
    if (normed) {
      norm_rows(s, n, p.mean, p.rstd, mean, rstd);
      means(n, mean_p, mean_px);
      gamma = p.gamma, beta = p.beta;
    } else {
      row_zero(scratch, 6 * c);  // y = z: rstd and gamma are one
      for (int64_t j = 0; j < c; ++j) rstd[j] = scratch[4 * c + j] = Real(1);
    }
    Real *sum_d = scratch + 8 * c, *sum_m = scratch + 9 * c;
    row_zero(sum_d, 2 * c);
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = offset + i * c;
      const Real* d = p.drive + at;
      const Real* m = kSquash ? p.modulator + at : d;
      const Real* grad = p.grad_state + at;
      Real* grad_d = p.grad_drive != nullptr ? p.grad_drive + at : scratch + 6 * c;
      Real* grad_m = kSquash && p.grad_modulator != nullptr ? p.grad_modulator + at : scratch + 7 * c;
      each_run<Real>(c, [&](auto run) RNNDYN_INLINED {
        typedef typename decltype(run)::Values Values;
        const Values drive = run.read(d), a = rectify ? if_negative(drive, Values(Real(0)), drive) : drive;
        const Values half = kSquash ? sigmoid(run.read(m)) : Values(Real(0.5)), factor = Real(2) * half;
        const Values z = kSquash ? a * factor : a;
        const Values xhat = (z - run.read(mean)) * run.read(rstd), y = xhat * run.read(gamma) + run.read(beta);
        const Values g = run.read(grad) * slope<kActivation>(y, activate<kActivation>(y));
        const Values dz = run.read(rstd) * (g * run.read(gamma) - run.read(mean_p) - xhat * run.read(mean_px));
        const Values of_drive = kSquash ? dz * factor : dz;
        run.write(grad_d, rectify ? if_positive(drive, of_drive, Values(Real(0))) : of_drive);
        if (kSquash) run.write(grad_m, dz * z * (Real(1) - half));
      });
      if (p.grad_drive_bias != nullptr) row_add(sum_d, grad_d, c);
      if (kSquash && p.grad_modulator_bias != nullptr) row_add(sum_m, grad_m, c);
    }
    if (biased()) {
      double* out = sums(n, k);
      for (int64_t j = 0; j < 2 * c; ++j) out[j] = double(sum_d[j]);
    }
  }

  bool biased() const { return p.grad_drive_bias != nullptr || p.grad_modulator_bias != nullptr; }

  void bias_sums(int64_t j) const {
    double drive = 0, modulator = 0;
    for (int64_t task = 0; task < s.samples * chunks; ++task) {
      const double* sum = sums(task / chunks, task % chunks);
      drive += sum[j], modulator += sum[s.channels + j];
    }
    if (p.grad_drive_bias != nullptr) p.grad_drive_bias[j] = Real(drive);
    if (p.grad_modulator_bias != nullptr) p.grad_modulator_bias[j] = Real(modulator);
  }

  void run() const {
    const int64_t tasks = s.samples * chunks;
    const bool normed = s.norm != NormKind::kNone;
    const bool wanted = p.grad_drive != nullptr || p.grad_modulator != nullptr || biased();
#pragma omp parallel num_threads(s.num_threads)
    {
      Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * 10 * s.channels));
      if (normed) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) first_pass(task / chunks, task % chunks, scratch);
        // (the implicit barriers: sums need every chunk, and the second pass the sums)
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.samples; ++n) total(n);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < s.channels; ++j) {
          double sum = 0, product = 0;
          for (int64_t n = 0; n < s.samples; ++n) sum += totals(n)[j], product += totals(n)[s.channels + j];
          p.grad_beta[j] = Real(sum), p.grad_gamma[j] = Real(product);
        }
      }
      if (wanted && p.drive != nullptr) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) second_pass(task / chunks, task % chunks, scratch);
        // (the implicit barrier: a bias is the sum over all chunks)
        if (biased()) {
#pragma omp for schedule(static)
          for (int64_t j = 0; j < s.channels; ++j) bias_sums(j);
        }
      }
      free(scratch);
    }
  }
};

template <template <typename, GateActivation, bool> class Pass, typename Real, typename Params>
void norm_step_run(const Params& p) {
  switch (p.shape.activation) {
    case GateActivation::kIdentity:
      return p.shape.squash ? Pass<Real, GateActivation::kIdentity, true>(p).run()
                            : Pass<Real, GateActivation::kIdentity, false>(p).run();
    case GateActivation::kRelu:
      return p.shape.squash ? Pass<Real, GateActivation::kRelu, true>(p).run()
                            : Pass<Real, GateActivation::kRelu, false>(p).run();
    case GateActivation::kElu:
      return p.shape.squash ? Pass<Real, GateActivation::kElu, true>(p).run()
                            : Pass<Real, GateActivation::kElu, false>(p).run();
    case GateActivation::kTanh:
      return p.shape.squash ? Pass<Real, GateActivation::kTanh, true>(p).run()
                            : Pass<Real, GateActivation::kTanh, false>(p).run();
  }
}

template <typename Real>
void norm_step_forward(const NormStepForwardParams<Real>& p) {
  norm_step_run<NormForward, Real>(p);
}

template <typename Real>
void norm_step_backward(const NormStepBackwardParams<Real>& p) {
  norm_step_run<NormBackward, Real>(p);
}
