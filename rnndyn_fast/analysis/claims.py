"""The two published claims, tested against what would make them trivially true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rnndyn_fast.analysis.bootstrap import Bootstrap, bootstrap, pool
from rnndyn_fast.analysis.intervals import ALPHA, UNKNOWN, Estimate, holm
from rnndyn_fast.analysis.results import ReadoutZoneResult

# Bounds of "no effect worth the name". A norm cannot average below zero, and with enough images any difference excludes zero, so each
# part of a claim is held against such a bound, from either side.
MIN_CHANGE = 0.01  # of the norm per step: below, a representation stands still
KEPT_CHANGE = 0.9  # of a step's change in the next step: below, the change halves within seven steps, and the network converges
MIN_ORDER = 0.05  # of the change between shuffled steps: nearer to it, steps follow each other as noise does
MIN_EFFECT = 0.1  # of the standard deviation between images: half of what is by convention a small effect
MIN_SAMPLES = 30  # images that every part must rest on

_ALL = "every part lies above its bound"
SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
METHOD = (
    "A claim is supported where every part of it lies above its bound (intersection-union test, one-sided 2.5%), and not supported where "
    "a part lies below (2.5% divided by the number of parts, Bonferroni); else it is inconclusive. Both kinds of p are corrected for the "
    "number of verdicts in the report by Holm's method."
)


@dataclass(frozen=True)
class Part:
    """A number that a claim rests on, and what it is held against.

    Args:
        name: of the measure, as in tables.
        label: what it is, in words; unit: of its values.
        estimate: value, interval, n.
        bound: what it is held against.
        above, below: one-sided p of lying at the wrong side of the bound: small where the part speaks for, against the claim.
        against: what it means in words where it speaks against the claim.
    """

    name: str
    label: str
    unit: str
    estimate: Estimate
    bound: float
    above: float
    below: float
    against: str

    def status(self, parts: int) -> str:
        """ "for", "against" or "open", in a claim of so many parts; "beside" where it decides nothing."""
        if np.isnan(self.above):
            return "beside"
        if self.above <= ALPHA:
            return "for"
        return "against" if self.below <= ALPHA / parts else "open"


@dataclass(frozen=True)
class Claim:
    """A claim, its verdict with the reason, and the parts that decide it; `other` numbers are shown beside them and decide nothing."""

    name: str
    statement: str
    criterion: str
    parts: Sequence[Part]
    other: Sequence[Part]
    n: int  # stable-correct images, the fewest over networks
    networks: int
    missing: str  # why it cannot be decided whatever the numbers; empty where it can
    verdict: str = INCONCLUSIVE
    reason: str = ""
    p_for: float = 1.0  # corrected
    p_against: float = 1.0
    family: int = 1

    @property
    def raw(self) -> tuple[float, float]:
        """Uncorrected p for and against the claim."""
        if self.missing or not self.parts:
            return 1.0, 1.0
        return max(part.above for part in self.parts), min(1.0, len(self.parts) * min(part.below for part in self.parts))

    def __str__(self) -> str:
        of = f"{self.networks} network{'s' if self.networks > 1 else ''}, {self.n:,} stable-correct images"
        return f"{self.statement}: {self.verdict} ({of}); {self.reason}"


def _part(
    boot: Bootstrap,
    name: str,
    label: str,
    unit: str,
    bound: float,
    against: str,
    shown: Callable[[float], float] = float,
) -> Part:
    estimate = boot.estimate(name) if name in boot.values else UNKNOWN
    above, below = (estimate.p_above(bound), estimate.p_below(bound)) if np.isfinite(bound) else (1.0, 1.0)
    told = replace(estimate, value=shown(estimate.value), low=shown(estimate.low), high=shown(estimate.high))
    return Part(name, label, unit, told, shown(bound), above, below, against)


def _beside(boot: Bootstrap, name: str, label: str, unit: str) -> Part:
    """A number that decides nothing."""
    return Part(name, label, unit, boot.estimate(name), float("nan"), float("nan"), float("nan"), "")


def _change(boot: Bootstrap) -> Claim:
    order = _part(boot, "change_order", "change between successive steps against shuffled steps", "share, less 1", 0.0, "steps follow each "
                  "other as independent noise would: the change does not depend on their order")  # fmt: skip
    estimate = order.estimate
    order = replace(
        order,
        above=min(estimate.p_above(0.0), estimate.p_below(0.0)),  # either sign is order
        below=max(estimate.p_below(MIN_ORDER), estimate.p_above(-MIN_ORDER)),
    )
    share = "share of the norm per step"
    parts = [
        _part(boot, "change_last", "change in the last step", share, MIN_CHANGE, "representations stand still in the last step"),
        _part(boot, "change_slope", "change of a step against that of the step before", "factor", float(np.log(KEPT_CHANGE)),
              "the change dies away: representations converge, and what moves after stabilisation is the approach to a fixed point", _exp),
        order,
        _part(boot, "change_vs_untrained", "change in the last step more than in the untrained network, same images", share, MIN_CHANGE,
              "the untrained network changes as much on the same images: the change comes with the architecture"),
    ]  # fmt: skip
    missing = ""
    if boot.counts["images"] and "change_vs_untrained" not in boot.values:
        missing = "the untrained network was not given, so that what training adds is not known"
    return Claim(
        "change_after_stable",
        "Representations keep changing after stable correct classification",
        f"over stable-correct images and without the first transition (onset of recurrence), the change in the last step is more than "
        f"{MIN_CHANGE:g} of the norm, at least {KEPT_CHANGE:g} of it is kept from step to step, it depends on the order of steps, and it "
        f"is more than the untrained network's on the same images by {MIN_CHANGE:g}",
        parts,
        [
            _beside(boot, name, "change in the last step, untrained network, same images", share)
            for name in ("change_untrained",)
            if name in boot.values
        ],
        boot.counts["change_last"],
        boot.networks,
        missing,
    )


def _exp(value: float) -> float:
    return float(np.exp(value))


_LEVELS = (  # ending of the measure, what it compares, and where there is no difference if it fails
    ("_now_vs_later.difference", "between images", "between images"),
    (".matched_label", "between images of the same class", "between images of the same class"),
    (".matched_zone", "between images in the same zone", "between images in the same zone"),
    (".within", "within images, after against before stabilisation", "within images"),
)
_BESIDE = (
    (".within_raw", "within images, not held against residents of the zone"),
    (".last_step", "at the last step, stable from the start against late"),
)


def _edge(boot: Bootstrap) -> Claim:
    parts, other = [], []
    for name, label, unit in (("norm", "norm", "activation units"), ("cos_current", "cosine to the current class", "cosine")):
        bound = MIN_EFFECT * boot.scales[name]
        for end, how, against in _LEVELS:
            parts.append(_part(boot, f"{name}{end}", f"{label}, {how}", unit, bound, f"{label}: no difference {against}"))
        other += [_beside(boot, f"{name}{end}", f"{label}, {how}", unit) for end, how in _BESIDE]
    for end, how in (*[(end, how) for end, how, _ in _LEVELS if end in (_LEVELS[0][0], ".within")], _BESIDE[1]):
        other.append(_beside(boot, f"boundary_distance{end}", f"distance to the zone boundary, {how}", "activation units"))
    return Claim(
        "lower_norm_nearer_edge",
        "Not-yet-correct representations have lower norm and lie nearer the edge of the readout zone they are in",
        f"already stable minus not yet stable is more than {MIN_EFFECT:g} standard deviations between images, for the norm and for the "
        "cosine to the current class: between images as published, between images of the same class (and condition), between images in the "
        "same zone, and within images, after minus before stabilisation, each step held against the residents of its zone at that step",
        parts,
        other,
        boot.counts["change_last"],
        boot.networks,
        "",
    )


def _few(claim: Claim) -> str:
    """Which part rests on too few images, in words."""
    if claim.n < MIN_SAMPLES:
        return f"{claim.n:,} stable-correct images, at least {MIN_SAMPLES} are needed"
    few = [part for part in claim.parts if part.estimate.n < MIN_SAMPLES or not part.estimate.known]
    if not few:
        return ""
    part = few[0]
    if part.estimate.n < MIN_SAMPLES:
        return f"{part.label}: {part.estimate.n:,} images, at least {MIN_SAMPLES} are needed"
    return f"{part.label}: not defined (too few time steps, or steps with both groups)"


def _reason(claim: Claim) -> str:
    """Why the verdict is what it is, before it is corrected for the number of verdicts."""
    statuses = [part.status(len(claim.parts)) for part in claim.parts]
    if claim.name == "lower_norm_nearer_edge":
        return _places(claim.parts, statuses)
    if "against" in statuses:
        return "; ".join(part.against for part, status in zip(claim.parts, statuses, strict=True) if status == "against")
    still = [part.label for part, status in zip(claim.parts, statuses, strict=True) if status == "open"]
    return f"not decided by these data: {'; '.join(still)}" if still else _ALL


def _places(parts: Sequence[Part], statuses: Sequence[str]) -> str:
    """Where claim 2 holds and where it does not: both measures, level by level."""
    levels = [part.label.partition(", ")[2].partition(",")[0] for part in parts[: len(parts) // 2]]
    half = len(levels)
    if set(statuses) == {"for"}:
        return _ALL
    told: dict[str, list[str]] = {"for": [], "against": [], "open": []}
    for k, level in enumerate(levels):
        both = {statuses[k], statuses[k + half]}
        if both == {"for"}:
            told["for"].append(level)
            continue
        for name, status in (("norm", statuses[k]), ("cosine", statuses[k + half])):
            told[status].append(level if len(both) == 1 else f"{level} ({name})")
    heads = {"for": "it holds ", "against": "it does not hold ", "open": "it is not decided "}
    return "; ".join(heads[key] + ", ".join(dict.fromkeys(where)) for key, where in told.items() if where)


def decide(claims: Sequence[Claim]) -> list[Claim]:
    """Verdicts of a family of claims: p for and against corrected over the family by Holm's method."""
    checked = [replace(claim, missing=_few(replace(claim, parts=_given(claim))) or claim.missing) for claim in claims]
    # A claim that lacks something can still fail by what is there.
    against = holm([_against(claim) for claim in checked])
    support = holm([claim.raw[0] for claim in checked])
    out = []
    for claim, yes, no in zip(checked, support, against, strict=True):
        verdict, reason = INCONCLUSIVE, claim.missing
        if no <= ALPHA:
            verdict, reason = NOT_SUPPORTED, _reason(claim)
        elif not claim.missing:
            reason = _reason(claim)
            if yes <= ALPHA:
                verdict = SUPPORTED
            elif claim.raw[0] <= ALPHA:
                reason = f"every part lies above its bound, but not after correction for {len(claims)} verdicts"
            elif claim.raw[1] <= ALPHA:
                reason = f"{reason}, but not after correction for {len(claims)} verdicts"
        out.append(replace(claim, verdict=verdict, reason=reason, p_for=yes, p_against=no, family=len(claims)))
    return out


