"""Norms and changes of representations, per area and time step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rnndyn_fast.analysis.protocol import Batch, SumReducer, Table, by_area, check_areas, mean_of, spread_of

_AXES = ("area", "t")


class _AreaReducer(SumReducer):
    """A reducer with areas and no other option."""

    def __init__(self, areas: Sequence[str] = ("gap",)) -> None:
        super().__init__()
        self.areas = check_areas(areas)

    @property
    def requires(self) -> tuple[str, ...]:
        """The areas."""
        return self.areas

    @property
    def options(self) -> dict[str, Any]:
        """The areas."""
        return {"areas": list(self.areas)}


class NormReducer(_AreaReducer):
    r"""L2 norm over all units of an area, :math:`\lVert r_a[t] \rVert`: mean, standard deviation and n over samples.

    Tables ``norm``, ``norm_sd`` [area, t], in the order of `areas`.

    Deterministic: yes. Memory: 16 bytes per area and time step.

    >>> reducer = NormReducer(["it"])
    >>> reducer.add(Batch([0], [1], {"it": np.full((2, 1, 4), 3.0)}))
    >>> reducer.result()["norm"].tolist()
    [[6.0, 6.0]]
    """

    name = "norms"

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Sums and sums of squares [T] per area."""
        sums = {}
        for area in self.areas:
            norm = batch.norms(area)[0].cpu().numpy()
            sums[f"{area}.total"], sums[f"{area}.squares"] = norm.sum(1), np.square(norm).sum(1)
        return sums

    def tables(self) -> dict[str, Table]:
        """Means and standard deviations."""
        n = len(self)
        mean = {area: mean_of(self.sums[f"{area}.total"], n) for area in self.areas}
        sd = {area: spread_of(self.sums[f"{area}.total"], self.sums[f"{area}.squares"], n) for area in self.areas}
        return {"norm": Table(_AXES, by_area(self.areas, mean)), "norm_sd": Table(_AXES, by_area(self.areas, sd))}


class RepresentationChangeReducer(_AreaReducer):
    r"""L2 change between successive steps, :math:`\lVert r_a[t + 1] - r_a[t] \rVert`, and the same divided by :math:`\lVert r_a[t] \rVert`.

    Tables ``change``, ``change_sd``, ``relative_change`` [area, t -> t + 1]: T - 1 columns, none where T = 1. A sample whose norm is 0
    at t has no relative change there; ``relative_change_n`` counts those that have.

    Deterministic: yes. Memory: 32 bytes per area and transition.

    >>> reducer = RepresentationChangeReducer(["it"])
    >>> reducer.add(Batch([0], [1], {"it": np.array([[[3.0, 4.0]], [[3.0, 9.0]]])}))
    >>> reducer.result()["relative_change"].tolist()
    [[1.0]]
    """

    name = "change"

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Sums, sums of squares, sums relative to the norm and their counts, [T - 1] per area."""
        sums = {}
        for area in self.areas:
            norm, change = (values.cpu().numpy() for values in batch.norms(area))
            moving = norm[:-1] > 0
            relative = np.divide(change, norm[:-1], out=np.zeros_like(change), where=moving)
            sums[f"{area}.total"], sums[f"{area}.squares"] = change.sum(1), np.square(change).sum(1)
            sums[f"{area}.relative"], sums[f"{area}.relative_n"] = relative.sum(1), moving.sum(1)
        return sums

    def tables(self) -> dict[str, Table]:
        """Means, standard deviations, counts."""
        sums, n = self.sums, len(self)
        rows = {
            "change": {a: mean_of(sums[f"{a}.total"], n) for a in self.areas},
            "change_sd": {a: spread_of(sums[f"{a}.total"], sums[f"{a}.squares"], n) for a in self.areas},
            "relative_change": {a: mean_of(sums[f"{a}.relative"], sums[f"{a}.relative_n"]) for a in self.areas},
            "relative_change_n": {a: sums[f"{a}.relative_n"].astype(np.float64) for a in self.areas},
        }
        return {name: Table(("area", "transition"), by_area(self.areas, values)) for name, values in rows.items()}
