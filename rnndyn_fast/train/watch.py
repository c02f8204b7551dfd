"""Where the numbers of a run go while it trains: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from rnndyn_fast.file_io import write_text
from rnndyn_fast.optional import require
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.metrics import EpochMetrics

STEPS, TRACE, TENSORBOARD, WANDB_ID = "steps.jsonl", "trace.json", "tensorboard", "wandb_id.txt"
PROFILE_AFTER = 3  # steps that are not profiled: they allocate and compile


class Watcher(Protocol):
    """Takes the numbers of training steps and of epochs."""

    def step(self, entry: dict[str, Any]) -> None:
        """Numbers of a training step; entry["step"] counts from the run's start."""

    def epoch(self, row: EpochMetrics, step: int) -> None:
        """Metrics of an epoch that ended with this step."""


class StepFile:
    """``steps.jsonl``, a line for each entry. What comes after the step that a run goes on from is removed first."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [entry for entry in read_steps(path) if entry["step"] <= done]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._stream = path.open("a", encoding="utf-8")

    def step(self, entry: dict[str, Any]) -> None:
        """Append a line."""
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()

    def epoch(self, row: EpochMetrics, step: int) -> None:
        """Epochs have files of their own."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of steps; none where there is no file. A last line that a killed run has not finished is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers in nested dicts and lists by path: {"accuracy": [0.5]} is {"accuracy/t0": 0.5}. What is no finite number is left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            found |= flat({f"t{t}": item for t, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = value
    return found


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def step(self, entry: dict[str, Any]) -> None:
        for name, value in flat(entry, "step/").items():
            self._writer.add_scalar(name, value, entry["step"])

    def epoch(self, row: EpochMetrics, step: int) -> None:
        for name, value in flat(row.to_dict(), "epoch/").items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig) -> None:
        require("wandb")
        import wandb

        known = Path(config.out) / WANDB_ID  # a run that goes on is the same one
        if not known.exists():
            write_text(known, secrets.token_hex(8))
        identity: dict[str, Any] = {"id": known.read_text(encoding="utf-8"), "name": Path(config.out).name, "resume": "allow"}
        try:
            self._run = wandb.init(project=config.wandb, dir=config.out, config=config.to_dict(), **identity)
        except Exception as error:  # (of its own classes: no key, no network, ...)
            hint = "WANDB_MODE=offline writes files that wandb sync sends later"
            raise RuntimeError(f"wandb: {' '.join(str(error).split())} ({hint})") from error

    def step(self, entry: dict[str, Any]) -> None:
        self._run.log(flat(entry, "step/"), step=entry["step"])

    def epoch(self, row: EpochMetrics, step: int) -> None:
        self._run.log(flat(row.to_dict(), "epoch/"), step=step)

    def close(self) -> None:
        self._run.finish()


class Watchers:
    """All that a configuration asks for, in the first process; a context manager.

    Args:
        config: `tensorboard`, `wandb`.
        done: training steps before this one.
        active: whether this process writes.
    """

    def __init__(self, config: TrainConfig, done: int, active: bool = True) -> None:
        self._stack = ExitStack()
        self._all: list[Any] = []
        if active:
            out = Path(config.out)
            self._add(StepFile(out / STEPS, done))
            if config.tensorboard:
                self._add(_TensorBoard(out / TENSORBOARD, done))
            if config.wandb is not None:
                self._add(_Wandb(config))

    def _add(self, watcher: Any) -> None:
        self._all.append(watcher)
        self._stack.callback(watcher.close)

    def __enter__(self) -> Watchers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, entry: dict[str, Any]) -> None:
        """To all."""
        for watcher in self._all:
            watcher.step(entry)

    def epoch(self, row: EpochMetrics, step: int) -> None:
        """To all."""
        for watcher in self._all:
            watcher.epoch(row, step)


@contextmanager
def profiled(steps: int, out: Path, device: torch.device) -> Iterator[Any]:
    """A function to call after every training step; after three of them and `steps` more, ``trace.json`` is written, which Perfetto
    (ui.perfetto.dev) opens. With 0 steps it does nothing."""
    if not steps:
        yield lambda: None
        return
    activity = torch.profiler.ProfilerActivity
    of_device = {"cuda": activity.CUDA, "xpu": activity.XPU}.get(device.type, activity.CPU)
    kinds = {activity.CPU, of_device} & torch.profiler.supported_activities()
    schedule = torch.profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=steps, repeat=1)

    def ready(profiler: torch.profiler.profile) -> None:
        if profiler.step_num > PROFILE_AFTER:  # (a run of fewer steps has recorded none)
            profiler.export_chrome_trace(str(out / TRACE))

    with torch.profiler.profile(activities=kinds, schedule=schedule, record_shapes=True, on_trace_ready=ready) as profiler:
        yield profiler.step
