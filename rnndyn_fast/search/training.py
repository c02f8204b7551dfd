"""Trainings that a search starts: quiet, and gone on with where they were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rnndyn_fast.train import EpochMetrics, QuietReporter, TrainConfig, read_metrics, train
from rnndyn_fast.train.loop import BEST, INITIAL, LAST


def train_quietly(options: TrainConfig, on_epoch: Callable[[Sequence[EpochMetrics]], None] | None = None) -> list[EpochMetrics]:
    """Train, or go on with what is in the folder; returns what every epoch came to. What is finished is not touched again."""
    folder = Path(options.out)
    started = any((folder / name).exists() for name in (LAST, INITIAL))
    if started and (folder / BEST).exists() and len(rows := read_metrics(folder)) >= options.epochs:
        return rows
    with warnings.catch_warnings():
        # Which engine runs an architecture is no news among many.
        warnings.filterwarnings("ignore", message="running backend")
        train(dataclasses.replace(options, resume=started, overwrite=not started), reporter=QuietReporter(), on_epoch=on_epoch)
    return read_metrics(folder)
