"""The speed-accuracy trade-off as a section of a report, with its tables and figures as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnndyn_fast.analysis.figures import BLUE, GREEN, GREY, ORANGE, STYLE
from rnndyn_fast.analysis.human_times import CEILINGS, ReactionTimeComparison
from rnndyn_fast.analysis.intervals import Estimate
from rnndyn_fast.analysis.outputs import Row, write_csv
from rnndyn_fast.analysis.speed_accuracy import ReactionTimeResult
from rnndyn_fast.file_io import replaced_atomically
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page, Plot, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, RESULT = "report.html", "reaction_times.npz"
# Accuracies, as shares of the best one on the curve, whose thresholds the table names.
SHARES = (0.9, 0.95, 0.98, 0.99, 1.0)


def curve_rows(result: ReactionTimeResult, unreached: str = "last") -> list[Row]:
    """The speed-accuracy curve, a row per threshold."""
    curve = result.curve(unreached)
    return [{name: part[k].item() for name, part in zip(curve._fields, curve, strict=True)} for k in range(len(curve.threshold))]


def step_rows(result: ReactionTimeResult) -> list[Row]:
    """Accuracy (and cost) where every image gets the same number of steps."""
    cost = np.full(result.timesteps, np.nan) if result.cost is None else result.cost
    return [{"t": t, "accuracy": float(result.accuracy[t]), "cost": float(cost[t])} for t in range(result.timesteps)]


def subject_rows(comparison: ReactionTimeComparison) -> list[Row]:
    """Rank correlations, a row per subject."""
    names = ("correlation", "threshold", "ceiling_low", "ceiling_high")
    return [{"subject": j} | {name: float(getattr(comparison, name)[j]) for name in names} for j in range(len(comparison.correlation))]


def figure_speed_accuracy(result: ReactionTimeResult, unreached: str = "last") -> Figure:
    """Accuracy against mean steps taken, or mean multiply-adds where they are known, with fixed numbers of steps beside it."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    curve = result.curve(unreached)
    if result.cost is None:
        x, fixed, label = curve.mean_step + 1, np.arange(result.timesteps) + 1.0, "mean number of steps taken"
    else:
        x, fixed, label = curve.mean_cost / 1e9, result.cost / 1e9, "mean multiply-adds per image (G)"
    order = np.argsort(x)
    axes.plot(x[order], 100 * curve.accuracy[order], color=BLUE, label="entropy threshold")
    axes.fill_between(x[order], 100 * curve.low[order], 100 * curve.high[order], color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(fixed, 100 * result.accuracy, color=ORANGE, linestyle="--", marker="s", markersize=4, label="same steps for all images")
    axes.set_xlabel(label)
    axes.set_ylabel("correct (%)")
    axes.legend()
    return figure


def figure_reaction_times(result: ReactionTimeResult) -> Figure:
    """Distribution of reaction times at thresholds whose means lie near a quarter, half and three quarters of the steps."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    curve = result.curve()
    goals = (result.timesteps - 1) * np.array([0.25, 0.5, 0.75])
    chosen = dict.fromkeys(int(np.abs(curve.mean_step - goal).argmin()) for goal in goals)
    steps = np.arange(result.timesteps)
    for i, k in enumerate(chosen):
        counts = result.counts[k, :-1].copy()
        counts[-1] += result.counts[k, -1]
        label = f"threshold {curve.threshold[k]:.3g} nats"
        axes.plot(steps, 100 * counts / result.n, color=(BLUE, ORANGE, GREEN)[i], marker="os^"[i], markersize=4, label=label)
    axes.set_xlabel("reaction time (step)")
    axes.set_ylabel("images (%)")
    axes.set_xticks(steps if len(steps) <= 12 else steps[:: len(steps) // 8])
    axes.legend()
    return figure


def figure_comparison(comparison: ReactionTimeComparison) -> Figure:
    """Correlation with people at each threshold, the noise ceiling, and the entropy at single steps."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    low, high = comparison.estimate("ceiling_low")[0], comparison.estimate("ceiling_high")[0]
    shown = comparison.thresholds > 0
    left.plot(comparison.thresholds[shown], comparison.by_threshold[shown], color=BLUE, label="reaction times")
    left.set_xscale("log")
    left.set_xlabel("entropy threshold (nats)")
    left.set_ylabel("rank correlation with people")
    right.plot(comparison.by_entropy, color=ORANGE, marker="s", markersize=4, label="entropy at one step")
    right.set_xlabel("step")
    for axes in (left, right):
        axes.axhspan(low, high, color=GREY, alpha=0.35, linewidth=0, label="noise ceiling")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.legend(loc="lower center", fontsize=8)
    return figure


def speed_accuracy_section(
    page: Page, result: ReactionTimeResult, comparison: ReactionTimeComparison | None = None, *, unreached: str = "last"
) -> Section:
    """Append the trade-off, and the comparison with people where there is one, to a report."""
    curve = result.curve(unreached)
    readout = "cumulative" if result.cumulative else "instantaneous"
    section = page.section("Speed and accuracy")
    below = "below" if result.strict else "at most"
    never = f"answer at the last step, t = {result.timesteps - 1}" if unreached == "last" else "do not count"
    section.text(
        f"An image's reaction time is the first step at which the entropy of the network's {readout} class probabilities is {below} a "
        f"threshold; its class at that step is the network's answer. Images that never get there {never}. {result.n:,} images; each "
        "threshold is a point of the curve, bands are 95% intervals."
    )
    best = float(np.nanmax(curve.accuracy))
    matches = [result.matched(unreached, accuracy=share * best) for share in SHARES]
    rows: list[list[Cell]] = [
        [f"{100 * share:g}%", match.threshold, 100 * match.accuracy, match.mean_step + 1, match.mean_cost / 1e9]
        for share, match in zip(SHARES, matches, strict=True)
    ]
    section.table(
        ["share of the best accuracy", "threshold (nats)", "correct (%)", "mean steps", "mean multiply-adds (G)"],
        rows,
        "The fastest threshold that reaches a share of the best accuracy on the curve.",
    )
    section.plots(
        [
            Plot(
                figure_speed_accuracy(result, unreached),
                "Accuracy against what it costs: a threshold gives easy images few steps and hard ones many.",
                "Curve of accuracy against mean cost, with points for fixed numbers of steps.",
            ),
            Plot(figure_reaction_times(result), "Reaction times at three thresholds.", "Shares of images by reaction time."),
        ]
    )
    if comparison is not None:
        _comparison(page, comparison)
    return section


def _comparison(page: Page, comparison: ReactionTimeComparison) -> None:
    section = page.section("Reaction times of people")
    section.text(
        f"Spearman correlation over {comparison.images:,} images of the network's reaction times with those of each of "
        f"{len(comparison.correlation)} subjects, at the threshold that suits the other subjects best. Noise ceiling: each subject against "
        "the mean of the others (lower) and of all (upper)."
    )
    subjects = len(comparison.correlation)
    rows: list[list[Cell]] = []
    for label, name in zip(("network", "noise ceiling, lower", "noise ceiling, upper"), CEILINGS, strict=True):
        value, low, high = comparison.estimate(name)
        rows.append([label, Estimate(value, low, high, float("nan"), subjects - 1.0, subjects), subjects, comparison.images])
    best = int(np.nanargmax(comparison.by_entropy)) if not np.isnan(comparison.by_entropy).all() else 0
    rows.append([f"entropy at the best single step, t = {best}", float(comparison.by_entropy[best]), subjects, comparison.images])
    told = "Rank correlations with people: means over subjects with 95% intervals (t over subjects, by Fisher's transform)."
    section.table(["", "rank correlation", "subjects", "images"], rows, told)
    if np.isfinite(comparison.share_of_ceiling):
        section.text(f"The network reaches {100 * comparison.share_of_ceiling:.0f}% of the lower noise ceiling.")
    section.plots(
        [
            Plot(
                figure_comparison(comparison),
                "Mean over subjects at each threshold (left), and of the entropy at each step (right); grey: noise ceiling.",
                "Rank correlation against threshold, and against step.",
            )
        ]
    )


def write_reaction_times(
    result: ReactionTimeResult,
    out: str | os.PathLike[str],
    comparison: ReactionTimeComparison | None = None,
    *,
    unreached: str = "last",
    title: str = "Reaction times by an entropy threshold",
) -> list[Path]:
    """Write ``reaction_times.npz``, ``speed_accuracy.csv``, ``steps.csv``, figures, ``report.html`` and, with a comparison,
    ``subjects.csv`` to the folder `out`; returns the paths. Files of these names are replaced."""
    require("matplotlib")

    from matplotlib import rc_context

    out = Path(out)
    tables = {"speed_accuracy": curve_rows(result, unreached), "steps": step_rows(result)}
    if comparison is not None:
        tables["subjects"] = subject_rows(comparison)
    paths = [result.save(out / RESULT), *(write_csv(rows, out / f"{name}.csv") for name, rows in tables.items())]
    page = Page(title, f"How accurate the network is when it answers as soon as it is sure enough: {result.n:,} images.")
    with rc_context(STYLE):
        figures = {"speed_accuracy": figure_speed_accuracy(result, unreached), "reaction_times": figure_reaction_times(result)}
        if comparison is not None:
            figures["people"] = figure_comparison(comparison)
        for name, figure in figures.items():
            for suffix in ("png", "svg"):
                with replaced_atomically(out / f"{name}.{suffix}") as temporary:
                    figure.savefig(temporary)
                paths.append(out / f"{name}.{suffix}")
        speed_accuracy_section(page, result, comparison, unreached=unreached)
        paths.append(page.save(out / REPORT))
    return paths
