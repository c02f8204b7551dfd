"""Figures of a readout-zone analysis; drawn without a display."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, Summary
from rnndyn_fast.analysis.results import MIN_GROUP, ReadoutZoneResult
from rnndyn_fast.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers and line styles repeat the distinction.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
AMBER, SKY, INK = "#E69F00", "#56B4E9", "#333333"
# A colour means one thing in all figures of a report.
STABLE, NOT_YET, OWN, OTHERS = BLUE, ORANGE, GREEN, PURPLE
GROUP_COLOURS = dict(zip(GROUPS, (BLUE, AMBER, SKY, GREY), strict=True))  # stable-correct samples are those that are stable elsewhere
NETWORKS = (("#332288", "o"), ("#882255", "s"), ("#117733", "D"), ("#999933", "^"))  # Tol's muted colours, and markers
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "rnndyn_fast",  # the same result makes the same file
}
BAND = "band: 95% interval"


def _new(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel())


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", pad=20)
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8.5, color="#555555", va="bottom")


def _time_axis(axes: Axes, steps: int, label: str = "time step t") -> None:
    axes.set_xlabel(label)
    axes.set_xticks(range(0, steps, max(1, (steps + 9) // 10)))
    axes.set_xlim(-0.4, steps - 0.6)


def _line(axes: Axes, summary: Summary, index: Any, colour: str, marker: str, style: str, label: str) -> None:
    """A mean over time with its interval, where it rests on MIN_GROUP samples; else nothing is drawn."""
    mean, _, count, half = (np.asarray(part[index]) for part in summary)
    shown = count >= MIN_GROUP
    if not shown.any():
        return
    t = np.arange(len(mean))[shown]
    axes.plot(t, mean[shown], color=colour, marker=marker, linestyle=style, markersize=5, label=label)
    band = np.nan_to_num(half[shown])
    axes.fill_between(t, mean[shown] - band, mean[shown] + band, color=colour, alpha=0.2, linewidth=0)


def _shade_beyond(axes: Axes, result: ReadoutZoneResult) -> str:
    """Grey out the steps that the published analysis leaves out, and say so."""
    if result.max_t_analysed >= result.timesteps:
        return ""
    axes.axvspan(result.max_t_analysed - 0.5, result.timesteps - 0.5, color="#000000", alpha=0.05, linewidth=0)
    return "; grey: steps that few late samples reach (under 1%)"


def _legend(axes: Axes) -> None:
    """The lines that there are, or that there are none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8.5)
    else:
        axes.text(0.5, 0.5, f"fewer than {MIN_GROUP} samples", transform=axes.transAxes, ha="center")


def _range_text(count: np.ndarray) -> str:
    return f"{count.max():,}" if count.min() == count.max() else f"{count.min():,} to {count.max():,}"


