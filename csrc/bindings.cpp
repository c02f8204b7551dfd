// The Python module rnndyn_fast._core. It links neither torch nor NumPy: buffers arrive as addresses (0: absent) and sizes, and
// only rnndyn_fast/ops/_launch*.py call these functions. They have checked shapes, dtypes and contiguity by then.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "area_step.h"
#include "bindings.h"
#include "cpu/kernel_table.h"
#include "fingerprint.h"
#include "gate_step.h"
#include "readout_zones.h"
#include "trajectory_norms.h"

namespace py = pybind11;
using namespace rnndyn;

namespace {

template <typename Real>
void area_step_forward(const Shape& shape, int num_threads, const std::vector<Address>& drive, Address drive_bias,
                       const std::vector<Address>& modulator, Address modulator_bias, bool modulator_complete,
                       Address gamma, Address beta, double eps, bool rectify, bool complete, Address value,
                       Address modulator_sum, Address state, Address max_pooled, Address argmax, Address mean_pooled,
                       Address mean, Address rstd) {
  AreaStepForwardParams<Real> p{};
  p.samples = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
  p.num_threads = num_threads;
  p.num_drive = fill_terms(p.drive, drive, "drive");
  p.drive_bias = pointer<const Real>(drive_bias);
  p.num_modulator = fill_terms(p.modulator, modulator, "modulator");
  p.modulator_bias = pointer<const Real>(modulator_bias), p.modulator_complete = modulator_complete;
  p.gamma = pointer<const Real>(gamma), p.beta = pointer<const Real>(beta);
  p.eps = eps, p.rectify = rectify, p.complete = complete;
  p.value = pointer<Real>(value), p.modulator_sum = pointer<Real>(modulator_sum), p.state = pointer<Real>(state);
  p.max_pooled = pointer<Real>(max_pooled), p.argmax = pointer<uint8_t>(argmax),
  p.mean_pooled = pointer<Real>(mean_pooled);
  p.mean = pointer<Real>(mean), p.rstd = pointer<Real>(rstd);
  const bool valued = p.value != nullptr || p.complete;
  if (p.gamma != nullptr && (p.beta == nullptr || !valued || p.mean == nullptr || p.rstd == nullptr))
    throw std::invalid_argument("gamma: a norm needs beta, value, mean and rstd");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().area_step_forward_f32(p);
  } else {
    kernels().area_step_forward_f64(p);
  }
}

// Ports as lists of terms (backward: one each) and states or gradients as addresses, in the order of gate_step.h.
template <typename Real>
void gate_step(int rule, int64_t pixels, int64_t channels, int num_threads, double forget_bias,
               const std::array<double, 3>& tau, const std::array<double, 3>& gate, int activation,
               const std::vector<std::vector<Address>>& ports, const std::vector<Address>& biases,
               const std::vector<Address>& sums, const std::vector<Address>& states,
               const std::vector<Address>& grad_ports, const std::vector<Address>& grad_more,
               const std::vector<Address>& grad_biases, Address workspace, bool backward) {
  if (ports.size() > kMaxPorts || states.size() > kMaxStates)
    throw std::invalid_argument("gate_step: at most " + std::to_string(kMaxPorts) + " ports and " +
                                std::to_string(kMaxStates) + " states");
  GateStepParams<Real> p{};
  p.rule = static_cast<GateRule>(rule), p.pixels = pixels, p.channels = channels, p.num_threads = num_threads;
  p.forget_bias = forget_bias, p.activation = static_cast<GateActivation>(activation);
  p.tau = {tau[0], tau[1], tau[2]}, p.gate = {gate[0], gate[1], gate[2]};
  for (size_t k = 0; k < ports.size(); ++k) {
    if (ports[k].empty() || ports[k].size() > kMaxPortTerms)
      throw std::invalid_argument("gate_step: 1 to " + std::to_string(kMaxPortTerms) + " terms of a port, got " +
                                  std::to_string(ports[k].size()));
    p.num_terms[k] = static_cast<int>(ports[k].size());
    for (size_t i = 0; i < ports[k].size(); ++i) p.terms[k][i] = pointer<const Real>(ports[k][i]);
    p.sum[k] = k < sums.size() ? pointer<Real>(sums[k]) : nullptr;
    p.bias[k] = k < biases.size() ? pointer<const Real>(biases[k]) : nullptr;
    if (backward && (p.num_terms[k] > 1 || p.bias[k] != nullptr))
      throw std::invalid_argument("gate_step: backward takes the sum of a port");
    p.grad_port[k] = k < grad_ports.size() ? pointer<Real>(grad_ports[k]) : nullptr;
    p.grad_bias[k] = k < grad_biases.size() ? pointer<Real>(grad_biases[k]) : nullptr;
  }
  for (size_t k = 0; k < states.size(); ++k) {
    p.state[k] = backward ? nullptr : pointer<Real>(states[k]);
    p.grad_state[k] = backward ? pointer<const Real>(states[k]) : nullptr;
    p.grad_more[k] = k < grad_more.size() ? pointer<const Real>(grad_more[k]) : nullptr;
  }
  p.workspace = pointer<double>(workspace);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().gate_step_f32(p, backward);
  } else {
    kernels().gate_step_f64(p, backward);
  }
}

