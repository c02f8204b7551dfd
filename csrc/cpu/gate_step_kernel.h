// gate_step: gate arithmetic of a cell, forward and backward. Included by kernels.cpp inside namespace rnndyn::<isa>; parameters are
// documented in gate_step.h, equations in rnndyn_fast/ops/cells.py.
//
// Maths: s is the logistic sigmoid; all cells need only expm1: s(x) = 1 / (1 + exp(-x)), tanh(x) = e / (e + 2) with e = expm1(2x),
//   elu(x) = expm1(min(x, 0)) + max(x, 0). Backward computes the gates again from the ports: nothing but ports is kept.
// Precision: expm1 by argument reduction to |r| <= ln(2) / 2 and a Taylor polynomial (degree 7 in float32, 13 in float64), within
//   a few units in the last place; no library function is called, so the loops vectorise.
// Traffic: forward reads every term once and writes states (and, of several terms, their sum) once; backward reads ports and
//   gradients once and writes the gradients of the ports once; biases are summed while those are in L1. Bound by memory bandwidth in float32
//   with AVX-512.
// Threads: over chunks of pixels. Determinism: every element is computed by itself; biases are sums of chunks that depend on the shape alone, in order.
// Limits: at most kMaxPortTerms terms of a port; the caller checks shapes.

template <typename Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;  // (unsigned: those of NaN may be shifted too)
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -87.0f, kHighest = 88.0f, kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -708.0, kHighest = 709.0, kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
};

constexpr double kInverseFactorial[14] = {
    1,         1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
    1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

// exp(x) - 1, clamped where exp would leave the range of Real; NaN stays NaN.
template <typename Real>
inline Real expm1_of(Real x) {
  using K = ExpConstants<Real>;
  using Bits = typename K::Bits;
  x = x < K::kLowest ? K::kLowest : x;
  x = x > K::kHighest ? K::kHighest : x;
  const Real shifted = x * K::kLog2e + K::kMagic;
  const Real n = shifted - K::kMagic;
  const Real r = (x - n * K::kLn2High) - n * K::kLn2Low;
  Real poly = Real(kInverseFactorial[K::kDegree]);
#pragma GCC unroll 16
  for (int k = K::kDegree - 1; k >= 1; --k) poly = Real(kInverseFactorial[k]) + r * poly;
  // poly * r is the sum of r^k / k!, without the constant term.
  Bits bits, magic_bits;
  const Real magic = K::kMagic;
  __builtin_memcpy(&bits, &shifted, sizeof(Real));
  __builtin_memcpy(&magic_bits, &magic, sizeof(Real));
  const Bits power_bits = ((bits - magic_bits) + Bits(K::kBias)) << K::kMantissa;  // 2^n
  Real power;
  __builtin_memcpy(&power, &power_bits, sizeof(Real));
  return power * (r * poly) + (power - Real(1));
}

template <typename Real>
inline Real sigmoid_of(Real x) {
  return Real(1) / (Real(2) + expm1_of(-x));
}

template <typename Real>
inline Real tanh_of(Real x) {
  // Past 20 (float64) the result is 1 to the last place, and exp(2x) must not overflow.
  const Real bounded = x > Real(20) ? Real(20) : x < Real(-20) ? Real(-20) : x;
  const Real e = expm1_of(Real(2) * bounded);
  return e / (e + Real(2));
}

// One pixel of a port, state or gradient is a row of D channels per gate.
template <typename Real>
struct GateRows {
  const Real* port[kMaxPorts];
  Real* state[kMaxStates];
  const Real* grad_state[kMaxStates];
  Real* grad_port[kMaxPorts];
};

template <typename Real>
struct GruGates {
  static constexpr int kPorts = 2, kStates = 2, kMultiple[kMaxPorts] = {2, 1, 0, 0};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      x.state[0][c] = sigmoid_of(x.port[0][c] + bias) * x.port[1][c];
      x.state[1][c] = sigmoid_of(x.port[0][d + c]);
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real r = sigmoid_of(x.port[0][c] + bias), u = sigmoid_of(x.port[0][d + c]);
      x.grad_port[0][c] = x.grad_state[0][c] * x.port[1][c] * r * (Real(1) - r);
      x.grad_port[0][d + c] = x.grad_state[1][c] * u * (Real(1) - u);
      x.grad_port[1][c] = x.grad_state[0][c] * r;
    }
  }
};

