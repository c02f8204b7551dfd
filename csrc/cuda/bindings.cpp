// The Python module rnndyn_fast._cuda: the CUDA kernels over raw addresses (0: absent), sizes and a stream. It links neither torch nor
// the shared CUDA runtime, and only rnndyn_fast/ops/_launch_cuda.py calls it, which has checked shapes, dtypes, devices and contiguity by then.
// The same file makes the tests' module _simt, whose kernels run in the SIMT harness.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/area_step.h"
#include "cuda/bindings.h"
#include "cuda/ctrnn.h"
#include "cuda/gate_step.h"
#include "cuda/readout_zones.h"
#include "cuda/recurrent_conv.h"

namespace py = pybind11;
using namespace rnndyn::cuda;

namespace {

// As by_dtype, for kernels on tensor cores.
template <typename F>
auto by_half_dtype(const std::string& dtype, F f) {
  if (dtype == "float16") return f(Half{});
  if (dtype == "bfloat16") return f(BFloat16{});
  throw std::invalid_argument("dtype: expected float16 or bfloat16, got " + dtype);
}

template <typename T>
int fill_terms(const T* (&out)[kMaxTerms], const std::vector<Address>& terms, const char* name) {
  if (terms.size() > kMaxTerms)
    throw std::invalid_argument(std::string(name) + ": at most " + std::to_string(kMaxTerms) + " terms, got " +
                                std::to_string(terms.size()));
  for (size_t i = 0; i < kMaxTerms; ++i) out[i] = i < terms.size() ? pointer<const T>(terms[i]) : nullptr;
  return static_cast<int>(terms.size());
}

// Sizes within a sample are int in the kernels.
template <typename Params>
void fill_shape(Params* p, const Shape& shape) {
  if (shape[1] * shape[2] * shape[3] >= int64_t(1) << 31)
    throw std::invalid_argument("shape: a map [H, W, C] must have fewer than 2^31 elements");
  p->samples = shape[0];
  p->height = static_cast<int>(shape[1]), p->width = static_cast<int>(shape[2]),
  p->channels = static_cast<int>(shape[3]);
}

std::array<int, 4> moment_groups(const std::string& dtype, int height, int width, int channels) {
  const MomentGroups g =
      by_dtype(dtype, [&](auto t) { return area_step_moment_groups<decltype(t)>(height, width, channels); });
  return {g.groups, g.period, g.count, g.last_count};
}

std::array<int, 2> backward_scratch(const std::string& dtype, int64_t samples, int height, int width, int channels) {
  const AreaStepScratch s = by_dtype(
      dtype, [&](auto t) { return area_step_backward_scratch<decltype(t)>(samples, height, width, channels); });
  return {s.slots, s.splits};
}

void area_step_forward(const std::string& dtype, const Queue& queue, const Shape& shape,
                       const std::vector<Address>& drive, Address drive_bias, const std::vector<Address>& modulator,
                       Address modulator_bias, bool modulator_complete, bool value_complete, Address gamma,
                       Address beta, float eps, bool rectify, Address value, Address modulator_sum, Address state,
                       Address max_pooled, Address argmax, Address mean_pooled, Address mean, Address rstd,
                       Address moments, const std::array<int, 4>& moment_groups) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    AreaStepForwardParams<T> p{};
    fill_shape(&p, shape);
    p.num_drive = fill_terms(p.drive, drive, "drive");
    p.drive_bias = pointer<const float>(drive_bias);
    p.num_modulator = fill_terms(p.modulator, modulator, "modulator");
    p.modulator_bias = pointer<const float>(modulator_bias);
    p.modulator_complete = modulator_complete, p.value_complete = value_complete;
    p.gamma = pointer<const float>(gamma), p.beta = pointer<const float>(beta), p.eps = eps, p.rectify = rectify;
    p.value = pointer<T>(value), p.modulator_sum = pointer<T>(modulator_sum), p.state = pointer<T>(state);
    p.max_pooled = pointer<T>(max_pooled), p.argmax = pointer<uint8_t>(argmax), p.mean_pooled = pointer<T>(mean_pooled);
    p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd), p.moments = pointer<float>(moments);
    p.moment_groups = {moment_groups[0], moment_groups[1], moment_groups[2], moment_groups[3]};
    if (p.gamma != nullptr && (beta == 0 || value == 0 || mean == 0 || rstd == 0 || moments == 0))
      throw std::invalid_argument("gamma: a norm needs beta, value, mean, rstd and moments");
    launch_area_step_forward(p, pointer<void>(queue.second));
  });
}

