"""Additive accumulators of the readout-zone analysis: all that is kept of any number of trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

GROUPS = ("stable_correct", "stable_incorrect", "unstable_correct", "unstable_incorrect")
Z95 = 1.959963984540054  # 97.5% point of the normal distribution


class Summary(NamedTuple):
    """A table of means: ``mean``, ``sd`` (n - 1 below the fraction), ``n`` values, half-width ``ci95`` of the 95%
    interval."""

    mean: np.ndarray
    sd: np.ndarray
    n: np.ndarray
    ci95: np.ndarray


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:  # [...], [...] -> [...]
    """numerator / denominator, NaN (without a warning) where the denominator is not positive."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    out = np.full(shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=np.broadcast_to(np.asarray(denominator) > 0, shape))


class Moments:
    """Count, sum and sum of squares of many values, cell by cell; adding two of them is adding the three tables."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(shape, np.int64)
        self.total = np.zeros(shape, np.float64)
        self.squares = np.zeros(shape, np.float64)

    def summary(self) -> Summary:
        """Mean, standard deviation, count and normal 95% half-width ``1.96 sd / sqrt(n)``; NaN where undefined."""
        mean = divide(self.total, self.count)
        # A variance that rounding made negative is zero.
        deviations = np.maximum(self.squares - self.total * np.where(self.count > 0, mean, 0.0), 0.0)
        sd = np.sqrt(divide(deviations, self.count - 1))
        return Summary(mean, sd, self.count.copy(), Z95 * divide(sd, np.sqrt(self.count)))


@dataclass
class Accumulators:
    """Everything the analysis reports, as sums over samples.

    T time steps, C classes. ``later`` tables have two columns: samples already stable at the step (t_stable <= t) and
    not yet (t_stable > t), both among the stable-correct.
    """

    timesteps: int
    classes: int
    samples: np.ndarray = field(init=False)  # [] number of trajectories
    groups: np.ndarray = field(init=False)  # [4] in the order of GROUPS
    t_stable_correct: np.ndarray = field(init=False)  # [T] stable-correct samples per t_stable
    t_stable_incorrect: np.ndarray = field(init=False)  # [T] stable-incorrect samples per t_stable
    t_unstable_correct: np.ndarray = field(init=False)  # [T] unstable-correct samples per first correct step
    accuracy: Moments = field(init=False)  # [T]
    norm: Moments = field(init=False)  # [T, 2]
    cos_current: Moments = field(init=False)  # [T, 2]
    margin: Moments = field(init=False)  # [T, 2]
    boundary_distance: Moments = field(init=False)  # [T, 2]
    cos_final: Moments = field(init=False)  # [T] not yet stable: cosine to the readout vector of the own final class
    change: Moments = field(init=False)  # [T, T - 1] per t_stable and transition
    change_after: Moments = field(init=False)  # [] per sample: mean change after t_stable
    relative_change_after: Moments = field(init=False)  # [] per sample: mean change over norm, after t_stable
    # Not-yet-stable samples by current class c, per step: how many have label a; sums over them of cos(r_i, w_k) and
    # its square for every class k; and the part of those sums where k is the sample's own label.
    pair_count: np.ndarray = field(init=False)  # [T, C, C] n[c, a]
    pair_cos: np.ndarray = field(init=False)  # [T, C, C] A[c, k]
    pair_cos_squares: np.ndarray = field(init=False)  # [T, C, C]
    pair_own: np.ndarray = field(init=False)  # [T, C, C] B[c, a]
    pair_own_squares: np.ndarray = field(init=False)  # [T, C, C]
    confusion: np.ndarray = field(init=False)  # [T, C, C] all samples per label and predicted class
    class_groups: np.ndarray = field(init=False)  # [C, 4] all samples per label and group
    # Of stable-correct samples: per class, and per t_stable and step.
    class_t_stable: Moments = field(init=False)  # [C]
    class_norm: Moments = field(init=False)  # [C] at the last step
    class_boundary_distance: Moments = field(init=False)  # [C] at the last step
    norm_by_t_stable: Moments = field(init=False)  # [T, T]
    boundary_distance_by_t_stable: Moments = field(init=False)  # [T, T]
    # Of those with t_stable > 0: place in the plane of two readout vectors (see breakdown.py).
    plane_across: Moments = field(init=False)  # [T, T]
    plane_along: Moments = field(init=False)  # [T, T]

    def __post_init__(self) -> None:
        steps, classes = self.timesteps, self.classes
        self.samples = np.zeros((), np.int64)
        self.groups = np.zeros(len(GROUPS), np.int64)
        for name in ("t_stable_correct", "t_stable_incorrect", "t_unstable_correct"):
            setattr(self, name, np.zeros(steps, np.int64))
        self.accuracy, self.cos_final = Moments((steps,)), Moments((steps,))
        for name in ("norm", "cos_current", "margin", "boundary_distance"):
            setattr(self, name, Moments((steps, 2)))
        self.change = Moments((steps, steps - 1))
        self.change_after, self.relative_change_after = Moments(()), Moments(())
        self.pair_count = np.zeros((steps, classes, classes), np.int64)
        for name in ("pair_cos", "pair_cos_squares", "pair_own", "pair_own_squares"):
            setattr(self, name, np.zeros((steps, classes, classes), np.float64))
        self.confusion = np.zeros((steps, classes, classes), np.int64)
        self.class_groups = np.zeros((classes, len(GROUPS)), np.int64)
        for name in ("class_t_stable", "class_norm", "class_boundary_distance"):
            setattr(self, name, Moments((classes,)))
        for name in ("norm_by_t_stable", "boundary_distance_by_t_stable", "plane_across", "plane_along"):
            setattr(self, name, Moments((steps, steps)))

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and array of every accumulator, in a fixed order; the arrays are the accumulators themselves."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield name, value
            elif isinstance(value, Moments):
                for part, array in vars(value).items():
                    yield f"{name}.{part}", array

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite every accumulator; raises ValueError, changing nothing, where one is missing or has another
        shape."""
        checked = []
        for name, array in self.arrays():
            if name not in values:
                raise ValueError(f"state: expected an accumulator {name!r} {list(array.shape)}, which is missing")
            value = np.asarray(values[name])
            if value.shape != array.shape or value.dtype != array.dtype:
                raise ValueError(
                    f"state: expected accumulator {name!r} with shape {list(array.shape)} and dtype {array.dtype}, got "
                    f"{list(value.shape)} and {value.dtype}"
                )
            checked.append((array, value))
        for array, value in checked:
            array[...] = value

    def add(self, other: Accumulators) -> None:
        """Add another's sums to these."""
        for (_, mine), (_, theirs) in zip(self.arrays(), other.arrays(), strict=True):
            mine += theirs

    def copy(self) -> Accumulators:
        """An independent copy."""
        new = Accumulators(self.timesteps, self.classes)
        new.add(self)
        return new

    def pairs(self) -> tuple[Summary, np.ndarray]:
        """Cosine of r_i to w_{label j} over ordered pairs (i, j) of not-yet-stable samples, per time step.

        Pairs share the current class and differ in label. With N_c = sum_a n[c, a]::

            pairs      = sum_c (N_c^2 - sum_a n[c, a]^2)
            sum of cos = sum_{c, a} n[c, a] (A[c, a] - B[c, a])

        Returns a Summary of [T] tables (``n`` counts pairs, ``sd`` is that over pairs) and the effective number of
        samples [T] (Kish: (sum_i p_i)^2 / sum_i p_i^2, p_i the partners of i). Pairs are not independent: a sample
        enters as i and as j, each with at most the variance over pairs, so the interval is ``1.96 sqrt(2 /
        n_effective) sd``, on the wide side.
        """
        count = self.pair_count.astype(np.float64)
        partners = count.sum(2, keepdims=True) - count  # [T, C, C] of a sample with class c and label a
        pairs = (count * partners).sum((1, 2))
        mean = divide((count * (self.pair_cos - self.pair_own)).sum((1, 2)), pairs)
        squares = (count * (self.pair_cos_squares - self.pair_own_squares)).sum((1, 2))
        variance = np.maximum(squares - pairs * np.nan_to_num(mean) ** 2, 0.0)
        sd = np.sqrt(divide(variance, pairs - 1))
        effective = divide(pairs**2, (count * partners**2).sum((1, 2)))
        return Summary(mean, sd, pairs.astype(np.int64), Z95 * np.sqrt(2.0) * divide(sd, np.sqrt(effective))), effective


