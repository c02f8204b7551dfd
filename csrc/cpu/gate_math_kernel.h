// Arithmetic of gates: sigmoid, tanh and elu of several registers at once. Included inside namespace rnndyn::<isa> after ctrnn_math_kernel.h.
//
// Maths: all of them from exp(x) = 2^n (p + 1), with p = exp(r) - 1 and |r| <= ln(2) / 2: s(x) = 1 / (1 + exp(-x)), tanh(x) = e / (e + 2) with
//   e = exp(2 x) - 1, elu(x) = exp(min(x, 0)) - 1 + max(x, 0).
// Precision: Taylor's series of p, cut where the next term is below half a unit; quotients of float32 with AVX-512 are the 14-bit estimate and a Newton
//   step. Measured over their range, sigmoid and tanh are within 3 units in the last place and elu within 2, near zero too. NaN stays NaN; infinities
//   give the limits, but no sigmoid is less than about the least normal number.
// Speed: of one register, every step waits for the one before (30 of them, four cycles each), and the processor looks ahead no further than one or
//   two registers; of several, steps alternate (UGRNN: 1.9 times as fast).

#ifdef __SANITIZE_ADDRESS__
#define RNNDYN_INLINED  // (the checks of some thousand copies take minutes to compile)
#else
#define RNNDYN_INLINED __attribute__((always_inline))
#endif

// K registers. Numbers stand for registers of them.
template <typename Real, int K>
struct Several {
  typedef typename Simd<Real>::vec vec;
  static constexpr int kCount = K;
  vec v[K];

  Several() = default;
  Several(Real x) {
    for (int k = 0; k < K; ++k) v[k] = splat<Real>(x);
  }
  // function(k) for each register.
  template <class Function>
  static inline RNNDYN_INLINED Several of(Function function) {
    Several y;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) y.v[k] = function(k);
    return y;
  }
#define RNNDYN_SEVERAL(op)                                                               \
  friend inline RNNDYN_INLINED Several operator op(const Several& a, const Several& b) { \
    return of([&](int k) RNNDYN_INLINED { return a.v[k] op b.v[k]; });                   \
  }
  RNNDYN_SEVERAL(+)
  RNNDYN_SEVERAL(-)
  RNNDYN_SEVERAL(*)
#undef RNNDYN_SEVERAL
};

// NaN stays NaN.
template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> bounded(const Several<Real, K>& x, Real least, Real most) {
  typedef typename Simd<Real>::vec vec;
  return Several<Real, K>::of([&](int k) RNNDYN_INLINED -> vec {
#ifdef __AVX512F__
    // (Of two numbers of which one is NaN the instructions take the second one.)
    if constexpr (Simd<Real>::kFloat) {
      const __m512 low = _mm512_set1_ps(least), high = _mm512_set1_ps(most);
      return (vec)_mm512_maskz_min_ps(0xffff, high, _mm512_maskz_max_ps(0xffff, low, (__m512)x.v[k]));
    }
#endif
    const vec above = x.v[k] < least ? splat<Real>(least) : x.v[k];
    return above > most ? splat<Real>(most) : above;
  });
}
// x < 0 ? a : b, and x > 0 ? a : b.
template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> if_negative(const Several<Real, K>& x, const Several<Real, K>& a,
                                                          const Several<Real, K>& b) {
  return Several<Real, K>::of([&](int k) RNNDYN_INLINED { return x.v[k] < 0 ? a.v[k] : b.v[k]; });
}
template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> if_positive(const Several<Real, K>& x, const Several<Real, K>& a,
                                                          const Several<Real, K>& b) {
  return Several<Real, K>::of([&](int k) RNNDYN_INLINED { return x.v[k] > 0 ? a.v[k] : b.v[k]; });
}
template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> rough_reciprocal(const Several<Real, K>& x) {
  typedef typename Simd<Real>::vec vec;
  return Several<Real, K>::of([&](int k) RNNDYN_INLINED -> vec {
#ifdef __AVX512F__
    if constexpr (Simd<Real>::kFloat) return (vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x.v[k]);
#endif
    return 1 / x.v[k];
  });
}
// Whether a rough reciprocal needs a Newton step.
template <typename Real>
constexpr bool kRough =
#ifdef __AVX512F__
    Simd<Real>::kFloat;
#else
    false;
#endif

// exp(x) - 1 = scale p + (scale - 1), for x of which 2^n is a normal number.
template <typename Real, int K>
struct Exponential {
  typedef Several<Real, K> Values;
  Values p, scale;

