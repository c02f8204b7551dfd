"""The state of a run: everything that a checkpoint holds, so that a run that goes on computes what it would have computed anyway."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rnndyn_fast.data import BatchLoader, ImageFile, normalise
from rnndyn_fast.data.shards import ShardFile
from rnndyn_fast.job_device import to_device
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.processes import Processes
from rnndyn_fast.train.checkpoint import load_weights, save_checkpoint
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.metrics import EpochMetrics
from rnndyn_fast.train.objective import (
    clip_gradients,
    decay_penalty,
    decays,
    inverse_frequencies,
    loss_over_time,
    sample_weight,
)
from rnndyn_fast.train.optimizers import load_optimizer, make_optimizer
from rnndyn_fast.train.rates import Schedule
from rnndyn_fast.train.setup import build_network, limited
from rnndyn_fast.train.steps import Steps
from rnndyn_fast.train.transform import TrainingTransform

RESUMABLE = ("config", "optimizer", "progress", "schedule", "metrics")


@dataclass
class Progress:
    """How far the current epoch is: training steps done, and sums over their images."""

    step: int = 0
    images: int = 0
    loss: float = 0.0
    correct: list[int] = field(default_factory=list)
    logged: int = 0  # steps whose gradients were measured
    grad_norms: dict[str, float] = field(default_factory=dict)  # sums over them, by area
    last_norms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    lr: float = 0.0  # of the last step

    def add(self, loss: float, correct: list[int], images: int) -> None:
        """Count a batch."""
        self.images += images
        self.loss += loss * images
        # In a biological unroll the first outputs come after some steps: fewer than `timesteps` of them.
        self.correct = [before + now for before, now in zip(self.correct or [0] * len(correct), correct, strict=True)]

    def add_norms(self, norms: dict[str, float]) -> None:
        """Count norms of gradients by area."""
        self.logged += 1
        self.last_norms = norms
        self.grad_norms = {name: self.grad_norms.get(name, 0.0) + norm for name, norm in norms.items()}

    @property
    def mean_loss(self) -> float:
        """Mean over images."""
        return self.loss / self.images

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share of correct labels per time step."""
        return tuple((torch.tensor(self.correct) / self.images).tolist())