template <typename Real>
void area_step_backward(const Shape& shape, int num_threads, const std::vector<Address>& grad_state,
                        Address grad_max_pooled, Address argmax, Address grad_mean_pooled, bool multiplicative,
                        Address value, const std::vector<Address>& drive, Address drive_bias, Address modulator_sum,
                        Address mean, Address rstd, Address gamma, Address beta, bool rectify, Address grad_drive,
                        Address grad_drive_sum, Address grad_modulator, Address grad_gamma, Address grad_beta,
                        Address partial) {
  AreaStepBackwardParams<Real> p{};
  p.samples = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
  p.num_threads = num_threads;
  p.num_grad_state = fill_terms(p.grad_state, grad_state, "grad_state");
  p.grad_max_pooled = pointer<const Real>(grad_max_pooled), p.argmax = pointer<const uint8_t>(argmax);
  p.grad_mean_pooled = pointer<const Real>(grad_mean_pooled);
  p.multiplicative = multiplicative;
  p.value = pointer<const Real>(value);
  p.num_drive = fill_terms(p.drive, drive, "drive");
  p.drive_bias = pointer<const Real>(drive_bias);
  p.modulator_sum = pointer<const Real>(modulator_sum);
  p.mean = pointer<const Real>(mean), p.rstd = pointer<const Real>(rstd);
  p.gamma = pointer<const Real>(gamma), p.beta = pointer<const Real>(beta);
  p.rectify = rectify;
  p.grad_drive = pointer<Real>(grad_drive), p.grad_drive_sum = pointer<Real>(grad_drive_sum);
  p.grad_modulator = pointer<Real>(grad_modulator);
  p.grad_gamma = pointer<Real>(grad_gamma), p.grad_beta = pointer<Real>(grad_beta);
  p.partial = pointer<double>(partial);
  if (p.gamma != nullptr &&
      (p.grad_drive == nullptr || p.grad_gamma == nullptr || p.grad_beta == nullptr || p.partial == nullptr))
    throw std::invalid_argument("gamma: a norm needs grad_drive, grad_gamma, grad_beta and partial");
  if (p.grad_max_pooled != nullptr && p.argmax == nullptr)
    throw std::invalid_argument("argmax: needed with grad_max_pooled");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().area_step_backward_f32(p);
  } else {
    kernels().area_step_backward_f64(p);
  }
}

template <typename Real>
void readout_zones(const Shape& shape, int num_threads, Address representations,
                   const std::array<int64_t, 2>& representation_strides, Address previous, int64_t previous_stride,
                   Address log_probs, const std::array<int64_t, 2>& log_prob_strides, Address labels, Address bias,
                   Address weight_norm, Address inverse_distance, Address weight, Address packed, Address cosine,
                   Address predicted, Address norm, Address cos_predicted, Address cos_label, Address margin,
                   Address boundary_distance, Address change) {
  ReadoutZonesParams<Real> p{};
  p.timesteps = shape[0], p.samples = shape[1], p.dims = shape[2], p.classes = shape[3];
  p.num_threads = num_threads;
  p.representations = pointer<const Real>(representations);
  p.representation_time_stride = representation_strides[0], p.representation_stride = representation_strides[1];
  p.previous = pointer<const Real>(previous), p.previous_stride = previous_stride;
  p.log_probs = pointer<const Real>(log_probs);
  p.log_prob_time_stride = log_prob_strides[0], p.log_prob_stride = log_prob_strides[1];
  p.weight = pointer<const Real>(weight), p.packed = pointer<Real>(packed);
  p.labels = pointer<const int64_t>(labels), p.bias = pointer<const Real>(bias);
  p.weight_norm = pointer<const Real>(weight_norm), p.inverse_distance = pointer<const Real>(inverse_distance);
  p.cosine = pointer<Real>(cosine), p.predicted = pointer<int64_t>(predicted), p.norm = pointer<Real>(norm);
  p.cos_predicted = pointer<Real>(cos_predicted), p.cos_label = pointer<Real>(cos_label);
  p.margin = pointer<Real>(margin), p.boundary_distance = pointer<Real>(boundary_distance),
  p.change = pointer<Real>(change);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().readout_zones_f32(p);
  } else {
    kernels().readout_zones_f64(p);
  }
}

