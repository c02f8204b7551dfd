"""Where buffers of known lifetimes lie."""

from __future__ import annotations

import random

import pytest
import torch

from rnndyn_fast.ops.buffers import Region, empty
from rnndyn_fast.ops.placement import Life, placed
from rnndyn_fast.ops.recording import Recorder


def alive_at_once(lives: list[Life]) -> int:
    return max(sum(life.nbytes for life in lives if life.first <= step <= life.last) for step in {life.first for life in lives})


@pytest.mark.parametrize("seed", range(20))
def test_no_two_that_are_alive_together_share_a_byte(seed: int) -> None:
    rng = random.Random(seed)
    lives = []
    for _ in range(rng.randrange(1, 80)):
        first = rng.randrange(60)
        lives.append(Life(64 * rng.randrange(1, 50), first, first + rng.randrange(20)))
    found, end = placed(lives)
    places = list(zip(lives, found, strict=True))
    assert min(found) >= 0
    assert end == max(first + life.nbytes for life, first in places)
    assert alive_at_once(lives) <= end <= 1.5 * alive_at_once(lives)
    for k, (a, at) in enumerate(places):
        for b, other in places[:k]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or at + a.nbytes <= other or other + b.nbytes <= at


def test_nothing_to_place() -> None:
    assert placed([]) == ([], 0)


def test_gaps_of_the_recorded_run_are_closed() -> None:
    """A large buffer that comes after a small one is gone would not have fitted into its gap."""
    x = torch.randn(1000)
    region = Region(1 << 24)
    recorder = Recorder(region, [x], ())
    with recorder.noting():
        small = empty((1000,), torch.float32).copy_(x)
        kept = empty((1000,), torch.float32).copy_(small).mul_(2.0)
        del small
        large = empty((2000,), torch.float32)
        large[:1000].copy_(kept)
        large[1000:].copy_(x)
        del kept
        found = large.sum(0, keepdim=True)
    start = region.start
    program = recorder.program([found])
    assert program is not None, recorder.failed
    assert max(first + nbytes for first, nbytes in recorder._sizes) > 12000
    places = [recorder.settled(recorder.place(large)).offset - start]
    assert max(places) + 8000 < 12100
    for image in (x, torch.randn(1000)):
        (result,), _ = program([image])
        assert result is not None
        assert torch.allclose(result, 3 * image.sum(), rtol=1e-4, atol=1e-3)
