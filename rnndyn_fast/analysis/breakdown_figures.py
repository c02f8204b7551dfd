"""Figures of the breakdown by class, by label and prediction, and by time of stabilisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, divide
from rnndyn_fast.analysis.figures import BAND, GREY, GROUP_COLOURS, _line, _new, _time_axis, _title
from rnndyn_fast.analysis.results import MIN_GROUP, ReadoutZoneResult
from rnndyn_fast.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"


def _t_stable_shown(result: ReadoutZoneResult, first: int = 0) -> list[tuple[int, Any]]:
    """Times of stabilisation that have samples and are analysed, each with a colour."""
    require("matplotlib")

    from matplotlib import colormaps

    shown = [s for s in range(first, result.max_t_analysed) if result.counts_t_stable_correct[s] >= MIN_GROUP]
    return list(zip(shown, map(tuple, colormaps["viridis"](np.linspace(0, 0.88, max(len(shown), 1)))), strict=False))


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")


def figure_norm_by_t_stable(result: ReadoutZoneResult) -> Figure:
    """Norm over time, one line per time of stabilisation."""
    figure, (axes,) = _new(width=7.2)
    summary, shown = result.summary("norm_by_t_stable"), _t_stable_shown(result)
    for s, colour in shown:
        label = f"{s} (n = {result.counts_t_stable_correct[s]:,})"
        _line(axes, summary, s, colour, _MARKERS[s % 8], "-", label)
    if shown:
        axes.legend(title="stable from step", fontsize=8, title_fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    else:
        _nothing(axes, f"fewer than {MIN_GROUP} samples")
    axes.set_ylabel("norm (activation units)")
    r = result.norm_t_stable_correlation
    told = f"; correlation of the time of stabilisation with the norm at t = 0: {r:.2f}" if np.isfinite(r) else ""
    _title(axes, "Norm by time of stabilisation", f"stable-correct, n = {result.counts['stable_correct']:,}; {BAND}{told}")
    _time_axis(axes, result.timesteps)
    return figure


def figure_plane(result: ReadoutZoneResult) -> Figure:
    """Mean trajectories in the plane of two readout vectors: the class before stabilisation, and the final one."""
    figure, (axes,) = _new(width=7.2)
    across, along = result.summary("plane_across"), result.summary("plane_along")
    shown = [(s, colour) for s, colour in _t_stable_shown(result, first=1) if min(across.n[s].min(), along.n[s].min()) >= MIN_GROUP]
    for s, colour in shown:
        x, y = across.mean[s], along.mean[s]
        axes.plot(x, y, color=colour, marker=".", label=f"{s} (n = {across.n[s].max():,})")
        axes.plot(x[:1], y[:1], color=colour, marker="o", markerfacecolor="white", markersize=8)
        axes.plot(x[s : s + 1], y[s : s + 1], color=colour, marker="*", markersize=12)
        axes.errorbar(x, y, np.nan_to_num(along.ci95[s]), np.nan_to_num(across.ci95[s]), ecolor=colour, elinewidth=0.6, fmt="none")
    if shown:
        axes.legend(title="stable from step", fontsize=8, title_fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    else:
        _nothing(axes, f"fewer than {MIN_GROUP} samples that changed class")
    axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
    axes.set_xlabel("distance to the boundary (activation units; final class right)")
    axes.set_ylabel("along the boundary (activation units)")
    _title(axes, "Plane of the two readout vectors concerned", "○ t = 0; ★ first stable step; dotted: boundary; bars: 95% interval")
    return figure


def _class_names(result: ReadoutZoneResult) -> list[str]:
    given = result.descriptors.get("class_names")
    if isinstance(given, list) and len(given) == result.num_classes:
        return [str(name) for name in given]
    return [str(c) for c in range(result.num_classes)]


def figure_classes(result: ReadoutZoneResult) -> Figure:
    """Shares of the four groups in every class."""
    classes = result.num_classes
    figure, (axes,) = _new(height=max(2.6, 0.27 * min(classes, 100) + 1.5))
    counts = result.sums.class_groups
    share = 100 * np.nan_to_num(divide(counts, counts.sum(1, keepdims=True)))
    order = np.argsort(-share[:, 0], kind="stable")
    left = np.zeros(classes)
    for column, (group, colour) in enumerate(GROUP_COLOURS.items()):
        hatch = ("", "///", "", "...")[column]
        axes.barh(np.arange(classes), share[order, column], left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        axes.plot([], [], color=colour, linewidth=6, label=group.replace("_", "-"))
        left += share[order, column]
    names = _class_names(result)
    axes.set_yticks(range(classes), [names[c] for c in order], fontsize=9 if classes <= 30 else 5)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("trajectories (%)")
    figure.legend(*axes.get_legend_handles_labels(), ncols=2, fontsize=8, loc="outside lower center")
    _title(axes, "Groups of trajectories by class", f"n = {result.n:,}, {classes} classes")
    return figure


def figure_confusion(result: ReadoutZoneResult) -> Figure:
    """Predicted class by label, at the first and the last step."""
    steps = sorted({0, result.timesteps - 1})
    figure, all_axes = _new(1, len(steps), width=4.4 * len(steps) + 0.8, height=4.6)
    names = _class_names(result)
    image = None
    for axes, t in zip(all_axes, steps, strict=True):
        counts = result.sums.confusion[t]
        image = axes.imshow(100 * divide(counts, counts.sum(1, keepdims=True)), cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xlabel(f"predicted at t = {t}")
        if result.num_classes <= 30:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel("label")
    assert image is not None
    figure.colorbar(image, ax=all_axes, label="% of the label", shrink=0.8)
    return figure


def confusion_changes(result: ReadoutZoneResult, most: int = 12) -> list[tuple[str, str, int, int]]:
    """Confusions (label, predicted, samples at the first and at the last step) whose number changes most over time."""
    first, last = result.sums.confusion[0].copy(), result.sums.confusion[-1].copy()
    names = _class_names(result)
    difference = np.abs(last - first)
    np.fill_diagonal(difference, 0)
    order = np.argsort(-difference, axis=None, kind="stable")[:most]
    pairs = [divmod(int(cell), result.num_classes) for cell in order]
    return [(names[a], names[p], int(first[a, p]), int(last[a, p])) for a, p in pairs if difference[a, p] > 0]


def class_rows(result: ReadoutZoneResult) -> list[dict[str, object]]:
    """One row per class: n, accuracy at the first and last step, groups, time to stability, norm, boundary distance."""
    correct = np.stack([np.diagonal(table) for table in result.sums.confusion])  # [T, C]
    n = result.sums.class_groups.sum(1)
    accuracy = divide(correct, np.broadcast_to(n, correct.shape))
    means = {name: result.summary(f"class_{name}") for name in ("t_stable", "norm", "boundary_distance")}
    rows: list[dict[str, object]] = []
    for c, name in enumerate(_class_names(result)):
        row: dict[str, object] = {"class": name, "n": int(n[c])}
        row |= {"accuracy_first": float(accuracy[0, c]), "accuracy_last": float(accuracy[-1, c])}
        row |= {group: int(result.sums.class_groups[c, k]) for k, group in enumerate(GROUPS)}
        for measure, summary in means.items():
            row |= {f"{measure}_mean": float(summary.mean[c]), f"{measure}_ci95": float(summary.ci95[c])}
        rows.append(row)
    return rows
