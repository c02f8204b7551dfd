"""The study: data, networks, extraction, comparison, report, by the functions that the commands call."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.data import SPLITS, load_source, make_dataset
from rnndyn_fast.extract import extract, sha256
from rnndyn_fast.file_io import write_text
from rnndyn_fast.study.config import NETWORKS, TITLES, StudyConfig
from rnndyn_fast.study.record import REPORT, NetworkRun, StudyRecord
from rnndyn_fast.suggestions import flag
from rnndyn_fast.train import (
    EpochMetrics,
    Reporter,
    TrainConfig,
    choose_reporter,
    kept_name,
    read_checkpoint,
    read_metrics,
    train,
)
from rnndyn_fast.train.loop import BEST, INITIAL, LAST
from rnndyn_fast.train.progress import split_progress

TIMES, CONFIG = "seconds.json", "study.json"
# How a study runs, not what it computes: may change when it goes on.
_FREE = ("out", "threads", "backend", "pdf", "overwrite")


def run_study(config: StudyConfig, *, reporter: Reporter | None = None) -> Path:
    """Train (or take) networks, run testplus through them, compare their dynamics, write the report.

    In the folder ``config.out``: ``images.h5`` (unless data are given), a folder per network with its run, results and
    analysis, ``comparison`` with the tables and figures over the networks, and ``report.html``. A study that was stopped goes
    on where it was: finished steps are found by their files, training continues from its last checkpoint.

    Args:
        config: sizes and where to.
        reporter: shows progress; None chooses a bar or lines.

    Returns:
        The path of the report.

    Raises:
        FileExistsError: there is a report and `overwrite` is False.
        ValueError: the folder holds an interrupted study with other options; checkpoints are of other networks.
        FileNotFoundError, ImportError: images or checkpoints are missing; says how to get them.
    """
    out = Path(config.out)
    if (out / REPORT).exists() and not config.overwrite:
        raise FileExistsError(f"out: {out / REPORT} exists; open it, or use --overwrite to make it anew")
    _check_same(config, out)
    record = StudyRecord(config, Path(config.data) if config.data else out / "images.h5")
    if not config.overwrite and (out / TIMES).exists():
        record.seconds = json.loads((out / TIMES).read_text(encoding="utf-8"))
    given = _given_checkpoints(config)
    if config.pdf:
        from rnndyn_fast.report.pdf import find_browser

        find_browser()
    write_text(out / CONFIG, json.dumps(asdict(config), indent=1))
    shown: Callable[[], Reporter] = choose_reporter if reporter is None else lambda: reporter
    if config.data is None:
        _make_data(config, record, shown)
    for name in given or config.networks:
        for k in range(len(given[name]) if given else config.seeds):
            record.runs.append(_network(config, name, k, given[name][k] if given else None, record, shown))
    from rnndyn_fast.report.study_page import write_study_page

    return write_study_page(record)


def _check_same(config: StudyConfig, out: Path) -> None:
    path = out / CONFIG
    if config.overwrite or not path.exists():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(config)))
    different = [
        f"{name} was {earlier.get(name)!r}, is {now[name]!r}" for name in now if name not in _FREE and earlier.get(name) != now[name]
    ]
    if different:
        raise ValueError(
            f"out: the study in {out} was begun with other options ({'; '.join(different)}); use --overwrite or another folder"
        )


def _given_checkpoints(config: StudyConfig) -> dict[str, list[Path]]:
    """The checkpoints by the kind of network that is in them."""
    found: dict[str, list[Path]] = {}
    for path in config.checkpoints:
        model = read_checkpoint(path)["model"]
        kinds = [name for name, options in NETWORKS.items() if all(model.get(key) == value for key, value in options.items())]
        if not kinds or not model.get("lateral_connections", True):
            raise ValueError(f"checkpoints: {path} holds none of the networks {', '.join(NETWORKS)}")
        of_kind = found.setdefault(kinds[0], [])
        twice = [other for other in of_kind if sha256(other) == sha256(Path(path))]
        if twice:
            raise ValueError(f"checkpoints: {path} and {twice[0]} hold the same network")
        of_kind.append(Path(path))
    return {name: found[name] for name in NETWORKS if name in found}


def _make_data(config: StudyConfig, record: StudyRecord, shown: Callable[[], Reporter]) -> None:
    """Make the images unless they are there."""
    source = load_source(config.source, seed=config.seed)
    most = {"train": len(source.train_labels), "testplus": len(source.test_labels)}
    most["val"], most["test"] = most["train"] // 10, most["testplus"] // 10
    most["train"] -= most["val"]
    most["testplus"] -= most["test"]
    wanted = {"train": config.train_images, "val": config.val_images, "test": most["test"], "testplus": config.testplus_images}
    counts = {name: min(wanted[name], most[name], config.max_images or most[name]) for name in SPLITS}
    options: dict[str, Any] = {
        "source": source.name,
        "size": config.size,
        "seed": config.seed,
        **{f"num_{name}": count for name, count in counts.items()},
    }
    with _step(record, shown, "data make", "data make", {"out": record.data_path, **options}) as reporter:
        if not record.data_path.exists() or config.overwrite:  # writes are atomic
            with reporter:
                make_dataset(record.data_path, **options, overwrite=config.overwrite, progress=split_progress(reporter))


def _network(config: StudyConfig, name: str, k: int, given: Path | None, record: StudyRecord, shown: Callable[[], Reporter]) -> NetworkRun:
    """Train the k-th network of a kind or take it, extract with and without its training and along it, analyse."""
    folder = Path(config.folder(name, k))
    run_config = config.training(name, str(record.data_path), k)
    title = f"{TITLES[name]}, network {k + 1}" if k else TITLES[name]
    if given is None:
        started = any((folder / file).exists() for file in (LAST, INITIAL)) and not config.overwrite
        options = {"resume": started, "overwrite": config.overwrite}
        with _step(record, shown, f"train, {title}", "train", _changed(run_config)) as reporter:
            train(config.training(name, str(record.data_path), k, **options), reporter=reporter)
        checkpoint = folder / BEST
    else:
        checkpoint = given
    contents = read_checkpoint(checkpoint)
    if given is not None and "config" in contents:
        run_config = TrainConfig.from_dict(contents["config"])
    metrics = [EpochMetrics.from_dict(row) for row in contents.get("metrics", [])]
    if (checkpoint.parent / "metrics.jsonl").exists():
        metrics = read_metrics(checkpoint.parent)

    wanted = {"testplus": checkpoint, "untrained": checkpoint.with_name(INITIAL)}
    best = int(contents["epoch"])
    wanted |= {f"epoch_{k}": checkpoint.with_name(kept_name(k)) for k in config.keep if k < best}
    results = {}
    for kind, path in wanted.items():
        if path.exists():
            results[kind] = _extracted(config, path, folder / f"{kind}.h5", f"{title}, {kind.replace('_', ' ')}", record, shown)
    given_options: dict[str, Any] = {"out": folder / "analysis"}
    if "untrained" in results:
        given_options["compare"] = folder / "untrained.h5"
    with _step(record, shown, f"bootstrap, {title}", "", {}):
        from rnndyn_fast.report.analysis_page import result_bootstrap, write_report

        boot = result_bootstrap(results["testplus"], results.get("untrained"), config.bootstrap, config.seed)
    with _step(record, shown, f"analyse, {title}", "analyse", given_options, [str(folder / "testplus.h5")]):
        write_report(
            results["testplus"], folder / "analysis", untrained=results.get("untrained"), title=title.capitalize(), boot=boot,
            commands=list(record.commands),
        )  # fmt: skip
    parameters = sum(value.numel() for value in contents["state_dict"].values())
    along = {k: results[f"epoch_{k}"] for k in config.keep if f"epoch_{k}" in results}
    along[best] = results["testplus"]
    seed = run_config.seed
    return NetworkRun(name, seed, checkpoint, run_config, metrics, parameters, results["testplus"], results.get("untrained"), along, boot)


def _extracted(
    config: StudyConfig, checkpoint: Path, path: Path, title: str, record: StudyRecord, shown: Callable[[], Reporter]
) -> ReadoutZoneResult:
    """The result of testplus through a checkpoint: that of an earlier run if it is of the same checkpoint and data."""
    given: dict[str, Any] = {
        "out": path,
        "split": "testplus",
        "reducers": ("readout_zones",),
        "keep_samples": True,
        "device": config.device,
        "backend": config.backend,
    }
    with _step(record, shown, f"extract, {title}", "extract", given, [str(checkpoint), str(record.data_path)]) as reporter:
        if path.exists() and not config.overwrite:
            earlier = ReadoutZoneResult.load(path)
            made_from = earlier.descriptors.get("checkpoint", {}), earlier.descriptors.get("data", {})
            if made_from[0].get("sha256") == sha256(checkpoint) and made_from[1].get("path") == str(record.data_path):
                return earlier
        extract(checkpoint, record.data_path, **given, overwrite=True, reporter=reporter)
    return ReadoutZoneResult.load(path)


def _changed(config: TrainConfig) -> dict[str, Any]:
    """The options of a training run that are not the default ones."""
    default = TrainConfig(data="", out="").to_dict()
    return {name: getattr(config, name) for name, value in config.to_dict().items() if value != default[name]}


class _step:
    """A step of the study: puts its command on record, shows it, and takes its time."""

    def __init__(
        self,
        record: StudyRecord,
        shown: Callable[[], Reporter],
        name: str,
        command: str,
        options: dict[str, Any],
        words: list[str] | None = None,
    ) -> None:
        self.record, self.name, self.reporter = record, name, shown()
        self.line = command_line(command, options, words or []) if command else ""

    def __enter__(self) -> Reporter:
        if self.line:
            self.record.commands.append(self.line)
        self.reporter.line(f"$ {self.line}" if self.line else self.name)
        self.start = time.perf_counter()
        return self.reporter

    def __exit__(self, *_: object) -> None:
        # What was done before an interruption counts too.
        self.record.seconds[self.name] = self.record.seconds.get(self.name, 0.0) + time.perf_counter() - self.start
        write_text(Path(self.record.config.out) / TIMES, json.dumps(self.record.seconds))


def command_line(command: str, options: dict[str, Any], words: list[str]) -> str:
    """The command that does the same as a call with these options; options that are None or False are left out."""
    parts = ["rnndyn", *command.split(), *words]
    for name, value in options.items():
        if value is None or value is False:
            continue
        parts.append(flag(name))
        if value is not True:
            parts.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(parts)
