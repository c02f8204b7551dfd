// Gradients of weights in the Winograd domain. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/winograd_transform_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/conv_epilogue_kernel.h"
#include "cpu/amx_tile_kernel.h"
#include "cpu/winograd_units_kernel.h"
#include "cpu/winograd_taps_kernel.h"
#include "cpu/winograd_pack_kernel.h"
#include "cpu/winograd_conv_kernel.h"
#include "cpu/winograd_weight_grad_kernel.h"

void add_winograd_weight_grad(KernelTable& table) {
  table.winograd_weight_grad = winograd_weight_grad;
  table.winograd_weight_grad_workspace = winograd_weight_grad_workspace;
  table.winograd_weight_grad_sums = winograd_weight_grad_sums;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