template <typename Real>
void trajectory_norms(const std::array<int64_t, 3>& shape, int num_threads, Address values, int64_t step_stride,
                      int64_t row_stride, Address norm, Address change) {
  TrajectoryNormsParams<Real> p{};
  p.timesteps = shape[0], p.samples = shape[1], p.dims = shape[2];
  p.num_threads = num_threads;
  p.values = pointer<const Real>(values), p.step_stride = step_stride, p.row_stride = row_stride;
  p.norm = pointer<double>(norm), p.change = pointer<double>(change);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().trajectory_norms_f32(p);
  } else {
    kernels().trajectory_norms_f64(p);
  }
}

using CtrnnSizes = std::array<int64_t, 5>;  // models, trials, steps, inputs, units

CtrnnShape ctrnn_shape(const CtrnnSizes& s) { return {s[0], s[1], s[2], s[3], s[4]}; }

template <typename Real>
void ctrnn_forward(const CtrnnSizes& sizes, int num_threads, Address inputs, int64_t input_model_stride, Address w_rec,
                   Address b_rec, Address w_in, Address h0, Address alpha, Address noise_std, Address activation,
                   Address seeds, uint32_t stream, uint32_t first_trial, Address rates, Address states,
                   Address workspace) {
  CtrnnForwardParams<Real> p{};
  p.shape = ctrnn_shape(sizes), p.num_threads = num_threads;
  p.inputs = pointer<const Real>(inputs), p.input_model_stride = input_model_stride;
  p.w_rec = pointer<const Real>(w_rec), p.b_rec = pointer<const Real>(b_rec), p.w_in = pointer<const Real>(w_in);
  p.h0 = pointer<const Real>(h0), p.alpha = pointer<const Real>(alpha);
  p.noise_std = pointer<const Real>(noise_std), p.activation = pointer<const int32_t>(activation);
  p.seeds = pointer<const int64_t>(seeds), p.stream = stream, p.first_trial = first_trial;
  p.rates = pointer<Real>(rates), p.states = pointer<Real>(states), p.workspace = pointer<char>(workspace);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().ctrnn_forward_f32(p);
  } else {
    kernels().ctrnn_forward_f64(p);
  }
}

template <typename Real>
void ctrnn_backward(const CtrnnSizes& sizes, int num_threads, Address inputs, int64_t input_model_stride, Address w_rec,
                    Address w_in, Address h0, Address alpha, Address activation, Address rates, Address grad_rates,
                    Address grad_states, Address grad_inputs, Address grad_weights, Address grad_h0,
                    Address workspace) {
  CtrnnBackwardParams<Real> p{};
  p.shape = ctrnn_shape(sizes), p.num_threads = num_threads;
  p.inputs = pointer<const Real>(inputs), p.input_model_stride = input_model_stride;
  p.w_rec = pointer<const Real>(w_rec), p.w_in = pointer<const Real>(w_in), p.h0 = pointer<const Real>(h0);
  p.alpha = pointer<const Real>(alpha), p.activation = pointer<const int32_t>(activation);
  p.rates = pointer<const Real>(rates), p.grad_rates = pointer<const Real>(grad_rates);
  p.grad_states = pointer<const Real>(grad_states), p.grad_inputs = pointer<Real>(grad_inputs);
  p.grad_weights = pointer<Real>(grad_weights), p.grad_h0 = pointer<Real>(grad_h0);
  p.workspace = pointer<char>(workspace);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().ctrnn_backward_f32(p);
  } else {
    kernels().ctrnn_backward_f64(p);
  }
}

