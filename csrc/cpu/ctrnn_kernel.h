// ctrnn: one tile of trials of one continuous-time recurrent network through time, forward and backward.
// Included inside namespace rnndyn::<isa> after ctrnn_math_kernel.h; ctrnn_op_kernel.h and ctrnn_train_kernel.h run it over models.
//
// Maths (row vectors; r_0 = f(h_0)):
//   z = r[t-1] W + b + u[t] V + s xi[t];  h[t] = (1 - a) h[t-1] + a z;  r[t] = f(h[t])
//   backward: dr = dL/dr[t] + d[t+1] W^T;  dh = dL/dh[t] + (1 - a) dh[t+1] + f'(r[t]) dr;  d[t] = a dh
//             [dW; dV; db] = sum_t [r[t-1]; u[t]; 1]^T d[t];  du[t] = d[t] V^T
// Layout: kCtrnnTile = 16 trials lie in vector lanes, units in rows, [H, 16]: one AVX-512 vector of float32 per unit, so that 100 units
//   need no padding. Weights are read as they lie and broadcast; 25 rows of accumulators (AVX-512) keep both FMA ports busy with one
//   load per multiply-add. For the weight gradient the history is [row, T, 16]: rows of W's gradient are products of whole rows.
// Precision: sums over units and over time in Real.
// Traffic: W (40 KB at H = 100) is read once per step and tile, from L2; r and d of a tile (330 KB each at T = 50) stay in L2.
// Determinism: a tile is one thread's work, in one order; noise depends on seed and place alone.

template <typename Real>
struct CtrnnRows {
#if RNNDYN_VECTOR_BYTES == 64
  static constexpr int kProduct = 25 / Simd<Real>::kVecs, kGradient = 5;
#else
  static constexpr int kProduct = Simd<Real>::kVecs > 4 ? 1 : 12 / Simd<Real>::kVecs, kGradient = 3;
#endif
};

// Rows of the second factor: pointer to the first, elements between rows, number.
template <typename Real>
struct CtrnnOperand {
  const Real* weight;  // [depth, stride]: row k, columns of the output's units
  int64_t weight_stride;
  const Real* rows;
  int64_t row_stride;
  int64_t depth;
};

// out[i] = bias[i] + sum over operands and k of weight[k, i] * rows[k], for `Rows` units i.
template <typename Real, int Rows>
static void ctrnn_product_rows(const CtrnnOperand<Real>* operands, int count, int64_t first, const Real* bias,
                               Real* out) {
  typedef typename Simd<Real>::vec vec;
  constexpr int vecs = Simd<Real>::kVecs, lanes = Simd<Real>::kLanes;
  vec acc[Rows][vecs];
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) acc[r][v] = splat<Real>(bias != nullptr ? bias[first + r] : Real(0));
  }
  for (int s = 0; s < count; ++s) {
    const Real* weight = operands[s].weight + first;
    const Real* row = operands[s].rows;
    const int64_t weight_stride = operands[s].weight_stride, row_stride = operands[s].row_stride;
    for (int64_t k = operands[s].depth; k > 0; --k) {
      vec b[vecs];
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) b[v] = load_vec(row + v * lanes);
#pragma GCC unroll 32
      for (int r = 0; r < Rows; ++r) {
        const Real value = weight[r];
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) acc[r][v] += value * b[v];
      }
      weight += weight_stride, row += row_stride;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) store_vec(out + (first + r) * kCtrnnTile + v * lanes, acc[r][v]);
  }
}

template <typename Real>
using CtrnnProductRows = void (*)(const CtrnnOperand<Real>*, int, int64_t, const Real*, Real*);

template <typename Real, int Rows>
static inline CtrnnProductRows<Real> ctrnn_product_for(int64_t rows) {
  if constexpr (Rows == 1) {
    return ctrnn_product_rows<Real, 1>;
  } else {
    return rows >= Rows ? ctrnn_product_rows<Real, Rows> : ctrnn_product_for<Real, Rows - 1>(rows);
  }
}

// The same for all units, in row blocks of nearly equal size.
template <typename Real>
static inline void ctrnn_product(const CtrnnOperand<Real>* operands, int count, int64_t units, const Real* bias,
                                 Real* out) {
  constexpr int most = CtrnnRows<Real>::kProduct;
  const int64_t blocks = (units + most - 1) / most;
  for (int64_t i = 0, first = 0; i < blocks; ++i) {
    const int64_t rows = (units - first + blocks - i - 1) / (blocks - i);
    ctrnn_product_for<Real, most>(rows)(operands, count, first, bias, out);
    first += rows;
  }
}

