"""Sections of a report about the dynamics of one network or several: accuracy, change, zones, breakdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rnndyn_fast.analysis import ReadoutZoneResult, breakdown_figures, figures
from rnndyn_fast.analysis.accumulators import GROUPS
from rnndyn_fast.analysis.outputs import tables, write_rows
from rnndyn_fast.report.page import Cell, Page, Plot, format_cell, lift_note


class View(Protocol):
    """A network in a report."""

    @property
    def title(self) -> str: ...

    @property
    def trained(self) -> ReadoutZoneResult: ...

    @property
    def untrained(self) -> ReadoutZoneResult | None: ...


def dynamics_sections(page: Page, views: Sequence[View]) -> None:
    """Everything that the analysis has to show, network beside network."""
    csv = {id(view.trained): tables(view.trained) for view in views}
    _accuracy(page, views, csv)
    _change(page, views, csv)
    _zones(page, views, csv)
    _stability(page, views, csv)
    _classes(page, views, csv)


def _accuracy(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Accuracy over time, and kinds of trajectories")
    section.plots(
        [
            *_each(views, csv, figures.figure_accuracy, "accuracy", "accuracy on testplus over time", _accuracy_alt),
            *_each(views, csv, figures.figure_groups, "groups", "kinds of trajectories", _groups_alt),
            *_each(views, csv, figures.figure_counts, "counts", "stable samples per time of stabilisation", _counts_alt),
        ]
    )
    header = ["network", "n", *(f"{name.replace('_', '-')}{end}" for name in GROUPS for end in ("", " (%)"))]
    rows: list[list[Cell]] = []
    for view in views:
        for state, result in (("trained", view.trained), ("untrained", view.untrained)):
            if result is not None:
                shares = [(result.counts[name], 100 * result.counts[name] / max(result.n, 1)) for name in GROUPS]
                rows.append([f"{view.title}, {state}".removeprefix(", "), result.n, *(cell for pair in shares for cell in pair)])
    section.table(
        header,
        rows,
        "Trajectories per group. Stable: the final class is predicted from some step on and not before; correct: it is the label "
        "(unstable-correct: the label was predicted at some step).",
    )


def _change(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Representations after stable correct classification")
    section.text(
        "The distance between successive representations, averaged over stable-correct samples with the same time of stabilisation, for "
        "each network as trained and as it was before training, on one scale. The first transition is the onset of recurrence."
    )
    shown = [(view, state, one) for view in views for state, one in (("trained", view.trained), ("untrained", view.untrained)) if one]
    drawn = [figures.figure_representation_change(result) for _, _, result in shown]
    same_scale(drawn)
    plots = []
    for (view, state, result), figure in zip(shown, drawn, strict=True):
        change = result.summary("change_after_stable")
        plots.append(
            _plot(
                figure,
                f"{view.title}, {state}: change of the representation per time step, one line per time of stabilisation".removeprefix(", "),
                f"Line plot of the representation change per transition in the {state} {view.title} network; after "
                f"stabilisation it is {float(change.mean):.3g} per step on average over {int(change.n):,} samples.",
                csv=to_csv(tables(result)["representation_change_by_t_stable"]),
            )
        )
    section.plots(plots)


def _zones(page: Page, views: Sequence[View], csv: dict[int, Any]) -> None:
    section = page.section("Place in the readout zone: already stable against not yet")
    section.text(
        "Stable-correct samples only. At each step, samples that already are in their final class are held against those that are not "
        "there yet. A readout zone is the region where one class has the largest logit; its edge is where another takes over."
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
        "Norm over time, one line per time of stabilisation; and where samples that change class are in the plane of the two readout "
        "vectors concerned, that of the class before they become stable and that of their final one: to the right is the distance to the "
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
        header = [
            "class",
            "n",
            "accuracy, t = 0",
            "last t",
            "stable-correct",
            "mean time of stabilisation",
            "norm, last t",
            "boundary distance, last t",
        ]
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
    drawn = [figure(view.trained) for view in views]
    if figure not in (breakdown_figures.figure_classes, breakdown_figures.figure_confusion):  # (whose axes are classes)
        same_scale(drawn)
    return [
        _plot(one, _named(view, what), _named(view, alt(view.trained)), inches, to_csv(csv[id(view.trained)][table]))
        for view, one in zip(views, drawn, strict=True)
    ]


def same_scale(drawn: Sequence[Any]) -> None:
    """Give figures that are held against each other the same vertical axis."""
    axes = [one for figure in drawn for one in figure.axes if one.lines or one.patches]
    if axes:
        limits = [one.get_ylim() for one in axes]
        low, high = min(min(pair) for pair in limits), max(max(pair) for pair in limits)
        for one, (first, second) in zip(axes, limits, strict=True):
            one.set_ylim(*((low, high) if first <= second else (high, low)))


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
