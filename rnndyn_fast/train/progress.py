"""What a run shows while it goes: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from rnndyn_fast.optional import require
from rnndyn_fast.train.metrics import EpochMetrics

TABLE_ROWS = 12  # epochs


class Reporter(Protocol):
    """Shows the progress of a run; a context manager."""

    def __enter__(self) -> Reporter: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def start(self, text: str, total: int) -> None:
        """A stretch of `total` images begins."""

    def advance(self, images: int, text: str) -> None:
        """`images` more are done."""

    def line(self, text: str) -> None:
        """A line that stays."""

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """An epoch of that many is done."""


class QuietReporter:
    """Shows nothing."""

    def __enter__(self) -> QuietReporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def start(self, text: str, total: int) -> None:
        """Shows nothing."""

    def advance(self, images: int, text: str) -> None:
        """Shows nothing."""

    def line(self, text: str) -> None:
        """Shows nothing."""

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """As a line."""
        self.line(epoch_line(row, epochs))


class PlainReporter(QuietReporter):
    """Lines on standard output, at most one per `every_s` seconds within a stretch."""

    def __init__(self, every_s: float = 20.0) -> None:
        self.every_s = every_s
        self._text, self._done, self._total, self._last = "", 0, 0, 0.0

    def start(self, text: str, total: int) -> None:
        """A stretch of `total` images begins."""
        self._text, self._done, self._total, self._last = text, 0, total, time.monotonic()

    def advance(self, images: int, text: str) -> None:
        """Prints a line if the last one is `every_s` seconds old."""
        self._done += images
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            self.line(f"  {self._text} {self._done}/{self._total} {text}")

    def line(self, text: str) -> None:
        """Prints `text`."""
        print(text, flush=True)


class RichReporter(QuietReporter):
    """A progress bar with images/s and the time left, and a table of the last epochs: loss, accuracy by time step, images/s, time left."""

    def __init__(self, console: Any = None) -> None:
        require("rich")
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
        )
        self._task: Any = None
        self._rows: list[tuple[EpochMetrics, int]] = []
        self._live = Live(get_renderable=self._shown, console=console or Console(), refresh_per_second=4)

    def __enter__(self) -> RichReporter:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._live.stop()

    def start(self, text: str, total: int) -> None:
        """A bar for `total` images takes the place of the one before."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=total, text="")

    def advance(self, images: int, text: str) -> None:
        """Moves the bar on."""
        self._progress.update(self._task, advance=images, text=text)

    def line(self, text: str) -> None:
        """Prints `text` above the bar."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def epoch(self, row: EpochMetrics, epochs: int) -> None:
        """A row of the table."""
        self._rows = [*self._rows, (row, epochs)][-TABLE_ROWS:]
        self._live.refresh()

    def _shown(self) -> Any:
        require("rich")
        from rich.console import Group

        return Group(epoch_table(self._rows), self._progress) if self._rows else self._progress


def epoch_table(rows: Sequence[tuple[EpochMetrics, int]]) -> Any:
    """A rich table of epochs, each with the number of all epochs: losses, accuracy by time step in percent, images/s, time left."""
    require("rich")
    from rich.table import Table

    table = Table("epoch", "loss", "val loss", "train % by time step", "val % by time step", "images/s", "left")
    for row, epochs in rows:
        accuracies = (percent(row.train_accuracy), percent(row.ema_val_accuracy or row.val_accuracy))
        loss = row.val_loss if row.ema_val_loss is None else row.ema_val_loss
        left = duration((epochs - row.epoch) * row.seconds)
        table.add_row(f"{row.epoch}/{epochs}", f"{row.train_loss:.3f}", f"{loss:.3f}", *accuracies, f"{row.images_per_s:.0f}", left)
    return table


def duration(seconds: float) -> str:
    """As hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def choose_reporter(quiet: bool = False) -> Reporter:
    """Nothing if `quiet`, a bar in a terminal where rich is installed, plain lines otherwise."""
    if quiet:
        return QuietReporter()
    if sys.stdout.isatty():
        try:
            return RichReporter()
        except ImportError:
            pass
    return PlainReporter()


def percent(accuracy: Sequence[float]) -> str:
    """Accuracies per time step in percent, as `31 40 45`."""
    return " ".join(f"{100 * a:.0f}" for a in accuracy)


def epoch_line(row: EpochMetrics, epochs: int) -> str:
    """One line about a finished epoch."""
    return (
        f"epoch {row.epoch}/{epochs}  loss {row.train_loss:.3f}  val {row.val_loss:.3f}  "
        f"train % {percent(row.train_accuracy)}  val % {percent(row.val_accuracy)}  "
        f"{row.images_per_s:.0f} images/s  {row.seconds:.0f} s  left {duration((epochs - row.epoch) * row.seconds)}"
    )


def split_progress(reporter: Reporter) -> Callable[[str, int, int], None]:
    """The progress callback of `rnndyn_fast.data.make_dataset` that shows on `reporter`: a stretch per split."""
    current, shown = "", 0

    def progress(split: str, done: int, total: int) -> None:
        nonlocal current, shown
        if split != current:
            reporter.start(split, total)
            current, shown = split, 0
        reporter.advance(done - shown, "")
        shown = done

    return progress
