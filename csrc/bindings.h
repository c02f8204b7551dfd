// What the files of bindings share: addresses as Python hands them over, and lists of terms.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "area_step.h"

namespace rnndyn {

using Address = uintptr_t;
using Shape = std::array<int64_t, 4>;  // samples, height, width, channels where nothing else is said

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Real>
inline int fill_terms(const Real* (&out)[kMaxTerms], const std::vector<Address>& terms, const char* name) {
  if (terms.size() > kMaxTerms)
    throw std::invalid_argument(std::string(name) + ": at most " + std::to_string(kMaxTerms) + " terms, got " +
                                std::to_string(terms.size()));
  for (size_t i = 0; i < kMaxTerms; ++i) out[i] = i < terms.size() ? pointer<const Real>(terms[i]) : nullptr;
  return static_cast<int>(terms.size());
}

// norm_step and depthwise_conv.
void bind_steps(pybind11::module_& m);

// winograd_conv and amx_conv.
void bind_convolutions(pybind11::module_& m);

}  // namespace rnndyn
