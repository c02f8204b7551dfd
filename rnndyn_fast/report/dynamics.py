"""Sections of a report about the dynamics of one network or several: claims, accuracy, change, zones, breakdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rnndyn_fast.analysis import Claim, ReadoutZoneResult, breakdown_figures, check_claims, figures
from rnndyn_fast.analysis.accumulators import GROUPS
from rnndyn_fast.analysis.outputs import tables, write_rows
from rnndyn_fast.report.page import Card, Cell, Page, Plot, format_cell, lift_note, table_html
from rnndyn_fast.study.published import GROUP_COUNTS


class View(Protocol):
    """A network in a report."""

    @property
    def title(self) -> str: ...

    @property
    def trained(self) -> ReadoutZoneResult: ...

    @property
    def untrained(self) -> ReadoutZoneResult | None: ...


def dynamics_sections(page: Page, views: Sequence[View], published: bool = False) -> None:
    """Everything that the analysis has to show, network beside network."""
    csv = {id(view.trained): tables(view.trained) for view in views}
    _accuracy(page, views, csv, published)
    _change(page, views, csv)
    _zones(page, views, csv)
    _stability(page, views, csv)
    _classes(page, views, csv)


def claims_section(page: Page, views: Sequence[View]) -> None:
    """The two published claims, a card per claim and network."""
    section = page.section("The two published claims, checked here")
    section.text(
        "Each card says whether the claim holds for one network on these images, by the criterion below it, with the number "
        "of samples it rests on and 95% intervals. “Stable-correct” samples reach the right class at some time step and "
        "never leave it; `t_stable` is that step."
    )
    cards = []
    for claims in zip(*(check_claims(view.trained) for view in views), strict=True):
        cards += [claim_card(claim, view.title) for claim, view in zip(claims, views, strict=True)]
    section.cards(cards)


def verdict_sentences(views: Sequence[View]) -> str:
    """One sentence per published claim."""
    sentences = []
    for claims in zip(*(check_claims(view.trained) for view in views), strict=True):
        verdicts = {claim.verdict for claim in claims}
        if len(verdicts) == 1:
            told = f"{verdicts.pop()}{f' in all {len(views)} networks' if len(views) > 1 else ''}"
        else:
            told = ", ".join(f"{claim.verdict} ({view.title})" for claim, view in zip(claims, views, strict=True))
        sentences.append(f"“{claims[0].statement}”: {told}.")
    return " ".join(sentences)


def claim_card(claim: Claim, title: str) -> Card:
    """A claim's verdict and numbers."""
    header, rows, rest = evidence_table(claim)
    return Card(
        f"{claim.statement} — {title}" if title else claim.statement,
        claim.holds,
        f"{claim.verdict[0].upper()}{claim.verdict[1:]} (n = {claim.n:,} stable-correct samples)",
        table=table_html(header, rows, f"What it rests on{rest}."),
        small=f"Criterion: {claim.criterion}.",
    )


def evidence_table(claim: Claim) -> tuple[list[str], list[list[Cell]], str]:
    """Header and rows of a claim's numbers, and in words what is left.

    Where the numbers compare ("x, stable", "x, not yet", "x, difference"), each x is a row, and lone numbers are left
    for words; otherwise each number is a row. "x, 95% low" and "x, 95% high" are the interval of x.
    """
    evidence = dict(claim.evidence)

    def interval(name: str) -> str:
        low, high = (evidence.pop(f"{name}, 95% {end}", np.nan) for end in ("low", "high"))
        # One word to the line breaker.
        return f"{format_cell(low)}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{format_cell(high)}" if np.isfinite([low, high]).all() else ""

    compared = [name.removesuffix(", difference") for name in evidence if name.endswith(", difference")]
    rows: list[list[Cell]] = []
    if compared:
        for name in compared:
            values = [evidence.pop(f"{name}, {part}", np.nan) for part in ("stable", "not yet", "difference")]
            rows.append([name, *values, interval(f"{name}, difference")])
        rest = "; ".join(f"{name}: {format_cell(_number(value))}" for name, value in evidence.items())
        return ["measure", "stable", "not yet", "difference", "95% interval"], rows, f" ({rest})" if rest else ""
    for name in [name for name in evidence if not name.endswith((", 95% low", ", 95% high"))]:
        # An interval bears the name of its measure, or that of the measure without its unit.
        stem = name if f"{name}, 95% low" in evidence else name.removesuffix(" per step")
        rows.append([name, _number(evidence[name]), interval(stem)])
    return ["measure", "value", "95% interval"], rows, ""


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _accuracy(page: Page, views: Sequence[View], csv: dict[int, Any], published: bool) -> None:
    section = page.section("Accuracy over time, and kinds of trajectories")
    section.plots(
        [
            *_each(views, csv, figures.figure_accuracy, "accuracy", "accuracy on testplus over time", _accuracy_alt),
            *_each(views, csv, figures.figure_groups, "groups", "kinds of trajectories", _groups_alt),
            *_each(views, csv, figures.figure_counts, "counts", "stable samples per time of stabilisation", _counts_alt),
        ]
    )
    header = ["network", "n", *(name.replace("_", "-") for name in GROUPS)]
    rows: list[list[Cell]] = []
    for view in views:
        rows.append(
            [
                f"{view.title}, here" if published else view.title or "trained",
                view.trained.n,
                *_shares([view.trained.counts[name] for name in GROUPS]),
            ]
        )
        if view.untrained is not None:
            untrained = view.untrained
            rows.append([f"{view.title}, untrained".removeprefix(", "), untrained.n, *_shares([untrained.counts[name] for name in GROUPS])])
    if published:
        rows += [[f"{name.replace('_', ', ')}, published", sum(counts), *_shares(counts)] for name, counts in GROUP_COUNTS.items()]
    section.table(
        header,
        rows,
        "Trajectories per group: stable if the final class is predicted from t_stable on and not before; correct if "
        "that is "
        "the label (unstable-correct: the label was predicted at some step)."
        + (" Published: MiniEcoset, 100 classes." if published else ""),
    )


