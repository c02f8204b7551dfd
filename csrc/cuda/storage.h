// Half-precision storage types: their bits. Arithmetic on them is in device.h.
#pragma once
#include <cstdint>

namespace rnndyn::cuda {

struct Half {
  static constexpr bool kBFloat16 = false;
  uint16_t bits;
};
struct BFloat16 {
  static constexpr bool kBFloat16 = true;
  uint16_t bits;
};

}  // namespace rnndyn::cuda
