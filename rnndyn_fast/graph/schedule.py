"""The schedule compiler: from a network and a number of time steps to what is computed, once, in which order.

The network is unrolled symbolically. Every value an area takes gets a *slot*, and two time steps share a slot when all terms that
enter are the same (value numbering). From that alone follow, with no rule for any particular network:

- static drives: whatever does not depend on time has one slot, is computed once, and its gradient is summed over time first;
- terms once: a term is evaluated per slot of its source, however many time steps or areas read it;
- what nothing reads is not computed.

The strongly connected components of the area graph then run one after another, each through all its time steps (training), so that
every drive into a component is one convolution over all slots and samples. For inference the same slots are visited time step by
time step, and a state is dropped after its last reader: two time steps of state are alive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rnndyn_fast.graph.spec import Connection, Interaction, Network, Operator, Pool, Role, Shape

AreaSlot = tuple[str, int]


@dataclass(frozen=True)
class Drive:
    """One linear map of one source: a term that is evaluated per slot of the source in ``slots`` (and shared by all its readers)."""

    index: int
    connection: Connection  # the first of those that share it
    source: str
    slots: tuple[int, ...]  # source slots at which it is evaluated, ascending
    shape: Shape  # channels, height, width of the result

    @property
    def static(self) -> bool:
        """Whether it is evaluated only once."""
        return len(self.slots) == 1


@dataclass(frozen=True)
class Term:
    """A use of a drive: ``position`` counts in ``Drive.slots``."""

    connection: Connection
    drive: int
    position: int


@dataclass(frozen=True)
class Component:
    """Areas that must step through time together. ``batched``: no recurrence, all slots are one call."""

    areas: tuple[str, ...]
    recurrent: bool
    batched: bool
    updates: tuple[AreaSlot, ...]  # in order of time, then of the network's areas
    drives_in: tuple[int, ...]  # drives from outside, evaluated at once over all their slots
    drives_within: tuple[int, ...]  # drives between areas of the component, evaluated step by step


def is_drive_term(network: Network, connection: Connection) -> bool:
    """Whether a connection enters its area's drive (rather than the modulator)."""
    area = network.area(connection.target)
    return area.interaction is Interaction.ADDITIVE or connection.role is Role.BOTTOM_UP


