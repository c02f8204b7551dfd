"""Trajectories on disk: activations over time of chosen areas, compressed as they come, in one HDF5 file in the end.

While an extraction runs, each block of images has a part of its own: the compressed chunks of the final file one after the other, and
their sizes and checksums. `assemble` puts chunks into the HDF5 file as they are, without unpacking them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.extract.plan import Plan
from rnndyn_fast.file_io import replaced_atomically
from rnndyn_fast.hdf5_out import checked, hdf5_out

FORMAT = "rnndyn_fast.trajectories/2"
DTYPES = ("float32", "float16")
_LARGEST_HALF = float(np.finfo(np.float16).max)
_TAIL = np.dtype(np.int64)


@dataclass(frozen=True)
class Layout:
    """What the trajectories of an extraction are: shape per area, without samples, and how they are stored."""

    shapes: Mapping[str, tuple[int, ...]]  # area -> [T, ...]
    predictions: int | None  # time steps of the predictions, None where there are none
    dtype: str
    compression: int  # level of gzip, 0 to 9
    plan: Plan

    def chunk_samples(self, area: str) -> int:
        """Samples per chunk."""
        return self.plan.samples_per_chunk(int(np.prod(self.shapes[area][1:])) * np.dtype(self.dtype).itemsize)


class PartWriter:
    """Writes the part of one block, batch by batch; it takes its name when `close` is reached.

    Raises:
        ValueError: a value does not fit float16.
        OSError: the disk is full, ...; nothing is left then.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = layout
        self._stack = ExitStack()
        self._file = self._stack.enter_context(self._stack.enter_context(replaced_atomically(path)).open("wb"))
        self._entries: list[tuple[int, int]] = []

    def add(self, activations: Mapping[str, np.ndarray], labels: np.ndarray, predictions: np.ndarray | None) -> None:
        """The next batch: activations [T, N, ...], labels [N], predictions [T, N]."""
        for name in self._layout.shapes:
            values = activations[name]
            if self._layout.dtype == "float16" and max(values.max(), -values.min()) > _LARGEST_HALF:
                raise ValueError(f"dtype: activations of {name!r} exceed float16 ({_LARGEST_HALF:.0f}); use float32")
            values = values.astype(self._layout.dtype, copy=False)
            samples = self._layout.chunk_samples(name)
            for start in range(0, values.shape[1], samples):
                for step in values[:, start : start + samples]:
                    self._blob(compressed(step, samples, self._layout.compression))
        self._blob(np.ascontiguousarray(labels, np.int64).tobytes())
        if predictions is not None:
            self._blob(np.ascontiguousarray(predictions, np.int64).tobytes())

    def _blob(self, blob: bytes) -> None:
        self._file.write(blob)
        self._entries.append((len(blob), zlib.crc32(blob)))

    def close(self) -> None:
        """All batches of the block are in."""
        table = np.array(self._entries, _TAIL).reshape(-1)
        self._file.write(table.tobytes() + np.array([len(self._entries)], _TAIL).tobytes())
        self._file.close()
        self._stack.close()

    def discard(self) -> None:
        """Leave nothing."""
        error = _GivenUpError()
        with suppress(OSError):  # closing writes what is buffered, for which there may be no room; then what was there goes all the same
            self._stack.__exit__(type(error), error, None)


class _GivenUpError(Exception):
    pass


def compressed(values: np.ndarray, samples: int, level: int) -> bytes:  # [n, ...]
    """A chunk of `samples` samples as HDF5's filters shuffle and gzip make it; the rest of the last chunk is zeros."""
    if len(values) < samples:
        values = np.concatenate([values, np.zeros((samples - len(values), *values.shape[1:]), values.dtype)])
    shuffled = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    return zlib.compress(shuffled.tobytes(), level)


def read_part(path: Path) -> Iterator[bytes]:
    """The blobs of a part, in order. Raises ValueError where it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL.itemsize))
        count = int(np.frombuffer(file.read(), _TAIL)[0]) if size >= _TAIL.itemsize else -1
        table = (2 * count + 1) * _TAIL.itemsize
        if count < 0 or table > size:
            raise ValueError(f"{path}: damaged")
        file.seek(size - table)
        entries = np.frombuffer(file.read(2 * count * _TAIL.itemsize), _TAIL).reshape(-1, 2)
        if entries[:, 0].sum() + table != size:
            raise ValueError(f"{path}: damaged")
        file.seek(0)
        for length, checksum in entries.tolist():
            blob = file.read(length)
            if zlib.crc32(blob) != checksum:
                raise ValueError(f"{path}: damaged")
            yield blob


def assemble(path: str | os.PathLike[str], layout: Layout, parts: list[Path], rows: np.ndarray, descriptors: Mapping[str, Any]) -> None:
    """Write the HDF5 file of all blocks::

        trajectories/<area>   float32 or float16 [T, n, D] ("gap") or [T, n, C, H, W], chunks of some samples at one time step, gzip
        labels, index         int64 [n]; index: each image's number in the data
        predictions           int64 [T, n], where there is a readout
        attributes            format, descriptors (JSON)

    Equal contents give equal bytes. Raises ValueError where a part is damaged. Memory: a chunk, and the tables [n].
    """
    plan, count = layout.plan, layout.plan.images
    labels = np.empty(count, np.int64)
    predictions = None if layout.predictions is None else np.empty((layout.predictions, count), np.int64)
    with hdf5_out(path) as (file, below):
        file.attrs.update({"format": FORMAT, "descriptors": json.dumps(dict(descriptors))})
        datasets = {}
        for name, (steps, *rest) in layout.shapes.items():
            options: dict[str, Any] = {"chunks": (1, min(layout.chunk_samples(name), count), *rest)}
            if layout.chunk_samples(name) > count:  # a chunk may not be larger than a dataset of fixed size
                options |= {"chunks": (1, layout.chunk_samples(name), *rest), "maxshape": (steps, None, *rest)}
            datasets[name] = file.create_dataset(
                f"trajectories/{name}", (steps, count, *rest), dtype=layout.dtype, track_times=False,
                compression="gzip", compression_opts=layout.compression, shuffle=True, **options,
            )  # fmt: skip
        for block, part in enumerate(parts):
            blobs = read_part(part)
            span = plan.rows_of(block)
            for start in range(span.start, span.stop, plan.batch_size):
                stop = min(start + plan.batch_size, span.stop)
                below.check()
                for name, dataset in datasets.items():
                    for first in range(start, stop, layout.chunk_samples(name)):
                        for t in range(dataset.shape[0]):
                            dataset.id.write_direct_chunk((t, first, *[0] * (dataset.ndim - 2)), next(blobs))
                labels[start:stop] = np.frombuffer(next(blobs), np.int64)
                if predictions is not None:
                    predictions[:, start:stop] = np.frombuffer(next(blobs), np.int64).reshape(len(predictions), -1)
        tables = {"labels": labels, "index": rows} | ({} if predictions is None else {"predictions": predictions})
        for name, values in tables.items():
            file.create_dataset(name, data=values, track_times=False, **checked(values))
