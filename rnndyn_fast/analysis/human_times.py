"""Comparison of a network's reaction times with those of people: rank correlation, threshold fitted across subjects, noise ceiling."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis.intervals import student
from rnndyn_fast.analysis.reaction_times import reaction_times
from rnndyn_fast.analysis.speed_accuracy import UNREACHED
from rnndyn_fast.file_io import reads
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import check_choice, others

COLUMNS = ("subject", "image", "reaction_time")
# With fewer, an interval over subjects, or a rank correlation over images, says next to nothing.
MIN_SUBJECTS, MIN_IMAGES = 3, 10
CEILINGS = ("correlation", "ceiling_low", "ceiling_high")
_MOST_Z = 8.0  # of Fisher's transform: a correlation of 1 has an infinite one


@dataclass(frozen=True)
class ReactionTimeComparison:
    """Rank correlations over images; J subjects, K thresholds, T steps.

    Args:
        correlation: [J] of the model with each subject, at the threshold fitted to the other subjects.
        threshold: [J] those thresholds.
        ceiling_low: [J] of each subject with the mean of the others.
        ceiling_high: [J] of each subject with the mean of all, itself included.
        by_threshold: [K] mean over subjects at each threshold (NaN where all images have one reaction time).
        thresholds: [K].
        by_entropy: [T] mean over subjects of the correlation with the entropy at one step, without any threshold: what a network
            predicts that is run for that many steps whatever the image.
        images: images with reaction times.
    """

    correlation: np.ndarray
    threshold: np.ndarray
    ceiling_low: np.ndarray
    ceiling_high: np.ndarray
    by_threshold: np.ndarray
    thresholds: np.ndarray
    by_entropy: np.ndarray
    images: int

    def estimate(self, name: str = "correlation") -> tuple[float, float, float]:
        """Mean over subjects of "correlation", "ceiling_low" or "ceiling_high", and the ends of its 95% interval, within [-1, 1].

        Correlations are averaged, and the interval (t, over subjects) is taken, as Fisher's ``z = artanh(r)``; both are turned back.
        """
        check_choice("name", name, CEILINGS)
        return fisher_mean(getattr(self, name))

    @property
    def share_of_ceiling(self) -> float:
        """Mean correlation divided by the mean lower noise ceiling; NaN where that is not positive."""
        ceiling = self.estimate("ceiling_low")[0]
        return self.estimate()[0] / ceiling if ceiling > 0 else float("nan")


def fisher_mean(correlations: Any) -> tuple[float, float, float]:  # [J]
    """Mean of correlations and its 95% interval by Fisher's transform (t over J >= 2 of them).

    >>> value, low, high = fisher_mean([0.9, 0.99, 0.2])
    >>> -1 < low < value < high < 1
    True
    """
    z = np.clip(np.arctanh(np.clip(np.asarray(correlations, np.float64), -1 + 1e-15, 1 - 1e-15)), -_MOST_Z, _MOST_Z)
    half = float(student(0.975, np.asarray(len(z) - 1))) * z.std(ddof=1) / np.sqrt(len(z))
    low, high = (float(np.tanh(z.mean() + end)) for end in (-half, half))
    return float(np.tanh(z.mean())), low, high


def compare_reaction_times(
    entropy: Any,
    human: Any,
    thresholds: Any,
    *,
    strict: bool = False,
    unreached: str = "last",
) -> ReactionTimeComparison:
    """Rank-correlate the network's reaction times with those of people, leaving one subject out at a time.

    For subject j the threshold is the one whose reaction times correlate best with the mean of the *other* subjects (each subject's
    times turned into ranks and standardised first); the score is the Spearman correlation with subject j. Noise ceiling: subject j
    against the mean of the others (lower), against the mean of all (upper).

    Args:
        entropy: [T, N] in nats (:func:`entropies`).
        human: [J, N] reaction times in any unit; NaN where a subject has none for an image.
        thresholds: [K] candidates, in nats.
        strict, unreached: see :func:`reaction_times`.

    Raises:
        ValueError, TypeError: naming the argument; also where no threshold gives images different reaction times.

    Deterministic: yes. Memory: a few tables [K, N].

    >>> entropy = np.linspace([2.0] * 12, np.linspace(0.1, 1.9, 12), 5)  # steps by images
    >>> human = 400 + 10 * np.arange(12) + np.array([[0.0], [5.0], [9.0]])
    >>> compare_reaction_times(entropy, human, [1.0]).correlation.round(1).tolist()
    [0.8, 0.8, 0.8]
    """
    check_choice("unreached", unreached, UNREACHED)
    entropy, human = np.asarray(entropy, dtype=np.float64), np.asarray(human, dtype=np.float64)
    if entropy.ndim != 2 or not np.isfinite(entropy).all():
        raise ValueError(f"entropy: expected finite values [T, N], got shape {list(entropy.shape)}")
    grid = np.asarray(thresholds, dtype=np.float64)
    if grid.ndim != 1 or not len(grid):
        raise ValueError(f"thresholds: expected numbers [K], got shape {list(grid.shape)}")
    _check_human(human, entropy.shape[1])
    there = ~np.isnan(human).all(0)
    entropy, human = entropy[:, there], human[:, there]
    times = np.stack([reaction_times(entropy, theta, strict=strict, unreached=unreached) for theta in grid])

    standardised = np.stack([_standard_ranks(row) for row in human])
    subjects = range(len(human))
    # Rounded: sums of the same ranks in another order must stay ties.
    others = np.stack([_mean(np.delete(standardised, j, 0)).round(9) for j in subjects])
    with_subject = np.stack([_spearman(times, human[j]) for j in subjects])  # [J, K]
    fitted = np.stack([_spearman(times, others[j]) for j in subjects])
    if np.isnan(fitted).all(1).any():
        raise ValueError("entropy: at no threshold do reaction times differ between images (T = 1, or thresholds out of range?)")
    chosen = np.nanargmax(fitted, 1)
    score = with_subject[np.arange(len(human)), chosen]
    everyone = _mean(standardised).round(9)
    return ReactionTimeComparison(
        np.nan_to_num(score),  # no variation among the images that a subject saw: no correlation
        grid[chosen],
        np.array([_spearman(others[j][None], human[j])[0] for j in subjects]),
        np.array([_spearman(everyone[None], human[j])[0] for j in subjects]),
        _mean(with_subject),
        grid,
        _mean(np.stack([_spearman(entropy, human[j]) for j in subjects])),
        int(there.sum()),
    )


def _check_human(human: np.ndarray, images: int) -> None:
    if human.ndim != 2 or human.shape[1] != images:
        raise ValueError(f"human: expected shape [subjects, images] = [any, {images}], got {list(human.shape)}")
    if len(human) < MIN_SUBJECTS:
        raise ValueError(f"human: expected at least {MIN_SUBJECTS} subjects, got {len(human)}: no interval over fewer means anything")
    if np.isinf(human).any() or (human < 0).any():
        raise ValueError("human: expected reaction times >= 0 (NaN where there is none), got negative or infinite ones")
    shared = (~np.isnan(human)).sum(0) >= 2
    for j, row in enumerate(human):
        count = int((shared & ~np.isnan(row)).sum())
        if count < MIN_IMAGES or np.nanstd(row) == 0:
            told = f"{count} of them" if count < MIN_IMAGES else "the same time for all"
            raise ValueError(
                f"human: expected at least {MIN_IMAGES} images, with different times, that subject {j} shares with another, got {told}"
            )


def _mean(table: np.ndarray) -> np.ndarray:  # [J, ...]
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(table)
    counts = there.sum(0)
    return np.divide(np.where(there, table, 0.0).sum(0), counts, out=np.full(table.shape[1:], np.nan), where=counts > 0)


def _standard_ranks(row: np.ndarray) -> np.ndarray:
    require("scipy")

    from scipy.stats import rankdata

    ranks = rankdata(row, nan_policy="omit")
    return (ranks - np.nanmean(ranks)) / np.nanstd(ranks)


def _spearman(table: np.ndarray, target: np.ndarray) -> np.ndarray:  # [K, N], [N] -> [K]
    """Spearman correlation of every row with the target over the images that both have; NaN where one of them does not vary."""
    require("scipy")

    from scipy.stats import rankdata

    out = np.full(len(table), np.nan)
    for missing, rows in _by_missing(table):
        there = ~np.isnan(target) & ~missing
        if there.sum() < 3:
            continue
        a = rankdata(table[rows][:, there], axis=1)
        b = rankdata(target[there])
        a, b = a - a.mean(1, keepdims=True), b - b.mean()
        spread = np.sqrt((a * a).sum(1) * (b * b).sum())
        out[rows] = np.divide(a @ b, spread, out=np.full(len(a), np.nan), where=spread > 0)
    return out


def _by_missing(table: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Rows with the same missing entries, together: (missing [N], indices of rows)."""
    patterns, which = np.unique(np.isnan(table), axis=0, return_inverse=True)
    for k, missing in enumerate(patterns):
        yield missing, np.flatnonzero(which.ravel() == k)