def _change(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Representations after stable correct classification")
    section.text(
        "The distance between successive representations, averaged over stable-correct samples with the same "
        "`t_stable`, for "
        "each network as trained and as it was before training."
    )
    plots = []
    for view in views:
        for state, result in (("trained", view.trained), ("untrained", view.untrained)):
            if result is None:
                continue
            change = result.summary("change_after_stable")
            plots.append(
                _plot(
                    figures.figure_representation_change(result),
                    f"{view.title}, {state}: representation change per time step, one line per `t_stable`".removeprefix(", "),
                    f"Line plot of the representation change per transition in the {state} {view.title} network; after "
                    f"stabilisation it is {float(change.mean):.3g} per step on average over {int(change.n):,} samples.",
                    csv=to_csv(tables(result)["representation_change_by_t_stable"]),
                )
            )
    section.plots(plots)


def _zones(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Place in the readout zone: already stable against not yet")
    section.text(
        "Stable-correct samples only. At each step, samples that already are in their final class (t_stable ≤ t) are "
        "held "
        "against those that are not there yet (t_stable > t). A readout zone is the region where one class has the "
        "largest "
        "logit; its edge is where another takes over."
    )
    for name, figure, measure in (
        ("norm of the representation", figures.figure_norm, "norm_now_vs_later"),
        ("cosine to the current class", figures.figure_cos_current, "cos_current_now_vs_later"),
        ("logit margin", figures.figure_margin, "margin_now_vs_later"),
        ("distance to the nearest zone boundary", figures.figure_boundary_distance, "boundary_distance_now_vs_later"),
    ):
        section.plots(_each(views, csv, figure, measure, name, _pair_alt(name, measure, "already stable", "not yet stable")))
    section.text(
        "Of samples not yet stable: do they point to the class they will end in, more than to the final classes of "
        "others "
        "that share their current class?"
    )
    alt = _pair_alt("cosine of samples not yet stable", "cos_final_vs_other", "own final class", "others' final classes")
    section.plots(_each(views, csv, figures.figure_cos_final, "cos_final_vs_other", "cosine to own and to others' final classes", alt))
    section.text("How the readout vectors of the classes lie to each other:")
    section.plots(
        _each(
            views,
            csv,
            figures.figure_dendrogram,
            "readout_dendrogram",
            "Ward dendrogram of the readout vectors",
            lambda r: _classes_alt(r.num_classes),
        )
    )


def _stability(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Time to stability, and the way there")
    section.text(
        "Norm over time, one line per `t_stable`; and where samples that change class are in the plane of the two readout vectors "
        "concerned, that of the class before they become stable and that of their final one: to the right is the distance to the "
        "boundary between the two zones (the final class has the right side), upwards is what both classes share."
    )
    section.plots(
        _each(views, csv, breakdown_figures.figure_norm_by_t_stable, "norm_by_t_stable", "norm by time of stabilisation", _norm_alt)
    )
    section.plots(_each(views, csv, breakdown_figures.figure_plane, "plane", "plane of the two readout vectors concerned", _plane_alt))


def _classes(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Class by class, and confusions over time")
    section.plots(_each(views, csv, breakdown_figures.figure_classes, "classes", "groups of trajectories by class", _classes_groups_alt))
    section.plots(
        _each(views, csv, breakdown_figures.figure_confusion, "confusion", "predicted class by label, first and last step", _confusion_alt)
    )
    for view in views:
        rows: list[list[Cell]] = [
            [
                str(r["class"]),
                r["n"],
                r["accuracy_first"],
                r["accuracy_last"],
                r["stable_correct"],
                r["t_stable_mean"],
                r["norm_mean"],
                r["boundary_distance_mean"],
            ]
            for r in csv[id(view.trained)]["classes"]
        ]
        header = ["class", "n", "accuracy, t = 0", "last t", "stable-correct", "mean t_stable", "norm, last t", "boundary distance, last t"]
        section.table(
            header, rows, f"{view.title}: class by class; the last three columns are means over stable-correct samples.".removeprefix(": ")
        )
        changes: list[list[Cell]] = [list(row) for row in breakdown_figures.confusion_changes(view.trained)]
        if changes:
            section.table(
                ["label", "predicted", "samples, t = 0", "last t"],
                changes,
                f"{view.title}: confusions that change most over time.".removeprefix(": "),
            )


def _each(
    views: Sequence[View],
    csv: dict[int, Any],
    figure: Callable[[ReadoutZoneResult], Any],
    table: str,
    what: str,
    alt: Callable[[ReadoutZoneResult], str],
) -> list[Plot]:
    """The same figure of every network."""
    # Bars side by side need the width.
    inches = 6.6 if figure is figures.figure_counts else 5.0
    return [
        _plot(figure(view.trained), _named(view, what), _named(view, alt(view.trained)), inches, to_csv(csv[id(view.trained)][table]))
        for view in views
    ]


def _named(view: View, text: str) -> str:
    return f"{view.title}: {text}" if view.title else text[:1].upper() + text[1:]


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV text."""
    buffer = io.StringIO()
    write_rows(rows, buffer)
    return buffer.getvalue()


def _plot(figure: Any, caption: str, alt: str, inches: float = 5.0, csv: str = "") -> Plot:
    """A figure of an analysis; what it says above its axes goes into the caption."""
    note = lift_note(figure)
    return Plot(figure, f"{caption}; {note}." if note else f"{caption}.", alt, inches, csv)


def _shares(counts: Sequence[int]) -> list[str]:
    total = max(sum(counts), 1)
    return [f"{count:,} ({100 * count / total:.1f}%)" for count in counts]


def _accuracy_alt(result: ReadoutZoneResult) -> str:
    accuracy = 100 * result.accuracy
    return f"line plot of accuracy, {accuracy[0]:.1f}% at t = 0 and {accuracy[-1]:.1f}% at t = {result.timesteps - 1}."


def _groups_alt(result: ReadoutZoneResult) -> str:
    return "bars: " + ", ".join(f"{name.replace('_', '-')} {count:,}" for name, count in result.counts.items()) + "."


def _counts_alt(result: ReadoutZoneResult) -> str:
    counts = ", ".join(f"{count:,}" for count in result.counts_t_stable_correct)
    return f"bars of stable samples per time of stabilisation; stable-correct at t = 0, 1, ...: {counts}."


def _pair_alt(name: str, measure: str, first: str, second: str) -> Callable[[ReadoutZoneResult], str]:
    def alt(result: ReadoutZoneResult) -> str:
        one, two = result.published_summary(measure)
        return f"two lines over time, {name}; on average {first} {one:.3g}, {second} {two:.3g}."

    return alt


def _classes_alt(classes: int) -> str:
    return f"dendrogram of {classes} readout vectors."


def _norm_alt(result: ReadoutZoneResult) -> str:
    r = result.norm_t_stable_correlation
    return f"lines of the mean norm over time, one per time of stabilisation; its correlation with the norm at t = 0: {format_cell(r)}."


def _plane_alt(result: ReadoutZoneResult) -> str:
    across = result.summary("plane_across").mean[1:]
    first, last = (np.nan if np.isnan(across[:, t]).all() else float(np.nanmean(across[:, t])) for t in (0, -1))
    return f"mean paths across the boundary of two zones, distance {format_cell(first)} at t = 0, {format_cell(last)} at the last step."


def _classes_groups_alt(result: ReadoutZoneResult) -> str:
    return f"stacked bars, one for each of {result.num_classes} classes: shares of the four groups; numbers in the table below."


def _confusion_alt(result: ReadoutZoneResult) -> str:
    wrong = [int(table.sum() - np.trace(table)) for table in result.sums.confusion[[0, -1]]]
    return f"two heat maps of predicted class by label; {wrong[0]:,} samples off the diagonal at t = 0, {wrong[1]:,} at the last step."
