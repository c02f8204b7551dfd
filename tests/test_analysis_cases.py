"""Trajectories that the analysis tests share, and the comparator they use, itself tested."""

from __future__ import annotations

import numpy as np
import pytest

from rnndyn_fast.analysis import ReadoutZoneResult, readout_zones
from rnndyn_fast.analysis.results import MEASURES


def make(n: int = 60, t: int = 6, c: int = 5, d: int = 8, seed: int = 0, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Noisy trajectories that drift towards their class: all four groups, several times of stabilisation."""
    rng = np.random.default_rng(seed)
    weight, labels = rng.standard_normal((c, d)), rng.integers(0, c, n)
    pull = np.linspace(0.1, 1.2, t)[:, None, None] * weight[labels] * rng.uniform(0, 1, (n, 1))
    trajectories = pull + np.cumsum(rng.standard_normal((t, n, d)) * 0.5, axis=0)
    return {
        "trajectories": trajectories.astype(dtype),
        "readout_weight": weight.astype(dtype),
        "labels": labels,
        "bias": rng.standard_normal(c).astype(dtype) * 0.3,
    }


def assert_same_result(got: ReadoutZoneResult, expected: ReadoutZoneResult, rtol: float = 1e-11) -> None:
    """Counts exact, tables to rounding, per-sample tables exact (where both have them)."""
    assert got.counts == expected.counts
    assert got.n == expected.n
    for (name, mine), (_, theirs) in zip(got.sums.arrays(), expected.sums.arrays(), strict=True):
        if mine.dtype.kind == "i":
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-11, err_msg=name)
    for name in MEASURES:
        np.testing.assert_allclose(got.summary(name).mean, expected.summary(name).mean, rtol=1e-9, err_msg=name)
    for name in (got.samples or {}) if expected.samples else {}:
        np.testing.assert_allclose(got.samples[name], expected.samples[name], rtol=1e-11, err_msg=name)


def test_comparator_sees_differences() -> None:
    result, other = readout_zones(**make()), readout_zones(**make())
    assert_same_result(result, other)
    other.sums.pair_cos[1, 2, 3] += 1e-6
    with pytest.raises(AssertionError, match="pair_cos"):
        assert_same_result(result, other)
    with pytest.raises(AssertionError):
        assert_same_result(result, readout_zones(**make(seed=1)))


def test_cases_exercise_every_group() -> None:
    for seed in range(4):
        result = readout_zones(**make(n=80, seed=seed))
        assert min(result.counts.values()) > 0
        assert (result.counts_t_stable_correct[:5] > 0).sum() >= 3
