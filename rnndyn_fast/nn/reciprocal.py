"""The reciprocal gated cell as areas and connections: both published forms, with all options (:class:`ReciprocalOptions`).

Source: Nayebi et al., Neural Computation 34 (2022). The update of each half is the cell
:class:`~rnndyn_fast.ops.cells.ReciprocalGated`. Parameters are named after the published checkpoints' variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rnndyn_fast.graph.spec.network import Activation, Area, Norm, Role
from rnndyn_fast.nn.graph_builder import LN_EPS, CellSpec, Graph, Source, bypass
from rnndyn_fast.nn.reciprocal_options import KernelSize, ReciprocalOptions, reciprocal_options
from rnndyn_fast.ops.cells import Gain, ReciprocalGated


def reciprocal_gated(graph: Graph, spec: CellSpec, **options: Any) -> None:
    """Add a reciprocal gated cell; options by the names of :class:`ReciprocalOptions`."""
    _Cell(graph, spec, reciprocal_options(options)).build()


class _Cell:
    """One cell under construction. Names of convolutions: of the dense one, and of the separable one where that is another."""

    def __init__(self, graph: Graph, spec: CellSpec, options: ReciprocalOptions) -> None:
        self.graph, self.spec, self.o = graph, spec, options
        self.median = options.form == "median"
        cell_channels = options.cell_channels if options.cell_channels is not None else spec.channels
        self.c = Source(f"{spec.name}.c", cell_channels, 1) if options.has_cell else None
        self.out = Source(spec.name, spec.channels, 1)

    def build(self) -> None:
        o, residual = self.o, self.spec.residual
        if o.cell_residual and residual is None:
            raise ValueError("cell_residual: it reads the layer's own input, expected residual_channels > 0")
        x = self._input()
        if not o.input_to_out and x.channels != self.spec.channels:
            raise ValueError(
                f"input_to_out: without it x is the drive of the output and needs its channels, got {x.channels} and {self.spec.channels}"
            )
        if self.c is not None:
            self._cell_half(x, self.c)
        self._out_half(x)

    # ---------------------------------------------------------------- words

    def _conv(
        self, source: Source, target: str, size: KernelSize, names: str | tuple[str, str], *, role: Role = Role.LATERAL,
        port: str | None = None, separable: bool = False, bias: bool | None = None, cut: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """One convolution; ``bias`` and ``cut`` None: as the form has them."""
        dense, depthwise = (names, names) if isinstance(names, str) else names
        name = f"{self.spec.parameter}.{depthwise if separable else dense}"
        if separable:
            if self.o.separable_repeat:
                source = self._repeated(source, target, size, name, options)
            options |= {"groups": source.channels, "middle_channels": source.channels}
        has_bias = (separable or self.median) if bias is None else bias
        cut_kernel = (separable or not self.median) if cut is None else cut
        self.graph.conv(source, target, role, size, name, port=port, bias=has_bias, cut_kernel=cut_kernel, **options)

    def _repeated(self, source: Source, target: str, size: KernelSize, name: str, options: dict[str, Any]) -> Source:
        """elu of a depthwise convolution."""
        area = f"{target}.{name.rsplit('.', 1)[-1]}.{source.name}"
        like = target if options.pop("resize", False) else None
        self._before(target, Area(area, source.channels, norm=Norm.NONE, activation=Activation.ELU, like=like))
        self.graph.conv(
            source, area, Role.BOTTOM_UP, size, f"{name}_depthwise_0", groups=source.channels, cut_kernel=True, resize=like is not None
        )
        return Source(area, source.channels, 0)

    def _feedback(self, entry: str, target: str, channels: int) -> None:
        """The feedback, where it enters here: straight into the target's drive, or through its activation."""
        o, sources = self.o, self.spec.feedback
        if not sources or o.feedback_entry != entry:
            return
        with_itself = entry == "cell" and not self.median
        if with_itself and [f.channels for f in sources] != [channels]:
            raise ValueError(
                f"feedback_entry: the shallow form adds the feedback into the cell to its convolution, expected feedback_channels = "
                f"{channels} (one source), got {[f.channels for f in sources]}"
            )
        where, role = target, Role.TOP_DOWN
        if o.feedback_activation is not Activation.IDENTITY:
            where, role = f"{self.spec.name}.feedback", Role.BOTTOM_UP
            self._before(target, Area(where, channels, norm=Norm.NONE, activation=o.feedback_activation, like=target))
            self.graph.identity(Source(where, channels, 0), target, Role.TOP_DOWN)
        if with_itself:
            self.graph.identity(sources[0], where, role, resize=True)
        self._feedback_convolutions(sources, entry, where, role)

    def _feedback_convolutions(self, sources: Sequence[Source], entry: str, where: str, role: Role) -> None:
        o, total = self.o, sum(f.channels for f in sources)
        dense = f"{entry}.feedback_to_{entry}" if self.median else f"{entry}.feedback"
        first = 0
        for source in sources:
            # Of several sources a dense kernel is one, over all channels; a separable one falls into one for each.
            separable = f"{entry}.feedback" if len(sources) == 1 else f"{entry}.feedback.{source.name}"
            options: dict[str, Any] = {"resize": True, "bias": None if first == 0 else False}
            if not o.feedback_separable:
                options["concat"] = (first, total)
            self._conv(
                source, where, o.feedback_kernel_size, (dense, separable), role=role, separable=o.feedback_separable, **options
            )  # fmt: skip
            first += source.channels

    def _before(self, target: str, area: Area) -> None:
        self.graph.areas.insert([a.name for a in self.graph.areas].index(target), area)

    def _gains(self, gate_bias: float) -> tuple[Gain, Gain]:
        o = self.o
        tau = Gain(o.tau_offset, o.tau_multiplier, o.tau_nonlinearity, o.tau_bias)
        return tau, Gain(o.gate_offset, o.gate_multiplier, o.gate_nonlinearity, gate_bias) if o.gating else Gain(1.0, 0.0)

    def _half(self, half: Source, state: str, cell: ReciprocalGated, norm: str) -> str:
        """The areas of one half; the name of the one whose ports are to be filled."""
        activation, name = cell.activation, half.name
        before = self.spec.before(state)
        if not self.o.layer_norm:
            self.graph.areas.append(Area(name, half.channels, cell=cell, initial=before))
            self.graph.identity(half, name, Role.LATERAL, port="memory")
            return name
        summed = f"{name}.sum"
        self.graph.areas += [
            Area(summed, half.channels, cell=replace(cell, activation=Activation.IDENTITY)),
            Area(name, half.channels, norm=Norm.GROUP, activation=activation, norm_parameter=f"{self.spec.parameter}.{norm}", eps=LN_EPS,
                 initial=before[0]),
        ]  # fmt: skip
        self.graph.identity(half, summed, Role.LATERAL, port="memory")
        self.graph.identity(Source(summed, half.channels, 0), name, Role.BOTTOM_UP)
        return summed

    # ---------------------------------------------------------------- parts

    def _input(self) -> Source:
        """a: the input with its activation, and the feedback that enters there."""
        o, x = self.o, self.spec.x
        entered = bool(self.spec.feedback) and o.feedback_entry == "input"
        if o.input_activation is Activation.IDENTITY and not entered:
            return x
        area = f"{self.spec.name}.input"
        self.graph.areas.append(Area(area, x.channels, norm=Norm.NONE, activation=o.input_activation))
        self.graph.identity(x, area, Role.BOTTOM_UP)
        self._feedback("input", area, x.channels)
        return Source(area, x.channels, 0)

    def _cell_half(self, x: Source, c: Source) -> None:
        o, residual = self.o, self.spec.residual
        cell_tau = o.tau_kernel_size if o.cell_tau_kernel_size is None else o.cell_tau_kernel_size
        cell = ReciprocalGated(*self._gains(o.gate_bias), o.cell_activation)
        area = self._half(c, "c", cell, "cell.layer_norm" if self.median else "cell.cell_layer_norm")
        tau, gate = (("cell.cell_to_cell", "cell.tau"), "cell.out_to_cell") if self.median else ("cell.tau", "cell.gate")
        self._conv(c, area, cell_tau, tau, port="tau", separable=o.tau_separable)
        if o.gating:
            self._conv(self.out, area, o.gate_kernel_size, gate, port="gate", separable=o.gate_separable)
        drive: dict[str, Any] = {"role": Role.BOTTOM_UP, "separable": o.ff_separable}
        if o.cell_residual:
            assert residual is not None
            names = ("cell.residual_to_cell" if self.median else "cell.res_to_cell", "cell.res_to_cell")
            self._conv(residual, area, o.ff_kernel_size, names, **drive)
        if o.input_to_cell:
            self._conv(x, area, o.ff_kernel_size, "cell.input_to_cell", **drive)
        self._feedback("cell", area, c.channels)
        self._modulators(x, area, "cell", cell_tau)

    def _modulators(self, x: Source, area: str, half: str, tau: KernelSize) -> None:
        """What the median form may add to tau and gate of a half: dense, without biases."""
        o, residual = self.o, self.spec.residual
        for port, size in (("tau", tau), ("gate", o.gate_kernel_size)):
            if getattr(o, f"input_to_{port}"):
                self._conv(x, area, size, f"{half}.input_to_{half}_{port}", port=port, bias=False)
            if residual is not None and (half, port) != ("out", "gate") and getattr(o, f"residual_to_{half}_{port}"):
                self._conv(residual, area, size, f"{half}.residual_to_{half}_{port}", port=port, bias=False)

    def _out_half(self, x: Source) -> None:
        o, residual, out, c = self.o, self.spec.residual, self.out, self.c
        gated = c is not None and not o.cell_to_out
        dense_from_cell = c is not None and not o.gate_separable
        cell = ReciprocalGated(
            *self._gains(o.gate_bias if gated and dense_from_cell else 0.0),
            o.out_activation,
            drive_bias=o.gate_bias if o.cell_to_out and dense_from_cell else 0.0,
        )
        area = self._half(out, "o", cell, "out.layer_norm" if self.median else "out.out_layer_norm")
        self._conv(out, area, o.tau_kernel_size, ("out.out_to_out", "out.tau") if self.median else "out.tau", port="tau",
                   separable=o.tau_separable)  # fmt: skip
        if o.input_to_out:
            self._conv(x, area, o.in_out_kernel_size, "out.input_to_out", role=Role.BOTTOM_UP, separable=o.in_out_separable,
                       cut=o.in_out_separable)  # fmt: skip
        else:
            self.graph.identity(x, area, Role.BOTTOM_UP)
        if c is not None and (o.gating or o.cell_to_out):
            separable = "out.gate" if gated else "out.cell_to_out"
            names = ("out.cell_to_out", separable) if self.median else "out.gate"
            self._conv(c, area, o.gate_kernel_size, names, port="gate" if gated else "drive", separable=o.gate_separable)
        if residual is not None and o.out_residual:
            bypass(self.graph, residual, area, out.channels,
                   f"{self.spec.parameter}.out.{'' if self.median else 'res_add.'}residual_add")  # fmt: skip
        self._feedback("out", area, out.channels)
        self._modulators(x, area, "out", o.tau_kernel_size)
        if residual is not None and o.residual_to_out_gate:
            self._conv(residual, area, o.gate_kernel_size, "out.residual_to_out_gate", port="gate", separable=o.gate_separable,
                       bias=o.gate_separable and not self.median)  # fmt: skip
