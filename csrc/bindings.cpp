// The Python module rnndyn_fast._core: the CPU's launches (launch.h), lists of them, and sizes that Python must know ahead. It links neither torch
// nor NumPy: buffers arrive as addresses, and only rnndyn_fast/ops/launch.py hands them over, which has checked shapes, dtypes and contiguity.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/conv_launch_fields.h"
#include "fingerprint.h"

namespace rnndyn {
namespace {

// Launches that are run one after another, by one call, without Python's lock. Several threads may run a list at once, each with scratch of its own.
class LaunchList {
 public:
  explicit LaunchList(std::vector<std::shared_ptr<Launch>> launches) : launches_(std::move(launches)) {
    for (const auto& launch : launches_) {
      scratch_bytes = std::max(scratch_bytes, launch->scratch_bytes);
      room_bytes = std::max(room_bytes, launch->room_bytes);
    }
  }
  void operator()(const std::vector<Address>& bases, Address memory, Address room) const {
    py::gil_scoped_release release;
    for (const auto& launch : launches_) (*launch)(bases.data(), pointer<char>(memory), pointer<char>(room), nullptr);
  }
  int64_t scratch_bytes = 0, room_bytes = 0;

 private:
  std::vector<std::shared_ptr<Launch>> launches_;
};

template <template <typename> class Params>
void add(Registry& r, const char* op) {
  r.add<Params<float>>(op, "float32");
  r.add<Params<double>>(op, "float64");
}
template <typename Real>
using GateStep = GateStepLaunch<GateStepParams<Real>>;

const Registry& registry() {
  static const Registry made = [] {
    Registry r;
    add<AreaStepForwardParams>(r, "area_step_forward");
    add<AreaStepBackwardParams>(r, "area_step_backward");
    add<GateStep>(r, "gate_step");
    add<ActivationBackwardParams>(r, "activation_backward");
    add<NormStepForwardParams>(r, "norm_step_forward");
    add<NormStepBackwardParams>(r, "norm_step_backward");
    add<DepthwiseConvParams>(r, "depthwise_conv");
    add<DepthwiseWeightGradParams>(r, "depthwise_weight_grad");
    add<ChannelsLastParams>(r, "channels_last");
    add<ReadoutZonesParams>(r, "readout_zones");
    add<TrajectoryNormsParams>(r, "trajectory_norms");
    add<CtrnnForwardParams>(r, "ctrnn_forward");
    add<CtrnnBackwardParams>(r, "ctrnn_backward");
    add<CtrnnTrainParams>(r, "ctrnn_train");
    r.add<SeparableConvParams>("separable_conv", "float32");
    r.add<WinogradConvLaunch>("winograd_conv", "float32");
    r.add<WinogradPackParams>("winograd_pack_weight", "float32");
    r.add<WinogradWeightGradParams>("winograd_weight_grad", "float32");
    r.add<AmxConvLaunch>("amx_conv", "float32");
    r.add<AmxPackLaunch>("amx_pack_weight", "float32");
    r.add<AmxWeightGradLaunch>("amx_weight_grad", "float32");
    return r;
  }();
  return made;
}

// A packed weight's elements, from the fields that say its shape.
int64_t winograd_packed_size(const py::dict& values) {
  WinogradPackParams p{};
  FieldReader v(values, &p);
  fields(v, p);
  v.finish("winograd_packed_size");
  return kernels().winograd_packed_size(p);
}

int64_t amx_packed_size(const py::dict& values) {
  AmxPackLaunch launch{};
  FieldReader v(values, &launch);
  fields(v, launch);
  v.finish("amx_packed_size");
  return kernels().amx_packed_size(launch.p);
}

// Doubles of scratch.
int64_t norm_step_workspace(int64_t samples, int64_t pixels, int64_t channels, int64_t groups) {
  NormStepShape shape{};
  shape.samples = samples, shape.pixels = pixels, shape.channels = channels, shape.groups = groups,
  shape.num_threads = 1;
  return kernels().norm_step_workspace(shape);
}

py::dict build_info() {
  py::dict info;
  info["version"] = RNNDYN_VERSION;
  info["isa"] = kernels().isa;
  py::list supported;
  for (const char* isa : {"portable", "avx2", "avx512", "amx"})
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
}  // namespace rnndyn

PYBIND11_MODULE(_core, m) {
  using namespace rnndyn;
  m.doc() = "Native kernels of rnndyn_fast over raw addresses; see rnndyn_fast/ops/launch.py.";
  m.attr("MAX_TERMS") = kMaxTerms;
  m.attr("MAX_CONV_TERMS") = kMaxConvTerms;
  py::class_<Launch, std::shared_ptr<Launch>>(m, "Launch", py::module_local())
      .def_readonly("scratch_bytes", &Launch::scratch_bytes)
      .def_readonly("room_bytes", &Launch::room_bytes)
      .def("__call__", [](const Launch& launch, Address memory, Address room) {
        py::gil_scoped_release release;
        launch(nullptr, pointer<char>(memory), pointer<char>(room), nullptr);
      });
  py::class_<LaunchList>(m, "LaunchList", py::module_local())
      .def(py::init<std::vector<std::shared_ptr<Launch>>>())
      .def_readonly("scratch_bytes", &LaunchList::scratch_bytes)
      .def_readonly("room_bytes", &LaunchList::room_bytes)
      .def("__call__", &LaunchList::operator());
  m.def("launch", [](const std::string& op, const std::string& dtype, const py::dict& values) {
    return registry().make(op, dtype, values);
  });
  m.def("winograd_packed_size", &winograd_packed_size);
  m.def("amx_packed_size", &amx_packed_size);
  m.def("norm_step_workspace", &norm_step_workspace);
  m.def("gate_step_workspace", &gate_step_workspace);
  m.def("num_chunks", &num_chunks);
  m.def("build_info", &build_info);
  m.def("isa", [] { return std::string(kernels().isa); });  // (build_info asks the processor, which costs a while)
  m.def("select_isa", [](const std::string& name) { select_isa(name.c_str()); });
  m.def("fingerprint", [](Address data, int64_t size, int num_threads) {
    py::gil_scoped_release release;
    return fingerprint(pointer<const void>(data), size, num_threads);
  });
}
