// Vector arithmetic of the ctrnn kernels: tanh and its relatives, logarithm, sine and cosine, Philox and unit normals, transposes.
// Included inside namespace rnndyn::<isa>.
//
// Precision: tanh within 2 and sigmoid within 3 units in the last place (measured over all of their range); series are
//   Taylor's, cut where the next term is below half a unit. Division and square root in float32 with AVX-512: the hardware's 14-bit
//   estimate and Newton steps, since the exact instructions would take a third of a time step.
// NaN stays NaN; infinities give the limits.

template <typename Real>
struct Simd {
  typedef Real vec __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  typedef Real unaligned __attribute__((vector_size(RNNDYN_VECTOR_BYTES), aligned(sizeof(Real))));
  typedef int32_t int32 __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  typedef int64_t int64 __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  static constexpr int kLanes = RNNDYN_VECTOR_BYTES / sizeof(Real);
  static constexpr int kVecs = int(kCtrnnTile) / kLanes;  // vectors of a tile
  static constexpr bool kFloat = sizeof(Real) == 4;
};
typedef uint64_t Words __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));

template <typename Real>
static inline typename Simd<Real>::vec load_vec(const Real* p) {
  return *reinterpret_cast<const typename Simd<Real>::unaligned*>(p);
}
template <typename Real>
static inline void store_vec(Real* p, typename Simd<Real>::vec v) {
  *reinterpret_cast<typename Simd<Real>::unaligned*>(p) = v;
}
template <typename Real>
static inline typename Simd<Real>::vec splat(Real x) {
  return x - typename Simd<Real>::vec{};
}

// Integers as wide as Real, for bits and masks.
template <typename Real>
struct Bits {
  typedef typename Simd<Real>::int32 type;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int32_t kSign = INT32_MIN, kHalfRoot = 0x3f3504f3;  // bits of sqrt(1 / 2)
};
template <>
struct Bits<double> {
  typedef Simd<double>::int64 type;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int64_t kSign = INT64_MIN, kHalfRoot = 0x3fe6a09e667f3bcdLL;
};

template <typename Real>
static inline typename Simd<Real>::vec reciprocal(typename Simd<Real>::vec x) {
#ifdef __AVX512F__
  if constexpr (Simd<Real>::kFloat) {
    const typename Simd<Real>::vec y = (typename Simd<Real>::vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return y + y * (1 - x * y);
  }
#endif
  return 1 / x;
}

// a / b for finite b of moderate size.
template <typename Real>
static inline typename Simd<Real>::vec quotient(typename Simd<Real>::vec a, typename Simd<Real>::vec b) {
#ifdef __AVX512F__
  if constexpr (Simd<Real>::kFloat) {
    const typename Simd<Real>::vec y = reciprocal<Real>(b), q = a * y;
    return q + y * (a - q * b);
  }
#endif
  return a / b;
}

// Of positive numbers.
template <typename Real>
static inline typename Simd<Real>::vec square_root(typename Simd<Real>::vec x) {
  typedef typename Simd<Real>::vec vec;
#if defined(__AVX512F__)
  if constexpr (Simd<Real>::kFloat) {
    const vec y = (vec)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x), s = x * y;
    return s + Real(0.5) * y * (x - s * s);
  } else {
    return (vec)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
  }
#else
  vec y = x;
  for (int i = 0; i < Simd<Real>::kLanes; ++i) {
    if constexpr (Simd<Real>::kFloat) {
      y[i] = __builtin_sqrtf(x[i]);
    } else {
      y[i] = __builtin_sqrt(x[i]);
    }
  }
  return y;
#endif
}

