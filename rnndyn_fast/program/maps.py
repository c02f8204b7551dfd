"""Maps of a rollout while it is lowered: of inputs and areas, their pooled and resized forms, and where windows of time steps lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.schedule import Drive, Schedule
from rnndyn_fast.graph.spec.network import Connection, Pool
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Role, View
from rnndyn_fast.reference.rollout import pooled

WINDOW_BYTES = 4 << 20  # of a window's maps: several time steps, so that a call over them is worth its start, and few of many

FEW_STEPS = 4  # of a rollout

LARGE_FORM = 4 << 20  # bytes of a pooled map, from which on backward makes it again from the sum before the norm

Key = tuple[Any, ...] | None  # of a map or a term, and of its gradient


def map_key(node: str, slot: int, state: str | None) -> Key:
    """Of a map of a node."""
    return "map", node, slot, state


def term_key(drive: int, position: int) -> Key:
    """Of a term."""
    return "term", drive, position


@dataclass(frozen=True)
class Setting:
    """What a program depends on besides the schedule.

    wanted: names of the inputs and parameters whose gradients are; none: there is no backward pass. training: batch norms use the batch.
    """

    samples: int
    dtype: torch.dtype
    device: torch.device
    on_device: bool
    engine: str
    wanted: frozenset[str]
    training: bool


@dataclass(frozen=True)
class Remade:
    """A map that is not kept: backward makes it again. Its key."""

    key: Key


class SlotBlock:
    """Maps of neighbouring slots, [slots, N, H, W, C], from a slot on."""

    def __init__(self, maps: View, first: int = 0) -> None:
        self.first, self.maps = first, maps

    def of(self, slots: range) -> View:
        """[len(slots) * N, H, W, C]."""
        part = self.maps.rows(slots[0] - self.first, slots[-1] + 1 - self.first)
        return part.reshape(part.shape[0] * part.shape[1], *part.shape[2:])


@dataclass
class Remakers:
    """How backward makes states, and large pooled forms of them, again; a state is made once for all its readers, a form for each.

    ``late``: those that can be made at any time, as nothing that they are made from is overwritten on the way.
    """

    states: dict[Key, Callable[[View | None], View]] = field(default_factory=dict)
    forms: dict[Key, Callable[[], View]] = field(default_factory=dict)
    late: dict[Key, Callable[[View | None], View]] = field(default_factory=dict)

    def reading(self, key: Key, x: View) -> View | Remade:
        """What is kept of a map that backward reads."""
        return Remade(key) if key in self.states or key in self.forms or key in self.late else x


@dataclass(frozen=True)
class PoolStep:
    """A map was pooled by our own kernel."""

    shape: tuple[int, int, int, int]
    source: Key
    key: Key
    argmax: View | None


@dataclass(frozen=True, eq=False)
class TorchStep:
    """PyTorch computed a function of maps and parameters."""

    function: Callable[[list[Tensor], Mapping[str, Tensor]], Sequence[Tensor]]
    xs: list[View]
    sources: list[Key]
    parameters: dict[str, View]
    results: list[Key]
    inner: torch.dtype


@dataclass(frozen=True)
class ResizeStep:
    """A map was resized."""

    shape: tuple[int, ...]
    source: Key
    key: Key


class Maps:
    """Of one rollout."""

    def __init__(
        self, b: Builder, schedule: Schedule, inputs: Mapping[str, View], parameters: Mapping[str, View], setting: Setting
    ) -> None:
        self.b, self.schedule, self.network, self.setting = b, schedule, schedule.network, setting
        self.inputs, self.parameters = dict(inputs), dict(parameters)
        self.nodes = {node.name: node for node in self.network.inputs}
        self.samples, self.dtype, self.wanted = setting.samples, setting.dtype, setting.wanted
        self.sums_dtype = sums_dtype(setting.dtype)
        self.recording = bool(setting.wanted)  # what was done is noted, for the backward pass
        self.by_component = self.recording  # the order: one component after another, or time step by time step
        self.steps: list[Any] = []  # what was done
        self.maps: dict[Key, View] = {}
        self.forms: dict[Key, View] = {}  # of maps: pooled, resized
        self.form_keys: dict[tuple[int, int], Key] = {}  # of the gradients of forms that were read, by drive and slot
        self.remakers = Remakers()
        self.whole: dict[tuple[str, str], SlotBlock] = {}  # maps of all slots, by area and kind: those that are recorded
        self.blocks: dict[tuple[str, str], SlotBlock] = {}  # other maps: of the latest window
        self.recorded = {self.network.recorded(name)[0] for name in schedule.record}
        self.component_of = {name: number for number, component in enumerate(schedule.components) for name in component.areas}
        self.reaches = self._reaches()
        self._prepared: dict[str, View] = {}
        self._weights = {name for c in self.network.connections for name in c.weights}

    def record(self, step: Any) -> None:
        """Note what was done."""
        if self.recording:
            self.steps.append(step)

    # ---------------------------------------------------------------- parameters

    def parameter(self, name: str) -> View:
        """As the kernels take it: a weight in the maps' dtype, all others in that of sums."""
        if name not in self._prepared:
            view, dtype = self.parameters[name], self.dtype if name in self._weights else self.sums_dtype
            self._prepared[name] = view if view.dtype == dtype else self.b.converted(view, dtype, f"{name} as {dtype}")
        return self._prepared[name]

    def affine(self, name: str) -> View:
        """A parameter per channel, contiguous."""
        found = self.b.contiguous(self.parameter(name), name)
        self._prepared[name] = found
        return found

    def vendor_layout(self, weight: View, name: str) -> View:
        """A weight [O, I, K, K] as PyTorch's convolutions take it: channels last."""
        o, i, kh, kw = weight.shape
        strides = (i * kh * kw, 1, kw * i, i)
        if all(n == 1 or s == w for n, s, w in zip(weight.shape, weight.strides, strides, strict=True)):
            return weight
        out = self.b.new((o, kh, kw, i), weight.dtype, f"{name} channels last").permute(0, 3, 1, 2)
        self.b.emit("copy", x=weight, out=out)
        return out

    # ---------------------------------------------------------------- gradients

    def _reaches(self) -> set[str]:
        """Nodes through which some wanted gradient passes."""
        reaches = {name for name in self.inputs if name in self.wanted}
        for area in self.network.areas:
            own = (*self.network.norm_prefixes(area), area.cell_parameter)
            if any(name.startswith(f"{p}.") for p in own if p for name in self.wanted):
                reaches.add(area.name)
        for c in self.network.connections:
            if self.wanted.intersection((*c.weights, *c.biases)):
                reaches.add(c.target)
        before = -1
        while before < len(reaches):
            before = len(reaches)
            reaches |= {name for (name, _), terms in self.schedule.terms.items()
                        if any(self.schedule.drives[t.drive].source in reaches for t in terms)}  # fmt: skip
        return reaches

    # ---------------------------------------------------------------- maps

    def state(self, c: Connection, node: str) -> str | None:
        """Which map of a node a connection reads."""
        if node != c.source or node in self.inputs:
            return None
        area = self.network.area(node)
        return c.state if c.state is not None else area.states[0]

    def map(self, node: str, slot: int, state: str | None) -> View:
        """[N, H, W, C]."""
        key = map_key(node, slot, state)
        if key not in self.maps:
            self.maps[key] = self.shown(node, [slot])
        return self.maps[key]

    def shown(self, node: str, slots: Sequence[int]) -> View:
        """Maps of an input, [len(slots) * N, H, W, C]."""
        spec, x = self.nodes[node], self.inputs[node]
        n, c, h, w = x.shape[-4:]
        off = spec.off_at is not None
        if len(slots) == 1 and not (off and slots[0]):
            frame = x[slots[0]] if spec.frames else x
            maps = frame.permute(0, 2, 3, 1)
            return maps if maps.is_contiguous else self.b.channels_last(frame, self.b.new((n, h, w, c), x.dtype, node))
        out = self.b.new((len(slots), n, h, w, c), x.dtype, node)
        for k, slot in enumerate(slots):
            if off and slot:
                self.b.emit("fill", out=out[k], value=float(spec.off_value))
            else:
                self.b.channels_last(x[slot] if spec.frames else x, out[k])
        return out.reshape(len(slots) * n, h, w, c)

    def form(self, drive: Drive, slot: int) -> tuple[View, Key]:
        """The map that a drive's linear map reads, and the key of its gradient."""
        c, state = drive.connection, self.state(drive.connection, drive.source)
        key = map_key(drive.source, slot, state)
        if c.pool is not Pool.NONE:
            x, key = self._pooled(drive.source, slot, state, c.pool)
        else:
            x = self.map(drive.source, slot, state)
        if c.resize and x.shape[1:3] != self.network.read_size(c):
            x, key = self._resized(x, key, self.network.read_size(c))
        self.form_keys[drive.index, slot] = key
        return x, key

    def _pooled(self, node: str, slot: int, state: str | None, pool: Pool) -> tuple[View, Key]:
        source = map_key(node, slot, state)
        key = ("pooled", pool, source)
        if key in self.forms:
            return self.forms[key], key
        x = self.map(node, slot, state)
        n, h, w, c = x.shape
        if pool is Pool.MAX_SAME and (h % 2 or w % 2):
            shape = (n, -(-h // 2), -(-w // 2), c)
            (y,) = self.by_torch(lambda xs, _: [pooled(xs[0].permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1)], [(source, x)], [(key, shape)])
            self.forms[key] = y
            return y, key
        mean = pool is Pool.MEAN
        y = self.b.new((n, 1, 1, c) if mean else (n, h // 2, w // 2, c), x.dtype, f"{node} pooled")
        argmax = self.b.new(y.shape, torch.uint8, f"{node} argmax") if self.recording and not mean else None
        self.b.emit("area_step", drives=[x], max_pooled=None if mean else y, argmax=argmax, mean_pooled=y if mean else None)
        self.record(PoolStep((n, h, w, c), source, key, argmax))
        readers = sum(d.source == node and d.connection.pool is pool and slot in d.slots for d in self.schedule.drives)
        make = self.remakers.states.get(source)
        if self.recording and y.nbytes >= LARGE_FORM and readers == 1 and make is not None:

            def again() -> View:
                x = make(self.b.new((n, h, w, c), self.dtype, f"{node} again"))
                y = self.b.new((n, 1, 1, c) if mean else (n, h // 2, w // 2, c), x.dtype, f"{node} pooled again")
                self.b.emit("area_step", drives=[x], max_pooled=None if mean else y, mean_pooled=y if mean else None)
                return y

            self.remakers.forms[key] = again
        self.forms[key] = y
        return y, key

    def _resized(self, x: View, source: Key, size: tuple[int, int]) -> tuple[View, Key]:
        key = ("resized", size, source)
        if key not in self.forms:
            out = self.b.new((x.shape[0], *size, x.shape[3]), x.dtype, "resized")
            self.b.emit("resize", x=x, out=out)
            self.record(ResizeStep(x.shape, source, key))
            self.forms[key] = out
        return self.forms[key], key

    def by_torch(
        self,
        function: Callable[[list[Tensor], Mapping[str, Tensor]], Sequence[Tensor]],
        sources: Sequence[tuple[Key, View]],
        results: Sequence[tuple[Key, tuple[int, ...]]],
        prefixes: Sequence[str] = (),
        *,
        exact: bool = False,
        more: Sequence[View] = (),
    ) -> list[View]:
        """Values of a function of maps and parameters, both [N, H, W, C], whose gradient PyTorch takes.

        Args:
            sources: keys and values of its arguments.
            results: keys and shapes of its values.
            prefixes: of the names of the parameters that it uses.
            exact: computed in float32 at least, whatever the maps are.
            more: where further values go, which have no gradient.
        """
        inner = self.sums_dtype if exact else self.dtype
        used = {name: self.parameter(name) for name in self.parameters if any(name.startswith(p) for p in prefixes)}
        outs = [self.b.new(shape, self.dtype, getattr(function, "__name__", "value")) for _, shape in results]
        xs = [x for _, x in sources]
        self.b.emit("by_torch", function=function, xs=xs, parameters=used, outs=[*outs, *more], inner=inner)
        self.record(TorchStep(function, xs, [key for key, _ in sources], used, [key for key, _ in results], inner))
        return outs

    # ---------------------------------------------------------------- windows

    def window(self, name: str) -> int:
        """Slots of an area in a window: as many as fit, in windows of nearly equal size, of which the first may be shorter. Of few time
        steps windows would be most, so the areas of a component share the room of one then."""
        channels, height, width = self.network.shapes[name]
        slots, number = self.schedule.num_slots[name], self.component_of.get(name)
        beside = 1 if number is None or slots > FEW_STEPS else len(self.schedule.components[number].areas)
        each = self.samples * height * width * channels * self.dtype.itemsize
        fit = max(1, WINDOW_BYTES // (beside * each))
        return -(-slots // -(-slots // fit))

    def windows(self, name: str) -> list[range]:
        """All windows of an area."""
        slots, size = self.schedule.num_slots[name], self.window(name)
        return [range(max(0, stop - size), stop) for stop in range(slots, 0, -size)][::-1]

    def window_end(self, index: int, position: int) -> int:
        """The position after the last one of a drive's window."""
        count, size = len(self.schedule.drives[index].slots), self.window(self.schedule.drives[index].connection.target)
        return count - (count - 1 - position) // size * size

    def room(self, name: str, slots: range, kind: str, channels: int) -> View:
        """Where a kind of map of an area's slots goes: where a component runs as a whole, next to that of the other slots of its window."""
        _, height, width = self.network.shapes[name]
        shape = (self.samples, height, width, channels)
        if (name, kind) in self.whole:
            return self.whole[name, kind].of(slots)
        if not self.by_component:
            return self.b.new(shape, self.dtype, f"{name} {kind}")
        size, last = self.window(name), self.schedule.num_slots[name]
        stop = last - (last - 1 - slots[0]) // size * size
        first = max(0, stop - size)
        if (name, kind) not in self.blocks or self.blocks[name, kind].first != first:
            self.blocks[name, kind] = SlotBlock(self.b.new((stop - first, *shape), self.dtype, f"{name} {kind}"), first)
        return self.blocks[name, kind].of(slots)

    def drop_blocks(self, areas: Sequence[str]) -> None:
        """Areas that are done begin new windows."""
        self.blocks = {key: block for key, block in self.blocks.items() if key[0] not in areas}


def result_value(b: Builder, name: str, shape: Sequence[int], dtype: torch.dtype) -> View:
    """A new tensor that the caller gets."""
    return b.external(Role.RESULT, name, tuple(shape), dtype, source=("result", name))
