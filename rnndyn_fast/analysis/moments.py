"""Means, covariances and participation ratio of representations, per area and time step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.accumulators import divide
from rnndyn_fast.analysis.protocol import Batch, SumReducer, Table, by_area, check_areas

_AXES = ("area", "t")


class MomentReducer(SumReducer):
    r"""First and second moments over samples, and from them how many dimensions the representations of a time step fill.

    With the covariance C of the D units of an area (n - 1 below the fraction), the participation ratio is

    .. math:: (\operatorname{tr} C)^2 / \operatorname{tr} C^2,

    between 1 and D. Areas of at most `exact` units are computed from the whole covariance. Of a wider area k = `units` units, drawn
    once without replacement, stand for all: with the sums over the drawn ones,

    .. math::
        \operatorname{tr} C \approx \tfrac{D}{k} \sum_i C_{ii}, \qquad
        \operatorname{tr} C^2 \approx \tfrac{D}{k} \sum_i C_{ii}^2 + \tfrac{D (D - 1)}{k (k - 1)} \sum_{i \ne j} C_{ij}^2,

    which are unbiased over draws. The draw depends on D and `seed` alone. Fewer samples than dimensions bias the ratio downwards: it is
    at most n - 1.

    Tables [area, t]: ``participation_ratio``, ``variance`` (tr C), ``mean`` (over samples and units), ``mean_norm`` (the norm of the mean
    representation, for drawn units scaled by sqrt(D / k)). Constant representations have a variance of 0 and no ratio (NaN); one sample
    has neither.

    Args:
        areas: areas, each [T, N, ...] over all their units.
        units: k >= 2.
        exact: widest area computed exactly.
        seed: of the draw.

    Deterministic: yes. Memory: 8 T k^2 bytes per area (k = D where exact).
    Source of the ratio: Gao, Trautmann, Yu, Santhanam, Ryu, Shenoy & Ganguli (2017), bioRxiv 214262.

    >>> reducer = MomentReducer(["it"])
    >>> reducer.add(Batch([0, 1, 2, 3], [0] * 4, {"it": np.array([[[1.0, 0], [-1, 0], [0, 1], [0, -1]]])}))
    >>> round(float(reducer.result()["participation_ratio"][0, 0]), 6)
    2.0
    """

    name = "moments"

    def __init__(self, areas: Sequence[str] = ("gap",), *, units: int = 256, exact: int = 1024, seed: int = 0) -> None:
        super().__init__()
        self.areas = check_areas(areas)
        for name, value, least in (("units", units, 2), ("exact", exact, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.units, self.exact, self.seed = units, exact, seed
        self._drawn: dict[int, np.ndarray] = {}

    @property
    def requires(self) -> tuple[str, ...]:
        """The areas."""
        return self.areas

    @property
    def options(self) -> dict[str, Any]:
        """Areas and how units are drawn."""
        return {"areas": list(self.areas), "units": self.units, "exact": self.exact, "seed": self.seed}

    def drawn(self, dims: int) -> np.ndarray:
        """The units [k] that stand for an area of D = `dims` units, ascending; all of them where that is exact."""
        if dims <= max(self.exact, self.units):
            return np.arange(dims)
        if dims not in self._drawn:
            self._drawn[dims] = np.sort(np.random.default_rng([self.seed, dims]).choice(dims, self.units, replace=False))
        return self._drawn[dims]

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Sums [T, k] and sums of outer products [T, k, k] per area."""
        sums = {}
        for area in self.areas:
            values = batch.area(area)
            dims = values[0, 0].numel()
            units = self.drawn(dims)
            if values.dim() == 3 and len(units) == dims:  # shared with other reducers
                chosen, outer = values.double(), batch.products(area)
            else:
                chosen = _chosen(values, units).double()
                outer = chosen.mT @ chosen
            sums[f"{area}.total"], sums[f"{area}.outer"] = chosen.sum(1).cpu().numpy(), outer.cpu().numpy()
            sums[f"{area}.width"] = np.asarray(dims * len(batch), np.int64)  # a sum like all of them; D is width / samples
        return sums

    def covariance(self, area: str) -> np.ndarray:
        """Covariance [T, k, k] of an area's (drawn) units so far; NaN where there are fewer than two samples."""
        n = len(self)
        total, outer = self.sums[f"{area}.total"], self.sums[f"{area}.outer"]
        if n < 2:
            return np.full(outer.shape, np.nan)
        return (outer - total[:, :, None] * total[:, None, :] / n) / (n - 1)

    def tables(self) -> dict[str, Table]:
        """The tables."""
        n = len(self)
        rows: dict[str, dict[str, np.ndarray]] = {"participation_ratio": {}, "variance": {}, "mean": {}, "mean_norm": {}}
        for area in self.areas:
            mean = self.sums[f"{area}.total"] / n  # [T, k]
            dims, k = int(self.sums[f"{area}.width"]) // n, mean.shape[1]
            covariance = self.covariance(area)
            diagonal = np.diagonal(covariance, axis1=1, axis2=2)  # [T, k]
            # What rounding leaves of a constant unit's second moment is no variance.
            noise = 64 * np.finfo(np.float64).eps * np.diagonal(self.sums[f"{area}.outer"], axis1=1, axis2=2) / n
            covariance = np.where((diagonal > noise)[:, :, None] & (diagonal > noise)[:, None, :], covariance, 0.0 * covariance)
            diagonal = np.diagonal(covariance, axis1=1, axis2=2)
            squares, own = np.square(covariance).sum((1, 2)), np.square(diagonal).sum(1)
            pairs = dims * (dims - 1) / (k * (k - 1)) if k > 1 else 0.0
            trace = dims / k * diagonal.sum(1)
            rows["variance"][area] = trace
            rows["participation_ratio"][area] = divide(trace**2, dims / k * own + pairs * (squares - own))
            rows["mean"][area] = mean.mean(1)
            rows["mean_norm"][area] = np.sqrt(dims / k * np.square(mean).sum(1))
        return {name: Table(_AXES, by_area(self.areas, values)) for name, values in rows.items()}


def _chosen(
    values: Tensor,  # [T, N, ...]
    units: np.ndarray,  # [k]
) -> Tensor:  # [T, N, k]
    """Some units of an area, numbered over its dimensions in order, whatever its strides are."""
    where = np.unravel_index(units, tuple(values.shape[2:]))
    offset = sum(w * stride for w, stride in zip(where, values.stride()[2:], strict=True))
    # One look-up per unit: an index per dimension takes three times as long.
    span = values.as_strided((*values.shape[:2], int(np.max(offset)) + 1), (*values.stride()[:2], 1))
    return span.index_select(2, torch.as_tensor(offset, device=values.device))
