// gate_step: gate arithmetic of a cell, forward and backward. Included by its family inside namespace rnndyn::<isa>; parameters are
// documented in gate_step.h, equations in rnndyn_fast/ops/cells.py.
//
// Maths: rules in gate_rules_kernel.h, a few registers of channels at a time. Backward computes the gates again from the ports: nothing but ports is kept.
// Precision: sigmoid, tanh and elu of gate_math_kernel.h. (Exact quotients took half the time.)
// Traffic: forward reads every term once and writes states (and, of several terms, their sum) once; backward reads ports and
//   gradients once and writes the gradients of the ports once; biases are summed while those are in L1. Bound by memory bandwidth in float32
//   with AVX-512.
// Threads: over chunks of pixels. Determinism: every element is computed by itself; biases are sums of chunks that depend on the shape alone, in order.
// Limits: at most kMaxPortTerms terms of a port; the caller checks shapes.

template <typename Rule, class Lanes>
inline RNNDYN_INLINED void gate_lanes(const GateStepParams<typename Lanes::Real>& p, const Lanes& x, bool backward) {
  if (backward) {
    Rule::backward(p, x);
  } else {
    Rule::forward(p, x);
  }
}

template <typename Real, typename Rule>
void gate_step_rows(const GateStepParams<Real>& p, bool backward) {
  int64_t size = 0;
  bool biases = false, plain = true;
  for (int k = 0; k < Rule::kPorts; ++k) {
    size += Rule::kMultiple[k] * p.channels;
    plain = plain && Rule::kMultiple[k] == 1;
    biases = biases || (backward && p.grad_bias[k] != nullptr);
  }
  const int64_t chunks = (p.pixels + kGateChunk - 1) / kGateChunk;
  // Where every port has one row per pixel, rows of a few pixels are one.
  const int64_t together = plain && p.channels < 256 ? 256 / p.channels : 1;
#pragma omp parallel num_threads(p.num_threads)
  {
    // Biases of those pixels, and the sums of a chunk.
    Real* scratch = static_cast<Real*>(malloc(sizeof(Real) * size * (together + 1)));
    Real* totals = scratch + size * together;
    const Real* bias[kMaxPorts] = {};
    Real* row = scratch;
    for (int k = 0; k < Rule::kPorts; ++k) {
      const int64_t n = Rule::kMultiple[k] * p.channels;
      if (backward || p.bias[k] == nullptr) continue;
      bias[k] = row;
      for (int64_t i = 0; i < together; ++i, row += n) row_copy(row, p.bias[k], n);
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t last = (chunk + 1) * kGateChunk < p.pixels ? (chunk + 1) * kGateChunk : p.pixels;
      if (biases) row_zero(totals, size);
      for (int64_t pixel = chunk * kGateChunk; pixel < last; pixel += together) {
        const int64_t pixels = last - pixel < together ? last - pixel : together;
        each_run<Real>(pixels * p.channels, [&](auto run) RNNDYN_INLINED {
          gate_lanes<Rule>(p, GateLanes<Real, Rule, decltype(run)>{p, bias, pixel, run}, backward);
        });
        Real* total = totals;
        for (int k = 0; biases && k < Rule::kPorts; ++k) {
          const int64_t n = Rule::kMultiple[k] * p.channels;
          for (int64_t i = 0; p.grad_bias[k] != nullptr && i < pixels; ++i)
            row_add(total, p.grad_port[k] + (pixel + i) * n, n);
          total += n;
        }
      }
      for (int64_t i = 0; biases && i < size; ++i) p.workspace[chunk * size + i] = double(totals[i]);
    }
    // (barrier: a bias needs all chunks)
    int64_t first = 0;
    for (int k = 0; biases && k < Rule::kPorts; ++k) {
      const int64_t n = Rule::kMultiple[k] * p.channels;
      if (p.grad_bias[k] != nullptr) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
          double total = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) total += p.workspace[chunk * size + first + i];
          p.grad_bias[k][i] = Real(total);
        }
      }
      first += n;
    }
    free(scratch);
  }
}

template <typename Real>
void gate_step(const GateStepParams<Real>& p, bool backward) {
  switch (p.rule) {
    case GateRule::kGruGates:
      return gate_step_rows<Real, GruGates>(p, backward);
    case GateRule::kGruUpdate:
      return gate_step_rows<Real, GruUpdate>(p, backward);
    case GateRule::kLstm:
      return gate_step_rows<Real, Lstm>(p, backward);
    case GateRule::kUgrnn:
      return gate_step_rows<Real, Ugrnn>(p, backward);
    case GateRule::kIntersection:
      return gate_step_rows<Real, Intersection>(p, backward);
    case GateRule::kReciprocal:
      break;
  }
  switch (p.activation) {
    case GateActivation::kIdentity:
      return gate_step_rows<Real, Reciprocal<GateActivation::kIdentity>>(p, backward);
    case GateActivation::kRelu:
      return gate_step_rows<Real, Reciprocal<GateActivation::kRelu>>(p, backward);
    case GateActivation::kElu:
      return gate_step_rows<Real, Reciprocal<GateActivation::kElu>>(p, backward);
    case GateActivation::kTanh:
      return gate_step_rows<Real, Reciprocal<GateActivation::kTanh>>(p, backward);
  }
}
