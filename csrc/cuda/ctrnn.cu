// ctrnn on CUDA: continuous-time recurrent networks through a whole sequence in one launch, and back through time in another.
//
// Maths (row vectors; r_0 = f(h_0)):
//   z = r[t-1] W + b + u[t] V + s xi[t];  h[t] = (1 - a) h[t-1] + a z;  r[t] = f(h[t])
//   backward: dr = dL/dr[t] + d[t+1] W^T;  dh = dL/dh[t] + (1 - a) dh[t+1] + f'(r[t]) dr;  d[t] = a dh
//   The gradients of W, V, b and u are matrix products of d with rates, inputs and V over all steps and trials: the caller's, once.
// Precision: float32. xi: Philox4x32-10 as reference/philox.py has it, made normal by Box and Muller.
// Traffic: per step and block W once, from L2 (40 KB at H = 100; all blocks of a model share it), rates written once; states and rates of the
//   tile stay in shared memory. Bound by L2 bandwidth, or with few models and trials by the latency of a step.
// Launch shape: a block per model and kTrials trials; a thread per unit, more than kThreads of them in turn. Threads of a warp read
//   adjacent columns of W, and all of them the same rates.
// Sync: two barriers per step: rates of the step are there before they are multiplied, and are no longer read when the next ones come.
// Determinism: every number is one thread's, summed in one order; noise depends on seed and place alone.
// Registers: __launch_bounds__ names two blocks per multiprocessor where ptxas would else keep registers for more of them, and spill.
// Limits: 3 kTrials H floats of shared memory (ctrnn_max_units).
#include "cuda/ctrnn.h"

#include "cuda/device.h"

namespace rnndyn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTrials =
    4;  // of a block: as many products per element of W read; few, as a study has few trials per model
constexpr int64_t kMostSharedBytes = 96 * 1024;  // of the 99 KiB that a block may have on every device supported

// A template only so that it says what it stores, as all kernels do.
template <typename T>
struct CtrnnLaunch {
  CtrnnParams p;
};

__device__ __forceinline__ float activated(int activation, float x) {
  switch (activation) {
    case kCtrnnTanh:
      return tanhf(x);
    case kCtrnnRelu:
      return x < 0 ? 0 : x;  // NaN stays NaN
    case kCtrnnSigmoid:
      return 1.0f / (1.0f + expf(-x));
    case kCtrnnSoftplus:
      return x > 20.0f ? x : log1pf(expf(x));
    default:
      return x;
  }
}

// The activation's slope where it is r.
__device__ __forceinline__ float slope(int activation, float r) {
  switch (activation) {
    case kCtrnnTanh:
      return 1 - r * r;
    case kCtrnnRelu:
      return r > 0 ? 1.0f : 0.0f;
    case kCtrnnSigmoid:
      return r * (1 - r);
    case kCtrnnSoftplus:
      return -expm1f(-r);
    default:
      return 1;
  }
}

// The unit normal of a place: of a Philox call's four, the one of this unit.
__device__ __forceinline__ float unit_normal(uint64_t seed, uint32_t stream, uint32_t trial, uint32_t step,
                                             uint32_t unit) {
  uint32_t c0 = unit / 4, c1 = step, c2 = trial, c3 = stream, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const bool second = unit % 4 >= 2;
  const uint32_t radius_bits = (second ? c2 : c0) >> 9, angle_bits = (second ? c3 : c1) >> 8;
  const float radius = sqrtf(-2.0f * logf((float(radius_bits) + 0.5f) * 0x1p-23f));
  const float angle = float(angle_bits) * (6.28318530717958648f * 0x1p-24f);
  return radius * (unit % 2 == 0 ? cosf(angle) : sinf(angle));
}

// A block's part: model, first trial, and how many trials there are.
struct Tile {
  int64_t model, first;
  int count;
};
__device__ __forceinline__ Tile tile_of_block(const CtrnnShape& s) {
  const int64_t tiles = (s.trials + kTrials - 1) / kTrials, model = int64_t(blockIdx.x) / tiles;
  const int64_t first = (int64_t(blockIdx.x) - model * tiles) * kTrials;
  return {model, first, int(min(int64_t(kTrials), s.trials - first))};
}