// c[j, i] (+)= sum_k a[j, k] b[i, k] for Rows x Rows rows; length is a multiple of the vector.
template <typename Real, int RowsA, int RowsB>
static void ctrnn_gradient_block(int64_t length, const Real* a, int64_t a_stride, const Real* b, int64_t b_stride,
                                 Real* c, int64_t c_stride) {
  typedef typename Simd<Real>::vec vec;
  constexpr int lanes = Simd<Real>::kLanes, total = RowsA * RowsB, padded = (total + lanes - 1) / lanes * lanes;
  vec acc[padded];
#pragma GCC unroll 64
  for (int k = 0; k < padded; ++k) acc[k] = vec{};
  for (int64_t k = 0; k < length; k += lanes) {
    vec y[RowsB];
#pragma GCC unroll 8
    for (int i = 0; i < RowsB; ++i) y[i] = load_vec(b + i * b_stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < RowsA; ++j) {
      const vec x = load_vec(a + j * a_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < RowsB; ++i) acc[j * RowsB + i] += x * y[i];
    }
  }
  Real sums[padded];
  for (int k = 0; k < padded; k += lanes) store_vec(sums + k, sum_each<Real>(acc + k));
  for (int j = 0; j < RowsA; ++j)
    for (int i = 0; i < RowsB; ++i) c[j * c_stride + i] += sums[j * RowsB + i];
}

template <typename Real>
using CtrnnGradientBlock = void (*)(int64_t, const Real*, int64_t, const Real*, int64_t, Real*, int64_t);

template <typename Real, int RowsA, int RowsB>
static inline CtrnnGradientBlock<Real> ctrnn_gradient_for(int64_t a, int64_t b) {
  if (a < RowsA) {
    if constexpr (RowsA > 1) return ctrnn_gradient_for<Real, RowsA - 1, RowsB>(a, b);
  }
  if (b < RowsB) {
    if constexpr (RowsB > 1) return ctrnn_gradient_for<Real, RowsA, RowsB - 1>(a, b);
  }
  return ctrnn_gradient_block<Real, RowsA, RowsB>;
}

// All of c [rows_a, rows_b] += a b^T. Two blocks of rows of a stay in L1 while the rows of b pass by.
template <typename Real>
static inline void ctrnn_gradient(int64_t rows_a, int64_t rows_b, int64_t length, const Real* a, int64_t a_stride,
                                  const Real* b, int64_t b_stride, Real* c) {
  constexpr int most = CtrnnRows<Real>::kGradient;
  for (int64_t group = 0; group < rows_a; group += 2 * most) {
    for (int64_t i = 0; i < rows_b; i += most) {
      const int64_t columns = rows_b - i < most ? rows_b - i : most;
      for (int64_t j = group; j < rows_a && j < group + 2 * most; j += most) {
        const int64_t rows = rows_a - j < most ? rows_a - j : most;
        ctrnn_gradient_for<Real, most, most>(rows, columns)(length, a + j * a_stride, a_stride, b + i * b_stride,
                                                            b_stride, c + j * rows_b + i, rows_b);
      }
    }
  }
}

// What a network is to a tile. Strides of weights are H.
template <typename Real>
struct CtrnnModel {
  const Real *w_rec, *b_rec, *w_in;
  Real alpha, noise_std;
  CtrnnActivation activation;
  bool noisy;
  NoisePlace noise;
};

// One thread's memory, for a tile. `history` has the rows that multiply d in the weight gradient: H of rates before each step, I of
// inputs, one of ones; row k, step t at (k * (T + 1) + t) * 16, steps 0 .. T for rates and 0 .. T - 1 for the others.
template <typename Real>
struct CtrnnScratch {
  Real *state, *rate, *drive;  // [H, 16]
  Real* history;               // [H + I + 1, T + 1, 16]
  Real* d;                     // [H, T, 16]
  Real* w_rec_t;               // [H, H] transposed
  bool* shown;                 // [T] whether any input of the step differs from zero
  int64_t steps, inputs, units;

  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t bytes(const CtrnnShape& s, bool backward) {
    const int64_t tile = kCtrnnTile * sizeof(Real), rows = s.units + s.inputs + 1;
    int64_t total = 3 * s.units * tile + rows * (s.steps + 1) * tile + round_up(s.steps);
    if (backward) total += s.units * s.steps * tile + round_up(s.units * s.units * sizeof(Real));
    return total;
  }
  CtrnnScratch(const CtrnnShape& s, char* memory, bool backward) : steps(s.steps), inputs(s.inputs), units(s.units) {
    const int64_t tile = kCtrnnTile, rows = units + inputs + 1;
    state = reinterpret_cast<Real*>(memory);
    rate = state + units * tile, drive = rate + units * tile;
    history = drive + units * tile;
    Real* next = history + rows * (steps + 1) * tile;
    d = w_rec_t = nullptr;
    if (backward) {
      d = next;
      w_rec_t = d + units * steps * tile;
      next = w_rec_t + round_up(units * units * sizeof(Real)) / sizeof(Real);
    }
    shown = reinterpret_cast<bool*>(next);
  }
  Real* rates_before(int64_t unit, int64_t step) const { return history + (unit * (steps + 1) + step) * kCtrnnTile; }
  Real* inputs_at(int64_t input, int64_t step) const { return rates_before(units + input, step); }
};

