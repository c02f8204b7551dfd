// Where the kernels of _cuda run: devices, and what this build is for. Nothing here needs a driver until it is called.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/bindings.h"

namespace py = pybind11;

namespace rnndyn::cuda {
namespace {

py::dict build_info() {
  py::dict info;
  info["architectures"] = RNNDYN_CUDA_ARCHITECTURES;
  info["nvcc"] = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  int version = 0;
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) info["runtime"] = version;
  version = 0;
  info["driver"] = cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;  // 0: none
  return info;
}

// Devices that can be used; 0 without a driver.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // forget it
    return 0;
  }
  return count;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw std::runtime_error("device " + std::to_string(device) + ": " + cudaGetErrorString(error));
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void bind_environment(py::module_& m) {
  m.def("build_info", &build_info);
  m.def("device_count", &device_count);
}

}  // namespace rnndyn::cuda
