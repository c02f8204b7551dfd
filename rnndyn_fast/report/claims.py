"""What a report says of the two claims: the answer in two sentences, the main figure, a card per verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rnndyn_fast.analysis.bootstrap import Bootstrap
from rnndyn_fast.analysis.claims import METHOD, MIN_CHANGE, MIN_EFFECT, NOT_SUPPORTED, SUPPORTED, Claim
from rnndyn_fast.analysis.figures import GREY, NETWORKS
from rnndyn_fast.analysis.results import MIN_GROUP
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Card, Cell, Page, Plot, format_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = (
    "Do representations of a recurrent network keep changing after it has come to classify an image correctly and stably, and do "
    "representations that are not yet correctly classified have a lower norm and lie nearer the edge of the readout zone they are in?"
)
_TOLD = {  # claim -> the parts that its sentence gives, and how they are called there
    "change_after_stable": (("change_last", "change in the last step, share of the norm"), ("change_slope", "kept from step to step")),
    "lower_norm_nearer_edge": (
        ("norm_now_vs_later.difference", "norm, between images"),
        ("norm.within", "norm, within images"),
        ("cos_current_now_vs_later.difference", "cosine, between images"),
        ("cos_current.within", "cosine, within images"),
    ),
}


def answers(claims: Mapping[str, list[Claim]]) -> list[str]:
    """A sentence per claim: verdict, effect with interval, and n, network kind by kind."""
    told = []
    for k in range(2):
        parts = []
        for title, both in claims.items():
            claim = both[k]
            wanted = dict(_TOLD[claim.name])
            known = [part for part in claim.parts if part.name in wanted and part.estimate.known]
            numbers = "; ".join([*(f"{wanted[part.name]} {format_cell(part.estimate)}" for part in known), _n(claim)])
            head = f"{title}: " if title else ""
            parts.append(f"{head}{claim.verdict} ({numbers}) because {claim.reason}")
        statement = next(iter(claims.values()))[k].statement
        told.append(f"{statement}: {'. '.join(parts)}.")
    return told


def networks_line(networks: int) -> str:
    """How many networks, and what can be said from so many."""
    if networks == 1:
        return "n = 1 network of a kind: intervals are over images, and nothing is said of other networks of the kind."
    return f"n = {networks} networks (seeds) of a kind: intervals are over networks and images."


def _n(claim: Claim) -> str:
    return f"{claim.networks} network{'s' if claim.networks > 1 else ''}, {claim.n:,} stable-correct images"


def figure_answer(boots: Mapping[str, Bootstrap]) -> Figure:
    """Change per step after stabilisation beside the untrained network's, and differences in place on one scale."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (title, boot), (colour, marker) in zip(boots.items(), NETWORKS, strict=False):
        for name, style, kind in (("change_by_lag", "-", "trained"), ("change_untrained_by_lag", ":", "untrained")):
            shown = np.flatnonzero(boot.lag_counts >= MIN_GROUP)
            if name not in boot.values or not len(shown):
                continue
            value, (low, high) = boot.values[name], boot.interval(name)
            label = f"{title}, {kind}" if title else kind
            left.plot(shown, value[shown], color=colour, marker=marker, markersize=4, linestyle=style, label=label)
            left.fill_between(shown, low[shown], high[shown], color=colour, alpha=0.15, linewidth=0)
    left.axhline(MIN_CHANGE, color=GREY, linestyle="--", linewidth=1, label="bound: stands still")
    left.set_xlabel("time steps since stable (onset of recurrence left out)")
    left.set_ylabel("change per step (share of the norm)")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    levels = [(f"{name}{end}", f"{label}\n{how}") for name, label in (("norm", "norm"), ("cos_current", "cosine")) for end, how in (
        ("_now_vs_later.difference", "between images"), (".matched_label", "same class"), (".matched_zone", "same zone"),
        (".within", "within images"))]  # fmt: skip
    for k, ((title, boot), (colour, marker)) in enumerate(zip(boots.items(), NETWORKS, strict=False)):
        for row, (name, _) in enumerate(levels):
            estimate, scale = boot.estimate(name), boot.scales[name.partition("_now")[0].partition(".")[0]]
            if estimate.known and estimate.n >= MIN_GROUP and scale > 0:
                y = row + 0.16 * (k - (len(boots) - 1) / 2)
                span = [[(estimate.value - estimate.low) / scale], [(estimate.high - estimate.value) / scale]]
                right.errorbar(estimate.value / scale, y, xerr=span, color=colour, marker=marker, markersize=5, capsize=2)
        right.plot([], [], color=colour, marker=marker, linestyle="none", label=title or "trained")
    right.axvline(0, color=GREY, linewidth=0.8)
    right.axvline(MIN_EFFECT, color=GREY, linestyle="--", linewidth=1)
    right.set_yticks(range(len(levels)), [label for _, label in levels], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("already stable minus not yet (SD between images)")
    if len(boots) > 1:
        right.legend(fontsize=8)
    return figure


def answer(page: Page, boots: Mapping[str, Bootstrap], claims: Mapping[str, list[Claim]]) -> None:
    """Question, answer and main figure at the head of the page."""
    caption = (
        "The two claims. Left: change of the representation per time step, as a share of its norm, by time steps since correct "
        "classification became stable, in the trained networks and, for the same images and steps, before training; the first transition, "
        "the onset of recurrence, is left out. Right: by how much norm and cosine to the readout vector of the current class are higher "
        "once classification is stable, in standard deviations between images: between images as published, between images of the same "
        "class, between images in the same readout zone, and within images after against before, held against the residents of the zone. "
        f"Bands and bars: 95% intervals; dashed: bounds of no effect; points that rest on fewer than {MIN_GROUP} images are not drawn."
    )
    alt = "Lines of the change per step since stable, and points with intervals of the differences; numbers in the tables of the claims."
    page.answer(QUESTION, answers(claims), Plot(figure_answer(boots), caption, alt, 7.0))


def claims_section(page: Page, claims: Mapping[str, list[Claim]]) -> None:
    """Cards with verdicts, reasons, and every number they rest on."""
    section = page.section("The two claims, tested")
    section.text(
        f"{METHOD} The family here has {sum(map(len, claims.values()))} verdicts. Stable-correct images reach the right class at some time "
        "step and neither leave it nor have been there before; that step is their time of stabilisation."
    )
    section.text(
        "What the published comparison confounds: at every step it holds different images against each other. Images that are late are "
        "harder ones, of other classes and conditions; what is lower in them may be so at all steps. Comparisons within a class, within a "
        "zone and within an image take that out one by one; what remains at the last step, when all images are stable, belongs to the "
        "images and not to being not yet correct."
    )
    flat = [(title, both[k]) for k in range(2) for title, both in claims.items()]
    section.cards([claim_card(claim, title) for title, claim in flat])
    for title, claim in flat:
        rows: list[list[Cell]] = []
        for part in (*claim.parts, *claim.other):
            bound = None if np.isnan(part.bound) else part.bound
            rows.append([part.label, part.unit, part.estimate, part.estimate.n, bound, _SPEAKS[part.status(len(claim.parts))]])
        header = ["what", "unit", "value (95% interval)", "n", "bound", "speaks"]
        told = f"{title}: " if title else ""
        section.table(header, rows, f"{told}{claim.statement}: {claim.verdict}. What it rests on; n: images, the fewest over networks.")


def claim_card(claim: Claim, title: str) -> Card:
    """A claim's verdict and its reason."""
    return Card(
        f"{claim.statement} — {title}" if title else claim.statement,
        {SUPPORTED: True, NOT_SUPPORTED: False}.get(claim.verdict),
        f"{claim.verdict.capitalize()} (n = {_n(claim)})",
        (f"{claim.reason[:1].upper()}{claim.reason[1:]}.",),
        small=f"Supported where, {claim.criterion}. Corrected p for the claim {_p(claim.p_for)}, against it "
        f"{_p(claim.p_against)} (Holm, {claim.family} verdicts).",
    )


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else format_cell(value)


_SPEAKS = {"for": "for", "against": "against", "open": "open", "beside": "decides nothing"}
