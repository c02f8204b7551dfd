// What the module tells of, and takes from, where its kernels run: a device (environment.cu) or the SIMT harness (simt/environment.cpp).
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/storage.h"

namespace rnndyn::cuda {

using Address = uintptr_t;
// The device and its stream.
using Queue = std::pair<int, Address>;
using Shape = std::array<int64_t, 4>;  // samples, height, width, channels

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls f with a value of the storage type that the name says.
template <typename F>
auto by_dtype(const std::string& dtype, F f) {
  if (dtype == "float32") return f(float{});
  if (dtype == "float16") return f(Half{});
  if (dtype == "bfloat16") return f(BFloat16{});
  throw std::invalid_argument("dtype: expected float32, float16 or bfloat16, got " + dtype);
}

// Makes a device the current one of this thread for as long as it lives. (This module has a CUDA runtime of its own, which does not know
// what torch's has set.)
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

void bind_environment(pybind11::module_& m);
void bind_steps(pybind11::module_& m);  // norm_step, depthwise_conv, trajectory_norms

}  // namespace rnndyn::cuda
