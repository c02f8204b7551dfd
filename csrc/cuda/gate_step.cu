// gate_step on CUDA: gate arithmetic of a cell, forward and backward. Equations are in rnndyn_fast/ops/cells.py.
//
// Maths: s is the logistic sigmoid. Backward computes the gates again from the ports: nothing but ports is kept.
// Precision: storage T, arithmetic float32. The sum of a port's terms and bias is rounded to T before it is used, so that backward, which reads the
//   stored one, computes the same gates again.
// Traffic: forward reads every term once and writes states (and, of several terms or with a bias, their sum) once; backward reads ports and gradients
//   once and writes the gradients of the ports once. Bound by memory bandwidth.
// Launch shape: a thread per pixel and vector of channels, for all gates of those channels.
// Sync: none.
// Determinism: every element is computed by itself.
// Registers: __launch_bounds__ names two blocks per multiprocessor, as ptxas would else keep registers for more of them, and spill.
// Limits: kMaxPortTerms terms of a port; the caller checks shapes.
#include "cuda/gate_step.h"

#include "cuda/activations.h"
#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // 16 bytes of float, 8 of halves: six gates and their gradients stay in registers

// Ports of a rule: multiples of D, in the order of the ports; gates are numbered through all of them.
template <int kPorts_, int kStates_, int kFirst, int kOthers = 1>
struct Shape {
  static constexpr int kPorts = kPorts_, kStates = kStates_, kGates = kFirst + (kPorts_ - 1) * kOthers;
  __device__ static __forceinline__ int multiple(int port) { return port == 0 ? kFirst : kOthers; }
  __device__ static __forceinline__ int first_gate(int port) { return port == 0 ? 0 : kFirst + (port - 1) * kOthers; }
};

// x: the gates of one channel; h: its states; g: gradients of the states; d: of the gates.
template <int kRule>
struct Rule;

template <>
struct Rule<int(GateRule::kGruGates)> : Shape<2, 2, 2> {  // r, u; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P& p, const float (&x)[3], float (&h)[2]) {
    h[0] = sigmoid(x[0] + p.forget_bias) * x[2];
    h[1] = sigmoid(x[1]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P& p, const float (&x)[3], const float (&g)[2], float (&d)[3]) {
    const float r = sigmoid(x[0] + p.forget_bias), u = sigmoid(x[1]);
    d[0] = g[0] * x[2] * r * (1 - r);
    d[1] = g[1] * u * (1 - u);
    d[2] = g[0] * r;
  }
};

template <>
struct Rule<int(GateRule::kGruUpdate)> : Shape<3, 1, 1> {  // candidate; update; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P&, const float (&x)[3], float (&h)[1]) {
    h[0] = x[1] * x[2] + (1 - x[1]) * tanhf(x[0]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P&, const float (&x)[3], const float (&g)[1], float (&d)[3]) {
    const float q = tanhf(x[0]);
    d[0] = g[0] * (1 - x[1]) * (1 - q * q);
    d[1] = g[0] * (x[2] - q);
    d[2] = g[0] * x[1];
  }
};

template <>
struct Rule<int(GateRule::kLstm)> : Shape<2, 2, 4> {  // i, j, f, o; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P& p, const float (&x)[5], float (&h)[2]) {
    h[1] = x[4] * sigmoid(x[2] + p.forget_bias) + sigmoid(x[0]) * tanhf(x[1]);
    h[0] = tanhf(h[1]) * sigmoid(x[3]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P& p, const float (&x)[5], const float (&g)[2], float (&d)[5]) {
    const float i = sigmoid(x[0]), j = tanhf(x[1]), f = sigmoid(x[2] + p.forget_bias), o = sigmoid(x[3]);
    const float out = tanhf(x[4] * f + i * j), memory = g[1] + g[0] * o * (1 - out * out);
    d[0] = memory * j * i * (1 - i);
    d[1] = memory * i * (1 - j * j);
    d[2] = memory * x[4] * f * (1 - f);
    d[3] = g[0] * out * o * (1 - o);
    d[4] = memory * f;
  }
};

template <>
struct Rule<int(GateRule::kUgrnn)> : Shape<2, 1, 2> {  // g, q; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P& p, const float (&x)[3], float (&h)[1]) {
    const float gate = sigmoid(x[0] + p.forget_bias);
    h[0] = gate * x[2] + (1 - gate) * tanhf(x[1]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P& p, const float (&x)[3], const float (&g)[1], float (&d)[3]) {
    const float gate = sigmoid(x[0] + p.forget_bias), q = tanhf(x[1]);
    d[0] = g[0] * (x[2] - q) * gate * (1 - gate);
    d[1] = g[0] * (1 - gate) * (1 - q * q);
    d[2] = g[0] * gate;
  }
};