def figure_accuracy(result: ReadoutZoneResult) -> Figure:
    """Accuracy over time."""
    figure, (axes,) = _new()
    summary = result.summary("accuracy")
    _line(
        axes,
        Summary(*(100 * p if p.dtype.kind == "f" else p for p in summary)),
        slice(None),
        INK,
        "o",
        "-",
        "accuracy",
    )
    axes.axhline(100 / result.num_classes, color=GREY, linestyle=":", linewidth=1)
    axes.text(
        result.timesteps - 0.65,
        100 / result.num_classes,
        "chance",
        color="#666666",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    best = int(np.argmax(np.nan_to_num(summary.mean)))
    _title(axes, "Accuracy over time", f"n = {result.n:,}; best {100 * summary.mean[best]:.1f}% at t = {best}; {BAND}")
    axes.set_ylabel("correct (%)")
    axes.set_ylim(bottom=0)
    _time_axis(axes, result.timesteps)
    return figure


def figure_groups(result: ReadoutZoneResult) -> Figure:
    """Trajectories per group."""
    figure, (axes,) = _new(height=3.0)
    n = max(result.n, 1)
    names = [name.replace("_", "-") for name in GROUPS]
    percent = np.array([100 * result.counts[name] / n for name in GROUPS])
    half = 196 * np.sqrt(percent / 100 * (1 - percent / 100) / n)
    axes.barh(names, percent, xerr=half, color=list(GROUP_COLOURS.values()), error_kw={"ecolor": "#333333", "capsize": 3})
    for row, (group, value, error) in enumerate(zip(GROUPS, percent, half, strict=True)):
        axes.text(value + error + 1, row, f"{result.counts[group]:,} ({value:.1f}%)", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(percent.max() * 1.35, 1))
    axes.set_xlabel("trajectories (%)")
    _title(axes, "Groups of trajectories", f"n = {result.n:,}; whiskers: 95% interval")
    return figure


def figure_counts(result: ReadoutZoneResult) -> Figure:
    """Stable trajectories per time of stabilisation."""
    figure, (axes,) = _new(width=max(6.4, 0.75 * result.timesteps))
    for shift, (name, counts) in enumerate(
        (("stable_correct", result.counts_t_stable_correct), ("stable_incorrect", result.counts_t_stable_incorrect))
    ):
        x = np.arange(result.timesteps) + 0.4 * shift - 0.2
        bars = axes.bar(
            x,
            counts,
            0.38,
            color=GROUP_COLOURS[name],
            hatch=("", "///")[shift],
            edgecolor="white",
            linewidth=0,
            label=f"{name.replace('_', '-')} (n = {counts.sum():,})",
        )
        axes.bar_label(bars, [f"{c:,}" if c else "" for c in counts], fontsize=7, padding=1, rotation=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(10.0, 12.0 * max(result.counts_t_stable_correct.max(), result.counts_t_stable_incorrect.max())))
    axes.set_ylabel("samples (log scale)")
    axes.legend(loc="upper center", ncols=2)
    _title(axes, "Samples per time of stabilisation", f"n = {result.n:,} trajectories in all")
    _time_axis(axes, result.timesteps, "time step of stabilisation")
    axes.set_xlim(-0.6, result.timesteps - 0.4)
    return figure


def figure_representation_change(result: ReadoutZoneResult, untrained: ReadoutZoneResult | None = None) -> Figure:
    """Representation change per time of stabilisation, of the network and, where given, of the untrained one."""
    require("matplotlib")

    from matplotlib import colormaps

    panels = [("trained" if untrained is not None else "", result)] + ([] if untrained is None else [("untrained", untrained)])
    figure, all_axes = _new(1, len(panels), width=4.6 * len(panels) + 1.8)
    for axes, (name, one) in zip(all_axes, panels, strict=True):
        summary = one.summary("representation_change_by_t_stable")
        shown = [s for s in range(one.max_t_analysed) if one.counts_t_stable_correct[s] >= MIN_GROUP]
        colours = colormaps["viridis"](np.linspace(0, 0.88, max(len(shown), 1)))
        for colour, s in zip(colours, shown, strict=False):
            label = f"{s} (n = {one.counts_t_stable_correct[s]:,})"
            _line(axes, summary, s, colour, "osD^vPX*"[s % 8], "-", label)
        n = int(one.counts_t_stable_correct[shown].sum())
        title = f"Representation change{', ' + name if name else ''}"
        _title(axes, title, f"stable-correct, n = {n:,}; {BAND}")
        _time_axis(axes, max(one.timesteps - 1, 1), "transition t → t + 1")
        if shown and one.timesteps > 1:
            axes.legend(title="stable from step", fontsize=8, title_fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.02))
        else:
            axes.text(0.5, 0.5, f"fewer than {MIN_GROUP} samples", transform=axes.transAxes, ha="center")
    all_axes[0].set_ylabel("change per step (activation units)")
    if all(len(axes.lines) for axes in all_axes):
        all_axes[0].set_ylim(bottom=0)
    return figure


