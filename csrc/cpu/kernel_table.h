// The CPU kernels of one instruction set, as plain function pointers. Each kernels_<family>.cpp is
// compiled once per instruction set, kernels.cpp makes a table of each set, and dispatch.cpp chooses among them at run time.
#pragma once
#include "amx_conv.h"
#include "area_step.h"
#include "ctrnn.h"
#include "depthwise_conv.h"
#include "gate_step.h"
#include "channels_last.h"
#include "norm_step.h"
#include "readout_zones.h"
#include "trajectory_norms.h"
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
  void (*activation_backward_f32)(const ActivationBackwardParams<float>&);
  void (*activation_backward_f64)(const ActivationBackwardParams<double>&);
  void (*norm_step_forward_f32)(const NormStepForwardParams<float>&);
  void (*norm_step_forward_f64)(const NormStepForwardParams<double>&);
  void (*norm_step_backward_f32)(const NormStepBackwardParams<float>&);
  void (*norm_step_backward_f64)(const NormStepBackwardParams<double>&);
  int64_t (*norm_step_workspace)(const NormStepShape&);  // doubles
  void (*depthwise_conv_f32)(const DepthwiseConvParams<float>&);
  void (*depthwise_conv_f64)(const DepthwiseConvParams<double>&);
  void (*depthwise_weight_grad_f32)(const DepthwiseWeightGradParams<float>&);
  void (*depthwise_weight_grad_f64)(const DepthwiseWeightGradParams<double>&);
  void (*separable_conv)(const SeparableConvParams&);
  void (*channels_last_f32)(const ChannelsLastParams<float>&);
  void (*channels_last_f64)(const ChannelsLastParams<double>&);
  void (*readout_zones_f32)(const ReadoutZonesParams<float>&);
  void (*readout_zones_f64)(const ReadoutZonesParams<double>&);
  void (*trajectory_norms_f32)(const TrajectoryNormsParams<float>&);
  void (*trajectory_norms_f64)(const TrajectoryNormsParams<double>&);
  void (*ctrnn_forward_f32)(const CtrnnForwardParams<float>&);
  void (*ctrnn_forward_f64)(const CtrnnForwardParams<double>&);
  void (*ctrnn_backward_f32)(const CtrnnBackwardParams<float>&);
  void (*ctrnn_backward_f64)(const CtrnnBackwardParams<double>&);
  void (*ctrnn_train_f32)(const CtrnnTrainParams<float>&);
  void (*ctrnn_train_f64)(const CtrnnTrainParams<double>&);
  // Bytes, for both dtypes.
  int64_t (*ctrnn_forward_workspace)(const CtrnnShape&, int num_threads);
  int64_t (*ctrnn_backward_workspace)(const CtrnnShape&, int num_threads);
  int64_t (*ctrnn_train_workspace)(const CtrnnShape&, int64_t loss_steps, int num_threads);
  void (*winograd_conv)(const WinogradConvParams&);
  int64_t (*winograd_conv_workspace)(const WinogradConvParams&);  // floats
  void (*winograd_pack_weight)(const WinogradPackParams&);
  int64_t (*winograd_packed_size)(const WinogradPackParams&);  // floats
  void (*winograd_weight_grad)(const WinogradWeightGradParams&);
  int64_t (*winograd_weight_grad_workspace)(const WinogradWeightGradParams&);  // floats
  int64_t (*winograd_weight_grad_sums)(const WinogradWeightGradParams&);       // floats
  void (*amx_conv)(const AmxConvParams&);
  int64_t (*amx_conv_workspace)(const AmxConvParams&);  // bytes
  void (*amx_pack_weight)(const AmxPackParams&);
  int64_t (*amx_packed_size)(const AmxPackParams&);  // elements of two bytes
  void (*amx_weight_grad)(const AmxWeightGradParams&);
  int64_t (*amx_weight_grad_workspace)(const AmxWeightGradParams&);  // bytes
};

const KernelTable& kernel_table_portable();
const KernelTable& kernel_table_avx2();
const KernelTable& kernel_table_avx512();
const KernelTable& kernel_table_amx();

// The table in use: the best one this processor can run, unless the environment variable RNNDYN_ISA (portable, avx2, avx512, amx)
// or select_isa() says otherwise. Throws std::invalid_argument for a name that is unknown or cannot run here.
const KernelTable& kernels();
void select_isa(const char* name);
bool isa_supported(const char* name);

}  // namespace rnndyn