class Trajectories(NamedTuple):
    """Scalars of whole trajectories of one batch, float64 where not said otherwise, and their cosines."""

    label: np.ndarray  # [N] int64
    predicted: np.ndarray  # [T, N] int64
    norm: np.ndarray  # [T, N]
    cos_current: np.ndarray  # [T, N]
    cos_label: np.ndarray  # [T, N]
    margin: np.ndarray  # [T, N]
    boundary_distance: np.ndarray  # [T, N]
    change: np.ndarray  # [T - 1, N]
    cosine: tuple[torch.Tensor, ...]  # T of [N, C], any float dtype


def classify(predicted: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [T, N], [N] -> [N], [N]
    """Group (index into GROUPS) and time of every trajectory of predictions.

    The time is that of stabilisation for stable trajectories, the first correct step for unstable-correct ones, -1
    otherwise.
    """
    timesteps = predicted.shape[0]
    final = predicted == predicted[-1]
    start = timesteps - np.logical_and.accumulate(final[::-1], axis=0).sum(0)  # first step of the final run
    settled = np.ones_like(final[0]) if timesteps == 1 else final[-2]
    stable = settled & (final.argmax(0) == start)
    correct = predicted == label
    ever = correct.any(0)
    group = np.where(stable, np.where(correct[-1], 0, 1), np.where(ever, 2, 3))
    time = np.where(stable, start, np.where(ever, correct.argmax(0), -1))
    return group, time


def _add_masked(moments: Moments, values: np.ndarray, mask: np.ndarray, cell: tuple[int, ...] = ()) -> None:
    """Add the masked values [T, N], summed over samples, to the column ``cell`` of a [T, ...] accumulator."""
    index: tuple[Any, ...] = (slice(None), *cell)
    kept = np.where(mask, values, 0.0)
    moments.count[index] += mask.sum(1)
    moments.total[index] += kept.sum(1)
    moments.squares[index] += np.square(kept).sum(1)


def accumulate(sums: Accumulators, batch: Trajectories, group: np.ndarray, time: np.ndarray) -> None:  # [N], [N]
    """Add one batch of classified trajectories to the accumulators."""
    steps = sums.timesteps
    sums.samples += batch.label.size
    sums.groups += np.bincount(group, minlength=len(GROUPS))
    for code, name in enumerate(("t_stable_correct", "t_stable_incorrect", "t_unstable_correct")):
        getattr(sums, name)[...] += np.bincount(time[group == code], minlength=steps)
    correct = batch.predicted == batch.label
    _add_masked(sums.accuracy, correct.astype(np.float64), np.ones_like(correct))

    chosen = np.flatnonzero(group == 0)
    t_stable = time[chosen]
    now = t_stable <= np.arange(steps)[:, None]  # [T, M]
    for name in ("norm", "cos_current", "margin", "boundary_distance"):
        values = getattr(batch, name)[:, chosen]
        finite = np.isfinite(values)  # one class: no margin, no boundary
        for column, mask in enumerate((now & finite, ~now & finite)):
            _add_masked(getattr(sums, name), values, mask, (column,))
    _add_masked(sums.cos_final, batch.cos_label[:, chosen], ~now)

    change = batch.change[:, chosen]  # [T - 1, M]
    members = (t_stable == np.arange(steps)[:, None]).astype(np.float64)  # [T, M]
    sums.change.count += np.bincount(t_stable, minlength=steps)[:, None]
    sums.change.total += members @ change.T
    sums.change.squares += members @ np.square(change).T
    after = now[:-1]  # transitions t -> t + 1 with t >= t_stable
    transitions = after.sum(0)
    for moments, values in (
        (sums.change_after, change),
        (sums.relative_change_after, divide(change, batch.norm[:-1, chosen])),
    ):
        # A sample whose norm is zero has no relative change there, nor then a mean of it.
        mean = divide(np.where(after, values, 0.0).sum(0), transitions)
        mean = mean[np.isfinite(mean)]
        moments.count += mean.size
        moments.total += mean.sum()
        moments.squares += np.square(mean).sum()
    _accumulate_pairs(sums, batch, chosen, now)


def _accumulate_pairs(sums: Accumulators, batch: Trajectories, chosen: np.ndarray, now: np.ndarray) -> None:
    for t in range(sums.timesteps):
        later = chosen[~now[t]]
        if later.size == 0:
            continue
        current, label = batch.predicted[t, later], batch.label[later]
        cosine = batch.cosine[t][torch.from_numpy(later)].double()  # [M, C]
        own = batch.cos_label[t, later]
        np.add.at(sums.pair_count[t], (current, label), 1)
        np.add.at(sums.pair_own[t], (current, label), own)
        np.add.at(sums.pair_own_squares[t], (current, label), np.square(own))
        # Rows summed by current class: as a matrix product, which is many times faster than an indexed sum.
        members = torch.zeros(sums.pair_cos.shape[1], later.size, dtype=torch.float64)
        members[torch.from_numpy(current), torch.arange(later.size)] = 1.0
        torch.from_numpy(sums.pair_cos[t]).addmm_(members, cosine)
        torch.from_numpy(sums.pair_cos_squares[t]).addmm_(members, cosine.square())


def later_cosines(batch: Trajectories, group: np.ndarray, time: np.ndarray, offset: int) -> dict[str, np.ndarray]:  # [N], [N]
    """Cosines to every readout vector of stable-correct samples at the steps before they are stable: with them the means
    over pairs can be taken anew with weights.

    Returns ``later_sample`` [K] (``offset`` added), ``later_step`` [K] and ``later_cosine`` [K, C] float32, by sample, then step: so
    that results of blocks of samples, one after another, are those of all at once.
    """
    chosen = np.flatnonzero(group == 0)
    parts = [chosen[time[chosen] > t] for t in range(len(batch.predicted))]
    sample, step = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    cosine = np.concatenate([batch.cosine[t].numpy()[part].astype(np.float32) for t, part in enumerate(parts)])
    order = np.lexsort((step, sample))
    return {"later_sample": sample[order] + offset, "later_step": step[order], "later_cosine": cosine[order]}
