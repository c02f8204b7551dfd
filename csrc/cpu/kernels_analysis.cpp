// Measures of trajectories, and the layout of maps. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/winograd_transform_kernel.h"
#include "cpu/depthwise_conv_kernel.h"
#include "cpu/channels_last_kernel.h"

#include "cpu/gemm_kernel.h"
#include "cpu/readout_zones_kernel.h"
#include "cpu/trajectory_norms_kernel.h"

void add_analysis(KernelTable& table) {
  table.channels_last_f32 = channels_last<float>;
  table.channels_last_f64 = channels_last<double>;
  table.readout_zones_f32 = readout_zones<float>;
  table.readout_zones_f64 = readout_zones<double>;
  table.trajectory_norms_f32 = trajectory_norms<float>;
  table.trajectory_norms_f64 = trajectory_norms<double>;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
