// The ctrnn op over models and tiles of trials, forward and backward. Included inside namespace rnndyn::<isa> after ctrnn_kernel.h;
// parameters are documented in ctrnn.h, the mathematics in ctrnn_kernel.h.
//
// Threads: over models and groups of tiles. The backward pass sums the weight gradients of a group by itself and the groups in order; how
//   tiles are grouped depends on the shape alone, so results do not depend on the number of threads.

// A square of values as its transpose, a register's lanes wide.
template <typename Real>
static inline void ctrnn_transpose_square(const Real* from, int64_t from_stride, Real* to, int64_t to_stride) {
  constexpr int lanes = Simd<Real>::kLanes;
  typename Simd<Real>::vec x[lanes];
#pragma GCC unroll 16
  for (int k = 0; k < lanes; ++k) x[k] = load_vec(from + k * from_stride);
  transpose<Real>(x);
#pragma GCC unroll 16
  for (int k = 0; k < lanes; ++k) store_vec(to + k * to_stride, x[k]);
}

// Columns that whole squares hold, where a tile is full: function(column, trial) for each square. Returns how many columns that were.
template <typename Real, class Function>
static inline int64_t ctrnn_each_square(int64_t count, int64_t columns, Function function) {
  constexpr int lanes = Simd<Real>::kLanes;
  int64_t done = 0;
  if (count == kCtrnnTile)
    for (; done + lanes <= columns; done += lanes)
      for (int64_t n = 0; n < kCtrnnTile; n += lanes) function(done, n);
  return done;
}

// [count, columns] rows of memory, `stride` apart, into and out of [columns, 16] with the rows as lanes.
template <typename Real>
static inline void ctrnn_load_tile(const Real* from, int64_t stride, int64_t count, int64_t columns, Real* tile) {
  const int64_t done = ctrnn_each_square<Real>(count, columns, [&](int64_t i, int64_t n) {
    ctrnn_transpose_square(from + n * stride + i, stride, tile + i * kCtrnnTile + n, kCtrnnTile);
  });
  for (int64_t i = done; i < columns; ++i)
    for (int64_t n = 0; n < kCtrnnTile; ++n) tile[i * kCtrnnTile + n] = n < count ? from[n * stride + i] : Real(0);
}

template <typename Real>
static inline void ctrnn_store_tile(const Real* tile, int64_t stride, int64_t count, int64_t columns, Real* to) {
  const int64_t done = ctrnn_each_square<Real>(count, columns, [&](int64_t i, int64_t n) {
    ctrnn_transpose_square(tile + i * kCtrnnTile + n, kCtrnnTile, to + n * stride + i, stride);
  });
  for (int64_t i = done; i < columns; ++i)
    for (int64_t n = 0; n < count; ++n) to[n * stride + i] = tile[i * kCtrnnTile + n];
}

static inline int64_t ctrnn_tiles(const CtrnnShape& s) { return (s.trials + kCtrnnTile - 1) / kCtrnnTile; }

// Groups of tiles per model in the backward pass.
static inline int64_t ctrnn_groups(const CtrnnShape& s) {
  const int64_t wanted = s.models >= 16 ? 1 : (16 + s.models - 1) / s.models, tiles = ctrnn_tiles(s);
  return tiles < wanted ? tiles : wanted;
}

template <typename Real>
int64_t ctrnn_forward_workspace(const CtrnnShape& shape, int num_threads) {
  return num_threads * CtrnnScratch<Real>::bytes(shape, false);
}

