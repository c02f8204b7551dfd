"""The section of a phase report that sets a sweep beside the published one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.figures import BLUE, ORANGE
from rnndyn_fast.optional import require
from rnndyn_fast.phase.analysis import PhaseAnalysis
from rnndyn_fast.report.page import Cell, Page, Plot
from rnndyn_fast.train.phase_results import NetworkResult, compare, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_section(page: Page, records: Sequence[PhaseAnalysis], ours: Sequence[NetworkResult], theirs: Sequence[NetworkResult]) -> None:
    """Epochs to the stopping loss and kinds of solution, by condition; `theirs` may be empty."""
    section = page.section("The sweep")
    total = summarise(ours)
    running = sum(row.status == "running" for row in ours)
    text = f"{total['reached']} of {total['networks']} networks reached the stopping loss"
    if total["reached"]:
        text += f", after {total['final_epoch_median']:g} epochs in the median ({total['final_epoch_min']} to {total['final_epoch_max']})"
    if running:
        text += f"; {running} are still in training, so this is not the whole sweep"
    if theirs:
        other = summarise(theirs)
        text += (
            f". Published: {other['reached']} of {other['networks']}, median {other['final_epoch_median']:g} "
            f"({other['final_epoch_min']} to {other['final_epoch_max']})"
        )
        tests = compare(ours, theirs)
        if "kolmogorov_smirnov" in tests:
            ks = tests["kolmogorov_smirnov"]
            text += f". Kolmogorov-Smirnov between the two distributions: {ks['statistic']:.3f} (p = {ks['p']:.3g})"
    section.text(text + ".")
    if total["reached"]:
        figure = figure_epochs(ours, theirs)
        section.plots(
            [
                Plot(
                    figure,
                    "Share of networks that had reached the stopping loss after so many epochs.",
                    "Cumulative epochs, ours and published",
                )
            ]
        )
    kinds = {record.name: record.facts["solution.solution"] for record in records}
    published = {_condition(row): row for row in summarise(theirs)["conditions"]} if theirs else {}
    found = sorted(set(kinds.get(f"job {row.job_id}", "") for row in ours) - {""})
    rows: list[list[Cell]] = []
    for condition in total["conditions"]:
        other_row = published.get(_condition(condition), {})
        members = [row for row in ours if (row.alpha, row.noise, row.activation_fn) == _condition(condition)]
        count = Counter(kinds.get(f"job {row.job_id}", "") for row in members)
        rows.append(
            [
                f"{condition['alpha']:g}, {condition['noise']:g}, {condition['activation_fn']}",
                f"{condition['reached']} of {condition['networks']}",
                condition["final_epoch_median"],
                other_row.get("final_epoch_median"),
                *(count[kind] for kind in found),
            ]
        )
    header = ["alpha, noise, activation", "reached", "epochs, median", "published", *found]
    section.table(header, rows, "Epochs to the stopping loss and kinds of solution, by condition. Kinds were not published as counts.")


def _condition(row: Any) -> tuple[float, float, str]:
    return row["alpha"], row["noise"], row["activation_fn"]


def figure_epochs(ours: Sequence[NetworkResult], theirs: Sequence[NetworkResult]) -> Figure:
    """Cumulative distribution of the epochs to the stopping loss."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for rows, label, tint, style in ((ours, "here", BLUE, "-"), (theirs, "published", ORANGE, "--")):
        final = np.sort([row.final_epoch for row in rows if row.final_epoch is not None])
        if len(final):
            axes.step(final, 100 * np.arange(1, len(final) + 1) / len(rows), where="post", color=tint, linestyle=style, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("networks at the stopping loss (%)")
    axes.set_ylim(0, 105)
    axes.legend(loc="lower right")
    return figure
