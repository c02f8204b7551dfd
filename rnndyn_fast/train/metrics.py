"""Metrics of a run, one row per epoch, as CSV and as JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnndyn_fast.file_io import reads, write_text

CSV_NAME, JSONL_NAME = "metrics.csv", "metrics.jsonl"
_TUPLES = ("train_accuracy", "val_accuracy", "ema_val_accuracy")


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are cross-entropies in nats, over time steps as configured; accuracies are fractions [T]."""

    epoch: int
    train_loss: float
    train_accuracy: tuple[float, ...]
    val_loss: float
    val_accuracy: tuple[float, ...]
    images_per_s: float
    seconds: float
    lr: float | None = None  # of the epoch's last step
    ema_val_loss: float | None = None  # of the average of the weights
    ema_val_accuracy: tuple[float, ...] = ()
    grad_norm: dict[str, float] = field(default_factory=dict)  # by area and of "all", the mean over logged steps
    norm: dict[str, list[float]] = field(default_factory=dict)  # of states by area, [T], the mean over some validation images
    dead: dict[str, list[float]] = field(default_factory=dict)  # share of channels that are 0 in all of them, by area, [T]

    @property
    def mean_val_accuracy(self) -> float:
        """Mean over time steps of the validation accuracy."""
        return sum(self.val_accuracy) / len(self.val_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Plain types; accuracies as lists."""
        return {**vars(self), **{name: list(getattr(self, name)) for name in _TUPLES}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochMetrics:
        """The inverse of `to_dict`."""
        lists = {name: tuple(values[name]) for name in _TUPLES if name in values or name != "ema_val_accuracy"}
        return cls(**{**values, **lists})


def write_metrics(folder: str | os.PathLike[str], rows: Sequence[EpochMetrics]) -> None:
    """Write all rows to metrics.csv and metrics.jsonl in `folder`, atomically.

    The files are written anew each epoch from the rows that the checkpoint also keeps: a resumed run leaves no
    duplicates.
    """
    folder = Path(folder)
    text = "".join(json.dumps(row.to_dict()) + "\n" for row in rows)
    write_text(folder / JSONL_NAME, text)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    kinds = {"train": "train_accuracy", "val": "val_accuracy"}
    if rows and rows[0].ema_val_accuracy:
        kinds["ema_val"] = "ema_val_accuracy"
    scalars = ["epoch", "train_loss", "val_loss", "images_per_s", "seconds", "lr"] + (["ema_val_loss"] if len(kinds) == 3 else [])
    if rows:
        head = [f"{kind}_accuracy_t{t}" for kind, name in kinds.items() for t in range(len(getattr(rows[0], name)))]
        writer.writerow([*scalars, *head, *_activity(rows[0])])
    for row in rows:
        accuracies = [value for name in kinds.values() for value in getattr(row, name)]
        writer.writerow([*(getattr(row, name) for name in scalars), *accuracies, *_activity(row).values()])
    write_text(folder / CSV_NAME, table.getvalue())


def _activity(row: EpochMetrics) -> dict[str, float]:
    found = {f"grad_norm_{area}": value for area, value in row.grad_norm.items()}
    for name in ("norm", "dead"):
        found |= {f"{name}_{area}_t{t}": value for area, values in getattr(row, name).items() for t, value in enumerate(values)}
    return found


@reads("folder of a run with metrics")
def read_metrics(folder: str | os.PathLike[str]) -> list[EpochMetrics]:
    """The rows of the run in `folder`. Raises FileNotFoundError or ValueError (naming file and line)."""
    path = Path(folder) / JSONL_NAME
    if not path.exists():
        raise FileNotFoundError(f"folder: no {JSONL_NAME} in {folder}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(EpochMetrics.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number} is not a row of metrics: {error}") from error
    return rows
