"""The CUDA ctrnn, in the SIMT harness (or on a device), against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ctrnn_cases import Case, arguments, run
from device_rollouts import DEVICE, send_to_kernels

from rnndyn_fast.ops import cuda_module, sequence_launches
from rnndyn_fast.ops.ctrnn import can_run_ctrnn, ctrnn
from rnndyn_fast.reference.philox import unit_normals

# One of everything; partial tiles and blocks of units, all activations; more units than threads; an expanded model axis (below).
CASES = {
    "one": Case(1, 1, 1, 1, 1),
    "partial tiles": Case(5, 6, 4, 2, 33),
    "more inputs than units": Case(2, 5, 3, 12, 7, noise=False),
    "units beyond a block": Case(1, 4, 2, 3, 131, h0_per_trial=False),
}


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if DEVICE is None:
        send_to_kernels(monkeypatch, torch.float32)
    return simt


def moved(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in x.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_as_good_as_plain_pytorch(case: Case, kernels: Any) -> None:
    """Values and all gradients: error in norm at most twice plain PyTorch's, plus roundings (also of the noise)."""
    x = moved(arguments(case), torch.float32)
    shape = (case.models, case.trials, case.steps, case.units)
    grads = torch.randn(shape), torch.randn(shape)
    truth = run(moved(x, torch.float64), "reference", (grads[0].double(), grads[1].double()))
    ours, plain = run(x, "native", grads), run(x, "reference", grads)
    for mine, theirs, expected, name in zip(ours, plain, truth, ("rates", "states", "inputs", "w_rec", "b_rec", "w_in", "h0"), strict=True):
        assert not mine.isnan().any(), f"{name}: NaN (or something left unwritten)"
        scale = float(expected.norm()) + 1e-6
        error, reference = (float((y.double() - expected).norm()) / scale for y in (mine, theirs))
        assert error <= 2 * reference + 2e-6, (name, error, reference)


def test_models_may_share_their_inputs(kernels: Any) -> None:
    x = moved(arguments(Case(3, 5, 3, 2, 9)), torch.float32)
    shared = x["inputs"][:1].expand(3, -1, -1, -1)
    ours, _ = ctrnn(**{**x, "inputs": shared}, backend="native")
    expected, _ = ctrnn(**{**x, "inputs": shared.contiguous()}, backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_reference(kernels: Any) -> None:
    """alpha 1, identity, no weights: the states are the noise."""
    m, n, t, h = 2, 5, 3, 10
    zero = torch.zeros(m, h, h)
    seeds = torch.tensor([5, 2**40 + 3])
    rates, _ = ctrnn(
        torch.zeros(m, n, t, 1), zero, zero[:, 0], zero[:, :1], zero[:, 0], torch.ones(m), torch.ones(m),
        [_identity()] * m, seeds, stream=9, first_trial=2**31, backend="native",
    )  # fmt: skip
    expected = unit_normals(seeds, n, t, h, stream=9, first_trial=2**31)
    torch.testing.assert_close(rates, expected, rtol=1e-5, atol=1e-5)


def _identity() -> Any:
    from rnndyn_fast.reference.ctrnn import Activation

    return Activation.IDENTITY


def test_too_many_units_are_refused(kernels: Any) -> None:
    most = cuda_module.module().ctrnn_max_units()
    h = most + 1
    w = torch.zeros(1, 1, 1).expand(1, h, h)
    x, rates = torch.zeros(1, 1, 1, 1), torch.empty(1, 1, 1, h)
    with pytest.raises(ValueError, match=f"ctrnn_forward_kernel: at most {most} units, got {h}"):
        sequence_launches.ctrnn_forward.on_device(
            inputs=x, w_rec=w.contiguous(), b_rec=w[:, 0].contiguous(), w_in=w[:, :1].contiguous(), h0=rates[:, :, 0].clone(),
            alpha=torch.ones(1), noise_std=torch.zeros(1), activations=torch.zeros(1, dtype=torch.int32), stream=0, first_trial=0,
            rates=rates,
        )  # fmt: skip


@pytest.mark.skipif(DEVICE is not None, reason="for the harness")
def test_can_run_says_why_not(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"inputs: cpu has compute capability 7.5"):
        can_run_ctrnn(torch.zeros(1, 1, 1, 1), raise_error=True)
