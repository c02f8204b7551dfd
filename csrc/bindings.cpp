// The Python module rnndyn_fast._core. It links neither torch nor NumPy: buffers arrive as addresses (0: absent) and sizes, and
// only rnndyn_fast/ops/_launch.py calls these functions. It has checked shapes, dtypes and contiguity by then.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "area_step.h"
#include "cpu/kernel_table.h"
#include "readout_zones.h"

namespace py = pybind11;
using namespace rnndyn;

namespace {

using Address = uintptr_t;
using Shape = std::array<int64_t, 4>;  // samples, height, width, channels

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Real>
int fill_terms(const Real* (&out)[kMaxTerms], const std::vector<Address>& terms, const char* name) {
  if (terms.size() > kMaxTerms)
    throw std::invalid_argument(std::string(name) + ": at most " + std::to_string(kMaxTerms) + " terms, got " +
                                std::to_string(terms.size()));
  for (size_t i = 0; i < kMaxTerms; ++i) out[i] = i < terms.size() ? pointer<const Real>(terms[i]) : nullptr;
  return static_cast<int>(terms.size());
}

template <typename Real>
void area_step_forward(const Shape& shape, int num_threads, const std::vector<Address>& drive, Address drive_bias,
                       const std::vector<Address>& modulator, Address modulator_bias, Address gamma, Address beta, double eps,
                       bool rectify, Address value, Address modulator_sum, Address state, Address max_pooled, Address argmax,
                       Address mean_pooled, Address mean, Address rstd) {
  AreaStepForwardParams<Real> p{};
  p.samples = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
  p.num_threads = num_threads;
  p.num_drive = fill_terms(p.drive, drive, "drive");
  p.drive_bias = pointer<const Real>(drive_bias);
  p.num_modulator = fill_terms(p.modulator, modulator, "modulator");
  p.modulator_bias = pointer<const Real>(modulator_bias);
  p.gamma = pointer<const Real>(gamma), p.beta = pointer<const Real>(beta);
  p.eps = eps, p.rectify = rectify;
  p.value = pointer<Real>(value), p.modulator_sum = pointer<Real>(modulator_sum), p.state = pointer<Real>(state);
  p.max_pooled = pointer<Real>(max_pooled), p.argmax = pointer<uint8_t>(argmax), p.mean_pooled = pointer<Real>(mean_pooled);
  p.mean = pointer<Real>(mean), p.rstd = pointer<Real>(rstd);
  if (p.gamma != nullptr && (p.beta == nullptr || p.value == nullptr || p.mean == nullptr || p.rstd == nullptr))
    throw std::invalid_argument("gamma: a norm needs beta, value, mean and rstd");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().area_step_forward_f32(p);
  } else {
    kernels().area_step_forward_f64(p);
  }
}

template <typename Real>
void area_step_backward(const Shape& shape, int num_threads, const std::vector<Address>& grad_state, Address grad_max_pooled,
                        Address argmax, Address grad_mean_pooled, bool multiplicative, Address value,
                        const std::vector<Address>& drive, Address drive_bias, Address modulator_sum, Address mean, Address rstd,
                        Address gamma, Address beta, bool rectify, Address grad_drive, Address grad_drive_sum,
                        Address grad_modulator, Address grad_gamma, Address grad_beta, Address partial) {
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
  if (p.gamma != nullptr && (p.grad_drive == nullptr || p.grad_gamma == nullptr || p.grad_beta == nullptr || p.partial == nullptr))
    throw std::invalid_argument("gamma: a norm needs grad_drive, grad_gamma, grad_beta and partial");
  if (p.grad_max_pooled != nullptr && p.argmax == nullptr) throw std::invalid_argument("argmax: needed with grad_max_pooled");
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().area_step_backward_f32(p);
  } else {
    kernels().area_step_backward_f64(p);
  }
}

template <typename Real>
void readout_zones(const std::array<int64_t, 3>& shape, int num_threads, Address representations, int64_t representation_stride,
                   Address previous, int64_t previous_stride, Address log_probs, int64_t log_prob_stride, Address labels,
                   Address bias, Address weight_norm, Address inverse_distance, Address cosine, Address predicted, Address norm,
                   Address cos_predicted, Address cos_label, Address margin, Address boundary_distance, Address change) {
  ReadoutZonesParams<Real> p{};
  p.samples = shape[0], p.dims = shape[1], p.classes = shape[2];
  p.num_threads = num_threads;
  p.representations = pointer<const Real>(representations), p.representation_stride = representation_stride;
  p.previous = pointer<const Real>(previous), p.previous_stride = previous_stride;
  p.log_probs = pointer<const Real>(log_probs), p.log_prob_stride = log_prob_stride;
  p.labels = pointer<const int64_t>(labels), p.bias = pointer<const Real>(bias);
  p.weight_norm = pointer<const Real>(weight_norm), p.inverse_distance = pointer<const Real>(inverse_distance);
  p.cosine = pointer<Real>(cosine), p.predicted = pointer<int64_t>(predicted), p.norm = pointer<Real>(norm);
  p.cos_predicted = pointer<Real>(cos_predicted), p.cos_label = pointer<Real>(cos_label);
  p.margin = pointer<Real>(margin), p.boundary_distance = pointer<Real>(boundary_distance), p.change = pointer<Real>(change);
  py::gil_scoped_release release;
  if constexpr (sizeof(Real) == 4) {
    kernels().readout_zones_f32(p);
  } else {
    kernels().readout_zones_f64(p);
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNNDYN_VERSION;
  info["isa"] = kernels().isa;
  py::list supported;
  for (const char* isa : {"portable", "avx2", "avx512"})
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
  m.doc() = "Native kernels of rnndyn_fast over raw addresses; see rnndyn_fast/ops/_launch.py.";
  m.attr("MAX_TERMS") = kMaxTerms;
  m.def("build_info", &build_info);
  m.def("select_isa", [](const std::string& name) { select_isa(name.c_str()); });
  m.def("num_chunks", &num_chunks);
  m.def("area_step_forward_float32", &area_step_forward<float>);
  m.def("area_step_forward_float64", &area_step_forward<double>);
  m.def("area_step_backward_float32", &area_step_backward<float>);
  m.def("area_step_backward_float64", &area_step_backward<double>);
  m.def("readout_zones_float32", &readout_zones<float>);
  m.def("readout_zones_float64", &readout_zones<double>);
}
