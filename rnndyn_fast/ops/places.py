"""Where tensors lie: their addresses, which are taken in this file alone, and their places as recorded calls know them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def first_element(tensor: Tensor) -> int:
    """Its address. Whoever uses it holds the tensor meanwhile."""
    return tensor.data_ptr()


def storage_of(tensor: Tensor) -> int:
    """The address of what a tensor and its views lie in."""
    return tensor.untyped_storage().data_ptr()


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
        number, start = first.setdefault(storage_of(t), (k, first_element(t)))
        found.append((t.shape, t.stride(), t.dtype, number, first_element(t) - start))
    return tuple(found)


class Address(int):
    """An address that knows its place."""

    place: Place

    def __add__(self, other: int) -> Address:
        moved = Address(int(self) + other)
        moved.place = Place(self.place.kind, self.place.number, self.place.offset + other)
        return moved

    __radd__ = __add__


class Rooms(tuple[int, ...]):
    """The addresses that a launch's scratch had."""


def places_in(arguments: Any) -> Iterator[Place]:
    """Of all addresses and tensors among the arguments of a recorded call."""
    if isinstance(arguments, Address | Strided):
        yield arguments.place
    elif isinstance(arguments, dict):
        yield from places_in(list(arguments.values()))
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from places_in(argument)
