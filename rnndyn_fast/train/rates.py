"""Learning rates: what the metrics so far say about the next epoch. They follow from the rows alone, so a resumed run has the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.metrics import EpochMetrics

WARMUP_START = 0.01  # share of the learning rate in the first epoch of a warm-up
TREND_EPOCHS, TREND_LEAST_FALL, TREND_PATIENCE = 5, 0.01, 3  # of the published recipe of BLT-VS


def validation_accuracy(config: TrainConfig, row: EpochMetrics) -> float:
    """What "best" means: validation accuracy at the time steps that the loss is about, the mean of all or the last."""
    return row.val_accuracy[-1] if config.loss == "last" else row.mean_val_accuracy


def epochs_since_best(config: TrainConfig, rows: Sequence[EpochMetrics]) -> int:
    """Epochs since validation accuracy was best; ties go to the earlier one."""
    values = [validation_accuracy(config, row) for row in rows]
    return len(values) - 1 - values.index(max(values)) if values else 0


def learning_rate(config: TrainConfig, rows: Sequence[EpochMetrics]) -> float:
    """The learning rate of the epoch that follows `rows`.

    Constant, or after a linear warm-up divided by 4 (``lr_patience``), 10 (``lr_steps``) or 2 (``lr_trend``) at the epochs that
    :class:`TrainConfig` says.
    """
    epoch = len(rows) + 1
    if epoch <= config.lr_warmup:
        share = (epoch - 1) / max(1, config.lr_warmup - 1) if config.lr_warmup > 1 else 1.0
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * share)
    if config.lr_trend:
        return config.lr / 2 ** cuts_by_trend([row.val_loss for row in rows[config.lr_warmup :]])
    if config.lr_patience is not None:
        return config.lr / 4 ** _cuts_by_accuracy([validation_accuracy(config, row) for row in rows], config.lr_patience)
    return config.lr / 10 ** sum(epoch > step for step in config.lr_steps)


def _cuts_by_accuracy(accuracies: Sequence[float], patience: int) -> int:
    """How often that many epochs have passed without a better accuracy, counted from the best epoch or the last cut."""
    cuts, best, waited = 0, -1.0, 0
    for accuracy in accuracies:
        waited += 1
        if accuracy > best:
            best, waited = accuracy, 0
        if waited == patience:
            cuts, waited = cuts + 1, 0
    return cuts


def cuts_by_trend(losses: Sequence[float]) -> int:
    """How often a line through the last five losses since the last cut has fallen by less than 1% for the third epoch in a row."""
    cuts, bad = 0, 0
    since: list[float] = []
    for loss in losses:
        since.append(loss)
        if len(since) < TREND_EPOCHS:
            continue
        slope, start = np.polyfit(np.arange(TREND_EPOCHS), since[-TREND_EPOCHS:], 1)
        falls = -slope * (TREND_EPOCHS - 1) >= TREND_LEAST_FALL * abs(start)
        bad = 0 if falls else bad + 1
        if bad == TREND_PATIENCE:
            cuts, bad, since = cuts + 1, 0, []
    return cuts
