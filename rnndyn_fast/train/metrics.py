"""Metrics of a run, one row per epoch, as CSV and as JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnndyn_fast.files import write_text

CSV_NAME, JSONL_NAME = "metrics.csv", "metrics.jsonl"


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

    @property
    def mean_val_accuracy(self) -> float:
        """Mean over time steps of the validation accuracy."""
        return sum(self.val_accuracy) / len(self.val_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Plain types; accuracies as lists."""
        return {**vars(self), "train_accuracy": list(self.train_accuracy), "val_accuracy": list(self.val_accuracy)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochMetrics:
        """The inverse of `to_dict`."""
        lists = {name: tuple(values[name]) for name in ("train_accuracy", "val_accuracy")}
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
    for number, row in enumerate(rows):
        steps = range(len(row.train_accuracy))
        if number == 0:
            names = [f"{kind}_accuracy_t{t}" for kind in ("train", "val") for t in steps]
            writer.writerow(["epoch", "train_loss", "val_loss", "images_per_s", "seconds", *names])
        writer.writerow(
            [
                row.epoch,
                row.train_loss,
                row.val_loss,
                row.images_per_s,
                row.seconds,
                *row.train_accuracy,
                *row.val_accuracy,
            ]
        )
    write_text(folder / CSV_NAME, table.getvalue())


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
