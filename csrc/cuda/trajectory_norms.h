// Parameters of the trajectory_norms op on CUDA: the L2 norm of every sample at every time step, and how far it moves between steps.
//
// The caller owns every buffer, on one device. Steps and rows of the input may be strided (strides in elements); within a row elements are
// contiguous. No output may alias the input.
#pragma once
#include <cstdint>

namespace rnndyn::cuda {

template <typename T>
struct TrajectoryNormsParams {
  int64_t timesteps, samples, dims;  // T, N, D, each at least 1
  const T* values;                   // [T, N, D]
  int64_t step_stride, row_stride;
  // Outputs, all written.
  double* norm;    // [T, N]
  double* change;  // [T - 1, N]
};

template <typename T>
void launch_trajectory_norms(const TrajectoryNormsParams<T>& p, void* stream);

}  // namespace rnndyn::cuda
