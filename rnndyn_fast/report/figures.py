"""Figures of the reports that are not figures of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rnndyn_fast.analysis.figures import GREY, INK
from rnndyn_fast.optional import require
from rnndyn_fast.train import EpochMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_training(rows: Sequence[EpochMetrics]) -> Figure:
    """Loss, and accuracy at the first and last time step, per epoch."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row.epoch for row in rows]
    for name, colour, style, marker, values in (
        ("training", INK, "-", "o", [row.train_loss for row in rows]),
        ("validation", GREY, "--", "s", [row.val_loss for row in rows]),
    ):
        loss.plot(epochs, values, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
    loss.set_ylabel("loss (nats, sum over time)")
    loss.set_ylim(0, 1.08 * max(max(row.train_loss, row.val_loss) for row in rows))
    loss.legend()
    for name, colour, style, marker, step in (("t = 0", GREY, "--", "s", 0), ("last t", INK, "-", "o", -1)):
        values = [100 * row.val_accuracy[step] for row in rows]
        accuracy.plot(epochs, values, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
    accuracy.set_ylabel("validation accuracy (%)")
    accuracy.set_ylim(0, 100)
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xticks(epochs if len(epochs) <= 10 else epochs[:: len(epochs) // 8])
    return figure
