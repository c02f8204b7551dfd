"""What a reducer is: batches of trajectories go in, sums stay, and the sums of any split of the samples add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.accumulators import divide
from rnndyn_fast.analysis.inputs import as_floats, as_labels
from rnndyn_fast.ops.trajectory_norms import trajectory_norms


class Batch:
    """Some samples: which they are, and their activations over time in some areas.

    What several reducers need of an area (``pooled``, ``norms``) is computed once, when the first one asks.

    Args:
        index: int64 [N], each sample's number in the data set: its identity, whatever the order or the process.
        labels: integers [N].
        areas: area -> activations [T, N, ...], floating point; T may differ between areas.
        log_probs: [T, N, C], or None: there is no readout, or predictions are those of the logits.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
    """

    def __init__(self, index: Any, labels: Any, areas: Mapping[str, Any], log_probs: Any = None) -> None:
        self.index = np.asarray(index, np.int64)
        if self.index.ndim != 1 or not len(self.index):
            raise ValueError(f"index: expected shape [N] with N >= 1, got {list(self.index.shape)}")
        self.labels = as_labels("labels", labels, len(self.index), 2**62)  # [N]
        self.areas: dict[str, Tensor] = {}
        for name, values in areas.items():
            dims = max(np.ndim(values), 3)
            sizes = (None, len(self.index), *[None] * (dims - 2))
            self.areas[name] = as_floats(f"areas[{name!r}]", values, "[T, N, ...]", sizes)
        self.log_probs = None if log_probs is None else as_floats("log_probs", log_probs, "[T, N, C]", (None, len(self.index), None))
        self._pooled: dict[str, Tensor] = {}
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}
        self._products: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.index)

    def area(self, name: str) -> Tensor:
        """Activations [T, N, ...] of an area. Raises ValueError where the batch has none of it."""
        if name not in self.areas:
            raise ValueError(f"areas: a reducer needs {name!r}, the batch has {', '.join(self.areas) or 'none'}")
        return self.areas[name]

    def pooled(self, name: str) -> Tensor:
        """Representations [T, N, D]: of a map [T, N, C, H, W] the mean over its places (D = C), else the values themselves."""
        if name not in self._pooled:
            values = self.area(name)
            self._pooled[name] = values.mean((3, 4)) if values.dim() == 5 else values.flatten(2)
        return self._pooled[name]

    def products(self, name: str) -> Tensor:
        """Sums over samples of the outer products of pooled representations, float64 [T, D, D]."""
        if name not in self._products:
            values = self.pooled(name).double()
            self._products[name] = values.mT @ values
        return self._products[name]

    def norms(self, name: str) -> tuple[Tensor, Tensor]:
        """L2 norm [T, N] and L2 change between successive steps [T - 1, N] over all units of an area, float64."""
        if name not in self._norms:
            self._norms[name] = trajectory_norms(self.area(name))
        return self._norms[name]


class Table(NamedTuple):
    """Numbers of a result and what their dimensions are, as ("area", "t")."""

    axes: tuple[str, ...]
    values: np.ndarray


@dataclass
class ReducerResult:
    """What a reducer found: named tables (NaN where a group is empty), `n` samples, the reducer's options, provenance."""

    name: str
    n: int
    tables: dict[str, Table]
    options: dict[str, Any] = field(default_factory=dict)
    descriptors: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, table: str) -> np.ndarray:
        """The values of a table. Raises ValueError where there is none of that name."""
        if table not in self.tables:
            raise ValueError(f"table: expected one of {', '.join(self.tables)}, got {table!r}")
        return self.tables[table].values


class Reducer(ABC):
    """A streaming measure of trajectories.

    ``add`` takes in a batch, ``merge`` what another reducer of the same options took in; ``result`` is the same, but for rounding of
    float64 sums, however the samples are split and ordered, and bit for bit the same where the same batches are added and
    merged in the same order. ``state_dict`` holds all of it.
    """

    name: str  # its key in results and files

    @property
    @abstractmethod
    def requires(self) -> tuple[str, ...]:
        """The areas whose activations it reads."""

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with, as JSON can hold it; reducers merge where these are equal."""
        return {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples taken in."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Take in a batch."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what another reducer took in. Raises TypeError or ValueError where it is of another kind or other options."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything taken in so far: copies, for ``torch.save``."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was taken in by a saved state."""

    @abstractmethod
    def result(self, descriptors: Mapping[str, Any] | None = None) -> Any:
        """The result so far: a ReducerResult, or (readout zones) a ReadoutZoneResult."""


