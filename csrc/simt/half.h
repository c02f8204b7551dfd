// Half-precision numbers as their 16 bits, for the SIMT harness: conversions as the device's, to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

namespace simt {

static inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  uint32_t word;
  if (exponent == 31) {
    word = sign | 0x7f800000u | fraction << 13;
  } else if (exponent != 0) {
    word = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    const float magnitude = float(fraction) * (1.0f / 16777216.0f);  // 2^-24
    std::memcpy(&word, &magnitude, 4);
    word |= sign;
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

static inline float bf16_bits_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

static inline uint16_t float_to_half_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                    // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and more: infinity
  if (magnitude >= 0x38800000u) {                                // 2^-14 and more: a normal number
    const uint32_t odd = magnitude >> 13 & 1;
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + odd) >> 13));
  }
  // A multiple of 2^-24. Adding 2^-1, whose last bit is worth 2^-24, rounds to it.
  float shifted;
  std::memcpy(&shifted, &magnitude, 4);
  shifted += 0.5f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return uint16_t(sign | (bits - 0x3f000000u));
}

static inline uint16_t float_to_bf16_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace simt
