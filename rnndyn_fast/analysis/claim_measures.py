"""What the two claims rest on, as weighted means over images: change after stabilisation, and place in the readout zone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rnndyn_fast.analysis.accumulators import divide
from rnndyn_fast.analysis.results import ReadoutZoneResult

PLACES = ("norm", "cos_current", "boundary_distance")
# A class whose images that are stable from the start are fewer is no reference for what its zone looks like.
MIN_REFERENCE = 5
# Change per step, as a share of the norm, below which the logarithm sees no difference: rounding errors of float32.
FLOOR = 1e-6


def pairwise(samples: Mapping[str, np.ndarray], rows: np.ndarray, timesteps: int) -> np.ndarray:  # -> [M, T, T]
    """Distances between the representations of a sample at any two steps."""
    out = np.zeros((len(rows), timesteps, timesteps))
    t, s = np.tril_indices(timesteps, -1)
    out[:, t, s] = out[:, s, t] = samples["distance"][rows]
    return out


class ClaimTables:
    """Per-sample values of a result from which weighted means make what the claims rest on.

    The first transition is the onset of recurrence (lateral and top-down terms are absent at t = 0), so no measure of change has it:
    with f = max(t_stable, 1), and c[t] = ||r[t + 1] - r[t]|| / ||r[t]||, over stable-correct samples:

    - ``change_last``: c[T - 2]; ``change_by_lag`` [T - 2]: c[f + k] by k;
    - ``change_slope``: slope over t >= f of ln max(c[t], 1e-6), by least squares;
    - ``change_order``: mean of ||r[t + 1] - r[t]|| over t >= f, divided by the mean of ||r[t] - r[s]|| over all s < t of those steps, less
      1. The second is what the first is on average when steps are shuffled: 0 for noise;
    - ``straightness``: ||r[T - 1] - r[f]|| divided by the length of the path between them;
    - ``change_untrained``, ``change_vs_untrained``: c[T - 2] of the same images in the untrained network, and what the network has more;
      ``change_untrained_by_lag`` [T - 2].

    For x the norm, cosine to the current class and boundary distance, late samples (t_stable > 0) and steps that are analysed:

    - ``x.matched_label``, ``x.matched_zone``: already stable minus not yet stable samples of the same label, or in the same zone (and of
      the same condition), strata weighted by n_1 n_0 / (n_1 + n_0), averaged over steps;
    - ``x.within``: per late sample, mean over t >= t_stable minus mean over t < t_stable of x[t] - b[t, p[t]], where b[t, c] is the mean
      at t of the samples of class c that are stable from the start: the residents of the zone, at the same step;
    - ``x.within_raw``: the same of x itself, in which the course that all samples take over time is left;
    - ``x.last_step``: at T - 1, samples stable from the start minus late ones.

    ``counts``: images per measure. ``scales``: standard deviation of x between samples of one group at one step.
    """

    def __init__(
        self,
        result: ReadoutZoneResult,
        steps: Mapping[str, np.ndarray],
        untrained: ReadoutZoneResult | None = None,
        condition: Any = None,  # [N]
    ) -> None:
        samples = result.samples
        assert samples is not None
        self.timesteps, self.samples = result.timesteps, samples
        self.chosen = np.flatnonzero(samples["group"] == 0)
        self.time = samples["time"][self.chosen]
        self.label, self.predicted = samples["label"][self.chosen], samples["predicted"][self.chosen]
        self.now = self.time[:, None] <= np.arange(self.timesteps)  # [M, T]
        self.place = {name: samples[name][self.chosen] for name in PLACES}
        self.steps = {name: np.flatnonzero(steps[f"{name}_now_vs_later"]) for name in PLACES}
        self.condition = np.zeros(len(self.chosen), np.int64) if condition is None else self._codes(condition, result.n)
        self.means = self._changes(untrained, result.n)
        self.counts = {name: int(np.isfinite(table).sum()) for name, table in self.means.items() if table.ndim == 1}
        self.lag_counts = np.isfinite(self.means["change_by_lag"]).sum(0)
        self._prepare_within()
        late = int((self.time > 0).sum())
        self.scales = {}
        for name in PLACES:
            self.counts |= dict.fromkeys((f"{name}.matched_label", f"{name}.matched_zone", f"{name}.last_step"), late)
            self.counts |= dict.fromkeys((f"{name}.within", f"{name}.within_raw"), int(self.paired.sum()))
            self.scales[name] = self._scale(name)

    def _codes(self, condition: Any, images: int) -> np.ndarray:
        codes = np.asarray(condition)
        if codes.shape != (images,):
            raise ValueError(f"condition: expected one value per image [{images}], got shape {list(codes.shape)}")
        return np.unique(codes, return_inverse=True)[1][self.chosen]

    # ------------------------------------------------------------ change

    def _changes(self, untrained: ReadoutZoneResult | None, images: int) -> dict[str, np.ndarray]:
        """Per-sample values [M] or [M, K], NaN where there is none."""
        steps = self.timesteps
        change = _relative_change(self.samples, self.chosen)  # [M, T - 1]
        first = np.maximum(self.time, 1)
        late = np.full(len(self.chosen), np.nan)
        last = change[:, -1] if steps >= 3 else late
        means = {"change_last": last, "change_by_lag": _by_lag(change, first)}
        order, straight = self._paths(first)
        means |= {"change_slope": _slope(change, first), "change_order": order, "straightness": straight}
        if untrained is not None:
            if untrained.samples is None:
                raise ValueError("untrained: expected a result with kept samples (keep_samples=True, --keep-samples)")
            if untrained.timesteps != steps:
                raise ValueError(f"untrained: expected T = {steps} time steps, got {untrained.timesteps}")
            if untrained.n != images or not np.array_equal(untrained.samples["label"], self.samples["label"]):
                raise ValueError(f"untrained: expected the same {images} images in the same order, got {untrained.n} with other labels")
            change = _relative_change(untrained.samples, self.chosen)
            control = change[:, -1] if steps >= 3 else late
            means |= {"change_untrained": control, "change_vs_untrained": last - control, "change_untrained_by_lag": _by_lag(change, first)}
        return means

    def _paths(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Successive against shuffled steps, and straightness, of the steps from `first` on."""
        distance = pairwise(self.samples, self.chosen, self.timesteps)
        order, straight = (np.full(len(first), np.nan) for _ in range(2))
        for f in range(1, self.timesteps - 2):  # at least three steps
            rows = np.flatnonzero(first == f)
            block = distance[rows, f:, f:]
            size = block.shape[1]
            following = np.diagonal(block, 1, 1, 2).mean(1)
            order[rows] = divide(following, block.sum((1, 2)) / (size * (size - 1))) - 1
            straight[rows] = divide(block[:, 0, -1], following * (size - 1))
        return order, straight

    # ------------------------------------------------------------ place in the zone

    def _prepare_within(self) -> None:
        """Which late samples can be held against residents, and the weight of each of their steps (positive after, negative before)."""
        self.residents = np.flatnonzero(self.time == 0)
        classes = int(max(self.label.max(initial=0), self.predicted.max(initial=0))) + 1
        known = np.bincount(self.label[self.residents], minlength=classes) >= MIN_REFERENCE
        usable = known[self.predicted] if len(self.predicted) else np.zeros(self.now.shape, bool)
        after, before = self.now & usable, ~self.now & usable
        self.paired = after.any(1) & before.any(1)
        self.late = np.flatnonzero(self.paired)
        after, before = after[self.late], before[self.late]
        self.contrast = after / np.maximum(after.sum(1, keepdims=True), 1) - before / np.maximum(before.sum(1, keepdims=True), 1)
        self.classes = classes
        self.by_class = _Groups(self.label[self.residents])
        self.by_zone = [_Groups(self.predicted[self.late, t]) for t in range(self.timesteps)]

    def _scale(self, name: str) -> float:
        """Standard deviation between samples of one group at one step: pooled over groups, averaged over analysed steps."""
        values, variances = self.place[name], []
        for t in self.steps[name]:
            groups = [values[mask, t] for mask in (self.now[:, t], ~self.now[:, t])]
            groups = [group[np.isfinite(group)] for group in groups]
            freedom = sum(len(group) - 1 for group in groups)
            if freedom > 0:
                variances.append(sum(np.square(group - group.mean()).sum() for group in groups) / freedom)
        return float(np.sqrt(np.mean(variances))) if variances else float("nan")

    def measures(self, weights: np.ndarray) -> dict[str, np.ndarray]:  # [B, N]
        """Every measure of images with weights."""
        chosen = weights[:, self.chosen]  # [B, M]
        out = {}
        for name, table in self.means.items():
            finite = np.isfinite(table)
            out[name] = divide(chosen @ np.where(finite, table, 0.0), chosen @ finite.astype(np.float64))
        for name in PLACES:
            out |= self._matched(name, chosen)
            out |= self._within(name, chosen)
        return out

    def _matched(self, name: str, chosen: np.ndarray) -> dict[str, np.ndarray]:
        values, sums = self.place[name], {"matched_label": [], "matched_zone": []}  # type: ignore[var-annotated]
        for t in self.steps[name]:
            rows = np.flatnonzero(np.isfinite(values[:, t]))
            for kind, what in (("matched_label", self.label), ("matched_zone", self.predicted[:, t])):
                strata = _Groups(what[rows] * (self.condition.max(initial=0) + 1) + self.condition[rows])
                sums[kind].append(_stratified(chosen[:, rows], self.now[rows, t], values[rows, t], strata))
        empty = np.full(len(chosen), np.nan)
        return {f"{name}.{kind}": np.mean(parts, axis=0) if parts else empty for kind, parts in sums.items()}

    def _within(self, name: str, chosen: np.ndarray) -> dict[str, np.ndarray]:
        values = np.where(np.isfinite(self.place[name]), self.place[name], 0.0)
        late, reference = chosen[:, self.late], chosen[:, self.residents]
        total = late.sum(1)
        raw = divide(late @ (self.contrast * values[self.late]).sum(1), total)
        # The residents' part: sum over steps t and zones c of (weights of late samples there) b[t, c].
        course = np.zeros(len(chosen))
        count = self.by_class.sums(reference)  # [B, G]
        plain = self.by_class.sums(np.ones((1, len(self.residents))))
        for t in range(self.timesteps):
            x = values[self.residents, t]
            mean = divide(self.by_class.sums(reference * x), count)
            # A replicate may have none of the residents of a small class: then those there are.
            mean = np.where(np.isfinite(mean), mean, divide(self.by_class.sums(x[None]), plain))
            table = np.zeros((len(chosen), self.classes))
            table[:, self.by_class.keys] = mean
            zones = self.by_zone[t]
            course += (zones.sums(late * self.contrast[:, t]) * table[:, zones.keys]).sum(1)
        resident, late_too = ((chosen * mask) for mask in (self.time == 0, self.time > 0))
        ends = [divide(group @ values[:, -1], group.sum(1)) for group in (resident, late_too)]
        return {
            f"{name}.within": raw - divide(course, total),
            f"{name}.within_raw": raw,
            f"{name}.last_step": ends[0] - ends[1],
        }


