"""What launches of ``ctrnn`` take besides tensors, and its backward pass on devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import sequence_launches
from rnndyn_fast.reference.ctrnn import Activation


@lru_cache(maxsize=256)
def _codes(activations: tuple[Activation, ...], device: torch.device) -> Tensor:
    order = tuple(Activation)  # that of CtrnnActivation (ctrnn.h)
    with torch.inference_mode(False):
        return torch.tensor([order.index(a) for a in activations], dtype=torch.int32, device=device)


def activation_codes(activations: Sequence[str | Activation], device: torch.device) -> Tensor:
    """[M] int32, as the kernels number activations; kept, as a copy to a device waits for it."""
    return _codes(tuple(Activation(a) for a in activations), device)


def backward_on_device(
    *,
    inputs: Tensor,  # [M, N, T, I], or [1, N, T, I] for all models
    w_rec: Tensor,  # [M, H, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    rates: Tensor,  # [M, N, T, H]
    grad_inputs: Tensor | None,  # [M, N, T, I]
    grad_weights: Tensor,  # [M, H + I + 1, H]
    **operands: Any,
) -> None:
    """The kernel makes the gradient of what enters each step's bracket; the gradients of weights and inputs are matrix products over all
    trials and steps, by torch."""
    m, n, t, h = rates.shape
    i = inputs.shape[3]
    d, rates0 = torch.empty_like(rates), torch.empty_like(h0)
    sequence_launches.ctrnn_backward_steps.on_device(
        rates=rates, w_rec=w_rec.transpose(1, 2).contiguous(), h0=h0, inputs_per_step=i, d=d, rates0=rates0, **operands
    )
    before = torch.cat([rates0[:, :, None], rates[:, :, :-1]], 2).flatten(1, 2)
    shown, rows = inputs.expand(m, n, t, i).flatten(1, 2), d.flatten(1, 2)
    torch.bmm(before.transpose(1, 2), rows, out=grad_weights[:, :h])
    torch.bmm(shown.transpose(1, 2), rows, out=grad_weights[:, h : h + i])
    torch.sum(rows, 1, out=grad_weights[:, h + i])
    if grad_inputs is not None:
        grad_inputs.copy_(torch.bmm(rows, w_in.transpose(1, 2)).view_as(grad_inputs))
