// Compiled once per instruction set with RNNDYN_ISA set to its name (see CMakeLists.txt). Everything the kernel headers define
// lives in rnndyn::<isa>, and they use no inline function of the standard library: the linker keeps one copy of those, which might
// then hold instructions that the processor at hand does not have.
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <stdlib.h>

#include "cpu/kernel_table.h"

#define RNNDYN_CONCAT_(a, b) a##b
#define RNNDYN_CONCAT(a, b) RNNDYN_CONCAT_(a, b)
#define RNNDYN_STRING_(a) #a
#define RNNDYN_STRING(a) RNNDYN_STRING_(a)

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/area_step_kernel.h"
#include "cpu/area_step_backward_kernel.h"
#include "cpu/ctrnn_math_kernel.h"
#include "cpu/ctrnn_kernel.h"
#include "cpu/ctrnn_op_kernel.h"
#include "cpu/ctrnn_train_kernel.h"
#include "cpu/gate_math_kernel.h"
#include "cpu/gate_rules_kernel.h"
#include "cpu/gate_step_kernel.h"
#include "cpu/activation_kernel.h"
#include "cpu/norm_step_kernel.h"
#include "cpu/depthwise_conv_kernel.h"
#include "cpu/channels_last_kernel.h"
#include "cpu/winograd_transform_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/readout_zones_kernel.h"
#include "cpu/trajectory_norms_kernel.h"
#include "cpu/conv_epilogue_kernel.h"
#include "cpu/amx_tile_kernel.h"
#include "cpu/winograd_units_kernel.h"
#include "cpu/winograd_taps_kernel.h"
#include "cpu/winograd_pack_kernel.h"
#include "cpu/winograd_conv_kernel.h"
#include "cpu/winograd_weight_grad_kernel.h"
#include "cpu/separable_conv_kernel.h"
#include "cpu/amx_pack_kernel.h"
#include "cpu/amx_conv_kernel.h"
#include "cpu/amx_weight_grad_kernel.h"
}  // namespace RNNDYN_ISA

const KernelTable& RNNDYN_CONCAT(kernel_table_, RNNDYN_ISA)() {
  static const KernelTable table = {
      RNNDYN_STRING(RNNDYN_ISA),
      RNNDYN_ISA::area_step_forward<float>,
      RNNDYN_ISA::area_step_forward<double>,
      RNNDYN_ISA::area_step_backward<float>,
      RNNDYN_ISA::area_step_backward<double>,
      RNNDYN_ISA::gate_step<float>,
      RNNDYN_ISA::gate_step<double>,
      RNNDYN_ISA::activation_backward<float>,
      RNNDYN_ISA::activation_backward<double>,
      RNNDYN_ISA::norm_step_forward<float>,
      RNNDYN_ISA::norm_step_forward<double>,
      RNNDYN_ISA::norm_step_backward<float>,
      RNNDYN_ISA::norm_step_backward<double>,
      RNNDYN_ISA::norm_step_workspace,
      RNNDYN_ISA::depthwise_conv<float>,
      RNNDYN_ISA::depthwise_conv<double>,
      RNNDYN_ISA::depthwise_weight_grad<float>,
      RNNDYN_ISA::depthwise_weight_grad<double>,
      RNNDYN_ISA::separable_conv,
      RNNDYN_ISA::channels_last<float>,
      RNNDYN_ISA::channels_last<double>,
      RNNDYN_ISA::readout_zones<float>,
      RNNDYN_ISA::readout_zones<double>,
      RNNDYN_ISA::trajectory_norms<float>,
      RNNDYN_ISA::trajectory_norms<double>,
      RNNDYN_ISA::ctrnn_forward<float>,
      RNNDYN_ISA::ctrnn_forward<double>,
      RNNDYN_ISA::ctrnn_backward<float>,
      RNNDYN_ISA::ctrnn_backward<double>,
      RNNDYN_ISA::ctrnn_train<float>,
      RNNDYN_ISA::ctrnn_train<double>,
      RNNDYN_ISA::ctrnn_forward_workspace<double>,
      RNNDYN_ISA::ctrnn_backward_workspace<double>,
      RNNDYN_ISA::ctrnn_train_workspace<double>,
      RNNDYN_ISA::winograd_conv,
      RNNDYN_ISA::winograd_conv_workspace,
      RNNDYN_ISA::winograd_pack_weight,
      RNNDYN_ISA::winograd_packed_size,
      RNNDYN_ISA::winograd_weight_grad,
      RNNDYN_ISA::winograd_weight_grad_workspace,
      RNNDYN_ISA::winograd_weight_grad_sums,
      RNNDYN_ISA::amx_conv,
      RNNDYN_ISA::amx_conv_workspace,
      RNNDYN_ISA::amx_pack_weight,
      RNNDYN_ISA::amx_packed_size,
      RNNDYN_ISA::amx_weight_grad,
      RNNDYN_ISA::amx_weight_grad_workspace,
  };
  return table;
}

}  // namespace rnndyn
