"""Comparison of representational geometry over time: CKA, Procrustes, and RDMs against those of subjects with a noise ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rnndyn_fast.analysis.human_times import MIN_SUBJECTS, fisher_mean
from rnndyn_fast.analysis.inputs import as_floats
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import check_choice

METHODS = ("corr", "spearman", "rho-a", "tau-a")
MIN_CONDITIONS = 5


def _over_time(name: str, value: Any) -> np.ndarray:  # -> [T, N, D]
    table = as_floats(name, value, "[T, N, D]", (None, None, None)).double().cpu().numpy()
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: expected finite values")
    return table


def _pair(a: Any, b: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = _over_time("a", a), _over_time("b", b)
    if first.shape[1] != second.shape[1] or first.shape[1] < least:
        raise ValueError(f"b: expected the same N >= {least} samples in a and b, got {first.shape[1]} and {second.shape[1]}")
    return first, second


def cka_over_time(
    a: Any,  # [T, N, D]
    b: Any,  # [S, N, E]
) -> np.ndarray:  # -> [T, S]
    r"""Linear CKA of every step of `a` with every step of `b`, by the unbiased estimate of HSIC.

    With Gram matrices :math:`K = X X^\top` and :math:`L` whose diagonals are set to 0,

    .. math:: \mathrm{HSIC}_1(K, L) = \frac{1}{N(N-3)} \Big[ \operatorname{tr}(KL) + \frac{\mathbf 1^\top K \mathbf 1\, \mathbf 1^\top L
       \mathbf 1}{(N-1)(N-2)} - \frac{2}{N-2} \mathbf 1^\top K L \mathbf 1 \Big], \qquad
       \mathrm{CKA} = \frac{\mathrm{HSIC}_1(K, L)}{\sqrt{\mathrm{HSIC}_1(K, K)\, \mathrm{HSIC}_1(L, L)}} .

    1 for representations that differ by rotation and scale, 0 on average for independent ones, also with more dimensions than samples,
    where the plain estimate goes to 1. NaN where a representation is constant.

    Raises ValueError, TypeError where shapes or values are wrong (N >= 4). Deterministic: yes. Memory: (T + S) N^2.
    Source: Kornblith, Norouzi, Lee & Hinton (2019), ICML; HSIC_1: Song et al. (2012), JMLR 13:1393; as CKA: Nguyen et al. (2021), ICLR.

    >>> x = np.random.default_rng(0).normal(size=(1, 20, 5))
    >>> cka_over_time(x, 3 * x[..., ::-1].copy()).round(6).tolist()
    [[1.0]]
    """
    first, second = _pair(a, b, 4)

    def grams(table: np.ndarray) -> np.ndarray:
        table = table - table.mean(1, keepdims=True)  # changes nothing but rounding
        gram = table @ table.transpose(0, 2, 1)
        gram[:, np.arange(gram.shape[1]), np.arange(gram.shape[1])] = 0.0
        return gram

    k, l = grams(first), grams(second)  # noqa: E741  (the names of the equation)
    cross = _hsic(k, l)
    own = np.sqrt(np.maximum(np.diagonal(_hsic(k, k)), 0))[:, None] * np.sqrt(np.maximum(np.diagonal(_hsic(l, l)), 0))
    return np.divide(cross, own, out=np.full(cross.shape, np.nan), where=own > 0)


def _hsic(k: np.ndarray, l: np.ndarray) -> np.ndarray:  # noqa: E741  [T, N, N], [S, N, N] -> [T, S]
    n = k.shape[1]
    trace = k.reshape(len(k), -1) @ l.reshape(len(l), -1).T
    rows = k.sum(2) @ l.sum(2).T
    totals = k.sum((1, 2))[:, None] * l.sum((1, 2))
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def procrustes_over_time(
    a: Any,  # [T, N, D]
    b: Any,  # [S, N, E]
) -> np.ndarray:  # -> [T, S]
    r"""Angular Procrustes distance of every step of `a` to every step of `b`, in radians: 0 to pi/2.

    :math:`\arccos ( \lVert X^\top Y \rVert_* / (\lVert X \rVert_F \lVert Y \rVert_F) )` of centred representations, the nuclear norm being
    the best that a rotation or reflection can do. A metric. NaN where a representation is constant.

    Raises ValueError, TypeError where shapes or values are wrong. Deterministic: yes.
    Source: Williams, Kunz, Kornblith & Linderman (2021), NeurIPS.
    """
    first, second = _pair(a, b, 2)
    first, second = (table - table.mean(1, keepdims=True) for table in (first, second))
    sizes = [np.linalg.norm(table, axis=(1, 2)) for table in (first, second)]
    out = np.full((len(first), len(second)), np.nan)
    for t, x in enumerate(first):
        for s, y in enumerate(second):
            if sizes[0][t] > 0 and sizes[1][s] > 0:
                shared = np.linalg.svd(x.T @ y, compute_uv=False).sum() / (sizes[0][t] * sizes[1][s])
                out[t, s] = np.arccos(np.clip(shared, -1, 1))
    return out


@dataclass(frozen=True)
class RdmComparison:
    """RDMs of a network over T steps against those of S subjects.

    Args:
        by_subject: [T, S].
        value, low, high: [T] mean over subjects with its 95% interval (Fisher's transform, t over subjects).
        ceiling_low, ceiling_high: noise ceiling: subjects against the mean of the others, and of all.
        subjects, conditions: how many.
    """

    by_subject: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ceiling_low: float
    ceiling_high: float
    subjects: int
    conditions: int


def compare_rdms(
    network: Any,  # [T, K, K]
    subjects: Any,  # [S, K, K]
    *,
    method: str = "rho-a",
) -> RdmComparison:
    """Compare a network's RDMs over time (`RdmReducer`) with those of subjects, by rsatoolbox.

    Args:
        network: symmetric dissimilarities between K conditions at every step.
        subjects: the same of S >= 3 subjects (people, animals, sessions).
        method: rsatoolbox's "corr", "spearman", "rho-a" (ranks, ties at random) or "tau-a".

    Raises:
        ImportError: rsatoolbox is not installed: ``pip install "rnndyn-fast[rsa]"``.
        ValueError: shapes or values are wrong; fewer than 3 subjects or 5 conditions.

    Deterministic: yes. Source: Nili et al. (2014), PLoS Computational Biology 10:e1003553; Schütt et al. (2023), eLife 12:e82566.
    """
    check_choice("method", method, METHODS)
    ours, theirs = _rdms("network", network), _rdms("subjects", subjects)
    conditions = ours.shape[1]
    if theirs.shape[1] != conditions:
        raise ValueError(f"subjects: expected RDMs of {conditions} conditions as network's, got {theirs.shape[1]}")
    if conditions < MIN_CONDITIONS:
        raise ValueError(f"network: expected at least {MIN_CONDITIONS} conditions, got {conditions}")
    if len(theirs) < MIN_SUBJECTS:
        raise ValueError(f"subjects: expected at least {MIN_SUBJECTS}, got {len(theirs)}: no interval over fewer means anything")
    require("rsatoolbox")
    from rsatoolbox.inference import boot_noise_ceiling
    from rsatoolbox.rdm import RDMs, compare

    people = RDMs(theirs)
    by_subject = np.asarray(compare(RDMs(ours), people, method=method))  # [T, S]
    low, high = boot_noise_ceiling(people, method=method)
    value, ends_low, ends_high = np.array([fisher_mean(row) for row in by_subject]).T
    return RdmComparison(by_subject, value, ends_low, ends_high, float(low), float(high), len(theirs), conditions)


def _rdms(name: str, value: Any) -> np.ndarray:
    table = _over_time(name, value)
    if table.shape[1] != table.shape[2] or not np.allclose(table, table.transpose(0, 2, 1)):
        raise ValueError(f"{name}: expected symmetric matrices [T, K, K], got shape {list(table.shape)}")
    if not np.allclose(np.diagonal(table, axis1=1, axis2=2), 0):
        raise ValueError(f"{name}: expected dissimilarities, 0 on the diagonal")
    return table