class Schedule:
    """What a rollout computes. Build one with :func:`compile_schedule`.

    Attributes
    ----------
    slot_of: for each input and area, its slot at every time step; -1 where it has no state, or none that is read.
    num_slots: distinct values of each input and area.
    first_step: the first time step at which an area has a state.
    terms: for each (area, slot) the terms that enter.
    drives, components: see :class:`Drive`, :class:`Component`.
    """

    def __init__(self, network: Network, timesteps: int, record: tuple[str, ...]) -> None:
        self.network = network
        self.timesteps = timesteps
        self.record = record
        self.slot_of: dict[str, list[int]] = {}
        self.num_slots: dict[str, int] = {}
        self.first_step: dict[str, int] = {}
        raw_terms = self._number_values()
        raw_terms = self._drop_unread(raw_terms)
        self._make_drives(raw_terms)
        self._make_components()

    # ---------------------------------------------------------------- values

    def _number_values(self) -> dict[AreaSlot, tuple[tuple[Connection, int], ...]]:
        network = self.network
        for node in network.inputs:
            self.slot_of[node.name] = list(range(self.timesteps)) if node.frames else [0] * self.timesteps
        for area in network.areas:
            self.slot_of[area.name] = [-1] * self.timesteps
        incoming = {a.name: [c for c in network.connections if c.target == a.name] for a in network.areas}
        numbers: dict[str, dict[tuple[tuple[Connection, int], ...], int]] = {a.name: {} for a in network.areas}
        terms: dict[AreaSlot, tuple[tuple[Connection, int], ...]] = {}
        for t in range(self.timesteps):
            for area in network.areas:
                present = []
                for c in incoming[area.name]:
                    when = t - network.delay(c)
                    if when >= 0 and self.slot_of[c.source][when] >= 0:
                        present.append((c, self.slot_of[c.source][when]))
                if any(is_drive_term(network, c) for c, _ in present):
                    key = tuple(present)
                    slot = numbers[area.name].setdefault(key, len(numbers[area.name]))
                    self.slot_of[area.name][t] = slot
                    terms[area.name, slot] = key
        for name in self.record:
            steps = [t for t, slot in enumerate(self.slot_of[name]) if slot >= 0]
            if not steps:
                raise ValueError(
                    f"timesteps: area {name!r} of network {network.name!r} has no state within {self.timesteps} time steps "
                    f"({network.unroll.value} unroll); more are needed"
                )
            self.first_step[name] = steps[0]
        return terms

    def _drop_unread(self, terms: dict[AreaSlot, tuple[tuple[Connection, int], ...]]) -> dict[AreaSlot, tuple[tuple[Connection, int], ...]]:
        """Keep what the recorded areas need, and number the kept slots without gaps."""
        needed: set[AreaSlot] = set()
        stack = [(name, slot) for name in self.record for slot in self.slot_of[name] if slot >= 0]
        while stack:
            item = stack.pop()
            if item not in needed:
                needed.add(item)
                stack.extend((c.source, slot) for c, slot in terms.get(item, ()))
        renumber: dict[str, dict[int, int]] = {}
        for name, slots in self.slot_of.items():
            kept = sorted(slot for slot in set(slots) if (name, slot) in needed)
            renumber[name] = {slot: i for i, slot in enumerate(kept)}
            # Frames keep their index, which is the time step.
            if any(node.name == name and node.frames for node in self.network.inputs):
                renumber[name] = {slot: slot for slot in kept}
            self.slot_of[name] = [renumber[name].get(slot, -1) for slot in slots]
            self.num_slots[name] = len(kept)
        return {
            (name, renumber[name][slot]): tuple((c, renumber[c.source][s]) for c, s in entries)
            for (name, slot), entries in terms.items()
            if (name, slot) in needed
        }

    def _make_drives(self, raw_terms: dict[AreaSlot, tuple[tuple[Connection, int], ...]]) -> None:
        first: dict[tuple, Connection] = {}
        used: dict[tuple, set[int]] = defaultdict(set)

        # A term is shared by its readers where it is one and the same map with one bias; a recurrent one (between areas that step
        # together) is evaluated step by step, and so apart from one of the same weights that leaves the component.
        component = self._component_numbers(raw_terms)

        def key(c: Connection) -> tuple:
            inside = component.get(c.source) == component[c.target]
            return c.source, c.operator, c.kernel_size, c.stride, c.padding, c.output_padding, c.pool, c.parameter, c.bias, inside

        for entries in raw_terms.values():
            for c, slot in entries:
                first.setdefault(key(c), c)
                used[key(c)].add(slot)
        order = {c: i for i, c in enumerate(self.network.connections)}
        keys = sorted(first, key=lambda k: order[first[k]])
        self.drives = tuple(
            Drive(i, first[k], first[k].source, tuple(sorted(used[k])), self.network.shapes[first[k].target]) for i, k in enumerate(keys)
        )
        index = {k: i for i, k in enumerate(keys)}
        position = [{slot: i for i, slot in enumerate(d.slots)} for d in self.drives]
        self.terms: dict[AreaSlot, tuple[Term, ...]] = {
            item: tuple(Term(c, index[key(c)], position[index[key(c)]][slot]) for c, slot in entries) for item, entries in raw_terms.items()
        }

    # ---------------------------------------------------------------- order

    def _component_numbers(self, raw_terms: dict[AreaSlot, tuple[tuple[Connection, int], ...]]) -> dict[str, int]:
        """The strongly connected component of each area that is computed."""
        areas = [a.name for a in self.network.areas if self.num_slots[a.name]]
        self.reads: dict[str, set[str]] = {name: set() for name in areas}
        for (name, _), entries in raw_terms.items():
            self.reads[name] |= {c.source for c, _ in entries} & set(areas)
        self.members = _strong_components(areas, self.reads)
        return {name: i for i, members in enumerate(self.members) for name in members}

    def _make_components(self) -> None:
        self.components = tuple(self._component(members, self.reads) for members in self.members)

    def _component(self, members: tuple[str, ...], reads: dict[str, set[str]]) -> Component:
        recurrent = len(members) > 1 or members[0] in reads[members[0]]
        updates = [item for item in self._time_order() if item[0] in members]
        used = sorted({t.drive for item in updates for t in self.terms[item]})
        within = tuple(d for d in used if self.drives[d].source in members)
        drives_in = tuple(d for d in used if d not in within)
        batched = not recurrent and self._aligned(updates)
        return Component(members, recurrent, batched, tuple(updates), drives_in, within)

    def _aligned(self, updates: list[AreaSlot]) -> bool:
        """Whether slot k of the area reads position k of every term, so that all slots are one batch."""
        patterns = {tuple((t.connection, t.drive) for t in self.terms[item]) for item in updates}
        return (
            len(patterns) == 1
            and all(t.position == slot for name, slot in updates for t in self.terms[name, slot])
            and all(len(self.drives[d].slots) == len(updates) for _, d in next(iter(patterns)))
        )

    def _time_order(self) -> list[AreaSlot]:
        seen: dict[AreaSlot, None] = {}
        for t in range(self.timesteps):
            for area in self.network.areas:
                slot = self.slot_of[area.name][t]
                if slot >= 0:
                    seen.setdefault((area.name, slot))
        return list(seen)

    @property
    def time_major(self) -> list[AreaSlot]:
        """All updates, time step by time step: the order of inference."""
        return self._time_order()

    # ---------------------------------------------------------------- what is read of a node

    def pools_read(self, name: str) -> set[Pool]:
        """Forms of a node's map that its drives read (and, for a recorded area, the map itself)."""
        pools = {d.connection.pool for d in self.drives if d.source == name}
        return pools | ({Pool.NONE} if name in self.record else set())

    def multiplications(self, samples: int = 1) -> tuple[int, int]:
        """Multiply-adds of all drives as scheduled, and as they would be with every term evaluated at every time step."""
        per_slot = []
        for d in self.drives:
            c, (channels, height, width) = d.connection, d.shape
            source = self.network.shapes[d.source][0]
            if c.operator is Operator.IDENTITY:
                per_slot.append(0)
            elif c.operator is Operator.CONV_TRANSPOSE:
                per_slot.append(source * channels * c.kernel_size**2 * height * width // c.stride**2)
            else:
                per_slot.append(source * channels * c.kernel_size**2 * height * width)
        scheduled = sum(n * len(d.slots) for n, d in zip(per_slot, self.drives, strict=True))
        every_step = 0
        for area in self.network.areas:
            for slot in self.slot_of[area.name]:
                if slot >= 0:
                    every_step += sum(per_slot[t.drive] for t in self.terms[area.name, slot])
        return samples * scheduled, samples * every_step

    def __str__(self) -> str:
        from rnndyn_fast.graph.plan import describe

        return describe(self)


def _strong_components(nodes: list[str], reads: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Strongly connected components in an order in which each one reads only earlier ones; members in the order of ``nodes``."""
    reach: dict[str, set[str]] = {}
    for node in nodes:
        seen: set[str] = set()
        stack = [node]
        while stack:
            for source in reads[stack.pop()] - seen:
                seen.add(source)
                stack.append(source)
        reach[node] = seen
    components: list[tuple[str, ...]] = []
    done: set[str] = set()
    for node in nodes:
        if node not in done:
            members = tuple(m for m in nodes if m == node or (m in reach[node] and node in reach[m]))
            components.append(members)
            done.update(members)
    placed: list[tuple[str, ...]] = []
    while components:
        waiting = {m for members in components for m in members}
        ready = next(ms for ms in components if not any((reach[m] - set(ms)) & waiting for m in ms))
        placed.append(ready)
        components.remove(ready)
    return placed


def compile_schedule(network: Network, timesteps: int, record: Sequence[str]) -> Schedule:
    """Compile the schedule of a network.

    Args:
        network: the spec.
        timesteps: T >= 1.
        record: areas whose states are wanted at every time step at which they have one.

    Raises:
        ValueError: timesteps below 1, an unknown or repeated area, or an area that has no state within the time steps.
        TypeError: timesteps is no int, record is a string.
    """
    if isinstance(timesteps, bool) or not isinstance(timesteps, int):
        raise TypeError(f"timesteps: expected an int, got {type(timesteps).__name__} {timesteps!r}")
    if timesteps < 1:
        raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
    if isinstance(record, str):
        raise TypeError(f"record: expected a sequence of area names, got the string {record!r}")
    names = tuple(record)
    if not names:
        raise ValueError("record: expected at least one area")
    for name in names:
        if name not in [area.name for area in network.areas]:
            raise ValueError(f"record: unknown area {name!r}; areas are {[area.name for area in network.areas]}")
        if names.count(name) > 1:
            raise ValueError(f"record: expected every area once, got {list(names)}")
    return _compiled(network, timesteps, names)


@lru_cache(maxsize=256)
def _compiled(network: Network, timesteps: int, record: tuple[str, ...]) -> Schedule:
    return Schedule(network, timesteps, record)
