"""Running a program: its instructions bound to memory once, then called one after another.

On the CPU a launch's arguments are worked out when the program is bound to an arena and to parameters; what differs from call to call
(inputs, results, gradients) is put in at each call. A binding holds no tensor of the caller's. On other devices every instruction runs on
tensors: there, CUDA graphs repeat the launches.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch, core_calls
from rnndyn_fast.ops.addresses import first_element, tensor_at
from rnndyn_fast.ops.buffers import Region, alias_in_regions, lies_in_region
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

    def find(self, address: int) -> tuple[int, int] | None:
        """Which value an address belongs to, and how many bytes from its begin."""
        if not self.starts or not self.starts[0] <= address < self.end:
            return None
        number = bisect_right(self.starts, address) - 1
        return number, address - self.starts[number]


def _span(value: Value) -> int:
    """Bytes from a value's first element to the end of its last one."""
    if value.strides is None:
        return max(value.nbytes, value.dtype.itemsize)
    return (1 + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))) * value.dtype.itemsize


Patch = Callable[[Sequence[int]], Any]


def _patch(operand: Any, places: _Placeholders) -> Patch | None:
    """A function of the addresses of this call that gives the operand; None where it is the same in every call."""
    if type(operand) is int:
        found = places.find(operand)
        if found is None:
            return None
        number, offset = found
        return lambda addresses: addresses[number] + offset
    if type(operand) in (list, tuple):
        parts = [_patch(part, places) for part in operand]
        if all(part is None for part in parts):
            return None
        make = type(operand)
        pairs = list(zip(operand, parts, strict=True))
        return lambda addresses: make([value if part is None else part(addresses) for value, part in pairs])
    return None


Patched = Callable[[Sequence[int], Tensors], object]  # of the addresses and the tensors of this call
Step = list[Call] | Patched  # calls that are the same every time, or one that is not


def _launch_and_release(function: Callable[..., None], *args: Any) -> None:
    function(*args)
    _launch.release_scratch()


def _launch_call(function: Callable[..., None], args: tuple[Any, ...], places: _Placeholders) -> Call | Patched:
    patch = _patch(args, places)
    if any(callable(a) for a in args):  # (it takes scratch)
        function = partial(_launch_and_release, function)
    if patch is None:
        return partial(function, *args)
    return _PatchedLaunch(function, patch)


@dataclass(frozen=True)
class _PatchedLaunch:
    """A launch some of whose addresses differ from call to call."""

    function: Callable[..., None]
    patch: Patch

    def __call__(self, addresses: Sequence[int], tensors: Tensors) -> None:
        self.function(*self.patch(addresses))


class Binding:
    """Instructions of a program bound to an arena and to the addresses of parameters and packed weights."""

    def __init__(self, program: Program, memory: Memory, *, backward: bool) -> None:
        changing = [v for v in memory.tensors if changes(v)]
        self._places = _Placeholders(changing)
        self._steps: list[Step] = []
        start, known = first_element(memory.arena), set(changing)
        fixed = {v: tensor_at(first_element(t), _span(v), v.dtype) for v, t in memory.tensors.items() if v not in known}

        def tensor(view: View) -> Tensor:
            value = view.value
            if value in known:
                base = self._places.base(value)
            elif value in fixed:
                base = fixed[value]
            else:
                base = alias_in_regions(start + program.offsets[value.number], value.nbytes, value.dtype)
            return tensor_of(view, base)

        for instr in program.part(backward=backward):
            kind = KINDS[instr.kind]
            if kind.launch:
                for launch in _launches(instr, tensor):
                    call = _launch_call(*launch, self._places)
                    self._add(call, fixed=not isinstance(call, _PatchedLaunch))
            elif any(view.value in known for view in (*instr.reads, *instr.writes)):
                self._add(_call_on_tensors(instr, tensor, known), fixed=False)
            else:
                operands = map_views(instr.operands, tensor)
                self._add(kind.function(**operands) if kind.prepared else partial(kind.function, **operands), fixed=True)

    def _add(self, call: Any, *, fixed: bool) -> None:
        if not fixed:
            self._steps.append(call)
        elif self._steps and isinstance(self._steps[-1], list):
            self._steps[-1].append(call)
        else:
            self._steps.append([call])

    def run(self, tensors: Tensors) -> None:
        """Call them all."""
        addresses = [first_element(tensors[v]) for v in self._places.values]
        for step in self._steps:
            if isinstance(step, list):
                for call in step:
                    call()
            else:
                step(addresses, tensors)


def _launches(instr: Instr, tensor: Callable[[View], Tensor]) -> list[core_calls.Call]:
    with core_calls.taken_down() as calls:
        KINDS[instr.kind].run(**map_views(instr.operands, tensor))
    return calls


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
        if _launch.on_device(memory.arena) or not lies_in_region(memory.arena):
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
