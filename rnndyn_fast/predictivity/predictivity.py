"""How well an area's activations over time predict recorded responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rnndyn_fast.predictivity.fits import METHODS, Fit, assign_folds, held_out_predictions, pls_fit, reduced, ridge_fit
from rnndyn_fast.predictivity.recordings import Recordings
from rnndyn_fast.predictivity.reliability import correlation, half_means, split_half_reliability
from rnndyn_fast.predictivity.results import PredictivityResult
from rnndyn_fast.suggestions import check_choice

MAPPINGS = ("per_bin", "fixed")


def predictivity(
    features: Any,
    recordings: Recordings,
    *,
    area: str = "features",
    steps: Sequence[int] | None = None,
    step_ms: float | None = None,
    latency_ms: float = 0.0,
    first_step: int = 0,
    method: str = "ridge",
    mapping: str = "per_bin",
    num_folds: int = 5,
    num_splits: int = 100,
    min_reliability: float = 0.1,
    correct_fit: bool = False,
    max_dimensions: int | None = 1000,
    num_components: int = 25,
    seed: int = 0,
) -> PredictivityResult:
    """Fit recorded responses linearly from a model area's activations, and correlate held-out predictions with responses.

    For neuron k in time bin b, with x_s the features of stimulus s at the model step of b, y_s the response averaged over its R
    repeats, and p_s the prediction by the map fitted to the other folds of stimuli::

        correlation = corr_s(p, y)            corrected = corr_s(p, y) / sqrt(reliability)

    reliability by split halves and Spearman-Brown (:func:`split_half_reliability`). Correlations are over stimuli, each taken relative
    to the mean of its fold. ``mapping="per_bin"`` fits a map for each bin; ``"fixed"`` one for all bins (rows are stimuli x bins),
    so that change over time must come from the model. A bin whose step has the same features for all stimuli (nothing has reached the
    area yet) predicts nothing, and its values are NaN; ``"fixed"`` uses it like any other. With ``correct_fit`` the noise that the fit
    takes over from the recording is corrected too: maps are fitted to half averages y1 and y2, and ::

        corrected = mean(corr(p1, y2), corr(p2, y1)) / sqrt(corr(p1, p2) corr(y1, y2))

    Args:
        features: [T, S', ...], one row per stimulus (``recordings.rows`` says which), arrays or tensors.
        recordings: the responses.
        area: name for the result.
        steps: index into T for each time bin, -1 for bins to leave out. Default: from the times, see :func:`steps_of_bins`; without
            ``step_ms``, bin b is step b.
        step_ms, latency_ms: duration of a model step, and the time after onset at which step 0 begins.
        first_step: the time step of ``features[0]`` (later areas of a biological unroll start later).
        method: "ridge" (penalty per neuron by inner cross-validation) or "pls".
        mapping: "per_bin" or "fixed".
        num_folds: folds of stimuli.
        num_splits: halvings of the repeats (with ``correct_fit``, a tenth as many fits).
        min_reliability: neurons below it in a bin get no corrected value there; also those without a reliability.
        correct_fit: see above.
        max_dimensions: features of more dimensions are reduced to that many principal components; None: never.
        num_components: of PLS.
        seed: of folds and halvings.

    Returns: tables [bins, neurons] with medians over neurons and their intervals.

    Raises: TypeError, ValueError naming the argument, what was expected, what came.

    Deterministic: yes, for a seed and a number of threads. Memory: copies of the features in float64.

    >>> rng = np.random.default_rng(0)
    >>> features = rng.normal(size=(1, 60, 5))
    >>> responses = (features @ rng.normal(size=(5, 3)))[:, :, None] + np.zeros((1, 60, 4, 3))
    >>> predictivity(features, Recordings(responses)).over_bins().median.round(2)
    np.float64(1.0)
    """
    values = _features(features, recordings)
    _check(method, mapping, num_splits, min_reliability, num_components, max_dimensions)
    used = _steps(steps, step_ms, latency_ms, first_step, len(values), recordings)
    bins = np.flatnonzero(used >= 0)
    if not len(bins):
        raise ValueError(f"step_ms: no time bin has a model step (features: steps {first_step}..{first_step + len(values) - 1})")
    fold = assign_folds(recordings.num_stimuli, num_folds, seed)
    responses = recordings.responses[bins]
    fit = ridge_fit if method == "ridge" else pls_fit(num_components)
    maps = _Maps(values, used[bins], mapping == "fixed", fit, fold, max_dimensions, seed)

    mean = recordings.mean()[bins]
    raw = correlation(maps.predict(mean), mean, fold)
    reliability = split_half_reliability(responses, num_splits=num_splits, seed=seed, groups=fold)
    if correct_fit:
        corrected = _corrected_for_fit(maps, responses, max(1, num_splits // 10), seed, fold)
    else:
        corrected = raw / np.sqrt(np.where(reliability > 0, reliability, np.nan))
    corrected = np.where(reliability >= max(min_reliability, np.finfo(float).tiny), corrected, np.nan)
    edges = recordings.bin_edges_ms
    return PredictivityResult(
        area,
        raw,
        reliability,
        corrected,
        used[bins] + first_step,
        bins,
        None if edges is None else np.stack([edges[:-1], edges[1:]], 1)[bins],
        tuple(recordings.neurons or ()),
        {
            "method": method,
            "mapping": mapping,
            "num_folds": num_folds,
            "num_splits": num_splits,
            "min_reliability": min_reliability,
            "correct_fit": correct_fit,
            "max_dimensions": max_dimensions,
            "num_components": num_components if method == "pls" else None,
            "step_ms": step_ms,
            "latency_ms": latency_ms,
            "seed": seed,
            "stimuli": recordings.num_stimuli,
            "repeats": recordings.num_repeats,
            "dimensions": int(np.prod(values.shape[2:])),
        },
    )


def steps_of_bins(
    bin_edges_ms: np.ndarray,  # [B + 1]
    step_ms: float,
    latency_ms: float = 0.0,
    *,
    first_step: int = 0,
    timesteps: int,
) -> np.ndarray:  # [B]
    """The index into the features of the step that holds the middle of each time bin, -1 where there is none.

    Step t lasts from ``latency_ms + t * step_ms`` to ``latency_ms + (t + 1) * step_ms``; ``features[i]`` is step ``first_step + i``
    of ``timesteps`` ones.

    >>> steps_of_bins(np.array([0.0, 10, 20, 30]), step_ms=10, latency_ms=10, timesteps=2)
    array([-1,  0,  1])
    """
    if not (np.isfinite([step_ms, latency_ms]).all() and step_ms > 0):
        raise ValueError(f"step_ms: expected a positive number of ms and a finite latency_ms, got {step_ms} and {latency_ms}")
    middle = (bin_edges_ms[:-1] + bin_edges_ms[1:]) / 2
    index = np.floor((middle - latency_ms) / step_ms).astype(np.int64) - first_step
    return np.where((index >= 0) & (index < timesteps), index, -1)


class _Maps:
    """Held-out predictions [B, S, K] of any responses [B, S, K], from features that are reduced once."""

    def __init__(
        self,
        values: np.ndarray,  # [T, S, D]
        steps: np.ndarray,  # [B]
        fixed: bool,
        fit: Fit,
        fold: np.ndarray,  # [S]
        max_dimensions: int | None,
        seed: int,
    ) -> None:
        self._fit, self._fold, self._seed, self._fixed = fit, fold, seed, fixed
        stimuli = values.shape[1]
        if not any(_varies(values[t]) for t in np.unique(steps)):
            raise ValueError("features: expected features that differ between stimuli, got the same vector for all at every step")
        self._x: list[np.ndarray | None]
        if fixed:
            x = reduced(values[steps].reshape(len(steps) * stimuli, -1), max_dimensions, seed)
            self._x = list(x.reshape(len(steps), stimuli, -1))
        else:
            of_step = {int(t): reduced(values[t], max_dimensions, seed) if _varies(values[t]) else None for t in np.unique(steps)}
            self._x = [of_step[int(t)] for t in steps]

    def predict(self, y: np.ndarray) -> np.ndarray:
        bins, stimuli, neurons = y.shape
        stimulus = np.arange(stimuli)
        if self._fixed:
            rows = np.concatenate([x for x in self._x if x is not None])
            flat = y.reshape(bins * stimuli, neurons)
            return held_out_predictions(rows, flat, np.tile(stimulus, bins), self._fold, self._fit, self._seed).reshape(y.shape)
        return np.stack(
            [
                np.full(target.shape, np.nan) if x is None else held_out_predictions(x, target, stimulus, self._fold, self._fit, self._seed)
                for x, target in zip(self._x, y, strict=True)
            ]
        )


def _varies(
    features: np.ndarray,  # [S, D]
) -> bool:
    """Whether stimuli differ in their features at all."""
    return bool((features != features[0]).any())


def _corrected_for_fit(maps: _Maps, responses: np.ndarray, num_splits: int, seed: int, fold: np.ndarray) -> np.ndarray:
    across = models = recorded = np.zeros(responses.shape[::3])
    for one, two in half_means(responses, num_splits, seed):
        there = ~np.isnan(one).any((0, 1))
        p1, p2 = (np.full(one.shape, np.nan) for _ in range(2))
        p1[..., there], p2[..., there] = maps.predict(one[..., there]), maps.predict(two[..., there])
        across = across + (correlation(p1, two, fold) + correlation(p2, one, fold)) / 2
        models = models + correlation(p1, p2, fold)
        recorded = recorded + correlation(one, two, fold)
    with np.errstate(invalid="ignore"):
        product = np.where((models > 0) & (recorded > 0), models * recorded, np.nan)
    return np.asarray(across / np.sqrt(product))


def _features(features: Any, recordings: Recordings) -> np.ndarray:
    """[T, S, D], the rows of the recorded stimuli."""
    if hasattr(features, "detach"):
        features = features.detach().cpu().numpy()
    values = np.asarray(features)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"features: expected numbers [time, stimuli, ...], got dtype {values.dtype}")
    if values.ndim < 3 or 0 in values.shape:
        raise ValueError(f"features: expected shape [time, stimuli, ...] with no empty dimension, got {list(values.shape)}")
    assert recordings.rows is not None
    most = int(recordings.rows.max())
    if most >= values.shape[1]:
        raise ValueError(
            f"features: the recordings have {recordings.num_stimuli} stimuli up to row {most}, features [time, stimuli, ...] hold "
            f"{values.shape[1]}"
        )
    if recordings.in_order and values.shape[1] != recordings.num_stimuli:
        raise ValueError(
            f"features: expected {recordings.num_stimuli} stimuli, those of the recordings, got {values.shape[1]}; rows in the recordings "
            "would say which of them were shown"
        )
    values = values[:, recordings.rows].reshape(len(values), recordings.num_stimuli, -1)
    if not np.isfinite(values).all():
        raise ValueError(f"features: expected finite values, got {values[~np.isfinite(values)][0]}")
    return values


def _steps(
    steps: Sequence[int] | None, step_ms: float | None, latency_ms: float, first_step: int, timesteps: int, recordings: Recordings
) -> np.ndarray:
    bins = recordings.num_bins
    if steps is not None:
        given = np.asarray(steps)
        if given.dtype.kind not in "iu" or given.shape != (bins,) or given.min() < -1 or given.max() >= timesteps:
            raise ValueError(f"steps: expected {bins} integers in -1..{timesteps - 1}, one per time bin, got {given.tolist()}")
        return given.astype(np.int64)
    if step_ms is not None:
        if recordings.bin_edges_ms is None:
            raise ValueError("step_ms: the recordings have no bin_edges_ms; give steps instead")
        return steps_of_bins(recordings.bin_edges_ms, step_ms, latency_ms, first_step=first_step, timesteps=timesteps)
    index = np.arange(bins) - first_step
    if bins > first_step + timesteps:
        raise ValueError(
            f"step_ms: {bins} time bins and {first_step + timesteps} model steps: say how they go together by step_ms (and "
            "latency_ms), or by steps"
        )
    return np.where(index >= 0, index, -1)


def _check(method: str, mapping: str, num_splits: int, min_reliability: float, num_components: int, max_dimensions: int | None) -> None:
    check_choice("method", method, METHODS)
    check_choice("mapping", mapping, MAPPINGS)
    for name, value in (("num_splits", num_splits), ("num_components", num_components), ("max_dimensions", max_dimensions)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= min_reliability <= 1:
        raise ValueError(f"min_reliability: expected 0..1, got {min_reliability}")
