"""Intervals and tests that the whole analysis shares: one estimate has one interval, and one family one correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnndyn_fast.optional import require

LEVEL = 0.95
ALPHA = (1 - LEVEL) / 2  # of one-sided tests: a bound lies outside the interval exactly where its p is below


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval ``value +- t(df) error``.

    Args:
        value: the estimate; NaN where there is none.
        low, high: ends of the interval; NaN where there is none.
        error: standard error, with the images and the networks as they were drawn.
        df: degrees of freedom of t.
        n: images that it rests on, the fewest over networks.
        networks: networks that it is a mean over.
    """

    value: float
    low: float
    high: float
    error: float
    df: float
    n: int
    networks: int = 1

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())

    def p_above(self, bound: float) -> float:
        """One-sided p of the hypothesis that the true value is at most `bound`; 1 where there is no interval."""
        require("scipy")
        from scipy.stats import t

        if not self.known:
            return 1.0
        if self.error == 0:
            return 0.0 if self.value > bound else 1.0
        return float(t.sf((self.value - bound) / self.error, self.df))

    def p_below(self, bound: float) -> float:
        """One-sided p of the hypothesis that the true value is at least `bound`."""
        mirrored = Estimate(-self.value, -self.high, -self.low, self.error, self.df, self.n, self.networks)
        return mirrored.p_above(-bound)


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"), float("nan"), 0.0, 0)


def student(probability: float, df: np.ndarray) -> np.ndarray:  # [...] -> [...]
    """Quantile of Student's t; NaN where df is not positive."""
    require("scipy")
    from scipy.stats import t

    df = np.asarray(df, np.float64)
    return np.asarray(t.ppf(probability, np.where(df > 0, df, np.nan)))


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted so that the chance of one false finding or more in the family is kept (step-down Bonferroni).

    Source: S. Holm (1979), Scandinavian Journal of Statistics 6, 65-70.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(p), 0.0
    for rank, k in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = least
    return adjusted
