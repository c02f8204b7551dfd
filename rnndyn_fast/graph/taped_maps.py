"""Maps of a rollout on a tape: of inputs and areas, their pooled and resized forms, and where windows of time steps lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph.area_rules import Rules
from rnndyn_fast.graph.operands import area_step_forward, empty_form, form_shape
from rnndyn_fast.graph.schedule import Drive, Schedule
from rnndyn_fast.graph.spec import Connection, Network, Pool
from rnndyn_fast.graph.tape import Key, Tape, map_key
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import empty, sums_dtype, tidy_buffers
from rnndyn_fast.ops.channels_last import channels_last
from rnndyn_fast.reference.rollout import Statistics, pooled

WINDOW_BYTES = 4 << 20  # of a window's maps: several time steps, so that a call over them is worth its start, and few of many

FEW_STEPS = 4  # of a rollout

LARGE_FORM = 4 << 20  # bytes of a pooled map, from which on backward makes it again from the sum before the norm


def prepared(network: Network, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters as the kernels take them: weights of the maps' dtype, all others of that of sums."""
    weights = {name for c in network.connections for name in c.weights}
    return {name: p.to(dtype if name in weights else sums_dtype(dtype)) for name, p in parameters.items()}


class Rooms:
    """Maps one after another, [slots, N, H, W, C], from a slot on."""

    def __init__(self, maps: Tensor, first: int = 0) -> None:
        self.first, self._maps, self._each = first, maps, maps.unbind()

    def of(self, slots: range) -> Tensor:
        """[len(slots) * N, H, W, C]."""
        if len(slots) == 1:
            return self._each[slots[0] - self.first]
        return self._maps[slots[0] - self.first : slots[-1] + 1 - self.first].flatten(0, 1)


