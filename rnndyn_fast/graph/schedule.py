"""The schedule compiler: from a network and a number of time steps to what is computed, once, in which order.

The network is unrolled symbolically. Every value an area takes gets a *slot*, and two time steps share a slot when all terms that
enter are the same (value numbering). From that alone follow, with no rule for any particular network:

- static drives: whatever does not depend on time has one slot, is computed once, and its gradient is summed over time first;
- constants: a term of a map that is zero (before a first state that is declared so) is its bias, and is not evaluated;
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
from functools import cached_property, lru_cache
from typing import NamedTuple

from rnndyn_fast.graph.schedule_text import schedule_text
from rnndyn_fast.graph.spec.network import ABSENT, FIT, ZERO, Area, Connection, Interaction, Network, Norm, Pool, Shape

AreaSlot = tuple[str, int]
FormSlot = tuple[str, Pool, int]  # a form of an area's map
ZERO_SLOT = -2


class Read(NamedTuple):
    """What a connection finds at its source: a value of a node (the source, or the input that gives its initial state), or zero."""

    connection: Connection
    node: str
    slot: int  # ZERO_SLOT: a map of zeros


@dataclass(frozen=True)
class Drive:
    """One linear map of one source: a term that is evaluated per slot of the source in ``slots`` (and shared by all its readers)."""

    index: int
    connection: Connection  # the first of those that share it
    source: str  # the connection's source, or the input that is its state before the first step
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
    """Whether a connection enters its area's drive (rather than the modulator); with a cell, its first port."""
    return network.port(connection) == next(iter(network.area(connection.target).ports))


