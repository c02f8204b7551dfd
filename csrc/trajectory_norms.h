// Parameters of the trajectory_norms op: the L2 norm of every sample at every time step, and how far it moves between steps.
//
// Every buffer is owned by the caller, who allocates it. Steps and rows of the input may be strided (strides in elements); within a row
// elements are contiguous. No output may alias the input.
#pragma once
#include <cstdint>

namespace rnndyn {

template <typename Real>
struct TrajectoryNormsParams {
  int64_t timesteps, samples, dims;  // T, N, D, each at least 1
  int num_threads;
  const Real* values;  // [T, N, D]
  int64_t step_stride, row_stride;
  // Outputs, all written.
  double* norm;    // [T, N]
  double* change;  // [T - 1, N]
};

}  // namespace rnndyn
