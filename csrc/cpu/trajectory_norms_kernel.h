// trajectory_norms: ||x[t, n]|| and ||x[t + 1, n] - x[t, n]|| of long rows. Included by its family inside namespace
// rnndyn::<isa>; parameters are documented in trajectory_norms.h.
//
// Precision: sums over a block of kNormBlock elements in Real, in vector lanes; sums of blocks in double.
// Traffic: every value is read once from memory: time is walked within a block, so the step before is still in the
//   first-level cache (two blocks of 16 KiB in float32). Bound by memory bandwidth.
// Threads: over samples.
// Determinism: no sum crosses samples, so results do not depend on the thread count.
// Limits: the caller checks shapes and strides. NaN and infinite values come out as such.

constexpr int64_t kNormBlock = 4096;

template <typename Real>
void trajectory_norms(const TrajectoryNormsParams<Real>& p) {
  const int64_t steps = p.timesteps, samples = p.samples;
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t t = 0; t < steps; ++t) p.norm[t * samples + n] = 0.0;
    for (int64_t t = 0; t + 1 < steps; ++t) p.change[t * samples + n] = 0.0;
    for (int64_t first = 0; first < p.dims; first += kNormBlock) {
      const int64_t count = p.dims - first < kNormBlock ? p.dims - first : kNormBlock;
      for (int64_t t = 0; t < steps; ++t) {
        const Real* now = p.values + t * p.step_stride + n * p.row_stride + first;
        Real squares = 0, moved = 0;
        if (t == 0) {
#pragma omp simd reduction(+ : squares)
          for (int64_t d = 0; d < count; ++d) squares += now[d] * now[d];
        } else {
          const Real* before = now - p.step_stride;
#pragma omp simd reduction(+ : squares, moved)
          for (int64_t d = 0; d < count; ++d) {
            const Real delta = now[d] - before[d];
            squares += now[d] * now[d];
            moved += delta * delta;
          }
          p.change[(t - 1) * samples + n] += double(moved);
        }
        p.norm[t * samples + n] += double(squares);
      }
    }
    for (int64_t t = 0; t < steps; ++t) p.norm[t * samples + n] = __builtin_sqrt(p.norm[t * samples + n]);
    for (int64_t t = 0; t + 1 < steps; ++t) p.change[t * samples + n] = __builtin_sqrt(p.change[t * samples + n]);
  }
}
