// Continuous-time RNNs: forward and backward. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/ctrnn_math_kernel.h"
#include "cpu/ctrnn_kernel.h"
#include "cpu/ctrnn_op_kernel.h"

void add_ctrnn(KernelTable& table) {
  table.ctrnn_forward_f32 = ctrnn_forward<float>;
  table.ctrnn_forward_f64 = ctrnn_forward<double>;
  table.ctrnn_backward_f32 = ctrnn_backward<float>;
  table.ctrnn_backward_f64 = ctrnn_backward<double>;
  table.ctrnn_forward_workspace = ctrnn_forward_workspace<double>;
  table.ctrnn_backward_workspace = ctrnn_backward_workspace<double>;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