class _Groups:
    """Sums over the last axis by group; ``keys`` are the groups that there are."""

    def __init__(self, codes: np.ndarray) -> None:  # [M]
        self.order = np.argsort(codes, kind="stable")
        self.keys, self.starts = np.unique(codes[self.order], return_index=True)

    def sums(self, table: np.ndarray) -> np.ndarray:  # [B, M] -> [B, G]
        if not len(self.keys):
            return np.zeros((len(table), 0))
        return np.add.reduceat(table[:, self.order], self.starts, axis=1)


def _stratified(weights: np.ndarray, now: np.ndarray, values: np.ndarray, strata: _Groups) -> np.ndarray:  # [B, M], [M], [M] -> [B]
    """Difference of the two groups' means within strata, weighted by n_1 n_0 / (n_1 + n_0)."""
    counts, means = [], []
    for mask in (now, ~now):
        kept = weights * mask
        counts.append(strata.sums(kept))
        means.append(divide(strata.sums(kept * values), counts[-1]))
    share = divide(counts[0] * counts[1], counts[0] + counts[1])
    both = np.isfinite(means[0]) & np.isfinite(means[1])
    return divide(np.where(both, share * (means[0] - means[1]), 0.0).sum(1), np.where(both, share, 0.0).sum(1))


def _relative_change(samples: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:  # -> [M, T - 1]
    """Change per step as a share of the norm; NaN where the norm is zero."""
    return divide(samples["change"][rows], samples["norm"][rows, :-1])


def _by_lag(change: np.ndarray, first: np.ndarray) -> np.ndarray:  # [M, T - 1], [M] -> [M, max(T - 2, 1)]
    """Change k steps after `first`, NaN where the trajectory has ended."""
    transitions = change.shape[1]
    out = np.full((len(first), max(transitions - 1, 1)), np.nan)
    for k in range(transitions - 1):
        there = np.flatnonzero(first + k < transitions)
        out[there, k] = change[there, first[there] + k]
    return out


def _slope(change: np.ndarray, first: np.ndarray) -> np.ndarray:  # [M, T - 1], [M] -> [M]
    """Least-squares slope of ln change over the transitions from `first` on; NaN with fewer than two of them, or one undefined."""
    t = np.arange(change.shape[1], dtype=np.float64)
    inside = t >= first[:, None]
    y = np.where(inside, np.log(np.maximum(change, FLOOR)), 0.0)
    count = inside.sum(1)
    centred = np.where(inside, t - divide((inside * t).sum(1), count)[:, None], 0.0)
    slope = divide((centred * y).sum(1), (centred**2).sum(1))
    return np.where(count >= 2, slope, np.nan)
