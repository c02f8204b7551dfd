// Training of many continuous-time recurrent networks: an epoch of every chosen model in one call. Included inside namespace rnndyn::<isa>
// after ctrnn_kernel.h; parameters and the loss are documented in ctrnn.h.
//
// Maths: forward and backward as in ctrnn_kernel.h; z = r w + c; AdamW with decoupled decay on every parameter:
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   theta -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay theta)
// Traffic: weights, moments and history of a model (about 0.9 MB at H = 100, T = 50, a batch of 16, float32) stay in one core's L2 for
//   the whole epoch; only the trials come from memory.
// Threads: over models; no barrier inside an epoch.
// Determinism: a model's epoch is one thread's work and depends on the model alone: neither the other models nor the threads matter.

template <typename Real>
struct CtrnnOutputs {
  const Real *w_out, *b_out;
  int64_t loss_steps;
  Real* error;  // [loss_steps, 16] z - y
};

struct CtrnnMetrics {
  double error, activity, accuracy;
};

// Labels of the tile's trials, and the sums over its trials of what the loss is made of.
template <typename Real>
static CtrnnMetrics ctrnn_train_forward(const CtrnnModel<Real>& model, const CtrnnScratch<Real>& s,
                                        const CtrnnOutputs<Real>& out, const Real* h0, const float* labels,
                                        int64_t count) {
  typedef typename Simd<Real>::vec vec;
  constexpr int lanes = Simd<Real>::kLanes, vecs = Simd<Real>::kVecs;
  for (int64_t i = 0; i < s.units; ++i)
    for (int64_t n = 0; n < kCtrnnTile; ++n) s.state[i * kCtrnnTile + n] = h0[i];
  CtrnnMetrics sum{0, 0, 0};
  double squares[kCtrnnTile] = {0};
  ctrnn_tile_forward(model, s, [&](int64_t t) {
    vec square[vecs];
    for (int v = 0; v < vecs; ++v) square[v] = vec{};
    for (int64_t i = 0; i < s.units; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        const vec r = load_vec(s.rate + i * kCtrnnTile + v * lanes);
        square[v] += r * r;
      }
    for (int v = 0; v < vecs; ++v)
      for (int k = 0; k < lanes; ++k) squares[v * lanes + k] += double(square[v][k]);
    const int64_t late = t - (s.steps - out.loss_steps);
    if (late < 0) return;
    Real z[kCtrnnTile];
    for (int v = 0; v < vecs; ++v) {
      vec total = splat<Real>(out.b_out[0]);
      for (int64_t i = 0; i < s.units; ++i) total += out.w_out[i] * load_vec(s.rate + i * kCtrnnTile + v * lanes);
      store_vec(z + v * lanes, total);
    }
    for (int64_t n = 0; n < kCtrnnTile; ++n) {
      const Real error = n < count ? z[n] - Real(labels[n]) : Real(0);
      out.error[late * kCtrnnTile + n] = error;
      sum.error += double(error) * double(error);
      if (t == s.steps - 1 && n < count) {
        const float said = z[n] > Real(0.5) ? 1.0f : z[n] < Real(-0.5) ? -1.0f : 0.0f;
        sum.accuracy += said == labels[n] ? 1 : 0;
      }
    }
  });
  for (int64_t n = 0; n < count; ++n) sum.activity += squares[n];
  return sum;
}

// Gradient of the loss over one tile, added to grad [P]. `trials` is the number in the batch.
template <typename Real>
static void ctrnn_train_backward(const CtrnnModel<Real>& model, const CtrnnScratch<Real>& s,
                                 const CtrnnOutputs<Real>& out, double activity_weight, int64_t trials, int64_t count,
                                 Real* grad) {
  typedef typename Simd<Real>::vec vec;
  constexpr int lanes = Simd<Real>::kLanes;
  const Real rate_scale = Real(2 * activity_weight / (double(trials) * s.steps * s.units));
  const Real error_scale = Real(2.0 / (double(trials) * out.loss_steps));
  Real* grad_w_out = grad + (s.units + s.inputs + 1) * s.units;
  Real scale[kCtrnnTile];  // absent trials have no activity either
  for (int64_t n = 0; n < kCtrnnTile; ++n) scale[n] = n < count ? rate_scale : Real(0);
  ctrnn_fill_ones(s, count);
  ctrnn_tile_backward(model, s, [&](int64_t t, Real* grad_rate, Real*) {
    const int64_t late = t - 1 - (s.steps - out.loss_steps);
    const Real* error = late < 0 ? nullptr : out.error + late * kCtrnnTile;
    for (int64_t i = 0; i < s.units; ++i) {
      vec products = vec{};
      for (int k = 0; k < kCtrnnTile; k += lanes) {
        const vec r = load_vec(s.rates_before(i, t) + k);
        vec g = load_vec(grad_rate + i * kCtrnnTile + k) + load_vec(scale + k) * r;
        if (error != nullptr) {
          const vec e = error_scale * load_vec(error + k);
          g += out.w_out[i] * e;
          products += r * e;
        }
        store_vec(grad_rate + i * kCtrnnTile + k, g);
      }
      if (error != nullptr)
        for (int k = 0; k < lanes; ++k) grad_w_out[i] += products[k];
    }
    if (error != nullptr)
      for (int64_t n = 0; n < kCtrnnTile; ++n) grad_w_out[s.units] += error_scale * error[n];
  });
  ctrnn_tile_weight_grad(s, grad);
}

