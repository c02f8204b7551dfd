// readout_zones: norm, change, predicted class, margin, boundary distance and cosines of the representations of one
// time step. Included by kernels.cpp inside namespace rnndyn::<isa>; parameters are documented in readout_zones.h.
//
// Maths (per sample; l_c = w_c . r + b_c, the products w_c . r given):
//   p = argmax_c l_c, or of the log-probabilities where given; the first on ties
//   norm = ||r||;  change = ||r - previous||;  cosine_c = w_c . r / (||w_c|| ||r||), 0 where a norm is 0
//   margin = l_p - max_{j != p} l_j;  boundary_distance = min_{j != p} (l_p - l_j) / ||w_p - w_j||
// Precision: sums over D in Real, in vector lanes; a norm that overflows Real comes out infinite: the caller says so.
// Traffic: reads r and the products once, previous once (the caller walks time within a block of samples, so it is
//   still in cache) and one row of the [C, C] table; writes the cosines over the products. Bound by memory bandwidth.
// Threads: over samples.
// Determinism: no sum crosses samples, so results do not depend on the thread count.
// Limits: the caller checks shapes, labels and strides. A sample with NaN gets class 0 and a NaN norm.

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

template <typename Real>
void readout_zones(const ReadoutZonesParams<Real>& p) {
  const int64_t dims = p.dims, classes = p.classes;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t n = 0; n < p.samples; ++n) {
    const Real* r = p.representations + n * p.representation_stride;
    Real squares = 0;
    if (p.previous != nullptr) {
      const Real* before = p.previous + n * p.previous_stride;
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

    Real* product = p.cosine + n * classes;
    const int64_t predicted = p.log_probs != nullptr
                                  ? zone_argmax<Real>(p.log_probs + n * p.log_prob_stride, nullptr, classes)
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
    p.cos_label[n] = product[p.labels[n]];
  }
}
