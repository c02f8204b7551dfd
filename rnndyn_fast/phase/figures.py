"""Figures of phase analyses, drawn without a display."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from rnndyn_fast.optional import require
from rnndyn_fast.phase.analysis import PhaseAnalysis
from rnndyn_fast.phase.automaton import UNKNOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours and line styles of symbols and sums, in this order.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8C564B")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PI_TICKS = {-np.pi: "-π", -np.pi / 2: "-π/2", 0.0: "0", np.pi / 2: "π/2", np.pi: "π"}


def colour(k: int) -> str:
    """Of a symbol or a sum."""
    return COLOURS[k % len(COLOURS)]


def _new(width: float = 5.0, height: float = 4.0) -> tuple[Figure, Axes]:
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _pi_axis(axes: Axes, which: str, span: tuple[float, float] = (-np.pi, np.pi)) -> None:
    ticks = [tick for tick in PI_TICKS if span[0] - 0.1 <= tick <= span[1] + 0.1]
    getattr(axes, f"set_{which}ticks")(ticks, [PI_TICKS[tick] for tick in ticks])


def figure_symbols(record: PhaseAnalysis) -> Figure:
    """What one pulse of each symbol does: PC1-PC2 from the pulse on, over the undisturbed run and the points that stand still."""
    figure, axes = _new()
    null, runs = record.arrays["null.pc"], record.arrays["symbol.pc"]
    onset = int(record.arrays["symbol.onset"])
    settled = null[len(null) // 4 :]
    axes.plot(settled[:, 0], settled[:, 1], color=GREY, linewidth=0.8, label="undisturbed")
    for k, run in enumerate(runs[1:]):
        path = run[onset - 1 :]
        axes.plot(path[:, 0], path[:, 1], color=colour(k), linestyle=STYLES[k % 4], linewidth=1.5, label=f"symbol {k}")
        axes.plot(*path[-1, :2], color=colour(k), marker=MARKERS[k % 8], markersize=7)
    axes.plot(*runs[0, onset - 1, :2], color="black", marker="*", markersize=10, linestyle="none", label="pulse comes")
    points, stable = record.arrays["fixed_points.pc"], record.arrays["fixed_points.unstable_dims"] == 0
    for mask, fill, label in ((stable, "black", "stable point"), (~stable, "white", "unstable or slow point")):
        shown = mask & record.arrays["fixed_points.fixed"] if fill == "black" else ~(stable & record.arrays["fixed_points.fixed"])
        if shown.any():
            axes.plot(*points[shown, :2].T, "o", color="black", markerfacecolor=fill, markersize=5, label=label)
    _plane(axes)
    # Right of the axes, where it hides nothing.
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, fontsize=8, handlelength=1.8, columnspacing=1.0)
    return figure


def figure_ends(record: PhaseAnalysis) -> Figure:
    """Where trials are at the last step: colour and marker are the sum, filled if accepted."""
    figure, axes = _new()
    ends, sums, outputs = (record.arrays[f"trials.end_{name}"] for name in ("pc", "sums", "outputs"))
    null = record.arrays["null.pc"]
    settled = null[len(null) // 4 :]
    axes.plot(settled[:, 0], settled[:, 1], color=GREY, linewidth=0.6, alpha=0.7)
    for k in range(int(record.facts["modulus"])):
        for accepted in (True, False):
            shown = (sums == k) & ((outputs > 0) == accepted)
            face = colour(k) if accepted else "none"
            axes.scatter(ends[shown, 0], ends[shown, 1], s=14, marker=MARKERS[k % 8], facecolors=face, edgecolors=colour(k), linewidths=0.8)
        axes.plot([], [], MARKERS[k % 8], color=colour(k), markersize=5, label=f"sum {k}")
    _plane(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, fontsize=8)
    return figure


def _plane(axes: Axes) -> None:
    axes.set_xlabel("PC1")
    axes.set_ylabel("PC2")
    axes.set_aspect("equal", adjustable="datalim")


def figure_phase_time(record: PhaseAnalysis) -> Figure:
    """Phase relative to the undisturbed run over the steps of a trial, colour by sum; without a cycle the outputs."""
    figure, axes = _new()
    sums = record.arrays["trials.sequences"].sum(1) % int(record.facts["modulus"])
    steps = np.arange(1, record.arrays["trials.outputs"].shape[1] + 1)
    if "trials.asymptotic_phase" in record.arrays:
        turn = float(record.facts["cycle.turn"])
        relative = record.arrays["trials.asymptotic_phase"] - steps * turn
        # Around the circle so that the levels of the sums are not cut by its end.
        values = (relative + np.pi / 2) % (2 * np.pi) - np.pi / 2
        values = np.where(np.abs(np.diff(values, axis=1, prepend=values[:, :1])) > np.pi, np.nan, values)
        axes.set_ylabel("phase relative to the undisturbed run (rad)")
        axes.set_yticks(np.pi * np.arange(-1, 4) / 2, ["-π/2", "0", "π/2", "π", "3π/2"])
        modulus = int(record.facts["modulus"])
        for k in range(modulus):
            axes.axhline((2 * np.pi * k / modulus + np.pi / 2) % (2 * np.pi) - np.pi / 2, color=GREY, linewidth=0.7, linestyle=":")
    else:
        values = record.arrays["trials.outputs"]
        axes.set_ylabel("output")
    for k, path in zip(sums, values, strict=True):
        axes.plot(steps, path, color=colour(int(k)), linewidth=0.9, alpha=0.75)
    for k in np.unique(sums):
        axes.plot([], [], color=colour(int(k)), label=f"sum {k}")
    axes.set_xlabel("time step")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, fontsize=8)
    return figure


def figure_response(record: PhaseAnalysis) -> Figure:
    """Phase response curves: published definition with its band, asymptotic phase, and the ideal shift."""
    figure, axes = _new()
    modulus = int(record.facts["modulus"])
    if "response.shift" in record.arrays:
        shift, phase = record.arrays["response.shift"], record.arrays["response.pulse_phase"]
        order = phase.argsort()
        for k in range(modulus):
            curve, band = shift[k].mean(1)[order], shift[k].std(1)[order]
            axes.plot(phase[order], curve, MARKERS[k % 8], color=colour(k), markersize=3.5, label=f"symbol {k}, published phase")
            axes.fill_between(phase[order], curve - band, curve + band, color=colour(k), alpha=0.13, linewidth=0)
    if "asymptotic.shift" in record.arrays:
        shift, phase = record.arrays["asymptotic.shift"], record.arrays["asymptotic.pulse_phase"]
        phase = (phase + np.pi) % (2 * np.pi) - np.pi
        order = phase.argsort()
        for k in range(modulus):
            label = f"symbol {k}, asymptotic phase"
            axes.plot(phase[order], shift[k, order, 0], color=colour(k), linestyle=STYLES[k % 4], linewidth=1.5, label=label)
    for k in range(modulus):
        axes.axhline((2 * np.pi * k / modulus + np.pi) % (2 * np.pi) - np.pi, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_xlabel("phase when the pulse comes (rad)")
    axes.set_ylabel("phase shift (rad)")
    axes.set_ylim(-np.pi - 0.15, np.pi + 0.15)
    _pi_axis(axes, "x")
    _pi_axis(axes, "y")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, fontsize=8)
    return figure


def figure_prediction(record: PhaseAnalysis) -> Figure:
    """Sums of the shifts per symbol for every multiset of three, on the circle."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0, 4.0), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    phases, residues = record.arrays["prediction.phases"], record.arrays["prediction.residues"]
    for k in np.unique(residues):
        shown = phases[residues == k]
        axes.plot(shown, np.ones_like(shown), MARKERS[int(k) % 8], color=colour(int(k)), markersize=8, alpha=0.8, label=f"sum {k}")
    axes.set_ylim(0, 1.25)
    axes.set_yticks([])
    axes.set_xticks(np.pi * np.arange(4) / 2, ["0", "π/2", "π", "3π/2"])
    axes.grid(False)
    axes.legend(loc="center", fontsize=9)
    return figure