// Inputs of up to 16 trials into the tile's layout; absent trials are zero. trial(n): the inputs [T, I] of one.
template <typename Real, typename Trial>
static inline void ctrnn_gather_inputs(const CtrnnScratch<Real>& s, int64_t count, const Trial& trial) {
  for (int64_t t = 0; t < s.steps; ++t) s.shown[t] = false;
  for (int64_t c = 0; c < s.inputs; ++c)
    for (int64_t k = 0; k < s.steps * kCtrnnTile; ++k) s.inputs_at(c, 0)[k] = 0;
  for (int64_t n = 0; n < count; ++n) {
    const auto* from = trial(n);
    for (int64_t t = 0; t < s.steps; ++t)
      for (int64_t c = 0; c < s.inputs; ++c) {
        const Real value = Real(from[t * s.inputs + c]);
        if (value != 0) s.inputs_at(c, t)[n] = value, s.shown[t] = true;
      }
  }
}

// The ones that make the bias a row of weights, for the trials that are there.
template <typename Real>
static inline void ctrnn_fill_ones(const CtrnnScratch<Real>& s, int64_t count) {
  Real* ones = s.inputs_at(s.inputs, 0);
  for (int64_t k = 0; k < s.steps * kCtrnnTile; ++k) ones[k] = k % kCtrnnTile < count ? Real(1) : Real(0);
}

// Leak, noise and activation of one step: state and rate from drive; the rate also into the history.
template <typename Real, CtrnnActivation A, bool Noisy>
static void ctrnn_update(const CtrnnModel<Real>& m, const CtrnnScratch<Real>& s, int64_t t) {
  typedef typename Simd<Real>::vec vec;
  constexpr int vecs = Simd<Real>::kVecs, lanes = Simd<Real>::kLanes;
  const Real keep = 1 - m.alpha;
  for (int64_t i = 0; i < s.units; i += 4) {
    const int64_t rows = s.units - i < 4 ? s.units - i : 4;
#pragma GCC unroll 1
    for (int v = 0; v < vecs; ++v) {
      vec xi[4];
      if constexpr (Noisy) unit_normals<Real>(m.noise, uint32_t(t), uint32_t(i / 4), v, xi);
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        if (k >= rows) break;
        const int64_t at = (i + k) * kCtrnnTile + v * lanes;
        vec z = load_vec(s.drive + at);
        if constexpr (Noisy) z += m.noise_std * xi[k];
        const vec h = keep * load_vec(s.state + at) + m.alpha * z, r = activate<Real, A>(h);
        store_vec(s.state + at, h);
        store_vec(s.rate + at, r);
        store_vec(s.rates_before(i + k, t + 1) + v * lanes, r);
      }
    }
  }
}

template <typename Real, CtrnnActivation A>
static void ctrnn_start(const CtrnnScratch<Real>& s) {
  constexpr int lanes = Simd<Real>::kLanes;
  for (int64_t i = 0; i < s.units; ++i)
    for (int k = 0; k < kCtrnnTile; k += lanes) {
      const typename Simd<Real>::vec r = activate<Real, A>(load_vec(s.state + i * kCtrnnTile + k));
      store_vec(s.rate + i * kCtrnnTile + k, r);
      store_vec(s.rates_before(i, 0) + k, r);
    }
}

// Runs a tile from s.state (h_0) through all steps; step(t) is called after each, with s.state and s.rate in place.
template <typename Real, CtrnnActivation A, typename Step>
static void ctrnn_tile_forward_as(const CtrnnModel<Real>& m, const CtrnnScratch<Real>& s, const Step& step) {
  ctrnn_start<Real, A>(s);
  for (int64_t t = 0; t < s.steps; ++t) {
    const CtrnnOperand<Real> operands[] = {
        {m.w_rec, s.units, s.rate, kCtrnnTile, s.units},
        {m.w_in, s.units, s.inputs_at(0, t), (s.steps + 1) * kCtrnnTile, s.inputs},
    };
    ctrnn_product(operands, s.shown[t] ? 2 : 1, s.units, m.b_rec, s.drive);
    if (m.noisy) {
      ctrnn_update<Real, A, true>(m, s, t);
    } else {
      ctrnn_update<Real, A, false>(m, s, t);
    }
    step(t);
  }
}

