"""The published claims about representation dynamics, checked on a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rnndyn_fast.analysis.results import ReadoutZoneResult

# Below this fraction of the norm per step, a representation counts as standing still. A change can never average below
# zero, so an interval that merely excludes zero would hold for rounding errors too.
MIN_RELATIVE_CHANGE = 0.01
# Steps at which a group has fewer samples have no credible normal interval and stay out of the difference.
MIN_GROUP = 10


@dataclass(frozen=True)
class Claim:
    """A claim, what decides it, and the numbers. ``holds`` is None where the data do not decide."""

    name: str
    statement: str
    criterion: str
    holds: bool | None
    n: int  # samples that the evidence is about
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The claim's fate in words."""
        return {True: "holds", False: "does not hold", None: "not decided by these data"}[self.holds]

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.statement}: {self.verdict} (n = {self.n}; {numbers})"


def mean_difference(result: ReadoutZoneResult, measure: str) -> tuple[float, float, int]:
    """Already stable minus not yet stable, averaged over steps below max_t_analysed where both groups have MIN_GROUP samples.

    Returns the difference, the half-width of its 95% interval, and the number of steps. At one step the groups share
    no sample: ``se_t^2 = sd_now^2 / n_now + sd_later^2 / n_later``. Steps share samples, so their errors may agree fully: the
    standard error of the average is taken as the average of the ``se_t``, its largest possible value.
    """
    summary = result.summary(measure)
    head = slice(0, result.max_t_analysed)
    mean, half = summary.mean[head], summary.ci95[head]
    kept = (summary.n[head] >= MIN_GROUP).all(1)
    if not kept.any():
        return float("nan"), float("nan"), 0
    difference = (mean[kept, 0] - mean[kept, 1]).mean()
    error = np.sqrt(np.square(half[kept]).sum(1)).mean()
    return float(difference), float(error), int(kept.sum())


def _check_change(result: ReadoutZoneResult) -> Claim:
    change, relative = result.summary("change_after_stable"), result.summary("relative_change_after_stable")
    low, high = float(change.mean - change.ci95), float(change.mean + change.ci95)
    relative_low, relative_high = float(relative.mean - relative.ci95), float(relative.mean + relative.ci95)
    holds: bool | None = None
    if np.isfinite([low, relative_low]).all():
        if low > 0 and relative_low > MIN_RELATIVE_CHANGE:
            holds = True
        elif relative_high < MIN_RELATIVE_CHANGE:
            holds = False
    return Claim(
        "change_after_stable",
        "Representations keep changing after stable correct classification",
        "over stable-correct samples, the mean of ||r[t+1] - r[t]|| over t >= t_stable has a 95% interval above 0, and "
        f"as a fraction of ||r[t]|| one above {MIN_RELATIVE_CHANGE:g}; it does not hold where the fraction's interval "
        "lies below that",
        holds,
        int(change.n),
        {
            "change per step": float(change.mean),
            "change, 95% low": low,
            "change, 95% high": high,
            "change / norm": float(relative.mean),
            "change / norm, 95% low": relative_low,
            "change / norm, 95% high": relative_high,
        },
    )


def _check_edge(result: ReadoutZoneResult) -> Claim:
    evidence: dict[str, float] = {}
    decisive: list[tuple[float, float]] = []
    labels = {
        "norm_now_vs_later": "norm",
        "cos_current_now_vs_later": "cosine to current class",
        "boundary_distance_now_vs_later": "boundary distance",
    }
    for measure, label in labels.items():
        stable, later = result.published_summary(measure)
        difference, half, _ = mean_difference(result, measure)
        low, high = difference - half, difference + half
        evidence |= {
            f"{label}, stable": float(stable),
            f"{label}, not yet": float(later),
            f"{label}, difference": difference,
            f"{label}, difference, 95% low": low,
            f"{label}, difference, 95% high": high,
        }
        if measure != "boundary_distance_now_vs_later":
            decisive.append((low, high))
    evidence["steps in the difference"] = float(mean_difference(result, "norm_now_vs_later")[2])
    evidence["not yet stable at t = 0"] = float(result.summary("norm_now_vs_later").n[0, 1])
    holds: bool | None = None
    if np.isfinite(decisive).all():
        if all(low > 0 for low, _ in decisive):
            holds = True
        elif any(high < 0 for _, high in decisive):
            holds = False
    return Claim(
        "lower_norm_nearer_edge",
        "Not-yet-correct representations have lower norm and lie nearer the edge of the readout zone they are in",
        "over stable-correct samples, already stable minus not yet stable, averaged over the steps below "
        f"max_t_analysed with at least {MIN_GROUP} samples in both groups: the 95% intervals of the difference in norm "
        "and in cosine to the current class both lie above 0; it does not hold where either lies below 0 (the distance "
        "to the nearest zone boundary is shown next to them and is not used for the decision)",
        holds,
        result.counts["stable_correct"],
        evidence,
    )


def check_claims(result: ReadoutZoneResult) -> list[Claim]:
    """Check the two published claims; each says its criterion, its numbers with 95% intervals, and n.

    Intervals are normal ones and need no samples; those of the bootstrap, which are narrower where steps share samples, are
    shown beside them in a study.

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435.
    """
    return [_check_change(result), _check_edge(result)]