void area_step_backward(const std::string& dtype, const Queue& queue, const Shape& shape,
                        const std::vector<Address>& grad_state, Address grad_max_pooled, Address argmax,
                        Address grad_mean_pooled, bool multiplicative, Address value, const std::vector<Address>& drive,
                        Address drive_bias, Address modulator_sum, Address mean, Address rstd, Address gamma,
                        Address beta, bool rectify, Address grad_drive, Address grad_drive_sum, Address grad_modulator,
                        Address grad_gamma, Address grad_beta, Address sums, Address affine) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    AreaStepBackwardParams<T> p{};
    fill_shape(&p, shape);
    p.num_grad_state = fill_terms(p.grad_state, grad_state, "grad_state");
    p.grad_max_pooled = pointer<const T>(grad_max_pooled), p.argmax = pointer<const uint8_t>(argmax);
    p.grad_mean_pooled = pointer<const T>(grad_mean_pooled);
    p.multiplicative = multiplicative, p.value = pointer<const T>(value);
    p.num_drive = fill_terms(p.drive, drive, "drive");
    p.drive_bias = pointer<const float>(drive_bias), p.modulator_sum = pointer<const T>(modulator_sum);
    p.mean = pointer<const float>(mean), p.rstd = pointer<const float>(rstd);
    p.gamma = pointer<const float>(gamma), p.beta = pointer<const float>(beta), p.rectify = rectify;
    p.grad_drive = pointer<T>(grad_drive), p.grad_drive_sum = pointer<float>(grad_drive_sum),
    p.grad_modulator = pointer<T>(grad_modulator);
    p.grad_gamma = pointer<float>(grad_gamma), p.grad_beta = pointer<float>(grad_beta);
    p.sums = pointer<float>(sums), p.affine = pointer<float>(affine);
    const AreaStepScratch scratch = area_step_backward_scratch<T>(p.samples, p.height, p.width, p.channels);
    p.slots = scratch.slots, p.splits = scratch.splits;
    if (p.gamma != nullptr && (grad_gamma == 0 || grad_beta == 0 || sums == 0 || affine == 0 || mean == 0 || rstd == 0))
      throw std::invalid_argument("gamma: a norm needs mean, rstd, grad_gamma, grad_beta, sums and affine");
    if (p.grad_max_pooled != nullptr && p.argmax == nullptr)
      throw std::invalid_argument("argmax: needed with grad_max_pooled");
    launch_area_step_backward(p, pointer<void>(queue.second));
  });
}

// shape: T, N, D, C. strides: of the representations' steps and samples, and of the previous rows.
void readout_zones(const std::string& dtype, const Queue& queue, const Shape& shape, Address representations,
                   Address previous, const std::array<int64_t, 3>& strides, Address log_probs, Address labels,
                   Address bias, Address weight_norm, Address inverse_distance, Address cosine,
                   const std::array<Address, 7>& tables) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    ReadoutZonesParams<T> p{};
    p.timesteps = shape[0], p.samples = shape[1];
    p.dims = static_cast<int>(shape[2]), p.classes = static_cast<int>(shape[3]);
    p.representations = pointer<const T>(representations), p.previous = pointer<const T>(previous);
    p.time_stride = strides[0], p.sample_stride = strides[1], p.previous_stride = strides[2];
    p.log_probs = pointer<const float>(log_probs), p.labels = pointer<const int64_t>(labels),
    p.bias = pointer<const float>(bias);
    p.weight_norm = pointer<const float>(weight_norm), p.inverse_distance = pointer<const float>(inverse_distance);
    p.cosine = pointer<float>(cosine), p.predicted = pointer<int64_t>(tables[0]);
    float** floats[] = {&p.norm, &p.cos_predicted, &p.cos_label, &p.margin, &p.boundary_distance, &p.change};
    for (int i = 0; i < 6; ++i) *floats[i] = pointer<float>(tables[i + 1]);
    launch_readout_zones(p, pointer<void>(queue.second));
  });
}

std::array<int, 4> as_array(const MomentGroups& g) { return {g.groups, g.period, g.count, g.last_count}; }

// Rows and columns of a tile, and the groups of moments.
int weight_grad_splits(const std::string& dtype, int device, int64_t samples, int height, int width, int row_channels,
                       int gathered_channels, int kernel) {
  const DeviceGuard guard(device);
  return by_half_dtype(dtype, [&](auto t) {
    return recurrent_conv_weight_grad_splits<decltype(t)>(samples, height, width, row_channels, gathered_channels,
                                                          kernel);
  });
}

