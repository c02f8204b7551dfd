// What both directions of area_step do at an element: sums of terms, the norm. Included by area_step_forward.cu and
// area_step_backward.cu.
#pragma once
#include "cuda/device.h"

namespace rnndyn::cuda {

// The sum of the terms at N adjacent elements of a pixel, plus a bias per channel and a constant.
template <int N, typename T>
__device__ __forceinline__ void sum_terms(const T* const* terms, int num_terms, const float* bias, float constant,
                                          int64_t offset, int channel, float (&sum)[N]) {
  fill(sum, constant);
  for (int k = 0; k < num_terms; ++k) {
    float x[N];
    load(terms[k] + offset, x);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += x[j];
  }
  if (bias != nullptr) {
    float x[N];
    load(bias + channel, x);
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += x[j];
  }
}

// One expression for both directions (with its fused multiply-add spelled out), so that backward sees the signs that forward saw.
__device__ __forceinline__ float normalised(float z, float mean, float rstd, float gamma, float beta) {
  return fmaf((z - mean) * rstd, gamma, beta);
}

template <int N>
__device__ __forceinline__ void store_bytes(uint8_t* to, const uint8_t (&from)[N]) {
  Vector<uint8_t, N> vector;
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) vector.v[j] = from[j];
  *reinterpret_cast<Vector<uint8_t, N>*>(to) = vector;
}

template <int N>
__device__ __forceinline__ void load_bytes(const uint8_t* from, uint8_t (&to)[N]) {
  const Vector<uint8_t, N> vector = *reinterpret_cast<const Vector<uint8_t, N>*>(from);
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) to[j] = vector.v[j];
}

// Loads and stores are of 16 bytes where the channels allow it; then every buffer must begin at a multiple of that, but one of bytes at a
// multiple of as many as it has to the others' 16. Absent ones do.
template <typename... Pointers>
void require_aligned(const char* op, const Pointers*... pointers) {
  if (((reinterpret_cast<uintptr_t>(pointers) % 16 != 0) || ...))
    throw std::invalid_argument(std::string(op) + ": expected buffers whose addresses are multiples of 16");
}
template <typename T>
void require_aligned_bytes(const char* op, const uint8_t* bytes) {
  if (reinterpret_cast<uintptr_t>(bytes) % kWidest<T> != 0)
    throw std::invalid_argument(std::string(op) + ": expected a buffer of bytes whose address is a multiple of " +
                                std::to_string(kWidest<T>));
}
template <typename T>
void require_aligned_terms(const char* op, const T* const* terms, int num_terms) {
  for (int k = 0; k < num_terms; ++k) require_aligned(op, terms[k]);
}

}  // namespace rnndyn::cuda
