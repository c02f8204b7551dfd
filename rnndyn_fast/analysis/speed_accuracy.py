"""What reaction times by an entropy threshold give: the speed-accuracy curve, thresholds that match a goal, and their file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rnndyn_fast.analysis.accumulators import Z95, divide
from rnndyn_fast.analysis.npz_results import load_npz, save_npz
from rnndyn_fast.suggestions import check_choice

FORMAT = "rnndyn_fast.reaction_times/1"
UNREACHED = ("last", "exclude")
GOALS = ("accuracy", "mean_step", "mean_cost")


class SpeedAccuracyCurve(NamedTuple):
    """One entry per threshold, [K]. ``low`` and ``high``: 95% interval of the accuracy (Wilson)."""

    threshold: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean_step: np.ndarray  # 0-based: steps taken are one more
    mean_cost: np.ndarray  # NaN without costs
    unreached: np.ndarray  # share of images that never reach the threshold
    n: np.ndarray  # images that count


class MatchedThreshold(NamedTuple):
    """A threshold chosen to meet a goal, and what it gives."""

    threshold: float
    accuracy: float
    mean_step: float
    mean_cost: float


@dataclass(frozen=True)
class ReactionTimeResult:
    """Counts over images; K thresholds, T steps, N images. See :class:`ReactionTimeReducer`.

    Args:
        thresholds: [K] in nats.
        counts: [K, T + 1] images that a threshold ends at each step; the last column: never.
        correct: [K, T + 1] those among them whose class at that step is right (last column: at step T - 1).
        step_correct: [T] images whose class is right at a step, whatever the threshold.
        num_classes, strict, cumulative: settings.
        cost: [T] of t + 1 steps, or None.
        entropy, hits: [T, N], or None where samples were not kept.
        descriptors: provenance.
    """

    thresholds: np.ndarray
    counts: np.ndarray
    correct: np.ndarray
    step_correct: np.ndarray
    num_classes: int
    strict: bool
    cumulative: bool
    cost: np.ndarray | None = None
    entropy: np.ndarray | None = None
    hits: np.ndarray | None = None
    descriptors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Images."""
        return int(self.counts[0].sum())

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.step_correct)

    @property
    def accuracy(self) -> np.ndarray:
        """Accuracy at each step, [T], were all images given the same number of steps."""
        return self.step_correct / self.n

    def curve(self, unreached: str = "last") -> SpeedAccuracyCurve:
        """Accuracy against mean reaction time and cost, threshold by threshold.

        Args:
            unreached: images that never reach a threshold are decided at the "last" step, or left out ("exclude").
        """
        check_choice("unreached", unreached, UNREACHED)
        counts, correct = self.counts[:, :-1].copy(), self.correct[:, :-1].copy()
        if unreached == "last":
            counts[:, -1] += self.counts[:, -1]
            correct[:, -1] += self.correct[:, -1]
        n, hits = counts.sum(1), correct.sum(1)
        accuracy = divide(hits, n)
        half = Z95 * np.sqrt(divide(accuracy * (1 - accuracy), n) + divide(np.full(len(n), Z95**2 / 4), n.astype(float) ** 2))
        centre, shrink = accuracy + divide(np.full(len(n), Z95**2 / 2), n), 1 + divide(np.full(len(n), Z95**2), n)
        steps = np.arange(self.timesteps)
        cost = np.full(self.timesteps, np.nan) if self.cost is None else self.cost
        return SpeedAccuracyCurve(
            self.thresholds,
            accuracy,
            (centre - half) / shrink,
            (centre + half) / shrink,
            divide((counts * steps).sum(1), n),
            divide((counts * cost).sum(1), n) if self.cost is not None else np.full(len(n), np.nan),
            self.counts[:, -1] / self.n,
            n,
        )

    def matched(self, unreached: str = "last", **goal: float) -> MatchedThreshold:
        """The threshold that meets a goal: ``accuracy`` at least that (the fastest such), ``mean_step`` or ``mean_cost`` at most
        that (the most accurate such).

        Raises:
            ValueError: no threshold of the grid meets it (tells the best there is); not exactly one goal.

        Two networks are compared at matched thresholds: the one's accuracy at the other's cost.
        """
        if len(goal) != 1 or next(iter(goal)) not in GOALS:
            raise ValueError(f"goal: expected one of {GOALS}, got {sorted(goal)}")
        ((name, wanted),) = goal.items()
        curve = self.curve(unreached)
        values = np.asarray(getattr(curve, name))
        if np.isnan(values).all():
            raise ValueError(f"goal: {name} is not known (result without cost)")
        if name == "accuracy":
            meets, order = values >= wanted, curve.mean_step
        else:
            meets, order = values <= wanted, -curve.accuracy
        if not meets.any():
            best = np.nanmax(values) if name == "accuracy" else np.nanmin(values)
            raise ValueError(f"goal: no threshold gives {name} {'>=' if name == 'accuracy' else '<='} {wanted:g}; the best is {best:.4g}")
        best_k = int(np.flatnonzero(meets)[np.argmin(order[meets])])
        return MatchedThreshold(*(float(part[best_k]) for part in (curve.threshold, curve.accuracy, curve.mean_step, curve.mean_cost)))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to an NPZ file, atomically."""
        return save_npz(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReactionTimeResult:
        """Read what :meth:`save` wrote. Raises FileNotFoundError, or ValueError for any other kind of file."""
        values = load_npz(path, FORMAT, "result of reaction times")
        values["num_classes"] = int(values["num_classes"])
        values |= {name: bool(values[name]) for name in ("strict", "cumulative")}
        return cls(**values)