template <typename Real>
void ctrnn_forward(const CtrnnForwardParams<Real>& p) {
  const CtrnnShape& shape = p.shape;
  const int64_t tiles = ctrnn_tiles(shape), units = shape.units, steps = shape.steps, row = steps * units;
  const int64_t scratch_bytes = CtrnnScratch<Real>::bytes(shape, false);
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic)
  for (int64_t job = 0; job < shape.models * tiles; ++job) {
    const int64_t m = job / tiles, first = job % tiles * kCtrnnTile;
    const int64_t count = shape.trials - first < kCtrnnTile ? shape.trials - first : kCtrnnTile;
    const CtrnnScratch<Real> s(shape, p.workspace + omp_get_thread_num() * scratch_bytes, false);
    const NoisePlace noise{NoiseKeys(p.seeds != nullptr ? uint64_t(p.seeds[m]) : 0), p.stream,
                           p.first_trial + uint32_t(first)};
    const CtrnnModel<Real> model{p.w_rec + m * units * units,
                                 p.b_rec + m * units,
                                 p.w_in + m * shape.inputs * units,
                                 p.alpha[m],
                                 p.noise_std[m],
                                 CtrnnActivation(p.activation[m]),
                                 p.seeds != nullptr && p.noise_std[m] != 0,
                                 noise};
    const Real* inputs = p.inputs + m * p.input_model_stride + first * steps * shape.inputs;
    ctrnn_gather_inputs(s, count, [&](int64_t n) { return inputs + n * steps * shape.inputs; });
    ctrnn_load_tile(p.h0 + (m * shape.trials + first) * units, units, count, units, s.state);
    const int64_t at = (m * shape.trials + first) * row;
    ctrnn_tile_forward(model, s, [&](int64_t t) {
      ctrnn_store_tile(s.rate, row, count, units, p.rates + at + t * units);
      if (p.states != nullptr) ctrnn_store_tile(s.state, row, count, units, p.states + at + t * units);
    });
  }
}

template <typename Real>
int64_t ctrnn_backward_workspace(const CtrnnShape& shape, int num_threads) {
  const int64_t rows = shape.units + shape.inputs + 1;
  const int64_t partial = CtrnnScratch<Real>::round_up(rows * shape.units * sizeof(Real));
  const int64_t tile = shape.units * kCtrnnTile * sizeof(Real);
  return num_threads * (CtrnnScratch<Real>::bytes(shape, true) + tile) + shape.models * ctrnn_groups(shape) * partial;
}