  inline RNNDYN_INLINED explicit Exponential(const Values& x) {
    typedef typename Bits<Real>::type ints;
    constexpr bool f = Simd<Real>::kFloat;
    // 1.5 * 2^mantissa: adding it rounds to an integer.
    const Real magic = f ? Real(12582912.0) : Real(6755399441055744.0);
    const Real high = f ? Real(0.693359375) : Real(6.93147180369123816490e-01);
    const Real low = f ? Real(-2.12194440e-4) : Real(1.90821492927058770002e-10);
    const Values shifted = x * Real(1.44269504088896340736) + magic, n = shifted - magic;
    const Values r = (x - n * high) - n * low, square = r * r;
    scale = Values::of([&](int k) RNNDYN_INLINED {
      return (typename Values::vec)(((ints)shifted.v[k] << Bits<Real>::kMantissa) + (ints)splat<Real>(1));
    });
    constexpr Real c[] = {
        Real(1.0 / 2),       Real(1.0 / 6),        Real(1.0 / 24),        Real(1.0 / 120),
        Real(1.0 / 720),     Real(1.0 / 5040),     Real(1.0 / 40320),     Real(1.0 / 362880),
        Real(1.0 / 3628800), Real(1.0 / 39916800), Real(1.0 / 479001600), Real(1.0 / 6227020800),
    };
    constexpr int last = f ? 4 : 10;
    Values sum = r * c[last + 1] + c[last];
#pragma GCC unroll 8
    for (int k = last - 2; k >= 0; k -= 2) sum = sum * square + (r * c[k + 1] + c[k]);
    p = sum * square + r;
  }
};

template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> sigmoid(const Several<Real, K>& x) {
  constexpr Real limit =
      Simd<Real>::kFloat ? Real(87) : Real(708);  // the least normal number lies just below exp(-limit)
  const Exponential<Real, K> e(bounded<Real, K>(Real(0) - x, -limit, limit));
  const Several<Real, K> d = e.scale * e.p + e.scale + Real(1), y = rough_reciprocal(d);
  if constexpr (kRough<Real>) return y + y * (Real(1) - d * y);
  return y;
}
template <typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> hyperbolic_tangent(const Several<Real, K>& x) {
  const Exponential<Real, K> e(bounded<Real, K>(x + x, Real(-40), Real(40)));
  const Several<Real, K> a = e.scale * e.p + (e.scale - Real(1)), b = a + Real(2);
  if constexpr (kRough<Real>) {
    const Several<Real, K> y = rough_reciprocal(b), q = a * y;
    return q + y * (a - q * b);
  }
  return Several<Real, K>::of([&](int k) RNNDYN_INLINED { return a.v[k] / b.v[k]; });
}

template <GateActivation kActivation, typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> activate(const Several<Real, K>& x) {
  if constexpr (kActivation == GateActivation::kRelu) return if_negative<Real, K>(x, Real(0), x);
  if constexpr (kActivation == GateActivation::kTanh) return hyperbolic_tangent(x);
  if constexpr (kActivation == GateActivation::kElu) {
    constexpr Real limit = Simd<Real>::kFloat ? Real(-87) : Real(-708);
    const Exponential<Real, K> e(bounded<Real, K>(x, limit, Real(0)));
    return if_positive<Real, K>(x, x, e.scale * e.p + (e.scale - Real(1)));
  }
  return x;
}
// The activation's slope at x, where its value is y.
template <GateActivation kActivation, typename Real, int K>
static inline RNNDYN_INLINED Several<Real, K> slope(const Several<Real, K>& x, const Several<Real, K>& y) {
  if constexpr (kActivation == GateActivation::kRelu) return if_positive<Real, K>(x, Real(1), Real(0));
  if constexpr (kActivation == GateActivation::kElu) return if_positive<Real, K>(x, Real(1), y + Real(1));
  if constexpr (kActivation == GateActivation::kTanh) return Real(1) - y * y;
  return Real(1);
}

// Part of a row of numbers, from `at` on: K registers, or K = 0: the last `left` numbers, fewer than a register has.
template <typename Real, int K>
struct Run {
  typedef Several<Real, K ? K : 1> Values;
  int64_t at, left;

  static constexpr int64_t kLanes = Simd<Real>::kLanes;

  inline RNNDYN_INLINED Values read(const Real* row) const {
    if constexpr (K > 0) {
      return Values::of([&](int k) RNNDYN_INLINED { return load_vec(row + at + k * kLanes); });
    } else {
      Values values;
      values.v[0] = typename Simd<Real>::vec{};
      for (int64_t i = 0; i < left; ++i) values.v[0][i] = row[at + i];
      return values;
    }
  }
  inline RNNDYN_INLINED void write(Real* row, const Values& values) const {
    for (int k = 0; k < K; ++k) store_vec(row + at + k * kLanes, values.v[k]);
    for (int64_t i = 0; K == 0 && i < left; ++i) row[at + i] = values.v[0][i];
  }
};

constexpr int kRegisters = 4;  // that go together

// function(run) for all runs of a row.
template <typename Real, class Function>
static inline RNNDYN_INLINED void each_run(int64_t size, Function function) {
  constexpr int64_t lanes = Simd<Real>::kLanes;
  int64_t at = 0;
  for (; at + kRegisters * lanes <= size; at += kRegisters * lanes) function(Run<Real, kRegisters>{at, 0});
  for (; at + lanes <= size; at += lanes) function(Run<Real, 1>{at, 0});
  if (at < size) function(Run<Real, 0>{at, size - at});
}