template <>
struct Rule<int(GateRule::kIntersection)> : Shape<3, 2, 4> {  // gh, q, gy, y; input; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P& p, const float (&x)[6], float (&h)[2]) {
    const float gh = sigmoid(x[0] + p.forget_bias), gy = sigmoid(x[2] + p.forget_bias);
    h[0] = gy * x[4] + (1 - gy) * rectified(x[3]);
    h[1] = gh * x[5] + (1 - gh) * tanhf(x[1]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P& p, const float (&x)[6], const float (&g)[2], float (&d)[6]) {
    const float gh = sigmoid(x[0] + p.forget_bias), gy = sigmoid(x[2] + p.forget_bias), q = tanhf(x[1]);
    d[0] = g[1] * (x[5] - q) * gh * (1 - gh);
    d[1] = g[1] * (1 - gh) * (1 - q * q);
    d[2] = g[0] * (x[4] - rectified(x[3])) * gy * (1 - gy);
    d[3] = x[3] > 0.0f ? g[0] * (1 - gy) : 0.0f;
    d[4] = g[0] * gy;
    d[5] = g[1] * gh;
  }
};

template <>
struct Rule<int(GateRule::kReciprocal)> : Shape<4, 1, 1> {  // drive; tau; gate; memory
  template <typename P>
  __device__ static __forceinline__ void forward(const P& p, const float (&x)[4], float (&h)[1]) {
    const float tau = p.tau.constant + p.tau.factor * tanhf(p.tau.slope * x[1]);
    const float gate = p.gate.constant + p.gate.factor * tanhf(p.gate.slope * x[2]);
    h[0] = activated(p.activation, tau * x[3] + gate * x[0]);
  }
  template <typename P>
  __device__ static __forceinline__ void backward(const P& p, const float (&x)[4], const float (&g)[1], float (&d)[4]) {
    const float t = tanhf(p.tau.slope * x[1]), s = tanhf(p.gate.slope * x[2]);
    const float tau = p.tau.constant + p.tau.factor * t, gate = p.gate.constant + p.gate.factor * s;
    const float z = tau * x[3] + gate * x[0];
    const float grad = g[0] * activation_slope(p.activation, z, activated(p.activation, z));
    d[0] = grad * gate;
    d[1] = grad * x[3] * p.tau.factor * p.tau.slope * (1 - t * t);
    d[2] = grad * x[0] * p.gate.factor * p.gate.slope * (1 - s * s);
    d[3] = grad * tau;
  }
};

// Where a thread works: pixel and first channel. False past the end.
template <int N, typename T>
__device__ __forceinline__ bool place(const GateStepParams<T>& p, int64_t* pixel, int* channel) {
  const int64_t vectors = p.channels / N, at = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  *pixel = at / vectors;
  *channel = int(at - *pixel * vectors) * N;
  return *pixel < p.pixels;
}

// All gates of the vector's channels, as they are stored.
template <typename R, int N, typename T>
__device__ __forceinline__ void load_gates(const GateStepParams<T>& p, int64_t pixel, int channel,
                                           float (&x)[R::kGates][N]) {
  RNNDYN_UNROLL
  for (int port = 0; port < R::kPorts; ++port) {
    RNNDYN_UNROLL
    for (int gate = 0; gate < R::multiple(port); ++gate) {
      const int64_t offset = (pixel * R::multiple(port) + gate) * p.channels + channel;
      float (&row)[N] = x[R::first_gate(port) + gate];
      load(p.terms[port][0] + offset, row);
      if (p.sum[port] == nullptr) continue;
      for (int k = 1; k < p.num_terms[port]; ++k) {
        float y[N];
        load(p.terms[port][k] + offset, y);
        RNNDYN_UNROLL
        for (int j = 0; j < N; ++j) row[j] += y[j];
      }
      if (p.bias[port] != nullptr) {
        RNNDYN_UNROLL
        for (int j = 0; j < N; ++j) row[j] += p.bias[port][gate * p.channels + channel + j];
      }
      store(p.sum[port] + offset, row);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) row[j] = rounded<T>(row[j]);
    }
  }
}

