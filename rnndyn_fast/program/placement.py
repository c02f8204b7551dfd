"""Where buffers of known lifetimes lie, so that together they take little more memory than is alive at once."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Life:
    """Of a buffer: its bytes, and the first and the last of the steps between which it holds something."""

    nbytes: int
    first: int
    last: int


_ORDERS: tuple[Callable[[Life], int], ...] = (
    lambda life: -life.nbytes,
    lambda life: -life.nbytes * (life.last - life.first + 1),
    lambda life: life.first - life.last,
)


SMALL = 16 << 10  # bytes, up to which buffers are reused by size alone
_MANY = 512  # larger buffers, from which on one order is tried


def placed(lives: Sequence[Life]) -> tuple[list[int], int]:
    """The first byte of each buffer, and the end of the last one; no two that are alive in one step share a byte.

    One after another, in several orders (large ones first, long-lived ones first) of which the best is taken, each goes into the smallest
    gap between those that are alive with it. Small ones lie behind the others; one that is done with is room for the next of its size.
    """
    large = [i for i, life in enumerate(lives) if life.nbytes > SMALL]
    some = [lives[i] for i in large]
    orders = _ORDERS[: 1 if len(some) > _MANY else None]
    found, end = min((_in_order(some, sorted(range(len(some)), key=lambda i: order(some[i]))) for order in orders), key=lambda p: p[1])
    offsets = dict(zip(large, found, strict=True))
    free: dict[int, list[tuple[int, int]]] = {}  # by size: last step and first byte of those that were placed
    for i in sorted((i for i in range(len(lives)) if i not in offsets), key=lambda i: lives[i].first):
        life = lives[i]
        done = free.setdefault(life.nbytes, [])
        if done and done[0][0] < life.first:
            _, offsets[i] = heapq.heappop(done)
        else:
            offsets[i], end = end, end + life.nbytes
        heapq.heappush(done, (life.last, offsets[i]))
    return [offsets[i] for i in range(len(lives))], end


def _in_order(lives: Sequence[Life], order: Sequence[int]) -> tuple[list[int], int]:
    """Places in an order. (Those that are placed are kept by ascending first byte, so that gaps are found in one sweep.)"""
    count = len(lives)
    table = np.zeros((4, count), np.int64)
    first, last, starts, ends = table
    found, total = [0] * count, 0
    for k, i in enumerate(order):
        life = lives[i]
        (beside,) = ((first[:k] <= life.last) & (last[:k] >= life.first)).nonzero()
        place = 0
        if len(beside):
            reach = np.maximum.accumulate(ends[beside])  # (what is alive with this one may overlap, at other steps)
            gaps = starts[beside]
            gaps[1:] -= reach[:-1]
            (fitting,) = (gaps >= life.nbytes).nonzero()
            if len(fitting):
                gap = fitting[gaps[fitting].argmin()]
                place = int(reach[gap - 1]) if gap else 0
            else:
                place = int(reach[-1])
        at = starts[:k].searchsorted(place, side="right")
        table[:, at + 1 : k + 1] = table[:, at:k]
        table[:, at] = life.first, life.last, place, place + life.nbytes
        found[i] = place
        total = max(total, place + life.nbytes)
    return found, total
