// One time step of an area: forward and backward. Compiled once per instruction set: see kernels.h.
#include "cpu/kernels.h"

namespace rnndyn {
namespace RNNDYN_ISA {
#include "cpu/area_step_kernel.h"
#include "cpu/area_step_backward_kernel.h"

void add_area_step(KernelTable& table) {
  table.area_step_forward_f32 = area_step_forward<float>;
  table.area_step_forward_f64 = area_step_forward<double>;
  table.area_step_backward_f32 = area_step_backward<float>;
  table.area_step_backward_f64 = area_step_backward<double>;
}

}  // namespace RNNDYN_ISA
}  // namespace rnndyn
