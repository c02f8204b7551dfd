// activation_backward: the gradient of an area that is only an activation of its drive, from its value. Included by its family inside namespace
// rnndyn::<isa>, after gate_step_kernel.h; parameters are documented in gate_step.h.
//
// Maths: dd = (g + g') f'(h), with f' from the value h; its sum over pixels for the bias.
// Precision: a chunk of pixels in Real, chunks in double. Traffic: each map once. Bound by memory.
// Threads: over chunks of pixels. Determinism: chunks depend on the shape alone and are added in order.

// The gradient of an argument with the value y. (Selected, not multiplied, where the slope is 0: infinite gradients of what a rectifier cut
// are 0, and a NaN value lets the gradient through, as in PyTorch.)
template <GateActivation kActivation, typename Real>
inline Real grad_of_value(Real grad, Real y) {
  if (kActivation == GateActivation::kRelu) return y <= Real(0) ? Real(0) : grad;
  if (kActivation == GateActivation::kElu) return y <= Real(0) ? grad * (y + Real(1)) : grad;
  if (kActivation == GateActivation::kTanh) return grad * (Real(1) - y * y);
  return grad;
}

template <typename Real, GateActivation kActivation>
void activation_backward_rows(const ActivationBackwardParams<Real>& p) {
  const int64_t c = p.channels, chunks = (p.pixels + kGateChunk - 1) / kGateChunk;
#pragma omp parallel num_threads(p.num_threads)
  {
    Real* totals = static_cast<Real*>(malloc(sizeof(Real) * c));
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t last = (chunk + 1) * kGateChunk < p.pixels ? (chunk + 1) * kGateChunk : p.pixels;
      row_zero(totals, c);
      for (int64_t pixel = chunk * kGateChunk; pixel < last; ++pixel) {
        const Real *grad = p.grad + pixel * c, *state = p.state + pixel * c;
        Real* out = p.grad_drive + pixel * c;
        if (p.grad_more != nullptr) {
          const Real* more = p.grad_more + pixel * c;
#pragma omp simd
          for (int64_t i = 0; i < c; ++i) {
            const Real value = grad_of_value<kActivation>(grad[i] + more[i], state[i]);
            out[i] = value, totals[i] += value;
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < c; ++i) {
            const Real value = grad_of_value<kActivation>(grad[i], state[i]);
            out[i] = value, totals[i] += value;
          }
        }
      }
      if (p.grad_bias != nullptr)
        for (int64_t i = 0; i < c; ++i) p.workspace[chunk * c + i] = double(totals[i]);
    }
    // (barrier: a bias needs all chunks)
    if (p.grad_bias != nullptr) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < c; ++i) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += p.workspace[chunk * c + i];
        p.grad_bias[i] = Real(total);
      }
    }
    free(totals);
  }
}

template <typename Real>
void activation_backward(const ActivationBackwardParams<Real>& p) {
  switch (p.activation) {
    case GateActivation::kIdentity:
      return activation_backward_rows<Real, GateActivation::kIdentity>(p);
    case GateActivation::kRelu:
      return activation_backward_rows<Real, GateActivation::kRelu>(p);
    case GateActivation::kElu:
      return activation_backward_rows<Real, GateActivation::kElu>(p);
    case GateActivation::kTanh:
      return activation_backward_rows<Real, GateActivation::kTanh>(p);
  }
}