class Maps:
    """Of one rollout. ``wanted``: names of the inputs and parameters whose gradients are; none: nothing is recorded."""

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        statistics: Statistics | None,
        wanted: set[str],
    ) -> None:
        self.schedule, self.network = schedule, schedule.network
        nodes = {node.name: node for node in self.network.inputs}
        self.inputs = {name: (nodes[name], x) for name, x in zip(nodes, inputs, strict=True)}
        self.example, self.given = inputs[0], parameters
        self.samples = inputs[0].shape[1 if self.network.inputs[0].frames else 0]
        self.tape = Tape(prepared(self.network, parameters, self.example.dtype), wanted, bool(wanted), self.example.dtype)
        self.by_component = bool(wanted)  # the order: one component after another, or time step by time step
        self.statistics = statistics
        self.rules = Rules(self.network, self.tape, statistics, self.example)
        self.maps: dict[Key, Tensor] = {}
        self.forms: dict[Key, Tensor] = {}  # of maps: pooled, resized
        self._form_keys: dict[tuple[int, int], Key] = {}  # of the gradients of forms that were read, by drive and slot
        self.whole: dict[tuple[str, str], Rooms] = {}  # maps of all slots, by area and kind: those that are recorded
        self.blocks: dict[tuple[str, str], Rooms] = {}  # other maps: of the latest window
        self._frames: dict[str, Sequence[Tensor]] = {}  # of inputs that have some
        self.map_uses = Counter((d.source, slot) for d in schedule.drives for slot in d.slots)
        self.whole_uses: Counter[tuple[str, int]] = Counter()  # of maps that are not read pooled
        self.recorded = {self.network.recorded(name)[0] for name in schedule.record}
        self.reaches = self._reaches()
        self.component_of = {name: number for number, component in enumerate(schedule.components) for name in component.areas}
        self.tidies = False

    def _reaches(self) -> set[str]:
        """Nodes through which some wanted gradient passes."""
        wanted, reaches = self.tape.wanted, {name for name in self.inputs if name in self.tape.wanted}
        for area in self.network.areas:
            own = (*self.network.norm_prefixes(area), area.cell_parameter)
            if any(name.startswith(f"{p}.") for p in own if p for name in wanted):
                reaches.add(area.name)
        for c in self.network.connections:
            if wanted.intersection((*c.weights, *c.biases)):
                reaches.add(c.target)
        before = -1
        while before < len(reaches):
            before = len(reaches)
            reaches |= {name for (name, _), terms in self.schedule.terms.items()
                        if any(self.schedule.drives[t.drive].source in reaches for t in terms)}  # fmt: skip
        return reaches

    def state(self, c: Connection, node: str) -> str | None:
        """Which map of a node a connection reads."""
        if node != c.source or node in self.inputs:
            return None
        area = self.network.area(node)
        return c.state if c.state is not None else area.states[0]

    def map(self, node: str, slot: int, state: str | None) -> Tensor:
        """[N, H, W, C]."""
        key = map_key(node, slot, state)
        if key not in self.maps:
            self.maps[key] = self.shown(node, [slot])
        return self.maps[key]

    def shown(self, node: str, slots: Sequence[int]) -> Tensor:
        """Maps of an input, [len(slots) * N, H, W, C]."""
        spec, x = self.inputs[node]
        off = spec.off_at is not None
        if spec.frames and node not in self._frames:
            self._frames[node] = x.unbind()
        frames = [self._frames[node][slot] if spec.frames else torch.full_like(x, spec.off_value) if off and slot else x for slot in slots]
        n, c, h, w = frames[0].shape
        if len(frames) == 1:
            frame = frames[0].permute(0, 2, 3, 1)
            return frame if frame.is_contiguous() else channels_last(frames[0], empty((n, h, w, c), x.dtype))
        out = empty((len(frames), n, h, w, c), x.dtype)
        for place, frame in zip(out, frames, strict=True):
            channels_last(frame, place)
        return out.flatten(0, 1)

    def form(self, drive: Drive, slot: int) -> tuple[Tensor, Key]:
        """The map that a drive's linear map reads, and the key of its gradient."""
        c, state = drive.connection, self.state(drive.connection, drive.source)
        key = map_key(drive.source, slot, state)
        if c.pool is not Pool.NONE:
            x, key = self._pooled(drive.source, slot, state, c.pool)
        else:
            x = self.map(drive.source, slot, state)
        if c.resize and tuple(x.shape[1:3]) != self.network.read_size(c):
            x, key = self._resized(x, key, self.network.read_size(c))
        self._form_keys[drive.index, slot] = key
        return x, key

    def _pooled(self, node: str, slot: int, state: str | None, pool: Pool) -> tuple[Tensor, Key]:
        source = map_key(node, slot, state)
        key = ("pooled", pool, source)
        if key in self.forms:
            return self.forms[key], key
        x = self.map(node, slot, state)
        if pool is Pool.MAX_SAME and (x.shape[1] % 2 or x.shape[2] % 2):
            (y,) = self.tape.by_torch(lambda xs, _: [pooled(xs[0].permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1)], [(source, x)], [key])
        else:
            kind = Pool.MEAN if pool is Pool.MEAN else Pool.MAX
            y, argmax = empty_form(x.shape, kind, x.dtype)
            argmax = argmax if self.tape.recording else None
            mean, maximum = (y, None) if kind is Pool.MEAN else (None, y)
            area_step_forward([x], rectify=False, max_pooled=maximum, argmax=argmax, mean_pooled=mean)
            self.tape.record(self._pooled_back, tuple(x.shape), source, key, argmax)
            readers = sum(d.source == node and d.connection.pool is pool and slot in d.slots for d in self.schedule.drives)
            if self.tape.recording and y.nbytes >= LARGE_FORM and readers == 1 and (state_again := self.rules.again.makers.get(source)):
                self.rules.again.forms[key] = partial(self._pooled_again, state_again, tuple(x.shape), kind)
        self.forms[key] = y
        return y, key

    def _pooled_again(self, state_again: Callable[[Tensor | None], Tensor], shape: tuple[int, ...], kind: Pool) -> Tensor:
        x = state_again(empty(shape, self.example.dtype))
        y = empty(form_shape(shape, kind), x.dtype)
        mean, maximum = (y, None) if kind is Pool.MEAN else (None, y)
        area_step_forward([x], rectify=False, max_pooled=maximum, mean_pooled=mean)
        return y

    def _pooled_back(self, shape: tuple[int, int, int, int], source: Key, key: Key, argmax: Tensor | None) -> None:
        self.rules.again.leave([key], self.tape.kept)
        grad, _ = self.tape.grads.take(key)
        if grad is None:
            return
        out = empty(shape, grad.dtype)
        _launch.area_step_backward(
            shape, grad.dtype, [], None if argmax is None else grad, argmax, grad if argmax is None else None,
            False, None, [], None, None, None, None, None, None, False, out, None, None, None, None,
        )  # fmt: skip
        self.tape.grads.add(source, out, own=True)

    def _resized(self, x: Tensor, source: Key, size: tuple[int, int]) -> tuple[Tensor, Key]:
        key = ("resized", size, source)
        if key not in self.forms:
            (self.forms[key],) = self.tape.by_torch(
                lambda xs, _: [
                    functional.interpolate(xs[0].permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
                ],
                [(source, x)],
                [key],
            )
        return self.forms[key], key

    def _drop_pooled(self, name: str, slot: int) -> None:
        """Give up a map of which only pooled forms will be read."""
        if self.by_component and name not in self.inputs and name not in self.recorded and not self.whole_uses[name, slot]:
            for state in (None, *self.network.area(name).states):
                self.maps.pop(map_key(name, slot, state), None)

    def _drop(self, node: str, slot: int) -> None:
        for state in (None, *(self.network.area(node).states if node not in self.inputs else ())):
            key = map_key(node, slot, state)
            self.maps.pop(key, None)
            for form in [f for f in self.forms if f is not None and key in (f[2], f[2][2] if f[2][0] == "pooled" else None)]:
                self.forms.pop(form)

    # ---------------------------------------------------------------- windows

    def window(self, name: str) -> int:
        """Slots of an area in a window: as many as fit, in windows of nearly equal size, of which the first may be shorter. Of few time
        steps windows would be most, so the areas of a component share the room of one then."""
        channels, height, width = self.network.shapes[name]
        slots, number = self.schedule.num_slots[name], self.component_of.get(name)
        beside = 1 if number is None or slots > FEW_STEPS else len(self.schedule.components[number].areas)
        each = self.samples * height * width * channels * self.example.element_size()
        fit = max(1, WINDOW_BYTES // (beside * each))
        return -(-slots // -(-slots // fit))

    def _windows(self, name: str) -> list[range]:
        """All windows of an area."""
        slots, size = self.schedule.num_slots[name], self.window(name)
        return [range(max(0, stop - size), stop) for stop in range(slots, 0, -size)][::-1]

    def _window_end(self, index: int, position: int) -> int:
        """The position after the last one of a drive's window."""
        count, size = len(self.schedule.drives[index].slots), self.window(self.schedule.drives[index].connection.target)
        return count - (count - 1 - position) // size * size

    def tidy(self) -> None:
        """In a run whose like will be replayed, in memory that is laid out better: keep no more memory until then than this run will."""
        if self.tidies:
            tidy_buffers()

    def drop_blocks(self, areas: Sequence[str]) -> None:
        """Areas that are done need no more room."""
        self.blocks = {key: block for key, block in self.blocks.items() if key[0] not in areas}

    def room(self, name: str, slots: range, kind: str, channels: int) -> Tensor:
        """Where a kind of map of an area's slots goes: where a component runs as a whole, next to that of the other slots of its window."""
        _, height, width = self.network.shapes[name]
        shape = (self.samples, height, width, channels)
        if (name, kind) in self.whole:
            return self.whole[name, kind].of(slots)
        if not self.by_component:
            return empty(shape, self.example.dtype)
        size, last = self.window(name), self.schedule.num_slots[name]
        stop = last - (last - 1 - slots[0]) // size * size
        first = max(0, stop - size)
        if (name, kind) not in self.blocks or self.blocks[name, kind].first != first:
            self.blocks[name, kind] = Rooms(empty((stop - first, *shape), self.example.dtype), first)
        return self.blocks[name, kind].of(slots)
