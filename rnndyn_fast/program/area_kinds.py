"""The kinds of instructions that compute areas from their terms: steps with LayerNorm and pooling, gated cells, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.launch import Op
from rnndyn_fast.ops.launches import GateScalars
from rnndyn_fast.ops.norm_step import NormRule, norm_numbers
from rnndyn_fast.program.kind_table import Call, kind, launch_kind

launch_kind("area_step", launches.area_step_forward, modulator_complete=False, eps=1e-5, rectify=False)


@kind("value gamma beta moments", "value state max_pooled argmax mean_pooled mean rstd", launch=True)
def finish_area_step(
    value: Tensor,
    moments: Tensor,
    groups: tuple[int, int],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    rectify: bool,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor | None = None,
    max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    mean_pooled: Tensor | None = None,
) -> None:
    """On devices: norm, activation and pooling of a value whose moments the fused convolution left."""
    launches.area_step_forward.on_device(
        value=value, moments=moments, moment_groups=groups, gamma=gamma, beta=beta, eps=eps, rectify=rectify, mean=mean, rstd=rstd,
        state=state, max_pooled=max_pooled, argmax=argmax, mean_pooled=mean_pooled,
    )  # fmt: skip


launch_kind("area_step_backward", launches.area_step_backward, multiplicative=False, rectify=False)


@kind("ports biases", "sums states", launch=True)
def gate_step(
    scalars: GateScalars,
    ports: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    sums: Sequence[Tensor | None],
    states: Sequence[Tensor],
) -> None:
    """A step of a gated cell, as its kernel takes it."""
    launches.gate_step(scalars, ports=ports, biases=biases, sums=sums, states=states)


@kind("ports grads more", "grad_ports grad_biases workspace", launch=True)
def gate_step_backward(
    scalars: GateScalars,
    ports: Sequence[Tensor],
    grads: Sequence[Tensor],
    more: Sequence[Tensor | None],
    grad_ports: Sequence[Tensor],
    grad_biases: Sequence[Tensor | None],
    workspace: Tensor | None,
) -> None:
    """The gradients of a cell's ports, from the sums of the ports and the gradients of its states."""
    launches.gate_step(
        scalars, ports=[[p] for p in ports], states=grads, grad_ports=grad_ports, more=more, grad_biases=grad_biases, backward=True,
        workspace=workspace,
    )  # fmt: skip


def _with_rule(op: Op) -> Callable[..., None]:
    def run(rule: NormRule, squash: bool, **operands: Any) -> None:
        op(**norm_numbers(rule, squash=squash), **operands)

    return run


launch_kind("norm_step", launches.norm_step_forward, run=_with_rule(launches.norm_step_forward))
launch_kind("norm_step_backward", launches.norm_step_backward, run=_with_rule(launches.norm_step_backward))


@kind("variance", "rstd", prepared=True)
def reciprocal_deviation(variance: Tensor, rstd: Tensor, eps: float) -> Call:
    """rstd = 1 / sqrt(variance + eps)."""
    return lambda: torch.add(variance, eps, out=rstd).rsqrt_()


@kind("x", "out", prepared=True)
def scale(x: Tensor, out: Tensor, factor: float) -> Call:
    """out = x * factor."""
    return partial(torch.mul, x, factor, out=out)


launch_kind("activation_backward", launches.activation_backward)

# (On devices: the gradient of the argument from that of the value, and the value.)
_SLOPES: dict[int, Callable[[Tensor, Tensor, Tensor], Any]] = {
    1: lambda grad, y, out: torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
    2: lambda grad, y, out: torch.ops.aten.elu_backward.grad_input(grad, 1, 1, 1, True, y, grad_input=out),
    3: lambda grad, y, out: torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out),
}


@kind("grad state", "grad_drive")
def activation_slope(activation: int, grad: Tensor, state: Tensor, grad_drive: Tensor) -> None:
    """:func:`activation_backward` on devices, by PyTorch."""
    _SLOPES[activation](grad, state, grad_drive)