class State:
    """Network, its average, optimiser, learning rate, images, metrics so far, and how far the current epoch is.

    Random numbers have no state: those of a step follow from (seed, epoch, batch), see :meth:`seed`.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageFile | ShardFile,
        description: dict[str, Any],
        device: torch.device,
        group: Processes | None = None,
    ) -> None:
        self.config, self.description, self.device = config, description, device
        self.group = group or Processes()
        self.out = Path(config.out)
        self.net = build_network(config, data, device)
        if config.time_weights and len(config.time_weights) != (answers := self.net.timesteps - self.net.first_output):
            raise ValueError(
                f"time_weights: expected {answers} numbers, one for each answer of the network, got {len(config.time_weights)}"
            )
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True).eval()
        decay = decays(self.net, config.weight_decay, config.weight_decay_of)
        self.optimizer = make_optimizer(config, self.net, decay, device)
        self.rows: list[EpochMetrics] = []
        self.progress = Progress()
        train_images = limited(data.split("train"), config.max_train_images)
        val_images = limited(data.split("val"), config.max_val_images)
        limits = [("training images", len(train_images)), ("images of batch_size", config.batch_size)]
        shards = getattr(train_images, "shards", None)
        if shards is not None:
            limits.append(("tar shards with training images", len(np.unique(shards))))
        for what, most in limits:
            if self.group.count > most:
                raise ValueError(f"processes: expected at most one for each of the {most} {what}, got {self.group.count}")
        self.class_weights: Tensor | None = None
        if config.class_weights == "inverse_frequency":
            self.class_weights = inverse_frequencies(train_images.labels, data.num_classes).to(device)
        self.time_weights = torch.tensor(config.time_weights, device=device) if config.time_weights else None
        place: dict[str, Any] = {"rank": self.group.rank, "count": self.group.count}
        transform = TrainingTransform(config.augment, config.seed, data.num_classes, config.mixup, config.cutmix)
        self.train_loader = BatchLoader(
            train_images, config.batch_size, shuffle=True, seed=config.seed, workers=config.workers, transform=transform, **place
        )
        self.val_loader = BatchLoader(val_images, config.val_batch_size, **place)
        self.schedule = Schedule(config, self.optimizer, len(self.train_loader))
        weights = self.class_weights
        self.steps = Steps(
            self.net, self.optimizer, self.loss, device, config.precision,
            penalty=decay_penalty(self.net, decay) if config.optimizer == "adam" else None,
            before_update=self.clip if config.clip or config.clip_norm else None,
            weight=None if weights is None else lambda labels: sample_weight(labels, weights),
            averaged=None if self.average is None else cast(RecurrentNetwork, self.average.module),
            group=self.group, accumulate=config.accumulate, sync_batch_norm=config.sync_batch_norm, graphed=config.cuda_graphs,
        )  # fmt: skip

    def loss(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Of log-probabilities [T, N, classes]. Smoothing, and weights of classes and time steps, as configured."""
        return loss_over_time(
            log_probs, labels, self.config.loss,
            label_smoothing=self.config.label_smoothing, class_weights=self.class_weights, time_weights=self.time_weights,
        )  # fmt: skip

    def clip(self) -> None:
        """Bring gradients within their bounds."""
        if self.config.clip is not None:
            clip_gradients(self.net.parameters(), self.config.clip)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_norm)

    def seed(self, epoch: int, number: int) -> None:
        """Seed PyTorch's generators for a training step, for networks with random numbers of their own."""
        entropy = np.random.SeedSequence([self.config.seed, epoch, number, self.group.rank, 2])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def prepared(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Raw or augmented images, normalised, and labels, on the device."""
        mean, std = np.asarray(self.description["mean"]), np.asarray(self.description["std"])
        return normalise(to_device(images, self.device), mean, std), to_device(labels, self.device)

    @property
    def steps_done(self) -> int:
        """Training steps since the run's start."""
        return len(self.rows) * len(self.train_loader) + self.progress.step

    @property
    def steps_left(self) -> int:
        """Training steps until all epochs are done."""
        return self.config.epochs * len(self.train_loader) - self.steps_done

    def advance(self) -> None:
        """After a training step: the average of the weights, the learning rate."""
        if self.average is not None:
            self.average.update_parameters(self.net)
        self.schedule.step()

    # ---------------------------------------------------------------- checkpoints

    def contents(self) -> dict[str, Any]:
        """What a checkpoint holds. "state_dict" is what is to be used: the average of the weights where there is one."""
        averaged: dict[str, Any] = {}
        if self.average is not None:
            averaged = {"trained_state_dict": self.net.state_dict(), "ema": {"updates": int(self.average.n_averaged)}}
        used = self.net if self.average is None else self.average.module
        return {
            "config": self.config.as_new().to_dict(),
            "model": self.net.config,
            "state_dict": used.state_dict(),
            **averaged,
            "optimizer": self.optimizer.state_dict(),
            **({} if self.steps.scaler is None else {"scaler": self.steps.scaler.state_dict()}),
            "schedule": self.schedule.state_dict(),
            "epoch": len(self.rows),
            "progress": {**vars(self.progress), "correct": list(self.progress.correct)},
            "data": self.description,
            "metrics": [row.to_dict() for row in self.rows],
        }

    def save(self, name: str, **more: Any) -> None:
        """Write a checkpoint; the first process does."""
        if self.group.rank == 0:
            save_checkpoint(self.out / name, {**self.contents(), **more})

    def restore(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, after checking that it belongs to this run. The number of processes may be another one."""
        missing = [name for name in RESUMABLE if name not in checkpoint]
        if missing:
            raise ValueError(f"resume: {path} lacks {missing}; it cannot be resumed")
        self.config.check_resumes(TrainConfig.from_dict(checkpoint["config"]))
        for name in ("categories", "image_size", "mean", "std", "statistics", "images", "shards"):
            mine = self.description.get(name)
            if checkpoint["data"].get(name, mine) != mine:  # (older runs do not have them all)
                raise ValueError(
                    f"resume: {name} of {self.config.data} differs from that of the data the run was started with, "
                    f"{checkpoint['data']['path']}"
                )
        layers = checkpoint["model"].get("layers", {})
        if layers != self.net.config.get("layers", {}):
            raise ValueError(f"resume: {path} is of a network with changed layers ({', '.join(layers)}), which a run cannot take up")
        load_weights(self.net, checkpoint.get("trained_state_dict", checkpoint["state_dict"]), path)
        if self.average is not None:
            load_weights(self.average.module, checkpoint["state_dict"], path)
            self.average.n_averaged.fill_(checkpoint["ema"]["updates"])
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        if self.steps.scaler is not None and "scaler" in checkpoint:
            self.steps.scaler.load_state_dict(checkpoint["scaler"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.progress = Progress(**checkpoint["progress"])
        self.rows = [EpochMetrics.from_dict(row) for row in checkpoint["metrics"]]