template <typename Real, typename Step>
static void ctrnn_tile_forward(const CtrnnModel<Real>& m, const CtrnnScratch<Real>& s, const Step& step) {
  switch (m.activation) {
    case kCtrnnTanh:
      return ctrnn_tile_forward_as<Real, kCtrnnTanh>(m, s, step);
    case kCtrnnRelu:
      return ctrnn_tile_forward_as<Real, kCtrnnRelu>(m, s, step);
    case kCtrnnSigmoid:
      return ctrnn_tile_forward_as<Real, kCtrnnSigmoid>(m, s, step);
    case kCtrnnSoftplus:
      return ctrnn_tile_forward_as<Real, kCtrnnSoftplus>(m, s, step);
    case kCtrnnIdentity:
      return ctrnn_tile_forward_as<Real, kCtrnnIdentity>(m, s, step);
  }
}

// Back through time over the history. source(t, grad_rate, grad_state) adds dL/dr[t] and dL/dh[t] (for steps counted from 1) to what lies
// in its two [H, 16]; the gradient at h_0 is left in s.state, and d of all steps in s.d.
template <typename Real, CtrnnActivation A, typename Source>
static void ctrnn_tile_backward_as(const CtrnnModel<Real>& m, const CtrnnScratch<Real>& s, const Source& source) {
  typedef typename Simd<Real>::vec vec;
  constexpr int lanes = Simd<Real>::kLanes;
  const int64_t size = s.units * kCtrnnTile;
  const Real keep = 1 - m.alpha;
  for (int64_t i = 0; i < s.units; ++i)
    for (int64_t j = 0; j < s.units; ++j) s.w_rec_t[i * s.units + j] = m.w_rec[j * s.units + i];
  for (int64_t k = 0; k < size; ++k) s.state[k] = s.drive[k] = 0;
  for (int64_t t = s.steps;; --t) {
    // drive: dL/dr[t] as far as it comes from step t + 1; state: (1 - a) dh[t + 1].
    if (t > 0) source(t, s.drive, s.state);
    for (int64_t i = 0; i < s.units; ++i)
      for (int k = 0; k < kCtrnnTile; k += lanes) {
        const int64_t at = i * kCtrnnTile + k;
        const vec r = load_vec(s.rates_before(i, t) + k);
        const vec dh = load_vec(s.state + at) + slope<Real, A>(r) * load_vec(s.drive + at), d = m.alpha * dh;
        store_vec(s.state + at, t > 0 ? keep * dh : dh);
        store_vec(s.rate + at, d);
        if (t > 0) store_vec(s.d + (i * s.steps + t - 1) * kCtrnnTile + k, d);
      }
    if (t == 0) break;
    const CtrnnOperand<Real> operand = {s.w_rec_t, s.units, s.rate, kCtrnnTile, s.units};
    ctrnn_product<Real>(&operand, 1, s.units, nullptr, s.drive);
  }
}

template <typename Real, typename Source>
static void ctrnn_tile_backward(const CtrnnModel<Real>& m, const CtrnnScratch<Real>& s, const Source& source) {
  switch (m.activation) {
    case kCtrnnTanh:
      return ctrnn_tile_backward_as<Real, kCtrnnTanh>(m, s, source);
    case kCtrnnRelu:
      return ctrnn_tile_backward_as<Real, kCtrnnRelu>(m, s, source);
    case kCtrnnSigmoid:
      return ctrnn_tile_backward_as<Real, kCtrnnSigmoid>(m, s, source);
    case kCtrnnSoftplus:
      return ctrnn_tile_backward_as<Real, kCtrnnSoftplus>(m, s, source);
    case kCtrnnIdentity:
      return ctrnn_tile_backward_as<Real, kCtrnnIdentity>(m, s, source);
  }
}

// [dW; dV; db] of a tile, added to grad [H + I + 1, H].
template <typename Real>
static inline void ctrnn_tile_weight_grad(const CtrnnScratch<Real>& s, Real* grad) {
  ctrnn_gradient(s.units + s.inputs + 1, s.units, s.steps * kCtrnnTile, s.history, (s.steps + 1) * kCtrnnTile, s.d,
                 s.steps * kCtrnnTile, grad);
}
