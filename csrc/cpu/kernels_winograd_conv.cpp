// Convolutions in the Winograd domain. Compiled once per instruction set: see kernels.h.
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

void add_winograd_conv(KernelTable& table) {
  table.winograd_conv = winograd_conv;
  table.winograd_conv_workspace = winograd_conv_workspace;
  table.winograd_pack_weight = winograd_pack_weight;
  table.winograd_packed_size = winograd_packed_size;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
