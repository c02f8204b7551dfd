"""Rollouts in half precision, as on a GPU, with the fused convolution: every CUDA kernel in the SIMT harness."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import HALF, in_harness, rounded_case, send_to_kernels, wide_cases, widened
from torch import Tensor

from rnndyn_fast.graph import compile_schedule, rollout
from rnndyn_fast.graph.saved import saved_buffers

pytestmark = in_harness

NAMES = (
    "lateral_additive_bias", "lateral_multiplicative", "topdown_additive", "topdown_multiplicative", "topdown_multiplicative_bias",
    "biological_loop_multiplicative", "skip_additive", "several_inputs_multiplicative", "operators_additive", "shared_multiplicative",
    "many_terms_additive", "many_terms_multiplicative", "feed_forward_frames", "no_norm_no_relu",
)  # fmt: skip
by_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)
Gradients = dict[str, Tensor | None]


def step(
    case: RolloutCase, inputs: list[Tensor], parameters: dict[str, Tensor], backend: str, engine: str = "auto"
) -> tuple[list[Tensor], Gradients]:
    """Outputs, and gradients of everything for one fixed random cotangent."""
    leaves = dict(zip((n.name for n in case.network.inputs), inputs, strict=True)) | parameters
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    xs, ps = [leaves[n.name] for n in case.network.inputs], {name: leaves[name] for name in parameters}
    outputs = rollout(case.network, case.timesteps, xs, ps, case.record, backend=backend, engine=engine)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def errors(ours: tuple[list[Tensor], Gradients], truth: tuple[list[Tensor], Gradients]) -> dict[str, float]:
    """Relative errors in norm of outputs and gradients."""
    found = {f"output {i}": (o, t) for i, (o, t) in enumerate(zip(ours[0], truth[0], strict=True))}
    for name, grad in ours[1].items():
        other = truth[1][name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            found[name] = grad, other
    for name, (mine, _) in found.items():
        assert not mine.isnan().any(), f"{name}: NaN (or something left unwritten)"
    return {name: float((mine.double() - other).norm() / (1e-30 + other.norm())) for name, (mine, other) in found.items()}


@wide_cases(*NAMES)
@by_dtype
def test_half_is_as_good_as_plain_pytorch(case: RolloutCase, dtype: torch.dtype, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error in norm: at most twice that of the reference in the same dtype, plus a floor of roundings."""
    inputs, parameters = rounded_case(case, dtype)
    truth = step(case, inputs, parameters, "reference")
    half = [x.to(dtype) for x in inputs], {name: p.to(dtype) for name, p in parameters.items()}
    plain = errors(step(case, *half, "reference"), truth)
    launches = send_to_kernels(monkeypatch, *HALF)
    result = step(case, *half, "native", "fused")
    assert {"area_step_forward", "area_step_backward", "recurrent_conv", "recurrent_conv_weight_grad"} <= set(launches)
    assert {o.dtype for o in result[0]} == {dtype}
    assert {g.dtype for g in result[1].values() if g is not None} == {dtype}
    for name, error in errors(result, truth).items():
        assert error <= 2 * plain[name] + 4 * torch.finfo(dtype).eps, f"{name}: {error:.3g}, plain {plain[name]:.3g}"
