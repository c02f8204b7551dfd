"""How the images of an extraction are cut: into batches, blocks and shards, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK_IMAGES = 1000


class Piece(NamedTuple):
    """A batch and where it lies: `rows` are positions among the images to be run."""

    shard: int
    block: int
    start: int
    stop: int
    ends_block: bool
    ends_shard: bool


@dataclass(frozen=True)
class Plan:
    """The cut of `images` images.

    Batches of `batch_size` (the last one may be smaller) make blocks, blocks make `shards` shards, each a run of neighbours. Sums of a
    shard are taken batch by batch in order, and those of shards are added in order; so results depend on this cut, which is the same
    for every number of processes, and not on who computes what when.
    """

    images: int
    batch_size: int
    shards: int = 8

    @property
    def block_images(self) -> int:
        """Images per block: whole batches, about a thousand images."""
        return self.batch_size * max(1, BLOCK_IMAGES // self.batch_size)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.images // self.block_images)

    def blocks_of(self, shard: int) -> range:
        """The blocks of a shard; there may be none."""
        return range(shard * self.blocks // self.shards, (shard + 1) * self.blocks // self.shards)

    def rows_of(self, block: int) -> range:
        """The images of a block."""
        return range(block * self.block_images, min((block + 1) * self.block_images, self.images))

    def shards_of(self, rank: int, processes: int) -> range:
        """The shards that one of several processes computes."""
        return range(rank, self.shards, processes)

    def pieces(self, shard: int, done: int = 0) -> Iterator[Piece]:
        """The batches of a shard, without those of its first `done` blocks."""
        blocks = self.blocks_of(shard)[done:]
        for block in blocks:
            rows = self.rows_of(block)
            for start in range(rows.start, rows.stop, self.batch_size):
                stop = min(start + self.batch_size, rows.stop)
                yield Piece(shard, block, start, stop, stop == rows.stop, stop == rows.stop and block == blocks[-1])

    def samples_per_chunk(self, sample_bytes: int, most_bytes: int = 2**20) -> int:
        """Samples per chunk of a file: divides the batch size, so that no chunk has parts in two batches."""
        most = max(1, most_bytes // max(sample_bytes, 1))
        return max(d for d in range(1, self.batch_size + 1) if self.batch_size % d == 0 and d <= most)


@dataclass(frozen=True)
class Rows:
    """Which of `count` images are run: all, or `limit` of them, evenly spaced, so that data sorted by class yield all classes."""

    count: int
    limit: int | None = None

    def __len__(self) -> int:
        return self.count if self.limit is None else min(self.limit, self.count)

    def between(self, start: int, stop: int) -> np.ndarray:
        """The numbers of the images start..stop-1 of those that are run: int64."""
        return np.arange(start, stop) * self.count // len(self)
