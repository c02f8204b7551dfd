"""Everything that determines the training of networks on modulo arithmetic: one of them, or a sweep."""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn_train import AdamW
from rnndyn_fast.tasks import ModuloArithmetic
from rnndyn_fast.train.options import check_least, check_type, option

# What a resumed run may change: how and how long it runs, not what it computes.
_FREE_ON_RESUME = ("out", "epochs", "threads", "backend", "save_every_s", "published", "resume", "overwrite")


@dataclass(frozen=True)
class Job:
    """One network of a run: its number, the seed of all that is random about it, and its settings."""

    job_id: int
    seed: int
    alpha: float
    noise_std: float
    activation: Activation


@dataclass(frozen=True)
class _PhaseConfig(ABC):
    out: str = field(metadata={"help": "folder of the run: networks.npz, results, progress, checkpoint"})
    epochs: int = option(1000, "epochs at most, those before a resume included")
    stop_loss: float | None = option(0.001, "stop a network after the epoch whose validation error is at most this; none: never")
    hidden: int = option(100, "units")
    modulus: int = option(3, "m: symbols are 0 .. m - 1, accepted where their sum is 0 modulo m")
    pulses: int = option(3, "symbols per trial")
    gap: int = option(5, "least number of steps between two onsets")
    window: int = option(40, "number of steps at which symbols may begin")
    timesteps: int = option(50, "time steps of a trial")
    train_trials: int = option(2500, "trials of the training set, half of them accepted")
    batch_size: int = option(16, "trials per training step")
    lr: float = option(1e-4, "learning rate of AdamW, constant")
    weight_decay: float = option(1e-4, "decoupled, of all parameters")
    clip_norm: float = option(0.0, "clip the gradient's norm at this; 0: do not")
    loss_steps: int = option(3, "last steps of a trial whose output counts")
    activity_weight: float = option(1e-4, "weight of the mean squared rate in the loss")
    backend: Literal["native", "reference"] | None = option(None, "native kernels, plain PyTorch, or whichever can run")
    threads: int | None = option(None, "CPU threads; default: PyTorch's. Results do not depend on it")
    save_every_s: float = option(30.0, "seconds between checkpoints")
    resume: bool = option(False, "continue from the checkpoint in `out`")
    overwrite: bool = option(False, "replace a run that is in `out`")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):  # YAML and JSON have lists only
                object.__setattr__(self, item.name, tuple(value))
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name in ("epochs", "hidden", "train_trials", "batch_size", "loss_steps"):
            check_least(name, getattr(self, name), 1)
        check_least("seed", getattr(self, "seed", 0), 0)
        if self.threads is not None:
            check_least("threads", self.threads, 1)
        for name in ("lr", "save_every_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm", "activity_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if self.stop_loss is not None and not self.stop_loss > 0:
            raise ValueError(f"stop_loss: expected a positive number or none, got {self.stop_loss}")
        if self.batch_size > self.train_trials:
            raise ValueError(f"batch_size: expected at most train_trials = {self.train_trials}, got {self.batch_size}")
        if self.loss_steps > self.timesteps:
            raise ValueError(f"loss_steps: expected at most timesteps = {self.timesteps}, got {self.loss_steps}")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them, got both")
        _ = self.task  # raises for a task that does not fit
        for job in self.jobs():
            if not 0 < job.alpha <= 1:
                raise ValueError(f"alpha: expected values in (0, 1], got {job.alpha}")
            if not (math.isfinite(job.noise_std) and job.noise_std >= 0):
                raise ValueError(f"noise_std: expected finite values of at least 0, got {job.noise_std}")

    @property
    def task(self) -> ModuloArithmetic:
        """What the networks learn."""
        return ModuloArithmetic(self.modulus, self.pulses, self.timesteps, gap=self.gap, window=self.window)

    @property
    def optimiser(self) -> AdamW:
        """AdamW as asked for."""
        return AdamW(weight_decay=self.weight_decay, clip_norm=self.clip_norm)

    @abstractmethod
    def jobs(self) -> list[Job]:
        """The networks to train."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types, for JSON, YAML and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}

    def as_new(self) -> Self:
        """The same run without `resume` and `overwrite`: goes on record, so that using it again replaces nothing."""
        return dataclasses.replace(self, resume=False, overwrite=False)

    def check_resumes(self, earlier: dict[str, Any]) -> None:
        """Raise ValueError, listing the differences, unless this is the run `earlier` (its ``to_dict``), only longer or elsewhere."""
        now = self.to_dict()
        different = [
            f"{name} was {earlier.get(name)!r}, is {now[name]!r}"
            for name in now
            if name not in _FREE_ON_RESUME and earlier.get(name) != now[name]
        ]
        if different:
            raise ValueError(f"resume: the run in {self.out} was started with other options: {'; '.join(different)}")


@dataclass(frozen=True)
class PhaseTrainConfig(_PhaseConfig):
    """Training of one network; the defaults are the settings of the published phase-code network (500 epochs, no early stop).

    What each field means is in its ``metadata["help"]``, which is also what ``rnndyn phase train --help`` prints.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Source: Murray, arXiv 2310.07908, and its published code.
    """

    epochs: int = option(500, "epochs at most, those before a resume included")
    stop_loss: float | None = option(None, "stop after the epoch whose validation error is at most this; default: never")
    alpha: float = option(1.0, "time step over time constant, in (0, 1]")
    noise_std: float = option(0.05, "standard deviation of the noise, inside the leak's bracket")
    activation: Literal["tanh", "relu", "sigmoid", "softplus", "identity"] = option("tanh", "rate as a function of state")
    seed: int = option(69, "of everything random")

    def jobs(self) -> list[Job]:
        """The one network."""
        return [Job(0, self.seed, self.alpha, self.noise_std, Activation(self.activation))]


@dataclass(frozen=True)
class PhaseSweepConfig(_PhaseConfig):
    """Training of a grid of networks together; the defaults are the published grid of 90.

    Jobs are numbered with alpha outermost, then noise, activation and repetition, as published. What each field means is in its
    ``metadata["help"]``, which is also what ``rnndyn phase sweep --help`` prints.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Source: Murray, arXiv 2310.07908, and its published code.
    """

    alphas: tuple[float, ...] = option((0.1, 0.5, 1.0), "time step over time constant, each in (0, 1]")
    noise_stds: tuple[float, ...] = option((0.0, 0.05, 0.1), "standard deviations of the noise")
    activations: tuple[str, ...] = option(("tanh", "relu"), "rates as functions of state")
    repeats: int = option(5, "networks per combination")
    seed: int = option(420, "from which every network's own seed is drawn")
    published: str | None = option(None, "CSV of the published sweep, to compare the results with")

    def jobs(self) -> list[Job]:
        """The networks, in the published order."""
        check_least("repeats", self.repeats, 1)
        for name in ("alphas", "noise_stds", "activations"):
            values: Sequence[Any] = getattr(self, name)
            if not values:
                raise ValueError(f"{name}: expected at least one, got none")
        known = [a.value for a in Activation]
        for name in self.activations:
            if name not in known:
                raise ValueError(f"activations: expected some of {', '.join(known)}, got {name!r}")
        grid = [(a, s, f) for a in self.alphas for s in self.noise_stds for f in self.activations for _ in range(self.repeats)]
        seeds = np.random.SeedSequence(self.seed).generate_state(len(grid)).tolist()
        return [Job(k, seed, a, s, Activation(f)) for k, (seed, (a, s, f)) in enumerate(zip(seeds, grid, strict=True))]