template <typename Real>
struct GruUpdate {
  static constexpr int kPorts = 3, kStates = 1, kMultiple[kMaxPorts] = {1, 1, 1, 0};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const Real u = x.port[1][c];
      x.state[0][c] = u * x.port[2][c] + (Real(1) - u) * tanh_of(x.port[0][c]);
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const Real u = x.port[1][c], q = tanh_of(x.port[0][c]), g = x.grad_state[0][c];
      x.grad_port[0][c] = g * (Real(1) - u) * (Real(1) - q * q);
      x.grad_port[1][c] = g * (x.port[2][c] - q);
      x.grad_port[2][c] = g * u;
    }
  }
};

template <typename Real>
struct Lstm {
  static constexpr int kPorts = 2, kStates = 2, kMultiple[kMaxPorts] = {4, 1, 0, 0};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
    const Real* gates = x.port[0];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real kept = x.port[1][c] * sigmoid_of(gates[2 * d + c] + bias);
      const Real memory = kept + sigmoid_of(gates[c]) * tanh_of(gates[d + c]);
      x.state[0][c] = tanh_of(memory) * sigmoid_of(gates[3 * d + c]);
      x.state[1][c] = memory;
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
    const Real* gates = x.port[0];
    Real* grad = x.grad_port[0];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real i = sigmoid_of(gates[c]), j = tanh_of(gates[d + c]), f = sigmoid_of(gates[2 * d + c] + bias);
      const Real o = sigmoid_of(gates[3 * d + c]), old = x.port[1][c], out = tanh_of(old * f + i * j);
      const Real gh = x.grad_state[0][c], gc = x.grad_state[1][c] + gh * o * (Real(1) - out * out);
      grad[c] = gc * j * i * (Real(1) - i);
      grad[d + c] = gc * i * (Real(1) - j * j);
      grad[2 * d + c] = gc * old * f * (Real(1) - f);
      grad[3 * d + c] = gh * out * o * (Real(1) - o);
      x.grad_port[1][c] = gc * f;
    }
  }
};

template <typename Real>
struct Ugrnn {
  static constexpr int kPorts = 2, kStates = 1, kMultiple[kMaxPorts] = {2, 1, 0, 0};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real g = sigmoid_of(x.port[0][c] + bias);
      x.state[0][c] = g * x.port[1][c] + (Real(1) - g) * tanh_of(x.port[0][d + c]);
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real g = sigmoid_of(x.port[0][c] + bias), q = tanh_of(x.port[0][d + c]), grad = x.grad_state[0][c];
      x.grad_port[0][c] = grad * (x.port[1][c] - q) * g * (Real(1) - g);
      x.grad_port[0][d + c] = grad * (Real(1) - g) * (Real(1) - q * q);
      x.grad_port[1][c] = grad * g;
    }
  }
};

template <typename Real>
struct Intersection {
  static constexpr int kPorts = 3, kStates = 2, kMultiple[kMaxPorts] = {4, 1, 1, 0};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
    const Real* gates = x.port[0];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real gh = sigmoid_of(gates[c] + bias), gy = sigmoid_of(gates[2 * d + c] + bias), y = gates[3 * d + c];
      x.state[0][c] = gy * x.port[1][c] + (Real(1) - gy) * (y < Real(0) ? Real(0) : y);
      x.state[1][c] = gh * x.port[2][c] + (Real(1) - gh) * tanh_of(gates[d + c]);
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const int64_t d = p.channels;
    const Real bias = Real(p.forget_bias);
    const Real* gates = x.port[0];
    Real* grad = x.grad_port[0];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real gh = sigmoid_of(gates[c] + bias), gy = sigmoid_of(gates[2 * d + c] + bias), y = gates[3 * d + c];
      const Real q = tanh_of(gates[d + c]), dz = x.grad_state[0][c], dh = x.grad_state[1][c];
      grad[c] = dh * (x.port[2][c] - q) * gh * (Real(1) - gh);
      grad[d + c] = dh * (Real(1) - gh) * (Real(1) - q * q);
      grad[2 * d + c] = dz * (x.port[1][c] - (y < Real(0) ? Real(0) : y)) * gy * (Real(1) - gy);
      grad[3 * d + c] = y > Real(0) ? dz * (Real(1) - gy) : Real(0);
      x.grad_port[1][c] = dz * gy;
      x.grad_port[2][c] = dh * gh;
    }
  }
};

