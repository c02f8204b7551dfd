"""A page about a run of `rnndyn train`, at any moment of it: losses, accuracy over time steps, gradients, activity."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page, Plot
from rnndyn_fast.train.metrics import JSONL_NAME, EpochMetrics, read_metrics
from rnndyn_fast.train.progress import duration
from rnndyn_fast.train.watch import STEPS, read_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "training.html"


@dataclass(frozen=True)
class TrainingRecord:
    """What a run has left so far."""

    rows: Sequence[EpochMetrics]
    steps: Sequence[dict[str, Any]]
    epochs: int
    options: dict[str, Any]

    @property
    def status(self) -> str:
        """How far the run is, in a sentence."""
        done = f"{len(self.rows)} of {self.epochs} epochs are done"
        if not self.steps:
            return done
        last = self.steps[-1]
        ahead = f"; left {duration(last['eta_s'])}" if len(self.rows) < self.epochs else ""
        return f"{done}; last entry: step {last['step']} in epoch {last['epoch']}, loss {last['loss']:.3f}{ahead}"


def read_run(folder: str | os.PathLike[str]) -> TrainingRecord:
    """The record of a run. Raises FileNotFoundError: no run there."""
    require("yaml")
    import yaml

    folder = Path(folder)
    config = folder / "train.yaml"
    if not config.exists():
        raise FileNotFoundError(f"run: no run of rnndyn train in {folder} (there is no train.yaml)")
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    rows = read_metrics(folder) if (folder / JSONL_NAME).exists() else []
    return TrainingRecord(rows, read_steps(folder / STEPS), int(options["epochs"]), options)


def write_training_page(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> tuple[Path, TrainingRecord]:
    """Write the page of a run; returns its path, and what it is about.

    Args:
        folder: of `rnndyn train`, finished or not.
        out: the HTML file; None: ``training.html`` in the folder.

    Raises: FileNotFoundError: no run there; ValueError: damaged metrics.
    """
    record = read_run(folder)
    page = Page(f"Training of {record.options['model']}", record.status + ".")
    section = page.section("Loss and accuracy")
    if record.rows:
        timesteps = range(len(record.rows[-1].val_accuracy))
        section.table(
            ["epoch", "training loss", "validation loss", *(f"t = {t}" for t in timesteps), "learning rate", "images/s"],
            [[r.epoch, r.train_loss, r.val_loss, *r.val_accuracy, r.lr, r.images_per_s] for r in record.rows],
            "Epochs, with validation accuracy by time step.",
        )
    plots = [_lines("Loss", "step", "loss", {"training": ([e["step"] for e in record.steps], [e["loss"] for e in record.steps])})]
    if record.rows:
        epochs = [row.epoch for row in record.rows]
        accuracy = {f"t = {t}": (epochs, [row.val_accuracy[t] for row in record.rows]) for t in timesteps}
        plots.append(_lines("Validation accuracy", "epoch", "accuracy", accuracy))
    section.plots(plots)
    named = {name for entry in record.steps for name in entry["grad_norm"]}
    if named:
        norms = {
            name: ([e["step"] for e in record.steps], [e["grad_norm"].get(name, math.nan) for e in record.steps]) for name in sorted(named)
        }
        page.section("Gradients").plots([_lines("Norm of gradients by area", "step", "norm", norms, log=True)])
    if record.rows and record.rows[-1].norm:
        last = record.rows[-1]
        steps = range(len(next(iter(last.norm.values()))))
        activity = page.section("Activity")
        for name, what in (("norm", "Norm of states"), ("dead", "Share of channels that are 0")):
            values: dict[str, list[float]] = getattr(last, name)
            body: list[list[Cell]] = [[area, *series] for area, series in values.items()]
            activity.table(["area", *(f"t = {t}" for t in steps)], body, f"{what} after the last epoch.")
    page.section("Options").table(
        ["option", "value"], [[name, str(value)] for name, value in record.options.items()], "Configuration of the run."
    )
    return page.save(Path(folder) / PAGE if out is None else out), record


def _lines(title: str, x: str, y: str, series: dict[str, tuple[list[Any], list[float]]], log: bool = False) -> Plot:
    figure = _figure()
    axes = figure.subplots()
    for name, (at, values) in series.items():
        axes.plot(at, values, label=name, linewidth=1)
    axes.set(xlabel=x, ylabel=y)
    if log:
        axes.set_yscale("log")
    axes.legend(fontsize=7)
    return Plot(figure, f"{title} over {x}s.", f"Lines of {title.lower()} over {x}s: {', '.join(series)}.")


def _figure() -> Figure:
    require("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(5.0, 3.2), layout="constrained")