template <typename Real>
static inline void ctrnn_adamw(const CtrnnTrainParams<Real>& p, int64_t m, int64_t size, int64_t step,
                               const Real* grad) {
  double norm = 0;
  if (p.clip_norm > 0)
    for (int64_t k = 0; k < size; ++k) norm += double(grad[k]) * double(grad[k]);
  norm = __builtin_sqrt(norm);
  const Real clip = p.clip_norm > 0 && norm > p.clip_norm ? Real(p.clip_norm / norm) : Real(1);
  const Real b1 = Real(p.beta1), b2 = Real(p.beta2), rate = p.learning_rate[m], eps = Real(p.eps);
  const Real decay = Real(p.weight_decay);
  const Real first_scale = Real(1 / (1 - __builtin_pow(p.beta1, double(step))));
  const Real second_scale = Real(1 / (1 - __builtin_pow(p.beta2, double(step))));
  Real* theta = p.parameters + m * size;
  Real* first = p.first_moment + m * size;
  Real* second = p.second_moment + m * size;
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) {
    const Real g = clip * grad[k];
    first[k] = b1 * first[k] + (1 - b1) * g;
    second[k] = b2 * second[k] + (1 - b2) * (g * g);
    Real root;
    if constexpr (sizeof(Real) == 4) {
      root = __builtin_sqrtf(second[k] * second_scale);
    } else {
      root = __builtin_sqrt(second[k] * second_scale);
    }
    theta[k] -= rate * (first[k] * first_scale / (root + eps) + decay * theta[k]);
  }
}

static inline int64_t ctrnn_parameters(const CtrnnShape& s) { return (s.units + s.inputs + 1) * s.units + s.units + 1; }

template <typename Real>
static inline int64_t ctrnn_train_worker_bytes(const CtrnnShape& shape, int64_t loss_steps) {
  typedef CtrnnScratch<Real> Scratch;
  return Scratch::bytes(shape, true) + Scratch::round_up(ctrnn_parameters(shape) * sizeof(Real)) +
         Scratch::round_up(loss_steps * kCtrnnTile * sizeof(Real));
}

template <typename Real>
int64_t ctrnn_train_workspace(const CtrnnShape& shape, int64_t loss_steps, int num_threads) {
  return num_threads * ctrnn_train_worker_bytes<Real>(shape, loss_steps);
}

// One epoch of one model.
template <typename Real>
struct CtrnnEpoch {
  typedef CtrnnScratch<Real> Scratch;
  const CtrnnTrainParams<Real>& p;
  int64_t m, size;
  Scratch s;
  Real* grad;
  CtrnnModel<Real> model;
  CtrnnOutputs<Real> out;

  CtrnnEpoch(const CtrnnTrainParams<Real>& params, int64_t index, char* memory)
      : p(params),
        m(index),
        size(ctrnn_parameters(params.shape)),
        s(params.shape, memory, true),
        grad(reinterpret_cast<Real*>(memory + Scratch::bytes(params.shape, true))),
        model{theta(0),
              theta((s.units + s.inputs) * s.units),
              theta(s.units * s.units),
              p.alpha[m],
              p.noise_std[m],
              CtrnnActivation(p.activation[m]),
              p.noise_std[m] != 0,
              {NoiseKeys(uint64_t(p.seeds[m])), 0, 0}},
        out{model.b_rec + s.units, model.b_rec + 2 * s.units, p.loss_steps,
            reinterpret_cast<Real*>(memory + Scratch::bytes(params.shape, true) +
                                    Scratch::round_up(size * sizeof(Real)))} {}

