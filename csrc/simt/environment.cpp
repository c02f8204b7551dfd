// The Python side of the SIMT harness, in the tests' module _simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "cuda/device.h"
#include "simt/control.h"
#include "simt/planted.h"
#include "simt/simt.h"

namespace py = pybind11;

namespace rnndyn::cuda {

void allow_dynamic_shared(const void* kernel, const char*) { simt::allow_dynamic_shared(kernel); }
int64_t blocks_at_once(const void*, const char* name, int threads, size_t shared_bytes) {
  return simt::blocks_at_once(name, threads, shared_bytes);
}

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

void bind_environment(py::module_& m) {
  py::register_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
  py::enum_<simt::Order>(m, "Order")
      .value("FORWARD", simt::Order::kForward)
      .value("REVERSED", simt::Order::kReversed)
      .value("RANDOM", simt::Order::kRandom);
  m.def("set_order", &simt::set_order, py::arg("order"), py::arg("seed") = 0);
  m.def("set_limits", &simt::set_limits, py::arg("shared_bytes"), py::arg("registers"),
        py::arg("multiprocessors") = 132);
  m.def("register_buffer", &simt::register_buffer, py::arg("name"), py::arg("base"), py::arg("bytes"),
        py::arg("granule"), py::arg("writable"), py::arg("initialised"));
  m.def("forget_buffers", &simt::forget_buffers);
  m.def("traffic", &simt::traffic);
  py::enum_<Planted>(m, "Planted")
      .value("NONE", Planted::kNone)
      .value("READ", Planted::kRead)
      .value("WRITE", Planted::kWrite)
      .value("SHARED_BOUNDS", Planted::kSharedBounds)
      .value("UNWRITTEN_SHARED", Planted::kUnwrittenShared)
      .value("MISSING_BARRIER", Planted::kMissingBarrier)
      .value("WRITE_AFTER_READ", Planted::kWriteAfterRead)
      .value("DIVERGENT_BARRIER", Planted::kDivergentBarrier)
      .value("RETURN_BEFORE_BARRIER", Planted::kReturnBeforeBarrier)
      .value("INPUT", Planted::kInput)
      .value("OTHER_BLOCK", Planted::kOtherBlock)
      .value("DIVERGENT_SHUFFLE", Planted::kDivergentShuffle)
      .value("MISSING_WARP_BARRIER", Planted::kMissingWarpBarrier)
      .value("MISALIGNED", Planted::kMisaligned)
      .value("UNWRITTEN_OUTPUT", Planted::kUnwrittenOutput)
      .value("MISSING_WAIT", Planted::kMissingWait)
      .value("FRAGMENT", Planted::kFragment)
      .value("NO_OPT_IN", Planted::kNoOptIn)
      .value("SHARED_LIMIT", Planted::kSharedLimit)
      .value("THREADS", Planted::kThreads)
      .value("GRID", Planted::kGrid);
  m.def("planted", [](const std::string& which, uintptr_t in, uintptr_t out, Planted fault) {
    launch_planted(which.c_str(), {reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), fault});
  });
}

}  // namespace rnndyn::cuda
