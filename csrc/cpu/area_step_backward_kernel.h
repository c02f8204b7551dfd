// area_step, backward. Included inside namespace rnndyn::<isa> after area_step_kernel.h, whose head has the maths; parameters are documented
// in area_step.h.

template <typename Real>
struct BackwardRows {
  const AreaStepBackwardParams<Real>& p;
  int64_t row_size, map_size;

  explicit BackwardRows(const AreaStepBackwardParams<Real>& params)
      : p(params), row_size(params.width * params.channels), map_size(params.height * params.width * params.channels) {}

  // Gradient of the state: its consumers and its pooled forms. out [W * C].
  void grad_state(int64_t n, int64_t r, Real* out) const {
    const int64_t offset = n * map_size + r * row_size;
    row_sum_terms(out, p.grad_state, p.num_grad_state, static_cast<const Real*>(nullptr), Real(0), offset, p.width,
                  p.channels);
    if (p.grad_mean_pooled != nullptr)
      row_add_channels(out, p.grad_mean_pooled + n * p.channels, p.width, p.channels,
                       Real(1) / Real(p.height * p.width));
    if (p.grad_max_pooled != nullptr && r / 2 < p.height / 2) {
      const int64_t pooled_width = p.width / 2;
      const int64_t pooled_offset = (n * (p.height / 2) + r / 2) * pooled_width * p.channels;
      for (int64_t w = 0; w < 2 * pooled_width; ++w) {
        const uint8_t here = uint8_t(2 * (r % 2) + w % 2);
        const uint8_t* where = p.argmax + pooled_offset + (w / 2) * p.channels;
        const Real* grad = p.grad_max_pooled + pooled_offset + (w / 2) * p.channels;
        Real* pixel = out + w * p.channels;
#pragma omp simd
        for (int64_t c = 0; c < p.channels; ++c) pixel[c] += where[c] == here ? grad[c] : Real(0);
      }
    }
  }

  // The value before the norm: kept (additive) or computed again from the drive and the modulator.
  const Real* value(int64_t n, int64_t r, Real* scratch) const {
    const int64_t offset = n * map_size + r * row_size;
    if (!p.multiplicative) return p.value + offset;
    if (p.num_drive == 1 && p.drive_bias == nullptr && p.modulator_sum != nullptr) {
      const Real *drive = p.drive[0] + offset, *m = p.modulator_sum + offset;
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) scratch[i] = drive[i] * m[i];
      return scratch;
    }
    row_sum_terms(scratch, p.drive, p.num_drive, p.drive_bias, Real(0), offset, p.width, p.channels);
    if (p.modulator_sum != nullptr) {
      const Real* m = p.modulator_sum + offset;
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i) scratch[i] *= m[i];
    }
    return scratch;
  }

  // First pass with a norm: masks the gradient by the relu into grad_drive, adds to dgamma and dbeta, and sums p and p * xhat.
  void masked(int64_t n, int64_t r, Real* scratch, double* sum_p, double* sum_px) const {
    Real* g = p.grad_drive + n * map_size + r * row_size;
    grad_state(n, r, g);
    const Real* z = value(n, r, scratch);
    const Real *gamma = p.gamma + r * row_size, *beta = p.beta + r * row_size;
    Real *grad_gamma = p.grad_gamma + r * row_size, *grad_beta = p.grad_beta + r * row_size;
    const Real mean = p.mean[n], rstd = p.rstd[n];
    const bool rectify = p.rectify;
    Real s = 0, sx = 0;
#pragma omp simd reduction(+ : s, sx)
    for (int64_t i = 0; i < row_size; ++i) {
      const Real xhat = (z[i] - mean) * rstd;
      // The same expression as in the forward pass, so that the sign test sees the same rounding.
      const Real y = (z[i] - mean) * rstd * gamma[i] + beta[i];
      const Real gi = rectify && y <= Real(0) ? Real(0) : g[i];
      g[i] = gi;
      grad_gamma[i] += gi * xhat;
      grad_beta[i] += gi;
      s += gi * gamma[i];
      sx += gi * gamma[i] * xhat;
    }
    *sum_p += double(s);
    *sum_px += double(sx);
  }

  // Gradients of drives and modulators from dz, which is in `grad` (grad_drive or scratch).
  void distribute(int64_t n, int64_t r, Real* grad, Real* scratch) const {
    const int64_t offset = n * map_size + r * row_size;
    if (p.multiplicative) {
      if (p.grad_modulator != nullptr) {
        Real* out = p.grad_modulator + offset;
        row_sum_terms(scratch, p.drive, p.num_drive, p.drive_bias, Real(0), offset, p.width, p.channels);
#pragma omp simd
        for (int64_t i = 0; i < row_size; ++i) out[i] = grad[i] * scratch[i];
      }
      if (p.modulator_sum != nullptr) {
        const Real* m = p.modulator_sum + offset;
#pragma omp simd
        for (int64_t i = 0; i < row_size; ++i) grad[i] *= m[i];
      }
    }
    if (p.grad_drive_sum != nullptr) row_add(p.grad_drive_sum + offset, grad, row_size);
  }

  void finish(int64_t n, int64_t r, Real mean_p, Real mean_px, Real* scratch) const {
    const int64_t offset = n * map_size + r * row_size;
    Real* grad = p.grad_drive != nullptr ? p.grad_drive + offset : scratch + row_size;
    if (p.gamma != nullptr) {
      const Real* z = value(n, r, scratch);
      const Real* gamma = p.gamma + r * row_size;
      const Real mean = p.mean[n], rstd = p.rstd[n];
#pragma omp simd
      for (int64_t i = 0; i < row_size; ++i)
        grad[i] = rstd * (grad[i] * gamma[i] - mean_p - (z[i] - mean) * rstd * mean_px);
    } else {
      grad_state(n, r, grad);
      if (p.rectify) {
        const Real* z = value(n, r, scratch);
#pragma omp simd
        for (int64_t i = 0; i < row_size; ++i) grad[i] = z[i] <= Real(0) ? Real(0) : grad[i];
      }
    }
    distribute(n, r, grad, scratch);
  }
};

