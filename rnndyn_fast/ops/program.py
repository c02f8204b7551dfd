"""Recorded calls as one Python function of straight lines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.buffers import Region, empty
from rnndyn_fast.ops.places import Address, Place, Rooms, Strided, first_element

_PART = 64  # calls in one function: compiling many at once takes megabytes, which the process keeps


class Program:
    """A recorded run. ``given``: the tensors that it was recorded with, replaced by others of the same layout."""

    run: Callable[..., None]  # (comes last)
    gives_back = False  # memory of the stage on the way, for results

    def __init__(self, made: Sequence[tuple[int, torch.dtype]], results: Sequence[tuple[int, Strided] | None]) -> None:
        self._made, self._results = made, results

    def __call__(self, given: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Run it. Returns its results, new tensors each time, and the buffers that they lie in."""
        made = [empty((nbytes // dtype.itemsize,), dtype) for nbytes, dtype in self._made]
        with torch.autocast("cpu", enabled=False):  # (casts are among what was noted)
            self.run(*given, *made)
        found: dict[tuple[int, Strided] | None, Tensor | None] = {None: None}  # (what was one tensor is one again)
        for result in self._results:
            if result is not None and result not in found:
                number, where = result
                found[result] = made[number].as_strided(where.size, where.stride, where.place.offset // where.dtype.itemsize)
        return [found[result] for result in self._results], made


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides


class Code:
    """Lines of a program.

    Args:
        region: where its buffers are.
        layouts: of what it is given.
        settled: a recorded place as the program knows it: "given", or "fixed" with the address as offset.
        recorded: addresses of the region as the run was noted.
    """

    def __init__(self, region: Region, layouts: Sequence[Layout], settled: Callable[[Place], Place], recorded: range) -> None:
        self._region, self._layouts, self._settled, self._recorded = region, layouts, settled, recorded
        self.failed: str | None = None
        self._names: dict[str, Any] = {"first_element": first_element}
        self._known: dict[int, str] = {}  # functions, by id
        self._calls: list[list[str]] = []  # lines of each
        self._addresses: set[int] = set()  # numbers of what is given whose address is read

    def add(self, step: tuple[Any, ...]) -> None:
        """One call."""
        kind, what, *rest = step
        if kind == "hold":
            self._constant(what)
            return
        args, kwargs, *copied = rest if kind != "launch" else (*rest, {})
        parts = [self._argument(a) for a in args] + [f"{name}={self._argument(value)}" for name, value in kwargs.items()]
        call = f"{self._function(what)}({', '.join(parts)})"
        if kind != "copied":
            self._calls.append([call])
            return
        places = copied[0]
        if len(what._schema.returns) == 1 and not str(what._schema.returns[0].type).startswith("List"):
            self._calls.append([f"r = {call}", f"{self._argument(places[0])}.copy_(r)"])
        else:
            copies = [f"{self._argument(place)}.copy_(r[{k}])" for k, place in enumerate(places)]
            self._calls.append([f"r = {call}", "r = [t for t in r if t is not None]", *copies])

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
        return self._source(value)[0] or self._constant(self._value(value))

    def _source(self, value: Any) -> tuple[str, bool]:
        """As source, empty where it has none; and whether it is a constant."""
        if type(value) is int and value in self._recorded:
            self.failed = "an address that does not know its place"
        if isinstance(value, Address):
            place = self._settled(value.place)
            if place.kind == "fixed":
                return str(place.offset), True
            self._addresses.add(place.number)
            return f"a{place.number}+{place.offset}", False
        if isinstance(value, Strided):
            place = self._settled(value.place)
            return ("", True) if place.kind == "fixed" else (self._tensor(place, value), False)
        if isinstance(value, Rooms):
            parts = [self._source(a) for a in value]
            if not all(constant for _, constant in parts):
                self.failed = "scratch is a result"
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
            return self._settled(value.place).offset
        if isinstance(value, Strided):
            if value.tensor is not None:
                return value.tensor
            return self._region.alias(self._settled(value.place).offset, value.size, value.stride, value.dtype)
        if isinstance(value, Rooms):
            return _taker([self._value(a) for a in value])
        if isinstance(value, list | tuple):
            return type(value)(self._value(v) for v in value)
        return value

    def _tensor(self, place: Place, value: Strided) -> str:
        size, stride, dtype = self._layouts[place.number]
        name = f"x{place.number}"
        if dtype != value.dtype or place.offset % dtype.itemsize:
            self.failed = "what is given is read as another dtype"
        if (size, stride, 0) == (value.size, value.stride, place.offset):
            return name
        return f"{name}.as_strided({value.size}, {value.stride}, {name}.storage_offset()+{place.offset // dtype.itemsize})"

    def function(self) -> Callable[..., None]:
        """Of what is given."""
        given = ", ".join(f"x{k}" for k in range(len(self._layouts)))
        known = ", ".join([given, *(f"a{k}" for k in sorted(self._addresses))])
        lines = [f"def run({given}):", *(f"    a{k} = first_element(x{k})" for k in sorted(self._addresses))]
        for first in range(0, len(self._calls), _PART):
            part = f"part{first}"
            calls = [f"    {line}" for call in self._calls[first : first + _PART] for line in call]
            exec("\n".join([f"def {part}({known}):", *calls]), self._names)
            lines.append(f"    {part}({known})")
        exec("\n".join([*lines, "    return"]), self._names)
        run: Callable[..., None] = self._names["run"]
        return run


def _taker(rooms: Sequence[int]) -> Callable[[int], int]:
    """Gives out the same addresses in every run."""
    if len(rooms) == 1:
        (only,) = rooms
        return lambda _: only
    again = itertools.cycle(rooms)
    return lambda _: next(again)