// One tile: gradients of its inputs and initial states, and of the weights added to grad_weights.
template <typename Real>
static void ctrnn_backward_tile(const CtrnnBackwardParams<Real>& p, int64_t m, int64_t first,
                                const CtrnnScratch<Real>& s, Real* tile, Real* grad_weights) {
  const CtrnnShape& shape = p.shape;
  const int64_t units = shape.units, steps = shape.steps, row = steps * units;
  const int64_t count = shape.trials - first < kCtrnnTile ? shape.trials - first : kCtrnnTile;
  const int64_t at = (m * shape.trials + first) * row, h0_at = (m * shape.trials + first) * units;
  const CtrnnModel<Real> model{p.w_rec + m * units * units,
                               nullptr,
                               p.w_in + m * shape.inputs * units,
                               p.alpha[m],
                               Real(0),
                               CtrnnActivation(p.activation[m]),
                               false,
                               {NoiseKeys(0), 0, 0}};
  const Real* inputs = p.inputs + m * p.input_model_stride + first * steps * shape.inputs;
  ctrnn_gather_inputs(s, count, [&](int64_t n) { return inputs + n * steps * shape.inputs; });
  ctrnn_fill_ones(s, count);
  ctrnn_load_tile(p.h0 + h0_at, units, count, units, s.state);
  switch (model.activation) {
    case kCtrnnTanh:
      ctrnn_start<Real, kCtrnnTanh>(s);
      break;
    case kCtrnnRelu:
      ctrnn_start<Real, kCtrnnRelu>(s);
      break;
    case kCtrnnSigmoid:
      ctrnn_start<Real, kCtrnnSigmoid>(s);
      break;
    case kCtrnnSoftplus:
      ctrnn_start<Real, kCtrnnSoftplus>(s);
      break;
    case kCtrnnIdentity:
      ctrnn_start<Real, kCtrnnIdentity>(s);
      break;
  }
  for (int64_t t = 0; t < steps; ++t) {
    ctrnn_load_tile(p.rates + at + t * units, row, count, units, tile);
    for (int64_t i = 0; i < units; ++i)
      for (int64_t n = 0; n < kCtrnnTile; ++n) s.rates_before(i, t + 1)[n] = tile[i * kCtrnnTile + n];
  }
  ctrnn_tile_backward(model, s, [&](int64_t t, Real* grad_rate, Real* grad_state) {
    const int64_t from = at + (t - 1) * units;
    if (p.grad_rates != nullptr) {
      ctrnn_load_tile(p.grad_rates + from, row, count, units, tile);
      for (int64_t k = 0; k < units * kCtrnnTile; ++k) grad_rate[k] += tile[k];
    }
    if (p.grad_states != nullptr) {
      ctrnn_load_tile(p.grad_states + from, row, count, units, tile);
      for (int64_t k = 0; k < units * kCtrnnTile; ++k) grad_state[k] += tile[k];
    }
  });
  if (p.grad_h0 != nullptr) ctrnn_store_tile(s.state, units, count, units, p.grad_h0 + h0_at);
  ctrnn_tile_weight_grad(s, grad_weights);
  if (p.grad_inputs != nullptr) {
    // du[t, c] = sum_i V[c, i] d[t, i], into the rows that held the inputs.
    for (int64_t c = 0; c < shape.inputs; ++c) {
      Real* sum = s.inputs_at(c, 0);
      for (int64_t k = 0; k < steps * kCtrnnTile; ++k) sum[k] = 0;
      for (int64_t i = 0; i < units; ++i) {
        const Real weight = model.w_in[c * units + i];
        const Real* d = s.d + i * steps * kCtrnnTile;
#pragma omp simd
        for (int64_t k = 0; k < steps * kCtrnnTile; ++k) sum[k] += weight * d[k];
      }
      Real* to = p.grad_inputs + (m * shape.trials + first) * steps * shape.inputs + c;
      for (int64_t n = 0; n < count; ++n)
        for (int64_t t = 0; t < steps; ++t) to[(n * steps + t) * shape.inputs] = sum[t * kCtrnnTile + n];
    }
  }
}

template <typename Real>
void ctrnn_backward(const CtrnnBackwardParams<Real>& p) {
  const CtrnnShape& shape = p.shape;
  const int64_t tiles = ctrnn_tiles(shape), groups = ctrnn_groups(shape), units = shape.units;
  const int64_t size = (units + shape.inputs + 1) * units;
  const int64_t partial = CtrnnScratch<Real>::round_up(size * sizeof(Real)) / int64_t(sizeof(Real));
  const int64_t tile_bytes = units * kCtrnnTile * sizeof(Real);
  const int64_t worker_bytes = CtrnnScratch<Real>::bytes(shape, true) + tile_bytes;
  Real* sums = reinterpret_cast<Real*>(p.workspace + p.num_threads * worker_bytes);
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic)
  for (int64_t job = 0; job < shape.models * groups; ++job) {
    const int64_t m = job / groups, group = job % groups;
    char* memory = p.workspace + omp_get_thread_num() * worker_bytes;
    const CtrnnScratch<Real> s(shape, memory + tile_bytes, true);
    Real* grad = sums + job * partial;
    for (int64_t k = 0; k < size; ++k) grad[k] = 0;
    for (int64_t tile = group; tile < tiles; tile += groups)
      ctrnn_backward_tile(p, m, tile * kCtrnnTile, s, reinterpret_cast<Real*>(memory), grad);
  }
#pragma omp parallel for num_threads(p.num_threads) schedule(static)
  for (int64_t m = 0; m < shape.models; ++m) {
    Real* grad = p.grad_weights + m * size;
    const Real* from = sums + m * groups * partial;
    for (int64_t k = 0; k < size; ++k) grad[k] = from[k];
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t k = 0; k < size; ++k) grad[k] += from[g * partial + k];
  }
}
