"""The engine: images are read ahead, run, reduced, and written, each in its own thread, by one process or several."""

from __future__ import annotations

import copy
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis import Batch, Reducer
from rnndyn_fast.data.loader import read_ahead
from rnndyn_fast.extract.journal import Journal
from rnndyn_fast.extract.plan import Piece, Plan, Rows
from rnndyn_fast.extract.results import save_results
from rnndyn_fast.extract.sources import Source, read_rows, refuse_rows
from rnndyn_fast.extract.trajectories import Layout, PartWriter, assemble
from rnndyn_fast.processes import Processes, processes
from rnndyn_fast.train.progress import QuietReporter, Reporter, choose_reporter

READ_AHEAD, WRITE_BEHIND = 2, 2  # batches
_DIGESTS = 2**256
COMMIT_SECONDS, COMMIT_SHARE = 2.0, 0.01  # commits are so far apart at least, and take at most about that share of the time


class Activations(NamedTuple):
    """What a forward function gives of a batch of images."""

    areas: Mapping[str, Tensor]  # area -> [T, N, ...]
    log_probs: Tensor | None = None  # [T, N, C]


Forward = Callable[[Tensor], Activations]


class _Loaded(NamedTuple):
    piece: Piece
    rows: np.ndarray  # [N] numbers in the source
    images: Tensor
    labels: Tensor
    digest: int  # of the images and labels


def data_digest(rows: np.ndarray, images: Tensor, labels: Tensor) -> int:  # [N], [N, ...], [N]
    """Sum modulo 2^256 of the SHA-256 of every image: its number and label (int64, little-endian), then its values.

    So it is the same however images are cut into batches and in whatever order they come.
    """
    total = 0
    head = np.stack([rows, labels.numpy()], axis=1).astype("<i8")
    for first, image in zip(head, images.contiguous().numpy(), strict=True):
        digest = hashlib.sha256(first.tobytes())
        digest.update(image)
        total += int.from_bytes(digest.digest(), "big")
    return total % _DIGESTS


def trajectories_path(out: str | os.PathLike[str]) -> Path:
    """Where the trajectories that belong to the result file `out` are."""
    out = Path(out)
    return out.with_name(f"{out.stem}_trajectories.h5")


def stream(
    forward: Forward,
    source: Source,
    reducers: Sequence[Reducer],
    *,
    out: str | os.PathLike[str],
    save: Sequence[str] = (),
    dtype: str = "float32",
    compression: int = 1,
    batch_size: int = 250,
    limit: int | None = None,
    num_classes: int | None = None,
    shards: int = 8,
    overwrite: bool = False,
    manifest: Mapping[str, Any] | None = None,
    descriptors: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    title: str = "images",
) -> Path:
    """Run images through `forward` and its activations through the reducers; write their results, and trajectories if asked for.

    Killed at any moment and called again with the same arguments it continues (see `Journal`), and the final files are the same, byte for
    byte. Under `torchrun` every process takes some of the shards; the files are those of one process (given the same number of threads
    each), and must lie in a folder that all processes see.

    Args:
        forward: images [N, ...] as the source gives them -> Activations. Deterministic, and each sample by itself.
        source: images and labels.
        reducers: patterns that have taken in nothing; their names differ.
        out: the result file; trajectories are `trajectories_path(out)`.
        save: areas whose activations are kept.
        dtype: of the kept activations, "float32" or "float16".
        compression: level of gzip, 0 to 9.
        batch_size: images at a time.
        limit: that many images, evenly spaced.
        num_classes: labels are below it; None: at least 0, whatever the reducers ask.
        shards: runs of neighbouring images of which sums are taken; at least the number of processes.
        overwrite: replace files that exist, and unfinished work of another kind.
        manifest: what else makes the result what it is, as JSON can hold it; going on demands that it is equal.
        descriptors: provenance for the record; "data" gets the number of images and their SHA-256.
        reporter: shows progress in the first process.
        title: what it shows.

    Returns:
        The path of the result file.

    Raises:
        ValueError, OSError: naming the file, the image or the option; what had been written can be gone on with.
        FileExistsError: a file exists and `overwrite` is False.
        RuntimeError: another process failed.

    Deterministic: as `forward`. Memory: a few batches and the reducers, whatever the number of images.
    """
    job = _Job(forward, source, reducers, Path(out), tuple(save), dtype, compression, batch_size, limit, shards, num_classes)
    with processes() as group:
        wanted = group.all_of(job.manifest(manifest or {}))
        group.together(lambda: job.check(group, wanted, overwrite))
        group.together(lambda: job.journal.open(wanted[0], overwrite), only_first=True)
        with (reporter or choose_reporter()) if group.rank == 0 else QuietReporter() as shown:
            try:
                group.together(lambda: job.run(group, shown, title))
            except BaseException:
                if group.rank == 0:
                    job.journal.close_if_empty()
                raise
            group.together(lambda: job.finish(dict(descriptors or {})), only_first=True)
    return Path(out)


