// What kernels are written with: storage types, vectors, sums over a block, launches. Under nvcc this is CUDA; under the host compiler
// it is the SIMT harness (simt/simt.h), on which the tests run the same kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/storage.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// type name[count], of a block
#define RNNDYN_SHARED(type, name, count) __shared__ type name[count]
// The block's dynamic shared memory, aligned to 128 bytes.
#define RNNDYN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define RNNDYN_UNROLL _Pragma("unroll")
#else
#include "simt/simt.h"
#define RNNDYN_SHARED(type, name, count) \
  type* name = static_cast<type*>(::simt::static_shared(SIMT_SITE, sizeof(type) * (count)))
#define RNNDYN_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::simt::dynamic_shared())
#define RNNDYN_UNROLL
#endif

namespace rnndyn::cuda {

using Stream = void*;  // a cudaStream_t

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------- storage types

__device__ __forceinline__ float to_float(float x) { return x; }

#ifdef __CUDACC__
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ __forceinline__ void from_float(float x, Half* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ void from_float(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#else
inline float to_float(Half x) { return simt::half_bits_to_float(x.bits); }
inline float to_float(BFloat16 x) { return simt::bf16_bits_to_float(x.bits); }
inline void from_float(float x, Half* out) { out->bits = simt::float_to_half_bits(x); }
inline void from_float(float x, BFloat16* out) { out->bits = simt::float_to_bf16_bits(x); }
#endif
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }

// The nearest value that T holds.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  T stored;
  from_float(x, &stored);
  return to_float(stored);
}

// ---------------------------------------------------------------- vectors

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

// Elements of the widest load, 16 bytes.
template <typename T>
constexpr int kWidest = 16 / int(sizeof(T));

// N adjacent elements as floats, in loads of at most 16 bytes; the address is a multiple of each load's size.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int width = N < kWidest<T> ? N : kWidest<T>;
  RNNDYN_UNROLL
  for (int i = 0; i < N; i += width) {
#ifndef __CUDACC__
    simt::check_aligned(from + i, width * sizeof(T));
#endif
    const Vector<T, width> vector = *reinterpret_cast<const Vector<T, width>*>(from + i);
    RNNDYN_UNROLL
    for (int j = 0; j < width; ++j) to[i + j] = to_float(vector.v[j]);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  constexpr int width = N < kWidest<T> ? N : kWidest<T>;
  RNNDYN_UNROLL
  for (int i = 0; i < N; i += width) {
#ifndef __CUDACC__
    simt::check_aligned(to + i, width * sizeof(T));
#endif
    Vector<T, width> vector;
    RNNDYN_UNROLL
    for (int j = 0; j < width; ++j) from_float(from[i + j], &vector.v[j]);
    *reinterpret_cast<Vector<T, width>*>(to + i) = vector;
  }
}

template <int N>
__device__ __forceinline__ void fill(float (&x)[N], float value) {
  RNNDYN_UNROLL
  for (int i = 0; i < N; ++i) x[i] = value;
}

// ---------------------------------------------------------------- sums

__device__ __forceinline__ float warp_sum(float x) {
  RNNDYN_UNROLL
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// The sum over a block of kThreads, in all of its threads. scratch [kThreads / 32] may be used again after the next barrier.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();  // every warp's sum is in scratch
  float sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += scratch[i];
  return sum;
}

// ---------------------------------------------------------------- launches

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of one dimension: the largest that the device takes is 2^31 - 1 blocks.
inline dim3 blocks(int64_t count, const char* kernel) {
  if (count > 0x7fffffffll)
    throw std::invalid_argument(std::string(kernel) + ": the tensor needs more blocks than a grid can have");
  return dim3(static_cast<unsigned>(count));
}

// Lets launches of a kernel have all the dynamic shared memory that a block can have on the current device. Without it, a block's static and
// dynamic shared memory together may take 48 KiB.
void allow_dynamic_shared(const void* kernel, const char* name);

// Blocks of a kernel that the current device holds at once: on all of its multiprocessors, as registers and shared memory allow.
int64_t blocks_at_once(const void* kernel, const char* name, int threads, size_t shared_bytes);

template <typename Params>
int64_t blocks_at_once(void (*kernel)(Params), const char* name, int threads, size_t shared_bytes) {
  if (shared_bytes > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel), name);
  return blocks_at_once(reinterpret_cast<const void*>(kernel), name, threads, shared_bytes);
}

// Into how many parts to cut the depth of a sum that `blocks_of_one` blocks compute otherwise: as many as the device still holds at once. One
// more would leave few blocks to a second wave, which takes as long as the first; at least one, at most `most`.
inline int splits_of(int64_t blocks_of_one, int64_t held, int64_t most) {
  const int64_t wanted = held / blocks_of_one, splits = wanted < most ? wanted : most;
  return int(splits < 1 ? 1 : splits);
}

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

template <typename Params>
void start(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, Stream stream,
           const Params& p) {
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError(), name);
}
#else
template <typename Params>
struct Closure {
  void (*kernel)(Params);
  Params params;
  static void run(const void* closure) {
    const Closure* self = static_cast<const Closure*>(closure);
    self->kernel(self->params);
  }
};

template <typename Params>
void start(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, Stream,
           const Params& p) {
  const Closure<Params> closure{kernel, p};
  simt::launch(name, reinterpret_cast<const void*>(kernel), &Closure<Params>::run, &closure, sizeof(closure), grid,
               dim3(static_cast<unsigned>(threads)), shared_bytes);
}
#endif

template <typename Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, Stream stream,
            const Params& p) {
  // However few bytes: what the kernel has of static shared memory counts too.
  if (shared_bytes > 0) allow_dynamic_shared(reinterpret_cast<const void*>(kernel), name);
  start(kernel, name, grid, threads, shared_bytes, stream, p);
}

}  // namespace rnndyn::cuda
