// Test-only: what a .cu file needs of CUDA, for the host compiler. Kernels run one block after another, the block's threads as fibers
// with real barriers, and every load and store is checked.
//
// The .cu files are compiled with -fsanitize=thread, whose calls at each load and store (__tsan_read4(address) and so on) come to
// this harness, not to libtsan. So device code is checked as it stands, without proxies for its pointers. Reported, each as a
// simt::Fault that ends the launch: accesses outside the buffers registered, writes to inputs, misaligned accesses, reads of shared
// or output memory that nothing has written, races (memory.h), barriers and warp operations that not all threads reach, and the use of
// shared memory while an asynchronous copy into it is on its way; and launches that a device refuses: grids and blocks that are too large, more
// static and dynamic shared memory than a block has (48 KiB where the kernel has not opted in to more), more registers than a
// multiprocessor has.
//
// Not modelled: independent forward progress of diverged threads beyond their waiting for each other, caches, the order in which
// blocks run (no kernel may depend on it), and the rounding inside a tensor-core product (each product and sum is rounded to float32).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "simt/half.h"

#define __global__ static __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the code a thread waits.
struct Site {
  const char* file;
  int line;
};

enum class WarpOp { kSync, kShuffle, kBallot, kLoadMatrix, kLoadMatrixTransposed, kMmaF16, kMmaBf16 };

dim3 thread_index();
dim3 block_index();
dim3 block_dim();
dim3 grid_dim();

void sync_threads(Site site);
// Waits for the lanes of the mask; in and out mean what the operation says.
uint64_t warp_op(Site site, WarpOp op, uint32_t mask, uint64_t value, int lane);
void warp_matrix_op(Site site, WarpOp op, const void* a, const void* b, void* c);

void* dynamic_shared();
void* static_shared(Site site, size_t bytes);

void check_aligned(const void* address, size_t bytes);
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int groups_left);

float atomic_add(float* address, float value);
int atomic_add(int* address, int value);

// The kernel opts in to more shared memory than the 48 KiB that any block may have.
void allow_dynamic_shared(const void* kernel);
// Blocks of a kernel that all multiprocessors hold at once.
int64_t blocks_at_once(const char* name, int threads, size_t shared_bytes);
void launch(const char* name, const void* kernel, void (*entry)(const void*), const void* closure, size_t closure_bytes,
            dim3 grid, dim3 block, size_t shared_bytes);

template <typename T>
T shuffle(Site site, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_op(site, WarpOp::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

int lane();

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())

#define SIMT_SITE (::simt::Site{__FILE__, __LINE__})
#define __syncthreads() ::simt::sync_threads(SIMT_SITE)
#define SIMT_SYNCWARP(mask) ::simt::warp_op(SIMT_SITE, ::simt::WarpOp::kSync, mask, 0, 0)
#define __syncwarp() SIMT_SYNCWARP(0xffffffffu)
#define __shfl_sync(mask, value, lane) ::simt::shuffle(SIMT_SITE, mask, value, lane)
#define __shfl_xor_sync(mask, value, bits) ::simt::shuffle(SIMT_SITE, mask, value, ::simt::lane() ^ (bits))
// Past the warp's end a lane keeps its own value.
#define __shfl_down_sync(mask, value, delta) \
  ::simt::shuffle(SIMT_SITE, mask, value, ::simt::lane() + (delta) < 32 ? ::simt::lane() + (delta) : ::simt::lane())
#define __ballot_sync(mask, predicate) \
  uint32_t(::simt::warp_op(SIMT_SITE, ::simt::WarpOp::kBallot, mask, (predicate) ? 1 : 0, 0))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

inline float atomicAdd(float* address, float value) { return simt::atomic_add(address, value); }
inline int atomicAdd(int* address, int value) { return simt::atomic_add(address, value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
