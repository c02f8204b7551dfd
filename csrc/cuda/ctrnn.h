// Parameters of the ctrnn op on CUDA: many continuous-time recurrent networks through a whole sequence, in float32.
//
// Buffers are contiguous in the order given and owned by the caller, on one device; a null pointer means "absent" or "not wanted". No
// output may alias an input. Activations are those of csrc/ctrnn.h.
#pragma once
#include "../ctrnn.h"  // (beside this one, which has the same name)

namespace rnndyn::cuda {

struct CtrnnParams {
  CtrnnShape shape;            // M models, N trials, T steps, I inputs, H units
  const float* inputs;         // forward: [M, N, T, I], or [N, T, I] where input_model_stride is 0
  int64_t input_model_stride;  // N * T * I, or 0
  const float* w_rec;          // [M, H, H]; backward: transposed
  const float* b_rec;          // forward: [M, H]
  const float* w_in;           // forward: [M, I, H]
  const float* h0;             // [M, N, H]
  const float* alpha;          // [M]
  const float* noise_std;      // forward: [M]
  const int32_t* activation;   // [M] CtrnnActivation
  const int64_t* seeds;        // forward: [M], or null: no noise
  uint32_t stream, first_trial;
  float* rates;              // [M, N, T, H] forward: written; backward: read
  float* states;             // forward: [M, N, T, H] or null
  const float* grad_rates;   // backward: [M, N, T, H] or null
  const float* grad_states;  // backward: [M, N, T, H] or null
  float* d;                  // backward: [M, N, T, H] written: the gradient of what enters each step's bracket
  float* grad_h0;            // backward: [M, N, H] written
  float* rates0;             // backward: [M, N, H] written: f(h0), which the gradient of W reads
};

// The most units of a network: its rates and states are in shared memory.
int64_t ctrnn_max_units();

void launch_ctrnn_forward(const CtrnnParams& p, void* stream);
void launch_ctrnn_backward(const CtrnnParams& p, void* stream);

}  // namespace rnndyn::cuda
