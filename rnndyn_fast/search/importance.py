"""How much each choice of a search matters, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.intervals import ALPHA, UNKNOWN, Estimate, student
from rnndyn_fast.optional import require
from rnndyn_fast.search.space import Space
from rnndyn_fast.search.storage import accuracy

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

NOT_MADE = "not made"  # a choice that meant nothing in a trial
MIN_FOR_IMPORTANCE = 8
REPLICATES = 50
_TREES, _TREES_OF_REPLICATES = 64, 16


def importances(done: Sequence[FrozenTrial], space: Space, replicates: int = REPLICATES, seed: int = 0) -> dict[str, Estimate]:
    """The share of each open choice in the variance of the objective over completed trials (fANOVA), largest first.

    Choices that were not made in a trial, because they meant nothing there, count as one more value. Intervals are percentiles over
    `replicates` in which the trials are drawn anew with replacement (forests of fewer trees); they hold how much the trials at hand could
    have been others, not that a sampler preferred some of them. Empty with fewer than MIN_FOR_IMPORTANCE trials.

    Args:
        done: completed trials.
        space: what was searched.
        replicates: how many bootstrap samples; below 2 there are no intervals.
        seed: of forests and samples.

    Deterministic: yes.

    Source: F. Hutter, H. Hoos, K. Leyton-Brown, ICML 2014.
    """
    values = np.array([accuracy(t) for t in done])
    table = {name: [t.params.get(name, NOT_MADE) for t in done] for name in space.open}
    table = {name: column for name, column in table.items() if len(set(column)) > 1}
    if len(done) < MIN_FOR_IMPORTANCE or len(set(values)) == 1 or not table:
        return {}
    point = _shares(table, values, _TREES, seed)
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    for k in range(replicates if replicates > 1 else 0):
        rows = rng.integers(0, len(done), len(done))
        sample = {name: [column[row] for row in rows] for name, column in table.items()}
        # (A choice that has one value in a sample explains nothing there.)
        varied = {name: column for name, column in sample.items() if len(set(column)) > 1}
        if varied and len(set(values[rows])) > 1:
            drawn.append(_shares(varied, values[rows], _TREES_OF_REPLICATES, seed + k + 1))
    found = {name: _estimate(share, [one.get(name, 0.0) for one in drawn], len(done)) for name, share in point.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _estimate(value: float, drawn: Sequence[float], n: int) -> Estimate:
    if len(drawn) < 2:
        return Estimate(value, float("nan"), float("nan"), float("nan"), 0.0, n)
    low, high = np.quantile(drawn, [ALPHA, 1 - ALPHA])
    return Estimate(value, float(low), float(high), float(np.std(drawn, ddof=1)), float(n - 1), n)


def _shares(table: Mapping[str, Sequence[Any]], values: np.ndarray, trees: int, seed: int) -> dict[str, float]:
    """fANOVA of a table of choices: columns by name, one value per trial."""
    require("optuna")

    import optuna

    made: dict[str, Sequence[Any]] = {}
    distributions: dict[str, Any] = {}
    for name, column in table.items():
        if NOT_MADE in column or isinstance(column[0], bool | str):
            distributions[name] = optuna.distributions.CategoricalDistribution(sorted(set(column), key=str))
            made[name] = column
        else:
            distributions[name] = optuna.distributions.FloatDistribution(float(min(column)), float(max(column)))
            made[name] = [float(value) for value in column]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for k, value in enumerate(values):
        params = {name: column[k] for name, column in made.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=float(value)))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items() if np.isfinite(share)}


def mean_estimate(values: Sequence[float]) -> Estimate:
    """A mean with its 95% interval (Student's t); none of fewer than two numbers."""
    n = len(values)
    if n < 2:
        return UNKNOWN if n == 0 else Estimate(float(values[0]), float("nan"), float("nan"), float("nan"), 0.0, 1)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(n))
    reach = float(student(1 - ALPHA, np.array(n - 1.0))) * error
    return Estimate(mean, mean - reach, mean + reach, error, n - 1.0, n)
