"""Kinds of networks held against each other: tables and figures with their intervals; and the published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.analysis.bootstrap import Bootstrap, bootstrap, pool
from rnndyn_fast.analysis.figures import GREY, NETWORKS, NOT_YET, OTHERS, OWN, STABLE
from rnndyn_fast.analysis.intervals import UNKNOWN, Estimate
from rnndyn_fast.analysis.outputs import spread
from rnndyn_fast.optional import require
from rnndyn_fast.study.config import TITLES
from rnndyn_fast.study.published import AVERAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rnndyn_fast.study.record import NetworkRun

Row = dict[str, Any]
COLUMNS = {  # measure -> what it is, its unit, and its two columns
    "norm_now_vs_later": ("norm", "activation units", "already stable", "not yet stable"),
    "cos_current_now_vs_later": ("cosine to current class", "cosine", "already stable", "not yet stable"),
    "cos_final_vs_other": ("cosine of not-yet-stable samples", "cosine", "own final class", "others' final classes"),
    "boundary_distance_now_vs_later": ("distance to the zone boundary", "activation units", "already stable", "not yet stable"),
}


def comparison_rows(boots: Mapping[str, Bootstrap]) -> list[dict[str, Any]]:
    """Per kind of network and measure: both averages over steps, their difference and effect size (estimates, or None)."""
    rows: list[Row] = []
    for kind, boot in boots.items():
        for measure, (what, unit, first, second) in COLUMNS.items():
            row: Row = {"network": kind, "measure": what, "unit": unit, "column_1": first, "column_2": second}
            row |= {f"value_{k + 1}": boot.estimate(f"{measure}.average", k) for k in range(2)}
            for key in ("difference", "effect"):
                row[key] = boot.estimate(f"{measure}.{key}") if f"{measure}.{key}" in boot.values else None
            rows.append(row)
    return rows


def flat(rows: Sequence[Row]) -> list[Row]:
    """Rows in which estimates have become columns, for CSV files."""
    out = []
    for row in rows:
        plain: Row = {}
        for name, value in row.items():
            of_kind = isinstance(value, Estimate) or value is None
            plain |= spread(f"{name}_", value or UNKNOWN) if of_kind else {name: value}
        out.append(plain)
    return out


def along_rows(kinds: Mapping[str, Sequence[NetworkRun]], replicates: int, seed: int) -> list[Row]:
    """Per kind and checkpoint along training (epoch 0: untrained): accuracy, groups, change, and the two differences, over its networks.

    Epochs that not every network of a kind has are left out, but for the last: the best checkpoint of each, in the row of the latest.
    """
    rows: list[Row] = []
    for kind, runs in kinds.items():
        best = max(max(run.along) for run in runs)
        epochs: dict[int, list[tuple[ReadoutZoneResult, Bootstrap | None]]] = {best: [(run.trained, run.boot) for run in runs]}
        for epoch in {0, *(e for run in runs for e in run.along)} - {best}:
            found = [run.untrained if epoch == 0 else run.along.get(epoch) for run in runs]
            if all(result is not None and result is not run.trained for result, run in zip(found, runs, strict=True)):
                epochs[epoch] = [(result, None) for result in found if result is not None]
        for epoch, results in sorted(epochs.items()):
            boots = [known or bootstrap(one, replicates, seed=seed, pairs=False) for one, known in results]
            boot = pool(boots)
            row: Row = {"network": kind, "epoch": epoch, "networks": len(results), "n": results[0][0].n}
            row |= {"accuracy_first": boot.estimate("accuracy", 0), "accuracy_last": boot.estimate("accuracy", -1)}
            row["stable_correct"] = boot.estimate("groups", 0)
            row |= {"change_last": boot.estimate("change_last")}
            row |= {f"{key}_difference": boot.estimate(f"{key}_now_vs_later.difference") for key in ("norm", "cos_current")}
            rows.append(row)
    return rows


def figure_comparison(rows: Sequence[Row]) -> Figure:
    """Both averages of each measure in every kind of network, with their intervals."""
    require("matplotlib")
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(7.0, 7.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(2, 2, sharey=True)).ravel()
    for axes, (what, unit, first, second) in zip(panels, COLUMNS.values(), strict=True):
        colours = (OWN, OTHERS) if "own" in first else (STABLE, NOT_YET)
        for y, network in enumerate(networks):
            row = next(row for row in rows if row["network"] == network and row["measure"] == what)
            for k, (colour, marker) in enumerate(zip(colours, "os", strict=True), start=1):
                estimate = row[f"value_{k}"]
                if estimate.known:
                    span = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                    axes.errorbar(estimate.value, y, xerr=span, color=colour, marker=marker, markersize=6, capsize=3, linestyle="none")
        for name, colour, marker in zip((first, second), colours, "os", strict=True):
            axes.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
        axes.set_title(what, loc="left")
        axes.set_xlabel(unit)
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
        "accuracy_last": ("accuracy at the last step", "share correct"),
        "change_last": ("change in the last step", "share of the norm"),
        "norm_difference": ("norm: stable - not yet", "activation units"),
        "cos_current_difference": ("cosine: stable - not yet", "cosine"),
    }
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for axes, (key, (label, unit)) in zip(panels, names.items(), strict=True):
        for network, (colour, marker) in zip(networks, NETWORKS, strict=False):
            mine = [row for row in rows if row["network"] == network and row[key].known]
            if mine:
                values = np.array([[row[key].value, row[key].low, row[key].high] for row in mine])
                span = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
                epochs = [row["epoch"] for row in mine]
                axes.errorbar(epochs, values[:, 0], yerr=span, color=colour, marker=marker, markersize=4, capsize=2)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set_title(label, loc="left")
        axes.set_ylabel(unit)
    for network, (colour, marker) in zip(networks, NETWORKS, strict=False):
        panels[0].plot([], [], color=colour, marker=marker, label=network)
    for axes in panels[2:]:
        axes.set_xlabel("epoch (0: untrained)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def published_rows() -> list[Row]:
    """The published averages, with the digits that were printed."""
    return [
        {
            "network": TITLES[name],
            "measure": COLUMNS[measure][0],
            "columns": " / ".join(COLUMNS[measure][2:]),
            "first": pair[0],
            "second": pair[1],
        }
        for name, pairs in AVERAGES.items()
        for measure, pair in pairs.items()
    ]
