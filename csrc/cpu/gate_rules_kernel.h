// gate_step: the rules of the cells, some channels of one pixel at a time. Included inside namespace rnndyn::<isa> after gate_math_kernel.h;
// equations are in rnndyn_fast/ops/cells.py. Backward computes the gates again from the ports.

// A run of channels of a pixel, or of a few pixels where a port has one row per pixel.
template <typename Scalar, class Rule, class Channels>
struct GateLanes {
  typedef Scalar Real;
  typedef typename Channels::Values Values;
  const GateStepParams<Real>& p;
  const Real* const* bias;  // rows of all those pixels
  int64_t pixel;
  Channels run;

  int64_t offset(int port, int gate) const { return (pixel * Rule::kMultiple[port] + gate) * p.channels; }
  // The sum of a port's terms, to be read once.
  Values port(int k, int gate = 0) const {
    const int64_t at = offset(k, gate);
    Values sum = run.read(p.terms[k][0] + at);
    for (int term = 1; term < p.num_terms[k]; ++term) sum = sum + run.read(p.terms[k][term] + at);
    if (bias[k] != nullptr) sum = sum + run.read(bias[k] + gate * p.channels);
    if (p.sum[k] != nullptr) run.write(p.sum[k] + at, sum);
    return sum;
  }
  Values grad(int k) const {
    const Values grad = run.read(p.grad_state[k] + pixel * p.channels);
    return p.grad_more[k] == nullptr ? grad : grad + run.read(p.grad_more[k] + pixel * p.channels);
  }
  void state(int k, const Values& values) const { run.write(p.state[k] + pixel * p.channels, values); }
  void grad_port(int k, int gate, const Values& values) const { run.write(p.grad_port[k] + offset(k, gate), values); }
};

struct GruGates {
  static constexpr int kPorts = 2, kMultiple[kMaxPorts] = {2, 1, 0, 0};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>& p, const Lanes& x) {
    x.state(0, sigmoid(x.port(0) + Real(p.forget_bias)) * x.port(1));
    x.state(1, sigmoid(x.port(0, 1)));
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values r = sigmoid(x.port(0) + Real(p.forget_bias)), u = sigmoid(x.port(0, 1));
    const Values memory = x.port(1), drh = x.grad(0), du = x.grad(1);
    x.grad_port(0, 0, drh * memory * r * (Real(1) - r));
    x.grad_port(0, 1, du * u * (Real(1) - u));
    x.grad_port(1, 0, drh * r);
  }
};

struct GruUpdate {
  static constexpr int kPorts = 3, kMultiple[kMaxPorts] = {1, 1, 1, 0};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>&, const Lanes& x) {
    const Values u = x.port(1);
    x.state(0, u * x.port(2) + (Real(1) - u) * hyperbolic_tangent(x.port(0)));
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>&, const Lanes& x) {
    const Values u = x.port(1), memory = x.port(2), q = hyperbolic_tangent(x.port(0)), g = x.grad(0);
    x.grad_port(0, 0, g * (Real(1) - u) * (Real(1) - q * q));
    x.grad_port(1, 0, g * (memory - q));
    x.grad_port(2, 0, g * u);
  }
};

struct Lstm {
  static constexpr int kPorts = 2, kMultiple[kMaxPorts] = {4, 1, 0, 0};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values kept = x.port(1) * sigmoid(x.port(0, 2) + Real(p.forget_bias));
    const Values memory = kept + sigmoid(x.port(0, 0)) * hyperbolic_tangent(x.port(0, 1));
    x.state(0, hyperbolic_tangent(memory) * sigmoid(x.port(0, 3)));
    x.state(1, memory);
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values i = sigmoid(x.port(0, 0)), j = hyperbolic_tangent(x.port(0, 1));
    const Values f = sigmoid(x.port(0, 2) + Real(p.forget_bias)), o = sigmoid(x.port(0, 3));
    const Values old = x.port(1), out = hyperbolic_tangent(old * f + i * j);
    const Values gh = x.grad(0), gc = x.grad(1) + gh * o * (Real(1) - out * out);
    x.grad_port(0, 0, gc * j * i * (Real(1) - i));
    x.grad_port(0, 1, gc * i * (Real(1) - j * j));
    x.grad_port(0, 2, gc * old * f * (Real(1) - f));
    x.grad_port(0, 3, gh * out * o * (Real(1) - o));
    x.grad_port(1, 0, gc * f);
  }
};

