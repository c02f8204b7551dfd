"""The training loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rnndyn_fast import models
from rnndyn_fast.data import BatchLoader, ImageFile, ImageSplit, augmentation, normalise
from rnndyn_fast.devices import check_precision, choose_device, to_device
from rnndyn_fast.files import write_text
from rnndyn_fast.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from rnndyn_fast.ops.engines import check_runs_on_cpu
from rnndyn_fast.optional import require
from rnndyn_fast.train.checkpoint import load_weights, read_checkpoint, save_checkpoint
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.metrics import CSV_NAME, JSONL_NAME, EpochMetrics, write_metrics
from rnndyn_fast.train.objective import clip_gradients, inverse_frequencies, kernels, loss_over_time, squared_norm
from rnndyn_fast.train.progress import Reporter, choose_reporter, epoch_line, percent
from rnndyn_fast.train.rates import epochs_since_best, learning_rate, validation_accuracy
from rnndyn_fast.train.steps import Outcome, Steps, adam, load_adam

INITIAL, LAST, BEST, CONFIG = "initial.pt", "last.pt", "best.pt", "train.yaml"
_OWN_FILES = (INITIAL, LAST, BEST, CONFIG, CSV_NAME, JSONL_NAME)


class SpacedSubset:
    """`count` images of a split, evenly spaced over it, so that a split sorted by class still yields all classes."""

    def __init__(self, split: ImageSplit, count: int) -> None:
        self._split = split
        self._rows = np.arange(count) * len(split) // count
        self.labels = split.labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `indices` of the subset."""
        return self._split.read(self._rows[indices])


def limited(split: ImageSplit, count: int | None) -> ImageSplit | SpacedSubset:
    """The split, or `count` of its images, evenly spaced, if it holds more than that."""
    return split if count is None or count >= len(split) else SpacedSubset(split, count)


def initialise(net: nn.Module) -> None:
    """Xavier-uniform weights of every Conv2d and Linear, in place; transposed convolutions and biases stay as they are.

    Source: the published training script of arXiv 2308.12435.
    """
    for module in net.modules():
        # ConvTranspose2d is no subclass of Conv2d.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def kept_name(epoch: int | str) -> str:
    """File name of the checkpoint that is kept of an epoch (or pattern of such names)."""
    return f"epoch_{epoch}.pt"


def train(
    config: TrainConfig, *, reporter: Reporter | None = None, on_epoch: Callable[[Sequence[EpochMetrics]], None] | None = None
) -> Path:
    """Train a network.

    In the folder ``config.out``: ``initial.pt`` (before training), ``last.pt`` (every epoch), ``best.pt`` (highest
    validation accuracy, see :func:`validation_accuracy`), ``epoch_<n>.pt`` (those in ``config.keep``), ``metrics.csv``,
    ``metrics.jsonl`` and ``train.yaml`` (this configuration). A resumed run computes what an uninterrupted one would
    have, bit for bit with the same number of threads on a CPU.

    Args:
        config: what to do.
        reporter: shows progress; None chooses a bar or lines.
        on_epoch: called after every epoch, when its checkpoint is written, with the metrics of all epochs so far; what it
            raises ends the run.

    Returns:
        The path of ``last.pt``.

    Raises:
        FileNotFoundError: no data file, or nothing to resume.
        FileExistsError: ``config.out`` is not empty and neither `resume` nor `overwrite` is set.
        ValueError: the data is not of the layout; the run to resume has other options or other data; no such device, and why.
        FloatingPointError: the loss is not finite; names epoch and batch. The last checkpoint stays.

    Deterministic: on a CPU, for a fixed number of threads; a run may continue on another device.
    Memory: batches are read from disk as they are needed.
    """
    out = Path(config.out)
    device = choose_device(config.device)
    check_precision(config.precision, device)
    if device.type == "cpu":
        check_runs_on_cpu(config.engine)
    resume_from = _resume_from(config, out)
    with ImageFile(config.data, required_splits=("train", "val"), argument="data") as data, _threads(config.threads):
        description = describe_data(data, config.normalise or "data")
        run = _Run(config, data, description, device)
        if resume_from is not None:
            run.restore(resume_from)
        else:
            if config.overwrite:
                for path in (*(out / name for name in _OWN_FILES), *out.glob(kept_name("*"))):
                    path.unlink(missing_ok=True)
            run.save(INITIAL)
        write_text(out / CONFIG, config_yaml(config.as_new()))
        with reporter or choose_reporter() as shown:
            run.go(shown, on_epoch)
    return out / LAST