template <typename T, int N, int kRule>
__global__ void __launch_bounds__(kThreads, 2) gate_step_forward_kernel(GateStepParams<T> p) {
  using R = Rule<kRule>;
  int64_t pixel;
  int channel;
  if (!place<N>(p, &pixel, &channel)) return;
  float x[R::kGates][N], state[R::kStates][N];
  load_gates<R, N>(p, pixel, channel, x);
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) {
    float gates[R::kGates], h[R::kStates];
    RNNDYN_UNROLL
    for (int k = 0; k < R::kGates; ++k) gates[k] = x[k][j];
    R::forward(p, gates, h);
    RNNDYN_UNROLL
    for (int k = 0; k < R::kStates; ++k) state[k][j] = h[k];
  }
  RNNDYN_UNROLL
  for (int k = 0; k < R::kStates; ++k) store(p.state[k] + pixel * p.channels + channel, state[k]);
}

template <typename T, int N, int kRule>
__global__ void __launch_bounds__(kThreads, 2) gate_step_backward_kernel(GateStepParams<T> p) {
  using R = Rule<kRule>;
  int64_t pixel;
  int channel;
  if (!place<N>(p, &pixel, &channel)) return;
  float x[R::kGates][N], grad[R::kStates][N];
  load_gates<R, N>(p, pixel, channel, x);
  RNNDYN_UNROLL
  for (int k = 0; k < R::kStates; ++k) load(p.grad_state[k] + pixel * p.channels + channel, grad[k]);
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) {
    float gates[R::kGates], g[R::kStates], d[R::kGates];
    RNNDYN_UNROLL
    for (int k = 0; k < R::kGates; ++k) gates[k] = x[k][j];
    RNNDYN_UNROLL
    for (int k = 0; k < R::kStates; ++k) g[k] = grad[k][j];
    R::backward(p, gates, g, d);
    RNNDYN_UNROLL
    for (int k = 0; k < R::kGates; ++k) x[k][j] = d[k];
  }
  RNNDYN_UNROLL
  for (int port = 0; port < R::kPorts; ++port) {
    RNNDYN_UNROLL
    for (int gate = 0; gate < R::multiple(port); ++gate)
      store(p.grad_port[port] + (pixel * R::multiple(port) + gate) * p.channels + channel,
            x[R::first_gate(port) + gate]);
  }
}

template <typename T, int N, int kRule>
void launch_rule(const GateStepParams<T>& p, bool backward, Stream stream) {
  const char* name = backward ? "gate_step_backward_kernel" : "gate_step_forward_kernel";
  launch(backward ? gate_step_backward_kernel<T, N, kRule> : gate_step_forward_kernel<T, N, kRule>, name,
         blocks(ceil_divide(p.pixels * (p.channels / N), kThreads), name), kThreads, 0, stream, p);
}

template <typename T, int N>
void launch_vectors(const GateStepParams<T>& p, bool backward, Stream stream) {
  switch (p.rule) {
    case GateRule::kGruGates:
      return launch_rule<T, N, int(GateRule::kGruGates)>(p, backward, stream);
    case GateRule::kGruUpdate:
      return launch_rule<T, N, int(GateRule::kGruUpdate)>(p, backward, stream);
    case GateRule::kLstm:
      return launch_rule<T, N, int(GateRule::kLstm)>(p, backward, stream);
    case GateRule::kUgrnn:
      return launch_rule<T, N, int(GateRule::kUgrnn)>(p, backward, stream);
    case GateRule::kIntersection:
      return launch_rule<T, N, int(GateRule::kIntersection)>(p, backward, stream);
    case GateRule::kReciprocal:
      return launch_rule<T, N, int(GateRule::kReciprocal)>(p, backward, stream);
  }
  throw std::invalid_argument("gate_step: no such rule");
}

}  // namespace

template <typename T>
void launch_gate_step(const GateStepParams<T>& p, bool backward, Stream stream) {
  // Buffers start where torch put them, but may be slices.
  constexpr uintptr_t bytes = kVector * sizeof(T);
  bool wide = p.channels % kVector == 0;
  auto consider = [&](const void* address) { wide = wide && reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  for (int port = 0; port < kMaxPorts; ++port) {
    for (int k = 0; k < p.num_terms[port]; ++k) consider(p.terms[port][k]);
    consider(p.sum[port]), consider(p.grad_port[port]);
  }
  for (int k = 0; k < kMaxStates; ++k) consider(p.state[k]), consider(p.grad_state[k]);
  if (wide) return launch_vectors<T, kVector>(p, backward, stream);
  launch_vectors<T, 1>(p, backward, stream);
}

template void launch_gate_step<float>(const GateStepParams<float>&, bool, Stream);
template void launch_gate_step<Half>(const GateStepParams<Half>&, bool, Stream);
template void launch_gate_step<BFloat16>(const GateStepParams<BFloat16>&, bool, Stream);

}  // namespace rnndyn::cuda
