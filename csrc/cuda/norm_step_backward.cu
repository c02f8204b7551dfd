// norm_step on CUDA, backward.
//
// Maths: with z, xhat = (z - mean) * rstd and y = xhat * gamma + beta as in forward, g = dh f'(y), and means over what the statistics are of
//   dbeta = sum g;  dgamma = sum g xhat;  dz = rstd (g gamma - mean(g gamma) - xhat mean(g gamma xhat))
//   dd = dz 2 s(m) a'(d);  dm = dz a(d) 2 s(m) (1 - s(m))
// Precision: storage T, arithmetic float32; z, xhat and s are made again from the stored sums. A thread adds at most 256 pixels, threads and chunks
//   are added in trees or strides of fixed form.
// Traffic: gradient and sums are read twice (once without a norm), gradients written once. Bound by memory bandwidth.
// Launch shape: as forward; totals: 1 to 32 lanes of a warp per number.
// Sync: between the levels of a tree over threads, in shared memory; passes are launches.
// Determinism: chunks depend on the shape alone, and no sum's order on the schedule.
// Limits: the caller checks shapes.
#include "cuda/norm_step_grid.h"

namespace rnndyn::cuda {
namespace {

template <typename T>
struct NormBackwardLaunch {
  NormStepBackwardParams<T> p;
  NormStepGrid grid;
  float* sums;         // [samples, chunks, C, 2] of g and g xhat
  const float* means;  // [samples, groups, 2] of g gamma and g gamma xhat; null: zero
};

// Of float alone: item k of `inner` adjacent ones adds `count` pairs, `inner` pairs apart, each times its weight.
template <typename Real>
struct NormTotalsLaunch {
  const float* pairs;   // [items / inner, count, inner, 2]
  const float* weight;  // [weight_rows, count], of item k row k % weight_rows; null: ones
  int weight_rows;
  float scale;
  int64_t items, inner;
  int count;
  int lanes;  // a power of two up to 32, of a warp, for each item
  float *first, *second;
  int stride;  // of both
};

template <int N>
struct NormGradient {
  float drive[N], factor[N], z[N], xhat[N], g[N];
  float gate[N];  // s(m)

  template <typename T>
  __device__ __forceinline__ NormGradient(const NormStepBackwardParams<T>& p, const NormRow<N>& row, int64_t at) {
    fill(drive, 0);
    if (p.drive != nullptr) load(p.drive + at, drive);
    float grad[N];
    load(p.grad_state + at, grad);
    fill(gate, 0.5f);
    if (p.rule.squash) {
      float m[N];
      load(p.modulator + at, m);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) gate[j] = sigmoid(m[j]);
    }
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      factor[j] = 2 * gate[j];
      z[j] = norm_value(p.rule, drive[j], factor[j]);
      xhat[j] = row.normed(j, z[j]);
      const float y = xhat[j] * row.gamma[j] + row.beta[j];
      g[j] = grad[j] * activation_slope(p.rule.activation, y, activated(p.rule.activation, y));
    }
  }
};

// Sums of g and g xhat of each channel of a chunk.
template <typename T, int N>
__global__ void __launch_bounds__(kNormThreads, 2) norm_step_backward_sums_kernel(NormBackwardLaunch<T> l) {
  RNNDYN_SHARED(float, shared, kNormThreads * 2 * N);
  const NormPlace at = norm_place<N>(l.p.rule, l.grid);
  float sums[2][N];
  fill(sums[0], 0);
  fill(sums[1], 0);
  if (at.active) {
    const NormRow<N> row = norm_row<N>(l.p, at);
    for (int i = at.row; i < at.pixels; i += at.rows) {
      const NormGradient<N> of(l.p, row, at.first + int64_t(i) * l.p.rule.channels);
      RNNDYN_UNROLL
      for (int j = 0; j < N; ++j) sums[0][j] += of.g[j], sums[1][j] += of.g[j] * of.xhat[j];
    }
  }
  add_rows(at, shared, sums);
  if (at.row > 0 || !at.active) return;
  const int64_t cell = (at.sample * l.grid.chunks + at.chunk) * l.p.rule.channels + at.channel;
  store_pairs(l.sums + 2 * cell, sums[0], sums[1]);
}

template <typename Real>
__global__ void __launch_bounds__(kNormThreads) norm_step_totals_kernel(NormTotalsLaunch<Real> l) {
  const int64_t thread = int64_t(blockIdx.x) * kNormThreads + int(threadIdx.x), item = thread / l.lanes;
  const int64_t outer = item / l.inner, in = item - outer * l.inner;
  float first = 0, second = 0;
  if (item < l.items) {
    for (int k = int(thread - item * l.lanes); k < l.count; k += l.lanes) {
      float pair[2];
      load(l.pairs + 2 * ((outer * l.count + k) * l.inner + in), pair);
      const float weight = l.weight != nullptr ? l.weight[item % l.weight_rows * l.count + k] : 1.0f;
      first += weight * pair[0], second += weight * pair[1];
    }
  }
  for (int bits = l.lanes / 2; bits > 0; bits /= 2) {
    first += __shfl_xor_sync(kAllLanes, first, bits);
    second += __shfl_xor_sync(kAllLanes, second, bits);
  }
  if (item >= l.items || thread != item * l.lanes) return;
  l.first[item * l.stride] = first * l.scale;
  l.second[item * l.stride] = second * l.scale;
}

