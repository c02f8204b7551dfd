"""Dynamics beyond the publication that the kept samples of a result show: how straight trajectories are, and speed against margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rnndyn_fast.analysis.bootstrap import Bootstrap
from rnndyn_fast.analysis.figures import GREY, INK
from rnndyn_fast.analysis.intervals import Estimate
from rnndyn_fast.analysis.motion import speed_against_margin
from rnndyn_fast.analysis.results import MIN_GROUP, ReadoutZoneResult
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page, Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_speed(found: dict[str, np.ndarray]) -> Figure:
    """Rank correlation of change and margin over time."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    t = np.flatnonzero(np.isfinite(found["correlation"]))
    axes.plot(t, found["correlation"][t], color=INK, marker="o", markersize=4)
    axes.fill_between(t, found["low"][t], found["high"][t], color=INK, alpha=0.2, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylim(-1, 1)
    axes.set_xlabel("time step t")
    axes.set_ylabel("rank correlation of change and margin")
    return figure


def motion_section(page: Page, result: ReadoutZoneResult, boot: Bootstrap) -> None:
    """Append straightness, and speed against margin, to a report."""
    found = speed_against_margin(result)
    steps = np.flatnonzero(np.isfinite(found["correlation"]))
    section = page.section("How trajectories move once they are stable")
    straight = boot.estimate("straightness")
    section.table(
        ["measure", "value (95% interval)", "n"],
        [["straightness", straight, straight.n]],
        "Straightness of stable-correct trajectories from their time of stabilisation on, onset of recurrence left out: distance from end "
        "to end over the length of the path (1: straight, 0: back where it began), mean over images.",
    )
    rows: list[list[Cell]] = []
    for t in steps:
        value, low, high = (float(found[name][t]) for name in ("correlation", "low", "high"))
        rows.append([int(t), Estimate(value, low, high, float("nan"), float(found["n"][t]) - 3, int(found["n"][t])), int(found["n"][t])])
    if not rows:
        section.text(f"Speed against margin: no time step after the first has {MIN_GROUP} stable images.")
        return
    section.table(
        ["time step", "rank correlation (95% interval)", "n"],
        rows,
        "Change of the representation in the next step against the margin of the current class, over images that are stable-correct by "
        "then: below zero, what is classified with a wider margin moves less.",
    )
    caption = "Rank correlation, over stable images, of the change in the next step with the margin; band: 95% interval."
    section.plots([Plot(figure_speed(found), caption, "Line of the rank correlation over time; numbers in the table above.")])
