// Kernels that have a fault on demand (planted.cu).
#pragma once

namespace rnndyn::cuda {

enum class Planted {
  kNone,
  kRead,
  kWrite,
  kSharedBounds,
  kUnwrittenShared,
  kMissingBarrier,
  kWriteAfterRead,
  kDivergentBarrier,
  kReturnBeforeBarrier,
  kInput,
  kOtherBlock,
  kDivergentShuffle,
  kMissingWarpBarrier,
  kMisaligned,
  kUnwrittenOutput,
  kMissingWait,
  kFragment,
};

struct PlantedParams {
  const float* in;  // [65]; `matrix`: halves, A [16, 16] and then B [8, 16]
  float* out;       // [64]; `matrix`: [16, 8]
  Planted fault;
};

void launch_planted(const char* which, const PlantedParams& p);

}  // namespace rnndyn::cuda
