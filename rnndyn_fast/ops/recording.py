"""Calls of the native core and of PyTorch, noted as they run, to be run again without the Python that led to them.

A rollout is hundreds of short calls, and the Python between them runs on one thread. Shapes decide all of it: with the same shapes, layouts
and parameters the same calls follow each other. A :class:`Recorder` notes them, with every buffer taken from a region of its own, in which
addresses stay the same; :meth:`Recorder.program` makes of them one Python function of straight lines. What differs from run to run, inputs
and results, is given to that function; everything else is a constant in it.

What cannot be noted (a value read back into Python) makes the recording fail, which costs nothing but the attempt: it ran as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from rnndyn_fast.ops.buffers import Region, empty, taking_from

_active = threading.local()


def recorder() -> Recorder | None:
    """The one that notes this thread's calls."""
    return getattr(_active, "recorder", None)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in a ``kind`` of storage ("given": an argument of the program, "taken": a buffer, "fixed": memory that stays as
    it is), which one of these, and how many bytes from its begin."""

    kind: str
    number: int
    offset: int


@dataclass(frozen=True)
class Strided:
    """A tensor at a place."""

    place: Place
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None = None  # itself, where it is fixed


def layout(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What a program depends on of tensors whose values change: layouts, and which of them lie in one storage, how far apart."""
    first: dict[int, tuple[int, int]] = {}
    found: list[Hashable] = []
    for k, t in enumerate(tensors):
        if t is None:
            found.append(None)
            continue
        number, start = first.setdefault(t.untyped_storage().data_ptr(), (k, t.data_ptr()))
        found.append((t.shape, t.stride(), t.dtype, number, t.data_ptr() - start))
    return tuple(found)


class Address(int):
    """An address that knows its place."""

    place: Place

    def __add__(self, other: int) -> Address:
        moved = Address(int(self) + other)
        moved.place = Place(self.place.kind, self.place.number, self.place.offset + other)
        return moved

    __radd__ = __add__


def address(tensor: Tensor) -> int:
    """Of a tensor's first element; the only way to one that is for the core."""
    noting = recorder()
    return tensor.data_ptr() if noting is None else noting.address(tensor)


class Core:
    """The native core's functions, whose calls are noted while there is a recorder."""

    def __init__(self, module: ModuleType) -> None:
        for name, value in vars(module).items():
            launch = callable(value) and ("_float" in name or name in _LAUNCHES)
            setattr(self, name, _noted(value) if launch else value)


_LAUNCHES = (
    "amx_conv", "amx_pack_weight", "amx_weight_grad", "separable_conv", "winograd_conv", "winograd_pack_weight", "winograd_weight_grad",
)  # fmt: skip