// Samples that go through both passes before the next ones do: as many as a thread's share of leaves its part of the gradient, of the drive and of
// the modulator in 768 KB of L2, where at least one fits beside the norm's parameters and their gradients. Else all of them; so too with fewer
// chunks than threads, where the second pass shares samples.
template <typename Real>
static int64_t samples_at_once(const AreaStepBackwardParams<Real>& p, int64_t chunks) {
  const int64_t share = p.height * p.width * p.channels * int64_t(sizeof(Real)) / p.num_threads;
  const int64_t maps = 2 + (p.multiplicative ? p.num_drive : 0);
  if (p.gamma == nullptr || chunks < p.num_threads || (maps + 4) * share > 2 * 1024 * 1024) return p.samples;
  const int64_t fit = 768 * 1024 / (maps * share + 1);
  return fit > 1 ? fit : 1;
}

template <typename Real>
void area_step_backward(const AreaStepBackwardParams<Real>& p) {
  const BackwardRows<Real> rows(p);
  const int64_t chunk_rows = rows_per_chunk(p.width, p.channels);
  const int64_t chunks = num_chunks(p.height, p.width, p.channels), at_once = samples_at_once(p, chunks);
  const bool norm = p.gamma != nullptr;
  const double map_size = double(rows.map_size);

#pragma omp parallel num_threads(p.num_threads)
  {
    Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * 2 * rows.row_size));
    auto first_pass = [&](int64_t n, int64_t k) {
      const int64_t first = k * chunk_rows, last = first + chunk_rows < p.height ? first + chunk_rows : p.height;
      double sum_p = 0, sum_px = 0;
      for (int64_t r = first; r < last; ++r) rows.masked(n, r, scratch, &sum_p, &sum_px);
      p.partial[2 * (n * chunks + k)] = sum_p;
      p.partial[2 * (n * chunks + k) + 1] = sum_px;
    };
    auto second_pass = [&](int64_t n, int64_t k) {
      const int64_t first = k * chunk_rows, last = first + chunk_rows < p.height ? first + chunk_rows : p.height;
      double sum_p = 0, sum_px = 0;
      for (int64_t j = 0; norm && j < chunks; ++j) {
        sum_p += p.partial[2 * (n * chunks + j)];
        sum_px += p.partial[2 * (n * chunks + j) + 1];
      }
      for (int64_t r = first; r < last; ++r)
        rows.finish(n, r, Real(sum_p / map_size), Real(sum_px / map_size), scratch);
    };
    for (int64_t start = 0; start < p.samples; start += at_once) {
      const int64_t end = start + at_once < p.samples ? start + at_once : p.samples;
      if (norm) {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < chunks; ++k)
          for (int64_t n = start; n < end; ++n) first_pass(n, k);
        // (the implicit barrier: the second pass needs the sums of every chunk)
      }
      if (!norm || at_once >= p.samples) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p.samples * chunks; ++task) second_pass(task / chunks, task % chunks);
      } else {
        // The thread that has a chunk in L2. (No barrier: the next samples have sums of their own, and each chunk its thread.)
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < chunks; ++k)
          for (int64_t n = start; n < end; ++n) second_pass(n, k);
      }
    }
    free(scratch);
  }
}
