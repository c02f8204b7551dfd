// The table of each instruction set, from the functions that kernels_<family>.cpp define. Compiled once, without flags of any instruction set.
#include "cpu/kernel_table.h"

#define RNNDYN_DECLARE_KERNELS(isa)                  \
  namespace isa {                                    \
  void add_area_step(KernelTable& table);            \
  void add_ctrnn(KernelTable& table);                \
  void add_ctrnn_train(KernelTable& table);          \
  void add_gate_step(KernelTable& table);            \
  void add_norm_step(KernelTable& table);            \
  void add_depthwise_conv(KernelTable& table);       \
  void add_analysis(KernelTable& table);             \
  void add_winograd_conv(KernelTable& table);        \
  void add_winograd_weight_grad(KernelTable& table); \
  void add_amx_conv(KernelTable& table);             \
  }

// All families but that of matrix units.
#define RNNDYN_VECTOR_KERNELS(set, table) \
  (table).isa = #set;                     \
  set::add_area_step(table);              \
  set::add_ctrnn(table);                  \
  set::add_ctrnn_train(table);            \
  set::add_gate_step(table);              \
  set::add_norm_step(table);              \
  set::add_depthwise_conv(table);         \
  set::add_analysis(table);               \
  set::add_winograd_conv(table);          \
  set::add_winograd_weight_grad(table)

namespace rnndyn {

RNNDYN_DECLARE_KERNELS(portable)

namespace {

KernelTable portable_table() {
  KernelTable table{};
  RNNDYN_VECTOR_KERNELS(portable, table);
  portable::add_amx_conv(table);  // emulated
  return table;
}

}  // namespace

const KernelTable& kernel_table_portable() {
  static const KernelTable table = portable_table();
  return table;
}

#ifdef RNNDYN_HAS_avx2
RNNDYN_DECLARE_KERNELS(avx2)

const KernelTable& kernel_table_avx2() {
  static const KernelTable table = [] {
    KernelTable made = portable_table();  // the emulation of matrix units is in the portable build alone
    RNNDYN_VECTOR_KERNELS(avx2, made);
    return made;
  }();
  return table;
}
#endif

#ifdef RNNDYN_HAS_avx512
RNNDYN_DECLARE_KERNELS(avx512)

const KernelTable& kernel_table_avx512() {
  static const KernelTable table = [] {
    KernelTable made = portable_table();
    RNNDYN_VECTOR_KERNELS(avx512, made);
    return made;
  }();
  return table;
}
#endif

#ifdef RNNDYN_HAS_amx
RNNDYN_DECLARE_KERNELS(amx)

// What has no use for matrix units is that of AVX-512, whose flags are the same.
const KernelTable& kernel_table_amx() {
  static const KernelTable table = [] {
    KernelTable made = kernel_table_avx512();
    made.isa = "amx";
    amx::add_winograd_conv(made);
    amx::add_winograd_weight_grad(made);
    amx::add_amx_conv(made);
    return made;
  }();
  return table;
}
#endif

}  // namespace rnndyn