def _noted(function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        noting = getattr(_active, "recorder", None)
        if noting is None:
            function(*args)
        else:
            noting.launch(function, args)

    return call


@contextmanager
def unnoted() -> Iterator[None]:
    """What runs here happens once: its results are fixed from then on."""
    noting = recorder()
    if noting is None:
        yield
        return
    with noting.paused():
        yield


class Program:
    """A recorded run. ``given``: the tensors that it was recorded with, replaced by others of the same layout."""

    def __init__(self, run: Callable[..., None], made: Sequence[tuple[int, torch.dtype]], results: Sequence[tuple[int, Strided] | None]) -> None:
        self._run, self._made, self._results = run, made, results

    def __call__(self, given: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Run it. Returns its results, new tensors each time, and the buffers that they lie in."""
        made = [empty((nbytes // dtype.itemsize,), dtype) for nbytes, dtype in self._made]
        self._run(*given, *made)
        found: dict[tuple[int, Strided] | None, Tensor | None] = {None: None}  # (what was one tensor is one again)
        for result in self._results:
            if result is not None and result not in found:
                number, where = result
                found[result] = made[number].as_strided(where.size, where.stride, where.place.offset // where.dtype.itemsize)
        return [found[result] for result in self._results], made


Mark = tuple[int, int, tuple[int, int]]  # where a weight is, its bytes, and their fingerprint


class Recorder(TorchDispatchMode):
    """Notes calls, in one phase or in several (forward and backward) that share buffers.

    Args:
        region: where buffers are taken from; nobody else takes any from there meanwhile.
        fixed: tensors that are where they are in every run (parameters). A tensor of their storage is an argument all the same where
            PyTorch computes with it, so that no program holds them.
        given: what changes from run to run.
    """

    def __init__(self, region: Region, given: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.region = region
        self.failed: str | None = None
        self._taken: dict[int, int] = {}  # first byte -> number of the buffer that lies there
        self._sizes: list[tuple[int, int]] = []  # of each buffer: first byte, and bytes
        self._given: dict[int, int] = {}  # address of a storage -> number
        self._starts: list[int] = []  # of each given tensor
        self._layouts: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self._fixed = {t.untyped_storage().data_ptr() for t in fixed}
        self._lasting: dict[int, int] = {}  # buffers that are results -> number as what is given
        self._steps: list[tuple[Any, ...]] = []
        self._held: set[int] = set()
        self.marks: list[Mark] = []
        self.give([*given, *fixed])

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Further tensors that change from run to run. Those that share a storage do so in every run (:func:`layout` tells)."""
        before = set(self._given)
        for t in tensors:
            storage = t.untyped_storage().data_ptr()
            if storage in before:
                self.failed = "two of its arguments lie in one storage"
            self._given.setdefault(storage, len(self._starts))
            self._starts.append(t.data_ptr())
            self._layouts.append((tuple(t.shape), t.stride(), t.dtype))

    # ---------------------------------------------------------------- noting

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what runs here."""
        before = recorder()
        _active.recorder = self
        try:
            with taking_from(self.region, self._take), self:
                yield
        finally:
            _active.recorder = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing of what runs here, and take buffers from elsewhere."""
        _active.recorder = None
        try:
            with taking_from(None, None), torch.utils._python_dispatch._disable_current_modes():
                yield
        finally:
            _active.recorder = self

    def _take(self, first: int, nbytes: int) -> None:
        self._taken[first] = len(self._sizes)
        self._sizes.append((first, nbytes))

    def place(self, tensor: Tensor) -> Place:
        """Of a tensor."""
        storage = tensor.untyped_storage().data_ptr()
        first = storage - self.region.start
        if first in self._taken:
            return Place("taken", self._taken[first], tensor.data_ptr() - storage)
        if storage in self._given and storage not in self._fixed:
            number = self._given[storage]
            return Place("given", number, tensor.data_ptr() - self._starts[number])
        return Place("fixed", -1, tensor.data_ptr())

    def address(self, tensor: Tensor) -> Address:
        """Of a tensor, for the core."""
        found = Address(tensor.data_ptr())
        found.place = self.place(tensor)
        storage = tensor.untyped_storage().data_ptr()
        if found.place.kind == "fixed" and storage not in self._fixed and storage not in self._held:
            self._held.add(storage)
            self._steps.append(("hold", tensor))
        return found

    def mark(self, weight: Tensor, fingerprint: tuple[int, int]) -> None:
        """The program is right as long as this weight is what it is now."""
        if not weight.is_contiguous() or weight.untyped_storage().data_ptr() not in self._fixed:
            self.failed = "a weight that is packed ahead is no parameter"
        self.marks.append((weight.data_ptr(), weight.nbytes, fingerprint))

    def launch(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Call the core, and note the call."""
        scratch: list[tuple[int, ...]] = []

        def watched(take: Callable[[int], int]) -> Callable[[int], int]:
            scratch.append(())
            number = len(scratch) - 1

            def watch(nbytes: int) -> int:
                found = take(nbytes)
                scratch[number] += (found,)
                return found

            return watch

        function(*(watched(a) if callable(a) else a for a in args))
        rooms = iter(scratch)
        self._steps.append(("launch", function, tuple(_Rooms(next(rooms)) if callable(a) else a for a in args)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's, and note it where it computes."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if writes:
            self._steps.append(("torch", func, *self._frozen(args, kwargs)))
            return result
        if not results:
            if result is not None:
                self.failed = f"{name} gives a value to Python"
            return result
        if all(t.untyped_storage().data_ptr() in given for t in results):
            return result  # views
        rooms: list[Tensor] = []

        def moved(t: Tensor) -> Tensor:
            if t.device.type != "cpu" or t.layout != torch.strided:
                self.failed = f"{name} makes a tensor that is not in the CPU's memory"
                return t
            span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            room = empty((span,), t.dtype).as_strided(t.shape, t.stride())
            rooms.append(room)
            return room

        replaced = tree_map_only(Tensor, moved, result)
        if name.startswith(("aten::empty", "aten::new_empty")):
            return replaced
        for room, t in zip(rooms, results, strict=True):
            room.copy_(t)
        if name in ("aten::zeros", "aten::new_zeros", "aten::zeros_like"):
            self._steps.append(("torch", torch.ops.aten.zero_.default, *self._frozen((rooms[0],), {})))
        elif name == "aten::clone":
            self._steps.append(("torch", torch.ops.aten.copy_.default, *self._frozen((rooms[0], args[0]), {})))
        elif (out := _out_variant(func, len(rooms))) is not None:
            names, operation = out
            self._steps.append(("torch", operation, *self._frozen(args, {**kwargs, **dict(zip(names, rooms, strict=True))})))
        else:
            frozen = self._frozen(args, kwargs)
            self._steps.append(("copied", func, *frozen, [self._strided(room) for room in rooms]))
        return replaced

    def _frozen(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map_only(Tensor, self._strided, (args, kwargs))

    def _strided(self, t: Tensor) -> Strided:
        place = self.place(t)
        storage = t.untyped_storage().data_ptr()
        if storage in self._fixed and place.kind == "fixed":
            number = self._given[storage]
            return Strided(Place("given", number, t.data_ptr() - self._starts[number]), tuple(t.shape), t.stride(), t.dtype)
        return Strided(place, tuple(t.shape), t.stride(), t.dtype, t if place.kind == "fixed" else None)

    # ---------------------------------------------------------------- programs

    def kept(self, tensor: Tensor) -> Strided:
        """Where a tensor, contiguous and no result, lies in every run."""
        place = self.settled(self.place(tensor))
        if place.kind != "fixed" or not tensor.is_contiguous() or tensor.numel() == 0:
            self.failed = "what is kept changes its place"
        return Strided(place, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def program(self, results: Sequence[Tensor | None]) -> Program | None:
        """What was noted since the last one, whose results lie where these lie; None where that cannot be.

        The buffers of the results are given to the programs of later phases.
        """
        steps, self._steps = self._steps, []
        made: dict[int, tuple[int, torch.dtype]] = {}
        found: list[tuple[int, Strided] | None] = []
        for result in results:
            if result is None:
                found.append(None)
                continue
            where = self._strided(result)
            number = where.place.number
            if where.place.kind != "taken" or number in self._lasting or made.get(number, (0, where.dtype))[1] != where.dtype:
                self.failed = "a result is no new tensor"
                return None
            made.setdefault(number, (self._sizes[number][1], where.dtype))
            found.append((list(made).index(number), where))
        count = len(self._starts)
        self._lasting.update({number: count + k for k, number in enumerate(made)})
        for nbytes, dtype in made.values():
            self._starts.append(0)
            self._layouts.append(((nbytes // dtype.itemsize,), (1,), dtype))
        if self.failed:
            return None
        code = _Code(self)
        for step in steps:
            code.add(step)
        return None if self.failed else Program(code.function(count + len(made)), list(made.values()), found)

    def settled(self, place: Place) -> Place:
        """A place, as a program knows it: buffers of results are given, others lie at fixed addresses."""
        if place.kind != "taken":
            return place
        if place.number in self._lasting:
            return Place("given", self._lasting[place.number], place.offset)
        return Place("fixed", -1, self.region.start + self._sizes[place.number][0] + place.offset)

    def layout(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Of what is given."""
        return self._layouts[number]


class _Rooms(tuple[int, ...]):
    """The addresses that a launch's scratch had."""


def _out_variant(func: Any, count: int) -> tuple[list[str], Any] | None:
    """The operation that writes where it is told, and the names of where."""
    own = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        if len(outs) == count == len(func._schema.returns) and [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out] == own:
            return outs, other
    return None


class _Code:
    """Lines of a program."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._names: dict[str, Any] = {}
        self._known: dict[int, str] = {}  # functions, by id
        self._lines: list[str] = []
        self._addresses: set[int] = set()  # numbers of what is given whose address is read

    def add(self, step: tuple[Any, ...]) -> None:
        """One call."""
        kind, what, *rest = step
        if kind == "hold":
            self._constant(what)
        elif kind == "launch":
            (args,) = rest
            self._lines.append(f"{self._function(what)}({', '.join(self._argument(a) for a in args)})")
        else:
            args, kwargs, *copied = rest
            parts = [self._argument(a) for a in args] + [f"{name}={self._argument(value)}" for name, value in kwargs.items()]
            call = f"{self._function(what)}({', '.join(parts)})"
            if kind == "torch":
                self._lines.append(call)
                return
            self._lines.append(f"r = {call}")
            places = copied[0]
            if len(what._schema.returns) == 1 and not str(what._schema.returns[0].type).startswith("List"):
                self._lines.append(f"{self._argument(places[0])}.copy_(r)")
            else:
                self._lines.append("r = [t for t in r if t is not None]")
                self._lines += [f"{self._argument(place)}.copy_(r[{k}])" for k, place in enumerate(places)]

    def _function(self, function: Any) -> str:
        if id(function) not in self._known:
            self._known[id(function)] = self._constant(function)
        return self._known[id(function)]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name

    def _argument(self, value: Any) -> str:
        """As source: a constant, unless it has to do with what is given."""
        text, constant = self._source(value)
        return text if text else self._constant(self._value(value))

    def _source(self, value: Any) -> tuple[str, bool]:
        if isinstance(value, Address):
            place = self._recorder.settled(value.place)
            if place.kind == "fixed":
                return str(place.offset), True
            self._addresses.add(place.number)
            return f"a{place.number}+{place.offset}", False
        if isinstance(value, Strided):
            place = self._recorder.settled(value.place)
            return ("", True) if place.kind == "fixed" else (self._tensor(place, value), False)
        if isinstance(value, _Rooms):
            parts = [self._source(a) for a in value]
            if not all(constant for _, constant in parts):
                self._recorder.failed = "scratch is a result"
            return "", True
        if isinstance(value, list | tuple):
            parts = [self._source(v) for v in value]
            if all(constant for _, constant in parts):
                return "", True
            texts = [text if text and not constant else self._argument(v) for (text, constant), v in zip(parts, value, strict=True)]
            return (f"[{', '.join(texts)}]" if isinstance(value, list) else f"({''.join(t + ',' for t in texts)})"), False
        return repr(value) if value is None or type(value) in (int, bool) else "", True

    def _value(self, value: Any) -> Any:
        """A constant itself."""
        if isinstance(value, Address):
            return self._recorder.settled(value.place).offset
        if isinstance(value, Strided):
            if value.tensor is not None:
                return value.tensor
            return self._recorder.region.alias(self._recorder.settled(value.place).offset, value.size, value.stride, value.dtype)
        if isinstance(value, _Rooms):
            return _taker([self._value(a) for a in value])
        if isinstance(value, list | tuple):
            return type(value)(self._value(v) for v in value)
        return value

    def _tensor(self, place: Place, value: Strided) -> str:
        size, stride, dtype = self._recorder.layout(place.number)
        name = f"x{place.number}"
        if dtype != value.dtype or place.offset % dtype.itemsize:
            self._recorder.failed = "what is given is read as another dtype"
        if (size, stride, 0) == (value.size, value.stride, place.offset):
            return name
        return f"{name}.as_strided({value.size}, {value.stride}, {name}.storage_offset()+{place.offset // dtype.itemsize})"

    def function(self, count: int) -> Callable[..., None]:
        """Of what is given."""
        lines = [f"def run({', '.join(f'x{k}' for k in range(count))}):"]
        lines += [f"    a{k} = x{k}.data_ptr()" for k in sorted(self._addresses)]
        lines += [f"    {line}" for line in self._lines] or ["    pass"]
        exec("\n".join(lines), self._names)
        return self._names["run"]


def _taker(rooms: Sequence[int]) -> Callable[[int], int]:
    """Gives out the same addresses in every run."""
    if len(rooms) == 1:
        (only,) = rooms
        return lambda _: only
    again = iter(())

    def take(_: int) -> int:
        nonlocal again
        found = next(again, None)
        if found is None:
            again = iter(rooms)
            found = next(again)
        return found

    return take
