// What the module tells of, and takes from, where its kernels run: a device (environment.cu) or the SIMT harness (simt/environment.cpp).
#pragma once
#include <pybind11/pybind11.h>

namespace rnndyn::cuda {

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

}  // namespace rnndyn::cuda
