"""What a training rollout keeps for its backward pass: one list, in one order, for the op, its fake and the printed plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from rnndyn_fast.graph.schedule import Component, Schedule
from rnndyn_fast.graph.spec import Activation, Interaction, Norm, Operator, Pool

_AGAIN = 1 / 32  # of all multiply-adds, which backward may do a second time
POOL_KIND = {Pool.NONE: "state", Pool.MAX: "max", Pool.MEAN: "mean"}


@dataclass(frozen=True)
class SavedBuffer:
    """A tensor [slots, N, *shape] kept for backward; ``shape`` is (H, W, C), or () for one number per sample.

    ``kind``: state, max, mean (the forms of a map that weight gradients read), argmax (bytes), value (before the norm), modulator
    (1 + l + d, of :func:`modulated_slots`), centre and rstd (LayerNorm's statistics), drive (a drive that a modulator multiplied;
    ``owner`` is then ``drive<i>``).
    """

    owner: str
    kind: str
    slots: int
    shape: tuple[int, ...]
    byte: bool = False

    def dtype(self, maps: torch.dtype) -> torch.dtype:
        """Where maps have this dtype: bytes are bytes, and statistics at least float32."""
        if self.byte:
            return torch.uint8
        return torch.float32 if not self.shape and maps.itemsize < 4 else maps

    @property
    def key(self) -> tuple[str, str]:
        """Owner and kind."""
        return self.owner, self.kind


def keeps_value(schedule: Schedule, name: str) -> bool:
    """Additive areas keep the value before norm and relu; multiplicative ones compute it again from drive and modulator.

    Without a norm a state that is kept tells the sign as well.
    """
    area = schedule.network.area(name)
    if area.norm is Norm.NONE and (area.activation is Activation.IDENTITY or keeps_form(schedule, name, Pool.NONE)):
        return False
    return area.interaction is Interaction.ADDITIVE


def keeps_form(schedule: Schedule, name: str, pool: Pool) -> bool:
    """Whether a form of a map is kept: a gradient of a weight or of a product reads it, and backward does not compute it again."""
    multiplied = multiplied_drives(schedule)
    readers = [d for d in schedule.drives if d.source == name and d.connection.pool is pool]
    maps = any(d.connection.operator is not Operator.IDENTITY for d in readers)
    factors = any(d.connection.operator is Operator.IDENTITY and d.index in multiplied for d in readers)
    if any(node.name == name for node in schedule.network.inputs):
        return pool is not Pool.NONE and (maps or factors)
    again = recomputes_state(schedule, name) if pool is Pool.NONE else recomputes_pooled(schedule, name, pool)
    return factors or (maps and not again)


def recomputes_pooled(schedule: Schedule, name: str, pool: Pool) -> bool:
    """Whether backward computes a pooled form again for the gradients of weights: a pass over the value, for a quarter of its memory."""
    return pool is Pool.MAX and schedule.network.area(name).norm is not Norm.NONE


def modulated_slots(schedule: Schedule, name: str) -> list[int]:
    """The slots of an area that have a modulator term (at the first time step there is often none): those whose modulator is kept."""
    return [slot for slot in range(schedule.num_slots[name]) if schedule.split_terms.get((name, slot), ((), ()))[1]]


@lru_cache(maxsize=256)
def multiplied_drives(schedule: Schedule) -> frozenset[int]:
    """Drives whose values enter a product and so are needed for its gradient."""
    return frozenset(
        t.drive
        for (name, _), (drives, _) in schedule.split_terms.items()
        if schedule.network.area(name).interaction is Interaction.MULTIPLICATIVE
        for t in drives
    )


def recomputes_state(schedule: Schedule, name: str) -> bool:
    """Whether backward computes an area's state again, from its value or from drive and modulator, rather than have it kept.

    So where only its own component reads the state (at the next step): then forward holds two time steps of it and no more.
    """
    members = next(c.areas for c in schedule.components if name in c.areas)
    readers = [d for d in schedule.drives if d.source == name and d.connection.pool is Pool.NONE]
    inside = all(d.connection.operator is not Operator.IDENTITY and all(n in members for n in _targets(schedule, d.index)) for d in readers)
    component = next(c for c in schedule.components if name in c.areas)
    return component.recurrent and inside and name not in schedule.record and schedule.network.area(name).norm is not Norm.NONE


def _targets(schedule: Schedule, drive: int) -> set[str]:
    return {name for (name, _), terms in schedule.terms.items() for t in terms if t.drive == drive}


def _hwc(shape: tuple[int, int, int], pool: Pool) -> tuple[int, int, int]:
    channels, height, width = shape
    if pool is Pool.MAX:
        return height // 2, width // 2, channels
    if pool is Pool.MEAN:
        return 1, 1, channels
    return height, width, channels


@lru_cache(maxsize=256)
def computed_again(schedule: Schedule) -> tuple[Component, ...]:
    """Components of which nothing is kept: backward runs them forward a second time.

    So those that read inputs, or one another, and do not change in time, if they are a small part of all arithmetic.
    """
    again: list[Component] = []
    nodes = {node.name for node in schedule.network.inputs}
    rest, _ = schedule.multiplications()
    left = rest * _AGAIN
    for component in schedule.components:
        drives = [schedule.drives[d] for d in component.drives_in]
        left -= sum(schedule.network.multiply_adds(d.connection) * len(d.slots) for d in drives)
        static = not component.recurrent and all(schedule.num_slots[name] == 1 and name not in schedule.record for name in component.areas)
        if not static or left < 0 or any(d.source not in nodes for d in drives):
            break
        again.append(component)
        nodes.update(component.areas)
    return tuple(again)


@lru_cache(maxsize=256)
def saved_buffers(schedule: Schedule) -> tuple[SavedBuffer, ...]:
    """What forward keeps for the backward pass, in the order in which the rollout op returns it."""
    again = computed_again(schedule)
    areas = {name for c in again for name in c.areas}
    drives = {f"drive{d}" for c in again for d in c.drives_in}
    return tuple(b for b in needed_buffers(schedule) if b.owner not in areas | drives)


@lru_cache(maxsize=256)
def needed_buffers(schedule: Schedule) -> tuple[SavedBuffer, ...]:
    """What the backward pass reads: :func:`saved_buffers`, and what it makes by running some components again."""
    network, buffers = schedule.network, list[SavedBuffer]()
    multiplied = multiplied_drives(schedule)
    nodes = [name for name in network.shapes if schedule.num_slots[name]]
    inputs = {node.name: node for node in network.inputs}
    for name in nodes:
        shape = network.shapes[name]
        # An input with frames keeps its index by time step, whichever of them are read.
        slots = schedule.timesteps if name in inputs and inputs[name].frames else schedule.num_slots[name]
        readers = [d for d in schedule.drives if d.source == name]
        for pool in POOL_KIND:
            if keeps_form(schedule, name, pool):
                buffers.append(SavedBuffer(name, POOL_KIND[pool], slots, _hwc(shape, pool)))
        if any(d.connection.pool is Pool.MAX for d in readers):
            buffers.append(SavedBuffer(name, "argmax", slots, _hwc(shape, Pool.MAX), byte=True))
        if name in inputs:
            continue
        if keeps_value(schedule, name):
            buffers.append(SavedBuffer(name, "value", slots, _hwc(shape, Pool.NONE)))
        if modulated := modulated_slots(schedule, name):
            buffers.append(SavedBuffer(name, "modulator", len(modulated), _hwc(shape, Pool.NONE)))
        if network.area(name).norm is not Norm.NONE:
            buffers.append(SavedBuffer(name, "centre", slots, ()))
            buffers.append(SavedBuffer(name, "rstd", slots, ()))
    for d in schedule.drives:
        if d.index in multiplied and d.connection.operator is not Operator.IDENTITY:
            channels, height, width = d.shape
            buffers.append(SavedBuffer(f"drive{d.index}", "drive", len(d.slots), (height, width, channels)))
    return tuple(buffers)
