"""Where buffers of known lifetimes lie, so that together they take little more memory than is alive at once."""

from __future__ import annotations

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


def placed(lives: Sequence[Life]) -> tuple[list[int], int]:
    """The first byte of each buffer, and the end of the last one; no two that are alive in one step share a byte.

    One after another, in several orders (large ones first, long-lived ones first) of which the best is taken, each goes into the smallest
    gap between those that are alive with it.
    """
    return min((_in_order(lives, sorted(range(len(lives)), key=lambda i: order(lives[i]))) for order in _ORDERS), key=lambda p: p[1])


def _in_order(lives: Sequence[Life], order: Sequence[int]) -> tuple[list[int], int]:
    sizes, first, last = (np.array([getattr(life, kind) for life in lives], np.int64) for kind in ("nbytes", "first", "last"))
    found, ordered = np.zeros(len(lives), np.int64), np.array(order, np.int64)
    for k, i in enumerate(order):
        before = ordered[:k]
        beside = before[(first[before] <= last[i]) & (last[before] >= first[i])]
        beside = beside[np.argsort(found[beside], kind="stable")]
        starts = found[beside]
        ends = np.maximum.accumulate(starts + sizes[beside])  # (what is alive with this one may overlap, at other steps)
        gaps = starts - np.concatenate([[0], ends[:-1]]) if len(starts) else starts
        fitting = np.flatnonzero(gaps >= sizes[i])
        if len(fitting):
            gap = fitting[np.argmin(gaps[fitting])]
            found[i] = ends[gap - 1] if gap else 0
        else:
            found[i] = ends[-1] if len(ends) else 0
    return found.tolist(), int((found + sizes).max(initial=0))
