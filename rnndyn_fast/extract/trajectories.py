"""Trajectories on disk: activations over time of chosen areas, written batch by batch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import torch

FORMAT = "rnndyn_fast.trajectories/1"
_CHUNK_BYTES = 2**20


class TrajectoryWriter:
    """Writes activations [T, n, ...] of several areas to an HDF5 file, n growing batch by batch::

        trajectories/<area>   float32 or float16 [T, n, D] ("gap") or [T, n, C, H, W], chunked over samples
        labels                int64 [n]
        predictions           int64 [T, n]
        attributes            format, descriptors (JSON)

    Args:
        path: the file; what was there is replaced (see `extract` for how it is kept until all is written).
        count: n, the number of samples to come.
        dtype: "float32" or "float16".
        descriptors: provenance, anything JSON can hold.

    Memory: one batch.
    """

    def __init__(self, path: str | os.PathLike[str], count: int, dtype: str, descriptors: Mapping[str, Any]) -> None:
        self._file = h5py.File(path, "w")
        self._file.attrs.update({"format": FORMAT, "descriptors": json.dumps(dict(descriptors))})
        self._count, self._dtype = count, np.dtype(dtype)
        self._start = 0

    def add(
        self,
        activations: Mapping[str, torch.Tensor],  # [T, N, ...] each
        labels: torch.Tensor,  # [N]
        predictions: torch.Tensor,  # [T, N]
    ) -> None:
        """Write the next N samples."""
        rows = slice(self._start, self._start + len(labels))
        for name, values in activations.items():
            dataset = self._dataset(f"trajectories/{name}", tuple(values.shape))
            dataset[:, rows] = values.cpu().numpy().astype(self._dtype, copy=False)
        self._table("labels", (self._count,))[rows] = labels.numpy()
        self._table("predictions", (len(predictions), self._count))[:, rows] = predictions.cpu().numpy()
        self._start = rows.stop

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _dataset(self, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        if name not in self._file:
            steps, _, *rest = shape
            sample_bytes = int(np.prod(rest)) * self._dtype.itemsize
            # One step of some samples: an analysis walks through samples or looks at one step, both are cheap then.
            samples = max(1, min(self._count, _CHUNK_BYTES // sample_bytes))
            self._file.create_dataset(name, (steps, self._count, *rest), dtype=self._dtype, chunks=(1, samples, *rest), track_times=False)
        return self._file[name]

    def _table(self, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        if name not in self._file:
            self._file.create_dataset(name, shape, dtype=np.int64, track_times=False)
        return self._file[name]
