"""Running a program: its instructions bound to memory once, then called one after another.

On the CPU launches are made when the program is bound to an arena and to parameters, and the core runs lists of them; what differs from
call to call (inputs, results, gradients) is put in there at each call. A binding holds no tensor of the caller's. On other devices every
instruction runs on tensors: there, CUDA graphs repeat the launches.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.addresses import first_element, tensor_at
from rnndyn_fast.ops.buffers import Region, alias_in_regions, lies_in_region
from rnndyn_fast.ops.core import LaunchList, needs_much_scratch
from rnndyn_fast.ops.launch import Recorder, recorded
from rnndyn_fast.program.ir import Instr, Program, Role, Value, View, instr_lives, map_views
from rnndyn_fast.program.kind_table import Call
from rnndyn_fast.program.kinds import KINDS

Tensors = Mapping[Value, Tensor]  # of what the caller provides, and the results
_MOST_BINDINGS = 4  # of a program: to arenas and parameters at other addresses


def tensor_of(view: View, base: Tensor) -> Tensor:
    """A view of a value as a tensor; ``base``: the value, or any tensor that begins where it does."""
    return base.as_strided(view.shape, view.strides, base.storage_offset() + view.offset)


@dataclass(frozen=True)
class Memory:
    """What a pass runs in: its arena, and tensors of the caller's."""

    arena: Tensor
    tensors: Tensors


def in_arena(program: Program, value: Value, arena: Tensor) -> Tensor:
    """A value of the arena, flat."""
    first = program.offsets[value.number]
    return arena[first : first + value.nbytes].view(value.dtype)


def run_on_tensors(program: Program, memory: Memory, *, backward: bool) -> None:
    """Run a pass with a tensor for every operand."""

    def tensor(view: View) -> Tensor:
        given = memory.tensors.get(view.value)
        return tensor_of(view, in_arena(program, view.value, memory.arena) if given is None else given)

    for instr in program.part(backward=backward):
        KINDS[instr.kind].run(**map_views(instr.operands, tensor))


