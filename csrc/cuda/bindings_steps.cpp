// Further functions of the Python module rnndyn_fast._cuda: norm_step, depthwise_conv and trajectory_norms. The rules of bindings.cpp hold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/bindings.h"
#include "cuda/depthwise_conv.h"
#include "cuda/norm_step.h"
#include "cuda/trajectory_norms.h"

namespace py = pybind11;

namespace rnndyn::cuda {
namespace {

// Groups, norm, activation, rectify the drive, squash, eps.
using NormScalars = std::tuple<int, int, int, bool, bool, float>;

NormStepRule norm_rule(const Shape& shape, const NormScalars& scalars) {
  const auto& [groups, norm, activation, rectify_drive, squash, eps] = scalars;
  if (shape[3] > int64_t(1) << 24 || groups < 1 || shape[3] % groups != 0)
    throw std::invalid_argument("norm_step: expected groups that divide the channels, and at most 2^24 of these, got " +
                                std::to_string(groups) + " and " + std::to_string(shape[3]));
  return {shape[0],
          shape[1] * shape[2],
          int(shape[3]),
          groups,
          static_cast<NormKind>(norm),
          static_cast<GateActivation>(activation),
          rectify_drive,
          squash,
          eps};
}

// mean, rstd and variance: as norm_step.h says.
void norm_step_forward(const std::string& dtype, const Queue& queue, const Shape& shape, const NormScalars& scalars,
                       const std::vector<Address>& drives, const std::vector<Address>& modulators, Address drive_bias,
                       Address modulator_bias, Address gamma, Address beta, Address drive_sum, Address modulator_sum,
                       Address state, Address mean, Address rstd, Address variance, Address workspace) {
  if (drives.size() > kMaxNormTerms || modulators.size() > kMaxNormTerms)
    throw std::invalid_argument("norm_step: at most " + std::to_string(kMaxNormTerms) + " drives and modulators");
  if ((drives.size() > 1 || drive_bias != 0) && drive_sum == 0)
    throw std::invalid_argument("norm_step: several drives, or a bias, need drive_sum");
  if ((modulators.size() > 1 || modulator_bias != 0) && modulator_sum == 0)
    throw std::invalid_argument("norm_step: several modulators, or a bias, need modulator_sum");
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    NormStepForwardParams<T> p{};
    p.rule = norm_rule(shape, scalars);
    if (p.rule.squash && modulators.empty() && modulator_bias == 0)
      throw std::invalid_argument("norm_step: squash needs a modulator");
    p.num_drive = int(drives.size()), p.num_modulator = int(modulators.size());
    for (size_t k = 0; k < drives.size(); ++k) p.drive[k] = pointer<const T>(drives[k]);
    for (size_t k = 0; k < modulators.size(); ++k) p.modulator[k] = pointer<const T>(modulators[k]);
    p.drive_bias = pointer<const float>(drive_bias), p.modulator_bias = pointer<const float>(modulator_bias);
    p.gamma = pointer<const float>(gamma), p.beta = pointer<const float>(beta);
    p.drive_sum = pointer<T>(drive_sum), p.modulator_sum = pointer<T>(modulator_sum), p.state = pointer<T>(state);
    p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd), p.variance = pointer<float>(variance);
    p.workspace = pointer<float>(workspace);
    launch_norm_step_forward(p, pointer<void>(queue.second));
  });
}

void norm_step_backward(const std::string& dtype, const Queue& queue, const Shape& shape, const NormScalars& scalars,
                        Address grad_state, Address drive, Address modulator, Address gamma, Address beta, Address mean,
                        Address rstd, Address grad_drive, Address grad_modulator, Address grad_gamma, Address grad_beta,
                        Address workspace) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    NormStepBackwardParams<T> p{};
    p.rule = norm_rule(shape, scalars);
    if (p.rule.squash && modulator == 0) throw std::invalid_argument("norm_step: squash needs a modulator");
    p.grad_state = pointer<const T>(grad_state);
    p.drive = pointer<const T>(drive), p.modulator = pointer<const T>(modulator);
    p.gamma = pointer<const float>(gamma), p.beta = pointer<const float>(beta);
    p.mean = pointer<const float>(mean), p.rstd = pointer<const float>(rstd);
    p.grad_drive = pointer<T>(grad_drive);
    p.grad_modulator = p.rule.squash ? pointer<T>(grad_modulator) : nullptr;
    p.grad_gamma = pointer<float>(grad_gamma), p.grad_beta = pointer<float>(grad_beta);
    p.workspace = pointer<float>(workspace);
    launch_norm_step_backward(p, pointer<void>(queue.second));
  });
}

