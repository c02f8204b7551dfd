// Matrix products of a warp and asynchronous copies: inline PTX under nvcc, the SIMT harness under the host compiler. sm_80 and later.
#pragma once
#include "cuda/device.h"

namespace rnndyn::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory past the registers and the L1 cache; of them the first `bytes` from global memory, the rest zero.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kGroupsLeft of this thread's groups are on their way.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 bring the addresses of the rows of matrix i.
__device__ __forceinline__ void load_matrix_x4(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(const void* row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// C [16, 8] += A [16, 16] B [16, 8], float32 accumulation.
template <typename T>
__device__ __forceinline__ void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]);

template <>
__device__ __forceinline__ void mma<Half>(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<BFloat16>(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline void copy_async_16(void* shared, const void* global, int bytes) { simt::copy_async(shared, global, bytes); }
inline void commit_copies() { simt::commit_copies(); }
template <int kGroupsLeft>
inline void wait_copies() {
  simt::wait_copies(kGroupsLeft);
}
inline void load_matrix_x4(const void* row, uint32_t (&to)[4]) {
  simt::warp_matrix_op(SIMT_SITE, simt::WarpOp::kLoadMatrix, row, nullptr, to);
}
inline void load_matrix_x4_transposed(const void* row, uint32_t (&to)[4]) {
  simt::warp_matrix_op(SIMT_SITE, simt::WarpOp::kLoadMatrixTransposed, row, nullptr, to);
}
template <typename T>
inline void mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  constexpr simt::WarpOp op = T::kBFloat16 ? simt::WarpOp::kMmaBf16 : simt::WarpOp::kMmaF16;
  simt::warp_matrix_op(SIMT_SITE, op, a, b, c);
}

#endif

}  // namespace rnndyn::cuda