// Gradients of the sums, perhaps in their places: a thread reads its elements before it writes them.
template <typename T, int N>
__global__ void __launch_bounds__(kNormThreads, 2) norm_step_backward_finish_kernel(NormBackwardLaunch<T> l) {
  const NormPlace at = norm_place<N>(l.p.rule, l.grid);
  if (!at.active) return;
  const NormStepBackwardParams<T>& p = l.p;
  const NormRow<N> row = norm_row<N>(p, at);
  float mean_p[N], mean_px[N];
  RNNDYN_UNROLL
  for (int j = 0; j < N; ++j) {
    mean_p[j] = mean_px[j] = 0;
    if (l.means == nullptr) continue;
    const int64_t k = 2 * norm_statistic(p.rule, at.sample, at.channel + j);
    mean_p[j] = l.means[k], mean_px[j] = l.means[k + 1];
  }
  for (int i = at.row; i < at.pixels; i += at.rows) {
    const int64_t element = at.first + int64_t(i) * p.rule.channels;
    const NormGradient<N> of(p, row, element);
    float drive[N], modulator[N];
    RNNDYN_UNROLL
    for (int j = 0; j < N; ++j) {
      const float dz = row.rstd[j] * (of.g[j] * row.gamma[j] - mean_p[j] - of.xhat[j] * mean_px[j]);
      drive[j] = p.rule.rectify_drive && !(of.drive[j] > 0) ? 0.0f : dz * of.factor[j];
      modulator[j] = dz * of.z[j] * (1 - of.gate[j]);
    }
    if (p.grad_drive != nullptr) store(p.grad_drive + element, drive);
    if (p.grad_modulator != nullptr) store(p.grad_modulator + element, modulator);
  }
}

void launch_totals(NormTotalsLaunch<float> l, Stream stream) {
  // A lane adds a few numbers by itself: shuffles would cost more.
  l.lanes = 1;
  while (l.lanes < kWarp && l.lanes * 8 < l.count) l.lanes *= 2;
  launch(norm_step_totals_kernel<float>, "norm_step_totals_kernel",
         blocks(ceil_divide(l.items * l.lanes, kNormThreads), "norm_step_totals_kernel"), kNormThreads, 0, stream, l);
}

template <typename T, int N>
void launch_vectors(const NormStepBackwardParams<T>& p, Stream stream) {
  const NormStepRule& r = p.rule;
  const NormStepGrid g = norm_step_grid(r, N);
  const int64_t count = g.samples * g.chunks * g.column_blocks, channels = r.channels;
  NormBackwardLaunch<T> l{p, g, p.workspace, nullptr};
  if (r.norm != NormKind::kNone) {
    float* totals = l.sums + 2 * g.samples * g.chunks * channels;  // [samples, C, 2]
    float* means = totals + 2 * g.samples * channels;
    launch(norm_step_backward_sums_kernel<T, N>, "norm_step_backward_sums_kernel",
           blocks(count, "norm_step_backward_sums_kernel"), kNormThreads, 0, stream, l);
    launch_totals({l.sums, nullptr, 1, 1, g.samples * channels, channels, int(g.chunks), 1, totals, totals + 1, 2},
                  stream);
    launch_totals({totals, nullptr, 1, 1, channels, channels, int(g.samples), 1, p.grad_beta, p.grad_gamma, 1}, stream);
    if (r.norm != NormKind::kFixed) {
      const int groups = r.norm == NormKind::kGroup ? r.groups : r.channels, width = r.channels / groups;
      const float scale = float(1.0 / (double(width) * double(g.pixels)));
      launch_totals({totals, p.gamma, groups, scale, g.samples * groups, 1, width, 1, means, means + 1, 2}, stream);
      l.means = means;
    }
  }
  if (p.drive == nullptr || (p.grad_drive == nullptr && p.grad_modulator == nullptr)) return;
  launch(norm_step_backward_finish_kernel<T, N>, "norm_step_backward_finish_kernel",
         blocks(count, "norm_step_backward_finish_kernel"), kNormThreads, 0, stream, l);
}

}  // namespace

template <typename T>
void launch_norm_step_backward(const NormStepBackwardParams<T>& p, Stream stream) {
  if (norm_step_wide<T>(p.rule, p.grad_state, p.drive, p.modulator, p.grad_drive, p.grad_modulator))
    return launch_vectors<T, kNormVector>(p, stream);
  launch_vectors<T, 1>(p, stream);
}

template void launch_norm_step_backward<float>(const NormStepBackwardParams<float>&, Stream);
template void launch_norm_step_backward<Half>(const NormStepBackwardParams<Half>&, Stream);
template void launch_norm_step_backward<BFloat16>(const NormStepBackwardParams<BFloat16>&, Stream);

}  // namespace rnndyn::cuda
