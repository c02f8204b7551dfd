// Parameters of the gate_step op on CUDA: the pointwise arithmetic of one gated cell at one time step.
//
// As csrc/gate_step.h (rules, order of ports and states), except that maps are stored as T (float, Half, BFloat16), and biases are float32. Maps are channels-last
// and contiguous. The caller owns every buffer, on one device; a null pointer means "absent". No output may alias an input, except that
// `sum[p]` may be the buffer of a port's first term.
#pragma once
#include "../gate_step.h"  // (beside this one, which has the same name)

namespace rnndyn::cuda {

using rnndyn::GateActivation;
using rnndyn::GateRule;
using rnndyn::kMaxPorts;
using rnndyn::kMaxPortTerms;
using rnndyn::kMaxStates;

// constant + factor * tanh(slope * x)
struct GateGain {
  float constant, factor, slope;
};

template <typename T>
struct GateStepParams {
  GateRule rule;
  int64_t pixels;  // N * H * W
  int channels;    // D
  float forget_bias;
  GateGain tau, gate;         // of a reciprocal gated cell
  GateActivation activation;  // of a reciprocal gated cell
  // Forward: terms of each port, summed into `sum` where there are several. Backward: num_terms is 1 everywhere.
  int num_terms[kMaxPorts];
  const T* terms[kMaxPorts][kMaxPortTerms];  // [pixels, m * D] each
  const float* bias[kMaxPorts];              // [m * D] or null, forward
  T* sum[kMaxPorts];                         // [pixels, m * D], required with several terms or a bias
  T* state[kMaxStates];                      // [pixels, D] forward: outputs
  const T* grad_state[kMaxStates];           // [pixels, D] backward
  T* grad_port[kMaxPorts];                   // [pixels, m * D] backward: outputs
};

template <typename T>
void launch_gate_step(const GateStepParams<T>& p, bool backward, void* stream);

}  // namespace rnndyn::cuda
