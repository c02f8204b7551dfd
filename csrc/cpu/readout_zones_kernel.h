// readout_zones: norm, change, predicted class, margin, boundary distance and cosines of representations over time.
// Included by its family inside namespace rnndyn::<isa>, after gemm_kernel.h (vector type, rows of a register block);
// parameters are documented in readout_zones.h.
//
// Maths (per sample and step; l_c = w_c . r + b_c):
//   p = argmax_c l_c, or of the log-probabilities where given; the first on ties
//   norm = ||r||;  change = ||r - previous||;  cosine_c = w_c . r / (||w_c|| ||r||), 0 where a norm is 0
//   margin = l_p - max_{j != p} l_j;  boundary_distance = min_{j != p} (l_p - l_j) / ||w_p - w_j||
// Precision: sums over D in Real, norms in vector lanes, products one fused multiply-add after another; a norm that
//   overflows Real comes out infinite: the caller says so.
// Traffic: float32: reads r once from memory (2 C multiply-adds per element: bound by arithmetic from C = 16 on); the
//   packed readout streams from L2 per block of rows; the step before is still in cache. float64: products come from the
//   caller, r is read again. Writes the cosines.
// Threads: over blocks of samples, each through all its time steps.
// Determinism: no sum crosses samples, so results do not depend on the thread count.
// Limits: the caller checks shapes, labels and strides. A sample with NaN gets class 0 and a NaN norm.

// packed[v][d][lane] = weight[v * lanes + lane][d], zero beyond C.
static inline void zone_pack(const float* weight, int64_t classes, int64_t dims, float* packed) {
  const int64_t padded = (classes + kVectorFloats - 1) / kVectorFloats * kVectorFloats;
  for (int64_t c = 0; c < padded; ++c) {
    float* out = packed + c / kVectorFloats * dims * kVectorFloats + c % kVectorFloats;
    for (int64_t d = 0; d < dims; ++d) out[d * kVectorFloats] = c < classes ? weight[c * dims + d] : 0.0f;
  }
}

// Products of Rows rows with Vecs vectors of classes, of which `count` classes exist.
template <int Rows, int Vecs>
static void zone_products(const float* r, int64_t r_stride, const float* packed, int64_t dims, float* out,
                          int64_t out_stride, int64_t count) {
  vec acc[Rows][Vecs];
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) acc[i][v] = vec{};
  // One base pointer per three rows: base, base + stride and base + 2 * stride are single addressing modes.
  constexpr int kBases = (Rows + 2) / 3;
  const float* base[kBases];
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) base[i] = r + 3 * i * r_stride;
  for (int64_t d = 0; d < dims; ++d) {
    vec b[Vecs];
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) b[v] = load(packed + (v * dims + d) * kVectorFloats);
#pragma GCC unroll 14
    for (int i = 0; i < Rows; ++i) {
      const float value = base[i / 3][(i % 3) * r_stride];
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) acc[i][v] += value * b[v];
    }
#pragma GCC unroll 5
    for (int i = 0; i < kBases; ++i) ++base[i];
  }
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v)
      if (count > v * kVectorFloats)
        store_part(out + i * out_stride + v * kVectorFloats, acc[i][v], count - v * kVectorFloats);
}

// Products of up to kGemmRows rows with all classes.
template <int Rows>
static void zone_rows(int64_t rows, const float* r, int64_t r_stride, const float* packed, int64_t dims, float* out,
                      int64_t classes) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return zone_rows<Rows - 1>(rows, r, r_stride, packed, dims, out, classes);
  }
  for (int64_t c = 0; c < classes;) {
    const float* panel = packed + c * dims;
    if (classes - c > kVectorFloats) {
      zone_products<Rows, 2>(r, r_stride, panel, dims, out + c, classes, classes - c);
      c += 2 * kVectorFloats;
    } else {
      zone_products<Rows, 1>(r, r_stride, panel, dims, out + c, classes, classes - c);
      c += kVectorFloats;
    }
  }
}

template <typename Real>
inline int64_t zone_argmax(const Real* scores, const Real* bias, int64_t classes) {
  Real best = -__builtin_huge_val();
  if (bias == nullptr) {
#pragma omp simd reduction(max : best)
    for (int64_t c = 0; c < classes; ++c) best = scores[c] > best ? scores[c] : best;
    for (int64_t c = 0; c < classes; ++c)
      if (scores[c] == best) return c;
  } else {
#pragma omp simd reduction(max : best)
    for (int64_t c = 0; c < classes; ++c) {
      const Real logit = scores[c] + bias[c];
      best = logit > best ? logit : best;
    }
    // The same sum again: one addition has one rounding, so equality is exact.
    for (int64_t c = 0; c < classes; ++c)
      if (scores[c] + bias[c] == best) return c;
  }
  return 0;
}

