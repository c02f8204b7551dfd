// The Python module rnndyn_fast._cuda: the launches of CUDA kernels (../launch.h). It links neither torch nor the shared CUDA runtime, and only
// rnndyn_fast/ops/launch.py hands addresses over, which has checked shapes, dtypes, devices and contiguity by then.
// The same file makes the tests' module _simt, whose kernels run in the SIMT harness.
#include "cuda/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "cuda/launch_fields.h"
#include "cuda/storage.h"

namespace rnndyn::cuda {
namespace {

template <template <typename> class Params>
void add_halves(Registry& r, const char* op) {
  r.add<Params<Half>>(op, "float16");
  r.add<Params<BFloat16>>(op, "bfloat16");
}
template <template <typename> class Params>
void add(Registry& r, const char* op) {
  r.add<Params<float>>(op, "float32");
  add_halves<Params>(r, op);
}

const Registry& registry() {
  static const Registry made = [] {
    Registry r;
    add<AreaStepForwardParams>(r, "area_step_forward");
    add<AreaStepBackwardParams>(r, "area_step_backward");
    add<GateStep>(r, "gate_step");
    add<NormStepForwardParams>(r, "norm_step_forward");
    add<NormStepBackwardParams>(r, "norm_step_backward");
    add<DepthwiseConvParams>(r, "depthwise_conv");
    add<DepthwiseWeightGradParams>(r, "depthwise_weight_grad");
    add_halves<RecurrentConvParams>(r, "recurrent_conv");
    add_halves<ConvWeightGradParams>(r, "recurrent_conv_weight_grad");
    add<ReadoutZonesParams>(r, "readout_zones");
    add<TrajectoryNormsParams>(r, "trajectory_norms");
    r.add<CtrnnForward>("ctrnn_forward", "float32");
    r.add<CtrnnBackward>("ctrnn_backward", "float32");
    return r;
  }();
  return made;
}

// Rows and columns of a tile, and the groups of moments.
std::tuple<int, int, std::array<int, 4>> conv_tiles(int64_t samples, int height, int width, int channels) {
  const ConvTiles tiles = recurrent_conv_tiles(samples, height, width, channels);
  const MomentGroups& g = tiles.moment_groups;
  return {tiles.rows, tiles.columns, {g.groups, g.period, g.count, g.last_count}};
}

}  // namespace
}  // namespace rnndyn::cuda

PYBIND11_MODULE(RNNDYN_CUDA_MODULE, m) {
  using namespace rnndyn;
  m.doc() = "CUDA kernels of rnndyn_fast over raw addresses; see rnndyn_fast/ops/launch.py.";
  m.attr("MAX_TERMS") = cuda::kMaxTerms;
  m.attr("MAX_CONV_TERMS") = cuda::kMaxConvTerms;
  py::class_<Launch, std::shared_ptr<Launch>>(m, "Launch", py::module_local())
      .def_readonly("scratch_bytes", &Launch::scratch_bytes)
      .def_property_readonly("scratch_parts",
                             [](const Launch& launch) {
                               py::list parts;  // first byte, elements and bytes of each
                               for (const ScratchPart& part : launch.scratch_parts)
                                 parts.append(py::make_tuple(part.first_byte, part.elements, part.element_size));
                               return parts;
                             })
      .def("__call__", [](const Launch& launch, int device, Address stream, Address memory) {
        const cuda::DeviceGuard guard(device);
        launch(nullptr, pointer<char>(memory), nullptr, pointer<void>(stream));
      });
  // Sizes of scratch depend on the device.
  m.def("launch", [](const std::string& op, const std::string& dtype, const py::dict& values, int device) {
    const cuda::DeviceGuard guard(device);
    return cuda::registry().make(op, dtype, values);
  });
  m.def("recurrent_conv_tiles", &cuda::conv_tiles);
  m.def("ctrnn_max_units", &cuda::ctrnn_max_units);
  cuda::bind_environment(m);
}
