// The fields of the ops' parameters by name, as far as the CPU's (cpu/launch_fields.h) and the GPU's (cuda/launch_fields.h) have them in common.
// Sizes of maps are samples, height, width and channels.
#pragma once
#include <stdexcept>
#include <string>

#include "ctrnn.h"
#include "depthwise_conv.h"
#include "gate_step.h"
#include "launch.h"
#include "norm_step.h"

namespace rnndyn {

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename P>
void map_fields(FieldReader& v, P& p) {
  v("samples", p.samples), v("height", p.height), v("width", p.width), v("channels", p.channels);
  expect(int64_t(p.height) * p.width * p.channels < int64_t(1) << 31,
         "shape: a map [H, W, C] must have fewer than 2^31 elements");
}

template <typename P>
void area_step_forward_fields(FieldReader& v, P& p) {
  map_fields(v, p);
  v.list("drives", p.drive, p.num_drive), v("drive_bias", p.drive_bias);
  v.list("modulators", p.modulator, p.num_modulator), v("modulator_bias", p.modulator_bias);
  v("modulator_complete", p.modulator_complete);
  v("gamma", p.gamma), v("beta", p.beta), v("eps", p.eps), v("rectify", p.rectify);
  v("value", p.value), v("modulator_sum", p.modulator_sum), v("state", p.state);
  v("max_pooled", p.max_pooled), v("argmax", p.argmax), v("mean_pooled", p.mean_pooled);
  v("mean", p.mean), v("rstd", p.rstd);
}

template <typename P>
void area_step_backward_fields(FieldReader& v, P& p) {
  map_fields(v, p);
  v.list("grad_states", p.grad_state, p.num_grad_state);
  v("grad_max_pooled", p.grad_max_pooled), v("argmax", p.argmax), v("grad_mean_pooled", p.grad_mean_pooled);
  v("multiplicative", p.multiplicative), v("value", p.value);
  v.list("drives", p.drive, p.num_drive), v("drive_bias", p.drive_bias), v("modulator_sum", p.modulator_sum);
  v("mean", p.mean), v("rstd", p.rstd), v("gamma", p.gamma), v("beta", p.beta), v("rectify", p.rectify);
  v("grad_drive", p.grad_drive), v("grad_drive_sum", p.grad_drive_sum), v("grad_modulator", p.grad_modulator);
  v("grad_gamma", p.grad_gamma), v("grad_beta", p.grad_beta);
  expect(p.gamma == nullptr || (p.grad_drive != nullptr && p.grad_gamma != nullptr && p.grad_beta != nullptr &&
                                p.mean != nullptr && p.rstd != nullptr),
         "gamma: a norm needs mean, rstd, grad_drive, grad_gamma and grad_beta");
  expect(p.grad_max_pooled == nullptr || p.argmax != nullptr, "argmax: needed with grad_max_pooled");
}

// A step of a cell, forward or backward, and the channels of its ports.
template <typename P>
struct GateStepLaunch {
  P p;
  bool backward;
  int64_t port_channels[kMaxPorts];
  int num_ports;
};

template <typename P>
void gate_step_fields(FieldReader& v, GateStepLaunch<P>& launch) {
  P& p = launch.p;
  v("rule", p.rule), v("pixels", p.pixels), v("channels", p.channels), v("forget_bias", p.forget_bias);
  v.numbers("tau", p.tau.constant, p.tau.factor, p.tau.slope);
  v.numbers("gate", p.gate.constant, p.gate.factor, p.gate.slope);
  v("activation", p.activation), v("backward", launch.backward);
  const size_t ports = v.each("ports", kMaxPorts, [&](size_t k, py::handle port) {
    const py::sequence terms = py::reinterpret_borrow<py::sequence>(port);
    const size_t most = launch.backward ? 1 : kMaxPortTerms;
    if (terms.size() < 1 || terms.size() > most)
      throw std::invalid_argument("ports: expected 1 to " + std::to_string(most) + " terms, got " +
                                  std::to_string(terms.size()));
    p.num_terms[k] = static_cast<int>(terms.size());
    for (size_t i = 0; i < terms.size(); ++i) v.address(py::object(terms[i]), p.terms[k][i]);
  });
  launch.num_ports = static_cast<int>(ports);
  v.each("port_channels", kMaxPorts,
         [&](size_t k, py::handle n) { v.number(n, "port_channels", launch.port_channels[k]); });
  v.list("biases", p.bias), v.list("sums", p.sum), v.list("grad_ports", p.grad_port);
  if (launch.backward) {
    v.list("states", p.grad_state);
  } else {
    v.list("states", p.state);
  }
  for (size_t k = 0; k < ports; ++k)
    expect(!launch.backward || p.bias[k] == nullptr, "gate_step: backward takes the sum of a port");
}

template <typename S>
void norm_shape_fields(FieldReader& v, S& s) {
  v("samples", s.samples), v("pixels", s.pixels), v("channels", s.channels), v("groups", s.groups);
  v("norm", s.norm), v("activation", s.activation), v("rectify_drive", s.rectify_drive), v("squash", s.squash);
  v("eps", s.eps);
  expect(s.groups >= 1 && s.channels % s.groups == 0 && int64_t(s.channels) <= int64_t(1) << 24,
         "norm_step: expected groups that divide the channels, and at most 2^24 of these");
}

template <typename P>
void norm_step_forward_fields(FieldReader& v, P& p) {
  v.list("drives", p.drive, p.num_drive), v.list("modulators", p.modulator, p.num_modulator);
  v("drive_bias", p.drive_bias), v("modulator_bias", p.modulator_bias), v("gamma", p.gamma), v("beta", p.beta);
  v("drive_sum", p.drive_sum), v("modulator_sum", p.modulator_sum), v("state", p.state);
  v("mean", p.mean), v("rstd", p.rstd), v("variance", p.variance), v("workspace", p.workspace);
}

template <typename P>
void norm_step_backward_fields(FieldReader& v, P& p) {
  v("grad_state", p.grad_state), v("drive", p.drive), v("modulator", p.modulator), v("gamma", p.gamma);
  v("beta", p.beta), v("mean", p.mean), v("rstd", p.rstd), v("grad_drive", p.grad_drive);
  v("grad_modulator", p.grad_modulator), v("grad_gamma", p.grad_gamma), v("grad_beta", p.grad_beta);
  v("workspace", p.workspace);
}

inline void depthwise_shape_fields(FieldReader& v, DepthwiseShape& s) {
  v("samples", s.samples), v("channels", s.channels), v("in_height", s.in_height), v("in_width", s.in_width);
  v("out_height", s.out_height), v("out_width", s.out_width);
  v("kernel_height", s.kernel_height), v("kernel_width", s.kernel_width), v("step", s.step);
  v("dilation", s.dilation), v("top", s.top), v("left", s.left);
  v("group_in", s.group_in), v("group_out", s.group_out);
  expect(s.kernel_height >= 1 && s.kernel_height <= kMaxDepthwiseKernel && s.kernel_width >= 1 &&
             s.kernel_width <= kMaxDepthwiseKernel,
         "depthwise_conv: expected kernels of 1 to 16 rows and columns");
  expect(s.group_in >= 1 && s.group_out >= 1 && s.channels % s.group_out == 0,
         "depthwise_conv: expected whole groups of channels");
  for (int64_t n : {s.in_height, s.in_width, s.out_height, s.out_width})
    expect(n < int64_t(1) << 24, "depthwise_conv: expected maps of fewer than 2^24 rows and columns");
}

template <typename P>
void depthwise_conv_fields(FieldReader& v, P& p) {
  depthwise_shape_fields(v, p.shape);
  v("x", p.x), v("weight", p.weight), v("bias", p.bias), v("out", p.y);
}

template <typename P>
void depthwise_weight_grad_fields(FieldReader& v, P& p) {
  depthwise_shape_fields(v, p.shape);
  v("x", p.x), v("grad", p.grad), v("grad_weight", p.grad_weight);
  expect(p.shape.dilation == 1, "depthwise_weight_grad: expected dilation 1");
}

template <typename P>
void readout_zones_fields(FieldReader& v, P& p) {
  v("timesteps", p.timesteps), v("samples", p.samples), v("dims", p.dims), v("classes", p.classes);
  v("representations", p.representations), v("previous", p.previous), v("previous_stride", p.previous_stride);
  v("log_probs", p.log_probs), v("labels", p.labels), v("bias", p.bias), v("weight_norm", p.weight_norm);
  v("inverse_distance", p.inverse_distance), v("cosine", p.cosine), v("predicted", p.predicted), v("norm", p.norm);
  v("cos_predicted", p.cos_predicted), v("cos_label", p.cos_label), v("margin", p.margin);
  v("boundary_distance", p.boundary_distance), v("change", p.change);
}

template <typename P>
void trajectory_norms_fields(FieldReader& v, P& p) {
  v("timesteps", p.timesteps), v("samples", p.samples), v("dims", p.dims);
  v("values", p.values), v("step_stride", p.step_stride), v("row_stride", p.row_stride);
  v("norm", p.norm), v("change", p.change);
}

inline void ctrnn_shape_fields(FieldReader& v, CtrnnShape& s) {
  v("models", s.models), v("trials", s.trials), v("steps", s.steps), v("inputs_per_step", s.inputs);
  v("units", s.units);
}

template <typename P>
void ctrnn_forward_fields(FieldReader& v, P& p) {
  ctrnn_shape_fields(v, p.shape);
  v("inputs", p.inputs), v("input_model_stride", p.input_model_stride), v("w_rec", p.w_rec), v("b_rec", p.b_rec);
  v("w_in", p.w_in), v("h0", p.h0), v("alpha", p.alpha), v("noise_std", p.noise_std);
  v("activations", p.activation), v("noise_seeds", p.seeds), v("stream", p.stream);
  v("first_trial", p.first_trial), v("rates", p.rates), v("states", p.states);
}

}  // namespace rnndyn
