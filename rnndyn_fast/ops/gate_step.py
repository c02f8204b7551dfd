"""``gate_step``: the arithmetic of a gated cell in one fused native kernel, forward and backward.

Its reference is :func:`rnndyn_fast.reference.cells.cell_step`; the equations are in :mod:`rnndyn_fast.ops.cells`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import core, cuda_module, launches
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import LSTM, UGRNN, Cell, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated

_RULES: dict[type[Cell], int] = {GRUGates: 0, GRUUpdate: 1, LSTM: 2, UGRNN: 3, IntersectionRNN: 4, ReciprocalGated: 5}  # GateRule
ACTIVATION_NUMBERS = {Activation.IDENTITY: 0, Activation.RELU: 1, Activation.ELU: 2, Activation.TANH: 3}  # GateActivation
_NORMED = {GRUGates: "gates_norm", GRUUpdate: "candidate_norm", IntersectionRNN: "gates_norm"}  # of their first port
MAX_PORT_TERMS = 6  # kMaxPortTerms of gate_step.h; the core checks it


def can_compute_cell(cell: Cell) -> bool:
    """Whether the native kernel has this cell at all."""
    return _why_not_cell(cell) is None


def _why_not_cell(cell: Cell) -> str | None:
    if type(cell) not in _RULES:
        return f"there is no kernel of {cell.kind}"
    if isinstance(cell, LSTM) and (cell.layer_norm or cell.peepholes):
        return "the kernel has no LSTM with a norm of its memory or peepholes"
    if isinstance(cell, LSTM | GRUUpdate) and cell.activation is not Activation.TANH:
        return f"the kernel has no {cell.kind} with the activation {cell.activation.value}"
    if isinstance(cell, ReciprocalGated) and cell.activation not in ACTIVATION_NUMBERS:
        return f"the kernel has no activation {cell.activation.value}"
    if isinstance(cell, ReciprocalGated) and not {cell.tau_gain.nonlinearity, cell.gate_gain.nonlinearity} <= set(_GAINS):
        return "the kernel has gains of the sigmoid and of tanh only"
    return None


def can_run_gate_step(cell: Cell, example: Tensor, *, raise_error: bool = False) -> bool:
    """Whether the native kernel computes this cell on tensors like ``example``; with ``raise_error``, ``ValueError`` with the reason."""
    reason = core.unavailable or _why_not_cell(cell)
    if reason is None and core.on_device(example):
        reason = cuda_module.why_not(example)
    elif reason is None and (example.device.type != "cpu" or example.dtype not in (torch.float32, torch.float64)):
        reason = f"it takes float32 and float64 on the CPU and halves on CUDA devices, not {example.dtype} on {example.device}"
    if reason and raise_error:
        raise ValueError(f"gate_step: {reason}")
    return reason is None


# a + b tanh(s x) of a nonlinearity
_GAINS = {Activation.SIGMOID: (0.5, 0.5, 0.5), Activation.TANH: (0.0, 1.0, 1.0)}


def _gain(gain: Gain) -> list[float]:
    a, b, s = _GAINS[gain.nonlinearity]
    return [gain.offset + gain.multiplier * a, gain.multiplier * b, s]


def gate_scalars(cell: Cell) -> launches.GateScalars:
    """A cell as the native core takes it."""
    rule, bias = _RULES[type(cell)], float(getattr(cell, "forget_bias", 0.0))
    if isinstance(cell, ReciprocalGated):
        return rule, bias, _gain(cell.tau_gain), _gain(cell.gate_gain), ACTIVATION_NUMBERS[cell.activation]
    return rule, bias, [0.0] * 3, [0.0] * 3, 0


# ---------------------------------------------------------------- the op and its gradient

_LIBRARY = torch.library.Library("rnndyn", "FRAGMENT")
# values: forget bias, constant, factor and slope of both gains. Returns the states, then the sums of ports of several terms.
_LIBRARY.define("gate_step(Tensor[] terms, int[] counts, int rule, int activation, float[] values) -> Tensor[]")
_LIBRARY.define("gate_step_backward(Tensor[] ports, Tensor[] grads, int rule, int activation, float[] values) -> Tensor[]")
_CELLS = {rule: cell for cell, rule in _RULES.items()}


def _values(cell: Cell) -> tuple[int, int, list[float]]:
    rule, forget_bias, tau, gate, activation = gate_scalars(cell)
    return rule, activation, [forget_bias, *tau, *gate]


def _scalars(rule: int, activation: int, values: Sequence[float]) -> launches.GateScalars:
    return rule, values[0], list(values[1:4]), list(values[4:7]), activation


def _by_port(terms: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(terms)
    return [[next(rest) for _ in range(count)] for count in counts]


def _allocated(ports: Sequence[Sequence[Tensor]], rule: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """States, and the sum of each port of several terms."""
    cell, first = _CELLS[rule], ports[0][0]
    channels = first.shape[3] // next(iter(cell.ports.values()))
    states = [first.new_empty((*first.shape[:3], channels)) for _ in cell.states]
    return states, [torch.empty_like(port[0]) if len(port) > 1 else None for port in ports]


def _forward_fake(terms: list[Tensor], counts: list[int], rule: int, activation: int, values: list[float]) -> list[Tensor]:
    states, sums = _allocated(_by_port(terms, counts), rule)
    return [*states, *(total for total in sums if total is not None)]


def _forward(terms: list[Tensor], counts: list[int], rule: int, activation: int, values: list[float]) -> list[Tensor]:
    ports = _by_port([t.contiguous() for t in terms], counts)
    states, sums = _allocated(ports, rule)
    launches.gate_step(_scalars(rule, activation, values), ports=ports, sums=sums, states=states)
    return [*states, *(total for total in sums if total is not None)]


def _backward_fake(ports: list[Tensor], grads: list[Tensor], rule: int, activation: int, values: list[float]) -> list[Tensor]:
    return [torch.empty_like(port, memory_format=torch.contiguous_format) for port in ports]


def _backward(ports: list[Tensor], grads: list[Tensor], rule: int, activation: int, values: list[float]) -> list[Tensor]:
    sums, states = [p.contiguous() for p in ports], [g.contiguous() for g in grads]
    found = [torch.empty_like(p) for p in sums]
    launches.gate_step(_scalars(rule, activation, values), ports=[[p] for p in sums], states=states, grad_ports=found, backward=True)
    return found


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError('gate_step cannot be differentiated twice; use backend="reference" for second derivatives')


def _keep(ctx: Any, terms: Sequence[Tensor], counts: Sequence[int], key: tuple[int, int, list[float]], outputs: Sequence[Tensor]) -> None:
    ctx.key, ctx.counts, ctx.states = key, tuple(counts), len(_CELLS[key[0]].states)
    sums = iter(outputs[ctx.states :])
    ctx.save_for_backward(*(port[0] if len(port) == 1 else next(sums) for port in _by_port(terms, counts)))


def _grads_of_terms(ctx: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    ports = list(ctx.saved_tensors)
    channels = ports[0].shape[3] // next(iter(_CELLS[ctx.key[0]].ports.values()))
    full = [ports[0].new_zeros((*ports[0].shape[:3], channels)) if g is None else g for g in grads[: ctx.states]]
    found = torch.ops.rnndyn.gate_step_backward(ports, full, *ctx.key)
    return [grad for grad, count in zip(found, ctx.counts, strict=True) for _ in range(count)]


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    terms, counts, *key = inputs
    _keep(ctx, terms, counts, tuple(key), output)


def _backward_registered(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return _grads_of_terms(ctx, grads), None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("gate_step", _forward, _device)
    _LIBRARY.impl("gate_step_backward", _backward, _device)
torch.library.register_fake("rnndyn::gate_step", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnndyn::gate_step_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::gate_step", _backward_registered, setup_context=_setup_registered, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::gate_step_backward", _refuse_double_backward, lib=_LIBRARY)


class _GateStep(torch.autograd.Function):
    """The op where nothing is compiled: a forward-mode tangent raises here, where the registered op would lose it."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, counts: tuple[int, ...], *terms: Tensor) -> tuple[Tensor, ...]:  # terms each [N, H, W, m D]
        key = _values(cell)
        outputs = torch.ops.rnndyn.gate_step(list(terms), list(counts), *key)
        _keep(ctx, terms, counts, key, outputs)
        return tuple(outputs[: ctx.states])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would be a constant to autograd, and second derivatives wrong
            _refuse_double_backward()
        return None, None, *_grads_of_terms(ctx, grads)


# ---------------------------------------------------------------- the public function


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
        if name in cell.constants:
            terms[0] = terms[0] + cell.constants[name]
        full.append([t.permute(0, 2, 3, 1).contiguous() for t in terms])
    if len({t.dtype for terms in full for t in terms}) > 1:  # under autocast convolutions are in half precision, other maps may not be
        dtype = reduce(torch.promote_types, (t.dtype for terms in full for t in terms))
        full = [[t.to(dtype) for t in terms] for terms in full]
    counts, flat = [len(terms) for terms in full], [t for terms in full for t in terms]
    if torch.compiler.is_compiling():
        states = torch.ops.rnndyn.gate_step(flat, counts, *_values(cell))[: len(cell.states)]
    else:
        states = _GateStep.apply(cell, tuple(counts), *flat)
    return tuple(s.permute(0, 3, 1, 2) for s in states)
