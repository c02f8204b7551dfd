"""Convolutional recurrent cells as layers: one step, or a whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.spec import Activation, Area, Input, Network, Norm, Role
from rnndyn_fast.names import check_choice
from rnndyn_fast.nn.cell_graphs import CELLS, CellSpec, Graph, Source, add_cell, cell_states, state_source
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork
from rnndyn_fast.nn.tracing import refuse_tracers


def _frames(name: str, channels: int, size: tuple[int, int]) -> Input:
    return Input(name, channels, *size, frames=True)


class ConvCell(RecurrentNetwork):
    r"""A published cell (equations: :mod:`rnndyn_fast.ops.cells`), with TensorFlow's SAME padding.

    Args:
        kind: "timedecay", "simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", "rgc_shallow" or "rgc_median".
        in_channels, channels: of the input x and of the output (timedecay, intersectionrnn, rgc_shallow: equal).
        map_size: height and width of all maps.
        residual_channels: reciprocal gated cells: of the layer's own input, which reaches the output half.
        feedback_channels: rgc_median: of the feedback, or 0.
        options: of the cell: kernel_size, forget_bias, layer_norm, peepholes, cell_channels.
        backend, engine: see :func:`rnndyn_fast.rollout`.

    States are concatenated along channels as published: LSTM [c, h], reciprocal gated [c, o], else [h].

    Raises: ``ValueError`` naming the argument.

    Source: Nayebi et al., Neural Computation 34 (2022).

    >>> cell = ConvCell("lstm", 5, 4, (6, 6))
    >>> y, state = cell(torch.zeros(2, 5, 6, 6))
    >>> y.shape, state.shape
    (torch.Size([2, 4, 6, 6]), torch.Size([2, 8, 6, 6]))
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        channels: int,
        map_size: tuple[int, int],
        *,
        residual_channels: int = 0,
        feedback_channels: int = 0,
        backend: str | None = None,
        engine: str = "auto",
        **options: Any,
    ) -> None:
        check_choice("kind", kind, list(CELLS))
        if (residual_channels and not kind.startswith("rgc")) or (feedback_channels and kind != "rgc_median"):
            name = "feedback_channels" if feedback_channels else "residual_channels"
            raise ValueError(f"{name}: a {kind} cell reads no such input")
        size = (map_size[0], map_size[1])
        graph, inputs = Graph(), [_frames("x", in_channels, size)]
        x, residual = Source("x", in_channels), None
        feedback: tuple[Source, ...] = ()
        if kind == "rgc_median":
            graph.areas.append(Area("a", in_channels, norm=Norm.NONE, activation=Activation.ELU))
            graph.identity(x, "a", Role.BOTTOM_UP)
            x = Source("a", in_channels)
        if residual_channels:
            inputs.append(_frames("residual", residual_channels, size))
            residual = Source("residual", residual_channels)
        if feedback_channels:
            inputs.append(_frames("feedback", feedback_channels, size))
            feedback = (Source("feedback", feedback_channels),)
        self.kind = kind
        self.state_names = cell_states(kind)
        other = options.get("cell_channels", 64) if kind == "rgc_median" else channels
        self.state_channels = [other if state == "c" else channels for state in self.state_names]
        for state, width in zip(self.state_names, self.state_channels, strict=True):
            inputs.append(Input(f"initial_{state}", width, *size))
        initial = {state: f"initial_{state}" for state in self.state_names}
        if kind == "intersectionrnn":
            initial["z"] = "zero"
        spec = CellSpec("cell", x, channels, "", residual, feedback, initial)
        try:
            add_cell(graph, kind, spec, **options)
        except TypeError:
            raise ValueError(f"options: a {kind} cell does not take all of {sorted(options)}") from None
        network = Network(kind, tuple(inputs), tuple(graph.areas), tuple(graph.connections))
        self.recorded = tuple(
            dict.fromkeys(["cell", *(_record(*state_source(kind, "cell", state)) for state in self.state_names)])
        )  # fmt: skip
        super().__init__(network, 1, backend=backend, engine=engine)

    def sequence(
        self,
        x: Tensor,  # [T, N, in_channels, H, W]
        state: Tensor | None = None,  # [N, state channels, H, W]
        residual: Tensor | None = None,  # [T, N, residual_channels, H, W]
        feedback: Tensor | None = None,  # [T, N, feedback_channels, H, W]
    ) -> tuple[Tensor, Tensor]:
        """A whole sequence: outputs [T, N, channels, H, W] and states after each step [T, N, state channels, H, W]."""
        refuse_tracers(type(self).__name__, (x, state, residual, feedback))
        if x.dim() != 5:
            raise ValueError(f"x: expected [T, N, C, H, W], got {list(x.shape)}")
        given = {"x": x, "residual": residual, "feedback": feedback}
        names = [node.name for node in self.network.inputs]
        for name, value in given.items():
            if (value is None) == (name in names):
                wanted, how = ("a tensor", "with") if value is None else ("None", "without")
                raise ValueError(f"{name}: expected {wanted}, this cell was built {how} it")
        shape = (x.shape[1], sum(self.state_channels), *x.shape[3:])
        if state is None:
            state = x.new_zeros(shape)
        elif tuple(state.shape) != shape:
            raise ValueError(f"state: expected {list(shape)} ({' + '.join(self.state_names)}), got {list(state.shape)}")
        inputs = [value for value in given.values() if value is not None] + list(state.split(self.state_channels, 1))
        self.timesteps = len(x)
        maps = dict(zip(self.recorded, self.states(inputs, self.recorded), strict=True))
        states = [maps[_record(*state_source(self.kind, "cell", name))] for name in self.state_names]
        return maps["cell"], torch.cat(states, 2)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [N, in_channels, H, W]
        state: Tensor | None = None,  # [N, state channels, H, W]
        residual: Tensor | None = None,  # [N, residual_channels, H, W]
        feedback: Tensor | None = None,  # [N, feedback_channels, H, W]
    ) -> tuple[Tensor, Tensor]:
        """One step: output [N, channels, H, W] and new state; without a state, from zeros."""
        refuse_tracers(type(self).__name__, (x, state, residual, feedback))
        step = [None if value is None else value[None] for value in (x, residual, feedback)]
        assert step[0] is not None
        outputs, states = self.sequence(step[0], state, step[1], step[2])
        return outputs[0], states[0]


def _record(area: str, state: str | None) -> str:
    return area if state is None else f"{area}:{state}"
