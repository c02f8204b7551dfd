// Python bindings of winograd_conv and amx_conv. Buffers arrive as addresses, which rnndyn_fast/ops/_launch_conv.py has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/kernel_table.h"

namespace py = pybind11;
using namespace rnndyn;

namespace {

// Scratch comes from the caller: a function of its size that returns an address.
using Scratch = py::function;

// value; modulates; drives, their bias; modulators, their bias, their sum; mean, rstd, eps.
using EpilogueTuple = std::tuple<Address, bool, std::vector<Address>, Address, std::vector<Address>, Address, Address,
                                 Address, Address, double>;

ConvEpilogue conv_epilogue(const EpilogueTuple& given, int64_t channels) {
  const auto& [value, modulates, drives, drive_bias, modulators, modulator_bias, modulator_sum, mean, rstd, eps] =
      given;
  ConvEpilogue e{};
  e.value = pointer<float>(value), e.channels = channels, e.modulates = modulates;
  e.num_drive = fill_terms(e.drive, drives, "drives");
  e.num_modulator = fill_terms(e.modulator, modulators, "modulators");
  e.drive_bias = pointer<const float>(drive_bias), e.modulator_bias = pointer<const float>(modulator_bias);
  e.modulator_sum = pointer<float>(modulator_sum);
  e.mean = pointer<float>(mean), e.rstd = pointer<float>(rstd), e.eps = eps;
  if (modulates && drives.empty()) throw std::invalid_argument("drives: a modulator needs a drive to multiply");
  if ((e.mean == nullptr) != (e.rstd == nullptr)) throw std::invalid_argument("mean, rstd: expected both or neither");
  return e;
}

WinogradForm winograd_form(const std::array<int, 2>& form) {
  const std::array<int, 2> known[] = {{5, 2}, {6, 3}, {8, 3}, {8, 4}, {6, 5}, {8, 5}};
  for (const auto& f : known)
    if (f == form) return {form[0], form[1]};
  throw std::invalid_argument("form: expected (patch, kernel) (5, 2), (6, 3), (8, 3), (8, 4), (6, 5) or (8, 5)");
}

void check_by_taps(const WinogradForm& form) {
  if (form.kernel != 3)
    throw std::invalid_argument("by_taps: expected a kernel of 3, got " + std::to_string(form.kernel));
}

GridStrides grid_strides(const std::array<int64_t, 3>& strides) { return {strides[0], strides[1], strides[2]}; }

using Taps = std::vector<std::vector<int>>;

void fill_taps(int (&out)[kMaxPhases][kMaxTaps], const Taps& taps, int kernel) {
  if (taps.empty() || taps.size() > kMaxPhases) throw std::invalid_argument("taps: expected 1 to 4 phases");
  for (size_t p = 0; p < taps.size(); ++p) {
    if (taps[p].size() != size_t(kernel) * kernel)
      throw std::invalid_argument("taps: expected kernel * kernel entries");
    for (size_t k = 0; k < taps[p].size(); ++k) out[p][k] = taps[p][k];
  }
}

// shape: samples, height, width of the grids, and output channels. terms: address, strides, channels, packed address, vanishing frequencies
// and shift each, and whether taps are packed; phases: address and vanishing frequencies.
using Pair = std::array<int, 2>;
using ConvTerm = std::tuple<Address, std::array<int64_t, 3>, int64_t, Address, Pair, Pair, bool>;
using Phase = std::tuple<Address, Pair>;

WinogradConvParams winograd_conv_params(const std::array<int, 2>& form, int pad, const Shape& shape, int num_threads,
                                        const std::vector<ConvTerm>& terms, const std::vector<Phase>& y,
                                        const std::array<int64_t, 3>& y_strides) {
  if (terms.empty() || terms.size() > kMaxConvTerms || y.empty() || y.size() > kMaxPhases)
    throw std::invalid_argument("terms: expected 1 to 8 terms and 1 to 4 phases, got " + std::to_string(terms.size()) +
                                " and " + std::to_string(y.size()));
  WinogradConvParams p{};
  p.form = winograd_form(form), p.pad = pad;
  p.samples = shape[0], p.height = shape[1], p.width = shape[2], p.out_channels = shape[3];
  p.num_threads = num_threads;
  p.num_terms = static_cast<int>(terms.size()), p.num_phases = static_cast<int>(y.size());
  for (size_t k = 0; k < terms.size(); ++k) {
    const auto& [x, strides, channels, packed, vanishing, shift, by_taps] = terms[k];
    if (by_taps) check_by_taps(p.form);
    p.term[k] = {pointer<const float>(x),      grid_strides(strides), channels, pointer<const float>(packed),
                 {vanishing[0], vanishing[1]}, {shift[0], shift[1]},  by_taps};
  }
  for (size_t k = 0; k < y.size(); ++k) {
    const auto& [address, vanishing] = y[k];
    p.y[k] = pointer<float>(address), p.vanishing[k] = {vanishing[0], vanishing[1]};
  }
  p.y_strides = grid_strides(y_strides);
  return p;
}

void winograd_conv(const std::array<int, 2>& form, int pad, const Shape& shape, int num_threads,
                   const std::vector<ConvTerm>& terms, const std::vector<Phase>& y,
                   const std::array<int64_t, 3>& y_strides, bool accumulate,
                   const std::optional<EpilogueTuple>& epilogue, const Scratch& workspace) {
  WinogradConvParams p = winograd_conv_params(form, pad, shape, num_threads, terms, y, y_strides);
  p.accumulate = accumulate;
  const ConvEpilogue e = epilogue ? conv_epilogue(*epilogue, p.out_channels) : ConvEpilogue{};
  p.epilogue = epilogue ? &e : nullptr;
  p.workspace = pointer<float>(workspace(4 * kernels().winograd_conv_workspace(p)).cast<Address>());
  py::gil_scoped_release release;
  kernels().winograd_conv(p);
}

// Sizes: output and input channels, and the strides of both in the parameter.
WinogradPackParams winograd_pack_params(const std::array<int, 2>& form, const Taps& taps,
                                        const std::array<int64_t, 4>& sizes, bool by_taps) {
  WinogradPackParams p{};
  p.form = winograd_form(form), p.by_taps = by_taps;
  if (by_taps) check_by_taps(p.form);
  fill_taps(p.tap, taps, p.form.kernel);
  p.num_phases = static_cast<int>(taps.size());
  p.out_channels = sizes[0], p.in_channels = sizes[1], p.out_stride = sizes[2], p.in_stride = sizes[3];
  return p;
}

int64_t winograd_packed_size(const std::array<int, 2>& form, const Taps& taps, const std::array<int64_t, 4>& sizes,
                             bool by_taps) {
  return kernels().winograd_packed_size(winograd_pack_params(form, taps, sizes, by_taps));
}

void winograd_pack_weight(const std::array<int, 2>& form, const Taps& taps, const std::array<int64_t, 4>& sizes,
                          bool by_taps, int num_threads, Address weight, Address packed) {
  WinogradPackParams p = winograd_pack_params(form, taps, sizes, by_taps);
  p.num_threads = num_threads;
  p.weight = pointer<const float>(weight), p.packed = pointer<float>(packed);
  py::gil_scoped_release release;
  kernels().winograd_pack_weight(p);
}

WinogradWeightGradParams winograd_weight_grad_params(const std::array<int, 2>& form, int pad, const Taps& taps,
                                                     const std::array<int64_t, 3>& grid,
                                                     const std::array<int64_t, 4>& sizes, int num_threads) {
  WinogradWeightGradParams p{};
  p.form = winograd_form(form), p.pad = pad;
  fill_taps(p.tap, taps, p.form.kernel);
  p.num_phases = static_cast<int>(taps.size());
  p.samples = grid[0], p.height = grid[1], p.width = grid[2];
  p.out_channels = sizes[0], p.in_channels = sizes[1], p.out_stride = sizes[2], p.in_stride = sizes[3];
  p.num_threads = num_threads;
  return p;
}

void winograd_weight_grad(const std::array<int, 2>& form, int pad, const Taps& taps, const std::array<int64_t, 3>& grid,
                          const std::array<int64_t, 4>& sizes, int num_threads, Address x,
                          const std::array<int64_t, 3>& x_strides, const Pair& shift, const std::vector<Phase>& grad,
                          const std::array<int64_t, 3>& grad_strides, Address grad_weight, bool accumulate,
                          const Scratch& workspace, const Scratch& sums) {
  WinogradWeightGradParams p = winograd_weight_grad_params(form, pad, taps, grid, sizes, num_threads);
  if (grad.size() != taps.size()) throw std::invalid_argument("grad: expected one grid per phase");
  p.x = pointer<const float>(x), p.x_strides = grid_strides(x_strides), p.shift = {shift[0], shift[1]};
  for (size_t k = 0; k < grad.size(); ++k) {
    const auto& [address, vanishing] = grad[k];
    p.grad[k] = pointer<const float>(address), p.vanishing[k] = {vanishing[0], vanishing[1]};
  }
  p.grad_strides = grid_strides(grad_strides);
  p.grad_weight = pointer<float>(grad_weight), p.accumulate = accumulate;
  p.sums = pointer<float>(sums(4 * kernels().winograd_weight_grad_sums(p)).cast<Address>());
  p.workspace = pointer<float>(workspace(4 * kernels().winograd_weight_grad_workspace(p)).cast<Address>());
  py::gil_scoped_release release;
  kernels().winograd_weight_grad(p);
}

// ---------------------------------------------------------------- amx_conv

using AmxTaps = std::vector<std::array<int, 3>>;  // row, column, index

int fill_amx_taps(AmxTap* tap, const AmxTaps& taps) {
  if (taps.empty() || taps.size() > kAmxMaxTaps)
    throw std::invalid_argument("taps: expected 1 to 128 of them, got " + std::to_string(taps.size()));
  for (size_t t = 0; t < taps.size(); ++t) tap[t] = {taps[t][0], taps[t][1], taps[t][2]};
  return static_cast<int>(taps.size());
}

// input: samples, height, width, channels. phases: taps, height and width of the grid, addresses of packed weights and of y each.
// weight_strides: of the parameter's output and input channels, where the weights are the parameter; zero where they are packed.
using AmxPhaseTuple = std::tuple<AmxTaps, int64_t, int64_t, Address, Address>;

void amx_conv(const Shape& input, int64_t out_channels, int in_step, int parts, bool accumulate, int num_threads,
              Address x, const std::vector<AmxPhaseTuple>& phases, const std::array<int64_t, 2>& weight_strides,
              const std::array<int64_t, 3>& y_strides, const std::optional<EpilogueTuple>& epilogue,
              const Scratch& workspace) {
  if (phases.empty() || phases.size() > kAmxMaxPhases)
    throw std::invalid_argument("phases: expected 1 to 16 of them, got " + std::to_string(phases.size()));
  std::vector<AmxPhase> grids(phases.size());
  for (size_t k = 0; k < phases.size(); ++k) {
    const auto& [taps, height, width, packed, y] = phases[k];
    grids[k].num_taps = fill_amx_taps(grids[k].tap, taps);
    grids[k].height = height, grids[k].width = width;
    grids[k].packed = weight_strides[0] == 0 ? pointer<const uint16_t>(packed) : nullptr;
    grids[k].weight = weight_strides[0] == 0 ? nullptr : pointer<const float>(packed);
    grids[k].y = pointer<float>(y);
  }
  AmxConvParams p{};
  p.samples = input[0], p.in_height = input[1], p.in_width = input[2], p.in_channels = input[3],
  p.out_channels = out_channels;
  p.in_step = in_step, p.parts = parts, p.accumulate = accumulate, p.num_threads = num_threads;
  p.x = pointer<const float>(x), p.y_strides = grid_strides(y_strides);
  p.out_stride = weight_strides[0], p.in_stride = weight_strides[1];
  p.phase = grids.data(), p.num_phases = static_cast<int>(grids.size());
  const ConvEpilogue e = epilogue ? conv_epilogue(*epilogue, out_channels) : ConvEpilogue{};
  p.epilogue = epilogue ? &e : nullptr;
  p.workspace = pointer<void>(workspace(kernels().amx_conv_workspace(p)).cast<Address>());
  py::gil_scoped_release release;
  kernels().amx_conv(p);
}

// sizes: output and input channels, and the strides of both in the parameter.
AmxPackParams amx_pack_params(const AmxTap* tap, int num_taps, const std::array<int64_t, 4>& sizes, int parts) {
  AmxPackParams p{};
  p.tap = tap, p.num_taps = num_taps, p.parts = parts;
  p.out_channels = sizes[0], p.in_channels = sizes[1], p.out_stride = sizes[2], p.in_stride = sizes[3];
  return p;
}

int64_t amx_packed_size(const AmxTaps& taps, const std::array<int64_t, 4>& sizes, int parts) {
  return kernels().amx_packed_size(amx_pack_params(nullptr, static_cast<int>(taps.size()), sizes, parts));
}

void amx_pack_weight(const AmxTaps& taps, const std::array<int64_t, 4>& sizes, int parts, int num_threads,
                     Address weight, Address packed) {
  AmxTap tap[kAmxMaxTaps];
  AmxPackParams p = amx_pack_params(tap, fill_amx_taps(tap, taps), sizes, parts);
  p.num_threads = num_threads, p.weight = pointer<const float>(weight), p.packed = pointer<uint16_t>(packed);
  py::gil_scoped_release release;
  kernels().amx_pack_weight(p);
}

// input: of x, as above. grid: height and width of grad. sizes: as above.
void amx_weight_grad(const Shape& input, const std::array<int64_t, 2>& grid, const AmxTaps& taps,
                     const std::array<int64_t, 4>& sizes, int in_step, int parts, int num_threads, Address x,
                     Address grad, Address grad_weight, bool accumulate, const Scratch& workspace) {
  AmxTap tap[kAmxMaxTaps];
  AmxWeightGradParams p{};
  p.tap = tap, p.num_taps = fill_amx_taps(tap, taps);
  p.samples = input[0], p.in_height = input[1], p.in_width = input[2], p.in_channels = input[3];
  p.height = grid[0], p.width = grid[1];
  p.out_channels = sizes[0], p.out_stride = sizes[2];
  if (sizes[3] != p.num_taps)
    throw std::invalid_argument("sizes: expected kernels of as many elements as there are taps, " +
                                std::to_string(p.num_taps) + ", got " + std::to_string(sizes[3]));
  p.in_step = in_step, p.parts = parts, p.num_threads = num_threads, p.accumulate = accumulate;
  p.x = pointer<const float>(x), p.grad = pointer<const float>(grad), p.grad_weight = pointer<float>(grad_weight);
  p.workspace = pointer<void>(workspace(kernels().amx_weight_grad_workspace(p)).cast<Address>());
  py::gil_scoped_release release;
  kernels().amx_weight_grad(p);
}

}  // namespace

void rnndyn::bind_convolutions(py::module_& m) {
  m.def("winograd_conv", &winograd_conv);
  m.def("winograd_pack_weight", &winograd_pack_weight);
  m.def("winograd_packed_size", &winograd_packed_size);
  m.def("winograd_weight_grad", &winograd_weight_grad);
  m.def("amx_conv", &amx_conv);
  m.def("amx_packed_size", &amx_packed_size);
  m.def("amx_pack_weight", &amx_pack_weight);
  m.def("amx_weight_grad", &amx_weight_grad);
}
