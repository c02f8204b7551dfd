"""``gate_step``: the arithmetic of a gated cell in one fused native kernel, forward and backward.

Its reference is :func:`rnndyn_fast.reference.cells.cell_step`; the equations are in :mod:`rnndyn_fast.ops.cells`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch, _launch_cuda
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import LSTM, UGRNN, Cell, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated

_RULES: dict[type[Cell], int] = {GRUGates: 0, GRUUpdate: 1, LSTM: 2, UGRNN: 3, IntersectionRNN: 4, ReciprocalGated: 5}  # GateRule
ACTIVATION_NUMBERS = {Activation.IDENTITY: 0, Activation.RELU: 1, Activation.ELU: 2, Activation.TANH: 3}  # GateActivation
_NORMED = {GRUGates: "gates_norm", GRUUpdate: "candidate_norm", IntersectionRNN: "gates_norm"}  # of their first port
MAX_PORT_TERMS = 6  # kMaxPortTerms of gate_step.h; the core checks it


def can_run_gate_step(cell: Cell, example: Tensor, *, raise_error: bool = False) -> bool:
    """Whether the native kernel computes this cell on tensors like ``example``; with ``raise_error``, ``ValueError`` with the reason."""
    reason = _launch.unavailable
    if reason is None and type(cell) not in _RULES:
        reason = f"there is no kernel of {cell.kind}"
    elif isinstance(cell, LSTM) and (cell.layer_norm or cell.peepholes):
        reason = "the kernel has no LSTM with a norm of its memory or peepholes"
    elif isinstance(cell, ReciprocalGated) and cell.activation not in ACTIVATION_NUMBERS:
        reason = f"the kernel has no activation {cell.activation.value}"
    elif isinstance(cell, ReciprocalGated) and not {cell.tau_gain.nonlinearity, cell.gate_gain.nonlinearity} <= set(_GAINS):
        reason = "the kernel has gains of the sigmoid and of tanh only"
    elif _launch.on_device(example):
        reason = _launch_cuda.why_not(example)
    elif example.device.type != "cpu" or example.dtype not in (torch.float32, torch.float64):
        reason = f"it takes float32 and float64 on the CPU and halves on CUDA devices, not {example.dtype} on {example.device}"
    if reason and raise_error:
        raise ValueError(f"gate_step: {reason}")
    return reason is None


# a + b tanh(s x) of a nonlinearity
_GAINS = {Activation.SIGMOID: (0.5, 0.5, 0.5), Activation.TANH: (0.0, 1.0, 1.0)}


def _gain(gain: Gain) -> list[float]:
    a, b, s = _GAINS[gain.nonlinearity]
    return [gain.offset + gain.multiplier * a, gain.multiplier * b, s]


def gate_scalars(cell: Cell) -> tuple[int, float, list[float], list[float], int]:
    """A cell as the native core takes it."""
    rule, bias = _RULES[type(cell)], float(getattr(cell, "forget_bias", 0.0))
    if isinstance(cell, ReciprocalGated):
        return rule, bias, _gain(cell.tau_gain), _gain(cell.gate_gain), ACTIVATION_NUMBERS[cell.activation]
    return rule, bias, [0.0] * 3, [0.0] * 3, 0


class _GateStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, counts: tuple[int, ...], *terms: Tensor) -> tuple[Tensor, ...]:  # terms each [N, H, W, m D]
        ports, rest = [], list(terms)
        for count in counts:
            ports.append(rest[:count])
            rest = rest[count:]
        sums = [torch.empty_like(port[0]) if len(port) > 1 else None for port in ports]
        size, channels = ports[0][0].shape[:3], ports[0][0].shape[3] // next(iter(cell.ports.values()))
        states = [ports[0][0].new_empty((*size, channels)) for _ in cell.states]
        _launch.gate_step(gate_scalars(cell), ports, [], sums, states, [], backward=False)
        ctx.cell, ctx.counts = cell, counts
        ctx.save_for_backward(*(port[0] if total is None else total for port, total in zip(ports, sums, strict=True)))
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be a constant to autograd, and second derivatives wrong
            raise RuntimeError('gate_step cannot be differentiated twice; use backend="reference" for second derivatives')
        ports = ctx.saved_tensors
        grad_ports = [torch.empty_like(port) for port in ports]
        states = [g.contiguous() for g in grads]
        _launch.gate_step(gate_scalars(ctx.cell), [[p] for p in ports], [], [], states, grad_ports, backward=True)
        return None, None, *(grad for grad, count in zip(grad_ports, ctx.counts, strict=True) for _ in range(count))


def gate_step(
    cell: Cell,
    ports: Mapping[str, Sequence[Tensor]],  # terms, each [N, m D, H, W] (channels-last: no copy)
    parameters: Mapping[str, Tensor],  # by the cell's own names
) -> tuple[Tensor, ...]:
    """One step of a cell from the terms of its ports: its states, [N, D, H, W] each, channels-last.

    A port without terms counts as zero. The norm of a first port's gates is applied before the kernel, by PyTorch.

    Differentiable: terms and parameters. Forward-mode: no. Double backward: raises. Deterministic: yes. Memory: keeps the sum of
    each port.
    """
    first = next(iter(cell.ports))
    example = ports[first][0]
    channels = example.shape[1] // cell.ports[first]
    full: list[list[Tensor]] = []
    for name, multiple in cell.ports.items():
        terms = list(ports.get(name, ()))
        if not terms:
            terms = [example.new_zeros((example.shape[0], multiple * channels, *example.shape[2:]))]
        elif len(terms) > MAX_PORT_TERMS:
            terms = [*terms[: MAX_PORT_TERMS - 1], torch.stack(terms[MAX_PORT_TERMS - 1 :]).sum(0)]
        if name == first and getattr(cell, "layer_norm", False):
            norm = _NORMED[type(cell)]
            total = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
            weight, bias, eps = parameters[f"{norm}.weight"], parameters[f"{norm}.bias"], getattr(cell, "eps", 1e-12)
            terms = [torch.group_norm(total, multiple, weight, bias, eps)]
        full.append([t.permute(0, 2, 3, 1).contiguous() for t in terms])
    if len({t.dtype for terms in full for t in terms}) > 1:  # under autocast convolutions are in half precision, other maps may not be
        dtype = reduce(torch.promote_types, (t.dtype for terms in full for t in terms))
        full = [[t.to(dtype) for t in terms] for terms in full]
    states = _GateStep.apply(cell, tuple(len(terms) for terms in full), *(t for terms in full for t in terms))
    return tuple(s.permute(0, 3, 1, 2) for s in states)
