"""Networks held against each other and against the published numbers: tables and figures with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from rnndyn_fast.optional import require
from rnndyn_fast.study.config import TITLES
from rnndyn_fast.study.published import AVERAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rnndyn_fast.study.run import NetworkRun

Row = dict[str, Any]
COLUMNS = {  # measure -> what it is, and its two columns
    "norm_now_vs_later": ("norm", "already stable", "not yet stable"),
    "cos_current_now_vs_later": ("cosine to current class", "already stable", "not yet stable"),
    "cos_final_vs_other": ("cosine of not-yet-stable samples", "own final class", "others' final classes"),
    "boundary_distance_now_vs_later": ("distance to the zone boundary", "already stable", "not yet stable"),
}


def comparison_rows(runs: Sequence[NetworkRun]) -> list[Row]:
    """Per network and measure: both averages over steps, their difference and effect size, with 95% intervals; published."""
    rows: list[Row] = []
    for run in runs:
        for measure, (what, first, second) in COLUMNS.items():
            boot = run.boot
            average, (low, high) = boot.values[f"{measure}.average"], boot.interval(f"{measure}.average")
            row: Row = {"network": run.title, "measure": what}
            for column, name in enumerate((first, second)):
                row[f"column_{column + 1}"] = name
                row |= {f"value_{column + 1}": float(average[column])}
                row |= {f"low_{column + 1}": float(low[column]), f"high_{column + 1}": float(high[column])}
            for key in ("difference", "effect"):
                known = f"{measure}.{key}" in boot.values
                value, low_, high_ = map(float, boot.estimate(f"{measure}.{key}")) if known else (np.nan,) * 3
                row |= {key: value, f"{key}_low": low_, f"{key}_high": high_}
            published = AVERAGES.get(run.name, {}).get(measure, (np.nan, np.nan))
            row |= {"published_1": published[0], "published_2": published[1]}
            rows.append(row)
    return rows


def verdict_rows(runs: Sequence[NetworkRun]) -> list[Row]:
    """Per network, whether each part of the published claims holds by its bootstrap interval."""
    rows: list[Row] = []
    for run in runs:
        for claim, name, least in (
            ("representations keep changing after stable correct classification (change / norm)", "relative_change_after_stable", 0.01),
            ("not-yet-correct representations have lower norm", "norm_now_vs_later.difference", 0.0),
            ("not-yet-correct representations are more peripheral (cosine to current class)", "cos_current_now_vs_later.difference", 0.0),
            ("they point to their own final class more than others in their zone", "cos_final_vs_other.difference", 0.0),
        ):
            value, low, high = map(float, run.boot.estimate(name))
            verdict = "not decided"
            if np.isfinite([low, high]).all():
                verdict = "holds" if low > least else "does not hold" if high < least else "not decided"
            row = {"network": run.title, "claim": claim, "verdict": verdict, "number": value, "low": low, "high": high, "least": least}
            rows.append(row)
    return rows


def along_rows(runs: Sequence[NetworkRun]) -> list[Row]:
    """Per network and checkpoint along training (epoch 0: untrained): accuracy, groups, change, and the two differences."""
    rows: list[Row] = []
    for run in runs:
        results = {**({0: run.untrained} if run.untrained is not None else {}), **run.along}
        for epoch, result in sorted(results.items()):
            row: Row = {"network": run.title, "epoch": epoch, "n": result.n}
            row |= {"accuracy_first": float(result.accuracy[0]), "accuracy_last": float(result.accuracy[-1])}
            row["stable_correct"] = result.counts["stable_correct"]
            change = result.summary("relative_change_after_stable")
            row |= {"relative_change": float(change.mean), "relative_change_ci95": float(change.ci95)}
            for key in ("norm", "cos_current"):
                now, later = result.published_summary(f"{key}_now_vs_later")
                row[f"{key}_difference"] = float(now - later)
            rows.append(row)
    return rows


def figure_comparison(rows: Sequence[Row]) -> Figure:
    """Both averages of each measure in every network, with bootstrap intervals."""
    require("matplotlib")

    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(7.0, 7.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(2, 2, sharey=True)).ravel()
    for axes, (what, first, second) in zip(panels, COLUMNS.values(), strict=True):
        colours = (GREEN, PURPLE) if "own" in first else (BLUE, ORANGE)
        for y, network in enumerate(networks):
            row = next(row for row in rows if row["network"] == network and row["measure"] == what)
            for k, (colour, marker) in enumerate(zip(colours, "os", strict=True), start=1):
                value = row[f"value_{k}"]
                if np.isfinite(value):
                    low, high = (row[f"{end}_{k}"] if np.isfinite(row[f"{end}_{k}"]) else value for end in ("low", "high"))
                    span = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
                    axes.errorbar(value, y, xerr=span, color=colour, marker=marker, markersize=6, capsize=3, linestyle="none")
        for name, colour, marker in zip((first, second), colours, "os", strict=True):
            axes.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
        axes.set_title(what, loc="left")
        axes.set_yticks(range(len(networks)), [name.replace(", ", ",\n") for name in networks])
        axes.set_ylim(len(networks) - 0.5, -1.4)  # room for the legend
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(axis="y", color=GREY, alpha=0.25)
    return figure


def figure_along(rows: Sequence[Row]) -> Figure:
    """Accuracy, change, and differences of norm and cosine, by epoch."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    names = {
        "accuracy_last": "accuracy at the last step",
        "relative_change": "change / norm after stable",
        "norm_difference": "norm: stable - not yet",
        "cos_current_difference": "cosine: stable - not yet",
    }
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for axes, (key, label) in zip(panels, names.items(), strict=True):
        for network, colour, marker in zip(networks, (BLUE, ORANGE, GREEN, PURPLE), "osD^", strict=False):
            mine = [row for row in rows if row["network"] == network]
            axes.plot([r["epoch"] for r in mine], [r[key] for r in mine], color=colour, marker=marker, markersize=4, label=network)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set_title(label, loc="left")
    for axes in panels[2:]:
        axes.set_xlabel("epoch (0: untrained)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def published_rows() -> list[Row]:
    """The published averages, as `comparison_rows` has ours."""
    return [
        {"network": TITLES[name], "measure": COLUMNS[measure][0], "first": pair[0], "second": pair[1]}
        for name, pairs in AVERAGES.items()
        for measure, pair in pairs.items()
    ]
