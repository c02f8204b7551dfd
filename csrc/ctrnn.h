// Parameters of the ctrnn op (many continuous-time recurrent networks through a whole sequence, forward and backward) and of the
// fused training of such networks.
//
// Buffers are contiguous in the order given, owned and allocated by the caller; null means "absent" or "not wanted". No output may
// alias an input.
#pragma once
#include <cstdint>

namespace rnndyn {

enum CtrnnActivation : int32_t { kCtrnnTanh, kCtrnnRelu, kCtrnnSigmoid, kCtrnnSoftplus, kCtrnnIdentity };

constexpr int64_t kCtrnnTile = 16;  // trials that run side by side in vector lanes

// M models, N trials, T steps, I inputs, H units.
struct CtrnnShape {
  int64_t models, trials, steps, inputs, units;
};

template <typename Real>
struct CtrnnForwardParams {
  CtrnnShape shape;
  int num_threads;
  const Real* inputs;          // [M, N, T, I], or [N, T, I] where input_model_stride is 0
  int64_t input_model_stride;  // N * T * I, or 0
  const Real* w_rec;           // [M, H, H]
  const Real* b_rec;           // [M, H]
  const Real* w_in;            // [M, I, H]
  const Real* h0;              // [M, N, H]
  const Real* alpha;           // [M]
  const Real* noise_std;       // [M]
  const int32_t* activation;   // [M] CtrnnActivation
  const int64_t* seeds;        // [M], or null: no noise
  uint32_t stream, first_trial;
  Real* rates;      // [M, N, T, H]
  Real* states;     // [M, N, T, H] or null
  char* workspace;  // ctrnn_forward_workspace() bytes, aligned to 64
};

template <typename Real>
struct CtrnnBackwardParams {
  CtrnnShape shape;
  int num_threads;
  const Real* inputs;  // as forward
  int64_t input_model_stride;
  const Real* w_rec;          // [M, H, H]
  const Real* w_in;           // [M, I, H]
  const Real* h0;             // [M, N, H]
  const Real* alpha;          // [M]
  const int32_t* activation;  // [M]
  const Real* rates;          // [M, N, T, H] as forward wrote them
  const Real* grad_rates;     // [M, N, T, H] or null
  const Real* grad_states;    // [M, N, T, H] or null
  Real* grad_inputs;          // [M, N, T, I] or null
  Real* grad_weights;         // [M, H + I + 1, H]: of w_rec, w_in and b_rec below one another
  Real* grad_h0;              // [M, N, H] or null
  char* workspace;            // ctrnn_backward_workspace() bytes, aligned to 64
};

// One epoch of every model in `chosen`: for each batch forward, loss, backward, AdamW and, if asked for, the metrics of the batch again
// with the new parameters; then the metrics of the validation trials.
//
//   L = mean over trials and the last `loss_steps` steps of (z - y)^2 + activity_weight * mean over trials, steps and units of r^2
//
// Parameters of a model lie in one row [P]: w_rec [H, H], w_in [I, H], b_rec [H], w_out [H], b_out [1].
template <typename Real>
struct CtrnnTrainParams {
  CtrnnShape shape;  // models: rows of the arrays below; trials: the batch
  int num_threads;
  int64_t num_chosen;
  const int64_t* chosen;  // [num_chosen] models to train; every index below that has an M is by model
  // Data. Inputs are small integers times a scale, or plain numbers: floats throughout.
  const float* train_inputs;  // [M, N_train, T, I]
  const float* train_labels;  // [M, N_train]
  int64_t train_trials;       // N_train
  const int64_t* order;       // [M, batches * batch] trials of this epoch, in their order
  int64_t batches;
  const float* val_inputs;  // [M, N_val, T, I], or null with val_trials 0
  const float* val_labels;  // [M, N_val]
  int64_t val_trials;
  // Model.
  const Real* h0;     // [M, H]
  const Real* alpha;  // [M]
  const Real* noise_std;
  const int32_t* activation;
  const int64_t* seeds;  // [M] of the noise
  const int64_t* epoch;  // [M] 0-based: numbers the streams of noise
  // Optimiser.
  const Real* learning_rate;                          // [M]
  double beta1, beta2, eps, weight_decay, clip_norm;  // clip_norm 0: no clipping
  double activity_weight;
  int64_t loss_steps;
  bool metrics_after;   // metrics of each batch again after its step
  Real* parameters;     // [M, P] updated
  Real* first_moment;   // [M, P] updated
  Real* second_moment;  // [M, P] updated
  // Error, activity and accuracy, means over batches: before the step, after the step, validation.
  double* metrics;  // [M, 3, 3]
  char* workspace;  // ctrnn_train_workspace() bytes, aligned to 64
};

}  // namespace rnndyn
