"""The training loop."""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from rnndyn_fast.data import Batch
from rnndyn_fast.data.shards import open_images
from rnndyn_fast.file_io import write_text
from rnndyn_fast.job_device import check_precision, choose_device
from rnndyn_fast.ops.engines import check_runs_on_cpu
from rnndyn_fast.processes import Processes, processes
from rnndyn_fast.train.checkpoint import read_checkpoint, versions
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.health import FAILURE, MEASURED_IMAGES, activity, gradient_norms, keep_failure
from rnndyn_fast.train.metrics import CSV_NAME, JSONL_NAME, EpochMetrics, write_metrics
from rnndyn_fast.train.objective import clamped
from rnndyn_fast.train.progress import QuietReporter, Reporter, choose_reporter, percent, split_progress
from rnndyn_fast.train.rates import epochs_since_best, validation_accuracy
from rnndyn_fast.train.setup import config_yaml, describe_data, threads, training_images
from rnndyn_fast.train.signals import StopRequest
from rnndyn_fast.train.state import Progress, State
from rnndyn_fast.train.steps import Outcome
from rnndyn_fast.train.watch import PROFILE_AFTER, STEPS, TENSORBOARD, TRACE, WANDB_ID, Watchers, profiled

INITIAL, LAST, BEST, CONFIG, LOCK = "initial.pt", "last.pt", "best.pt", "train.yaml", ".lock"
_OWN_FILES = (INITIAL, LAST, BEST, CONFIG, CSV_NAME, JSONL_NAME, STEPS, FAILURE, WANDB_ID)


def kept_name(epoch: int | str) -> str:
    """File name of the checkpoint that is kept of an epoch (or pattern of such names)."""
    return f"epoch_{epoch}.pt"


def train(
    config: TrainConfig, *, reporter: Reporter | None = None, on_epoch: Callable[[Sequence[EpochMetrics]], None] | None = None
) -> Path:
    """Train a network, in one process or in those that `torchrun` started.

    In the folder ``config.out``: ``initial.pt`` (before training), ``last.pt`` (every epoch, every ``checkpoint_every`` steps, and when the
    run is stopped), ``best.pt`` (highest validation accuracy, see :func:`validation_accuracy`), ``epoch_<n>.pt`` (those in
    ``config.keep``), ``metrics.csv``, ``metrics.jsonl`` and ``train.yaml`` (this configuration). A resumed run computes what an
    uninterrupted one would have, bit for bit with the same number of threads and processes on a CPU, wherever it was killed.

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
        ValueError: the data is not of the layout; the run to resume has other options or other data; no such device, and why; more
            processes than images, or processes with other options.
        FloatingPointError: the loss or a gradient is not finite; names epoch and batch. The last checkpoint stays.
        Stopped: (a ``KeyboardInterrupt``) SIGTERM or Ctrl-C came; ``last.pt`` holds the step it came in.
        RuntimeError: another process failed; names it and its error.

    Deterministic: on a CPU, for a fixed number of threads and processes; a run may go on on another device.
    Memory: batches are read from disk as they are needed.
    """
    if config.replay_failure:
        raise ValueError("replay_failure: expected False; rnndyn_fast.train.health.replay(out) computes the step again")
    out = Path(config.out)
    device = choose_device(config.device)
    check_precision(config.precision, device)
    if device.type == "cpu":
        check_runs_on_cpu(config.engine)
    with ExitStack() as stack:
        group = stack.enter_context(processes(device))
        stack.enter_context(group.failing_together())
        _check_same(config, group)
        resume_from = group.together(lambda: _resume_from(config, out), only_first=True)
        shown = stack.enter_context((reporter or choose_reporter()) if group.rank == 0 else QuietReporter())
        images = group.together(lambda: training_images(config, shown.line, split_progress(shown)), only_first=True)
        data = open_images(images, ("train", "val"), "data")
        stack.enter_context(data)
        stack.enter_context(threads(config.threads))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        state = State(config, data, describe_data(data, config.normalise or "data"), device, group)
        if resume_from is not None:
            state.restore(resume_from, group.together(lambda: read_checkpoint(resume_from), only_first=True))
        group.together(lambda: stack.enter_context(_alone_in(out)), only_first=True)
        if group.rank == 0:
            _clear(config, out, resume_from is None)
            if resume_from is None:
                state.save(INITIAL)
            write_text(out / CONFIG, config_yaml(config.as_new()))
        request = stack.enter_context(StopRequest())
        watchers = stack.enter_context(Watchers(config, state.steps_done, active=group.rank == 0))
        if 0 < state.steps_left <= PROFILE_AFTER and config.profile:
            shown.line(f"profile: the first {PROFILE_AFTER} training steps are not profiled, and {state.steps_left} are left: no {TRACE}")
        profile = stack.enter_context(profiled(config.profile if group.rank == 0 else 0, out, device))
        _Run(state, shown, request, watchers, profile).go(on_epoch)
    return out / LAST