class _Job:
    """One call of `stream`."""

    def __init__(
        self, forward: Forward, source: Source, reducers: Sequence[Reducer], out: Path, save: tuple[str, ...],
        dtype: str, compression: int, batch_size: int, limit: int | None, shards: int,
        num_classes: int | None = None,
    ) -> None:  # fmt: skip
        self.forward, self.source, self.reducers = forward, source, list(reducers)
        self.out, self.save, self.dtype, self.compression = out, save, dtype, compression
        self.num_classes = num_classes
        self.rows = Rows(len(source), limit)
        self.plan = Plan(len(self.rows), batch_size, shards)
        self.journal = Journal(out)
        names = [reducer.name for reducer in self.reducers]
        if len(set(names)) != len(names):
            raise ValueError(f"reducers: expected each name once, got {', '.join(names)}")

    def manifest(self, more: Mapping[str, Any]) -> dict[str, Any]:
        reducers = {reducer.name: dict(reducer.options) for reducer in self.reducers}
        cut = {"images": self.plan.images, "batch_size": self.plan.batch_size, "shards": self.plan.shards, "limit": self.rows.limit}
        kept = {"save": list(self.save), "dtype": self.dtype, "compression": self.compression}
        return {**dict(more), "data": self.source.identity(), "reducers": reducers, **cut, **kept}

    def check(self, group: Processes, wanted: Sequence[dict[str, Any]], overwrite: bool) -> None:
        if wanted[group.rank] != wanted[0]:
            raise ValueError("options: expected the same options and data in every process, got others than those of the first")
        if group.count > self.plan.shards:
            raise ValueError(f"shards: expected at least one for each of {group.count} processes, got {self.plan.shards}")
        for path in self.outputs:
            if path.is_dir():
                raise ValueError(f"out: expected a file, got the folder {path}")
            # (An unfinished extraction was allowed to replace them when it began.)
            if path.exists() and not overwrite and not self.journal.exists:
                raise FileExistsError(f"out: {path} exists; pass overwrite=True (--overwrite) to replace it")

    @property
    def outputs(self) -> list[Path]:
        return [self.out, *([trajectories_path(self.out)] if self.save else [])]

    # ---------------------------------------------------------------- running

    def run(self, group: Processes, shown: Reporter, title: str) -> None:
        """Compute the shards of this process that are not done."""
        if not self.journal.exists:
            raise ValueError(f"out: expected a folder that all processes share; {self.journal.folder} is not there")
        pieces: list[Piece] = []
        states: dict[int, dict[str, Any]] = {}
        for shard in self.plan.shards_of(group.rank, group.count):
            state = self.journal.load_shard(shard)
            if state is not None:
                states[shard] = state
            pieces += self.plan.pieces(shard, done=0 if state is None else state["done"])
        total = sum(len(self.plan.rows_of(b)) for s in self.plan.shards_of(group.rank, group.count) for b in self.plan.blocks_of(s))
        done = total - sum(piece.stop - piece.start for piece in pieces)
        if group.rank == 0 and (read := self.source.describe().get("read")):
            shown.line(f"{read}" + (f"; {len(self.rows):,} of them, evenly spaced" if len(self.rows) < len(self.source) else ""))
        shown.start(f"{title}, {total} images" + (f", {done} done before" if done else ""), total)
        if done:
            shown.advance(done, "")
        current, shard = _Shard(self.reducers), -1
        with _Writer(self.journal) as writer, torch.inference_mode(), _closing(read_ahead(self._load, pieces, READ_AHEAD)) as loaded:
            for piece, rows, images, labels, digest in loaded:
                if piece.shard != shard:
                    shard, current = piece.shard, _Shard(self.reducers, states.pop(piece.shard, None))
                self._take_in(piece, rows, images, labels, digest, current, writer)
                shown.advance(len(rows), "")

    def _load(self, piece: Piece) -> _Loaded:
        rows = self.rows.between(piece.start, piece.stop)
        images, labels = read_rows(self.source, rows, self.num_classes)
        return _Loaded(piece, rows, images, labels, data_digest(rows, images, labels))

    def _take_in(self, piece: Piece, rows: np.ndarray, images: Tensor, labels: Tensor, digest: int, shard: _Shard, writer: _Writer) -> None:
        try:
            areas, log_probs = self.forward(images)
        except ValueError as error:
            raise ValueError(f"{self.source.place(int(rows[0]))} and the {len(rows) - 1} after it: {error}") from error
        batch = Batch(rows, labels, areas, log_probs)
        for name in batch.areas:
            refuse_rows(f"the activation of area {name!r}", batch.norms(name)[0], self.source, rows)
        if batch.log_probs is not None:
            refuse_rows("the network's output", batch.log_probs.sum(2), self.source, rows)
        for reducer in shard.reducers:
            try:
                reducer.add(batch)
            except ValueError as error:
                raise ValueError(
                    f"{self.source.place(int(rows[0]))} and the {len(rows) - 1} after it: reducer {reducer.name!r}: {error}"
                ) from error
        shard.digest = (shard.digest + digest) % _DIGESTS
        shard.shapes = {name: [batch.area(name).shape[0], *batch.area(name).shape[2:]] for name in self.save}
        shard.predictions = None if batch.log_probs is None else batch.log_probs.shape[0]
        if self.save:
            writer.part(piece, {name: batch.area(name) for name in self.save}, batch.labels, batch.log_probs, self.layout(shard))
        if piece.ends_block:
            shard.done += 1
            if piece.ends_shard or writer.commit_is_due:
                writer.commit(piece.shard, shard)

    def layout(self, shard: _Shard) -> Layout:
        """How trajectories of what a shard has seen are stored."""
        shapes = {name: tuple(shape) for name, shape in shard.shapes.items()}
        return Layout(shapes, shard.predictions, self.dtype, self.compression, self.plan)

    # ---------------------------------------------------------------- finishing

    def finish(self, descriptors: dict[str, Any]) -> None:
        """Add the shards up, in order, and write the files; the first process does it."""
        total = _Shard(self.reducers)
        for number in range(self.plan.shards):
            if not len(self.plan.blocks_of(number)):
                continue
            state = self.journal.load_shard(number)
            if state is None or state["done"] != len(self.plan.blocks_of(number)):
                raise ValueError(f"out: expected a folder that all processes share; shard {number} is not in {self.journal.folder}")
            shard = _Shard(self.reducers, state)
            for mine, theirs in zip(total.reducers, shard.reducers, strict=True):
                mine.merge(theirs)
            total.digest = (total.digest + shard.digest) % _DIGESTS
            total.shapes, total.predictions = shard.shapes, shard.predictions
        descriptors["data"] = {**descriptors.get("data", {}), "images": self.plan.images, "sha256": f"{total.digest:064x}"}
        result, kept = self.journal.unfinished("result.h5"), self.journal.unfinished("trajectories.h5")
        with _naming(self.journal):
            save_results(result, {r.name: r.result(descriptors) for r in total.reducers}, descriptors)
            if self.save:
                parts = [self.journal.part(block) for block in range(self.plan.blocks)]
                rows = self.rows.between(0, self.plan.images)
                assemble(kept, self.layout(total), parts, rows, descriptors)
                with kept.open("rb") as file:
                    os.fsync(file.fileno())
        # The trajectories first: a result is never there without the trajectories it was asked to have.
        if self.save:
            os.replace(kept, trajectories_path(self.out))
        os.replace(result, self.out)
        self.journal.close()


