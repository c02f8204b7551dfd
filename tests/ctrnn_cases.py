"""Cases of the ctrnn op, and the one way to run it that its tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast.ops.ctrnn import ctrnn
from rnndyn_fast.reference.ctrnn import Activation

DTYPES = [torch.float32, torch.float64]
EVERY = tuple(Activation)


@dataclass(frozen=True)
class Case:
    """M, N, T, I, H; activations go round."""

    models: int = 5
    trials: int = 16
    steps: int = 4
    inputs: int = 3
    units: int = 20
    noise: bool = True
    h0_per_trial: bool = True


CASES = {
    "one of everything": Case(1, 1, 1, 1, 1),
    "published sizes, two tiles": Case(5, 32, 6, 3, 100),
    "partial tile, odd units": Case(5, 17, 5, 2, 33),
    "more inputs than units": Case(3, 5, 3, 40, 7),
    "several groups of tiles": Case(2, 150, 3, 3, 26, noise=False),
    "units beyond a block": Case(1, 16, 3, 3, 131, h0_per_trial=False),
    "without noise": Case(5, 9, 4, 3, 25, noise=False, h0_per_trial=False),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    m, h = case.models, case.units

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "inputs": normal(m, case.trials, case.steps, case.inputs) * (torch.rand(m, case.trials, case.steps, case.inputs) < 0.3),
        "w_rec": normal(m, h, h) * (0.8 / h**0.5),
        "b_rec": normal(m, h) * 0.1,
        "w_in": normal(m, case.inputs, h),
        "h0": normal(m, case.trials, h) if case.h0_per_trial else normal(m, h),
        "alpha": torch.linspace(0.2, 1.0, m, dtype=dtype),
        "noise_std": torch.linspace(0.0, 0.4, m, dtype=dtype) + 0.1 * (m == 1),
        "activations": [EVERY[k % len(EVERY)] for k in range(m)],
        "noise_seeds": [2**40 + 977 * k for k in range(m)] if case.noise else None,
    }


DIFFERENTIABLE = ("inputs", "w_rec", "b_rec", "w_in", "h0")


def run(x: dict[str, Any], backend: str, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Rates, states and gradients of everything differentiable, for given gradients of rates and states."""
    x = {**x, **{name: x[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE}}
    rates, states = ctrnn(**x, stream=7, first_trial=3, backend=backend)
    assert states is not None
    total = (rates * grads[0]).sum() + (states * grads[1]).sum()
    return [rates.detach(), states.detach(), *torch.autograd.grad(total, [x[name] for name in DIFFERENTIABLE])]
