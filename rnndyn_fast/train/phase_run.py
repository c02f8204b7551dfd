"""Training of networks on modulo arithmetic: one, or a sweep of many together, each stopping at its criterion."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.file_io import reads, write_text, written_whole
from rnndyn_fast.nn import CTRNN
from rnndyn_fast.ops.ctrnn_train import ctrnn_train
from rnndyn_fast.optional import require
from rnndyn_fast.reference.ctrnn_train import CtrnnTraining, split_parameters
from rnndyn_fast.train.checkpoint import versions
from rnndyn_fast.train.phase_config import Job, PhaseSweepConfig, PhaseTrainConfig
from rnndyn_fast.train.phase_results import (
    COMPARISON,
    HISTORY,
    NETWORKS,
    RESULTS_CSV,
    RESULTS_JSON,
    NetworkResult,
    read_published,
    save_networks,
    write_history,
    write_results,
)
from rnndyn_fast.train.progress import Reporter, choose_reporter
from rnndyn_fast.train.setup import threads

FORMAT = "rnndyn_fast.phase_run/1"
CHECKPOINT, CONFIG = "checkpoint.pt", "phase.yaml"
_OWN_FILES = (CHECKPOINT, CONFIG, NETWORKS, RESULTS_CSV, RESULTS_JSON, HISTORY, COMPARISON)
PhaseConfig = PhaseTrainConfig | PhaseSweepConfig


def train_phase(config: PhaseConfig, *, reporter: Reporter | None = None) -> Path:
    """Train one network (:class:`PhaseTrainConfig`) or a grid of them together (:class:`PhaseSweepConfig`).

    Every network has its own seed, and with it its own initial weights, trials, order of trials and noise, so that what becomes of it
    depends neither on the others nor on threads. A network leaves the batch when its validation error reaches ``stop_loss`` or is no
    longer finite. Its weights are those of the epoch with the least validation error, or the last ones where there is no ``stop_loss``.

    In the folder ``config.out``: ``networks.npz`` (:func:`rnndyn_fast.train.load_networks`), ``results.csv`` and ``results.json`` (a row
    per network), ``history.csv`` (a row per network and epoch), ``comparison.json`` (with the published sweep, if given), ``phase.yaml``
    and ``checkpoint.pt``. A run that was killed and is resumed computes what it would have without, bit for bit.

    Args:
        config: what to do.
        reporter: shows progress; None chooses a bar or lines.

    Returns:
        The path of ``networks.npz``.

    Raises:
        FileNotFoundError: nothing to resume, or no file ``published``.
        FileExistsError: ``config.out`` is not empty and neither `resume` nor `overwrite` is set.
        ValueError: the run to resume has other options.

    Deterministic: yes. Memory: the data sets, 2 MB per network at the published sizes.
    """
    require("yaml")
    import yaml

    out = Path(config.out)
    published = getattr(config, "published", None)
    if published is not None:
        read_published(published)  # raises now rather than after hours
    _check_folder(config, out)
    with threads(config.threads):
        run = _Run(config)
        if config.resume:
            run.restore(read_run(out / CHECKPOINT))
        else:
            for name in _OWN_FILES:
                (out / name).unlink(missing_ok=True)
        write_text(out / CONFIG, yaml.safe_dump(config.as_new().to_dict(), sort_keys=False))
        with reporter or choose_reporter() as shown:
            run.go(shown)
    return out / NETWORKS


@reads("checkpoint of phase train")
def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``checkpoint.pt``. No code from the file is run (``weights_only=True``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, or a truncated one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"resume: no {path.name} in {path.parent}")
    try:
        contents = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds, by kind of damage
        raise ValueError(f"resume: {path} is truncated or not a PyTorch file ({type(error).__name__})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"resume: {path} is not a checkpoint of rnndyn phase (format {FORMAT!r})")
    return contents


def _generator(seed: int, *path: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, *path]))


def _number(seed: int, *path: int) -> int:
    """A seed for something else, 63 bits."""
    return int(_generator(seed, *path).integers(2**63))


# What a network's seed is used for.
_WEIGHTS, _TRAIN, _VALIDATION, _NOISE, _ORDER = range(5)


class _Run:
    def __init__(self, config: PhaseConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.jobs = config.jobs()
        self.batches = config.train_trials // config.batch_size
        self.training = _build(config, self.jobs)
        count = len(self.jobs)
        # Of the epoch with the least validation error so far (epochs from 0): error, accuracy, epoch, parameters.
        self.best_loss = torch.full((count,), math.inf, dtype=torch.float64)
        self.best_accuracy = torch.zeros(count, dtype=torch.float64)
        self.best_epoch = torch.full((count,), -1, dtype=torch.int64)
        self.best = self.training.parameters.clone()
        self.reached = torch.zeros(count, dtype=torch.bool)
        self.diverged = torch.zeros(count, dtype=torch.bool)
        self.history: list[Tensor] = [torch.empty(0, 3, 3, dtype=torch.float64) for _ in self.jobs]
        self.seconds = 0.0

    def active(self) -> list[int]:
        """Networks that are not done."""
        todo = ~self.reached & ~self.diverged & (self.training.epoch < self.config.epochs)
        return torch.nonzero(todo).flatten().tolist()

    def go(self, reporter: Reporter) -> None:
        """Train until no network is left."""
        reporter.start("network epochs (at most)", len(self.jobs) * self.config.epochs)
        reporter.advance(int(self.training.epoch.sum()), "")
        saved = time.monotonic()
        while chosen := self.active():
            start = time.perf_counter()
            self.epoch(chosen, reporter)
            took = time.perf_counter() - start
            self.seconds += took
            epoch = int(self.training.epoch[chosen].max())
            text = f"{len(chosen)} of {len(self.jobs)} networks left, epoch {epoch}, {len(chosen) / took:.1f} network epochs/s"
            reporter.advance(len(chosen), text)
            if time.monotonic() - saved > self.config.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()
        reporter.line(self.summary())

    def epoch(self, chosen: list[int], reporter: Reporter) -> None:
        """One epoch of the networks `chosen`, and what follows from it."""
        t = self.training
        for m in chosen:
            order = _generator(self.jobs[m].seed, _ORDER, int(t.epoch[m])).permutation(self.config.train_trials)
            t.order[m] = torch.from_numpy(order[: t.order.shape[1]])
        ctrnn_train(t, chosen, backend=self.config.backend)
        for m in chosen:
            metrics = t.metrics[m].clone()
            self.history[m] = torch.cat([self.history[m], metrics[None]])
            loss, epoch = float(metrics[2, 0]), int(t.epoch[m])
            if not bool(torch.isfinite(metrics).all()):
                self.diverged[m] = True
                reporter.line(f"network {m}: no longer finite in epoch {epoch}; stopped")
            elif loss < self.best_loss[m] or self.config.stop_loss is None:
                self.best_loss[m], self.best_accuracy[m], self.best_epoch[m] = loss, metrics[2, 2], epoch
                self.best[m] = t.parameters[m]
            if self.config.stop_loss is not None and loss <= self.config.stop_loss:
                self.reached[m] = True
                reporter.line(f"{describe(self.jobs[m])}: validation error {loss:.2e} after epoch {epoch}")
        t.epoch[chosen] += 1

    def results(self) -> list[NetworkResult]:
        """A row per network."""
        rows = []
        for m, job in enumerate(self.jobs):
            epochs = int(self.training.epoch[m])
            status = "reached" if self.reached[m] else "diverged" if self.diverged[m] else "running" if m in self.active() else "finished"
            rows.append(
                NetworkResult(
                    job_id=job.job_id,
                    seed=job.seed,
                    best_loss=float(self.best_loss[m]) if epochs else None,
                    best_accuracy=float(self.best_accuracy[m]) if epochs else None,
                    final_epoch=epochs - 1 if self.reached[m] else None,
                    alpha=job.alpha,
                    noise=job.noise_std,
                    activation_fn=job.activation.value,
                    epochs=epochs,
                    status=status,
                )
            )
        return rows

    def networks(self) -> CTRNN:
        """The networks with their best weights."""
        return _network(self.jobs, self.best, self.config.modulus, self.config.hidden)

    def summary(self) -> str:
        """One line about what became of the networks."""
        count = int(self.reached.sum())
        if self.config.stop_loss is None:
            errors = ", ".join(f"{loss:.2e}" for loss in self.best_loss.tolist()[:3])
            return f"{len(self.jobs)} networks trained; validation error {errors}"
        return f"{count} of {len(self.jobs)} networks reached a validation error of {self.config.stop_loss:g}; {self.seconds:.0f} s"

    def save(self) -> None:
        """Results, networks and checkpoint, atomically. The checkpoint comes last: a run killed before it takes up the
        one before and writes the others again."""
        rows = self.results()
        write_results(self.out, rows, self.config.to_dict(), self.seconds, getattr(self.config, "published", None))
        write_history(self.out / HISTORY, rows, self.history)
        save_networks(self.out / NETWORKS, self.networks(), rows)
        state = {name: getattr(self.training, name) for name in ("parameters", "first_moment", "second_moment", "epoch")}
        own = {name: getattr(self, name) for name in ("best_loss", "best_accuracy", "best_epoch", "best", "reached", "diverged", "history")}
        contents = {"config": self.config.to_dict(), "training": state, "run": own, "seconds": self.seconds, "versions": versions()}
        with written_whole(self.out / CHECKPOINT) as file:
            torch.save({"format": FORMAT, **contents}, file)

    def restore(self, contents: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.config.check_resumes(contents["config"])
        for name, value in contents["training"].items():
            getattr(self.training, name).copy_(value)
        for name, value in contents["run"].items():
            setattr(self, name, value)
        self.seconds = float(contents["seconds"])


def describe(job: Job) -> str:
    """A network in a few words."""
    return f"network {job.job_id} (alpha {job.alpha:g}, noise {job.noise_std:g}, {job.activation.value})"


def _build(config: PhaseConfig, jobs: list[Job]) -> CtrnnTraining:
    task, count, batch = config.task, len(jobs), config.batch_size
    train = [task.train_set(_number(job.seed, _TRAIN), config.train_trials) for job in jobs]
    validation = [task.validation_set(_number(job.seed, _VALIDATION)) for job in jobs]
    shown = len(validation[0]) // batch * batch or len(validation[0])  # whole batches, as published: 896 of 900
    net = CTRNN(count, task.inputs, config.hidden, seeds=[_number(job.seed, _WEIGHTS) for job in jobs])
    parameters = torch.cat([net.get_parameter(name).detach().flatten(1) for name in ("w_rec", "w_in", "b_rec", "w_out", "b_out")], 1)
    return CtrnnTraining(
        train_inputs=torch.stack([t.inputs for t in train]),
        train_labels=torch.stack([t.labels for t in train]),
        order=torch.zeros(count, config.train_trials // batch * batch, dtype=torch.int64),
        val_inputs=torch.stack([t.inputs[:shown] for t in validation]),
        val_labels=torch.stack([t.labels[:shown] for t in validation]),
        h0=net.h0,
        alpha=torch.tensor([job.alpha for job in jobs]),
        noise_std=torch.tensor([job.noise_std for job in jobs]),
        activations=tuple(job.activation for job in jobs),
        seeds=torch.tensor([_number(job.seed, _NOISE) for job in jobs]),
        epoch=torch.zeros(count, dtype=torch.int64),
        learning_rate=torch.full((count,), config.lr),
        parameters=parameters,
        first_moment=torch.zeros_like(parameters),
        second_moment=torch.zeros_like(parameters),
        metrics=torch.zeros(count, 3, 3, dtype=torch.float64),
        batch=batch,
        loss_steps=config.loss_steps,
        activity_weight=config.activity_weight,
        optimiser=config.optimiser,
    )


def _network(jobs: list[Job], rows: Tensor, inputs: int, hidden: int) -> CTRNN:  # [M, P]
    net = CTRNN(
        len(jobs),
        inputs,
        hidden,
        alpha=[job.alpha for job in jobs],
        noise_std=[job.noise_std for job in jobs],
        activation=[job.activation for job in jobs],
        seeds=[0] * len(jobs),
    )
    net.load_state_dict(split_parameters(rows, inputs, hidden), strict=False)
    return net


def _check_folder(config: PhaseConfig, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    if not config.resume and out.exists() and any(out.iterdir()) and not config.overwrite:
        raise FileExistsError(f"out: {out} is not empty; use --resume to go on or --overwrite to replace the run")
