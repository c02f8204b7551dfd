#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

namespace rnndyn {
namespace {

std::atomic<const KernelTable*> current{nullptr};

const KernelTable* find(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &kernel_table_portable();
#ifdef RNNDYN_X86
  if (std::strcmp(name, "avx2") == 0) return &kernel_table_avx2();
  if (std::strcmp(name, "avx512") == 0) return &kernel_table_avx512();
#endif
  return nullptr;
}

}  // namespace

bool isa_supported(const char* name) {
  if (std::strcmp(name, "portable") == 0) return true;
#ifdef RNNDYN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

void select_isa(const char* name) {
  const KernelTable* table = find(name);
  if (table == nullptr)
    throw std::invalid_argument(
        std::string("RNNDYN_ISA: expected portable, avx2 or avx512, as far as this build has them, got '") + name +
        "'");
  if (!isa_supported(name))
    throw std::invalid_argument(std::string("RNNDYN_ISA: this processor cannot run '") + name + "'");
  current.store(table);
}

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_relaxed);
  if (table == nullptr) {
    const char* wanted = std::getenv("RNNDYN_ISA");
    if (wanted != nullptr && wanted[0] != '\0') {
      select_isa(wanted);
    } else {
      select_isa(isa_supported("avx512") ? "avx512" : isa_supported("avx2") ? "avx2" : "portable");
    }
    table = current.load();
  }
  return *table;
}

}  // namespace rnndyn