class _Placeholders:
    """Addresses that stand for tensors which differ from call to call."""

    _region: Region | None = None

    def __init__(self, values: Sequence[Value]) -> None:
        sizes = [-(-_span(v) // 64) * 64 + 64 for v in values]
        if _Placeholders._region is None or _Placeholders._region.nbytes < sum(sizes):
            _Placeholders._region = Region(max(sum(sizes), 1 << 30))
        region = _Placeholders._region
        self.values = list(values)
        self.starts, first = [], region.start
        for size in sizes:
            self.starts.append(first)
            first += size
        self.end = first
        self._bases = {
            v: region.alias(start, (_span(v) // v.dtype.itemsize,), (1,), v.dtype) for v, start in zip(values, self.starts, strict=True)
        }

    def base(self, value: Value) -> Tensor:
        return self._bases[value]

    def locate(self, address: int) -> int | tuple[int, int]:
        """An address, or the number of the value that it stands for, and how many bytes from its beginning."""
        if not self.starts or not self.starts[0] <= address < self.end:
            return address
        number = bisect_right(self.starts, address) - 1
        return number, address - self.starts[number]


def _span(value: Value) -> int:
    """Bytes from a value's first element to the end of its last one."""
    if value.strides is None:
        return max(value.nbytes, value.dtype.itemsize)
    return (1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))) * value.dtype.itemsize


Patched = Callable[[Sequence[int], Tensors], object]  # of the addresses and the tensors of this call


class Binding:
    """Instructions of a program bound to an arena and to the addresses of parameters and packed weights: launches that follow one another
    are one call of the native core."""

    def __init__(self, program: Program, memory: Memory, *, backward: bool) -> None:
        changing = [v for v in memory.tensors if changes(v)]
        self._places = places = _Placeholders(changing)
        self._steps: list[Patched] = []
        start, known = first_element(memory.arena), set(changing)
        fixed = {v: tensor_at(first_element(t), _span(v), v.dtype) for v, t in memory.tensors.items() if v not in known}

        def tensor(view: View) -> Tensor:
            value = view.value
            if value in known:
                base = places.base(value)
            elif value in fixed:
                base = fixed[value]
            else:
                base = alias_in_regions(start + program.offsets[value.number], value.nbytes, value.dtype)
            return tensor_of(view, base)

        recorder = Recorder(places.locate)
        for instr in program.part(backward=backward):
            kind = KINDS[instr.kind]
            if kind.launch:
                with recorded(recorder):
                    kind.run(**map_views(instr.operands, tensor))
                continue
            self._add_launches(recorder)
            if any(view.value in known for view in (*instr.reads, *instr.writes)):
                self._steps.append(_call_on_tensors(instr, tensor, known))
            else:
                operands = map_views(instr.operands, tensor)
                call = kind.function(**operands) if kind.prepared else partial(kind.function, **operands)
                self._steps.append(_Fixed(call))
        self._add_launches(recorder)

    def _add_launches(self, recorder: Recorder) -> None:
        """One call of the core for all, but that a launch which takes much scratch takes it for itself."""
        for much, group in groupby(recorder.launches, needs_much_scratch):
            launches = list(group)
            self._steps += [_Launches(LaunchList(some)) for some in ([[one] for one in launches] if much else [launches])]
        recorder.launches.clear()

    def run(self, tensors: Tensors) -> None:
        """Call them all."""
        addresses = [first_element(tensors[v]) for v in self._places.values]
        for step in self._steps:
            step(addresses, tensors)


@dataclass(frozen=True)
class _Fixed:
    """A call that is the same every time."""

    call: Call

    def __call__(self, addresses: Sequence[int], tensors: Tensors) -> None:
        self.call()


@dataclass(frozen=True)
class _Launches:
    launches: LaunchList

    def __call__(self, addresses: Sequence[int], tensors: Tensors) -> None:
        self.launches(addresses)


def _call_on_tensors(instr: Instr, tensor: Callable[[View], Tensor], known: set[Value]) -> Patched:
    """An instruction that PyTorch runs on tensors of the caller's, which are not held between calls."""
    run = KINDS[instr.kind].run
    held = {id(view): tensor(view) for view in (*instr.reads, *instr.writes) if view.value not in known}

    def call(addresses: Sequence[int], tensors: Tensors) -> None:
        def find(view: View) -> Tensor:
            found = held.get(id(view))
            return tensor_of(view, tensors[view.value]) if found is None else found

        run(**map_views(instr.operands, find))

    return call


def changes(value: Value) -> bool:
    """Whether a tensor of the caller's lies elsewhere in every call, as far as is known."""
    return value.role in (Role.INPUT, Role.RESULT, Role.GRADIENT, Role.ARENA)


class Executable:
    """A program and its bindings. Several threads may run it at once, each in memory of its own."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.needs = {backward: _externals(program, backward=backward) for backward in (False, True)}
        self._bindings: OrderedDict[Hashable, Binding] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def lives(self) -> dict[Value, tuple[int, int]]:
        """The first and the last instruction that touches each value of the arena."""
        return instr_lives(self.program.instrs)

    def run(self, memory: Memory, *, backward: bool = False) -> None:
        """Run the forward or the backward pass."""
        if core.on_device(memory.arena) or not lies_in_region(memory.arena):
            run_on_tensors(self.program, memory, backward=backward)
            return
        fixed = tuple(first_element(t) for v, t in memory.tensors.items() if not changes(v))
        key = (backward, first_element(memory.arena), fixed)
        with self._lock:
            binding = self._bindings.get(key)
            if binding is None:
                with torch.inference_mode(False):  # (whoever comes first, training runs it too)
                    binding = self._bindings[key] = Binding(self.program, memory, backward=backward)
                while len(self._bindings) > 2 * _MOST_BINDINGS:
                    self._bindings.popitem(last=False)
            else:
                self._bindings.move_to_end(key)
        binding.run(memory.tensors)


def _externals(program: Program, *, backward: bool) -> list[Value]:
    """What the caller provides, or gets."""
    instrs = program.part(backward=backward)
    found = dict.fromkeys(v.value for i in instrs for v in (*i.reads, *i.writes) if v.value.number not in program.offsets)
    return list(found)
