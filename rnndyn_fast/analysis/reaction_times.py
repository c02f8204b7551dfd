"""Reaction times of recurrent networks by an entropy threshold, and the speed-accuracy trade-off they make.

With log-probabilities ln p_i[t, c] of image i at step t::

    H_i[t]       = - sum_c p_i[t, c] ln p_i[t, c]                                   (nats; 0 ln 0 = 0)
    RT_i(theta)  = min { t : H_i[t] <= theta }      (0-based step; steps taken = RT + 1)
    choice_i     = argmax_c p_i[RT_i, c]

Sweeping theta from ln(classes) down to 0 trades speed for accuracy without another parameter.

Source: Spoerer, Kietzmann, Mehrer, Charest & Kriegeskorte, PLoS Computational Biology 16(10) e1008215, 2020 (a confidence threshold ends
the computation); entropy as the confidence, the inequality and what happens where the threshold is not reached are options here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.inputs import as_floats, as_labels, require_log_probs
from rnndyn_fast.analysis.speed_accuracy import UNREACHED, ReactionTimeResult
from rnndyn_fast.suggestions import check_choice


def entropies(log_probs: Any, *, cumulative: bool = False) -> Tensor:  # [T, N, C] -> [T, N]
    """Entropy of every step's class probabilities in nats, float64.

    Args:
        log_probs: [T, N, C], normalised.
        cumulative: of the cumulative readout, ``p[t] = softmax(sum_{s <= t} logits[s])``, which log-probabilities determine as well as
            logits do.

    Raises:
        TypeError: not floating point. ValueError: another shape, or probabilities that do not sum to 1.

    >>> entropies(torch.log(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]))).round(decimals=4).tolist()
    [[0.6931, 0.0]]
    """
    return _entropy(readout(log_probs, cumulative=cumulative))


def readout(log_probs: Any, *, cumulative: bool = False) -> Tensor:  # [T, N, C] -> [T, N, C]
    """Log-probabilities as float64, checked; with ``cumulative`` those of the logits summed up to each step."""
    values = as_floats("log_probs", log_probs, "[T, N, C]", (None, None, None)).double()
    require_log_probs("log_probs", values)
    total = torch.logsumexp(values, -1)
    # The networks' clamp (1e-10 per class) and half precision stay far below this; logits do not.
    if bool(((total.abs() > 1e-2) | torch.isnan(total)).any()):
        worst = total[(total.abs() > 1e-2) | torch.isnan(total)].flatten()[0].exp().item()
        raise ValueError(
            f"log_probs: expected log-probabilities, got ones whose probabilities sum to {worst:.4g} (logits? apply log_softmax)"
        )
    if not cumulative:
        return values
    summed = torch.log_softmax(torch.cumsum(values, 0), -1)
    if bool(torch.isnan(summed).any()):
        raise ValueError("log_probs: every class has had the probability 0 at some step; the cumulative readout needs finite values")
    return summed


def _entropy(values: Tensor) -> Tensor:
    return torch.special.entr(values.exp()).sum(-1)


def default_thresholds(num_classes: int) -> np.ndarray:  # [102]
    """0, ln(classes), and 100 values between them, evenly spaced in their log-odds: dense at both ends, where entropies gather.

    >>> default_thresholds(10)[[0, 1, -2, -1]].round(4).tolist()
    [0.0, 0.0002, 2.3024, 2.3026]
    """
    inner = 1 / (1 + np.exp(-np.linspace(-9.2, 9.2, 100)))
    return np.log(num_classes) * np.concatenate([[0.0], inner, [1.0]])


class ReactionTimeReducer:
    """Accumulates the speed-accuracy trade-off of any number of images, batch by batch.

    Args:
        num_classes: C >= 2.
        timesteps: T.
        thresholds: [K] entropies in nats, ascending; None: :func:`default_thresholds`.
        strict: end at ``H < theta`` instead of ``H <= theta``.
        cumulative: decide by the cumulative readout, see :func:`entropies`.
        keep_samples: keep every image's entropies and hits ([T, N]), which the comparison with reaction times of people needs.

    Raises: ``TypeError``, ``ValueError`` naming the argument, what was expected, what came.

    Deterministic: yes, and exact: counts only, so batches, processes and machines merge into what one pass would have given.
    Memory: 16 K T bytes, whatever the number of images; 9 T bytes per image with ``keep_samples``.

    >>> reducer = ReactionTimeReducer(num_classes=2, timesteps=2, thresholds=[0.0, 0.5, 0.7])
    >>> reducer.update(torch.log(torch.tensor([[[0.5, 0.5]], [[0.1, 0.9]]])), torch.tensor([1]))
    >>> reducer.result().curve().mean_step.tolist()
    [1.0, 1.0, 0.0]
    """

    def __init__(
        self,
        num_classes: int,
        timesteps: int,
        *,
        thresholds: Any = None,
        strict: bool = False,
        cumulative: bool = False,
        keep_samples: bool = False,
    ) -> None:
        for name, value, least in (("num_classes", num_classes, 2), ("timesteps", timesteps, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        grid = default_thresholds(num_classes) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all() or grid[0] < 0 or (np.diff(grid) <= 0).any():
            raise ValueError(f"thresholds: expected ascending numbers >= 0 (nats), got {np.asarray(thresholds).tolist()}")
        self.num_classes, self.timesteps, self.thresholds = num_classes, timesteps, grid
        self.strict, self.cumulative, self.keep_samples = strict, cumulative, keep_samples
        # counts[k, t]: images that threshold k ends at step t; the last column: those it never ends.
        self.counts = np.zeros((len(grid), timesteps + 1), np.int64)
        self.correct = np.zeros((len(grid), timesteps + 1), np.int64)
        self.step_correct = np.zeros(timesteps, np.int64)
        self.n = 0
        self._entropy: list[np.ndarray] = []
        self._hits: list[np.ndarray] = []

    def update(self, log_probs: Any, labels: Any) -> None:
        """Add N images: log_probs [T, N, C], labels [N]."""
        values = readout(log_probs, cumulative=self.cumulative)
        if values.shape[0] != self.timesteps or values.shape[2] != self.num_classes:
            raise ValueError(f"log_probs: expected shape [T, N, C] = [{self.timesteps}, any, {self.num_classes}], got {list(values.shape)}")
        truth = as_labels("labels", labels, values.shape[1], self.num_classes).to(values.device)
        entropy = _entropy(values).cpu().numpy()
        hits = (values.argmax(-1) == truth).cpu().numpy()
        lowest = np.minimum.accumulate(entropy, 0)  # a threshold is reached by step t where the lowest entropy so far is
        first = np.searchsorted(
            self.thresholds, lowest, "right" if self.strict else "left"
        )  # [T, N]: the thresholds from there on are reached by step t
        _add_ranges(self.counts, first, np.ones_like(hits))
        _add_ranges(self.correct, first, hits)
        self.step_correct += hits.sum(1)
        self.n += hits.shape[1]
        if self.keep_samples:
            self._entropy.append(entropy)
            self._hits.append(hits)

    def merge(self, other: ReactionTimeReducer) -> None:
        """Add what another reducer of the same settings has seen; its images come after ours."""
        for name in ("num_classes", "timesteps", "strict", "cumulative", "keep_samples"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other: expected {name} = {getattr(self, name)!r}, got {getattr(other, name)!r}")
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError("other: expected the same thresholds, got others")
        self.counts += other.counts
        self.correct += other.correct
        self.step_correct += other.step_correct
        self.n += other.n
        self._entropy += other._entropy
        self._hits += other._hits

    def result(self, *, cost: Any = None, descriptors: Mapping[str, Any] | None = None) -> ReactionTimeResult:
        """What has been seen so far.

        Args:
            cost: [T] what t + 1 steps cost (multiply-adds per image); None: no cost.
            descriptors: provenance, anything JSON can hold.
        """
        if not self.n:
            raise ValueError("result: expected at least one image, got none (update was not called)")
        if cost is not None:
            cost = np.asarray(cost, dtype=np.float64)
            if cost.shape != (self.timesteps,) or not np.isfinite(cost).all():
                raise ValueError(f"cost: expected {self.timesteps} finite numbers, one per time step, got {cost.tolist()}")
        return ReactionTimeResult(
            self.thresholds.copy(),
            self.counts.copy(),
            self.correct.copy(),
            self.step_correct.copy(),
            self.num_classes,
            self.strict,
            self.cumulative,
            cost,
            np.concatenate(self._entropy, 1) if self._entropy else None,
            np.concatenate(self._hits, 1) if self._hits else None,
            dict(descriptors or {}),
        )


def _add_ranges(table: np.ndarray, first: np.ndarray, weight: np.ndarray) -> None:  # [K, T + 1], [T, N], [T, N]
    """Add each image's weight at step t to the thresholds that step t is the first to reach: first[t] <= k < first[t - 1].

    Thresholds below first[T - 1] are never reached: the last column, with the weight of the last step.
    """
    thresholds, columns = table.shape
    change = np.zeros((thresholds + 1, columns), np.int64)
    before = np.full_like(first[0], thresholds)
    for t in range(columns - 1):
        amount = weight[t].astype(np.int64)
        np.add.at(change[:, t], first[t], amount)
        np.subtract.at(change[:, t], before, amount)
        before = first[t]
    amount = weight[-1].astype(np.int64)
    change[0, -1] += amount.sum()
    np.subtract.at(change[:, -1], before, amount)
    table += np.cumsum(change, 0)[:thresholds]


def reaction_times(
    entropy: Any,
    theta: float,
    *,
    strict: bool = False,
    unreached: str = "last",
) -> np.ndarray:  # [T, N] -> [N]
    """First step at which each image's entropy is at most ``theta``, as float.

    Args:
        entropy: [T, N] in nats, of :func:`entropies`.
        theta: the threshold.
        strict: below it instead of at most.
        unreached: where it never is: "last" (step T - 1) or "exclude" (NaN).

    >>> reaction_times(np.array([[1.0, 0.2, 0.9], [0.3, 0.1, 0.8]]), 0.5).tolist()
    [1.0, 0.0, 1.0]
    """
    check_choice("unreached", unreached, UNREACHED)
    values = np.asarray(entropy, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"entropy: expected shape [T, N] with no empty dimension, got {list(values.shape)}")
    reached = values < theta if strict else values <= theta
    times = reached.argmax(0).astype(np.float64)
    times[~reached.any(0)] = len(values) - 1 if unreached == "last" else np.nan
    return times