class SumReducer(Reducer):
    """A reducer whose state is named sums (int64 counts, float64 sums), zero until a first batch tells their shapes."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.sums.get("samples", np.zeros((), np.int64)))

    def __repr__(self) -> str:
        options = "".join(f"{name}={value!r}, " for name, value in self.options.items())
        return f"{type(self).__name__}({options}samples={len(self)})"

    def add(self, batch: Batch) -> None:
        """Take in a batch; where it raises, nothing was."""
        self._include({"samples": np.asarray(len(batch), np.int64), **self.measure(batch)}, "batch")

    @abstractmethod
    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """The sums of one batch."""

    def merge(self, other: Any) -> None:
        """Add another reducer's sums."""
        self._require_like(other)
        self._include(other.sums, "other")

    def _require_like(self, other: Any) -> None:
        if type(other) is not type(self):
            raise TypeError(f"other: expected a {type(self).__name__}, got {type(other).__name__}")
        if other.options != self.options:
            raise ValueError(f"other: expected one made with {self.options}, got {other.options}")

    def _include(self, values: Mapping[str, np.ndarray], name: str) -> None:
        if not values:
            return
        if not self.sums:
            self.sums = {key: np.array(value) for key, value in values.items()}
            return
        mine, theirs = ({key: list(value.shape) for key, value in sums.items()} for sums in (self.sums, values))
        if mine != theirs:
            different = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
            raise ValueError(f"{name}: expected sums {different!r} of shape {mine.get(different)} as before, got {theirs.get(different)}")
        for key, value in values.items():  # by torch: covariances are tens of MiB, and NumPy adds on one core
            torch.from_numpy(self.sums[key]).add_(torch.from_numpy(np.require(value, requirements=("C", "W"))))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, copied."""
        return {name: torch.from_numpy(value.copy()) for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums."""
        sums = {name: np.asarray(value).copy() for name, value in state.items()}
        for name, value in sums.items():
            if value.dtype not in (np.int64, np.float64):
                raise ValueError(f"state: expected {name!r} of dtype int64 or float64, got {value.dtype}")
        if sums and "samples" not in sums:
            raise ValueError(f"state: expected sums of a {type(self).__name__}, of which 'samples' is missing")
        self.sums = sums

    def result(self, descriptors: Mapping[str, Any] | None = None) -> ReducerResult:
        """The result so far, independent of what comes later."""
        if not self.sums:
            raise ValueError(f"result: expected at least one batch, {type(self).__name__} has taken in none")
        return ReducerResult(self.name, len(self), self.tables(), self.options, dict(descriptors or {}))

    @abstractmethod
    def tables(self) -> dict[str, Table]:
        """The tables that follow from the sums."""


def by_area(areas: tuple[str, ...], rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows over time of several areas as one table [area, t]; areas that start later have NaN at the steps before.

    Areas of fewer steps end at the same step as the others: in a biological unroll they start later.
    """
    steps = max(len(rows[name]) for name in areas)
    table = np.full((len(areas), steps), np.nan)
    for row, name in zip(table, areas, strict=True):
        row[steps - len(rows[name]) :] = rows[name]
    return table


def mean_of(total: np.ndarray, count: Any) -> np.ndarray:
    """Means of float64 sums, NaN where there is nothing to average."""
    return divide(total, np.asarray(count, np.float64))


def spread_of(total: np.ndarray, squares: np.ndarray, count: Any) -> np.ndarray:
    """Standard deviations (n - 1 below the fraction) from sums and sums of squares, NaN where n < 2."""
    count = np.asarray(count, np.float64)
    deviations = np.maximum(squares - total * np.nan_to_num(divide(total, count)), 0.0)
    return np.sqrt(divide(deviations, np.maximum(count - 1, 0)))


def check_areas(areas: Any) -> tuple[str, ...]:
    """Area names, each once. Raises TypeError or ValueError where they are a single string or none."""
    if isinstance(areas, str):
        raise TypeError(f"areas: expected a sequence of names, got the string {areas!r}")
    if not areas:
        raise ValueError("areas: expected at least one area")
    return tuple(dict.fromkeys(areas))
