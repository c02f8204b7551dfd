"""The cells of :mod:`rnndyn_fast.ops.cells` in plain PyTorch: one step, from ports to states."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import (
    LSTM,
    UGRNN,
    Cell,
    Gain,
    GRUGates,
    GRUUpdate,
    IntersectionRNN,
    Intervention,
    ReciprocalGated,
    TimeDecay,
)
from rnndyn_fast.reference.interventions import intervention

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.ELU: functional.elu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
}
Maps = Mapping[str, Tensor]


def _normed(cell: GRUGates | GRUUpdate | LSTM | IntersectionRNN, x: Tensor, parameters: Maps, name: str, groups: int) -> Tensor:
    if not cell.layer_norm:
        return x
    return torch.group_norm(x, groups, parameters[f"{name}.weight"], parameters[f"{name}.bias"], cell.eps)


def _gain(gain: Gain, x: Tensor) -> Tensor:
    return gain.offset + gain.multiplier * ACTIVATIONS[gain.nonlinearity](x + gain.bias)


def time_decay(cell: TimeDecay, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """h."""
    return (parameters["memory_decay"] * ports["memory"] + ports["drive"],)


def gru_gates(cell: GRUGates, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """r . h and u."""
    r, u = _normed(cell, ports["gates"], parameters, "gates_norm", 2).chunk(2, 1)
    return torch.sigmoid(r + cell.forget_bias) * ports["memory"], torch.sigmoid(u)


def gru_update(cell: GRUUpdate, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """h."""
    candidate = ACTIVATIONS[cell.activation](_normed(cell, ports["candidate"], parameters, "candidate_norm", 1))
    return (ports["update"] * ports["memory"] + (1 - ports["update"]) * candidate,)


def lstm(cell: LSTM, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """h and c."""
    i, j, f, g = _normed(cell, ports["gates"], parameters, "gates_norm", 4).chunk(4, 1)
    c = ports["memory"]
    if cell.peepholes:
        peep_f, peep_i, peep_o = parameters["peepholes"]
        f, i, g = f + peep_f * c, i + peep_i * c, g + peep_o * c
    c = c * torch.sigmoid(f + cell.forget_bias) + torch.sigmoid(i) * ACTIVATIONS[cell.activation](j)
    c = _normed(cell, c, parameters, "state_norm", 1)
    return ACTIVATIONS[cell.activation](c) * torch.sigmoid(g), c


def ugrnn(cell: UGRNN, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """h."""
    g, q = ports["gates"].chunk(2, 1)
    g = torch.sigmoid(g + cell.forget_bias)
    return (g * ports["memory"] + (1 - g) * torch.tanh(q),)


def intersection_rnn(cell: IntersectionRNN, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """z and h."""
    gate_h, q, gate_y, y = _normed(cell, ports["gates"], parameters, "gates_norm", 4).chunk(4, 1)
    gate_h, gate_y = torch.sigmoid(gate_h + cell.forget_bias), torch.sigmoid(gate_y + cell.forget_bias)
    h = gate_h * ports["memory"] + (1 - gate_h) * torch.tanh(q)
    return gate_y * ports["input"] + (1 - gate_y) * torch.relu(y), h


def reciprocal_gated(cell: ReciprocalGated, ports: Maps, parameters: Maps) -> tuple[Tensor, ...]:
    """h."""
    kept = _gain(cell.tau_gain, ports["tau"]) * ports["memory"]
    driven = _gain(cell.gate_gain, ports["gate"]) * (ports["drive"] + cell.drive_bias)
    return (ACTIVATIONS[cell.activation](kept + driven),)


STEPS: dict[type[Cell], Callable[..., tuple[Tensor, ...]]] = {
    TimeDecay: time_decay,
    GRUGates: gru_gates,
    GRUUpdate: gru_update,
    LSTM: lstm,
    UGRNN: ugrnn,
    IntersectionRNN: intersection_rnn,
    ReciprocalGated: reciprocal_gated,
    Intervention: intervention,
}


def cell_step(
    cell: Cell,
    ports: Mapping[str, Tensor | None],  # each [N, multiple * D, H, W]
    parameters: Maps,  # by the cell's own names
) -> tuple[Tensor, ...]:
    """One step of a cell: its states, [N, D, H, W] each. A port of None counts as zero; the first must be there."""
    first = ports[next(iter(cell.ports))]
    assert first is not None
    channels = first.shape[1] // next(iter(cell.ports.values()))
    shape = (first.shape[0], channels, *first.shape[2:])
    full = {
        name: value if (value := ports.get(name)) is not None else first.new_zeros((shape[0], shape[1] * multiple, *shape[2:]))
        for name, multiple in cell.ports.items()
    }
    return STEPS[type(cell)](cell, full, parameters)
