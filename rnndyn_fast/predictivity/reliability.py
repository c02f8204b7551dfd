"""How reliable responses are: correlation of averages over halves of the repeats, corrected to all repeats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def correlation(
    x: np.ndarray,  # [..., S, K]
    y: np.ndarray,  # [..., S, K]
    groups: np.ndarray | None = None,  # [S]
) -> np.ndarray:  # [..., K]
    """Pearson correlation over stimuli, column by column; NaN where a column does not vary.

    With ``groups`` both are taken relative to the mean of their group first. Held-out predictions need that: what is predicted
    for a fold lies near the mean of the *other* stimuli, which is low where the fold's own mean is high, so predictions that
    carry no information would correlate negatively over all folds.

    >>> correlation(np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [4.0], [8.0]]))
    array([1.])
    """
    x, y = (_centred(np.asarray(value, dtype=np.float64), groups) for value in (x, y))
    spread = np.sqrt((x * x).sum(-2)) * np.sqrt((y * y).sum(-2))
    out = np.full(spread.shape, np.nan)
    return np.divide((x * y).sum(-2), spread, out=out, where=spread > 0)


def _centred(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    if groups is None:
        groups = np.zeros(values.shape[-2], np.int64)
    out = np.empty_like(values)
    scale = np.abs(values).max(-2, keepdims=True)
    for group in np.unique(groups):
        members = groups == group
        out[..., members, :] = values[..., members, :] - values[..., members, :].mean(-2, keepdims=True)
    # What rounding leaves of a constant column is no variation.
    return np.where(np.abs(out).max(-2, keepdims=True) > 1e-12 * scale, out, 0.0)


def half_means(
    responses: np.ndarray,  # [B, S, R, K]
    num_splits: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # [B, S, K] each
    """Averages over two disjoint random halves of each stimulus' repeats, ``num_splits`` times.

    Of R_s repeats each half takes floor(R_s / 2). The trial is what is drawn: its time bins stay together. NaN for neurons that
    have a stimulus with a single repeat.
    """
    there = ~np.isnan(responses[0])  # [S, R, K]
    complete = bool(there.all())
    per_half = there.sum(1, keepdims=True) // 2  # [S, 1, K]
    filled = responses if complete else np.nan_to_num(responses)
    rng = np.random.default_rng(seed)
    for _ in range(num_splits):
        keys = rng.random(there[..., :1].shape if complete else there.shape)
        order = np.where(there[..., : keys.shape[-1]], keys, 2.0).argsort(1).argsort(1)  # missing repeats come last
        halves = []
        for half in (0, 1):
            size = per_half[..., : keys.shape[-1]]
            weights = ((order >= half * size) & (order < (half + 1) * size)) / np.where(size > 0, size, np.nan)
            halves.append(np.einsum("bsrk,srk->bsk", filled, np.broadcast_to(weights, there.shape)))
        yield halves[0], halves[1]


def split_half_reliability(
    responses: np.ndarray,  # [B, S, R, K]
    *,
    num_splits: int = 100,
    seed: int = 0,
    groups: np.ndarray | None = None,  # [S]
) -> np.ndarray:  # [B, K]
    """Reliability of responses averaged over all their repeats.

    With r the correlation over stimuli between averages over random halves of the repeats, mean over ``num_splits`` splits::

        reliability = n r / (1 + (n - 1) r),      n = mean_s(1 / h_s) / mean_s(1 / R_s)

    (Spearman-Brown), R_s the repeats of stimulus s and h_s = floor(R_s / 2) those of a half; n = 2 for an even, equal number. For
    responses = signal + noise it is the share of the signal in the variance over stimuli of the averages.

    Args:
        responses: NaN for missing repeats, see :class:`Recordings`.
        num_splits: random halvings.
        seed: of the halvings.
        groups: correlate relative to the means of these groups of stimuli, see :func:`correlation`.

    Returns: NaN where there is a stimulus with one repeat only, or where responses do not vary.

    Deterministic: yes, for a seed. Memory: two averages [B, S, K] and one copy of the responses.
    Source: W. Brown and C. Spearman, British Journal of Psychology 3, 1910.

    >>> repeats = np.random.default_rng(0).normal(size=(1, 5, 1, 1)) + np.zeros((1, 5, 2, 1))
    >>> split_half_reliability(repeats).round(6)
    array([[1.]])
    """
    if responses.ndim != 4:
        raise ValueError(f"responses: expected shape [time, stimuli, repeats, neurons], got {list(responses.shape)}")
    if num_splits < 1:
        raise ValueError(f"num_splits: expected at least 1, got {num_splits}")
    repeats = (~np.isnan(responses[0])).sum(1)  # [S, K]
    enough = (repeats >= 2).all(0)
    out = np.full((responses.shape[0], responses.shape[3]), np.nan)
    if not enough.any():
        return out
    chosen, repeats = responses[..., enough], repeats[:, enough]
    total = sum(correlation(one, two, groups) for one, two in half_means(chosen, num_splits, seed))
    out[:, enough] = spearman_brown(np.asarray(total) / num_splits, (1 / (repeats // 2)).mean(0) / (1 / repeats).mean(0))
    return out


def spearman_brown(r: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
    """Reliability of ``factor`` times as many repeats as those with the reliability r: n r / (1 + (n - 1) r).

    >>> spearman_brown(np.array(0.5), 2).round(6)
    np.float64(0.666667)
    """
    return factor * r / (1 + (factor - 1) * r)
