// Parameters of the channels_last op: maps from [N, C, P] to [N, P, C].
//
// Both buffers are owned by the caller and do not overlap; the output is written whole.
#pragma once
#include <cstdint>

namespace rnndyn {

template <typename Real>
struct ChannelsLastParams {
  int64_t samples, channels, pixels;  // N, C, P, each at least 1
  int num_threads;
  const Real* x;  // [N, C, P]
  Real* y;        // [N, P, C]
};

}  // namespace rnndyn
