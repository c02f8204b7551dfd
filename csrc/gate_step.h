// Parameters of the gate_step op: the pointwise arithmetic of one gated cell at one time step (or of many stacked as samples).
//
// Maps are channels-last and contiguous: a port of multiple m has m * D channels at each of `pixels` positions. The enums and
// the order of ports and states are those of rnndyn_fast/ops/cells.py. Every buffer is owned by the caller, who allocates it.
// No output may alias an input, except that `sum[p]` may be the very buffer of a port's first term, and `grad_port[p]` that of the port.
#pragma once
#include <cstdint>

namespace rnndyn {

constexpr int kMaxPorts = 4;
constexpr int kMaxPortTerms = 6;
constexpr int kMaxStates = 2;

enum class GateRule : int { kGruGates, kGruUpdate, kLstm, kUgrnn, kIntersection, kReciprocal };
enum class GateActivation : int { kIdentity, kRelu, kElu, kTanh };

// offset + multiplier * nonlinearity(x), with the logistic sigmoid and tanh both written as a + b tanh(s x).
struct GateGain {
  double constant, factor, slope;  // constant + factor * tanh(slope * x)
};

template <typename Real>
struct GateStepParams {
  GateRule rule;
  int64_t pixels, channels;  // N * H * W and D, each at least 1
  int num_threads;
  double forget_bias;
  GateGain tau, gate;         // of a reciprocal gated cell
  GateActivation activation;  // of a reciprocal gated cell
  // Forward: terms of each port, summed (into `sum`, if given) where there are several. Backward: num_terms is 1 everywhere.
  int num_terms[kMaxPorts];
  const Real* terms[kMaxPorts][kMaxPortTerms];  // [pixels, m * D] each
  const Real* bias[kMaxPorts];                  // [m * D] or null, added to the sum (forward)
  Real* sum[kMaxPorts];                // [pixels, m * D] or null: of several terms or a bias, kept for backward
  Real* state[kMaxStates];             // [pixels, D] forward: outputs
  const Real* grad_state[kMaxStates];  // [pixels, D] backward
  const Real* grad_more[kMaxStates];   // [pixels, D] or null: added to it
  Real* grad_port[kMaxPorts];          // [pixels, m * D] backward: outputs
  Real* grad_bias[kMaxPorts];          // [m * D] or null, backward: written, the sum of grad_port over pixels
  double* workspace;                   // gate_step_workspace(...) doubles, scratch, with any grad_bias
};

// Gradient of an area that is only an activation of its drive, from its value.
template <typename Real>
struct ActivationBackwardParams {
  GateActivation activation;
  int64_t pixels, channels;
  int num_threads;
  const Real *grad, *grad_more;  // [pixels, C] gradient of the value; more: null, or added to it
  const Real* state;             // [pixels, C] the value
  Real* grad_drive;              // [pixels, C] written
  Real* grad_bias;               // [C] or null: written, its sum over pixels
  double* workspace;             // gate_step_workspace(pixels, C) doubles, scratch, with grad_bias
};

// Pixels that are summed in Real before sums of such chunks are added in double, in order.
constexpr int64_t kGateChunk = 64;

// Doubles: a row of all ports, `row` channels, for each chunk.
inline int64_t gate_step_workspace(int64_t pixels, int64_t row) { return (pixels + kGateChunk - 1) / kGateChunk * row; }

}  // namespace rnndyn