class _Run:
    """Takes a state from epoch to epoch."""

    def __init__(
        self, state: State, reporter: Reporter, request: StopRequest, watchers: Watchers, profile: Callable[[], None] = lambda: None
    ) -> None:
        self.state, self.config, self.reporter, self.request = state, state.config, reporter, request
        self.watchers, self.profile = watchers, profile
        self.batch: tuple[torch.Tensor, torch.Tensor] | None = None  # the last one, prepared
        self.norms: deque[torch.Tensor] = deque()  # of gradients of steps that are to be logged
        self.issued, self.stopping = 0, False
        state.steps.stop_asked = request.asked

    def go(self, on_epoch: Callable[[Sequence[EpochMetrics]], None] | None) -> None:
        """Train until `config.epochs` are done, or validation accuracy has stopped improving."""
        state, config, rows = self.state, self.config, self.state.rows
        while len(rows) < config.epochs:
            if config.patience is not None and epochs_since_best(config, rows) >= config.patience:
                self.reporter.line(f"validation accuracy has not improved for {config.patience} epochs: done")
                break
            if state.progress.step == 0:
                rate = state.schedule.begin_epoch(rows)
                if len(rows) >= config.lr_warmup and rate <= config.lr_least:
                    self.reporter.line(f"the learning rate has fallen to {rate:.3g}: done")
                    break
            row = self.epoch(len(rows) + 1)
            best = max((validation_accuracy(config, earlier) for earlier in rows), default=-1.0)
            rows.append(row)
            state.progress = Progress()
            # last.pt comes last: a run killed between these lines takes up what was before and writes them again.
            if state.group.rank == 0:
                write_metrics(state.out, rows)
            if validation_accuracy(config, row) > best:
                state.save(BEST)
            if row.epoch in config.keep:
                state.save(kept_name(row.epoch))
            state.save(LAST)
            self.watchers.epoch(row, state.steps_done)
            self.reporter.epoch(row, config.epochs)
            steps = len(row.train_accuracy) if config.loss == "sum" else 1
            if clamped(row.train_loss / steps, len(state.description["categories"])):
                self.reporter.line(
                    f"warning: the training loss of epoch {row.epoch} is that of answers that are sure and wrong (log-probabilities at "
                    f"their clamp): training has diverged; a smaller --lr than {config.lr:g} may help"
                )
            if on_epoch is not None:
                on_epoch(tuple(rows))

    def epoch(self, number: int) -> EpochMetrics:
        """What is left of one pass over the training images, and one over the validation images."""
        state, config, progress = self.state, self.config, self.state.progress
        start, before = time.perf_counter(), progress.seconds
        state.train_loader.set_epoch(number - 1, progress.step)
        state.net.train()
        self.reporter.start(f"epoch {number}/{config.epochs}", len(state.train_loader.split))
        if progress.images:
            self.reporter.advance(progress.images, "")
        self.issued, self.stopping = progress.step, False
        for outcome in self.outcomes(self.train_step, state.train_loader.batches(), self.due):
            loss, correct = outcome.read()
            if not outcome.finite:
                self.fail(number, loss)
            progress.add(loss, correct, outcome.images)
            progress.step += 1
            logged = self.logged(progress.step)
            if logged:
                progress.add_norms(gradient_norms(state.net, self.norms.popleft()))
            progress.seconds = before + time.perf_counter() - start
            progress.lr = state.schedule.current
            if self.late == 0:
                state.advance()
            speed = progress.images / progress.seconds
            text = f"loss {progress.mean_loss:.3f}  % {percent(progress.accuracy)}  {speed:.0f} images/s"
            self.reporter.advance(outcome.images, text)
            self.profile()
            if logged:
                self.log(number, loss, [count / outcome.images for count in correct], speed)
            self.stopping |= outcome.stop
            if self.due() and progress.step == self.issued:
                state.save(LAST)
                if self.stopping:
                    raise self.request.stopped()
        val = self.validate(number)
        averaged = None if state.average is None else self.validate(number, averaged=True)
        return EpochMetrics(
            epoch=number,
            train_loss=progress.mean_loss,
            train_accuracy=progress.accuracy,
            val_loss=val.mean_loss,
            val_accuracy=val.accuracy,
            images_per_s=progress.images / progress.seconds,
            seconds=before + time.perf_counter() - start,
            lr=progress.lr,
            ema_val_loss=None if averaged is None else averaged.mean_loss,
            ema_val_accuracy=() if averaged is None else averaged.accuracy,
            grad_norm={name: total / progress.logged for name, total in progress.grad_norms.items()},
            **self.activity(),
        )

    def activity(self) -> dict[str, Any]:
        """Norms and dead units by area and time step, of some validation images; the first process computes them."""
        state = self.state
        if state.group.rank != 0:
            return {}
        images = state.val_loader.split.read(np.arange(min(MEASURED_IMAGES, len(state.val_loader.split))))
        return dict(activity(state.net, state.prepared(*images)[0]))

    def log(self, epoch: int, loss: float, accuracy: list[float], speed: float) -> None:
        """Hand the numbers of a step to who watches."""
        progress = self.state.progress
        entry = {"step": self.state.steps_done, "epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": progress.lr}
        left = (self.config.epochs * len(self.state.train_loader) - self.state.steps_done) / max(1, progress.step)
        entry |= {"images_per_s": speed, "eta_s": left * progress.seconds, "grad_norm": progress.last_norms}
        self.watchers.step(entry)

    def validate(self, number: int, averaged: bool = False) -> Progress:
        """Loss and accuracy over the validation images, of the network or of its average."""
        state, total = self.state, Progress()
        state.net.eval()
        state.steps.share_buffers()
        self.reporter.start(f"validation {number}/{self.config.epochs}", len(state.val_loader.split))
        with torch.inference_mode():
            step = self.val_step_averaged if averaged else self.val_step
            for outcome in self.outcomes(step, state.val_loader.batches()):
                total.add(*outcome.read(), outcome.images)
                self.reporter.advance(outcome.images, f"loss {total.mean_loss:.3f}  % {percent(total.accuracy)}")
                if outcome.stop:  # the epoch's training is done; going on validates anew
                    state.save(LAST)
                    raise self.request.stopped()
        return total

    # ---------------------------------------------------------------- steps

    @property
    def late(self) -> int:
        """Batches that have been begun when one is asked about: a GPU never waits for work."""
        return 1 if self.state.device.type == "cuda" else 0

    def due(self) -> bool:
        """Whether what has been begun is to be finished and saved."""
        every = self.config.checkpoint_every
        within = self.issued < len(self.state.train_loader)
        return self.stopping or bool(every and within and self.issued % every == 0)

    def logged(self, step: int) -> bool:
        """Whether this step of the epoch, counted from 1, is logged."""
        return step == 1 or step % self.config.log_every == 0

    def train_step(self, batch: Batch) -> Outcome:
        """Forward, backward, update."""
        state = self.state
        state.seed(len(state.rows), self.issued)
        self.batch = state.prepared(batch.images, batch.labels)
        outcome = state.steps.train(*self.batch, batch.total)
        self.issued += 1
        if self.logged(self.issued):
            self.norms.append(state.steps.norms.clone())
        if self.late:
            state.advance()
        return outcome

    def val_step(self, batch: Batch) -> Outcome:
        """Forward alone."""
        return self.state.steps.evaluate(*self.state.prepared(batch.images, batch.labels), batch.total)

    def val_step_averaged(self, batch: Batch) -> Outcome:
        """Forward alone, of the average of the network."""
        return self.state.steps.evaluate(*self.state.prepared(batch.images, batch.labels), batch.total, averaged=True)

    def outcomes(
        self, step: Callable[[Batch], Outcome], batches: Iterable[Batch], due: Callable[[], bool] = lambda: False
    ) -> Iterator[Outcome]:
        """What came of each batch. A GPU is asked when it has been given the next one, unless all that was begun is `due`."""
        waiting: deque[Outcome] = deque()
        for batch in batches:
            waiting.append(step(batch))
            while waiting and (len(waiting) > self.late or due()):
                yield waiting.popleft()
        yield from waiting

    def fail(self, epoch: int, loss: float) -> None:
        """End the run at a loss or gradient that is not finite; state and batch are kept."""
        state = self.state
        place = f"epoch {epoch}, batch {state.progress.step + 1} of {len(state.train_loader)}"
        assert self.batch is not None
        if self.late:  # the batch after it has been begun; parameters are those before
            kept = "the checkpoint before it is kept"
            raise FloatingPointError(f"loss or gradient is not finite in {place}; {kept} in {state.out}")
        origin = keep_failure(state, *self.batch)
        what = f"loss is {loss}" if math.isnan(loss) and origin.what != "gradient" else "a gradient is not finite"
        raise FloatingPointError(
            f"{what} in {place}; {origin}. A smaller lr than {self.config.lr} may help. State and batch are kept: "
            f"rnndyn train --config {state.out / CONFIG} --replay-failure"
        )