def _given(claim: Claim) -> list[Part]:
    """The parts without the one whose data were not given, which has a reason of its own."""
    return [part for part in claim.parts if not (claim.missing and not part.estimate.n)]


def _against(claim: Claim) -> float:
    enough = [part.below for part in claim.parts if part.estimate.n >= MIN_SAMPLES]
    return min(1.0, len(claim.parts) * min(enough, default=1.0)) if claim.n >= MIN_SAMPLES else 1.0


def claims_of(boots: Mapping[str, Bootstrap]) -> dict[str, list[Claim]]:
    """Both claims for every kind of network: kind -> claims. All verdicts are one family.

    Args:
        boots: kind -> `bootstrap` of its network, or `pool` of those of its networks.
    """
    flat = decide([claim for boot in boots.values() for claim in (_change(boot), _edge(boot))])
    return {name: flat[2 * k : 2 * k + 2] for k, name in enumerate(boots)}


def check_claims(
    results: ReadoutZoneResult | Sequence[ReadoutZoneResult],
    untrained: ReadoutZoneResult | Sequence[ReadoutZoneResult] | None = None,
    *,
    condition: Any = None,  # [N]
    replicates: int = 1000,
    seed: int = 0,
) -> list[Claim]:
    """Check the two published claims on a network, or on networks of one kind (seeds) that saw the same images.

    Args:
        results: one result per network, with kept samples.
        untrained: the same images through the untrained networks, in the same order. Without, the first claim cannot be supported.
        condition: [N] of each image, any integers; images are matched for it.
        replicates, seed: of the bootstrap.

    Returns:
        Two claims, each with verdict ("supported", "not supported", "inconclusive"), reason and parts with intervals; see docs/analysis.md.

    Raises:
        ValueError: results without kept samples, of different images, or not as many as `untrained`.

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435, for the claims; the tests are ours.

    >>> from rnndyn_fast.analysis import readout_zones
    >>> still = readout_zones(np.ones((5, 40, 3)) * [2.0, 1.0, 0.0], np.eye(3), np.zeros(40, int))
    >>> check_claims(still)[0].reason
    'representations stand still in the last step'
    """
    several = [results] if isinstance(results, ReadoutZoneResult) else list(results)
    controls: list[ReadoutZoneResult | None] = [None] * len(several)
    if untrained is not None:
        controls = [untrained] if isinstance(untrained, ReadoutZoneResult) else list(untrained)
    if len(controls) != len(several):
        raise ValueError(f"untrained: expected one for each of {len(several)} networks, got {len(controls)}")
    boots = [
        bootstrap(one, replicates, seed=seed, untrained=control, condition=condition, pairs=False)
        for one, control in zip(several, controls, strict=True)
    ]
    return claims_of({"": pool(boots)})[""]