def figure_automaton(transitions: np.ndarray, accept: np.ndarray, start: int, support: np.ndarray | None = None) -> Figure:
    """An automaton as a graph: a double ring accepts, a dashed one gives no answer, an arrow per symbol, the start marked.

    Up to twelve states stand on a circle; more are laid out by networkx.
    """
    require("networkx")

    import networkx

    states = len(transitions)
    size = 4.2 if states <= 12 else 6.4
    figure, axes = _new(size, size)
    graph = networkx.MultiDiGraph()
    graph.add_nodes_from(range(states))
    for state, symbol in itertools.product(range(states), range(transitions.shape[1])):
        if transitions[state, symbol] != UNKNOWN:
            graph.add_edge(state, int(transitions[state, symbol]), symbol=symbol)
    if states <= 12:
        angles = np.pi / 2 - 2 * np.pi * np.arange(states) / states
        place = {k: np.array([np.cos(a), np.sin(a)]) for k, a in enumerate(angles)}
    else:
        place = networkx.kamada_kawai_layout(networkx.Graph(graph), scale=1.15)
    radius = min(0.2, 0.9 / max(states, 2))
    for source, target, data in graph.edges(data=True):
        _arrow(axes, place[source], place[target], radius, data["symbol"])
    for state, centre in place.items():
        _ring(axes, centre, radius, int(accept[state]))
        axes.text(centre[0], centre[1], str(state), ha="center", va="center", fontsize=11 if states <= 12 else 8)
    outward = place[start] / max(float(np.hypot(*place[start])), 1e-9)
    axes.annotate(
        "start",
        xy=tuple(place[start] + outward * radius * 1.2),
        xytext=tuple(place[start] + outward * (radius + 0.42)),
        ha="center",
        va="center",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": "black"},
    )
    for k in range(transitions.shape[1]):
        axes.plot([], [], color=colour(k), linestyle=STYLES[k % 4], label=f"symbol {k}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=8)
    points = np.stack(list(place.values()))
    reach = max(1.55, float(np.abs(points).max()) + 0.5)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def _ring(axes: Axes, centre: np.ndarray, radius: float, accept: int) -> None:
    require("matplotlib")

    from matplotlib.patches import Circle

    style = "--" if accept == 0 else "-"
    axes.add_patch(Circle((centre[0], centre[1]), radius, facecolor="white", edgecolor="black", linestyle=style, linewidth=1.2, zorder=3))
    if accept == 1:
        axes.add_patch(Circle((centre[0], centre[1]), 0.82 * radius, fill=False, edgecolor="black", linewidth=1.0, zorder=3))


def _arrow(axes: Axes, source: np.ndarray, target: np.ndarray, radius: float, symbol: int) -> None:
    require("matplotlib")

    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "color": colour(symbol), "zorder": 2}
    style |= {"linewidth": 1.6, "linestyle": STYLES[symbol % 4]}
    if np.allclose(source, target):
        # Loops of several symbols at one state are nested, beside the way that "start" takes.
        heading = np.arctan2(source[1], source[0]) - 0.9
        spread, reach = 0.45 + 0.12 * symbol, radius * (3.2 + 1.1 * symbol)
        rim = [source + radius * np.array([np.cos(heading + s), np.sin(heading + s)]) for s in (spread, -spread)]
        far = [source + reach * np.array([np.cos(heading + s), np.sin(heading + s)]) for s in (spread, -spread)]
        path = Path([rim[0], far[0], far[1], rim[1]], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        axes.add_patch(FancyArrowPatch(path=path, **style))
        return
    # Symbols between the same two states run side by side: each has its own bend. Ends lie on the rings.
    way = target - source
    bend = (source + target) / 2 + (0.14 + 0.16 * (symbol % 4)) * np.array([way[1], -way[0]])
    ends = [one + radius * (bend - one) / np.hypot(*(bend - one)) for one in (source, target)]
    path = Path([ends[0], bend, ends[1]], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    axes.add_patch(FancyArrowPatch(path=path, **style))


def figure_agreement(record: PhaseAnalysis) -> Figure:
    """Answers against the length of the sequence: network and rule, automaton and rule, automaton and network."""
    figure, axes = _new(5.0, 3.4)
    rows = record.facts["agreement"]
    lengths = [row["length"] for row in rows]
    at = np.arange(len(lengths))
    for name, label, tint, style, marker in (
        ("network_rule", "network and rule", BLUE, "-", "o"),
        ("automaton_rule", "automaton and rule", ORANGE, "--", "s"),
        ("automaton_network", "automaton and network", GREEN, ":", "^"),
    ):
        values = [100 * row[name] for row in rows]
        axes.plot(at, values, color=tint, linestyle=style, marker=marker, markersize=5, label=label)
    # Untrained lengths are evenly spaced, though they jump: the short ones matter most.
    axes.set_xticks(at, [str(length) for length in lengths])
    axes.set_xlabel("symbols in the sequence")
    axes.set_ylabel("same answer (%)")
    axes.set_ylim(0, 105)
    axes.legend(loc="lower left", fontsize=8)
    return figure


def figure_eigenvalues(record: PhaseAnalysis) -> Figure:
    """Eigenvalues of the Jacobian at fixed and slow points in the complex plane, with the unit circle."""
    figure, axes = _new(4.2, 4.2)
    circle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(circle), np.sin(circle), color=GREY, linewidth=0.8)
    values, fixed = record.arrays["fixed_points.eigenvalues"], record.arrays["fixed_points.fixed"]
    for mask, tint, marker, label in ((fixed, BLUE, "o", "fixed points"), (~fixed, ORANGE, "^", "slow points")):
        if mask.any():
            shown = values[mask].ravel()
            axes.plot(shown.real, shown.imag, marker, color=tint, markersize=3, alpha=0.6, label=label)
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, fontsize=8)
    return figure


def figure_solution_map(places: np.ndarray, names: Sequence[str], kinds: Sequence[str], labelled: Sequence[int] = ()) -> Figure:
    """Networks in the plane of their dynamical similarity; colour and marker are the kind of solution."""
    figure, axes = _new(6.4, 5.0)
    for k, kind in enumerate(sorted(set(kinds))):
        shown = np.array([one == kind for one in kinds])
        label = f"{kind} ({int(shown.sum())})"
        axes.plot(*places[shown].T, MARKERS[k % 8], color=colour(k), markersize=6, alpha=0.85, linestyle="none", label=label)
    for index in labelled:
        axes.annotate(names[index], places[index], xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("dimension 1 (rad)")
    axes.set_ylabel("dimension 2 (rad)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3, fontsize=8)
    return figure
