"""A schedule run by PyTorch's own operations: every term once, drives into a component in one call, and no more; autograd does the rest.

On any device and in any float dtype, under functional transforms, differentiable any number of times in forward and reverse mode;
:mod:`rnndyn_fast.graph.taped` does the same with our own kernels where they can run. Where gradients are wanted, components
run one after another, so that drives into them are one call over all their slots; otherwise time step by time step, and a map is dropped
after its last reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rnndyn_fast.graph.schedule import AreaSlot, Component, Drive, Schedule, Term
from rnndyn_fast.graph.spec import Area, Connection
from rnndyn_fast.reference.rollout import Maps, Statistics, term, update_area


class _Run:
    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        statistics: Statistics | None,
        *,
        keep: bool,
    ) -> None:
        self.schedule = schedule
        self.network = schedule.network
        # Once, in the layout of the maps: else every convolution would reorder its weight again.
        self.parameters = {name: p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for name, p in parameters.items()}
        self.statistics = statistics
        self.keep = keep  # maps past their last reader: autograd holds them anyway
        nodes = {node.name: node for node in self.network.inputs}
        self.inputs = {name: (nodes[name], x) for name, x in zip(nodes, inputs, strict=True)}
        first = self.network.inputs[0]
        self.samples = inputs[0].shape[1 if first.frames else 0]
        self.example = inputs[0]
        self.maps: dict[AreaSlot, Maps] = {}
        self.drives: dict[tuple[int, int], Tensor] = {}
        self.zero_terms: dict[Connection, Tensor] = {}
        self.drive_uses = Counter((t.drive, t.position) for terms in schedule.terms.values() for t in terms)
        self.map_uses = Counter((d.source, slot) for d in schedule.drives for slot in d.slots)

    def map(self, node: str, slot: int, state: str | None) -> Tensor:
        """One map of a node, [N, C, H, W]."""
        if (node, slot) not in self.maps:
            spec, x = self.inputs[node]
            shown = x[slot] if spec.frames else x
            if spec.off_at is not None and slot == 1:
                shown = torch.full_like(x, spec.off_value)
            self.maps[node, slot] = {None: shown.contiguous(memory_format=torch.channels_last)}
        return self.maps[node, slot][state]

    def evaluate(self, drive: Drive, first: int, last: int) -> None:
        """Positions first..last-1 of a drive, in one call."""
        c, slots = drive.connection, drive.slots[first:last]
        state = c.state if drive.source == c.source else None
        maps = [self.map(drive.source, slot, state) for slot in slots]
        value = term(self.network, c, maps[0] if len(maps) == 1 else torch.cat(maps), self.parameters)
        for k, part in enumerate(value.split(self.samples)):
            self.drives[drive.index, first + k] = part
        if not self.keep:
            for slot in slots:
                self.map_uses[drive.source, slot] -= 1
                if not self.map_uses[drive.source, slot]:
                    self.maps.pop((drive.source, slot))

    def value(self, t: Term) -> Tensor:
        """A term, evaluated where it has not been yet."""
        key = (t.drive, t.position)
        if key not in self.drives:
            self.evaluate(self.schedule.drives[t.drive], t.position, t.position + 1)
        self.drive_uses[key] -= 1
        return self.drives[key] if self.drive_uses[key] else self.drives.pop(key)

    def zero_term(self, c: Connection) -> Tensor:
        """The term of a map of zeros: its biases, evaluated on one sample."""
        if c not in self.zero_terms:
            self.zero_terms[c] = term(self.network, c, self.example.new_zeros((1, *self.network.shapes[c.source])), self.parameters)
        return self.zero_terms[c].expand(self.samples, -1, -1, -1)

    def update(self, name: str, slot: int) -> None:
        """One slot of an area."""
        schedule, area = self.schedule, self.network.area(name)
        terms = [(t.connection, self.value(t)) for t in schedule.terms[name, slot]]
        terms += [(c, self.zero_term(c)) for c in schedule.zeros[name, slot]]
        self.maps[name, slot] = self.step(area, schedule.slot_of[name].index(slot), terms)

    def step(self, area: Area, t: int, terms: list[tuple[Connection, Tensor]]) -> Maps:
        """The maps of an area from its terms."""
        like = (self.samples, *self.network.shapes[area.name])
        maps = update_area(self.network, area, t, terms, self.parameters, self.statistics, like)
        assert maps is not None
        return maps

    def update_all(self, component: Component) -> None:
        """All slots of an area without recurrence, as one batch."""
        (name,) = component.areas
        slots = self.schedule.num_slots[name]
        terms = []
        for t in self.schedule.terms[name, 0]:
            terms.append((t.connection, torch.cat([self.drives[t.drive, k] for k in range(slots)])))
        maps = self.step(self.network.area(name), 0, terms)
        for slot in range(slots):
            rows = slice(slot * self.samples, (slot + 1) * self.samples)
            self.maps[name, slot] = {state: m[rows] for state, m in maps.items()}

    def run(self) -> None:
        for component in self.schedule.components:
            for d in component.drives_in:
                if (d, 0) not in self.drives:
                    self.evaluate(self.schedule.drives[d], 0, len(self.schedule.drives[d].slots))
            if component.batched and len(component.updates) > 1 and not self.schedule.zeros[component.updates[0]]:
                self.update_all(component)
            else:
                for name, slot in component.updates:
                    self.update(name, slot)


def rollout_scheduled(
    schedule: Schedule,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],  # and buffers, where there are any
    statistics: Statistics | None = None,
) -> list[Tensor]:
    """Run a schedule. Returns, for each recorded area, its states [T', N, C, H, W]."""
    recorded = [schedule.network.recorded(name) for name in schedule.record]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *parameters.values()))
    run = _Run(schedule, inputs, parameters, statistics, keep=keep)
    states: list[dict[int, Tensor]] = [{} for _ in recorded]

    def collect(name: str, slot: int) -> None:
        for found, (area, state) in zip(states, recorded, strict=True):
            if area == name:
                found[slot] = run.maps[name, slot][state]

    if keep:
        run.run()
        for name, slot in schedule.time_major:
            collect(name, slot)
    else:
        for name, slot in schedule.time_major:
            run.update(name, slot)
            collect(name, slot)
            if not run.map_uses[name, slot]:
                run.maps.pop((name, slot))
    steps = [schedule.slot_of[area][schedule.first_step[name] :] for name, (area, _) in zip(schedule.record, recorded, strict=True)]
    return [torch.stack([found[slot] for slot in slots]) for found, slots in zip(states, steps, strict=True)]
