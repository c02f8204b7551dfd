"""Convolutional recurrent cells as layers: one step, or a whole sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.spec.network import Input, Network
from rnndyn_fast.nn.cell_graphs import KINDS, RECIPROCAL, add_cell, cell_states, resolved, state_source
from rnndyn_fast.nn.graph_builder import CellSpec, Graph, Source
from rnndyn_fast.nn.published_cells import published_cell
from rnndyn_fast.nn.reciprocal_options import kernel_size, reciprocal_options
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork
from rnndyn_fast.nn.tracing import refuse_tracers
from rnndyn_fast.suggestions import check_choice


def _frames(name: str, channels: int, size: tuple[int, int]) -> Input:
    return Input(name, channels, *size, frames=True)


class ConvCell(RecurrentNetwork):
    r"""A published cell (equations: :mod:`rnndyn_fast.ops.cells`), with TensorFlow's SAME padding.

    Args:
        kind: "timedecay", "simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", or the reciprocal gated cell "rgc" (its published forms:
            "rgc_shallow", "rgc_median").
        in_channels, channels: of the input x and of the output (timedecay, intersectionrnn, and rgc without input_to_out: equal).
        map_size: height and width of all maps.
        residual_channels: rgc: of the layer's own input, or 0.
        feedback_channels: rgc: of the feedback, or 0.
        published: as published, kernels may be larger than the map, and an input may have no effect; else both are errors.
        options: of the cell: kernel_size, forget_bias (gru, lstm, ugrnn, intersectionrnn), layer_norm (not of ugrnn), peepholes (lstm),
            activation (simplernn, gru, lstm); of rgc all of :class:`~rnndyn_fast.nn.reciprocal_options.ReciprocalOptions`.
        backend, engine: see :func:`rnndyn_fast.rollout`.

    States are concatenated along channels as published: LSTM [c, h], reciprocal gated [c, o] (without a cell memory: o), else [h].

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
        published: bool = False,
        backend: str | None = None,
        engine: str = "auto",
        **options: Any,
    ) -> None:
        check_choice("kind", kind, list(KINDS))
        size = (map_size[0], map_size[1])
        if not published:
            _check_kernels(options, size)
            _check_read(options, residual_channels, feedback_channels)
        cell, options = resolved(kind, options)
        extra = {"residual": residual_channels, "feedback": feedback_channels}
        for name, width in extra.items():
            if width and cell != RECIPROCAL:
                raise ValueError(f"{name}_channels: a {kind} cell reads no such input")
        graph, inputs = Graph(), [_frames("x", in_channels, size)]
        inputs += [_frames(name, width, size) for name, width in extra.items() if width]
        residual = Source("residual", residual_channels) if residual_channels else None
        feedback = (Source("feedback", feedback_channels),) if feedback_channels else ()
        self.state_names = cell_states(cell, options)
        self.kind, other = cell, channels
        if cell == RECIPROCAL:
            given = reciprocal_options(options)
            self.kind, other = f"{RECIPROCAL}_{given.form}", given.cell_channels or channels
        self.state_channels = [other if state == "c" else channels for state in self.state_names]
        for state, width in zip(self.state_names, self.state_channels, strict=True):
            inputs.append(Input(f"initial_{state}", width, *size))
        initial = {state: f"initial_{state}" for state in self.state_names}
        if cell == "intersectionrnn":
            initial["z"] = "zero"
        spec = CellSpec("cell", Source("x", in_channels), channels, "", residual, feedback, initial)
        try:
            add_cell(graph, cell, spec, **options)
        except TypeError:
            raise ValueError(f"options: a {kind} cell does not take all of {sorted(options)}") from None
        read = {c.source for c in graph.connections}
        for name in () if published else ("residual", "feedback"):
            if extra[name] and name not in read:
                raise ValueError(f"{name}_channels: with these options nothing reads that input, expected 0, got {extra[name]}")
        network = Network(kind, tuple(inputs), tuple(graph.areas), tuple(graph.connections))
        self.recorded = tuple(
            dict.fromkeys(["cell", *(_record(*state_source(cell, "cell", state)) for state in self.state_names)])
        )  # fmt: skip
        super().__init__(network, 1, backend=backend, engine=engine)

    @classmethod
    def from_published(
        cls,
        config: Mapping[str, Any],
        in_channels: int,
        map_size: tuple[int, int],
        form: str = "shallow",
        residual_channels: int = 0,
        feedback_channels: int = 0,
        *,
        backend: str | None = None,
        engine: str = "auto",
    ) -> ConvCell:
        """A cell from the arguments of a published constructor, as they are: sizes may be floats or lists, functions their names.

        Args:
            config: by published name (``out_depth``, ``gate_filter_size``, ``tau_multiplier``, ``residual_to_out_gate``, ...); what is left
                out has the published default. What has no effect on the numbers in that form, as initial values and weight decay, is
                ignored.
            form: of the reciprocal gated cell, "shallow" or "median"; or another cell: "simplernn", "gru", "lstm", "ugrnn",
                "intersectionrnn".
            in_channels, map_size, residual_channels, feedback_channels, backend, engine: as of the class.

        Raises: ``ValueError`` naming the published argument: unknown (with the nearest), missing, of no meaning, or asking for what is
            not here (batch norm, dropout, the layer norm of the UGRNN, which fails in the published code too).

        >>> config = {"out_depth": 4, "filter_size": [3, 3], "layer_norm": False}
        >>> ConvCell.from_published(config, 5, (6, 6), form="simplernn").kind
        'simplernn'
        """
        kind, channels, options = published_cell(config, form, (map_size[0], map_size[1]))
        return cls(
            kind, in_channels, channels, map_size, residual_channels=residual_channels, feedback_channels=feedback_channels,
            published=True, backend=backend, engine=engine, **options,
        )  # fmt: skip

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


def _check_read(options: Mapping[str, Any], residual_channels: int, feedback_channels: int) -> None:
    """Options of an input that the caller names want that input."""
    for name, value in options.items():
        if "residual" in name and value is True and not residual_channels:
            raise ValueError(f"{name}: there is no residual input to read, expected residual_channels too, got {residual_channels}")
        if name.startswith("feedback_") and not feedback_channels:
            raise ValueError(f"{name}: there is no feedback to read, expected feedback_channels too, got {feedback_channels}")


def _check_kernels(options: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Kernels that the caller names are no larger than the map; those of presets are as published."""
    for name, value in options.items():
        if name.endswith("kernel_size") and value is not None:
            given = kernel_size(name, value, zero=name == "gate_kernel_size")
            height, width = (given, given) if isinstance(given, int) else given or (0, 0)
            if height > size[0] or width > size[1]:
                raise ValueError(
                    f"{name}: expected at most the size of the map, {size[0]} x {size[1]}, got {height} x {width} "
                    "(published=True takes larger ones, and keeps or cuts them as the published code does)"
                )