// exp(x) - 1 = 2^n (p + 1) - 1 with p = exp(r) - 1, |r| <= ln 2 / 2: returns p, and 2^n in scale, which must be a normal number.
template <typename Real>
static inline typename Simd<Real>::vec expm1_reduced(typename Simd<Real>::vec x, typename Simd<Real>::vec* scale) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  constexpr bool f = Simd<Real>::kFloat;
  const Real magic =
      f ? Real(12582912.0) : Real(6755399441055744.0);  // 1.5 * 2^mantissa: adding it rounds to an integer
  const vec shifted = x * Real(1.44269504088896340736) + magic;
  const vec n = shifted - magic;
  const vec r = (x - n * (f ? Real(0.693359375) : Real(6.93147180369123816490e-01))) -
                n * (f ? Real(-2.12194440e-4) : Real(1.90821492927058770002e-10));
  *scale = (vec)(((ints)shifted << Bits<Real>::kMantissa) + (ints)splat<Real>(1));
  constexpr Real coefficients[] = {
      Real(1.0 / 2),       Real(1.0 / 6),        Real(1.0 / 24),        Real(1.0 / 120),
      Real(1.0 / 720),     Real(1.0 / 5040),     Real(1.0 / 40320),     Real(1.0 / 362880),
      Real(1.0 / 3628800), Real(1.0 / 39916800), Real(1.0 / 479001600), Real(1.0 / 6227020800),
  };
  constexpr int last = f ? 5 : 11;
  vec p = splat<Real>(coefficients[last]);
#pragma GCC unroll 12
  for (int k = last - 1; k >= 0; --k) p = p * r + coefficients[k];
  return r + r * r * p;
}

template <typename Real>
static inline typename Simd<Real>::vec vec_tanh(typename Simd<Real>::vec x) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  const ints sign = (ints)x & Bits<Real>::kSign;
  vec twice = 2 * (vec)((ints)x ^ sign);
  twice = twice > Real(40) ? splat<Real>(40) : twice;  // (false for NaN, which stays)
  vec scale;
  const vec p = expm1_reduced<Real>(twice, &scale);
  const vec e =
      scale * p + (scale - 1);  // exp(2 |x|) - 1, with full relative precision where it is small: then scale is 1
  return (vec)((ints)quotient<Real>(e, e + 2) | sign);
}

template <typename Real>
static inline typename Simd<Real>::vec vec_sigmoid(typename Simd<Real>::vec x) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  vec magnitude = (vec)((ints)x & ~Bits<Real>::kSign);
  constexpr Real limit = Simd<Real>::kFloat ? Real(87) : Real(708);  // the least normal number lies just below
  magnitude = magnitude > limit ? splat<Real>(limit) : magnitude;
  vec scale;
  const vec p = expm1_reduced<Real>(-magnitude, &scale);
  const vec e = scale * p + scale;  // exp(-|x|)
  const vec y = reciprocal<Real>(1 + e);
  return x < 0 ? e * y : y;
}

// libm, lane by lane.
template <typename Real>
static inline typename Simd<Real>::vec vec_softplus(typename Simd<Real>::vec x) {
  typename Simd<Real>::vec y = x;
  for (int i = 0; i < Simd<Real>::kLanes; ++i) {
    const Real v = x[i], magnitude = v < 0 ? v : -v;
    if constexpr (Simd<Real>::kFloat) {
      y[i] = (v > 0 ? v : Real(0)) + __builtin_log1pf(__builtin_expf(magnitude));
    } else {
      y[i] = (v > 0 ? v : Real(0)) + __builtin_log1p(__builtin_exp(magnitude));
    }
    if (v != v) y[i] = v;
  }
  return y;
}

template <typename Real, CtrnnActivation A>
static inline typename Simd<Real>::vec activate(typename Simd<Real>::vec x) {
  if constexpr (A == kCtrnnTanh) {
    return vec_tanh<Real>(x);
  } else if constexpr (A == kCtrnnRelu) {
    return x < 0 ? typename Simd<Real>::vec{} : x;
  } else if constexpr (A == kCtrnnSigmoid) {
    return vec_sigmoid<Real>(x);
  } else if constexpr (A == kCtrnnSoftplus) {
    return vec_softplus<Real>(x);
  } else {
    return x;
  }
}

// f'(h) from r = f(h).
template <typename Real, CtrnnActivation A>
static inline typename Simd<Real>::vec slope(typename Simd<Real>::vec r) {
  typedef typename Simd<Real>::vec vec;
  if constexpr (A == kCtrnnTanh) {
    return 1 - r * r;
  } else if constexpr (A == kCtrnnRelu) {
    return r > 0 ? splat<Real>(1) : vec{};
  } else if constexpr (A == kCtrnnSigmoid) {
    return r * (1 - r);
  } else if constexpr (A == kCtrnnSoftplus) {
    vec y = r;
    for (int i = 0; i < Simd<Real>::kLanes; ++i) y[i] = -__builtin_expm1(-double(r[i]));
    return y;
  } else {
    return splat<Real>(1);
  }
}

