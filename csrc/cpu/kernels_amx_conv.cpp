// Convolutions on matrix units, or their emulation. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/winograd_transform_kernel.h"
#include "cpu/gemm_kernel.h"
#include "cpu/conv_epilogue_kernel.h"
#include "cpu/amx_tile_kernel.h"
#include "cpu/amx_pack_kernel.h"
#include "cpu/amx_conv_kernel.h"
#include "cpu/amx_weight_grad_kernel.h"

void add_amx_conv(KernelTable& table) {
  table.amx_conv = amx_conv;
  table.amx_conv_workspace = amx_conv_workspace;
  table.amx_pack_weight = amx_pack_weight;
  table.amx_packed_size = amx_packed_size;
  table.amx_weight_grad = amx_weight_grad;
  table.amx_weight_grad_workspace = amx_weight_grad_workspace;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