  const Real* theta(int64_t from) const { return p.parameters + m * size + from; }

  // Trials index[first ..] of a data set, index null: themselves. Labels are gathered too.
  CtrnnMetrics forward(const float* inputs, const float* labels, const int64_t* index, int64_t first, int64_t count,
                       uint32_t stream) {
    const int64_t row = s.steps * s.inputs;
    float chosen[kCtrnnTile];
    for (int64_t n = 0; n < count; ++n) chosen[n] = labels[index != nullptr ? index[first + n] : first + n];
    ctrnn_gather_inputs(s, count,
                        [&](int64_t n) { return inputs + (index != nullptr ? index[first + n] : first + n) * row; });
    model.noise.stream = stream;
    model.noise.first_trial = uint32_t(first);
    return ctrnn_train_forward(model, s, out, p.h0 + m * s.units, chosen, count);
  }

  CtrnnMetrics forward_all(const float* inputs, const float* labels, const int64_t* index, int64_t trials,
                           uint32_t stream) {
    CtrnnMetrics sum{0, 0, 0};
    for (int64_t first = 0; first < trials; first += kCtrnnTile) {
      const int64_t count = trials - first < kCtrnnTile ? trials - first : kCtrnnTile;
      add(sum, forward(inputs, labels, index, first, count, stream), trials);
    }
    return sum;
  }

  // Sums over trials become shares of the means; accuracy stays a count, so that all right is exactly 1 in the end.
  void add(CtrnnMetrics& sum, const CtrnnMetrics& tile, int64_t trials) const {
    sum.error += tile.error / (double(trials) * p.loss_steps);
    sum.activity += tile.activity / (double(trials) * s.steps * s.units);
    sum.accuracy += tile.accuracy;
  }

  void run() {
    const int64_t batch = p.shape.trials, row = s.steps * s.inputs;
    const float* inputs = p.train_inputs + m * p.train_trials * row;
    const float* labels = p.train_labels + m * p.train_trials;
    CtrnnMetrics before{0, 0, 0}, after{0, 0, 0}, validation{0, 0, 0};
    for (int64_t b = 0; b < p.batches; ++b) {
      const int64_t* order = p.order + (m * p.batches + b) * batch;
      const int64_t step = p.epoch[m] * p.batches + b;
      for (int64_t k = 0; k < size; ++k) grad[k] = 0;
      for (int64_t first = 0; first < batch; first += kCtrnnTile) {
        const int64_t count = batch - first < kCtrnnTile ? batch - first : kCtrnnTile;
        add(before, forward(inputs, labels, order, first, count, uint32_t(2 * step)), batch);
        ctrnn_train_backward(model, s, out, p.activity_weight, batch, count, grad);
      }
      ctrnn_adamw(p, m, size, step + 1, grad);
      if (p.metrics_after) {
        const CtrnnMetrics again = forward_all(inputs, labels, order, batch, uint32_t(2 * step + 1));
        after.error += again.error, after.activity += again.activity, after.accuracy += again.accuracy;
      }
    }
    if (p.val_trials > 0)
      validation = forward_all(p.val_inputs + m * p.val_trials * row, p.val_labels + m * p.val_trials, nullptr,
                               p.val_trials, 0x80000000u | uint32_t(p.epoch[m]));
    double* metrics = p.metrics + 9 * m;
    const CtrnnMetrics all[] = {before, after, validation};
    for (int k = 0; k < 3; ++k) {
      const double scale = k < 2 ? 1 / double(p.batches) : 1.0;
      const int64_t trials = k < 2 ? p.batches * batch : p.val_trials;
      metrics[3 * k] = scale * all[k].error;
      metrics[3 * k + 1] = scale * all[k].activity;
      metrics[3 * k + 2] = trials > 0 ? all[k].accuracy / double(trials) : 0.0;
    }
  }
};

template <typename Real>
void ctrnn_train(const CtrnnTrainParams<Real>& p) {
  const int64_t worker_bytes = ctrnn_train_worker_bytes<Real>(p.shape, p.loss_steps);
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic)
  for (int64_t k = 0; k < p.num_chosen; ++k)
    CtrnnEpoch<Real>(p, p.chosen[k], p.workspace + omp_get_thread_num() * worker_bytes).run();
}
