"""The demo: data, two small networks, extraction, analysis, report, by the functions that the commands call."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnndyn_fast.analysis import ReadoutZoneResult, analyse
from rnndyn_fast.data import SPLITS, ImageFile, load_source, make_dataset
from rnndyn_fast.extract import extract
from rnndyn_fast.files import write_text
from rnndyn_fast.train import Reporter, TrainConfig, choose_reporter, read_metrics, train
from rnndyn_fast.train.loop import INITIAL, LAST
from rnndyn_fast.train.progress import split_progress

REPORT, TIMES = "report.html", "seconds.json"
INTERACTIONS = ("additive", "multiplicative")
# What the published analysis looks at is decided by samples that change their mind, a few in a hundred of `testplus`.
IMAGES = {"train": 8000, "val": 1000, "test": 1000, "testplus": 6000}
IMAGES_SEEN = 32_000


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; the fields' help is what ``rnndyn demo --help`` prints.

    The default takes minutes on two cores.
    """

    out: str = _option("demo", "folder for data, runs, results and report.html")
    source: str = _option("auto", "fashion-mnist, digits, or auto: the first of them that is installed")
    size: int = _option(32, "image height and width in pixels")
    max_images: int | None = _option(None, "at most that many images per split")
    widths: tuple[int, ...] = _option((8, 16, 32, 48, 64), "channels of retina, V1, V2, V4, IT")
    timesteps: int = _option(8, "time steps T")
    epochs: int | None = _option(None, "epochs; default: enough for 32,000 images")
    batch_size: int = _option(64, "images per training step")
    seed: int = _option(0, "of data, weights and order")
    threads: int | None = _option(None, "CPU threads in training; default: PyTorch's")
    backend: str | None = _option(None, "native, reference; default: whichever can run")
    overwrite: bool = _option(False, "start from nothing; otherwise an interrupted demo goes on where it stopped")

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in ("max_images", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size: expected a multiple of 8, got {self.size}")
        # What training would refuse is refused now, not after the data are made.
        names = ("out", "timesteps", "widths", "batch_size", "seed", "threads", "backend")
        TrainConfig.from_dict({"data": "", **{name: getattr(self, name) for name in names}})


@dataclass(frozen=True)
class NetworkRun:
    """What the demo has of one network."""

    name: str  # "additive", "multiplicative"
    config: TrainConfig
    metrics: list[Any]  # EpochMetrics
    parameters: int
    trained: ReadoutZoneResult
    untrained: ReadoutZoneResult


@dataclass
class DemoRecord:
    """What the report is about."""

    config: DemoConfig
    data_path: Path
    commands: list[str] = field(default_factory=list)
    runs: list[NetworkRun] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(config: DemoConfig, *, reporter: Reporter | None = None) -> Path:
    """Make data, train a lateral network and its multiplicative twin, extract testplus, analyse, write the report.

    Args:
        config: sizes and where to.
        reporter: shows progress; None chooses a bar or lines.

    Returns:
        The path of the report.

    Raises:
        FileExistsError: there is a report and `overwrite` is False.
        ValueError: the folder holds an interrupted demo with other options.
        FileNotFoundError, ImportError: the images are not installed; says how to get them.
    """
    out = Path(config.out)
    if (out / REPORT).exists() and not config.overwrite:
        raise FileExistsError(f"out: {out / REPORT} exists; open it, or use --overwrite to make it anew")
    record = DemoRecord(config, out / "images.h5")
    if not config.overwrite and (out / TIMES).exists():
        record.seconds = json.loads((out / TIMES).read_text(encoding="utf-8"))
    shown: Callable[[], Reporter] = choose_reporter if reporter is None else lambda: reporter
    images = _data(config, record, shown)
    for interaction in INTERACTIONS:
        record.runs.append(_network(config, interaction, images, record, shown))
    from rnndyn_fast.report.demo_page import demo_page

    return demo_page(record).save(out / REPORT)


def _data(config: DemoConfig, record: DemoRecord, shown: Callable[[], Reporter]) -> int:
    """Make the images unless they are there; returns the number of training images."""
    source = load_source(config.source, seed=config.seed)
    most = {"train": len(source.train_labels), "testplus": len(source.test_labels)}
    most["val"], most["test"] = most["train"] // 10, most["testplus"] // 3
    most["train"] -= most["val"]
    most["testplus"] -= most["test"]
    counts = {name: min(IMAGES[name], most[name], config.max_images or IMAGES[name]) for name in SPLITS}
    options: dict[str, Any] = {
        "source": source.name,
        "size": config.size,
        "seed": config.seed,
        **{f"num_{name}": count for name, count in counts.items()},
    }
    with _step(record, shown, "data make", "data make", {"out": record.data_path, **options}) as reporter:
        if record.data_path.exists() and not config.overwrite:
            with ImageFile(record.data_path) as file:
                made = {name: file.attrs.get(name) for name in ("source", "size", "seed")}
                made |= {f"num_{name}": len(file.split(name)) for name in SPLITS}
            different = [name for name, value in options.items() if made[name] != value]
            if different:
                raise ValueError(
                    f"out: {record.data_path} was made with other options ({', '.join(different)}); use --overwrite or another folder"
                )
        else:
            with reporter:
                make_dataset(record.data_path, **options, overwrite=config.overwrite, progress=split_progress(reporter))
    return counts["train"]


def _network(config: DemoConfig, interaction: str, train_images: int, record: DemoRecord, shown: Callable[[], Reporter]) -> NetworkRun:
    """Train one network, extract with and without its training, analyse."""
    folder = Path(config.out) / interaction
    started = any((folder / name).exists() for name in (LAST, INITIAL)) and not config.overwrite
    options: dict[str, Any] = {
        "data": str(record.data_path),
        "out": str(folder),
        "LT_interaction": interaction,
        "timesteps": config.timesteps,
        "widths": config.widths,
        "epochs": config.epochs or math.ceil(IMAGES_SEEN / train_images),
        "batch_size": config.batch_size,
        "augment": "none",
        "seed": config.seed,
        "threads": config.threads,
        "backend": config.backend,
    }
    run_config = TrainConfig(**options, resume=started, overwrite=config.overwrite)
    with _step(record, shown, f"train, {interaction}", "train", options) as reporter:
        checkpoint = train(run_config, reporter=reporter)

    results = {}
    for name, untrained in (("testplus", False), ("untrained", True)):
        path = folder / f"{name}.h5"
        given: dict[str, Any] = {"out": path, "split": "testplus", "untrained": untrained, "backend": config.backend}
        words = [str(checkpoint), str(record.data_path)]
        with _step(record, shown, f"extract, {interaction}, {name}", "extract", given, words) as reporter:
            extract(checkpoint, record.data_path, **given, overwrite=True, reporter=reporter)
        results[name] = path
    given = {"out": folder / "analysis", "compare": results["untrained"]}
    with _step(record, shown, f"analyse, {interaction}", "analyse", given, [str(results["testplus"])]):
        analyse(results["testplus"], given["out"], compare=given["compare"])
    trained, untrained_result = (ReadoutZoneResult.load(results[name]) for name in ("testplus", "untrained"))
    return NetworkRun(interaction, run_config, read_metrics(folder), count_parameters(checkpoint), trained, untrained_result)


def count_parameters(checkpoint: Path) -> int:
    """Number of parameters of the network in a checkpoint, unused ones included."""
    from rnndyn_fast.train import read_checkpoint

    return sum(value.numel() for value in read_checkpoint(checkpoint)["state_dict"].values())


class _step:
    """A step of the demo: puts its command on record, shows it, and takes its time."""

    def __init__(
        self,
        record: DemoRecord,
        shown: Callable[[], Reporter],
        name: str,
        command: str,
        options: dict[str, Any],
        words: list[str] | None = None,
    ) -> None:
        self.record, self.name, self.reporter = record, name, shown()
        self.line = command_line(command, options, words or [])

    def __enter__(self) -> Reporter:
        self.record.commands.append(self.line)
        self.reporter.line(f"$ {self.line}")
        self.start = time.perf_counter()
        return self.reporter

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        # These two go on where an interrupted demo stopped, the others begin anew.
        if self.name.startswith(("data make", "train")):
            seconds += self.record.seconds.get(self.name, 0.0)
        self.record.seconds[self.name] = seconds
        write_text(Path(self.record.config.out) / TIMES, json.dumps(self.record.seconds))


def command_line(command: str, options: dict[str, Any], words: list[str]) -> str:
    """The command that does the same as a call with these options; options that are None or False are left out."""
    parts = ["rnndyn", *command.split(), *words]
    for name, value in options.items():
        if value is None or value is False:
            continue
        parts.append(f"--{name}")
        if value is not True:
            parts.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(parts)
