// The fields of the CPU ops' parameters by name: what they have in common with the GPU's is in ../launch_fields.h.
#pragma once
#include "area_step.h"
#include "channels_last.h"
#include "cpu/kernel_table.h"
#include "ctrnn.h"
#include "depthwise_conv.h"
#include "gate_step.h"
#include "../launch_fields.h"  // (beside this one, which has the same name)
#include "norm_step.h"
#include "readout_zones.h"
#include "trajectory_norms.h"

namespace rnndyn {

// The entry of the table of kernels for the parameters' dtype.
#define RNNDYN_CPU_LAUNCH(Params, op)      \
  template <typename Real>                 \
  void run(const Params<Real>& p, void*) { \
    if constexpr (sizeof(Real) == 4) {     \
      kernels().op##_f32(p);               \
    } else {                               \
      kernels().op##_f64(p);               \
    }                                      \
  }
RNNDYN_CPU_LAUNCH(AreaStepForwardParams, area_step_forward)
RNNDYN_CPU_LAUNCH(AreaStepBackwardParams, area_step_backward)
RNNDYN_CPU_LAUNCH(ActivationBackwardParams, activation_backward)
RNNDYN_CPU_LAUNCH(NormStepForwardParams, norm_step_forward)
RNNDYN_CPU_LAUNCH(NormStepBackwardParams, norm_step_backward)
RNNDYN_CPU_LAUNCH(DepthwiseConvParams, depthwise_conv)
RNNDYN_CPU_LAUNCH(DepthwiseWeightGradParams, depthwise_weight_grad)
RNNDYN_CPU_LAUNCH(ChannelsLastParams, channels_last)
RNNDYN_CPU_LAUNCH(ReadoutZonesParams, readout_zones)
RNNDYN_CPU_LAUNCH(TrajectoryNormsParams, trajectory_norms)
RNNDYN_CPU_LAUNCH(CtrnnForwardParams, ctrnn_forward)
RNNDYN_CPU_LAUNCH(CtrnnBackwardParams, ctrnn_backward)
RNNDYN_CPU_LAUNCH(CtrnnTrainParams, ctrnn_train)
#undef RNNDYN_CPU_LAUNCH

template <typename Real>
void fields(FieldReader& v, AreaStepForwardParams<Real>& p) {
  area_step_forward_fields(v, p);
  v("num_threads", p.num_threads), v("complete", p.complete);
  const bool valued = p.value != nullptr || p.complete;
  expect(p.gamma == nullptr || (p.beta != nullptr && valued && p.mean != nullptr && p.rstd != nullptr),
         "gamma: a norm needs beta, value, mean and rstd");
}

template <typename Real>
void fields(FieldReader& v, AreaStepBackwardParams<Real>& p) {
  area_step_backward_fields(v, p);
  v("num_threads", p.num_threads), v("partial", p.partial);
}
template <typename Real>
void scratch(ScratchCutter& s, AreaStepBackwardParams<Real>& p) {
  if (p.gamma != nullptr) s(p.partial, 2 * p.samples * num_chunks(p.height, p.width, p.channels));
}

template <typename Real>
void fields(FieldReader& v, GateStepLaunch<GateStepParams<Real>>& launch) {
  gate_step_fields(v, launch);
  v("num_threads", launch.p.num_threads), v.list("more", launch.p.grad_more);
  v.list("grad_biases", launch.p.grad_bias), v("workspace", launch.p.workspace);
}
template <typename Real>
void scratch(ScratchCutter& s, GateStepLaunch<GateStepParams<Real>>& launch) {
  bool wanted = false;
  int64_t row = 0;
  for (int k = 0; k < launch.num_ports; ++k)
    wanted = wanted || launch.p.grad_bias[k] != nullptr, row += launch.port_channels[k];
  if (wanted) s(launch.p.workspace, gate_step_workspace(launch.p.pixels, row));
}
template <typename Real>
void run(const GateStepLaunch<GateStepParams<Real>>& launch, void*) {
  if constexpr (sizeof(Real) == 4) {
    kernels().gate_step_f32(launch.p, launch.backward);
  } else {
    kernels().gate_step_f64(launch.p, launch.backward);
  }
}

template <typename Real>
void fields(FieldReader& v, ActivationBackwardParams<Real>& p) {
  v("activation", p.activation), v("pixels", p.pixels), v("channels", p.channels), v("num_threads", p.num_threads);
  v("grad", p.grad), v("more", p.grad_more), v("state", p.state), v("grad_drive", p.grad_drive);
  v("grad_bias", p.grad_bias), v("workspace", p.workspace);
}
template <typename Real>
void scratch(ScratchCutter& s, ActivationBackwardParams<Real>& p) {
  if (p.grad_bias != nullptr) s(p.workspace, gate_step_workspace(p.pixels, p.channels));
}

template <typename Real>
void fields(FieldReader& v, NormStepForwardParams<Real>& p) {
  norm_shape_fields(v, p.shape), v("num_threads", p.shape.num_threads);
  norm_step_forward_fields(v, p);
  expect(!p.shape.squash || p.num_modulator > 0 || p.modulator_bias != nullptr, "norm_step: squash needs a modulator");
}
template <typename Real>
void fields(FieldReader& v, NormStepBackwardParams<Real>& p) {
  norm_shape_fields(v, p.shape), v("num_threads", p.shape.num_threads);
  norm_step_backward_fields(v, p);
  v("grad_drive_bias", p.grad_drive_bias), v("grad_modulator_bias", p.grad_modulator_bias);
  expect(!p.shape.squash || p.modulator != nullptr, "norm_step: squash needs a modulator");
  expect((p.grad_drive_bias == nullptr || p.drive != nullptr) && (p.grad_modulator_bias == nullptr || p.shape.squash),
         "norm_step: a bias needs the drive or modulator that it is added to");
}
template <typename Real>
void scratch(ScratchCutter& s, NormStepForwardParams<Real>& p) {
  s(p.workspace, kernels().norm_step_workspace(p.shape));
}
template <typename Real>
void scratch(ScratchCutter& s, NormStepBackwardParams<Real>& p) {
  s(p.workspace, kernels().norm_step_workspace(p.shape));
}

template <typename Real>
void fields(FieldReader& v, DepthwiseConvParams<Real>& p) {
  depthwise_conv_fields(v, p), v("num_threads", p.shape.num_threads);
}
template <typename Real>
void fields(FieldReader& v, DepthwiseWeightGradParams<Real>& p) {
  depthwise_weight_grad_fields(v, p), v("num_threads", p.shape.num_threads);
}

inline void fields(FieldReader& v, SeparableConvParams& p) {
  DepthwiseConvParams<float>& d = p.depthwise;
  depthwise_shape_fields(v, d.shape), v("num_threads", d.shape.num_threads);
  v("x", d.x), v("weight", d.weight), v("bias", d.bias);
  v("out_channels", p.out_channels), v("pointwise_stride", p.pointwise_stride), v("pointwise", p.pointwise);
  v("out", p.y);
  expect(p.pointwise_stride % 32 == 0 && p.pointwise_stride >= p.out_channels,
         "separable_conv: expected rows of a multiple of 32 channels");
}
inline void run(const SeparableConvParams& p, void*) { kernels().separable_conv(p); }

template <typename Real>
void fields(FieldReader& v, ChannelsLastParams<Real>& p) {
  v("samples", p.samples), v("channels", p.channels), v("pixels", p.pixels), v("num_threads", p.num_threads);
  v("x", p.x), v("out", p.y);
}

template <typename Real>
void fields(FieldReader& v, ReadoutZonesParams<Real>& p) {
  readout_zones_fields(v, p), v("num_threads", p.num_threads);
  v.numbers("representation_strides", p.representation_time_stride, p.representation_stride);
  v.numbers("log_prob_strides", p.log_prob_time_stride, p.log_prob_stride);
  v("weight", p.weight);
}
template <typename Real>
void scratch(ScratchCutter& s, ReadoutZonesParams<Real>& p) {
  if (p.weight != nullptr) s(p.packed, (p.classes + kZonePadding - 1) / kZonePadding * kZonePadding * p.dims);
}

template <typename Real>
void fields(FieldReader& v, TrajectoryNormsParams<Real>& p) {
  trajectory_norms_fields(v, p), v("num_threads", p.num_threads);
}

template <typename Real>
void fields(FieldReader& v, CtrnnForwardParams<Real>& p) {
  ctrnn_forward_fields(v, p), v("num_threads", p.num_threads);
}
template <typename Real>
void scratch(ScratchCutter& s, CtrnnForwardParams<Real>& p) {
  s(p.workspace, kernels().ctrnn_forward_workspace(p.shape, p.num_threads));
}
template <typename Real>
void fields(FieldReader& v, CtrnnBackwardParams<Real>& p) {
  ctrnn_shape_fields(v, p.shape), v("num_threads", p.num_threads);
  v("inputs", p.inputs), v("input_model_stride", p.input_model_stride), v("w_rec", p.w_rec), v("w_in", p.w_in);
  v("h0", p.h0), v("alpha", p.alpha), v("activations", p.activation), v("rates", p.rates);
  v("grad_rates", p.grad_rates), v("grad_states", p.grad_states), v("grad_inputs", p.grad_inputs);
  v("grad_weights", p.grad_weights), v("grad_h0", p.grad_h0);
}
template <typename Real>
void scratch(ScratchCutter& s, CtrnnBackwardParams<Real>& p) {
  s(p.workspace, kernels().ctrnn_backward_workspace(p.shape, p.num_threads));
}
template <typename Real>
void fields(FieldReader& v, CtrnnTrainParams<Real>& p) {
  ctrnn_shape_fields(v, p.shape), v("num_threads", p.num_threads);
  v("num_chosen", p.num_chosen), v("chosen", p.chosen), v("train_inputs", p.train_inputs);
  v("train_labels", p.train_labels), v("train_trials", p.train_trials), v("order", p.order);
  v("batches", p.batches), v("val_inputs", p.val_inputs), v("val_labels", p.val_labels);
  v("val_trials", p.val_trials), v("h0", p.h0), v("alpha", p.alpha), v("noise_std", p.noise_std);
  v("activations", p.activation), v("seeds", p.seeds), v("epoch", p.epoch), v("learning_rate", p.learning_rate);
  v("beta1", p.beta1), v("beta2", p.beta2), v("eps", p.eps), v("weight_decay", p.weight_decay);
  v("clip_norm", p.clip_norm), v("activity_weight", p.activity_weight), v("loss_steps", p.loss_steps);
  v("metrics_after", p.metrics_after), v("parameters", p.parameters), v("first_moment", p.first_moment);
  v("second_moment", p.second_moment), v("metrics", p.metrics);
}
template <typename Real>
void scratch(ScratchCutter& s, CtrnnTrainParams<Real>& p) {
  s(p.workspace, kernels().ctrnn_train_workspace(p.shape, p.loss_steps, p.num_threads));
}

}  // namespace rnndyn
