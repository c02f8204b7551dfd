"""When parts of a recorded rollout's memory are given back to the system, so that its results take their place.

Results lie elsewhere than the buffers (they outlive the rollout), and most of them, gradients of parameters, come late, when much of what
the buffers held is not read any more. What is given back becomes memory again when it is touched in the next run: a page fault for each
2 MiB, 1 to 4% of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnndyn_fast.ops.placement import Life

PIECE = 2 << 20  # bytes, as huge pages; smaller parts are not given back
_AT_ONCE = 8 << 20  # bytes, at least, so that it happens seldom
_WORTH = 1 / 8  # of all memory, that has to be saved (of less, the time of page faults is not worth it: 4% of BLT-VS)

Range = tuple[int, int]  # first byte and end


def given_back(
    lives: Sequence[Life], starts: Sequence[int], results: Sequence[tuple[int, int]], steps: int, before: int = 0
) -> dict[int, list[Range]]:
    """The ranges that are given back before each of some steps; none where that would save little.

    Args:
        starts: the first byte of each buffer.
        results: bytes of each result, and the step that touches it first.
        steps: their number.
        before: bytes before the first whole piece.
    """
    end = max((start + life.nbytes for start, life in zip(starts, lives, strict=True)), default=0)
    count = max(0, (end - before) // PIECE)
    first, last = np.full(count, steps, np.int64), np.full(count, -1, np.int64)
    for start, life in zip(starts, lives, strict=True):
        held = slice(max(0, (start - before) // PIECE), max(0, -(-(start + life.nbytes - before) // PIECE)))
        first[held], last[held] = np.minimum(first[held], life.first), np.maximum(last[held], life.last)
    made = np.zeros(steps + 1, np.int64)
    for nbytes, step in results:
        made[step:] += nbytes
    changes = np.zeros(steps + 2, np.int64)
    used = last >= 0
    np.add.at(changes, first[used], PIECE)
    np.add.at(changes, last[used] + 1, -PIECE)
    least = int((np.cumsum(changes)[: steps + 1] + made).max())
    held_back = count * PIECE
    if held_back + made[-1] - least < _WORTH * (held_back + made[-1]):
        return {}
    found: dict[int, list[Range]] = {}
    here = np.ones(count, bool)
    for step in sorted({step for _, step in results}):
        excess = int(here.sum()) * PIECE + int(made[step]) - least
        if excess > 0:
            dead = np.flatnonzero(here & (last < step))[::-1][: -(-max(excess, _AT_ONCE) // PIECE)]
            here[dead] = False
            if len(dead):
                found[step] = [(before + int(a) * PIECE, before + int(b + 1) * PIECE) for a, b in _runs(np.sort(dead))]
    return found


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """First and last of each run of consecutive ones."""
    breaks = np.flatnonzero(np.diff(numbers) > 1)
    return list(zip(numbers[[0, *(breaks + 1)]], numbers[[*breaks, -1]], strict=True))