def _check_same(config: TrainConfig, group: Processes) -> None:
    """Raise in all processes unless they have the same versions and options."""
    own = versions()
    for rank, other in enumerate(group.all_of(own)):
        if other != own:
            told = ["; ".join(f"{name} {version}" for name, version in one.items()) for one in (own, other)]
            raise ValueError(f"processes: expected the same versions in all; process {group.rank} has {told[0]}, process {rank} {told[1]}")
    mine = {name: value for name, value in config.to_dict().items() if name not in ("device", "data", "out")}
    for rank, other in enumerate(group.all_of(mine)):
        different = [name for name in mine if other[name] != mine[name]]
        if different:
            raise ValueError(f"options: expected the same in every process, process {rank} has another {', '.join(different)}")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder while the block lasts. Raises ValueError where one is in it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"out: another run is writing to {out}") from None
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()


def _leftovers(out: Path) -> list[Path]:
    """What a killed run was about to write: temporary files of :func:`rnndyn_fast.file_io.replaced_atomically`."""
    own = [name.partition(".")[0] for name in _OWN_FILES]
    return [path for stem in (*own, "epoch_*") for path in out.glob(f".{stem}.*") if path.suffix in (".pt", ".csv", ".jsonl", ".yaml")]


def _clear(config: TrainConfig, out: Path, anew: bool) -> None:
    """Remove what a killed run has left half-written, and to begin anew with `overwrite` the files of the run before."""
    for path in _leftovers(out):
        path.unlink(missing_ok=True)
    if anew and config.overwrite:
        for path in (*(out / name for name in _OWN_FILES), *out.glob(kept_name("*"))):
            path.unlink(missing_ok=True)
        shutil.rmtree(out / TENSORBOARD, ignore_errors=True)


def _resume_from(config: TrainConfig, out: Path) -> Path | None:
    """The checkpoint to go on from, if any, after checking that the folder may be used."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    if config.resume:
        found = [out / name for name in (LAST, INITIAL) if (out / name).exists()]
        if not found:
            raise FileNotFoundError(f"resume: no {LAST} or {INITIAL} in {out}; without resume the run begins")
        return found[0]
    if out.exists() and set(out.iterdir()) - {out / LOCK, *_leftovers(out)} and not config.overwrite:
        raise FileExistsError(f"out: {out} is not empty; use --resume to go on or --overwrite to replace the run")
    return None
