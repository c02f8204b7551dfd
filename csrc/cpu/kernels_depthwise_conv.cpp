// Convolutions of small groups, and separable ones. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/winograd_transform_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/depthwise_conv_kernel.h"
#include "cpu/separable_conv_kernel.h"

void add_depthwise_conv(KernelTable& table) {
  table.depthwise_conv_f32 = depthwise_conv<float>;
  table.depthwise_conv_f64 = depthwise_conv<double>;
  table.depthwise_weight_grad_f32 = depthwise_weight_grad<float>;
  table.depthwise_weight_grad_f64 = depthwise_weight_grad<double>;
  table.separable_conv = separable_conv;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