class Schedule:
    """What a rollout computes. Build one with :func:`compile_schedule`.

    Attributes
    ----------
    slot_of: for each input and area, its slot at every time step; -1 where it has no state, or none that is read.
    num_slots: distinct values of each input and area.
    first_step: the first time step at which an area has a state.
    terms: for each (area, slot) the terms that enter and have to be evaluated.
    split_terms: the same, those of the drive apart from those of the modulator.
    zeros: for each (area, slot) the connections that read a map of zeros: of each, its bias enters.
    drives, components: see :class:`Drive`, :class:`Component`.
    """

    def __init__(self, network: Network, timesteps: int, record: tuple[str, ...]) -> None:
        self.network = network
        self.timesteps = timesteps
        self.record = record
        self.slot_of: dict[str, list[int]] = {}
        self.num_slots: dict[str, int] = {}
        self.first_step: dict[str, int] = {}
        self._make_drives(self._drop_unread(self._number_values()))
        self._make_components()

    # ---------------------------------------------------------------- values

    def _number_values(self) -> dict[AreaSlot, tuple[Read, ...]]:
        network = self.network
        for node in network.inputs:
            on = self.timesteps if node.off_at is None else min(node.off_at, self.timesteps)
            self.slot_of[node.name] = list(range(self.timesteps)) if node.frames else [0] * on + [1] * (self.timesteps - on)
        for area in network.areas:
            self.slot_of[area.name] = [-1] * self.timesteps
            if area.norm is Norm.BATCH and area.norm_steps is not None and self.timesteps > area.norm_steps:
                raise ValueError(
                    f"timesteps: area {area.name!r} of network {network.name!r} has batch norms for {area.norm_steps} time steps, "
                    f"got {self.timesteps}"
                )
        incoming = {a.name: [c for c in network.connections if c.target == a.name] for a in network.areas}
        numbers: dict[str, dict[object, int]] = {a.name: {} for a in network.areas}
        reads: dict[AreaSlot, tuple[Read, ...]] = {}
        self._naive = 0
        for t in range(self.timesteps):
            for area in network.areas:
                found = [r for c in incoming[area.name] if (r := self._read(c, t)) is not None]
                entering = _entering(network, area, found)
                if entering is None:
                    continue
                # A batch norm has parameters of its own at every time step.
                key = (entering, t if area.norm is Norm.BATCH else None)
                slot = numbers[area.name].setdefault(key, len(numbers[area.name]))
                self.slot_of[area.name][t] = slot
                reads[area.name, slot] = entering
                self._naive += sum(network.multiply_adds(r.connection) for r in found if r.slot != ZERO_SLOT)
        for name in self.record:
            steps = [t for t, slot in enumerate(self.slot_of[self.network.recorded(name)[0]]) if slot >= 0]
            if not steps:
                raise ValueError(
                    f"timesteps: area {name!r} of network {network.name!r} has no state within {self.timesteps} time steps "
                    f"({network.unroll.value} unroll); more are needed"
                )
            if len(steps) < self.timesteps - steps[0]:
                missing = next(t for t in range(steps[0], self.timesteps) if t not in steps)
                raise ValueError(f"steps: area {name!r} of network {network.name!r} has no state at step {missing}: nothing drives it then")
            self.first_step[name] = steps[0]
        return reads

    def _read(self, c: Connection, t: int) -> Read | None:
        """What a connection finds at time step t; None: nothing."""
        if not c.is_there(t):
            return None
        when = t - self.network.delay(c)
        slot = self.slot_of[c.source][when] if when >= 0 else -1
        if slot >= 0:
            return Read(c, c.source, slot)
        if any(node.name == c.source for node in self.network.inputs):
            return None
        initial = self.network.area(c.source).initial_of(c.state)
        if initial == ABSENT:
            return None
        return Read(c, c.source, ZERO_SLOT) if initial == ZERO else Read(c, initial, 0)

    def _drop_unread(self, reads: dict[AreaSlot, tuple[Read, ...]]) -> dict[AreaSlot, tuple[Read, ...]]:
        """Keep what the recorded areas need, and number the kept slots without gaps."""
        needed: set[AreaSlot] = set()
        recorded = {self.network.recorded(name)[0] for name in self.record}
        stack = [(name, slot) for name in recorded for slot in self.slot_of[name] if slot >= 0]
        while stack:
            item = stack.pop()
            if item not in needed:
                needed.add(item)
                stack.extend((r.node, r.slot) for r in reads.get(item, ()) if r.slot != ZERO_SLOT)
        renumber: dict[str, dict[int, int]] = {}
        inputs = {node.name for node in self.network.inputs}
        for name, slots in self.slot_of.items():
            kept = sorted(slot for slot in {*slots, 0} if (name, slot) in needed)
            # Inputs keep their index: of frames it is the time step.
            renumber[name] = {slot: slot if name in inputs else i for i, slot in enumerate(kept)}
            self.slot_of[name] = [renumber[name].get(slot, -1) for slot in slots]
            self.num_slots[name] = len(kept)
        return {
            (name, renumber[name][slot]): tuple(
                r if r.slot == ZERO_SLOT else Read(r.connection, r.node, renumber[r.node][r.slot]) for r in entries
            )
            for (name, slot), entries in reads.items()
            if (name, slot) in needed
        }

    def _make_drives(self, reads: dict[AreaSlot, tuple[Read, ...]]) -> None:
        first: dict[tuple, Read] = {}
        used: dict[tuple, set[int]] = defaultdict(set)

        # A term is shared by its readers where it is one and the same map with one bias; a recurrent one (between areas that step
        # together) is evaluated step by step, and so apart from one of the same weights that leaves the component.
        component = self._component_numbers(reads)

        def key(r: Read) -> tuple:
            c = r.connection
            inside = component.get(r.node) == component[c.target]
            made = self.network.term_shape(c) if c.resize or c.output_padding == FIT else None
            return (
                r.node, c.state, c.operator, c.kernel_size, c.stride, c.padding, c.output_padding, c.pool, c.parameter, c.bias,
                c.groups, c.middle_channels, c.middle_bias, c.cut_kernel, c.concat, made, inside,
            )  # fmt: skip

        self.zeros = {item: tuple(r.connection for r in entries if r.slot == ZERO_SLOT) for item, entries in reads.items()}
        evaluated = {item: tuple(r for r in entries if r.slot != ZERO_SLOT) for item, entries in reads.items()}
        for entries in evaluated.values():
            for r in entries:
                first.setdefault(key(r), r)
                used[key(r)].add(r.slot)
        order = {c: i for i, c in enumerate(self.network.connections)}
        keys = sorted(first, key=lambda k: order[first[k].connection])
        self.drives = tuple(
            Drive(i, first[k].connection, first[k].node, tuple(sorted(used[k])), self.network.term_shape(first[k].connection))
            for i, k in enumerate(keys)
        )
        index = {k: i for i, k in enumerate(keys)}
        position = [{slot: i for i, slot in enumerate(d.slots)} for d in self.drives]
        self.terms: dict[AreaSlot, tuple[Term, ...]] = {
            item: tuple(Term(r.connection, index[key(r)], position[index[key(r)]][r.slot]) for r in entries)
            for item, entries in evaluated.items()
        }
        drives = {c: is_drive_term(self.network, c) for c in self.network.connections}
        self.split_terms: dict[AreaSlot, tuple[tuple[Term, ...], tuple[Term, ...]]] = {
            item: (tuple(t for t in terms if drives[t.connection]), tuple(t for t in terms if not drives[t.connection]))
            for item, terms in self.terms.items()
        }

    # ---------------------------------------------------------------- order

    def _component_numbers(self, reads: dict[AreaSlot, tuple[Read, ...]]) -> dict[str, int]:
        """The strongly connected component of each area that is computed."""
        areas = [a.name for a in self.network.areas if self.num_slots[a.name]]
        self.reads: dict[str, set[str]] = {name: set() for name in areas}
        for (name, _), entries in reads.items():
            self.reads[name] |= {r.node for r in entries if r.slot != ZERO_SLOT} & set(areas)
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
        patterns = {(tuple((t.connection, t.drive) for t in self.terms[item]), self.zeros[item]) for item in updates}
        return (
            len(patterns) == 1
            and self.network.area(updates[0][0]).norm is not Norm.BATCH
            and all(t.position == slot for name, slot in updates for t in self.terms[name, slot])
            and all(len(self.drives[d].slots) == len(updates) for _, d in next(iter(patterns))[0])
        )

    def _time_order(self) -> list[AreaSlot]:
        seen: dict[AreaSlot, None] = {}
        for t in range(self.timesteps):
            for area in self.network.areas:
                slot = self.slot_of[area.name][t]
                if slot >= 0:
                    seen.setdefault((area.name, slot))
        return list(seen)

    @cached_property
    def time_major(self) -> list[AreaSlot]:
        """All updates, time step by time step: the order of inference."""
        return self._time_order()

    # ---------------------------------------------------------------- what is read of a node

    @cached_property
    def _pools_read(self) -> dict[str, frozenset[Pool]]:
        recorded = {name: frozenset([Pool.NONE] if name in self.record else []) for name in self.num_slots}
        return {name: pools | {d.connection.pool for d in self.drives if d.source == name} for name, pools in recorded.items()}

    def pools_read(self, name: str) -> frozenset[Pool]:
        """Forms of a node's map that its drives read (and, for a recorded area, the map itself)."""
        return self._pools_read[name]

    def __str__(self) -> str:
        return schedule_text(self)

    def batch_norms(self) -> list[str]:
        """Prefixes of the parameters of all batch norms that are computed, one for each time step."""
        network = self.network
        found = {
            f"{network.area(name).norm_parameter}.{self.slot_of[name].index(slot)}"
            for name, slot in self.terms
            if network.area(name).norm is Norm.BATCH and not network.area(name).norm_frozen
        }
        return sorted(found)

    def multiplications(self, samples: int = 1) -> tuple[int, int]:
        """Multiply-adds of all drives as scheduled, and with every term of every area evaluated at every time step."""
        scheduled = sum(self.network.multiply_adds(d.connection) * len(d.slots) for d in self.drives)
        return samples * scheduled, samples * self._naive


def _entering(network: Network, area: Area, found: Sequence[Read]) -> tuple[Read, ...] | None:
    """Those of the terms found that its value depends on; None if it has no value yet."""
    if any(is_drive_term(network, r.connection) for r in found):
        return tuple(found)
    # Zero times the squashed modulator: a value, and always the same one.
    return () if found and area.interaction is Interaction.SQUASHED else None


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
        record: areas ("area", or "area:state") whose states are wanted at every time step at which they have one.

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
        network.recorded(name)
        if names.count(name) > 1:
            raise ValueError(f"record: expected every area once, got {list(names)}")
    return _compiled(network, timesteps, names)


@lru_cache(maxsize=256)
def _compiled(network: Network, timesteps: int, record: tuple[str, ...]) -> Schedule:
    return Schedule(network, timesteps, record)
