"""Norms and changes of trajectories, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def trajectory_norms(
    values: Tensor,  # [T, N, ...]
) -> tuple[Tensor, Tensor]:
    """Norms [T, N] and changes [T - 1, N] over all but the first two dimensions, computed in float64 step by step."""
    norms, changes, before = [], [], None
    for step in values:
        now = step.flatten(1).double()
        norms.append(torch.linalg.vector_norm(now, dim=1))
        if before is not None:
            changes.append(torch.linalg.vector_norm(now - before, dim=1))
        before = now
    return torch.stack(norms), torch.stack(changes) if changes else norms[0].new_empty(0, len(norms[0]))
