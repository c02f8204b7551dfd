"""Learning rates: over epochs what the metrics so far say about the next one, over training steps the schedules of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.metrics import EpochMetrics
from rnndyn_fast.train.optimizers import set_rate

WARMUP_START = 0.01  # share of the learning rate in the first epoch of a warm-up
TREND_EPOCHS, TREND_LEAST_FALL, TREND_PATIENCE = 5, 0.01, 3  # of the published recipe of BLT-VS


def validation_accuracy(config: TrainConfig, row: EpochMetrics) -> float:
    """What "best" means: validation accuracy at the time steps that the loss is about, the mean of all or the last; of the average of the
    weights where there is one."""
    accuracy = row.ema_val_accuracy or row.val_accuracy
    return accuracy[-1] if config.loss == "last" else sum(accuracy) / len(accuracy)


def epochs_since_best(config: TrainConfig, rows: Sequence[EpochMetrics]) -> int:
    """Epochs since validation accuracy was best; ties go to the earlier one."""
    values = [validation_accuracy(config, row) for row in rows]
    return len(values) - 1 - values.index(max(values)) if values else 0


def learning_rate(config: TrainConfig, rows: Sequence[EpochMetrics]) -> float:
    """The learning rate of the epoch that follows `rows`, before what changes it within an epoch (:class:`Schedule`).

    Constant, or after a linear warm-up divided by 4 (``lr_patience``), 10 (``lr_steps``) or 2 (``lr_trend``) at the epochs that
    :class:`TrainConfig` says.
    """
    epoch = len(rows) + 1
    if epoch <= config.lr_warmup:
        share = (epoch - 1) / max(1, config.lr_warmup - 1) if config.lr_warmup > 1 else 1.0
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * share)
    if config.lr_trend:
        return config.lr / 2 ** cuts_by_trend([row.val_loss for row in rows[config.lr_warmup :]])
    optimizer = torch.optim.SGD([torch.zeros(0)], lr=config.lr)  # holds the rate for PyTorch's rules
    if config.lr_patience is not None:
        plateau = lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.25, patience=config.lr_patience - 1, threshold=0.0, min_lr=0.0, eps=0.0
        )
        for row in rows:
            plateau.step(validation_accuracy(config, row))
    elif config.lr_steps:
        steps = lr_scheduler.MultiStepLR(optimizer, list(config.lr_steps), gamma=0.1)
        for _ in rows:
            optimizer.step()
            steps.step()
    return float(optimizer.param_groups[0]["lr"])


class Schedule:
    """Learning rate of every training step, kept in an optimiser's groups: that of the epoch, or a shape over all steps, after a warm-up.

    Args:
        config: ``lr_schedule`` and ``lr_warmup_steps``; the rules of :func:`learning_rate`.
        optimizer: whose groups are set.
        steps: training steps in an epoch.
    """

    def __init__(self, config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config, self.optimizer = config, optimizer
        self.rate, self.done = config.lr, 0
        self._scheduler: lr_scheduler.LRScheduler | None = None
        total, warm = config.epochs * steps, config.lr_warmup_steps
        if config.lr_schedule == "one_cycle":
            share = warm / total if warm else 0.3
            if not 0 < share < 1:
                raise ValueError(f"lr_warmup_steps: expected fewer than the {total} training steps, got {warm}")
            self._scheduler = lr_scheduler.OneCycleLR(optimizer, config.lr, total, pct_start=share, cycle_momentum=False)
            return
        shape: lr_scheduler.LRScheduler | None = None
        if config.lr_schedule == "cosine":
            if warm >= total:
                raise ValueError(f"lr_warmup_steps: expected fewer than the {total} training steps, got {warm}")
            shape = lr_scheduler.CosineAnnealingLR(optimizer, total - warm, eta_min=config.lr_least)
        if warm:
            rise = lr_scheduler.LinearLR(optimizer, WARMUP_START, total_iters=warm)
            shape = rise if shape is None else lr_scheduler.SequentialLR(optimizer, [rise, shape], [warm])
        self._scheduler = shape

    @property
    def current(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def begin_epoch(self, rows: Sequence[EpochMetrics]) -> float:
        """Take the epoch's rate; returns it."""
        if self.config.lr_schedule != "constant":
            return self.rate
        before, self.rate = self.rate, learning_rate(self.config, rows)
        for group in self.optimizer.param_groups:
            warming = self.done < self.config.lr_warmup_steps
            set_rate(group, float(group["lr"]) * (self.rate / before) if warming else self.rate)
        return self.rate

    def step(self) -> None:
        """After every training step."""
        self.done += 1
        if self._scheduler is not None and self.done <= self._last:
            with warnings.catch_warnings():
                # A gradient scaler may have skipped the optimiser's step, and a graph has its own.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
                self._scheduler.step()

    @property
    def _last(self) -> int:
        if isinstance(self._scheduler, lr_scheduler.OneCycleLR):
            return int(self._scheduler.total_steps) - 1
        return self.config.lr_warmup_steps if isinstance(self._scheduler, lr_scheduler.LinearLR) else self.done

    def state_dict(self) -> dict[str, Any]:
        """Plain types; the rate itself is part of the optimiser's state."""
        return {"rate": self.rate, "done": self.done, "scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.rate, self.done = state["rate"], state["done"]
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])


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
