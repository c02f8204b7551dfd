#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(RNNDYN_HAS_amx) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernel_table.h"

namespace rnndyn {
namespace {

#ifdef RNNDYN_HAS_amx
// Matrix units of bfloat16: the processor has them (leaf 7: AMX-BF16, AMX-TILE, AVX512-BF16 in subleaf 1), and the system lets this process use
// their registers, which has to be asked for once.
bool matrix_units() {
#if defined(RNNDYN_HAS_amx) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

std::atomic<const KernelTable*> current{nullptr};

const KernelTable* find(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &kernel_table_portable();
#ifdef RNNDYN_HAS_avx2
  if (std::strcmp(name, "avx2") == 0) return &kernel_table_avx2();
#endif
#ifdef RNNDYN_HAS_avx512
  if (std::strcmp(name, "avx512") == 0) return &kernel_table_avx512();
#endif
#ifdef RNNDYN_HAS_amx
  if (std::strcmp(name, "amx") == 0) return &kernel_table_amx();
#endif
  return nullptr;
}

}  // namespace

bool isa_supported(const char* name) {
  if (std::strcmp(name, "portable") == 0) return true;
#if defined(RNNDYN_HAS_avx2) || defined(RNNDYN_HAS_avx512)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef RNNDYN_HAS_avx2
  if (std::strcmp(name, "avx2") == 0) return avx2;
#endif
#ifdef RNNDYN_HAS_avx512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0) return avx512;
#endif
#ifdef RNNDYN_HAS_amx
  if (std::strcmp(name, "amx") == 0) return avx512 && matrix_units();
#endif
  return false;
}

void select_isa(const char* name) {
  const KernelTable* table = find(name);
  if (table == nullptr)
    throw std::invalid_argument(
        std::string("RNNDYN_ISA: expected portable, avx2, avx512 or amx, as far as this build has them, got '") + name +
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
      const char* best = "portable";
      for (const char* isa : {"avx2", "avx512", "amx"})
        if (isa_supported(isa)) best = isa;
      select_isa(best);
    }
    table = current.load();
  }
  return *table;
}

}  // namespace rnndyn