// ln u for u in (0, 1): 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1).
template <typename Real>
static inline typename Simd<Real>::vec vec_log(typename Simd<Real>::vec u) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  const ints offset = (ints)u - Bits<Real>::kHalfRoot;
  const ints e = offset >> Bits<Real>::kMantissa;
  const vec m = (vec)((ints)u - (e << Bits<Real>::kMantissa));
  const vec f = m - 1, s = quotient<Real>(f, m + 1), t = s * s;
  constexpr int last = Simd<Real>::kFloat ? 5 : 11;
  vec p = splat<Real>(Real(1) / (2 * last + 1));
#pragma GCC unroll 12
  for (int k = last - 1; k >= 1; --k) p = p * t + Real(1) / (2 * k + 1);
  return __builtin_convertvector(e, vec) * Real(0.69314718055994530942) + (2 * s + 2 * s * t * p);
}

// cos and sin of 2 pi v, for v in [0, 1).
template <typename Real>
static inline void vec_cos_sin(typename Simd<Real>::vec v, typename Simd<Real>::vec* cosine,
                               typename Simd<Real>::vec* sine) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  const ints quadrant = __builtin_convertvector(4 * v + Real(0.5), ints);
  const vec x = (v - Real(0.25) * __builtin_convertvector(quadrant, vec)) * Real(6.28318530717958647693), t = x * x;
  constexpr Real inverse_factorial[] = {
      1,
      1,
      Real(1.0 / 2),
      Real(1.0 / 6),
      Real(1.0 / 24),
      Real(1.0 / 120),
      Real(1.0 / 720),
      Real(1.0 / 5040),
      Real(1.0 / 40320),
      Real(1.0 / 362880),
      Real(1.0 / 3628800),
      Real(1.0 / 39916800),
      Real(1.0 / 479001600),
      Real(1.0 / 6227020800),
      Real(1.0 / 87178291200),
      Real(1.0 / 1307674368000),
      Real(1.0 / 20922789888000),
      Real(1.0 / 355687428096000),
  };
  constexpr int last = Simd<Real>::kFloat ? 4 : 8;
  vec c = splat<Real>(inverse_factorial[2 * last]), s = splat<Real>(inverse_factorial[2 * last + 1]);
#pragma GCC unroll 8
  for (int k = last - 1; k >= 0; --k) {
    c = inverse_factorial[2 * k] - t * c;
    s = inverse_factorial[2 * k + 1] - t * s;
  }
  s = s * x;
  // Quarter turns: cos and sin change places in odd quadrants; signs by quadrant.
  const ints odd = (quadrant & 1) != 0;
  const vec a = odd ? s : c, b = odd ? c : s;
  constexpr int top = 8 * sizeof(Real) - 2;
  *cosine = (vec)((ints)a ^ (((quadrant + 1) & 2) << top));
  *sine = (vec)((ints)b ^ ((quadrant & 2) << top));
}