template <GateActivation kActivation, typename Real>
inline Real activate(Real x) {
  if (kActivation == GateActivation::kRelu) return x < Real(0) ? Real(0) : x;
  if (kActivation == GateActivation::kElu) return x > Real(0) ? x : expm1_of(x);
  if (kActivation == GateActivation::kTanh) return tanh_of(x);
  return x;
}

template <GateActivation kActivation, typename Real>
inline Real activation_slope(Real x, Real y) {
  if (kActivation == GateActivation::kRelu) return x > Real(0) ? Real(1) : Real(0);
  if (kActivation == GateActivation::kElu) return x > Real(0) ? Real(1) : y + Real(1);
  if (kActivation == GateActivation::kTanh) return Real(1) - y * y;
  return Real(1);
}

template <typename Real, GateActivation kActivation>
struct Reciprocal {
  static constexpr int kPorts = 4, kStates = 1, kMultiple[kMaxPorts] = {1, 1, 1, 1};
  static void forward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const Real tc = Real(p.tau.constant), tf = Real(p.tau.factor), ts = Real(p.tau.slope);
    const Real gc = Real(p.gate.constant), gf = Real(p.gate.factor), gs = Real(p.gate.slope);
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const Real kept = (tc + tf * tanh_of(ts * x.port[1][c])) * x.port[3][c];
      x.state[0][c] = activate<kActivation>(kept + (gc + gf * tanh_of(gs * x.port[2][c])) * x.port[0][c]);
    }
  }
  static void backward(const GateStepParams<Real>& p, const GateRows<Real>& x) {
    const Real tc = Real(p.tau.constant), tf = Real(p.tau.factor), ts = Real(p.tau.slope);
    const Real gc = Real(p.gate.constant), gf = Real(p.gate.factor), gs = Real(p.gate.slope);
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const Real t = tanh_of(ts * x.port[1][c]), g = tanh_of(gs * x.port[2][c]);
      const Real tau = tc + tf * t, gate = gc + gf * g, drive = x.port[0][c], memory = x.port[3][c];
      const Real z = tau * memory + gate * drive;
      const Real grad = x.grad_state[0][c] * activation_slope<kActivation>(z, activate<kActivation>(z));
      x.grad_port[0][c] = grad * gate;
      x.grad_port[1][c] = grad * memory * tf * ts * (Real(1) - t * t);
      x.grad_port[2][c] = grad * drive * gf * gs * (Real(1) - g * g);
      x.grad_port[3][c] = grad * tau;
    }
  }
};

// The terms of one port at one pixel: their sum, where there are several or a bias; in `row` if it is not kept.
template <typename Real>
inline const Real* gate_port(const GateStepParams<Real>& p, int port, int64_t offset, int64_t n, Real* row) {
  const Real* bias = p.bias[port];
  if (p.num_terms[port] == 1 && bias == nullptr) return p.terms[port][0] + offset;
  Real* sum = p.sum[port] != nullptr ? p.sum[port] + offset : row;
  const Real* a = p.terms[port][0] + offset;
  if (p.num_terms[port] == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + bias[i];
    return sum;
  }
  const Real* b = p.terms[port][1] + offset;
  if (bias == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i] + bias[i];
  }
  for (int k = 2; k < p.num_terms[port]; ++k) row_add(sum, p.terms[port][k] + offset, n);
  return sum;
}

// The gradient of a state at one pixel; in `row`, if it has two summands.
template <typename Real>
inline const Real* gate_grad(const GateStepParams<Real>& p, int state, int64_t offset, Real* row) {
  const Real* a = p.grad_state[state] + offset;
  if (p.grad_more[state] == nullptr) return a;
  const Real* b = p.grad_more[state] + offset;
#pragma omp simd
  for (int64_t c = 0; c < p.channels; ++c) row[c] = a[c] + b[c];
  return row;
}