class _Run:
    """A run's state: network, optimiser, generator of augmentations, metrics so far."""

    def __init__(self, config: TrainConfig, data: ImageFile, description: dict[str, Any], device: torch.device) -> None:
        self.config, self.description, self.device = config, description, device
        self.out = Path(config.out)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                self.net = models.build_for(config.build_options(), num_classes=data.num_classes, image_size=data.image_size)
            except ValueError as error:
                what = "" if str(error).startswith("model ") else f"model {config.model}: "
                images = f"{config.data} has {data.image_size} px and {data.num_classes} categories"
                raise ValueError(f"{what}{error} ({images})") from error
            if config.init == "xavier":
                initialise(self.net)
        self.net.to(device)
        self.optimizer = adam(self.net, device, lr=config.lr, eps=config.adam_eps)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.augment = augmentation(config.augment, self.generator)
        self.rows: list[EpochMetrics] = []
        train_images = limited(data.split("train"), config.max_train_images)
        val_images = limited(data.split("val"), config.max_val_images)
        self.class_weights = None
        if config.class_weights == "inverse_frequency":
            self.class_weights = inverse_frequencies(train_images.labels, data.num_classes).to(device)
        self.train_loader = BatchLoader(train_images, config.batch_size, shuffle=True, seed=config.seed)
        self.val_loader = BatchLoader(val_images, config.val_batch_size)
        self.steps = Steps(
            self.net, self.optimizer, self.loss, device, config.precision,
            penalty=(lambda: config.weight_decay * squared_norm(kernels(self.net))) if config.weight_decay else None,
            before_update=None if (clip := config.clip) is None else lambda: clip_gradients(self.net.parameters(), clip),
            graphed=config.cuda_graphs,
        )  # fmt: skip

    def save(self, name: str) -> None:
        save_checkpoint(
            self.out / name,
            {
                "config": self.config.as_new().to_dict(),
                "model": self.net.config,
                "state_dict": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                **({} if self.steps.scaler is None else {"scaler": self.steps.scaler.state_dict()}),
                "epoch": len(self.rows),
                "rng": self.generator.get_state(),
                "data": self.description,
                "metrics": [row.to_dict() for row in self.rows],
            },
        )

    def restore(self, path: Path) -> None:
        """Take up the state in `path`, after checking that it belongs to this run."""
        checkpoint = read_checkpoint(path)
        missing = [name for name in ("config", "optimizer", "rng", "metrics") if name not in checkpoint]
        if missing:
            raise ValueError(f"resume: {path} lacks {missing}; it cannot be resumed")
        self.config.check_resumes(TrainConfig.from_dict(checkpoint["config"]))
        for name in ("categories", "image_size", "mean", "std", "statistics"):
            if checkpoint["data"].get(name, self.description[name]) != self.description[name]:  # (older runs have no statistics)
                raise ValueError(
                    f"resume: {name} of {self.config.data} differs from that of the data the run was started with, "
                    f"{checkpoint['data']['path']}"
                )
        load_weights(self.net, checkpoint["state_dict"], path)
        load_adam(self.optimizer, checkpoint["optimizer"], self.device)
        if self.steps.scaler is not None and "scaler" in checkpoint:
            self.steps.scaler.load_state_dict(checkpoint["scaler"])
        self.generator.set_state(checkpoint["rng"])
        self.rows = [EpochMetrics.from_dict(row) for row in checkpoint["metrics"]]

    def go(self, reporter: Reporter, on_epoch: Callable[[Sequence[EpochMetrics]], None] | None) -> None:
        """Train until `config.epochs` are done, or validation accuracy has stopped improving."""
        while len(self.rows) < self.config.epochs:
            if self.config.patience is not None and epochs_since_best(self.config, self.rows) >= self.config.patience:
                reporter.line(f"validation accuracy has not improved for {self.config.patience} epochs: done")
                break
            rate = learning_rate(self.config, self.rows)
            if len(self.rows) >= self.config.lr_warmup and rate <= self.config.lr_least:
                reporter.line(f"the learning rate has fallen to {rate:.3g}: done")
                break
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            row = self.epoch(len(self.rows) + 1, reporter)
            best = max((validation_accuracy(self.config, earlier) for earlier in self.rows), default=-1.0)
            self.rows.append(row)
            # last.pt comes last: a run killed between these lines takes up the epoch before and writes them again.
            write_metrics(self.out, self.rows)
            if validation_accuracy(self.config, row) > best:
                self.save(BEST)
            if row.epoch in self.config.keep:
                self.save(kept_name(row.epoch))
            self.save(LAST)
            reporter.line(epoch_line(row, self.config.epochs))
            if on_epoch is not None:
                on_epoch(tuple(self.rows))

    def epoch(self, number: int, reporter: Reporter) -> EpochMetrics:
        """One pass over the training images and one over the validation images."""
        start = time.perf_counter()
        self.train_loader.set_epoch(number - 1)
        self.net.train()
        total = _Totals()
        reporter.start(f"epoch {number}/{self.config.epochs}", len(self.train_loader.split))
        batches = (self.prepared(images if self.augment is None else self.augment(images), labels) for images, labels in self.train_loader)
        for batch, (loss, correct, count) in enumerate(self.outcomes(self.steps.train, batches), start=1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss} in epoch {number}, batch {batch} of {len(self.train_loader)}; a smaller "
                    "lr than "
                    f"{self.config.lr} may help. The checkpoint of epoch {number - 1} is kept in {self.out}"
                )
            total.add(loss, correct, count)
            speed = total.images / (time.perf_counter() - start)
            text = f"loss {total.loss():.3f}  % {percent(total.accuracy())}  {speed:.0f} images/s"
            reporter.advance(count, text)
        train_seconds = time.perf_counter() - start
        val = self.validate(reporter, number)
        return EpochMetrics(
            epoch=number,
            train_loss=total.loss(),
            train_accuracy=total.accuracy(),
            val_loss=val.loss(),
            val_accuracy=val.accuracy(),
            images_per_s=total.images / train_seconds,
            seconds=time.perf_counter() - start,
        )

    def validate(self, reporter: Reporter, number: int) -> _Totals:
        """Loss and accuracy over the validation images."""
        self.net.eval()
        total = _Totals()
        reporter.start(f"validation {number}/{self.config.epochs}", len(self.val_loader.split))
        with torch.inference_mode():
            batches = (self.prepared(images, labels) for images, labels in self.val_loader)
            for loss, correct, count in self.outcomes(self.steps.evaluate, batches):
                total.add(loss, correct, count)
                reporter.advance(count, f"loss {total.loss():.3f}  % {percent(total.accuracy())}")
        return total

    def prepared(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw or augmented images, normalised, and labels, on the device."""
        mean, std = np.asarray(self.description["mean"]), np.asarray(self.description["std"])
        return normalise(to_device(images, self.device), mean, std), to_device(labels, self.device)

    def outcomes(
        self, step: Callable[[torch.Tensor, torch.Tensor], Outcome], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[float, list[int], int]]:
        """Loss, correct labels per time step, and images of each batch. A GPU is asked when it has been given the next one, so that it
        never waits for work."""
        late = 1 if self.device.type == "cuda" else 0
        waiting: deque[Outcome] = deque()
        for images, labels in batches:
            waiting.append(step(images, labels))
            if len(waiting) > late:
                outcome = waiting.popleft()
                yield *outcome.read(), outcome.images
        for outcome in waiting:
            yield *outcome.read(), outcome.images

    def loss(self, log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of log-probabilities [T, N, classes]."""
        smoothing = self.config.label_smoothing
        return loss_over_time(log_probs, labels, self.config.loss, label_smoothing=smoothing, class_weights=self.class_weights)


class _Totals:
    """Loss and accuracy per time step, summed over batches."""

    def __init__(self) -> None:
        self.images = 0
        self._loss = 0.0
        self._correct: list[int] = []

    def add(self, loss: float, correct: list[int], count: int) -> None:
        self.images += count
        self._loss += loss * count
        # In a biological unroll the first outputs come after some steps: fewer than `timesteps` of them.
        self._correct = [before + now for before, now in zip(self._correct or [0] * len(correct), correct, strict=True)]

    def loss(self) -> float:
        return self._loss / self.images

    def accuracy(self) -> tuple[float, ...]:
        return tuple((torch.tensor(self._correct) / self.images).tolist())


def describe_data(data: ImageFile, normalise: str = "data") -> dict[str, Any]:
    """What a checkpoint keeps of the data: categories, image size, their statistics, and what the network's input is normalised by.

    The latter are "mean" and "std" (scale 0-255): the statistics themselves ("data"), those that take 0-255 to -1..1 ("signed"), or
    ImageNet's.
    """
    statistics = {"mean": [float(value) for value in data.mean], "std": [float(value) for value in data.std]}
    of_input = {
        "data": statistics,
        "signed": {"mean": [127.5] * 3, "std": [127.5] * 3},
        "imagenet": {"mean": [255 * value for value in IMAGENET_MEAN], "std": [255 * value for value in IMAGENET_STD]},
    }
    return {
        "path": str(data.path),
        "image_size": data.image_size,
        "categories": list(data.categories),
        **of_input[normalise],
        "statistics": statistics,
    }


def config_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``rnndyn train --config`` reads."""
    require("yaml")

    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)


def _resume_from(config: TrainConfig, out: Path) -> Path | None:
    """The checkpoint to go on from, if any, after checking that the folder may be used."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    if config.resume:
        found = [out / name for name in (LAST, INITIAL) if (out / name).exists()]
        if not found:
            raise FileNotFoundError(f"resume: no {LAST} or {INITIAL} in {out}")
        return found[0]
    if out.exists() and any(out.iterdir()) and not config.overwrite:
        raise FileExistsError(f"out: {out} is not empty; use --resume to continue or --overwrite to replace the run")
    return None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