std::tuple<int, int, std::array<int, 4>> conv_tiles(int64_t samples, int height, int width, int channels) {
  const ConvTiles tiles = recurrent_conv_tiles(samples, height, width, channels);
  return {tiles.rows, tiles.columns, as_array(tiles.moment_groups)};
}

// Addresses of x and weight; height, width and channels of x, kernel, stride, pad; transposed.
using Term = std::tuple<Address, Address, std::array<int, 6>, bool>;

void recurrent_conv(const std::string& dtype, const Queue& queue, const Shape& shape, const std::vector<Term>& terms,
                    Address bias, const std::vector<Address>& added, Address drive, Address value,
                    Address modulator_sum, Address moments) {
  if (terms.empty() || terms.size() > kMaxConvTerms)
    throw std::invalid_argument("terms: expected 1 to " + std::to_string(kMaxConvTerms) + ", got " +
                                std::to_string(terms.size()));
  const DeviceGuard guard(queue.first);
  by_half_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    RecurrentConvParams<T> p{};
    fill_shape(&p, shape);
    p.num_terms = static_cast<int>(terms.size());
    for (size_t k = 0; k < terms.size(); ++k) {
      const auto& [x, weight, sizes, transposed] = terms[k];
      p.term[k] = {
          pointer<const T>(x), pointer<const T>(weight), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
          transposed};
    }
    p.bias = pointer<const float>(bias);
    p.num_added = fill_terms(p.added, added, "added");
    p.drive = pointer<const T>(drive);
    p.value = pointer<T>(value), p.modulator_sum = pointer<T>(modulator_sum), p.moments = pointer<float>(moments);
    launch_recurrent_conv(p, pointer<void>(queue.second));
  });
}

// rows, gathered: address, and height, width and channels. window: kernel, stride, pad.
using Map = std::pair<Address, std::array<int, 3>>;

void recurrent_conv_weight_grad(const std::string& dtype, const Queue& queue, int64_t samples, const Map& rows,
                                const Map& gathered, const std::array<int, 3>& window, int splits, Address partial,
                                Address grad_weight) {
  const DeviceGuard guard(queue.first);
  by_half_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    ConvWeightGradParams<T> p{};
    p.samples = samples;
    p.rows = pointer<const T>(rows.first), p.height = rows.second[0], p.width = rows.second[1],
    p.row_channels = rows.second[2];
    p.gathered = pointer<const T>(gathered.first);
    p.gathered_height = gathered.second[0], p.gathered_width = gathered.second[1],
    p.gathered_channels = gathered.second[2];
    p.kernel = window[0], p.stride = window[1], p.pad = window[2];
    p.splits = splits, p.partial = pointer<float>(partial), p.grad_weight = pointer<float>(grad_weight);
    launch_recurrent_conv_weight_grad(p, pointer<void>(queue.second));
  });
}

// tau, gate: constant, factor and slope. Lists of ports and states are in the order of the cell; biases and sums that are absent are 0.
void gate_step(const std::string& dtype, const Queue& queue, int rule, int64_t pixels, int channels, float forget_bias,
               const std::array<float, 3>& tau, const std::array<float, 3>& gate, int activation,
               const std::vector<std::vector<Address>>& ports, const std::vector<Address>& biases,
               const std::vector<Address>& sums, const std::vector<Address>& states,
               const std::vector<Address>& grad_ports, bool backward) {
  if (ports.empty() || ports.size() > kMaxPorts || states.empty() || states.size() > kMaxStates)
    throw std::invalid_argument("ports, states: expected at most " + std::to_string(kMaxPorts) + " and " +
                                std::to_string(kMaxStates) + ", and some");
  if (backward ? grad_ports.size() != ports.size() : sums.size() != ports.size() || biases.size() != ports.size())
    throw std::invalid_argument("biases, sums, grad_ports: expected one per port");
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    GateStepParams<T> p{};
    p.rule = static_cast<GateRule>(rule), p.pixels = pixels, p.channels = channels, p.forget_bias = forget_bias;
    p.tau = {tau[0], tau[1], tau[2]}, p.gate = {gate[0], gate[1], gate[2]};
    p.activation = static_cast<GateActivation>(activation);
    for (size_t k = 0; k < ports.size(); ++k) {
      if (ports[k].empty() || ports[k].size() > (backward ? 1 : kMaxPortTerms))
        throw std::invalid_argument("ports: expected 1 to " + std::to_string(kMaxPortTerms) + " terms (backward: 1)");
      p.num_terms[k] = static_cast<int>(ports[k].size());
      for (size_t i = 0; i < ports[k].size(); ++i) p.terms[k][i] = pointer<const T>(ports[k][i]);
      if (backward) {
        p.grad_port[k] = pointer<T>(grad_ports[k]);
      } else {
        p.bias[k] = pointer<const float>(biases[k]), p.sum[k] = pointer<T>(sums[k]);
        if ((ports[k].size() > 1 || biases[k] != 0) && sums[k] == 0)
          throw std::invalid_argument("sums: needed where a port has several terms or a bias");
      }
    }
    for (size_t k = 0; k < states.size(); ++k) {
      if (backward) {
        p.grad_state[k] = pointer<const T>(states[k]);
      } else {
        p.state[k] = pointer<T>(states[k]);
      }
    }
    launch_gate_step(p, backward, pointer<void>(queue.second));
  });
}

