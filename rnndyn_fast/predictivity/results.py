"""What a comparison with recordings gives, and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rnndyn_fast.analysis.npz_results import load_npz, save_npz

FORMAT = "rnndyn_fast.predictivity/1"
RESAMPLES = 2000


class MedianSummary(NamedTuple):
    """Medians over neurons with 95% intervals (bootstrap over neurons) and the number of neurons; arrays of one shape."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


@dataclass(frozen=True)
class PredictivityResult:
    """How well one area predicts recorded neurons; B time bins that have a model step, K neurons.

    Args:
        area: its name.
        correlation: [B, K] between held-out predictions and responses averaged over repeats.
        reliability: [B, K] of those averages, NaN where there are no repeats.
        corrected: [B, K], correlation with the noise of the recording (and with ``correct_fit`` of the fit) taken out; NaN for
            neurons below ``min_reliability``.
        steps: [B] time step of the model for each bin.
        bins: [B] index of the bin in the recording.
        bin_edges_ms: [B, 2], or None.
        neurons: K names.
        descriptors: options and provenance, anything JSON can hold.
    """

    area: str
    correlation: np.ndarray
    reliability: np.ndarray
    corrected: np.ndarray
    steps: np.ndarray
    bins: np.ndarray
    bin_edges_ms: np.ndarray | None
    neurons: tuple[str, ...]
    descriptors: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, name: str = "corrected") -> MedianSummary:
        """Median over neurons per time bin, [B], of "corrected", "correlation" or "reliability"."""
        return median_summary(self._table(name))

    def over_bins(self, name: str = "corrected") -> MedianSummary:
        """The same of each neuron's mean over its time bins, []."""
        table = self._table(name)
        there = ~np.isnan(table)
        counts = there.sum(0)
        means = np.divide(np.where(there, table, 0.0).sum(0), counts, out=np.full(len(counts), np.nan), where=counts > 0)
        return MedianSummary(*(part[0] for part in median_summary(means[None])))

    def _table(self, name: str) -> np.ndarray:
        if name not in ("corrected", "correlation", "reliability"):
            raise ValueError(f"name: expected 'corrected', 'correlation' or 'reliability', got {name!r}")
        return np.asarray(getattr(self, name))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to an NPZ file, atomically."""
        return save_npz(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PredictivityResult:
        """Read what :meth:`save` wrote. Raises FileNotFoundError, or ValueError for any other kind of file."""
        values = load_npz(path, FORMAT, "predictivity result")
        values["area"] = str(values["area"])
        values["neurons"] = tuple(map(str, values["neurons"]))
        return cls(**{"bin_edges_ms": None, **values})


def median_summary(
    table: np.ndarray,  # [B, K]
    seed: int = 0,
) -> MedianSummary:
    """Median of every row over what is not NaN, with the 2.5% and 97.5% points of medians of RESAMPLES resampled rows."""
    rng = np.random.default_rng(seed)
    median, low, high = (np.full(len(table), np.nan) for _ in range(3))
    counts = (~np.isnan(table)).sum(1)
    for row, values in enumerate(table):
        values = values[~np.isnan(values)]
        if len(values):
            median[row] = np.median(values)
            drawn = np.median(values[rng.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)
            low[row], high[row] = np.percentile(drawn, [2.5, 97.5])
    return MedianSummary(median, low, high, counts)
