// One time step with a norm per channel. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/area_step_kernel.h"
#include "cpu/ctrnn_math_kernel.h"
#include "cpu/gate_math_kernel.h"
#include "cpu/gate_rules_kernel.h"
#include "cpu/activation_kernel.h"
#include "cpu/norm_step_kernel.h"

void add_norm_step(KernelTable& table) {
  table.norm_step_forward_f32 = norm_step_forward<float>;
  table.norm_step_forward_f64 = norm_step_forward<double>;
  table.norm_step_backward_f32 = norm_step_backward<float>;
  table.norm_step_backward_f64 = norm_step_backward<double>;
  table.norm_step_workspace = norm_step_workspace;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