def _now_vs_later(result: ReadoutZoneResult, measure: str, title: str, label: str) -> Figure:
    figure, (axes,) = _new()
    summary = result.summary(measure)
    names = ("already stable", "not yet stable")
    for column, (name, colour, marker, style) in enumerate(zip(names, (STABLE, NOT_YET), "os", ("-", "--"), strict=True)):
        count = summary.n[:, column]
        _line(axes, summary, (slice(None), column), colour, marker, style, f"{name}, n = {_range_text(count)}")
    grey = _shade_beyond(axes, result)
    axes.set_ylabel(label)
    _legend(axes)
    _title(axes, title, f"stable-correct, n = {result.counts['stable_correct']:,}; {BAND}{grey}")
    _time_axis(axes, result.timesteps)
    return figure


def figure_norm(result: ReadoutZoneResult) -> Figure:
    """Norm of samples already stable and not yet."""
    return _now_vs_later(result, "norm_now_vs_later", "Norm of representations", "norm (activation units)")


def figure_cos_current(result: ReadoutZoneResult) -> Figure:
    """Cosine to the readout vector of the current class, samples already stable and not yet."""
    title = "Alignment with the readout vector of the current class"
    return _now_vs_later(result, "cos_current_now_vs_later", title, "cosine to readout vector")


def figure_margin(result: ReadoutZoneResult) -> Figure:
    """Logit margin of samples already stable and not yet."""
    return _now_vs_later(result, "margin_now_vs_later", "Logit margin", "margin to next class (logits)")


def figure_boundary_distance(result: ReadoutZoneResult) -> Figure:
    """Distance to the nearest zone boundary of samples already stable and not yet."""
    return _now_vs_later(
        result, "boundary_distance_now_vs_later", "Distance to the edge of the readout zone", "distance (activation units)"
    )


def figure_cos_final(result: ReadoutZoneResult) -> Figure:
    """Not-yet-stable samples: cosine to the own final class and to those of others in the same zone."""
    figure, (axes,) = _new()
    summary = result.summary("cos_final_vs_other")
    names = (
        f"own final class, n = {_range_text(summary.n[:, 0])} samples",
        f"others' final classes, n = {_range_text(summary.n[:, 1])} pairs",
    )
    for column, (name, colour, marker, style) in enumerate(zip(names, (OWN, OTHERS), "os", ("-", "--"), strict=True)):
        _line(axes, summary, (slice(None), column), colour, marker, style, name)
    grey = _shade_beyond(axes, result)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("cosine to readout vector")
    _legend(axes)
    _title(axes, "Not yet stable: drawn to the own final class", f"{BAND} (pairs: on the wide side){grey}")
    _time_axis(axes, result.timesteps)
    return figure


def readout_tree(result: ReadoutZoneResult) -> np.ndarray:  # -> [C - 1, 4]
    """Ward linkage of the readout vectors under (1 - cosine) / 2, as SciPy writes it."""
    require("scipy")

    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if result.num_classes < 2:
        return np.zeros((0, 4))
    norm = np.linalg.norm(result.readout_weight, axis=1, keepdims=True)
    unit = result.readout_weight / np.where(norm == 0, 1.0, norm)
    distance = np.clip((1 - unit @ unit.T) / 2, 0, 1)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), "ward")


def figure_dendrogram(result: ReadoutZoneResult) -> Figure:
    """Ward dendrogram of the readout vectors under (1 - cosine) / 2."""
    require("scipy")

    from scipy.cluster.hierarchy import dendrogram

    classes = result.num_classes
    figure, (axes,) = _new(width=max(6.4, 0.14 * classes + 2), height=4.4)
    _title(
        axes,
        "Similarity of readout vectors",
        f"{classes} class{'' if classes == 1 else 'es'}; Ward linkage under (1 - cosine) / 2",
    )
    axes.set_ylabel("linkage distance (1 - cosine) / 2")
    if classes < 2:
        axes.text(0.5, 0.5, "one class", transform=axes.transAxes, ha="center")
        return figure
    given = result.descriptors.get("class_names")
    names = [str(name) for name in given] if isinstance(given, list) and len(given) == classes else [str(c) for c in range(classes)]
    size = 9.0 if classes <= 30 else 6.0
    dendrogram(
        readout_tree(result),
        ax=axes,
        labels=names,
        color_threshold=0,
        above_threshold_color=BLUE,
        leaf_rotation=90,
        leaf_font_size=size,
    )
    return figure
