// A fingerprint of 128 bits of a buffer's bytes, so that a change can be noticed without a copy to compare with.
//
// Maths: pieces of 1 MiB, each by 8 lanes of 64 bits that take one word after another, a <- (a ^ w) k, a <- a ^ (a >> 32), with odd k: of a and of w a
//   bijection. So a change of one word always shows, and any other that was not made to hide does but for one in 2^64.
// Traffic: every byte once; 64 bytes take about 6 cycles. A page ahead of where it reads it asks for lines, as the hardware's prefetching stops at
//   the end of a page (measured on 32 MB: 1.4 ms instead of 5.2). Threads share the pieces, which are combined in order: the number of threads changes nothing.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rnndyn {

constexpr int64_t kFingerprintPiece = 1 << 20, kFingerprintAhead = 4096;

inline uint64_t fingerprint_mix(uint64_t a, uint64_t word, uint64_t odd) {
  a = (a ^ word) * odd;
  return a ^ (a >> 32);
}

inline std::array<uint64_t, 2> fingerprint_piece(const unsigned char* bytes, int64_t size) {
  // (Odd, with about as many ones as zeros: the golden ratio's bits and its odd multiples.)
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
  uint64_t lane[8], odd[8];
  for (int k = 0; k < 8; ++k) odd[k] = kOdd * uint64_t(2 * k + 1), lane[k] = odd[k] ^ uint64_t(size);
  int64_t i = 0;
  for (; i + 64 <= size; i += 64) {
    __builtin_prefetch(bytes + i + kFingerprintAhead, 0, 3);  // (past the end it is harmless)
    for (int k = 0; k < 8; ++k) {
      uint64_t word;
      std::memcpy(&word, bytes + i + 8 * k, 8);
      lane[k] = fingerprint_mix(lane[k], word, odd[k]);
    }
  }
  uint64_t rest[8] = {};
  if (i < size) std::memcpy(rest, bytes + i, static_cast<size_t>(size - i));
  std::array<uint64_t, 2> result = {kOdd, ~kOdd};
  for (int k = 0; k < 8; ++k) {
    const uint64_t a = fingerprint_mix(lane[k], rest[k], odd[k]);
    result[0] = fingerprint_mix(result[0], a, odd[0]);
    result[1] = fingerprint_mix(result[1], a, odd[7 - k]);
  }
  return result;
}

inline std::array<uint64_t, 2> fingerprint(const void* data, int64_t size, int num_threads) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  const int64_t pieces = (size + kFingerprintPiece - 1) / kFingerprintPiece;
  std::vector<std::array<uint64_t, 2>> each(static_cast<size_t>(pieces));
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = i * kFingerprintPiece;
    each[static_cast<size_t>(i)] =
        fingerprint_piece(bytes + first, size - first < kFingerprintPiece ? size - first : kFingerprintPiece);
  }
  return fingerprint_piece(reinterpret_cast<const unsigned char*>(each.data()), pieces * 16);
}

}  // namespace rnndyn
