"""Areas that ``area_step`` computes: additive or multiplicative, with LayerNorm or none, relu or none, and their pooled maps.

The convolution that comes last gets an epilogue: the area's other terms, the interaction and the statistics of LayerNorm are done as its
results leave it, and what remains for ``area_step`` is norm, activation and pooling, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rnndyn_fast.graph.spec.network import Activation, Area, Interaction, Norm, Operator, Pool
from rnndyn_fast.ops import core
from rnndyn_fast.ops.core import MAX_TERMS
from rnndyn_fast.ops.device_kernels import kernels_of
from rnndyn_fast.ops.engines import MAX_SUMMED, can_end, can_sum, kernels_of_sum
from rnndyn_fast.ops.fused_conv import MAX_ADDED
from rnndyn_fast.ops.fused_conv import MAX_TERMS as MAX_FUSED
from rnndyn_fast.ops.winograd_conv import WinogradMap
from rnndyn_fast.program.ir import View
from rnndyn_fast.program.linear import Dense, convolve_sum
from rnndyn_fast.program.maps import Key, map_key

if TYPE_CHECKING:
    from rnndyn_fast.program.areas import AreaRules, Port, Slots

_POOLED = {Pool.MAX: "max_pooled", Pool.MAX_SAME: "max_pooled", Pool.MEAN: "mean_pooled"}


@dataclass(frozen=True, eq=False)
class Pending:
    """A term that is still to be computed: a linear map of what it reads."""

    linear: Dense
    x: View  # [M, H, W, C]


Term = View | Pending


@dataclass(frozen=True, eq=False)
class AreaStep:
    """An area was computed. ``value``: before the norm (or the state, which tells the sign as well without one), or None: made again from
    ``drives`` and ``modulator_sum``."""

    at: Slots
    drive: Port
    modulator: Port
    shape: tuple[int, int, int, int]
    value: View | None
    drives: list[View]
    drive_bias: View | None
    modulator_sum: View | None
    mean: View | None
    rstd: View | None
    gamma: View | None
    beta: View | None
    argmax: View | None


def pools_to(pool: Pool, height: int, width: int) -> bool:
    """Whether the kernel pools so."""
    return pool in (Pool.MAX, Pool.MEAN) or (pool is Pool.MAX_SAME and height % 2 == 0 and width % 2 == 0)


class AreaSteps:
    """Emits them, of one rollout."""

    def __init__(self, rules: AreaRules) -> None:
        self.rules, self.maps, self.b = rules, rules.maps, rules.b
        self.schedule, self.network = rules.maps.schedule, rules.maps.network
        self._affine: dict[str, View] = {}
        self._forms: dict[tuple[str, int], list[Pool]] = {}
        for d in self.schedule.drives:
            for slot in d.slots:
                pools = self._forms.setdefault((d.source, slot), [])
                if d.connection.pool not in pools:
                    pools.append(d.connection.pool)

    def takes(self, area: Area) -> bool:
        """Whether ``area_step`` computes an area."""
        known = (
            area.cell is None
            and area.interaction in (Interaction.ADDITIVE, Interaction.MULTIPLICATIVE)
            and area.norm in (Norm.NONE, Norm.LAYER)
            and area.drive_activation is Activation.IDENTITY
            and area.activation in (Activation.IDENTITY, Activation.RELU)
        )
        if not known or area.norm is Norm.LAYER or area.interaction is Interaction.MULTIPLICATIVE:
            return known
        pools = {p for (name, _), some in self._forms.items() if name == area.name for p in some}
        _, height, width = self.network.shapes[area.name]
        return area.activation is Activation.RELU and any(pools_to(p, height, width) for p in pools)

    def waits(self, area: Area, port: str) -> bool:
        """Whether convolutions into a port wait for the area's step. (Backward wants the drives of a product by themselves.)"""
        return not (self.maps.recording and area.interaction is Interaction.MULTIPLICATIVE and port == "drive")

    def affine(self, area: Area, kind: str) -> View | None:
        """gamma or beta, [H, W, C]."""
        if area.norm is not Norm.LAYER:
            return None
        name = f"{area.norm_parameter}.{kind}"
        if name not in self._affine:
            channels, height, width = self.network.shapes[area.name]
            given = self.b.contiguous(self.maps.parameter(name), name).reshape(1, channels, height, width)
            out = self.b.new((1, height, width, channels), self.maps.sums_dtype, f"{name} channels last")
            self._affine[name] = self.b.channels_last(given, out)[0]
        return self._affine[name]

    # ---------------------------------------------------------------- one step

    def update(self, at: Slots, drive: Port, modulator: Port) -> dict[str | None, View]:
        """The state of an area, if anybody reads it, and its pooled forms."""
        area, maps, b = at.area, self.maps, self.b
        channels, height, width = self.network.shapes[area.name]
        shape = (len(at.indices) * maps.samples, height, width, channels)
        normed, keeps = area.norm is Norm.LAYER, maps.recording
        multiplicative = area.interaction is Interaction.MULTIPLICATIVE and bool(modulator.values or modulator.biases)
        gamma, beta = self.affine(area, "weight"), self.affine(area, "bias")
        mean = b.new(shape[:1], maps.sums_dtype, f"{area.name} mean") if normed else None
        rstd = b.new(shape[:1], maps.sums_dtype, f"{area.name} rstd") if normed else None
        pools = [p for p in self._pools(at) if pools_to(p, height, width)]
        reads_state = any(p is Pool.NONE or p not in pools for p in self._pools(at)) or area.name in maps.recorded
        keeps_value = keeps and area.interaction is Interaction.ADDITIVE
        value, state = self._rooms(at, drive, shape, normed=normed, keeps_value=keeps_value, reads_state=reads_state)
        outputs: dict[str, View | None] = {"state": state, "argmax": None}
        for pool in pools:
            size = (shape[0], 1, 1, channels) if pool is Pool.MEAN else (shape[0], height // 2, width // 2, channels)
            if outputs.get(_POOLED[pool]) is None:
                outputs[_POOLED[pool]] = b.new(size, maps.dtype, f"{area.name} {pool.value}-pooled")
            if pool is not Pool.MEAN and keeps:
                outputs["argmax"] = outputs["argmax"] or b.new(size, torch.uint8, f"{area.name} argmax")
        total = b.new(shape, maps.dtype, f"{area.name} modulator") if keeps and multiplicative else None
        drives = list(drive.values)
        biases = self.rules.bias(drive), self.rules.bias(modulator)
        self._emit(at, drives, list(modulator.values), *biases, value, mean, rstd, total, outputs)
        self._note_forms(at, pools, outputs)
        if keeps:
            kept = value if keeps_value and value is not None else state if not normed else None
            multiplied = [v for v in drives if isinstance(v, View)] if area.interaction is Interaction.MULTIPLICATIVE else []
            step = AreaStep(
                at, drive, modulator, shape, kept, multiplied, biases[0] if multiplied else None, total, mean, rstd, gamma, beta,
                outputs["argmax"],
            )  # fmt: skip
            maps.record(step)
            self._note_remakers(step)
        return {} if state is None else {None: state}

    def _pools(self, at: Slots) -> list[Pool]:
        found = dict.fromkeys(p for slot in at.indices for p in self._forms.get((at.area.name, slot), ()))
        return list(found)

    def _rooms(
        self, at: Slots, drive: Port, shape: tuple[int, ...], *, normed: bool, keeps_value: bool, reads_state: bool
    ) -> tuple[View | None, View | None]:
        """Where the value before the norm goes, if anywhere, and the state, if anybody reads it."""
        area, maps, first = at.area, self.maps, drive.values[0] if drive.values else None
        own_state = reads_state and (area.name, "state None") in maps.whole
        private = isinstance(first, View) and drive.private
        value: View | None = None
        if normed or (keeps_value and not reads_state and area.activation is Activation.RELU):
            if private and isinstance(first, View) and (keeps_value or not maps.recording):
                value = first
            elif keeps_value:
                value = self.rules.room(at, "value", shape[3])
            else:
                value = self.b.new(shape, maps.dtype, f"{area.name} value")
        if not reads_state:
            return value, None
        # In inference in the place of the value, whose lines are at hand: a map of its own would be read before it is written.
        if not maps.recording and value is not None and not own_state and not self.b.on_device:
            return value, value
        return value, self.rules.room(at, "state None", shape[3])

    def _note_forms(self, at: Slots, pools: Sequence[Pool], outputs: dict[str, View | None]) -> None:
        for pool in pools:
            view = outputs[_POOLED[pool]]
            assert view is not None
            for slot, part in zip(at.indices, view.parts(len(at.indices)), strict=True):
                self.maps.forms[pooled_key(at, slot, pool)] = part

    # ---------------------------------------------------------------- terms and epilogue

    def _emit(
        self, at: Slots, drives: list[Any], modulators: list[Any], drive_bias: View | None, modulator_bias: View | None, value: View | None,
        mean: View | None, rstd: View | None, modulator_sum: View | None, outputs: dict[str, View | None],
    ) -> None:  # fmt: skip
        area, b = at.area, self.b
        gamma = self.affine(area, "weight")
        norm = dict(gamma=gamma, beta=self.affine(area, "bias"), eps=area.eps, rectify=area.activation is Activation.RELU)
        fused = _fused(modulators or drives)
        if fused:
            terms = dict(drives=_without(drives, fused), modulators=_without(modulators, fused))
            biases = dict(drive_bias=drive_bias, modulator_bias=modulator_bias)
            self._fused_step(fused, bool(modulators), terms, biases, norm, value, mean, rstd, modulator_sum, outputs)
            return
        driving, driving_sums = _split(drives)
        modulating, modulating_sums = _split(modulators)
        in_place = value is not None and bool(driving) and driving[0].same_place(value)
        last, modulates = None, bool(modulating_sums)
        if gamma is not None and not (in_place and modulates):
            last = _take_last(modulating_sums if modulates else driving_sums)
        driving += [_computed(g) for g in driving_sums]
        modulating += [_computed(g) for g in modulating_sums]
        if last is None:
            b.emit(
                "area_step", drives=b.at_most(driving, MAX_TERMS), modulators=b.at_most(modulating, MAX_TERMS), drive_bias=drive_bias,
                modulator_bias=modulator_bias, value=value, modulator_sum=modulator_sum, mean=mean, rstd=rstd, **norm, **outputs,
            )  # fmt: skip
            return
        assert value is not None
        packed = [t.linear.packed(backward=False) for t in last]
        b.emit(
            "conv", xs=[t.x for t in last], packed=[views for views, _ in packed], out=value, forms=[form for _, form in packed],
            accumulate=in_place, ends=True, drives=b.at_most(driving[in_place:], MAX_TERMS), modulators=b.at_most(modulating, MAX_TERMS),
            modulates=modulates, drive_bias=drive_bias, modulator_bias=modulator_bias, modulator_sum=modulator_sum, mean=mean, rstd=rstd,
            eps=area.eps,
        )  # fmt: skip
        b.emit("area_step", drives=[value], complete=True, value=value, mean=mean, rstd=rstd, **norm, **outputs)

    def _fused_step(
        self, fused: list[Pending], modulates: bool, terms: dict[str, list[View]], biases: dict[str, View | None], norm: dict[str, Any],
        value: View | None, mean: View | None, rstd: View | None, modulator_sum: View | None, outputs: dict[str, View | None],
    ) -> None:  # fmt: skip
        """On a GPU: the fused convolution does what is left of the terms and the interaction in one launch, where it can."""
        b, drives, modulators = self.b, terms["drives"], terms["modulators"]
        shape = fused[0].linear.output_shape(fused[0].x.shape)
        settings = [(t.linear.geometry.stride, t.linear.geometry.padding, t.linear.transposed) for t in fused]
        weights = [t.linear.fused(columns_first=t.linear.transposed) for t in fused]
        engine = kernels_of_sum([t.linear for t in fused])
        conv = dict(xs=[t.x for t in fused], weights=weights, settings=settings, engine=engine)
        if modulates and (len(drives) != 1 or biases["drive_bias"] is not None):
            total = b.new(shape, self.maps.dtype, "modulator")
            b.emit("fused_conv", **conv, added=b.at_most(modulators, MAX_ADDED), out=total)
            b.emit(
                "area_step", drives=b.at_most(drives, MAX_TERMS), modulators=[total], **biases, value=value, modulator_sum=modulator_sum,
                mean=mean, rstd=rstd, **norm, **outputs,
            )  # fmt: skip
            return
        if value is None:
            value = b.new(shape, self.maps.dtype, "value")
        groups = kernels_of(engine).recurrent_conv_moment_groups(*shape) if norm["gamma"] is not None else None
        moments = b.new((shape[0], groups[0], 2), self.maps.sums_dtype, "moments") if groups is not None else None
        b.emit(
            "fused_conv", **conv, bias=biases["modulator_bias"] if modulates else biases["drive_bias"],
            added=b.at_most(modulators if modulates else drives, MAX_ADDED), factor=drives[0] if modulates else None, out=value,
            modulator_sum=modulator_sum, moments=moments,
        )  # fmt: skip
        if moments is None:  # no norm: the value is complete, and what is wanted of it may be nothing
            if any(view is not None for view in outputs.values()):
                b.emit("area_step", drives=[value], rectify=norm["rectify"], **outputs)
            return
        b.emit("finish_area_step", value=value, mean=mean, rstd=rstd, moments=moments, groups=groups, **norm, **outputs)

    # ---------------------------------------------------------------- what backward makes again

    def _note_remakers(self, step: AreaStep) -> None:
        """States that only their own component reads, and maxima, are made again from what is kept anyway."""
        at, area = step.at, step.at.area
        if area.norm is not Norm.LAYER or len(at.indices) != 1:
            return
        slot, remakers = at.indices[0], self.maps.remakers
        if self._remakes_state(area):
            remakers.late[map_key(area.name, slot, None)] = partial(self._again, step, Pool.NONE)
        for pool in self._pools(at):
            if pools_to(pool, *step.shape[1:3]) and pool in (Pool.MAX, Pool.MAX_SAME):
                remakers.late[pooled_key(at, slot, pool)] = partial(self._again, step, pool)

    def _remakes_state(self, area: Area) -> bool:
        component = self.schedule.components[self.maps.component_of[area.name]]
        readers = [d for d in self.schedule.drives if d.source == area.name and d.connection.pool is Pool.NONE]
        inside = all(
            d.connection.operator is not Operator.IDENTITY and all(n in component.areas for n in self._targets(d.index)) for d in readers
        )
        return component.recurrent and inside and area.name not in self.maps.recorded

    def _targets(self, drive: int) -> set[str]:
        return {name for (name, _), terms in self.schedule.terms.items() for t in terms if t.drive == drive}

    def _again(self, step: AreaStep, pool: Pool, out: View | None) -> View:
        """A form of an area's map once more, in ``out`` or a new value."""
        b, area, (n, h, w, c) = self.b, step.at.area, step.shape
        size = step.shape if pool is Pool.NONE else (n, h // 2, w // 2, c)
        if out is None:
            out = b.new(size, self.maps.dtype, f"{area.name} again")
        form = {"state" if pool is Pool.NONE else "max_pooled": out}
        mean, rstd = step.mean, step.rstd
        assert mean is not None
        common = dict(gamma=step.gamma, beta=step.beta, eps=area.eps, rectify=area.activation is Activation.RELU)
        if step.value is not None:
            b.emit("area_step", drives=[step.value], complete=True, value=step.value, mean=mean, rstd=rstd, **common, **form)
            return out
        modulators = [] if step.modulator_sum is None else [step.modulator_sum]
        terms = dict(drives=b.at_most(step.drives, MAX_TERMS), modulators=modulators, drive_bias=step.drive_bias, modulator_complete=True)
        if self.b.on_device:  # (whose kernel takes the statistics again, on its way to the state)
            value = b.new(step.shape, self.maps.dtype, f"{area.name} value again")
            mean, rstd = (b.new(mean.shape, mean.dtype, f"{area.name} statistics again") for _ in range(2))
            b.emit("area_step", **terms, value=value, mean=mean, rstd=rstd, **common, **form)
        else:
            b.emit("area_step", **terms, complete=True, mean=mean, rstd=rstd, **common, **form)
        return out


def pooled_key(at: Slots, slot: int, pool: Pool) -> Key:
    """Of a pooled form of an area's map."""
    return "pooled", pool, map_key(at.area.name, slot, None)


def partial_size(shape: Sequence[int]) -> tuple[int, int, int]:
    """Of the scratch of ``area_step_backward``, float64, with a norm."""
    n, h, w, c = shape
    return n, core.num_chunks(h, w, c), 2


def _sums(terms: Sequence[Pending]) -> list[list[Pending]]:
    """The terms in groups that one call sums."""
    groups: list[list[Pending]] = []
    for term in terms:
        group = next((g for g in groups if len(g) < MAX_SUMMED and can_sum([t.linear for t in (*g, term)])), None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    return groups


def _computed(group: Sequence[Pending]) -> View:
    return convolve_sum([t.linear for t in group], [t.x for t in group])


def _split(terms: Sequence[Term]) -> tuple[list[View], list[list[Pending]]]:
    return [t for t in terms if isinstance(t, View)], _sums([t for t in terms if isinstance(t, Pending)])


def _take_last(groups: list[list[Pending]]) -> list[Pending] | None:
    """Of the groups, the one that an epilogue should end; the Winograd domain, where results are written once, rather than added to."""
    ending = [g for g in groups if all(can_end(t.linear) for t in g)]
    if not ending:
        return None
    last = max(ending, key=lambda g: (isinstance(g[0].linear.choice.map, WinogradMap), len(g)))
    groups.remove(last)
    return last


def _fused(values: Sequence[Term]) -> list[Pending]:
    """The terms that one launch of a GPU's fused convolution computes and sums."""
    pending = [v for v in values if isinstance(v, Pending)]
    return [v for v in pending if v.linear.choice.kernels("forward")][:MAX_FUSED]


def _without(values: Sequence[Term], fused: Sequence[Pending]) -> list[View]:
    """The other terms, computed."""
    others = [v for v in values if not any(v is f for f in fused)]
    return [v if isinstance(v, View) else _computed([v]) for v in others]
