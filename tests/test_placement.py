"""Where buffers of known lifetimes lie."""

from __future__ import annotations

import random

import pytest
import torch

from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Program
from rnndyn_fast.program.place import place, validate
from rnndyn_fast.program.placement import SMALL, Life, placed


def alive_at_once(lives: list[Life]) -> int:
    return max(sum(life.nbytes for life in lives if life.first <= step <= life.last) for step in {life.first for life in lives})


@pytest.mark.parametrize("unit", [64, 1024, 2 * SMALL])
@pytest.mark.parametrize("seed", range(20))
def test_no_two_that_are_alive_together_share_a_byte(seed: int, unit: int) -> None:
    """Large buffers take little more than is alive at once; small ones, among them or alone, no more than those of one size each."""
    rng = random.Random(seed)
    lives = []
    for _ in range(rng.randrange(1, 80)):
        first = rng.randrange(60)
        lives.append(Life(unit * rng.randrange(1, 50), first, first + rng.randrange(20)))
    found, end = placed(lives)
    places = list(zip(lives, found, strict=True))
    assert min(found) >= 0
    assert end == max(first + life.nbytes for life, first in places)
    large = [life for life in lives if life.nbytes > SMALL]
    small = [[life for life in lives if life.nbytes == nbytes] for nbytes in {life.nbytes for life in lives if life.nbytes <= SMALL}]
    most = (1.5 * alive_at_once(large) if large else 0) + sum(alive_at_once(some) for some in small)
    assert alive_at_once(lives) <= end <= most
    for k, (a, at) in enumerate(places):
        for b, other in places[:k]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or at + a.nbytes <= other or other + b.nbytes <= at


def test_nothing_to_place() -> None:
    assert placed([]) == ([], 0)


def test_gaps_between_values_are_closed() -> None:
    """A large value that comes after a small one is gone would not fit into its gap, if places were given in the order of the program."""
    b = Builder()
    small, kept, large, last = (
        b.new((n,), torch.float32, name) for n, name in ((10000, "small"), (10000, "kept"), (20000, "large"), (1, "last"))
    )
    b.emit("fill", out=small, value=1.0)
    b.emit("copy", x=small, out=kept)
    b.emit("copy", x=kept, out=large.rows(0, 10000))
    b.emit("copy", x=large.rows(0, 1), out=last)
    offsets, nbytes = place(b.instrs)
    assert nbytes < 124000
    assert all(offset % 64 == 0 for offset in offsets.values())
    validate(Program(tuple(b.instrs), offsets, nbytes, len(b.instrs)))


def _two_steps() -> tuple[Builder, dict[int, int], int]:
    b = Builder()
    first, second, third = (b.new((16,), torch.float32, name) for name in ("first", "second", "third"))
    b.emit("fill", out=first, value=1.0)
    b.emit("copy", x=first, out=second)
    b.emit("add", a=second, b=second, out=third)
    return b, *place(b.instrs)


def test_values_that_lie_elsewhere() -> None:
    b, _, nbytes = _two_steps()
    first, second, third = b.values
    assert nbytes == 128  # (the first is gone when the third comes)
    assert set(place(b.instrs, fixed=frozenset([first]))[0]) == {second.number, third.number}


def test_validation_finds_shared_bytes_and_values_that_nothing_has_written() -> None:
    b, offsets, nbytes = _two_steps()
    first, second, _ = b.values
    validate(Program(tuple(b.instrs), offsets, nbytes, 3))
    with pytest.raises(AssertionError, match="alive together and share bytes"):
        validate(Program(tuple(b.instrs), {**offsets, second.number: offsets[first.number]}, nbytes, 3))
    with pytest.raises(AssertionError, match="ends at byte"):
        validate(Program(tuple(b.instrs), offsets, nbytes - 64, 3))
    with pytest.raises(AssertionError, match="which nothing has written"):
        validate(Program(tuple(b.instrs[1:]), offsets, nbytes, 2))
