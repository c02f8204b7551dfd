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
  kNoOptIn,      // `resources`: the opt-in to dynamic shared memory left out
  kSharedLimit,  // more shared memory than a block can have
  kThreads,      // more threads than a block can have
  kGrid,         // more blocks in y than a grid can have
};

struct PlantedParams {
  const float* in;  // [65]; `matrix`: halves, A [16, 16] and then B [8, 16]
  float* out;       // [64]; `matrix`: [16, 8]
  Planted fault;
};

void launch_planted(const char* which, const PlantedParams& p);

}  // namespace rnndyn::cuda