// sums[n] += sum over k of rows[k, n] * weight[k, column], for k in [0, depth); rows [depth, kTrials] in shared memory.
__device__ __forceinline__ void add_products(const float* weight, int64_t columns, int column, const float* rows,
                                             int depth, float (&sums)[kTrials]) {
  for (int k = 0; k < depth; ++k) {
    const float w = weight[k * columns + column];
    float x[kTrials];
    load(rows + k * kTrials, x);
    RNNDYN_UNROLL
    for (int n = 0; n < kTrials; ++n) sums[n] += w * x[n];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) ctrnn_forward_kernel(CtrnnLaunch<T> l) {
  const CtrnnParams& p = l.p;
  RNNDYN_DYNAMIC_SHARED(shared);
  const int units = int(p.shape.units), inputs = int(p.shape.inputs);
  const int64_t steps = p.shape.steps, trials = p.shape.trials;
  float* rate = reinterpret_cast<float*>(shared);  // [H, kTrials] of the step before
  float* state = rate + units * kTrials;           // [H, kTrials], a unit's by its own thread alone
  float* drive = state + units * kTrials;          // likewise
  const Tile tile = tile_of_block(p.shape);
  const int activation = p.activation[tile.model];
  const float alpha = p.alpha[tile.model], noise = p.seeds != nullptr ? p.noise_std[tile.model] : 0;
  const uint64_t seed = p.seeds != nullptr ? uint64_t(p.seeds[tile.model]) : 0;
  const float* w_rec = p.w_rec + tile.model * units * units;
  const float* w_in = p.w_in + tile.model * inputs * units;
  const float* shown = p.inputs + tile.model * p.input_model_stride + tile.first * steps * inputs;
  const int64_t first_row = tile.model * trials + tile.first;

  for (int i = int(threadIdx.x); i < units; i += kThreads) {
    for (int n = 0; n < kTrials; ++n) {
      const float h = n < tile.count ? p.h0[(first_row + n) * units + i] : 0;
      state[i * kTrials + n] = h;
      rate[i * kTrials + n] = activated(activation, h);
    }
  }
  for (int64_t t = 0; t < steps; ++t) {
    __syncthreads();  // the rates of the step before are there
    for (int i = int(threadIdx.x); i < units; i += kThreads) {
      float z[kTrials];
      fill(z, p.b_rec[tile.model * units + i]);
      add_products(w_rec, units, i, rate, units, z);
      for (int c = 0; c < inputs; ++c) {
        const float w = w_in[c * units + i];
        for (int n = 0; n < tile.count; ++n) z[n] += w * shown[(n * steps + t) * inputs + c];
      }
      store(drive + i * kTrials, z);
    }
    __syncthreads();  // nobody multiplies them any more
    for (int i = int(threadIdx.x); i < units; i += kThreads) {
      for (int n = 0; n < tile.count; ++n) {
        float z = drive[i * kTrials + n];
        if (noise != 0)
          z += noise * unit_normal(seed, p.stream, p.first_trial + uint32_t(tile.first + n), uint32_t(t), uint32_t(i));
        const float h = (1 - alpha) * state[i * kTrials + n] + alpha * z, r = activated(activation, h);
        state[i * kTrials + n] = h;
        rate[i * kTrials + n] = r;
        const int64_t at = ((first_row + n) * steps + t) * units + i;
        p.rates[at] = r;
        if (p.states != nullptr) p.states[at] = h;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ctrnn_backward_kernel(CtrnnLaunch<T> l) {
  const CtrnnParams& p = l.p;
  RNNDYN_DYNAMIC_SHARED(shared);
  const int units = int(p.shape.units);
  const int64_t steps = p.shape.steps, trials = p.shape.trials;
  float* d = reinterpret_cast<float*>(shared);  // [H, kTrials] of the step after
  float* carried = d + units * kTrials;         // (1 - a) dh of the step after; a unit's by its own thread alone
  float* back = carried + units * kTrials;      // d of the step after times W^T; likewise
  const Tile tile = tile_of_block(p.shape);
  const int activation = p.activation[tile.model];
  const float alpha = p.alpha[tile.model];
  const float* w_rec_t = p.w_rec + tile.model * units * units;
  const int64_t first_row = tile.model * trials + tile.first;

  for (int i = int(threadIdx.x); i < units; i += kThreads) {
    for (int n = 0; n < kTrials; ++n) d[i * kTrials + n] = carried[i * kTrials + n] = 0;
  }
  for (int64_t t = steps; t >= 0; --t) {  // steps are counted from 1; 0 is the state before them
    __syncthreads();                      // d of the step after is there
    for (int i = int(threadIdx.x); i < units; i += kThreads) {
      float sums[kTrials];
      fill(sums, 0);
      if (t < steps) add_products(w_rec_t, units, i, d, units, sums);
      store(back + i * kTrials, sums);
    }
    __syncthreads();  // nobody multiplies it any more
    for (int i = int(threadIdx.x); i < units; i += kThreads) {
      for (int n = 0; n < tile.count; ++n) {
        const int64_t row = first_row + n, at = (row * steps + t - 1) * units + i;
        float dr = back[i * kTrials + n], dh = carried[i * kTrials + n];
        if (t > 0 && p.grad_rates != nullptr) dr += p.grad_rates[at];
        if (t > 0 && p.grad_states != nullptr) dh += p.grad_states[at];
        const float r = t > 0 ? p.rates[at] : activated(activation, p.h0[row * units + i]);
        dh += slope(activation, r) * dr;
        if (t == 0) {
          p.grad_h0[row * units + i] = dh;
          p.rates0[row * units + i] = r;
          continue;
        }
        p.d[at] = d[i * kTrials + n] = alpha * dh;
        carried[i * kTrials + n] = (1 - alpha) * dh;
      }
    }
  }
}

size_t shared_bytes(int64_t units) { return size_t(3 * kTrials * units) * sizeof(float); }

dim3 grid(const CtrnnShape& s, const char* kernel) {
  if (s.units > ctrnn_max_units())
    throw std::invalid_argument(std::string(kernel) + ": at most " + std::to_string(ctrnn_max_units()) +
                                " units, got " + std::to_string(s.units));
  return blocks(s.models * ceil_divide(s.trials, kTrials), kernel);
}

}  // namespace

int64_t ctrnn_max_units() { return kMostSharedBytes / int64_t(shared_bytes(1)); }

void launch_ctrnn_forward(const CtrnnParams& p, Stream stream) {
  launch(ctrnn_forward_kernel<float>, "ctrnn_forward_kernel", grid(p.shape, "ctrnn_forward_kernel"), kThreads,
         shared_bytes(p.shape.units), stream, CtrnnLaunch<float>{p});
}

void launch_ctrnn_backward(const CtrnnParams& p, Stream stream) {
  launch(ctrnn_backward_kernel<float>, "ctrnn_backward_kernel", grid(p.shape, "ctrnn_backward_kernel"), kThreads,
         shared_bytes(p.shape.units), stream, CtrnnLaunch<float>{p});
}

}  // namespace rnndyn::cuda
