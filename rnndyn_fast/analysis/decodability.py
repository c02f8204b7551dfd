"""How well a linear classifier reads the labels from the representations of each time step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rnndyn_fast.analysis.accumulators import Z95, divide
from rnndyn_fast.analysis.protocol import Batch, SumReducer, Table, by_area, check_areas

_WIDEST = 4096  # an area's second moments are T of D x D float64
_CONSTANT = 1e-12  # variances below this share of the mean square are rounding


class DecodabilityReducer(SumReducer):
    r"""Accuracy on held-out samples of linear discriminant analysis of (pooled) representations, per area and time step.

    One pass, memory that does not grow: all samples go into class counts, class sums and second moments, and of at most `held_out`
    samples the representations themselves are kept: those with the smallest pseudo-random numbers, a fixed function of the sample's
    number in the data set, so that any split of the data keeps the same ones. These form `folds` folds; the classifier for a
    fold's samples is made from everything but that fold (its samples are taken out of the sums again). With class means
    :math:`\mu_c`, shares :math:`\pi_c`, and the covariance within classes shrunk towards a sphere,
    :math:`S = (1 - \lambda) \Sigma + \lambda\, (\operatorname{tr} \Sigma / D)\, I`, a representation r is of the class with the largest

    .. math:: \mu_c^T S^{-1} r - \tfrac12 \mu_c^T S^{-1} \mu_c + \log \pi_c .

    Tables [area, t]: ``accuracy``, and ``ci95``, the half-width of its 95% interval (binomial); ``chance``, the share of the most
    frequent class; ``tested``, the number of held-out samples (both [area]). NaN where a single sample leaves nothing to learn from.

    Args:
        areas: areas; maps are averaged over their places.
        num_classes: C; labels lie in [0, C).
        held_out: most samples kept; 2,000 give an interval of at most 2.2 points.
        folds: at least 2.
        shrinkage: lambda, above 0 and at most 1.

    Deterministic: yes. Memory per area: 8 T (C D + D^2) bytes and 4 T D bytes per sample held out.
    """

    name = "decodability"

    def __init__(
        self,
        areas: Sequence[str] = ("gap",),
        *,
        num_classes: int,
        held_out: int = 2000,
        folds: int = 5,
        shrinkage: float = 0.1,
    ) -> None:
        super().__init__()
        self.areas = check_areas(areas)
        for name, value, least in (("num_classes", num_classes, 1), ("held_out", held_out, 1), ("folds", folds, 2)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage: expected a number above 0 and at most 1, got {shrinkage}")
        self.num_classes, self.held_out, self.folds, self.shrinkage = num_classes, held_out, folds, float(shrinkage)

    @property
    def requires(self) -> tuple[str, ...]:
        """The areas."""
        return self.areas

    @property
    def options(self) -> dict[str, Any]:
        """Areas and how the classifier is made and tested."""
        names = ("num_classes", "held_out", "folds", "shrinkage")
        return {"areas": list(self.areas), **{name: getattr(self, name) for name in names}}

    def measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Class counts [C], class sums [T, C, D], second moments [T, D, D], and the samples that may be held out."""
        labels = batch.labels.cpu()
        if int(labels.max()) >= self.num_classes or int(labels.min()) < 0:
            raise ValueError(f"labels: expected [N] in [0, C) = [0, {self.num_classes}), got {int(labels.min())}..{int(labels.max())}")
        number = random_numbers(batch.index)
        limit = self._limit()
        kept = np.flatnonzero(number <= limit) if limit is not None else np.arange(len(batch))
        sums: dict[str, np.ndarray] = {"count": np.bincount(labels.numpy(), minlength=self.num_classes)}
        sums["held.index"], sums["held.label"] = batch.index[kept], labels.numpy()[kept]
        for area in self.areas:
            values = batch.pooled(area).cpu()  # [T, N, D]
            steps, _, dims = values.shape
            if dims > _WIDEST:
                raise ValueError(f"areas: expected at most {_WIDEST} dimensions, {area!r} has {dims}; average or project it first")
            total = torch.zeros(steps, self.num_classes, dims, dtype=torch.float64)
            total.index_add_(1, labels, values.double())
            sums[f"{area}.total"], sums[f"{area}.outer"] = total.numpy(), batch.products(area).cpu().numpy()
            sums[f"held.{area}"] = values[:, torch.from_numpy(kept)].float().permute(1, 0, 2).contiguous().numpy()
        return sums

    def _limit(self) -> np.uint64 | None:
        """The largest number among a full set of held-out samples: later ones must lie below."""
        held = self.sums.get("held.index")
        return random_numbers(held).max() if held is not None and len(held) >= self.held_out else None

    def _include(self, values: Mapping[str, np.ndarray], name: str) -> None:
        if not values:
            return
        held = {key: value for key, value in values.items() if key.startswith("held.")}
        old = self.sums
        self.sums = {key: value for key, value in old.items() if key not in held}
        try:
            super()._include({key: value for key, value in values.items() if key not in held}, name)
        except ValueError:
            self.sums = old
            raise
        mine = {key: old[key] if old else value[:0] for key, value in held.items()}
        index = np.concatenate([mine["held.index"], held["held.index"]])
        # The first `held_out` of them, by their numbers.
        first = np.lexsort((index, random_numbers(index)))[: self.held_out]
        before = len(mine["held.index"])
        stay, come = np.sort(first[first < before]), first[first >= before] - before
        if before == self.held_out:  # those that come take the places of those that leave: most batches bring a few, of tens of MiB
            leave = np.setdiff1d(np.arange(before), stay)
            for key, value in held.items():
                mine[key][leave] = value[come]
        else:
            mine = {key: np.concatenate([mine[key][stay], value[come]]) for key, value in held.items()}
        self.sums.update(mine)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums and the held-out samples."""
        arrays = {name: np.asarray(value).copy() for name, value in state.items()}
        super().load_state_dict({name: value for name, value in arrays.items() if not name.startswith("held.")})
        self.sums.update({name: value for name, value in arrays.items() if name.startswith("held.")})

    def tables(self) -> dict[str, Table]:
        """Accuracies; the classifiers are made here."""
        n = len(self)
        label, index = self.sums["held.label"], self.sums["held.index"]
        fold = random_numbers(index, stream=1) % np.uint64(self.folds)
        rows: dict[str, dict[str, np.ndarray]] = {"accuracy": {}, "ci95": {}}
        for area in self.areas:
            steps = self.sums[f"{area}.total"].shape[0]
            right, tested = np.zeros(steps), 0
            for f in range(self.folds):
                members = np.flatnonzero(fold == f)
                if len(members) and len(members) < n:
                    tested += len(members)
                    right += self._correct(area, members, label[members])
            rate = divide(right, np.full(steps, float(tested)))
            rows["accuracy"][area], rows["ci95"][area] = rate, Z95 * np.sqrt(divide(rate * (1 - rate), np.full(steps, float(tested))))
        tables = {name: Table(("area", "t"), by_area(self.areas, values)) for name, values in rows.items()}
        for name, value in (("chance", self.sums["count"].max() / n), ("tested", float(len(index)))):
            tables[name] = Table(("area",), np.full(len(self.areas), value))
        return tables

    def _correct(self, area: str, members: np.ndarray, label: np.ndarray) -> np.ndarray:  # [M], [M] -> [T]
        """Held-out samples that the classifier made without them gets right, per time step."""
        y = torch.from_numpy(label)
        count = torch.from_numpy(self.sums["count"] - np.bincount(label, minlength=self.num_classes)).double()
        samples, known = float(count.sum()), count > 0
        divisor, log_share = count.clamp(min=1.0)[:, None], torch.log(count / samples)  # -inf: a class that was not seen
        right = []
        for t in range(self.sums[f"{area}.total"].shape[0]):
            x = torch.from_numpy(self.sums[f"held.{area}"][members, t]).double()  # [M, D]
            total = torch.from_numpy(self.sums[f"{area}.total"][t]).index_add(0, y, x, alpha=-1.0)
            outer = torch.addmm(torch.from_numpy(self.sums[f"{area}.outer"][t]), x.T, x, alpha=-1.0)
            mean = torch.where(known[:, None], total / divisor, 0.0)
            within = torch.addmm(outer, (mean * divisor).T, mean, alpha=-1.0).div_(samples)
            size, square = (max(float(m.trace()), 0.0) / len(m) for m in (within, outer))
            if size <= _CONSTANT * square / samples:
                within.zero_()  # no spread within classes: the nearest mean
                size = 1.0
            within.mul_(1 - self.shrinkage).diagonal().add_(self.shrinkage * size)
            weight = torch.linalg.solve(within, mean.T)  # [D, C]
            score = x @ weight - 0.5 * (mean.T * weight).sum(0) + log_share
            right.append(int((score.argmax(1) == y).sum()))
        return np.array(right, np.float64)


def random_numbers(index: np.ndarray, stream: int = 0) -> np.ndarray:  # [N] int64 -> [N] uint64
    """A fixed pseudo-random number of every index (the finaliser of SplitMix64), the same on every machine."""
    z = index.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (stream + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