// data: inputs, labels and order of training, inputs and labels of validation. model: h0, alpha, noise_std, activation, seeds, epoch.
// sizes of data: training trials, batches, validation trials. optimiser: beta1, beta2, eps, weight_decay, clip_norm, activity_weight.
template <typename Real>
void ctrnn_train(const CtrnnSizes& sizes, int num_threads, int64_t num_chosen, Address chosen,
                 const std::array<Address, 5>& data, const std::array<int64_t, 3>& data_sizes,
                 const std::array<Address, 6>& model, Address learning_rate, const std::array<double, 6>& optimiser,
                 int64_t loss_steps, bool metrics_after, Address parameters, Address first_moment,
                 Address second_moment, Address metrics, Address workspace) {
  CtrnnTrainParams<Real> p{};
  p.shape = ctrnn_shape(sizes), p.num_threads = num_threads;
  p.num_chosen = num_chosen, p.chosen = pointer<const int64_t>(chosen);
  p.train_inputs = pointer<const float>(data[0]), p.train_labels = pointer<const float>(data[1]);
  p.order = pointer<const int64_t>(data[2]);
  p.val_inputs = pointer<const float>(data[3]), p.val_labels = pointer<const float>(data[4]);
  p.train_trials = data_sizes[0], p.batches = data_sizes[1], p.val_trials = data_sizes[2];
  p.h0 = pointer<const Real>(model[0]), p.alpha = pointer<const Real>(model[1]);
  p.noise_std = pointer<const Real>(model[2]), p.activation = pointer<const int32_t>(model[3]);
  p.seeds = pointer<const int64_t>(model[4]), p.epoch = pointer<const int64_t>(model[5]);
  p.learning_rate = pointer<const Real>(learning_rate);
  p.beta1 = optimiser[0], p.beta2 = optimiser[1], p.eps = optimiser[2], p.weight_decay = optimiser[3];
  p.clip_norm = optimiser[4], p.activity_weight = optimiser[5];
  p.loss_steps = loss_steps, p.metrics_after = metrics_after;
  p.parameters = pointer<Real>(parameters), p.first_moment = pointer<Real>(first_moment);
  p.second_moment = pointer<Real>(second_moment);
  p.metrics = pointer<double>(metrics), p.workspace = pointer<char>(workspace);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().ctrnn_train_f32(p);
  } else {
    kernels().ctrnn_train_f64(p);
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNNDYN_VERSION;
  info["isa"] = kernels().isa;
  py::list supported;
  for (const char* isa : {"portable", "avx2", "avx512", "amx"})
    if (isa_supported(isa)) supported.append(isa);
  info["isa_supported"] = supported;
  info["compiler"] = __VERSION__;
  info["openmp"] = _OPENMP;
  info["openmp_max_threads"] = omp_get_max_threads();
#ifdef __SANITIZE_ADDRESS__
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  bind_steps(m);
  m.doc() = "Native kernels of rnndyn_fast over raw addresses; see rnndyn_fast/ops/_launch.py.";
  m.attr("MAX_TERMS") = kMaxTerms;
  m.def("build_info", &build_info);
  m.def("isa", [] { return std::string(kernels().isa); });  // (build_info asks the processor, which costs a while)
  m.def("select_isa", [](const std::string& name) { select_isa(name.c_str()); });
  m.def("num_chunks", &num_chunks);
  m.attr("MAX_CONV_TERMS") = kMaxConvTerms;
  m.def("fingerprint", [](Address data, int64_t size, int num_threads) {
    py::gil_scoped_release release;
    return fingerprint(pointer<const void>(data), size, num_threads);
  });
  bind_convolutions(m);
  m.def("area_step_forward_float32", &area_step_forward<float>);
  m.def("area_step_forward_float64", &area_step_forward<double>);
  m.def("area_step_backward_float32", &area_step_backward<float>);
  m.def("area_step_backward_float64", &area_step_backward<double>);
  m.def("gate_step_float32", &gate_step<float>);
  m.def("gate_step_float64", &gate_step<double>);
  m.def("readout_zones_float32", &readout_zones<float>);
  m.def("readout_zones_float64", &readout_zones<double>);
  m.def("trajectory_norms_float32", &trajectory_norms<float>);
  m.def("trajectory_norms_float64", &trajectory_norms<double>);
  m.def("ctrnn_forward_float32", &ctrnn_forward<float>);
  m.def("ctrnn_forward_float64", &ctrnn_forward<double>);
  m.def("ctrnn_forward_workspace",
        [](const CtrnnSizes& s, int threads) { return kernels().ctrnn_forward_workspace(ctrnn_shape(s), threads); });
  m.def("ctrnn_backward_float32", &ctrnn_backward<float>);
  m.def("ctrnn_backward_float64", &ctrnn_backward<double>);
  m.def("ctrnn_backward_workspace",
        [](const CtrnnSizes& s, int threads) { return kernels().ctrnn_backward_workspace(ctrnn_shape(s), threads); });
  m.def("ctrnn_train_float32", &ctrnn_train<float>);
  m.def("ctrnn_train_float64", &ctrnn_train<double>);
  m.def("ctrnn_train_workspace", [](const CtrnnSizes& s, int64_t loss_steps, int threads) {
    return kernels().ctrnn_train_workspace(ctrnn_shape(s), loss_steps, threads);
  });
}
