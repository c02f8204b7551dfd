// The fields of winograd_conv's and amx_conv's parameters by name (see launch_fields.h), and their lists of terms, phases and taps.
#pragma once
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cpu/launch_fields.h"

namespace rnndyn {

// ---------------------------------------------------------------- what both have

inline void strides_field(FieldReader& v, const char* name, GridStrides& s) {
  expect(v.numbers(name, s.sample, s.row, s.column), "expected strides of samples, rows and columns");
}

// Whether there is an epilogue: where the convolution's result lies.
inline bool epilogue_fields(FieldReader& v, ConvEpilogue& e, int64_t channels) {
  v("end", e.value), v.list("drives", e.drive, e.num_drive), v("drive_bias", e.drive_bias);
  v.list("modulators", e.modulator, e.num_modulator), v("modulator_bias", e.modulator_bias);
  v("modulates", e.modulates), v("modulator_sum", e.modulator_sum), v("mean", e.mean), v("rstd", e.rstd);
  if (!v.numbers("end_eps", e.eps)) e.eps = 0;
  e.channels = channels;
  expect(!e.modulates || e.num_drive > 0, "drives: a modulator needs a drive to multiply");
  expect((e.mean == nullptr) == (e.rstd == nullptr), "mean, rstd: expected both or neither");
  return e.value != nullptr;
}

// ---------------------------------------------------------------- winograd_conv

inline void form_field(FieldReader& v, WinogradForm& form) {
  v.numbers("form", form.patch, form.kernel);
  const std::array<int, 2> known[] = {{5, 2}, {6, 3}, {8, 3}, {8, 4}, {6, 5}, {8, 5}};
  for (const auto& [patch, kernel] : known)
    if (patch == form.patch && kernel == form.kernel) return;
  throw std::invalid_argument("form: expected (patch, kernel) (5, 2), (6, 3), (8, 3), (8, 4), (6, 5) or (8, 5)");
}

inline void check_by_taps(const WinogradForm& form, bool by_taps) {
  if (by_taps && form.kernel != 3)
    throw std::invalid_argument("by_taps: expected a kernel of 3, got " + std::to_string(form.kernel));
}

inline int taps_field(FieldReader& v, int (&out)[kMaxPhases][kMaxTaps], int kernel) {
  const size_t phases = v.each("taps", kMaxPhases, [&](size_t k, py::handle phase) {
    const auto taps = phase.cast<std::vector<int>>();
    expect(taps.size() == size_t(kernel) * kernel, "taps: expected kernel * kernel entries");
    std::copy(taps.begin(), taps.end(), out[k]);
  });
  expect(phases > 0, "taps: expected 1 to 4 phases");
  return static_cast<int>(phases);
}

inline void vanishing_of(py::handle given, Vanishing& out) {
  const auto [row, column] = given.cast<std::pair<int, int>>();
  out = {row, column};
}

// Output and input channels, and the strides of both in the parameter.
template <typename P>
void sizes_field(FieldReader& v, P& p) {
  expect(v.numbers("sizes", p.out_channels, p.in_channels, p.out_stride, p.in_stride), "sizes: missing");
}

struct WinogradConvLaunch {
  WinogradConvParams p;
  ConvEpilogue epilogue;
  bool ends;
};

// terms: address, strides, channels, packed weight, vanishing frequencies, shift, whether taps are packed. phases: address, frequencies.
inline void fields(FieldReader& v, WinogradConvLaunch& launch) {
  WinogradConvParams& p = launch.p;
  form_field(v, p.form);
  v("pad", p.pad), v("samples", p.samples), v("height", p.height), v("width", p.width);
  v("out_channels", p.out_channels), v("num_threads", p.num_threads), v("accumulate", p.accumulate);
  p.num_terms = static_cast<int>(v.each("terms", kMaxConvTerms, [&](size_t k, py::handle given) {
    const py::sequence item = py::reinterpret_borrow<py::sequence>(given);
    WinogradTerm& term = p.term[k];
    v.address(py::object(item[0]), term.x);
    const auto strides = py::object(item[1]).cast<std::array<int64_t, 3>>();
    term.strides = {strides[0], strides[1], strides[2]};
    v.number(py::object(item[2]), "channels", term.channels);
    v.address(py::object(item[3]), term.packed);
    vanishing_of(py::object(item[4]), term.vanishing);
    const auto [row, column] = py::object(item[5]).cast<std::pair<int, int>>();
    term.shift = {row, column};
    term.by_taps = py::object(item[6]).cast<bool>();
    check_by_taps(p.form, term.by_taps);
  }));
  p.num_phases = static_cast<int>(v.each("phases", kMaxPhases, [&](size_t k, py::handle given) {
    const py::sequence item = py::reinterpret_borrow<py::sequence>(given);
    v.address(py::object(item[0]), p.y[k]);
    vanishing_of(py::object(item[1]), p.vanishing[k]);
  }));
  expect(p.num_terms > 0 && p.num_phases > 0, "terms, phases: expected 1 to 8 terms and 1 to 4 phases");
  strides_field(v, "y_strides", p.y_strides);
  launch.ends = epilogue_fields(v, launch.epilogue, p.out_channels);
}
inline WinogradConvParams with_epilogue(const WinogradConvLaunch& launch) {
  WinogradConvParams p = launch.p;
  p.epilogue = launch.ends ? &launch.epilogue : nullptr;
  return p;
}
inline void scratch(ScratchCutter& s, WinogradConvLaunch& launch) {
  s(launch.p.workspace, kernels().winograd_conv_workspace(with_epilogue(launch)));
}
inline void run(const WinogradConvLaunch& launch, void*) { kernels().winograd_conv(with_epilogue(launch)); }

inline void fields(FieldReader& v, WinogradPackParams& p) {
  form_field(v, p.form), v("by_taps", p.by_taps), check_by_taps(p.form, p.by_taps);
  p.num_phases = taps_field(v, p.tap, p.form.kernel), sizes_field(v, p);
  v("num_threads", p.num_threads), v("weight", p.weight), v("packed", p.packed);
}
inline void run(const WinogradPackParams& p, void*) { kernels().winograd_pack_weight(p); }

// phases: address of the gradient and frequencies of each.
inline void fields(FieldReader& v, WinogradWeightGradParams& p) {
  form_field(v, p.form), v("pad", p.pad);
  p.num_phases = taps_field(v, p.tap, p.form.kernel), sizes_field(v, p);
  v("samples", p.samples), v("height", p.height), v("width", p.width), v("num_threads", p.num_threads);
  v("x", p.x), strides_field(v, "x_strides", p.x_strides), v.numbers("shift", p.shift.row, p.shift.column);
  const size_t grids = v.each("phases", kMaxPhases, [&](size_t k, py::handle given) {
    const py::sequence item = py::reinterpret_borrow<py::sequence>(given);
    v.address(py::object(item[0]), p.grad[k]);
    vanishing_of(py::object(item[1]), p.vanishing[k]);
  });
  expect(grids == size_t(p.num_phases), "phases: expected one grid per phase of the taps");
  strides_field(v, "grad_strides", p.grad_strides);
  v("grad_weight", p.grad_weight), v("accumulate", p.accumulate);
}
inline void scratch(ScratchCutter& s, WinogradWeightGradParams& p) {
  s.room(p.sums, kernels().winograd_weight_grad_sums(p));
  s(p.workspace, kernels().winograd_weight_grad_workspace(p));
}
inline void run(const WinogradWeightGradParams& p, void*) { kernels().winograd_weight_grad(p); }

// ---------------------------------------------------------------- amx_conv

// Row, column and element of the kernel of each tap.
inline int amx_taps(py::handle given, AmxTap* tap) {
  const auto taps = given ? given.cast<std::vector<std::array<int, 3>>>() : std::vector<std::array<int, 3>>();
  if (taps.empty() || taps.size() > kAmxMaxTaps)
    throw std::invalid_argument("taps: expected 1 to 128 of them, got " + std::to_string(taps.size()));
  for (size_t t = 0; t < taps.size(); ++t) tap[t] = {taps[t][0], taps[t][1], taps[t][2]};
  return static_cast<int>(taps.size());
}

struct AmxConvLaunch {
  AmxConvParams p;
  AmxPhase phase[kAmxMaxPhases];
  ConvEpilogue epilogue;
  bool ends;
};

// phases: taps, height and width of the grid, weight and y of each. weight_strides: of the parameter, where the weights are it.
inline void fields(FieldReader& v, AmxConvLaunch& launch) {
  AmxConvParams& p = launch.p;
  v("samples", p.samples), v("in_height", p.in_height), v("in_width", p.in_width), v("in_channels", p.in_channels);
  v("out_channels", p.out_channels), v("in_step", p.in_step), v("parts", p.parts), v("accumulate", p.accumulate);
  v("num_threads", p.num_threads), v("x", p.x), strides_field(v, "y_strides", p.y_strides);
  const bool parameter = v.numbers("weight_strides", p.out_stride, p.in_stride);
  p.num_phases = static_cast<int>(v.each("phases", kAmxMaxPhases, [&](size_t k, py::handle given) {
    const py::sequence item = py::reinterpret_borrow<py::sequence>(given);
    AmxPhase& phase = launch.phase[k];
    phase.num_taps = amx_taps(py::object(item[0]), phase.tap);
    v.number(py::object(item[1]), "height", phase.height), v.number(py::object(item[2]), "width", phase.width);
    if (parameter) {
      v.address(py::object(item[3]), phase.weight);
    } else {
      v.address(py::object(item[3]), phase.packed);
    }
    v.address(py::object(item[4]), phase.y);
  }));
  expect(p.num_phases > 0, "phases: expected 1 to 16 of them");
  launch.ends = epilogue_fields(v, launch.epilogue, p.out_channels);
}
inline AmxConvParams with_epilogue(const AmxConvLaunch& launch) {
  AmxConvParams p = launch.p;
  p.phase = launch.phase, p.epilogue = launch.ends ? &launch.epilogue : nullptr;
  return p;
}
inline void scratch(ScratchCutter& s, AmxConvLaunch& launch) {
  char* bytes = static_cast<char*>(launch.p.workspace);
  s(bytes, kernels().amx_conv_workspace(with_epilogue(launch)));
  launch.p.workspace = bytes;
}
inline void run(const AmxConvLaunch& launch, void*) { kernels().amx_conv(with_epilogue(launch)); }

struct AmxPackLaunch {
  AmxPackParams p;
  AmxTap tap[kAmxMaxTaps];
};

inline void fields(FieldReader& v, AmxPackLaunch& launch) {
  AmxPackParams& p = launch.p;
  p.num_taps = amx_taps(v.value("taps"), launch.tap), sizes_field(v, p);
  v("parts", p.parts), v("num_threads", p.num_threads), v("weight", p.weight), v("packed", p.packed);
}
inline void run(const AmxPackLaunch& launch, void*) {
  AmxPackParams p = launch.p;
  p.tap = launch.tap;
  kernels().amx_pack_weight(p);
}

struct AmxWeightGradLaunch {
  AmxWeightGradParams p;
  AmxTap tap[kAmxMaxTaps];
};

inline void fields(FieldReader& v, AmxWeightGradLaunch& launch) {
  AmxWeightGradParams& p = launch.p;
  p.num_taps = amx_taps(v.value("taps"), launch.tap);
  v("samples", p.samples), v("in_height", p.in_height), v("in_width", p.in_width), v("in_channels", p.in_channels);
  v("height", p.height), v("width", p.width), v("out_channels", p.out_channels), v("out_stride", p.out_stride);
  int64_t in_stride = 0;
  v("in_stride", in_stride);
  if (in_stride != p.num_taps)
    throw std::invalid_argument("in_stride: expected kernels of as many elements as there are taps, " +
                                std::to_string(p.num_taps) + ", got " + std::to_string(in_stride));
  v("in_step", p.in_step), v("parts", p.parts), v("num_threads", p.num_threads), v("accumulate", p.accumulate);
  v("x", p.x), v("grad", p.grad), v("grad_weight", p.grad_weight);
}
inline AmxWeightGradParams with_taps(const AmxWeightGradLaunch& launch) {
  AmxWeightGradParams p = launch.p;
  p.tap = launch.tap;
  return p;
}
inline void scratch(ScratchCutter& s, AmxWeightGradLaunch& launch) {
  char* bytes = static_cast<char*>(launch.p.workspace);
  s(bytes, kernels().amx_weight_grad_workspace(with_taps(launch)));
  launch.p.workspace = bytes;
}
inline void run(const AmxWeightGradLaunch& launch, void*) { kernels().amx_weight_grad(with_taps(launch)); }

}  // namespace rnndyn