// Smallest difference of logits and smallest boundary distance over classes [begin, end), which leave out the
// predicted one.
template <typename Real>
inline void zone_minima(const Real* product, const Real* bias, const Real* inverse_distance, Real own, int64_t begin,
                        int64_t end, Real* margin, Real* boundary) {
  const Real infinite = __builtin_huge_val();
  Real least_margin = *margin, least_boundary = *boundary;
  if (bias == nullptr) {
#pragma omp simd reduction(min : least_margin, least_boundary)
    for (int64_t c = begin; c < end; ++c) {
      const Real difference = own - product[c];
      const Real signed_distance = inverse_distance[c] > Real(0) ? difference * inverse_distance[c] : infinite;
      least_margin = difference < least_margin ? difference : least_margin;
      least_boundary = signed_distance < least_boundary ? signed_distance : least_boundary;
    }
  } else {
#pragma omp simd reduction(min : least_margin, least_boundary)
    for (int64_t c = begin; c < end; ++c) {
      const Real difference = own - (product[c] + bias[c]);
      const Real signed_distance = inverse_distance[c] > Real(0) ? difference * inverse_distance[c] : infinite;
      least_margin = difference < least_margin ? difference : least_margin;
      least_boundary = signed_distance < least_boundary ? signed_distance : least_boundary;
    }
  }
  *margin = least_margin;
  *boundary = least_boundary;
}

template <typename Real>
inline Real zone_sqrt(Real x) {
  if constexpr (sizeof(Real) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// The measures of one sample at one step, its products in place.
template <typename Real>
inline void zone_measures(const ReadoutZonesParams<Real>& p, const Real* r, const Real* before, const Real* log_probs,
                          int64_t label, int64_t n, Real* product) {
  const int64_t dims = p.dims, classes = p.classes;
  Real squares = 0;
  if (before != nullptr) {
    Real change_squares = 0;
#pragma omp simd reduction(+ : squares, change_squares)
    for (int64_t d = 0; d < dims; ++d) {
      const Real delta = r[d] - before[d];
      squares += r[d] * r[d];
      change_squares += delta * delta;
    }
    p.change[n] = zone_sqrt(change_squares);
  } else {
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < dims; ++d) squares += r[d] * r[d];
    p.change[n] = __builtin_nan("");
  }
  const Real norm = zone_sqrt(squares);
  p.norm[n] = norm;

  const int64_t predicted = log_probs != nullptr ? zone_argmax<Real>(log_probs, nullptr, classes)
                                                 : zone_argmax<Real>(product, p.bias, classes);
  p.predicted[n] = predicted;

  const Real own = product[predicted] + (p.bias != nullptr ? p.bias[predicted] : Real(0));
  const Real* inverse_distance = p.inverse_distance + predicted * classes;
  Real margin = __builtin_huge_val(), boundary = __builtin_huge_val();
  zone_minima(product, p.bias, inverse_distance, own, 0, predicted, &margin, &boundary);
  zone_minima(product, p.bias, inverse_distance, own, predicted + 1, classes, &margin, &boundary);
  p.margin[n] = margin;
  p.boundary_distance[n] = boundary;

#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) {
    const Real scale = norm * p.weight_norm[c];
    product[c] = scale > Real(0) ? product[c] / scale : Real(0);
  }
  p.cos_predicted[n] = product[predicted];
  p.cos_label[n] = product[label];
}

template <typename Real>
void readout_zones(const ReadoutZonesParams<Real>& p) {
  if constexpr (sizeof(Real) == 4) {
    if (p.weight != nullptr) zone_pack(p.weight, p.classes, p.dims, p.packed);
  }
  const int64_t blocks = (p.samples + kGemmRows - 1) / kGemmRows;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kGemmRows;
    const int64_t rows = p.samples - first < kGemmRows ? p.samples - first : int64_t(kGemmRows);
    for (int64_t t = 0; t < p.timesteps; ++t) {
      const Real* r = p.representations + t * p.representation_time_stride + first * p.representation_stride;
      Real* product = p.cosine + (t * p.samples + first) * p.classes;
      if constexpr (sizeof(Real) == 4) {
        if (p.weight != nullptr)
          zone_rows<kGemmRows>(rows, r, p.representation_stride, p.packed, p.dims, product, p.classes);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = first + i;
        const Real* before = nullptr;
        if (t > 0) {
          before = r + i * p.representation_stride - p.representation_time_stride;
        } else if (p.previous != nullptr) {
          before = p.previous + n * p.previous_stride;
        }
        const Real* log_probs =
            p.log_probs != nullptr ? p.log_probs + t * p.log_prob_time_stride + n * p.log_prob_stride : nullptr;
        zone_measures(p, r + i * p.representation_stride, before, log_probs, p.labels[n], t * p.samples + n,
                      product + i * p.classes);
      }
    }
  }
}
