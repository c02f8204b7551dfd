// The CPU kernels of one instruction set, as plain function pointers. kernels.cpp is compiled once per instruction set and
// each build exports one table; dispatch.cpp chooses among them at run time.
#pragma once
#include "area_step.h"
#include "gate_step.h"
#include "readout_zones.h"
#include "winograd_conv.h"

namespace rnndyn {

struct KernelTable {
  const char* isa;
  void (*area_step_forward_f32)(const AreaStepForwardParams<float>&);
  void (*area_step_forward_f64)(const AreaStepForwardParams<double>&);
  void (*area_step_backward_f32)(const AreaStepBackwardParams<float>&);
  void (*area_step_backward_f64)(const AreaStepBackwardParams<double>&);
  void (*gate_step_f32)(const GateStepParams<float>&, bool backward);
  void (*gate_step_f64)(const GateStepParams<double>&, bool backward);
  void (*readout_zones_f32)(const ReadoutZonesParams<float>&);
  void (*readout_zones_f64)(const ReadoutZonesParams<double>&);
  void (*winograd_conv)(const WinogradConvParams&);
  int64_t (*winograd_conv_workspace)(const WinogradConvParams&);  // floats
  void (*winograd_pack_weight)(const WinogradPackParams&);
  int64_t (*winograd_packed_size)(const WinogradPackParams&);  // floats
  void (*winograd_weight_grad)(const WinogradWeightGradParams&);
  int64_t (*winograd_weight_grad_workspace)(const WinogradWeightGradParams&);  // floats
};

const KernelTable& kernel_table_portable();
const KernelTable& kernel_table_avx2();
const KernelTable& kernel_table_avx512();

// The table in use: the best one this processor can run, unless the environment variable RNNDYN_ISA (portable, avx2, avx512)
// or select_isa() says otherwise. Throws std::invalid_argument for a name that is unknown or cannot run here.
const KernelTable& kernels();
void select_isa(const char* name);
bool isa_supported(const char* name);

}  // namespace rnndyn