template <typename Real, typename Rule>
void gate_step_rows(const GateStepParams<Real>& p, bool backward) {
  int64_t size = 0;
  bool biases = false;
  for (int k = 0; k < Rule::kPorts; ++k) {
    size += Rule::kMultiple[k] * p.channels;
    biases = biases || (backward && p.grad_bias[k] != nullptr);
  }
  const int64_t chunks = (p.pixels + kGateChunk - 1) / kGateChunk;
#pragma omp parallel num_threads(p.num_threads)
  {
    // Sums of one pixel that are not kept, gradients of its states, and the sums of a chunk.
    Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * (2 * size + kMaxStates * p.channels)));
    Real *of_states = scratch + size, *totals = of_states + kMaxStates * p.channels;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t last = (chunk + 1) * kGateChunk < p.pixels ? (chunk + 1) * kGateChunk : p.pixels;
      if (biases) row_zero(totals, size);
      for (int64_t pixel = chunk * kGateChunk; pixel < last; ++pixel) {
        GateRows<Real> rows{};
        Real* row = scratch;
        for (int k = 0; k < Rule::kPorts; ++k) {
          const int64_t n = Rule::kMultiple[k] * p.channels;
          rows.port[k] = gate_port(p, k, pixel * n, n, row);
          row += n;
          if (backward) rows.grad_port[k] = p.grad_port[k] + pixel * n;
        }
        for (int k = 0; k < Rule::kStates; ++k) {
          if (backward) {
            rows.grad_state[k] = gate_grad(p, k, pixel * p.channels, of_states + k * p.channels);
          } else {
            rows.state[k] = p.state[k] + pixel * p.channels;
          }
        }
        if (backward) {
          Rule::backward(p, rows);
        } else {
          Rule::forward(p, rows);
        }
        Real* total = totals;
        for (int k = 0; biases && k < Rule::kPorts; ++k) {
          const int64_t n = Rule::kMultiple[k] * p.channels;
          if (p.grad_bias[k] != nullptr) row_add(total, rows.grad_port[k], n);
          total += n;
        }
      }
      for (int64_t i = 0; biases && i < size; ++i) p.workspace[chunk * size + i] = double(totals[i]);
    }
    // (barrier: a bias needs all chunks)
    int64_t first = 0;
    for (int k = 0; biases && k < Rule::kPorts; ++k) {
      const int64_t n = Rule::kMultiple[k] * p.channels;
      if (p.grad_bias[k] != nullptr) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
          double total = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) total += p.workspace[chunk * size + first + i];
          p.grad_bias[k][i] = Real(total);
        }
      }
      first += n;
    }
    free(scratch);
  }
}

template <typename Real>
void gate_step(const GateStepParams<Real>& p, bool backward) {
  switch (p.rule) {
    case GateRule::kGruGates:
      return gate_step_rows<Real, GruGates<Real>>(p, backward);
    case GateRule::kGruUpdate:
      return gate_step_rows<Real, GruUpdate<Real>>(p, backward);
    case GateRule::kLstm:
      return gate_step_rows<Real, Lstm<Real>>(p, backward);
    case GateRule::kUgrnn:
      return gate_step_rows<Real, Ugrnn<Real>>(p, backward);
    case GateRule::kIntersection:
      return gate_step_rows<Real, Intersection<Real>>(p, backward);
    case GateRule::kReciprocal:
      break;
  }
  switch (p.activation) {
    case GateActivation::kIdentity:
      return gate_step_rows<Real, Reciprocal<Real, GateActivation::kIdentity>>(p, backward);
    case GateActivation::kRelu:
      return gate_step_rows<Real, Reciprocal<Real, GateActivation::kRelu>>(p, backward);
    case GateActivation::kElu:
      return gate_step_rows<Real, Reciprocal<Real, GateActivation::kElu>>(p, backward);
    case GateActivation::kTanh:
      return gate_step_rows<Real, Reciprocal<Real, GateActivation::kTanh>>(p, backward);
  }
}
