"""``ctrnn``: many continuous-time recurrent networks through a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn import ctrnn as reference_ctrnn
from rnndyn_fast.reference.philox import unit_normals


def check_model_values(alpha: Tensor, noise_std: Tensor) -> None:  # [M], [M]
    """Raise ``ValueError`` unless alpha lies in (0, 1] and noise_std is finite and not negative."""
    if not bool(((alpha > 0) & (alpha <= 1)).all()):
        raise ValueError(f"alpha: expected values in (0, 1], got {alpha.tolist()}")
    if not bool((torch.isfinite(noise_std) & (noise_std >= 0)).all()):
        raise ValueError(f"noise_std: expected finite values of at least 0, got {noise_std.tolist()}")


def ctrnn(
    inputs: Tensor,  # [M, N, T, I]
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, H] or [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    activations: Sequence[Activation],
    noise_seeds: Sequence[int] | Tensor | None = None,  # [M]
    *,
    stream: int = 0,
    first_trial: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rates and states [M, N, T, H]."""
    noise = None
    if noise_seeds is not None:
        seeds = torch.as_tensor(noise_seeds, dtype=torch.int64)
        m, n, t, _ = inputs.shape
        noise = unit_normals(seeds, n, t, w_rec.shape[1], stream=stream, first_trial=first_trial, dtype=inputs.dtype)
    return reference_ctrnn(inputs, w_rec, b_rec, w_in, h0, alpha, noise_std, activations, noise)