// Samples, channels, height and width of x, of y; height and width of the kernel; step, dilation; zeros above and left.
using DepthwiseSizes = std::array<int64_t, 12>;

DepthwiseShape depthwise_shape(const DepthwiseSizes& n) {
  if (n[6] < 1 || n[6] > kMaxDepthwiseKernel || n[7] < 1 || n[7] > kMaxDepthwiseKernel)
    throw std::invalid_argument("depthwise_conv: kernels of 1 to " + std::to_string(kMaxDepthwiseKernel) +
                                " rows and columns, got " + std::to_string(n[6]) + " x " + std::to_string(n[7]));
  for (int k = 2; k < 6; ++k)
    if (n[k] >= int64_t(1) << 24)
      throw std::invalid_argument("depthwise_conv: maps of fewer than 2^24 rows and columns");
  return {n[0], n[1], n[2], n[3], n[4], n[5], int(n[6]), int(n[7]), int(n[8]), int(n[9]), int(n[10]), int(n[11]), 0};
}

void depthwise_conv(const std::string& dtype, const Queue& queue, const DepthwiseSizes& sizes, Address x,
                    Address weight, Address bias, Address y) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const DepthwiseConvParams<T> p{depthwise_shape(sizes), pointer<const T>(x), pointer<const T>(weight),
                                   pointer<const float>(bias), pointer<T>(y)};
    launch_depthwise_conv(p, pointer<void>(queue.second));
  });
}

void depthwise_weight_grad(const std::string& dtype, const Queue& queue, const DepthwiseSizes& sizes, Address x,
                           Address grad, int splits, Address partial, Address grad_weight) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const DepthwiseWeightGradParams<T> p{depthwise_shape(sizes),  pointer<const T>(x),
                                         pointer<const T>(grad),  splits,
                                         pointer<float>(partial), pointer<float>(grad_weight)};
    if (p.shape.dilation != 1) throw std::invalid_argument("depthwise_weight_grad: expected dilation 1");
    launch_depthwise_weight_grad(p, pointer<void>(queue.second));
  });
}

// shape: steps, samples, dimensions.
void trajectory_norms(const std::string& dtype, const Queue& queue, const std::array<int64_t, 3>& shape, Address values,
                      int64_t step_stride, int64_t row_stride, Address norm, Address change) {
  const DeviceGuard guard(queue.first);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const TrajectoryNormsParams<T> p{shape[0],
                                     shape[1],
                                     shape[2],
                                     pointer<const T>(values),
                                     step_stride,
                                     row_stride,
                                     pointer<double>(norm),
                                     pointer<double>(change)};
    launch_trajectory_norms(p, pointer<void>(queue.second));
  });
}

}  // namespace

void bind_steps(py::module_& m) {
  m.def("norm_step_workspace",
        [](const Shape& shape, const NormScalars& scalars) { return norm_step_workspace(norm_rule(shape, scalars)); });
  m.def("norm_step_forward", &norm_step_forward);
  m.def("norm_step_backward", &norm_step_backward);
  m.def("depthwise_conv", &depthwise_conv);
  m.def("depthwise_weight_grad_splits", [](const std::string& dtype, int device, const DepthwiseSizes& sizes) {
    const DeviceGuard guard(device);
    return by_dtype(dtype, [&](auto t) { return depthwise_weight_grad_splits<decltype(t)>(depthwise_shape(sizes)); });
  });
  m.def("depthwise_weight_grad", &depthwise_weight_grad);
  m.def("trajectory_norms", &trajectory_norms);
}

}  // namespace rnndyn::cuda
