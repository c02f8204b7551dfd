"""Calls of the native core and of PyTorch, noted as they run, to be run again without the Python that led to them.

A rollout is hundreds of short calls, and the Python between them runs on one thread. Shapes decide all of it: with the same shapes, layouts
and parameters the same calls follow each other. A :class:`Recorder` notes them, with every buffer taken from a region of its own;
:meth:`Recorder.program` makes of them one Python function of straight lines. What differs from run to run, inputs and results, is given to
that function; everything else is a constant in it. Between which calls a buffer holds something is known then, so they are placed anew, as
closely as that allows (:mod:`rnndyn_fast.ops.placement`).

What cannot be noted (a value read back into Python) makes the recording fail, which costs nothing but the attempt: it ran as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from rnndyn_fast.ops.buffers import CAN_GIVE_BACK, Region, empty, taking_from
from rnndyn_fast.ops.giving_back import PIECE, given_back
from rnndyn_fast.ops.placement import Life, placed
from rnndyn_fast.ops.places import Address, Place, Rooms, Strided, first_element, places_in, storage_of
from rnndyn_fast.ops.program import Code, Layout, Program

_active = threading.local()


def recorder() -> Recorder | None:
    """The one that notes this thread's calls."""
    return getattr(_active, "recorder", None)


def address(tensor: Tensor) -> int:
    """Of a tensor's first element; the only way to one that is for the core."""
    noting = recorder()
    return first_element(tensor) if noting is None else noting.address(tensor)