// 64-bit products of the low halves.
static inline Words wide_product(Words a, uint32_t b) {
  const Words factor = b - Words{};
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// Philox4x32-10 of counters (block, step, trial, stream), a word of 32 bits in each lane of 64; what lies above the 32 bits is arbitrary:
// products ignore it. Only the trial varies between lanes, so the first round is scalar but for one product.
struct NoiseKeys {
  uint64_t first[10], second[10];  // of every round
  explicit NoiseKeys(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = k0, second[round] = k1;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

static inline void philox(const NoiseKeys& keys, uint32_t block, uint32_t step, Words trial, uint32_t stream,
                          Words (&c)[4]) {
  const uint64_t of_block = uint64_t(block) * 0xD2511F53u;
  const Words of_trial = wide_product(trial, 0xCD9E8D57u);
  c[0] = (of_trial >> 32) ^ (uint64_t(step) ^ keys.first[0]);
  c[1] = of_trial;
  c[2] = ((of_block >> 32) ^ stream ^ keys.second[0]) - Words{};
  c[3] = uint64_t(uint32_t(of_block)) - Words{};
#pragma GCC unroll 9
  for (int round = 1; round < 10; ++round) {
    const Words first = wide_product(c[0], 0xD2511F53u), second = wide_product(c[2], 0xCD9E8D57u);
    c[0] = (second >> 32) ^ c[1] ^ keys.first[round];
    c[2] = (first >> 32) ^ c[3] ^ keys.second[round];
    c[1] = second, c[3] = first;
  }
}

template <typename Real>
static inline void box_muller(typename Bits<Real>::type first, typename Bits<Real>::type second,
                              typename Simd<Real>::vec* out) {
  typedef typename Simd<Real>::vec vec;
  // 23 and 24 bits: exact in float32, so that every dtype draws the same numbers.
  const vec u = (__builtin_convertvector(first, vec) + Real(0.5)) * Real(1.0 / 8388608);
  const vec v = __builtin_convertvector(second, vec) * Real(1.0 / 16777216);
  const vec radius = square_root<Real>(-2 * vec_log<Real>(u));
  vec c, s;
  vec_cos_sin<Real>(v, &c, &s);
  out[0] = radius * c;
  out[1] = radius * s;
}

struct NoisePlace {
  NoiseKeys keys;
  uint32_t stream, first_trial;
};

// Unit normals of units 4 block .. 4 block + 3 at one step: vector `v` of the tile's trials.
template <typename Real>
static inline void unit_normals(const NoisePlace& place, uint32_t step, uint32_t block, int v,
                                typename Simd<Real>::vec (&out)[4]) {
  typedef typename Bits<Real>::type ints;
  typedef uint32_t Halves __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
  constexpr int lanes = RNNDYN_VECTOR_BYTES / 8, passes = Simd<Real>::kFloat ? 2 : 1;
  constexpr uint64_t low_half = 0xffffffffu;
  Words words[passes][4];
#pragma GCC unroll 2
  for (int pass = 0; pass < passes; ++pass) {
    Words trial;
    for (int i = 0; i < lanes; ++i) trial[i] = uint64_t(i * passes + pass);
    trial += uint64_t(place.first_trial) + uint64_t(v * lanes * passes);
    philox(place.keys, block, step, trial, place.stream, words[pass]);
  }
  ints value[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int drop = k % 2 == 0 ? 9 : 8;
    // float: even trials in the first pass and odd ones in the second, so that their words interleave into trial order
    if constexpr (passes == 1) {
      value[k] = (ints)((words[0][k] & low_half) >> drop);
    } else {
      value[k] = (ints)((Halves)((words[0][k] & low_half) | (words[1][k] << 32)) >> drop);
    }
  }
  box_muller<Real>(value[0], value[1], out);
  box_muller<Real>(value[2], value[3], out + 2);
}

// Lane k of the result is the sum of all lanes of x[k]; kLanes vectors, which are overwritten.
template <typename Real>
static inline typename Simd<Real>::vec sum_each(typename Simd<Real>::vec* x) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  constexpr int lanes = Simd<Real>::kLanes;
  ints even, odd;
  for (int i = 0; i < lanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 16
  for (int count = lanes; count > 1; count /= 2) {
#pragma GCC unroll 16
    for (int k = 0; k < count / 2; ++k) {
      const vec a = x[2 * k], b = x[2 * k + 1];
      x[k] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  }
  return x[0];
}

// Rows and columns of kLanes vectors change places.
template <typename Real>
static inline void transpose(typename Simd<Real>::vec* x) {
  typedef typename Simd<Real>::vec vec;
  typedef typename Bits<Real>::type ints;
  constexpr int lanes = Simd<Real>::kLanes;
  ints low, high;
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / 2 + (i % 2) * lanes;
    high[i] = low[i] + lanes / 2;
  }
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
    vec y[lanes];
#pragma GCC unroll 16
    for (int k = 0; k < lanes / 2; ++k) {
      y[2 * k] = __builtin_shuffle(x[k], x[k + lanes / 2], low);
      y[2 * k + 1] = __builtin_shuffle(x[k], x[k + lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int k = 0; k < lanes; ++k) x[k] = y[k];
  }
}
