// The fields of the CUDA ops' parameters by name: what they have in common with the CPU's is in ../launch_fields.h. Buffers that the caller does not
// give, sums of several terms among them, come out of scratch.
#pragma once
#include "../launch_fields.h"
#include "cuda/area_step.h"
#include "cuda/ctrnn.h"
#include "cuda/depthwise_conv.h"
#include "cuda/gate_step.h"
#include "cuda/norm_step.h"
#include "cuda/readout_zones.h"
#include "cuda/recurrent_conv.h"
#include "cuda/trajectory_norms.h"

namespace rnndyn::cuda {

// ---------------------------------------------------------------- area_step

template <typename T>
void fields(FieldReader& v, AreaStepForwardParams<T>& p) {
  area_step_forward_fields(v, p);
  MomentGroups& g = p.moment_groups;
  v("moments", p.moments);
  const bool given = v.numbers("moment_groups", g.groups, g.period, g.count, g.last_count);
  p.value_complete = p.moments != nullptr;  // (a fused convolution left both)
  if (!given) g = area_step_moment_groups<T>(p.height, p.width, p.channels);
  expect(p.gamma == nullptr || (p.beta != nullptr && p.value != nullptr && p.mean != nullptr && p.rstd != nullptr),
         "gamma: a norm needs beta, value, mean and rstd");
}
template <typename T>
void scratch(ScratchCutter& s, AreaStepForwardParams<T>& p) {
  if (p.gamma != nullptr) s(p.moments, 2 * p.samples * p.moment_groups.groups);
}
template <typename T>
void run(const AreaStepForwardParams<T>& p, void* stream) {
  launch_area_step_forward(p, stream);
}

template <typename T>
void fields(FieldReader& v, AreaStepBackwardParams<T>& p) {
  area_step_backward_fields(v, p);
  const AreaStepScratch sizes = area_step_backward_scratch<T>(p.samples, p.height, p.width, p.channels);
  p.slots = sizes.slots, p.splits = sizes.splits;
}
template <typename T>
void scratch(ScratchCutter& s, AreaStepBackwardParams<T>& p) {
  if (p.gamma == nullptr) return;
  s(p.sums, 2 * p.samples * p.slots);
  s(p.affine, 2 * int64_t(p.splits) * p.height * p.width * p.channels);
}
template <typename T>
void run(const AreaStepBackwardParams<T>& p, void* stream) {
  launch_area_step_backward(p, stream);
}

// ---------------------------------------------------------------- gate_step, norm_step

template <typename T>
using GateStep = GateStepLaunch<GateStepParams<T>>;

template <typename T>
void fields(FieldReader& v, GateStepLaunch<GateStepParams<T>>& launch) {
  gate_step_fields(v, launch);
}
template <typename T>
void scratch(ScratchCutter& s, GateStepLaunch<GateStepParams<T>>& launch) {
  for (int k = 0; k < launch.num_ports && !launch.backward; ++k)
    if (launch.p.num_terms[k] > 1 || launch.p.bias[k] != nullptr)
      s(launch.p.sum[k], launch.p.pixels * launch.port_channels[k]);
}
template <typename T>
void run(const GateStepLaunch<GateStepParams<T>>& launch, void* stream) {
  launch_gate_step(launch.p, launch.backward, stream);
}

template <typename T>
void fields(FieldReader& v, NormStepForwardParams<T>& p) {
  norm_shape_fields(v, p.rule), norm_step_forward_fields(v, p);
  expect(!p.rule.squash || p.num_modulator > 0 || p.modulator_bias != nullptr, "norm_step: squash needs a modulator");
}
template <typename T>
void fields(FieldReader& v, NormStepBackwardParams<T>& p) {
  norm_shape_fields(v, p.rule), norm_step_backward_fields(v, p);
  expect(!p.rule.squash || p.modulator != nullptr, "norm_step: squash needs a modulator");
  if (!p.rule.squash) p.grad_modulator = nullptr;
}
template <typename P>
void norm_workspace(ScratchCutter& s, P& p) {
  if (p.rule.norm != NormKind::kNone) s(p.workspace, norm_step_workspace(p.rule));
}
template <typename T>
void scratch(ScratchCutter& s, NormStepForwardParams<T>& p) {
  const int64_t map = p.rule.samples * p.rule.pixels * p.rule.channels;
  norm_workspace(s, p);
  if (p.num_drive > 1 || (p.num_drive == 1 && p.drive_bias != nullptr)) s(p.drive_sum, map);
  if (p.num_modulator > 1 || (p.num_modulator == 1 && p.modulator_bias != nullptr)) s(p.modulator_sum, map);
}
template <typename T>
void scratch(ScratchCutter& s, NormStepBackwardParams<T>& p) {
  norm_workspace(s, p);
}
template <typename T>
void run(const NormStepForwardParams<T>& p, void* stream) {
  launch_norm_step_forward(p, stream);
}
template <typename T>
void run(const NormStepBackwardParams<T>& p, void* stream) {
  launch_norm_step_backward(p, stream);
}

// ---------------------------------------------------------------- depthwise_conv

inline void check_groups(const DepthwiseShape& s) {
  expect(s.group_in == 1 && s.group_out == 1, "depthwise_conv: expected a channel per group on devices");
}
template <typename T>
void fields(FieldReader& v, DepthwiseConvParams<T>& p) {
  depthwise_conv_fields(v, p), check_groups(p.shape);
}
template <typename T>
void run(const DepthwiseConvParams<T>& p, void* stream) {
  launch_depthwise_conv(p, stream);
}
template <typename T>
void fields(FieldReader& v, DepthwiseWeightGradParams<T>& p) {
  depthwise_weight_grad_fields(v, p), check_groups(p.shape);
  p.splits = depthwise_weight_grad_splits<T>(p.shape);
}
template <typename T>
void scratch(ScratchCutter& s, DepthwiseWeightGradParams<T>& p) {
  if (p.splits > 1) s(p.partial, p.splits * p.shape.kernel_height * p.shape.kernel_width * p.shape.channels);
}
template <typename T>
void run(const DepthwiseWeightGradParams<T>& p, void* stream) {
  launch_depthwise_weight_grad(p, stream);
}

// ---------------------------------------------------------------- recurrent_conv

// terms: address of x and of weight; height, width and channels of x, kernel, stride, padding; transposed.
template <typename T>
void fields(FieldReader& v, RecurrentConvParams<T>& p) {
  map_fields(v, p);
  p.num_terms = static_cast<int>(v.each("terms", kMaxConvTerms, [&](size_t k, py::handle given) {
    const py::sequence item = py::reinterpret_borrow<py::sequence>(given);
    ConvTerm<T>& term = p.term[k];
    v.address(py::object(item[0]), term.x), v.address(py::object(item[1]), term.weight);
    const py::sequence sizes = py::object(item[2]);
    int* const numbers[] = {&term.height, &term.width, &term.channels, &term.kernel, &term.stride, &term.pad};
    for (size_t i = 0; i < 6; ++i) v.number(py::object(sizes[i]), "terms", *numbers[i]);
    term.transposed = py::object(item[3]).cast<bool>();
  }));
  expect(p.num_terms > 0, "terms: expected 1 to 8");
  v("bias", p.bias), v.list("added", p.added, p.num_added), v("drive", p.drive), v("value", p.value);
  v("modulator_sum", p.modulator_sum), v("moments", p.moments);
}
template <typename T>
void run(const RecurrentConvParams<T>& p, void* stream) {
  launch_recurrent_conv(p, stream);
}

template <typename T>
void fields(FieldReader& v, ConvWeightGradParams<T>& p) {
  v("samples", p.samples), v("height", p.height), v("width", p.width), v("row_channels", p.row_channels);
  v("gathered_height", p.gathered_height), v("gathered_width", p.gathered_width);
  v("gathered_channels", p.gathered_channels), v("kernel", p.kernel), v("stride", p.stride), v("padding", p.pad);
  v("rows", p.rows), v("gathered", p.gathered), v("grad_weight", p.grad_weight);
  p.splits =
      recurrent_conv_weight_grad_splits<T>(p.samples, p.height, p.width, p.row_channels, p.gathered_channels, p.kernel);
}
template <typename T>
void scratch(ScratchCutter& s, ConvWeightGradParams<T>& p) {
  if (p.splits > 1) s(p.partial, int64_t(p.splits) * p.row_channels * p.kernel * p.kernel * p.gathered_channels);
}
template <typename T>
void run(const ConvWeightGradParams<T>& p, void* stream) {
  launch_recurrent_conv_weight_grad(p, stream);
}

// ---------------------------------------------------------------- readout_zones, trajectory_norms, ctrnn

template <typename T>
void fields(FieldReader& v, ReadoutZonesParams<T>& p) {
  readout_zones_fields(v, p);
  v.numbers("representation_strides", p.time_stride, p.sample_stride);
}
template <typename T>
void run(const ReadoutZonesParams<T>& p, void* stream) {
  launch_readout_zones(p, stream);
}

template <typename T>
void fields(FieldReader& v, TrajectoryNormsParams<T>& p) {
  trajectory_norms_fields(v, p);
}
template <typename T>
void run(const TrajectoryNormsParams<T>& p, void* stream) {
  launch_trajectory_norms(p, stream);
}

struct CtrnnForward {
  CtrnnParams p;
};
inline void fields(FieldReader& v, CtrnnForward& launch) { ctrnn_forward_fields(v, launch.p); }
inline void run(const CtrnnForward& launch, void* stream) { launch_ctrnn_forward(launch.p, stream); }

struct CtrnnBackward {
  CtrnnParams p;
};
inline void fields(FieldReader& v, CtrnnBackward& launch) {
  CtrnnParams& p = launch.p;
  ctrnn_shape_fields(v, p.shape);
  v("w_rec", p.w_rec), v("h0", p.h0), v("alpha", p.alpha), v("activations", p.activation), v("rates", p.rates);
  v("grad_rates", p.grad_rates), v("grad_states", p.grad_states), v("d", p.d), v("grad_h0", p.grad_h0);
  v("rates0", p.rates0);
}
inline void run(const CtrnnBackward& launch, void* stream) { launch_ctrnn_backward(launch.p, stream); }

}  // namespace rnndyn::cuda
