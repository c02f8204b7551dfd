// What every kernels_<family>.cpp begins with. Each is compiled once per instruction set with RNNDYN_ISA set to its name (see CMakeLists.txt), and
// defines one function, rnndyn::<isa>::add_<family>, which enters its kernels into a table; kernels.cpp puts the tables together.
// Everything that the kernel headers define lives in rnndyn::<isa>, and they use no inline function of the standard library: the linker keeps one
// copy of those, which might then hold instructions that the processor at hand does not have.
#pragma once
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <stdlib.h>

#include "cpu/kernel_table.h"

#ifdef _WIN32
#include <malloc.h>
// Aligned memory has its own function to free it there: kernels take all their memory as aligned.
#define malloc(size) _aligned_malloc(size, 64)
#define free(memory) _aligned_free(memory)
static int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = _aligned_malloc(size, alignment);
  return *memory == nullptr;
}
#endif