@reads("table of reaction times")
def load_reaction_times(path: str | os.PathLike[str], num_images: int) -> np.ndarray:  # [J, num_images]
    """Reaction times of people, NaN where there is none.

    Args:
        path: NPZ with ``reaction_times`` [subjects, images], or CSV with the columns subject, image, reaction_time (one line a
            trial; the mean where a subject saw an image more than once). ``image`` is the row of the image in its split. Lines
            without a reaction time (errors, misses) count as none.
        num_images: in the split.

    Raises:
        FileNotFoundError: no such file. ValueError: columns or arrays are missing (with the nearest names), or a value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"human: no such file: {path}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            if "reaction_times" not in data.files:
                raise ValueError(f"human: {path} has no array 'reaction_times'{others('reaction_times', data.files)}")
            table = np.asarray(data["reaction_times"], dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != num_images:
            raise ValueError(f"human: expected reaction_times [subjects, {num_images}] in {path}, got {list(table.shape)}")
        return table
    if path.suffix != ".csv":
        raise ValueError(f"human: expected a .npz or .csv file, got {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for column in COLUMNS:
            if column not in (reader.fieldnames or []):
                raise ValueError(f"human: {path} has no column {column!r}{others(column, reader.fieldnames or [])}")
        return _table(path, reader, num_images)


def _table(path: Path, lines: Iterable[dict[str, str]], num_images: int) -> np.ndarray:
    trials: dict[str, dict[int, list[float]]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            image = int(line["image"])
            time = float(line["reaction_time"]) if (line["reaction_time"] or "").strip() else np.nan
        except (TypeError, ValueError) as error:
            raise ValueError(f"human: {path}, line {number}: expected an image (row) and a reaction time, got {line}") from error
        if not 0 <= image < num_images:
            raise ValueError(f"human: {path}, line {number}: expected an image in 0..{num_images - 1}, got {image}")
        of_subject = trials.setdefault(line["subject"], {})
        if not np.isnan(time):
            of_subject.setdefault(image, []).append(time)
    table = np.full((len(trials), num_images), np.nan)
    for j, subject in enumerate(sorted(trials)):
        for image, times in trials[subject].items():
            table[j, image] = np.mean(times)
    return table
