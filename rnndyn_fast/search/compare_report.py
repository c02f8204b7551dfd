"""The report of a comparison of networks with equal parameter counts: table, figures, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rnndyn_fast.analysis.accumulators import Z95
from rnndyn_fast.analysis.figures import STYLE
from rnndyn_fast.analysis.outputs import Row, write_csv
from rnndyn_fast.data import ImageFile
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page, Plot
from rnndyn_fast.search.compare_config import REPORT, SPLITS, CompareConfig, Trained
from rnndyn_fast.search.report import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLIT_TITLES = {"test": "plain", "testplus": "challenging"}


class Summary(NamedTuple):
    """Accuracy of a network at the last time step, over seeds: mean and half of its 95% interval."""

    mean: float
    half: float


def summarise(trained: Sequence[Trained], split: str) -> Summary:
    """Mean over seeds; the interval holds the choice of test images (binomial) and, from two seeds on, of initial weights."""
    values = np.array([one.last(split) for one in trained])
    mean = float(values.mean())
    variance = mean * (1 - mean) / trained[0].images[split]
    if len(values) > 1:
        variance += float(values.var(ddof=1)) / len(values)
    return Summary(mean, Z95 * variance**0.5)


def by_network(done: Sequence[Trained]) -> dict[str, list[Trained]]:
    """Trainings by network, in their order."""
    return {name: [one for one in done if one.network == name] for name in dict.fromkeys(one.network for one in done)}


def statement(done: Sequence[Trained], name: str, split: str) -> str:
    """Whether a network is better than the others, in words.

    Two differ where their difference exceeds the root of the sum of squares of their intervals (95%; that both ran through the same
    images is not used, so this is cautious).
    """
    networks = by_network(done)
    mine = summarise(networks[name], split)
    verdicts: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for other, trained in networks.items():
        if other != name:
            theirs = summarise(trained, split)
            difference, half = mine.mean - theirs.mean, (mine.half**2 + theirs.half**2) ** 0.5
            kind = "not told apart from" if abs(difference) <= half else "better than" if difference > 0 else "worse than"
            verdicts[kind].append(f"{other} ({100 * difference:+.1f} +- {100 * half:.1f} points)")
    said = [f"{kind} {', '.join(others)}" for kind, others in verdicts.items() if others]
    return f"On {SPLIT_TITLES[split]} images {name} ({100 * mine.mean:.1f}%) is {'; '.join(said)}."


def rows(done: Sequence[Trained]) -> list[Row]:
    """A row for every training."""
    facts = ("network", "seed", "width", "growth", "parameters", "multiply_adds", "seconds", "best_epoch")
    return [
        {
            **{name: getattr(one, name) for name in facts},
            **{f"{split}_accuracy_t{t}": value for split in SPLITS for t, value in enumerate(one.accuracy[split])},
        }
        for one in done
    ]  # fmt: skip


def write_report(done: Sequence[Trained], config: CompareConfig) -> Path:
    """Write ``report.html`` and ``networks.csv``; returns the report's path."""
    require("matplotlib")

    from matplotlib import rc_context

    out = Path(config.out)
    write_csv(rows(done), out / "networks.csv")
    with rc_context(STYLE):
        return compare_page(done, config).save(out / REPORT)


def compare_page(done: Sequence[Trained], config: CompareConfig) -> Page:
    """The report as a page."""
    networks = by_network(done)
    best = {split: max(networks, key=lambda name: summarise(networks[name], split).mean) for split in SPLITS}
    featured = next((name for name in networks if name.startswith("rgc")), best["testplus"])
    page = Page(
        "Cells at equal numbers of parameters",
        f"Best on challenging images: {best['testplus']}; on plain ones: {best['test']}.",
        "Intervals are 95%; they hold the choice of test images and, from two seeds on, of initial weights.",
    )
    page.section("What it says").text(*(statement(done, featured, split) for split in reversed(SPLITS)))
    _table(page, networks)
    section = page.section("What was run")
    with ImageFile(config.data, argument="data") as file:
        note = file.attrs.get("source_note", "no note")
        hard = "under the challenging conditions of `testplus` too" if file.attrs.get("challenging") else "plain"
        section.text(f"Images: {note}; {file.image_size} px, {file.num_classes} categories; training images are {hard}.")
    section.text(
        f"Every network is a stem, {config.depth} layers with the cell, the mean over the last map and a linear readout, of "
        f"{config.parameters:,} parameters within 5% (its width follows). Each is trained with {config.seeds} seeds alike: {config.epochs} "
        f"epochs of Adam at {config.lr:g}, batches of {config.batch_size}, T = {config.timesteps}, loss the mean over time steps. Of every "
        "training the epoch with the best validation accuracy is tested. The reciprocal gated cell has both gating (its halves gate each "
        "other) and bypassing (its input passes to its output unchanged where the cell is silent); the feed-forward control has the same "
        "answer at every step."
    )
    page.section("Accuracy against cost and time").plots(
        [
            Plot(figure_cost(networks), "Accuracy at the last time step against multiply-adds per image.", "Points, one per network."),
            Plot(figure_time(networks), "Accuracy over time steps, mean over seeds.", "Lines, one per network."),
        ]
    )
    return page


def _table(page: Page, networks: dict[str, list[Trained]]) -> None:
    table: list[list[Cell]] = []
    for name, trained in networks.items():
        cells: list[Cell] = [name, trained[0].parameters, trained[0].multiply_adds / 1e6, float(np.mean([one.seconds for one in trained]))]
        for split in reversed(SPLITS):
            found = summarise(trained, split)
            cells += [100 * found.mean, 100 * found.half, 100 * float(np.mean([one.accuracy[split][0] for one in trained]))]
        table.append([*cells, ", ".join(f"{100 * one.last('testplus'):.1f}" for one in trained)])
    header = ["network", "parameters", "multiply-adds (M)", "training (s)"]
    for split in reversed(SPLITS):
        header += [f"{SPLIT_TITLES[split]} (%)", "+-", f"{SPLIT_TITLES[split]}, t = 0 (%)"]
    page.section("Networks").table(
        [*header, "challenging by seed (%)"],
        table,
        "Accuracy at the last time step, mean over seeds; multiply-adds per image, all time steps together.",
    )


def figure_cost(networks: dict[str, list[Trained]]) -> Figure:
    """Accuracy on challenging images against multiply-adds."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for k, (name, trained) in enumerate(networks.items()):
        found = summarise(trained, "testplus")
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        axes.errorbar(trained[0].multiply_adds / 1e6, 100 * found.mean, 100 * found.half, label=name, capsize=3, **style)
    axes.set_xlabel("multiply-adds per image (M)")
    axes.set_ylabel("challenging images correct (%)")
    axes.legend(fontsize=8)
    return figure


def figure_time(networks: dict[str, list[Trained]]) -> Figure:
    """Accuracy over time steps: challenging images full, plain ones dashed."""
    require("matplotlib")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for k, (name, trained) in enumerate(networks.items()):
        for split, line in (("testplus", "-"), ("test", "--")):
            curve = 100 * np.mean([one.accuracy[split] for one in trained], axis=0)
            label = name if split == "testplus" else None
            axes.plot(np.arange(len(curve)), curve, line, color=COLOURS[k % len(COLOURS)], marker=MARKERS[k % len(MARKERS)], label=label)
    axes.set_xlabel("time step (dashed: plain images)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("correct (%)")
    axes.legend(fontsize=8)
    return figure
