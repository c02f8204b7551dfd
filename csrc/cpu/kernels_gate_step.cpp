// Gates and activations of cells. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/area_step_kernel.h"
#include "cpu/ctrnn_math_kernel.h"
#include "cpu/gate_math_kernel.h"
#include "cpu/gate_rules_kernel.h"
#include "cpu/gate_step_kernel.h"
#include "cpu/activation_kernel.h"

void add_gate_step(KernelTable& table) {
  table.gate_step_f32 = gate_step<float>;
  table.gate_step_f64 = gate_step<double>;
  table.activation_backward_f32 = activation_backward<float>;
  table.activation_backward_f64 = activation_backward<double>;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
