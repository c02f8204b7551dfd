// Continuous-time RNNs: training steps. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/ctrnn_math_kernel.h"
#include "cpu/ctrnn_kernel.h"
#include "cpu/ctrnn_op_kernel.h"
#include "cpu/ctrnn_train_kernel.h"

void add_ctrnn_train(KernelTable& table) {
  table.ctrnn_train_f32 = ctrnn_train<float>;
  table.ctrnn_train_f64 = ctrnn_train<double>;
  table.ctrnn_train_workspace = ctrnn_train_workspace<double>;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
