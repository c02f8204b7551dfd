// Further functions of the Python module rnndyn_fast._core: norm_step, activation_backward, depthwise_conv and
// channels_last. The rules of bindings.cpp hold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernel_table.h"
#include "depthwise_conv.h"
#include "channels_last.h"
#include "norm_step.h"

namespace py = pybind11;
using namespace rnndyn;

namespace {

// [N, P, C, groups], kinds of norm and activation, and whether the drive is rectified and there is a modulator.
using NormSizes = std::array<int64_t, 4>;
NormStepShape norm_step_shape(const NormSizes& n, int norm, int activation, bool rectify_drive, bool squash, double eps,
                              int num_threads) {
  return {n[0],          n[1],   n[2], n[3],       static_cast<NormKind>(norm), static_cast<GateActivation>(activation),
          rectify_drive, squash, eps,  num_threads};
}

template <typename Real>
void norm_step_forward(const NormSizes& sizes, int norm, int activation, bool rectify_drive, bool squash, double eps,
                       int num_threads, const std::vector<Address>& drives, const std::vector<Address>& modulators,
                       Address drive_bias, Address modulator_bias, Address gamma, Address beta, Address drive_sum,
                       Address modulator_sum, Address state, Address mean, Address rstd, Address variance,
                       Address workspace) {
  NormStepForwardParams<Real> p{};
  p.shape = norm_step_shape(sizes, norm, activation, rectify_drive, squash, eps, num_threads);
  if (drives.size() > kMaxNormTerms || modulators.size() > kMaxNormTerms)
    throw std::invalid_argument("norm_step: at most " + std::to_string(kMaxNormTerms) + " drives and modulators");
  p.num_drive = static_cast<int>(drives.size()), p.num_modulator = static_cast<int>(modulators.size());
  for (size_t i = 0; i < drives.size(); ++i) p.drive[i] = pointer<const Real>(drives[i]);
  for (size_t i = 0; i < modulators.size(); ++i) p.modulator[i] = pointer<const Real>(modulators[i]);
  p.drive_bias = pointer<const Real>(drive_bias), p.modulator_bias = pointer<const Real>(modulator_bias);
  p.gamma = pointer<const Real>(gamma), p.beta = pointer<const Real>(beta);
  p.drive_sum = pointer<Real>(drive_sum), p.modulator_sum = pointer<Real>(modulator_sum),
  p.state = pointer<Real>(state);
  p.mean = pointer<Real>(mean), p.rstd = pointer<Real>(rstd), p.variance = pointer<Real>(variance);
  p.workspace = pointer<double>(workspace);
  if (squash && p.num_modulator == 0 && p.modulator_bias == nullptr)
    throw std::invalid_argument("norm_step: squash needs a modulator");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().norm_step_forward_f32(p);
  } else {
    kernels().norm_step_forward_f64(p);
  }
}

template <typename Real>
void norm_step_backward(const NormSizes& sizes, int norm, int activation, bool rectify_drive, bool squash, double eps,
                        int num_threads, Address grad_state, Address drive, Address modulator, Address gamma,
                        Address beta, Address mean, Address rstd, Address grad_drive, Address grad_modulator,
                        Address grad_gamma, Address grad_beta, Address grad_drive_bias, Address grad_modulator_bias,
                        Address workspace) {
  NormStepBackwardParams<Real> p{};
  p.shape = norm_step_shape(sizes, norm, activation, rectify_drive, squash, eps, num_threads);
  p.grad_state = pointer<const Real>(grad_state), p.drive = pointer<const Real>(drive),
  p.modulator = pointer<const Real>(modulator);
  p.gamma = pointer<const Real>(gamma), p.beta = pointer<const Real>(beta);
  p.mean = pointer<const Real>(mean), p.rstd = pointer<const Real>(rstd);
  p.grad_drive = pointer<Real>(grad_drive), p.grad_modulator = pointer<Real>(grad_modulator);
  p.grad_gamma = pointer<Real>(grad_gamma), p.grad_beta = pointer<Real>(grad_beta);
  p.grad_drive_bias = pointer<Real>(grad_drive_bias), p.grad_modulator_bias = pointer<Real>(grad_modulator_bias);
  p.workspace = pointer<double>(workspace);
  if (squash && p.modulator == nullptr) throw std::invalid_argument("norm_step: squash needs a modulator");
  if ((p.grad_drive_bias != nullptr && p.drive == nullptr) || (p.grad_modulator_bias != nullptr && !squash))
    throw std::invalid_argument("norm_step: a bias needs the drive or modulator that it is added to");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().norm_step_backward_f32(p);
  } else {
    kernels().norm_step_backward_f64(p);
  }
}