CtrnnParams ctrnn_params(const std::array<int64_t, 5>& sizes) {
  CtrnnParams p{};
  p.shape = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};  // M, N, T, I, H
  return p;
}

void ctrnn_forward(const Queue& queue, const std::array<int64_t, 5>& sizes, Address inputs, int64_t input_model_stride,
                   Address w_rec, Address b_rec, Address w_in, Address h0, Address alpha, Address noise_std,
                   Address activation, Address seeds, uint32_t stream, uint32_t first_trial, Address rates,
                   Address states) {
  const DeviceGuard guard(queue.first);
  CtrnnParams p = ctrnn_params(sizes);
  p.inputs = pointer<const float>(inputs), p.input_model_stride = input_model_stride;
  p.w_rec = pointer<const float>(w_rec), p.b_rec = pointer<const float>(b_rec), p.w_in = pointer<const float>(w_in);
  p.h0 = pointer<const float>(h0), p.alpha = pointer<const float>(alpha), p.noise_std = pointer<const float>(noise_std);
  p.activation = pointer<const int32_t>(activation), p.seeds = pointer<const int64_t>(seeds);
  p.stream = stream, p.first_trial = first_trial;
  p.rates = pointer<float>(rates), p.states = pointer<float>(states);
  launch_ctrnn_forward(p, pointer<void>(queue.second));
}

void ctrnn_backward(const Queue& queue, const std::array<int64_t, 5>& sizes, Address w_rec_t, Address h0, Address alpha,
                    Address activation, Address rates, Address grad_rates, Address grad_states, Address d,
                    Address grad_h0, Address rates0) {
  const DeviceGuard guard(queue.first);
  CtrnnParams p = ctrnn_params(sizes);
  p.w_rec = pointer<const float>(w_rec_t), p.h0 = pointer<const float>(h0), p.alpha = pointer<const float>(alpha);
  p.activation = pointer<const int32_t>(activation), p.rates = pointer<float>(rates);
  p.grad_rates = pointer<const float>(grad_rates), p.grad_states = pointer<const float>(grad_states);
  p.d = pointer<float>(d), p.grad_h0 = pointer<float>(grad_h0), p.rates0 = pointer<float>(rates0);
  launch_ctrnn_backward(p, pointer<void>(queue.second));
}

}  // namespace

PYBIND11_MODULE(RNNDYN_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of rnndyn_fast over raw addresses; see rnndyn_fast/ops/_launch_cuda.py.";
  m.attr("MAX_TERMS") = kMaxTerms;
  m.def("area_step_moment_groups", &moment_groups);
  m.def("area_step_backward_scratch", &backward_scratch);
  m.def("area_step_forward", &area_step_forward);
  m.def("area_step_backward", &area_step_backward);
  m.def("readout_zones", &readout_zones);
  m.attr("MAX_CONV_TERMS") = kMaxConvTerms;
  m.def("recurrent_conv_tiles", &conv_tiles);
  m.def("recurrent_conv", &recurrent_conv);
  m.def("recurrent_conv_weight_grad_splits", &weight_grad_splits);
  m.def("recurrent_conv_weight_grad", &recurrent_conv_weight_grad);
  m.def("gate_step", &gate_step);
  m.def("ctrnn_max_units", &ctrnn_max_units);
  m.def("ctrnn_forward", &ctrnn_forward);
  m.def("ctrnn_backward", &ctrnn_backward);
  bind_steps(m);
  bind_environment(m);
}
