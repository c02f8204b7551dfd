"""In which order an epoch goes through images, and which process reads which."""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np

LANES = 64  # shards that are read side by side; up to so many processes, batches do not depend on their number


def in_lanes(shards: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # [n] -> [n], [n]
    """A random order of images in shards: the images' numbers, and the lane of each.

    Shards, in random order, are dealt to at most `LANES` lanes of nearly equal numbers of images; a lane goes through its shards one after
    another, and through the images of each in random order. A batch has images of all lanes in proportion, so of many shards, and a run
    of lanes is a share of it: a process that takes some lanes reads some shards, each once.

    Args:
        shards: of each image, integers [n].
        rng: source of the randomness.
    """
    names, inverse, sizes = np.unique(shards, return_inverse=True, return_counts=True)
    place = np.empty(len(names), np.int64)
    place[rng.permutation(len(names))] = np.arange(len(names))
    lane_of = np.empty(len(names), np.int64)
    lanes = min(LANES, len(names))
    # In the order of van der Corput's sequence, in which of any stretch low and high lanes are equally many: lanes take turns in it, and
    # of those with the fewest images the first in it gets the next shard.
    bits = max(1, (lanes - 1).bit_length())
    phase = np.array([int(f"{number:0{bits}b}"[::-1], 2) for number in range(lanes)]) / 2**bits
    heap = [(0, float(phase[lane]), lane) for lane in range(lanes)]
    heapify(heap)
    for name in np.argsort(place):
        filled, first, least = heap[0]
        lane_of[name] = least
        heapreplace(heap, (filled + int(sizes[name]), first, least))
    order = np.lexsort((rng.random(len(shards)), place[inverse], lane_of[inverse]))
    lane = lane_of[inverse][order]
    length = np.bincount(lane, minlength=lanes)
    position = np.arange(len(order)) - (np.cumsum(length) - length)[lane]
    turn = np.argsort((position + phase[lane]) / length[lane], kind="stable")
    return order[turn], lane[turn]


def cuts(rows: int, count: int) -> list[int]:  # [count + 1]
    """Where a batch is cut into parts of equal size or one image apart, of which the first is never empty."""
    return [-(-rows * rank // count) for rank in range(count + 1)]


def cuts_by_lane(lane: np.ndarray, lanes: int, count: int) -> list[int]:  # [n], ascending -> [count + 1]
    """Where a batch is cut so that every process has a run of lanes; with more processes than lanes as :func:`cuts`."""
    if count > lanes:
        return cuts(len(lane), count)
    found: list[int] = np.searchsorted(lane, [lanes * rank // count for rank in range(count + 1)]).tolist()
    return found
