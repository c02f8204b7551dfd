"""Representational dissimilarity matrices over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from rnndyn_fast.analysis.protocol import Batch, SumReducer, Table, check_areas, mean_of

Distance = Literal["correlation", "euclidean"]
DISTANCES = ("correlation", "euclidean")


class RdmReducer(SumReducer):
    r"""Dissimilarities between conditions at every time step, from the conditions' mean (pooled) representations m.

    A condition is a class (`classes`) or a single image (`images`); others are passed over. The distance is
    :math:`1 - \operatorname{corr}(m_i, m_j)` over units, or :math:`\lVert m_i - m_j \rVert`.

    Tables: per area ``rdm.<area>`` [t, condition, condition], symmetric with a diagonal of 0; ``conditions`` and ``n`` [condition].
    Conditions that did not occur, and constant representations under "correlation", have NaN.

    Args:
        areas: areas; maps are averaged over their places.
        classes: labels, each once; or
        images: numbers of images in the data set, each once.
        distance: "correlation" or "euclidean".

    Deterministic: yes. Memory: 8 T K D bytes per area, for K conditions.
    Source: Kriegeskorte, Mur & Bandettini (2008), Frontiers in Systems Neuroscience 2:4.

    >>> reducer = RdmReducer(["it"], classes=[0, 1], distance="euclidean")
    >>> reducer.add(Batch([0, 1], [0, 1], {"it": np.array([[[0.0, 0.0], [3.0, 4.0]]])}))
    >>> reducer.result()["rdm.it"][0].tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """

    name = "rdm"

    def __init__(
        self,
        areas: Sequence[str] = ("gap",),
        *,
        classes: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
        distance: Distance = "correlation",
    ) -> None:
        super().__init__()
        self.areas = check_areas(areas)
        if (classes is None) == (images is None):
            raise ValueError("classes: expected either classes or images, got " + ("neither" if classes is None else "both"))
        if distance not in DISTANCES:
            raise ValueError(f"distance: expected one of {DISTANCES}, got {distance!r}")
        self.by = "classes" if classes is not None else "images"
        given = np.asarray(classes if classes is not None else images)
        if given.ndim != 1 or not len(given) or not np.issubdtype(given.dtype, np.integer) or given.min() < 0:
            raise ValueError(f"{self.by}: expected integers [K] of at least 0, K >= 1, got {given.tolist()}")
        self.conditions = np.unique(given).astype(np.int64)
        if len(self.conditions) != len(given):
            raise ValueError(f"{self.by}: expected each once, got {given.tolist()}")
        self.distance = distance

    @property
    def requires(self) -> tuple[str, ...]:
        """The areas."""
        return self.areas

    @property
    def options(self) -> dict[str, Any]:
        """Areas, conditions, distance."""
        return {"areas": list(self.areas), self.by: self.conditions.tolist(), "distance": self.distance}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Samples per condition [K] and sums of representations [T, K, D] per area."""
        which = batch.labels.cpu().numpy() if self.by == "classes" else batch.index
        row = np.minimum(np.searchsorted(self.conditions, which), len(self.conditions) - 1)
        chosen = np.flatnonzero(self.conditions[row] == which)
        row = row[chosen]
        sums: dict[str, np.ndarray] = {"n": np.bincount(row, minlength=len(self.conditions))}
        for area in self.areas:
            values = batch.pooled(area)
            total = torch.zeros(values.shape[0], len(self.conditions), values.shape[2], dtype=torch.float64)
            total.index_add_(1, torch.from_numpy(row), values[:, torch.from_numpy(chosen).to(values.device)].double().cpu())
            sums[f"{area}.total"] = total.numpy()
        return sums

    def tables(self) -> dict[str, Table]:
        """The matrices."""
        count = self.sums["n"]
        tables = {"conditions": Table(("condition",), self.conditions.copy()), "n": Table(("condition",), count.copy())}
        for area in self.areas:
            means = mean_of(self.sums[f"{area}.total"], count[:, None])
            tables[f"rdm.{area}"] = Table(("t", "condition", "condition"), np.stack([_distances(m, self.distance) for m in means]))
        return tables


def _distances(means: np.ndarray, distance: str) -> np.ndarray:  # [K, D] -> [K, K]
    """Distances between rows, NaN where a row is NaN, or constant under "correlation"."""
    if distance == "euclidean":
        rows = torch.from_numpy(np.nan_to_num(means))
        out = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        known = ~np.isnan(means).any(1)
    else:
        centred = means - means.mean(1, keepdims=True)
        length = np.linalg.norm(centred, axis=1)
        known = length > 1e-12 * np.linalg.norm(means, axis=1)  # (a NaN is not)
        unit = np.where(known[:, None], centred, 0.0) / np.where(known, length, 1.0)[:, None]
        out = 1.0 - np.clip(unit @ unit.T, -1.0, 1.0)
        np.fill_diagonal(out, 0.0)
    out[~known], out[:, ~known] = np.nan, np.nan
    return out