struct Ugrnn {
  static constexpr int kPorts = 2, kMultiple[kMaxPorts] = {2, 1, 0, 0};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values g = sigmoid(x.port(0) + Real(p.forget_bias));
    x.state(0, g * x.port(1) + (Real(1) - g) * hyperbolic_tangent(x.port(0, 1)));
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values g = sigmoid(x.port(0) + Real(p.forget_bias)), q = hyperbolic_tangent(x.port(0, 1));
    const Values memory = x.port(1), grad = x.grad(0);
    x.grad_port(0, 0, grad * (memory - q) * g * (Real(1) - g));
    x.grad_port(0, 1, grad * (Real(1) - g) * (Real(1) - q * q));
    x.grad_port(1, 0, grad * g);
  }
};

struct Intersection {
  static constexpr int kPorts = 3, kMultiple[kMaxPorts] = {4, 1, 1, 0};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>& p, const Lanes& x) {
    const Real bias = Real(p.forget_bias);
    const Values gh = sigmoid(x.port(0, 0) + bias), gy = sigmoid(x.port(0, 2) + bias);
    const Values y = x.port(0, 3);
    x.state(0, gy * x.port(1) + (Real(1) - gy) * if_negative<Real, Values::kCount>(y, Real(0), y));
    x.state(1, gh * x.port(2) + (Real(1) - gh) * hyperbolic_tangent(x.port(0, 1)));
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>& p, const Lanes& x) {
    const Real bias = Real(p.forget_bias);
    const Values gh = sigmoid(x.port(0, 0) + bias), gy = sigmoid(x.port(0, 2) + bias);
    const Values y = x.port(0, 3), q = hyperbolic_tangent(x.port(0, 1)), dz = x.grad(0), dh = x.grad(1);
    const Values input = x.port(1), memory = x.port(2);
    x.grad_port(0, 0, dh * (memory - q) * gh * (Real(1) - gh));
    x.grad_port(0, 1, dh * (Real(1) - gh) * (Real(1) - q * q));
    x.grad_port(0, 2, dz * (input - if_negative<Real, Values::kCount>(y, Real(0), y)) * gy * (Real(1) - gy));
    x.grad_port(0, 3, if_positive<Real, Values::kCount>(y, dz * (Real(1) - gy), Real(0)));
    x.grad_port(1, 0, dz * gy);
    x.grad_port(2, 0, dh * gh);
  }
};

template <GateActivation kActivation>
struct Reciprocal {
  static constexpr int kPorts = 4, kMultiple[kMaxPorts] = {1, 1, 1, 1};
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void forward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values tau = Real(p.tau.constant) + Real(p.tau.factor) * hyperbolic_tangent(Real(p.tau.slope) * x.port(1));
    const Values gate =
        Real(p.gate.constant) + Real(p.gate.factor) * hyperbolic_tangent(Real(p.gate.slope) * x.port(2));
    x.state(0, activate<kActivation>(tau * x.port(3) + gate * x.port(0)));
  }
  template <class Lanes, typename Real = typename Lanes::Real, class Values = typename Lanes::Values>
  static void backward(const GateStepParams<Real>& p, const Lanes& x) {
    const Values t = hyperbolic_tangent(Real(p.tau.slope) * x.port(1)),
                 g = hyperbolic_tangent(Real(p.gate.slope) * x.port(2));
    const Values tau = Real(p.tau.constant) + Real(p.tau.factor) * t,
                 gate = Real(p.gate.constant) + Real(p.gate.factor) * g;
    const Values drive = x.port(0), memory = x.port(3), z = tau * memory + gate * drive;
    const Values grad = x.grad(0) * slope<kActivation>(z, activate<kActivation>(z));
    x.grad_port(0, 0, grad * gate);
    x.grad_port(1, 0, grad * memory * Real(p.tau.factor * p.tau.slope) * (Real(1) - t * t));
    x.grad_port(2, 0, grad * drive * Real(p.gate.factor * p.gate.slope) * (Real(1) - g * g));
    x.grad_port(3, 0, grad * tau);
  }
};
