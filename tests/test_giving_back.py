"""Which parts of a recorded rollout's memory are given back to the system, and when."""

from __future__ import annotations

import random

import pytest
import torch

from rnndyn_fast.ops import buffers
from rnndyn_fast.ops.buffers import Region
from rnndyn_fast.ops.giving_back import PIECE, given_back
from rnndyn_fast.ops.placement import Life, placed


def at_most(lives: list[Life], starts: list[int], results: list[tuple[int, int]], steps: int, before: int = 0) -> int:
    """The most memory of a run that is like the one before it: pieces are there until they are given back, results from their step on."""
    back = given_back(lives, starts, results, steps, before)
    end = max(start + life.nbytes for start, life in zip(starts, lives, strict=True))
    here = set(range((end - before) // PIECE))
    most = 0
    for step in range(steps):
        for first, last in back.get(step, []):
            assert (first - before) % PIECE == (last - before) % PIECE == 0
            given = set(range((first - before) // PIECE, (last - before) // PIECE))
            assert given <= here, "given back twice"
            here -= given
            for life, start in zip(lives, starts, strict=True):
                dead = life.last < step
                assert dead or start + life.nbytes <= first or last <= start, "somebody reads it later"
        most = max(most, len(here) * PIECE + sum(nbytes for nbytes, when in results if when <= step))
    return most


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("before", [0, PIECE // 4])
def test_nothing_is_given_back_that_is_read_later(seed: int, before: int) -> None:
    rng = random.Random(seed)
    lives = []
    for _ in range(rng.randrange(1, 60)):
        first = rng.randrange(60)
        lives.append(Life(4096 * rng.randrange(1, 3000), first, first + rng.randrange(20)))
    results = [(4096 * rng.randrange(1, 3000), rng.randrange(40, 80)) for _ in range(10)]
    starts, end = placed(lives)
    without = end + sum(nbytes for nbytes, _ in results)
    assert at_most(lives, starts, results, 80, before) <= without


def test_results_take_the_place_of_what_is_done() -> None:
    """Ten buffers in a row that end one after another, and as many results, each when its buffer has ended."""
    count, nbytes = 10, 8 * PIECE
    lives = [Life(nbytes, 0, 10 + k) for k in range(count)]
    starts = [k * nbytes for k in range(count)]
    results = [(nbytes, 11 + k) for k in range(count)]
    assert at_most(lives, starts, results, 30) <= (count + 2) * nbytes
    early = [(nbytes, 0) for _ in range(count)]
    assert given_back(lives, starts, early, 30) == {}
    few = [(nbytes // 4, 25)]
    assert given_back(lives, starts, few, 30) == {}, "it would save too little"


def test_no_buffers() -> None:
    assert given_back([], [], [(PIECE, 0)], 1) == {}


@pytest.mark.skipif(not buffers.CAN_GIVE_BACK, reason="the system takes no memory back")
def test_what_is_given_back_is_zero_and_the_rest_stays() -> None:
    region = Region(4 * PIECE)
    first = -region.start % PIECE
    whole = region.alias(region.start, (4 * PIECE,), (1,), torch.uint8)
    whole.fill_(7)
    region.give_back_ranges([(first + PIECE, first + 2 * PIECE)])
    assert not whole[first + PIECE : first + 2 * PIECE].any()
    assert int(whole.count_nonzero()) == 3 * PIECE