def empty_result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor that outlives the rollout: a result."""
    noting = recorder()
    return empty(shape, dtype) if noting is None else noting.result(shape, dtype)


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
        self._layouts: list[Layout] = []
        self._fixed = {storage_of(t) for t in fixed}
        self._lasting: dict[int, int] = {}  # buffers that are results -> number as what is given
        self._made: list[tuple[int, torch.dtype]] = []  # bytes and dtypes of results that lie elsewhere from the start: given last
        self._alive: list[Tensor] = []  # those results: nothing else lies there as long as calls are noted
        self._steps: list[tuple[Any, ...]] = []
        self._earlier = 0  # buffers of earlier phases
        self._phases: list[tuple[Program, list[tuple[Any, ...]], list[Layout]]] = []
        self._kept: set[int] = set()  # buffers that nothing may take the place of
        self._held: set[int] = set()
        self.marks: list[Mark] = []
        self.give([*given, *fixed])

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Further tensors that change from run to run. Those that share a storage do so in every run (:func:`layout` tells)."""
        before = set(self._given)
        for t in tensors:
            storage = storage_of(t)
            if storage in before:
                self.failed = "two of its arguments lie in one storage"
            self._given.setdefault(storage, len(self._starts))
            self._starts.append(first_element(t))
            self._layouts.append((tuple(t.shape), t.stride(), t.dtype))

    def result(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor, of which each run gets another one."""
        with self.paused():
            found = empty(shape, dtype)
        self.give([found.flatten()])
        self._made.append((found.nbytes, dtype))
        self._alive.append(found)
        return found

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
        storage = storage_of(tensor)
        first = storage - self.region.start
        if first in self._taken:
            return Place("taken", self._taken[first], first_element(tensor) - storage)
        if storage in self._given and storage not in self._fixed:
            number = self._given[storage]
            return Place("given", number, first_element(tensor) - self._starts[number])
        return Place("fixed", -1, first_element(tensor))

    def address(self, tensor: Tensor) -> Address:
        """Of a tensor, for the core."""
        found = Address(first_element(tensor))
        found.place = self.place(tensor)
        storage = storage_of(tensor)
        if found.place.kind == "fixed" and storage not in self._fixed and storage not in self._held:
            self._held.add(storage)
            self._steps.append(("hold", tensor))
        return found

    def mark(self, weight: Tensor, fingerprint: tuple[int, int]) -> None:
        """The program is right as long as this weight is what it is now."""
        if not weight.is_contiguous() or storage_of(weight) not in self._fixed:
            self.failed = "a weight that is packed ahead is no parameter"
        self.marks.append((first_element(weight), weight.nbytes, fingerprint))

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
        self._steps.append(("launch", function, tuple(Rooms(next(rooms)) if callable(a) else a for a in args)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's, and note it where it computes."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        given = {storage_of(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if writes:
            self._steps.append(("torch", func, *self._frozen(args, kwargs)))
            return result
        if not results:
            if result is not None:
                self.failed = f"{name} gives a value to Python"
            return result
        if all(storage_of(t) in given for t in results):
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
        elif name in ("aten::clone", "aten::contiguous"):  # (the latter, whole, in inference mode)
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
        storage = storage_of(t)
        if storage in self._fixed and place.kind == "fixed":
            number = self._given[storage]
            return Strided(Place("given", number, first_element(t) - self._starts[number]), tuple(t.shape), t.stride(), t.dtype)
        return Strided(place, tuple(t.shape), t.stride(), t.dtype, t if place.kind == "fixed" else None)

    # ---------------------------------------------------------------- programs

    def kept(self, tensor: Tensor) -> Strided:
        """A tensor, contiguous and no result, that lies where :meth:`settled` tells in every run, until the end of the last phase."""
        place = self.place(tensor)
        if place.kind != "taken" or place.number in self._lasting or not tensor.is_contiguous() or tensor.numel() == 0:
            self.failed = "what is kept changes its place"
        self._kept.add(place.number)
        return Strided(place, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def program(self, results: Sequence[Tensor | None], *, last: bool = True) -> Program | None:
        """What was noted since the last one, whose results lie where these lie; None where that cannot be.

        The buffers of the results are given to the programs of later phases. Programs can run when the ``last`` one is made.
        """
        steps, self._steps = self._steps, []
        elsewhere, self._made = self._made, []
        earlier, self._earlier = self._earlier, len(self._sizes)
        first = len(self._starts) - len(elsewhere)  # (nothing is given between a phase's first result and its end)
        made: dict[int, tuple[int, torch.dtype]] = {}
        found: list[tuple[int, Strided] | None] = []
        for result in results:
            if result is None:
                found.append(None)
                continue
            where = self._strided(result)
            number = where.place.number
            if where.place.kind == "given" and number >= first:
                found.append((number - first, where))
                continue
            if where.place.kind != "taken" or number < earlier or made.get(number, (0, where.dtype))[1] != where.dtype:
                self.failed = "a result is no new tensor"
                return None
            made.setdefault(number, (self._sizes[number][1], where.dtype))
            found.append((len(elsewhere) + list(made).index(number), where))
        count = len(self._starts)
        self._lasting.update({number: count + k for k, number in enumerate(made)})
        for nbytes, dtype in made.values():
            self._starts.append(0)
            self._layouts.append(((nbytes // dtype.itemsize,), (1,), dtype))
        if self.failed:
            return None
        program = Program([*elsewhere, *made.values()], found)
        self._phases.append((program, steps, list(self._layouts)))
        if last:
            self._finish()
        return None if self.failed else program

    def _finish(self) -> None:
        """Place the buffers, and make the code of all phases."""
        recorded = range(self.region.start, self.region.start + max((first + nbytes for first, nbytes in self._sizes), default=0))
        back, number = self._arrange(), 0
        for program, steps, layouts in self._phases:
            program.gives_back = bool(back)
            code = Code(self.region, layouts, self.settled, recorded)
            for step in steps:
                if number in back:
                    code.add(("launch", self.region.give_back_ranges, (back[number],)))
                code.add(step)
                number += 1
            program.run = code.function()
            self.failed = self.failed or code.failed

    def _arrange(self) -> dict[int, list[tuple[int, int]]]:
        """Place the buffers. Returns the parts of the region that are given back to the system before some of the steps."""
        lives: dict[int, tuple[int, int]] = {}  # first and last step
        results: dict[int, tuple[int, int]] = {}  # bytes and first step
        steps = [step for _, some, _ in self._phases for step in some]
        for k, step in enumerate(steps):
            for place in places_in(step[2:]):
                if place.kind == "taken" and place.number in self._lasting:
                    results.setdefault(place.number, (self._sizes[place.number][1], k))
                elif place.kind == "taken":
                    lives[place.number] = lives.get(place.number, (k, k))[0], k
        lives.update({number: (lives.get(number, (0, 0))[0], len(steps)) for number in self._kept})
        buffers = [Life(self._sizes[number][1], *life) for number, life in lives.items()]
        found, end = placed(buffers)
        self.region.reach(end)
        for number, first in zip(lives, found, strict=True):
            self._sizes[number] = first, self._sizes[number][1]
        if not CAN_GIVE_BACK:
            return {}
        return given_back(buffers, found, list(results.values()), len(steps), -self.region.start % PIECE)

    def returned(self, result: Tensor) -> Tensor:
        """A result as its receiver may have it: a copy of what lies in the region."""
        return result.clone() if self.place(result).kind == "taken" else result

    def settled(self, place: Place) -> Place:
        """A place, as a program knows it: buffers of results are given, others lie at fixed addresses."""
        if place.kind != "taken":
            return place
        if place.number in self._lasting:
            return Place("given", self._lasting[place.number], place.offset)
        return Place("fixed", -1, self.region.start + self._sizes[place.number][0] + place.offset)


def _out_variant(func: Any, count: int) -> tuple[list[str], Any] | None:
    """The operation that writes where it is told, and the names of where."""
    own = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        if (
            len(outs) == count == len(func._schema.returns)
            and [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out] == own
        ):
            return outs, other
    return None
