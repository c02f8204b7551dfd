// Where the kernels of _cuda run: devices, and what this build is for. Nothing here needs a driver until it is called.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cuda/bindings.h"
#include "cuda/device.h"

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

// A template only so that it says what it stores, as all kernels do.
template <typename T>
__global__ void probe_kernel(T* out) {
  *out = 0;
}

// Why no kernel of this module can run on a device: the driver is older than the module's runtime needs, or there is no code for it. Empty if
// they can.
std::string device_error(int device) {
  cudaFuncAttributes attributes;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, probe_kernel<float>);  // loads the code
    cudaSetDevice(before);
  }
  cudaGetLastError();  // forget it
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
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

void allow_dynamic_shared(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // per device
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  // The most, not what one launch takes: another thread may launch with more between this call and its own launch.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        name);
  allowed.insert({kernel, device});
}

int64_t blocks_at_once(const void* kernel, const char* name, int threads, size_t shared_bytes) {
  int device = 0, multiprocessors = 0, blocks = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), name);
  return int64_t(multiprocessors) * blocks;
}

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
  m.def("device_error", &device_error, py::arg("device"));
}

}  // namespace rnndyn::cuda