template <typename Real>
void activation_backward(int activation, int64_t pixels, int64_t channels, int num_threads, Address grad,
                         Address grad_more, Address state, Address grad_drive, Address grad_bias, Address workspace) {
  const ActivationBackwardParams<Real> p{static_cast<GateActivation>(activation),
                                         pixels,
                                         channels,
                                         num_threads,
                                         pointer<const Real>(grad),
                                         pointer<const Real>(grad_more),
                                         pointer<const Real>(state),
                                         pointer<Real>(grad_drive),
                                         pointer<Real>(grad_bias),
                                         pointer<double>(workspace)};
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().activation_backward_f32(p);
  } else {
    kernels().activation_backward_f64(p);
  }
}

// [N, C, H, W, H', W', KH, KW, step, dilation, top, left]
using DepthwiseSizes = std::array<int64_t, 14>;
DepthwiseShape depthwise_shape(const DepthwiseSizes& n, int num_threads) {
  if (n[6] < 1 || n[7] < 1 || n[6] > kMaxDepthwiseKernel || n[7] > kMaxDepthwiseKernel)
    throw std::invalid_argument("depthwise_conv: kernels of 1 to " + std::to_string(kMaxDepthwiseKernel) +
                                " rows and columns");
  if (n[12] < 1 || n[13] < 1 || n[1] % n[13] != 0)
    throw std::invalid_argument("depthwise_conv: expected whole groups of channels");
  return {n[0],      n[1],      n[2],       n[3],       n[4],       n[5],       int(n[6]),  int(n[7]),
          int(n[8]), int(n[9]), int(n[10]), int(n[11]), int(n[12]), int(n[13]), num_threads};
}

template <typename Real>
void depthwise_conv(const DepthwiseSizes& sizes, int num_threads, Address x, Address weight, Address bias, Address y) {
  const DepthwiseConvParams<Real> p{depthwise_shape(sizes, num_threads), pointer<const Real>(x),
                                    pointer<const Real>(weight), pointer<const Real>(bias), pointer<Real>(y)};
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().depthwise_conv_f32(p);
  } else {
    kernels().depthwise_conv_f64(p);
  }
}

template <typename Real>
void depthwise_weight_grad(const DepthwiseSizes& sizes, int num_threads, Address x, Address grad, Address grad_weight) {
  const DepthwiseWeightGradParams<Real> p{depthwise_shape(sizes, num_threads), pointer<const Real>(x),
                                          pointer<const Real>(grad), pointer<Real>(grad_weight)};
  if (p.shape.dilation != 1) throw std::invalid_argument("depthwise_weight_grad: expected dilation 1");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().depthwise_weight_grad_f32(p);
  } else {
    kernels().depthwise_weight_grad_f64(p);
  }
}

void separable_conv(const DepthwiseSizes& sizes, int num_threads, Address x, Address weight, Address bias,
                    int64_t out_channels, int64_t stride, Address pointwise, Address y) {
  const SeparableConvParams p{{depthwise_shape(sizes, num_threads), pointer<const float>(x),
                               pointer<const float>(weight), pointer<const float>(bias), nullptr},
                              out_channels,
                              stride,
                              pointer<const float>(pointwise),
                              pointer<float>(y)};
  if (stride % 32 != 0 || stride < out_channels)
    throw std::invalid_argument("separable_conv: expected rows of a multiple of 32 channels");
  py::gil_scoped_release release;
  kernels().separable_conv(p);
}

// shape: [N, C, P]
template <typename Real>
void channels_last(const std::array<int64_t, 3>& shape, int num_threads, Address x, Address y) {
  const ChannelsLastParams<Real> p{shape[0], shape[1], shape[2], num_threads, pointer<const Real>(x), pointer<Real>(y)};
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().channels_last_f32(p);
  } else {
    kernels().channels_last_f64(p);
  }
}

}  // namespace

void rnndyn::bind_steps(py::module_& m) {
  m.def("norm_step_forward_float32", &norm_step_forward<float>);
  m.def("norm_step_forward_float64", &norm_step_forward<double>);
  m.def("norm_step_backward_float32", &norm_step_backward<float>);
  m.def("norm_step_backward_float64", &norm_step_backward<double>);
  m.def("activation_backward_float32", &activation_backward<float>);
  m.def("activation_backward_float64", &activation_backward<double>);
  m.def("gate_step_workspace", &gate_step_workspace);
  m.def("norm_step_workspace", [](const NormSizes& sizes) {
    return kernels().norm_step_workspace(norm_step_shape(sizes, 0, 0, false, false, 0, 1));
  });
  m.def("depthwise_conv_float32", &depthwise_conv<float>);
  m.def("depthwise_conv_float64", &depthwise_conv<double>);
  m.def("depthwise_weight_grad_float32", &depthwise_weight_grad<float>);
  m.def("depthwise_weight_grad_float64", &depthwise_weight_grad<double>);
  m.def("separable_conv", &separable_conv);
  m.def("channels_last_float32", &channels_last<float>);
  m.def("channels_last_float64", &channels_last<double>);
}