class _Shard:
    """The reducers of a shard, how many of its blocks they hold, and what else the final files need to know of them."""

    def __init__(self, patterns: Sequence[Reducer], state: Mapping[str, Any] | None = None) -> None:
        self.reducers = [copy.deepcopy(reducer) for reducer in patterns]
        self.done = 0
        self.digest = 0
        self.shapes: dict[str, list[int]] = {}
        self.predictions: int | None = None
        if state is not None:
            for reducer in self.reducers:
                reducer.load_state_dict(state["reducers"][reducer.name])
            self.done, self.digest = state["done"], int(state["digest"], 16)
            self.shapes, self.predictions = dict(state["shapes"]), state["predictions"]

    def state(self) -> dict[str, Any]:
        """A copy of all of it."""
        reducers = {reducer.name: reducer.state_dict() for reducer in self.reducers}
        seen = {"shapes": self.shapes, "predictions": self.predictions, "digest": f"{self.digest:x}"}
        return {"done": self.done, "reducers": reducers, **seen}


class _Writer:
    """Writes parts and states behind the computation, in order, in a thread of its own; what it raises is raised here."""

    def __init__(self, journal: Journal) -> None:
        self._committed, self._cost = time.monotonic(), 0.0
        self._journal = journal
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=WRITE_BEHIND)
        self._error: BaseException | None = None
        self._part: PartWriter | None = None
        self._thread = threading.Thread(target=self._work, name="rnndyn-write-behind", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None and self._error is None:
            self._error = error  # nothing more is to be written
        self._jobs.put(None)
        self._thread.join()
        if self._part is not None:
            self._part.discard()
        if kind is None:
            self._raise()

    def part(self, piece: Piece, areas: Mapping[str, Tensor], labels: Tensor, log_probs: Tensor | None, layout: Layout) -> None:
        """Add a batch to the part of its block; the last one closes it."""

        def work() -> None:
            if self._part is None:
                self._part = PartWriter(self._journal.part(piece.block), layout)
            predictions = None if log_probs is None else log_probs.argmax(2).cpu().numpy()
            self._part.add({name: values.cpu().numpy() for name, values in areas.items()}, labels.cpu().numpy(), predictions)
            if piece.ends_block:
                part, self._part = self._part, None
                part.close()

        self._put(work)

    @property
    def commit_is_due(self) -> bool:
        """Whether the last commit is long enough ago, measured by what it took."""
        return time.monotonic() - self._committed >= max(COMMIT_SECONDS, self._cost / COMMIT_SHARE)

    def commit(self, number: int, shard: _Shard) -> None:
        """From here on the blocks in a shard's state count."""
        start = self._committed = time.monotonic()
        state = shard.state()
        copied = time.monotonic() - start

        def work() -> None:
            begun = time.monotonic()
            self._journal.save_shard(number, state)
            self._cost = copied + time.monotonic() - begun

        self._put(work)

    def _put(self, work: Callable[[], None]) -> None:
        self._raise()
        self._jobs.put(work)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    with _naming(self._journal):
                        work()
                except BaseException as error:
                    self._error = error


@contextmanager
def _naming(journal: Journal) -> Iterator[None]:
    """Errors of writing say where, and that one can go on. (h5py tells of a full disk by OSError or RuntimeError.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{journal.folder}: cannot be written: {error}; completed work is kept there: free space and run the same command again"
        ) from error


@contextmanager
def _closing(items: Iterator[_Loaded]) -> Iterator[Iterator[_Loaded]]:
    """Ends a generator, and its thread with it, when the block ends."""
    try:
        yield items
    finally:
        items.close()  # type: ignore[attr-defined]
