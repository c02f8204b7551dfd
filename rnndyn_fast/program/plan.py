"""Programs of rollouts: planned once for each schedule, batch, layout and setting, and kept."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rnndyn_fast.graph.schedule import Schedule
from rnndyn_fast.ops import core
from rnndyn_fast.ops.kept_packs import release_packed
from rnndyn_fast.program.adjoint import Adjoint
from rnndyn_fast.program.bind import Executable
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Instr, Program, Role, Shape, Value, View, whole
from rnndyn_fast.program.lower import Lowering
from rnndyn_fast.program.maps import Setting
from rnndyn_fast.program.place import ALIGNMENT, place

Layout = tuple[Shape, Shape, torch.dtype]  # shape, strides


def layout(tensor: Tensor) -> Layout:
    """What a program depends on of a tensor. (Sizes that torch.compile would leave open become fixed; strides of single entries mean
    nothing.)"""
    shape = tuple(int(n) for n in tensor.shape)
    return shape, tuple(1 if n == 1 else int(s) for n, s in zip(shape, tensor.stride(), strict=True)), tensor.dtype


GradLayouts = tuple[Layout | None, ...]


@dataclass(frozen=True, eq=False)
class Passes:
    """A program, for what layouts of gradients its backward pass is, and the gradients that it gives. ``kept``: values that forward leaves
    and backward reads as tensors, where they do not lie in an arena that both share."""

    executable: Executable
    layouts: GradLayouts
    gradients: dict[str, View]
    kept: tuple[Value, ...] = ()


@dataclass(eq=False)
class Plan:
    """The programs of one rollout. ``versions``: forward and backward in one arena, for different layouts of gradients, the latest of which
    is run; ``apart``: backward passes that overwrite nothing that forward kept, by layouts of gradients."""

    lowering: Lowering
    states: list[View]
    forward: tuple[Instr, ...]
    versions: list[Passes]
    apart: dict[GradLayouts, Passes] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _alone: Passes | None = None

    def version_of(self, arena: Tensor) -> Passes:
        """The version whose forward pass ran in an arena. (Its size tells: places are multiples of 64 bytes.)"""
        return self.versions[arena.numel() % ALIGNMENT]

    @property
    def statistics(self) -> dict[str, tuple[View, View]]:
        """Where means and unbiased variances of batch norms go."""
        return self.lowering.rules.statistics

    def expect(self, layouts: GradLayouts) -> None:
        """Later rollouts are placed for gradients of these layouts."""
        with self.lock:
            if self.versions[-1].layouts != layouts and len(self.versions) < _MOST_VERSIONS:
                self.versions.append(_together(self.lowering, self.forward, layouts, len(self.versions)))

    def backward_apart(self, layouts: GradLayouts) -> Passes:
        """A backward pass in an arena of its own."""
        with self.lock:
            if layouts not in self.apart:
                instrs, gradients = _walk_back(self.lowering, layouts, preserve=True)
                values = {v.value for i in self.forward for v in (*i.reads, *i.writes) if v.value.role is Role.ARENA}
                offsets, nbytes = place(instrs, fixed=frozenset(values))
                kept = dict.fromkeys(v.value for i in instrs for v in i.reads if v.value in values)
                self.apart[layouts] = Passes(Executable(Program(tuple(instrs), offsets, nbytes, 0)), layouts, gradients, tuple(kept))
            return self.apart[layouts]

    def forward_alone(self) -> Passes:
        """A forward pass that leaves what any backward pass reads as tensors: the values that the one of all gradients reads."""
        with self.lock:
            if self._alone is None:
                kept: tuple[Value, ...] = ()
                if self.lowering.recording:
                    kept = self.backward_apart(self.versions[0].layouts).kept
                instrs = (*_zero_gaps(self.forward, kept), *self.forward)
                offsets, nbytes = place(instrs, fixed=frozenset(kept))
                program = Program(instrs, offsets, nbytes, len(instrs))
                self._alone = Passes(Executable(program), (), {}, kept)
            return self._alone


def _zero_gaps(forward: Sequence[Instr], kept: Sequence[Value]) -> list[Instr]:
    """Values that others see are written whole, so that they are the same in every run: windows of which some slots hold nothing."""
    written = {v: {(w.offset, w.numel) for i in forward for w in i.writes if w.value is v} for v in kept}
    b = Builder()
    for value, parts in written.items():
        if sum(numel for _, numel in parts) < math.prod(value.shape):
            b.emit("fill", out=whole(value), value=0.0)
    return b.instrs


def _walk_back(lowering: Lowering, layouts: GradLayouts, *, preserve: bool) -> tuple[list[Instr], dict[str, View]]:
    """The instructions of a backward pass, and the gradients."""
    b, record = lowering.b, lowering.schedule.record
    grads = [
        None if one is None else b.external(Role.GRADIENT, f"{name} gradient", *_split(one), source=name)
        for name, one in zip(record, layouts, strict=True)
    ]
    prepared, before = lowering.prepared(), len(b.instrs)
    gradients = Adjoint(lowering, grads, preserve=preserve).run()
    instrs = b.instrs[before:]
    del b.instrs[before:]
    lowering.restore(prepared)
    return instrs, gradients


def _together(lowering: Lowering, forward: Sequence[Instr], layouts: GradLayouts, version: int) -> Passes:
    """Forward, and backward if gradients are wanted, in one arena."""
    backward, gradients = _walk_back(lowering, layouts, preserve=False) if lowering.recording else ([], {})
    instrs = (*forward, *backward)
    offsets, nbytes = place(instrs)
    return Passes(Executable(Program(instrs, offsets, nbytes + version, len(forward))), layouts, gradients)


def _split(one: Layout) -> tuple[Shape, torch.dtype, Shape]:
    shape, strides, dtype = one
    return shape, dtype, strides


def default_gradients(states: Sequence[View]) -> GradLayouts:
    """Gradients as most losses give them: of all recorded states, in their layout [T', N, C, H, W]."""
    layouts = []
    for state in states:
        seen = state.permute(0, 1, 4, 2, 3)
        strides = tuple(1 if n == 1 else s for n, s in zip(seen.shape, seen.strides, strict=True))
        layouts.append((seen.shape, strides, seen.dtype))
    return tuple(layouts)


_MOST_PLANS = 64
_MOST_VERSIONS = 8  # at most ALIGNMENT
_plans: OrderedDict[Hashable, Plan] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Request:
    """What a rollout is asked for; of tensors only the layouts count.

    ``wanted``: names of the inputs and parameters whose gradients are. ``training``: batch norms use the batch.
    """

    schedule: Schedule
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    wanted: frozenset[str]
    engine: str
    training: bool

    def key(self) -> Hashable:
        """Of requests that have the same plan."""
        example = next(iter(self.inputs.values()))
        layouts = tuple(layout(x) for x in self.inputs.values()), tuple(layout(p) for p in self.parameters.values())
        isa = core.isa() if core.unavailable is None else None
        machine = (example.device, core.on_device(example), isa, torch.get_num_threads())
        return self.schedule, layouts, self.wanted, self.engine, self.training, machine


def plan_of(request: Request) -> Plan:
    """The plan of a rollout on tensors like these, made now or found."""
    key = request.key()
    with _lock:
        found = _plans.get(key)
        if found is not None:
            _plans.move_to_end(key)
            return found
    made = make_plan(request)
    with _lock:
        found = _plans.setdefault(key, made)
        while len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
        return found


def make_plan(request: Request) -> Plan:
    """Plan a rollout."""
    schedule, inputs = request.schedule, request.inputs
    name, example = next(iter(inputs.items()))
    frames = next(node.frames for node in schedule.network.inputs if node.name == name)
    on_device = core.on_device(example)
    samples = int(example.shape[1 if frames else 0])
    setting = Setting(samples, example.dtype, example.device, on_device, request.engine, request.wanted, request.training)
    b = Builder(on_device)

    def views(role: Role, tensors: Mapping[str, Tensor]) -> dict[str, View]:
        return {n: b.external(role, n, *_split(layout(t))) for n, t in tensors.items()}

    lowering = Lowering(b, schedule, views(Role.INPUT, inputs), views(Role.PARAMETER, request.parameters), setting)
    states = lowering.lower()
    forward = tuple(b.instrs)
    return Plan(lowering, states, forward, [_together(lowering, forward, default_gradients(states), 0)])


def release_memory() -> int:
    """Give back to the system what rollouts keep for the next one: plans, packed weights, and buffers that no tensor uses.

    Returns: the bytes given back. The next rollout takes and makes them anew.
    """
    with _lock:
        _plans.clear()
    return release_packed()
