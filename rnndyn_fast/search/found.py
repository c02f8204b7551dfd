"""What a search has found: the best network as drawing and equations, and beside published cells."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.analysis.bootstrap import Bootstrap
from rnndyn_fast.data import ImageFile
from rnndyn_fast.extract import extract, sha256
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.graph.spec.yaml_files import network_from_plain, network_to_plain
from rnndyn_fast.optional import require
from rnndyn_fast.report.analysis_page import result_bootstrap
from rnndyn_fast.report.comparison import comparison_rows, figure_comparison
from rnndyn_fast.report.page import Cell, Page, Plot
from rnndyn_fast.search.architecture import CELLS, Architecture, build_network, count_parameters
from rnndyn_fast.search.config import SearchConfig
from rnndyn_fast.search.reciprocal_choices import RECIPROCAL
from rnndyn_fast.search.report import CONFIG, train_config, weights_path, write_report
from rnndyn_fast.search.storage import completed, import_optuna, open_study
from rnndyn_fast.search.training import train_quietly
from rnndyn_fast.suggestions import others
from rnndyn_fast.train import EpochMetrics, QuietReporter, TrainConfig, read_metrics
from rnndyn_fast.train.loop import BEST
from rnndyn_fast.train.options import check_least, check_type, option

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

PUBLISHED = "published"  # folder of their training runs
FOUND = "found"
OTHERS = tuple(cell for cell in CELLS if cell != RECIPROCAL)  # what may stand beside the best
Say = Callable[[str], None]


@dataclass(frozen=True)
class FoundConfig:
    """A report with published cells. What each field means is in its ``metadata["help"]``.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
    """

    search: str = field(metadata={"help": "folder of a search, which the report goes to"})
    cells: tuple[str, ...] = option(
        ("simplernn", "gru", "lstm", "rgc"), "published cells to train as the best was, of " + ", ".join(OTHERS)
    )
    split: str = option("test", "images that none was chosen by: test or testplus")
    limit: int | None = option(None, "that many of them, evenly spaced over the split")
    bootstrap: int = option(500, "replicates of the bootstrap over images")
    backend: Literal["native", "reference"] | None = option(None, "as in rnndyn train")

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(self.cells) if isinstance(self.cells, list) else self.cells)
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name in self.cells:
            if name not in OTHERS:
                raise ValueError(f"cells: unknown cell {name!r}{others(name, OTHERS)}")
        if not self.cells or len(set(self.cells)) < len(self.cells):
            raise ValueError(f"cells: expected different ones, at least one, got {list(self.cells)}")
        if self.split not in ("test", "testplus"):
            raise ValueError(f"split: expected test or testplus, got {self.split!r}")
        check_least("bootstrap", self.bootstrap, 2)
        if self.limit is not None:
            check_least("limit", self.limit, 2)


@dataclass(frozen=True)
class Measured:
    """A network beside others: its size, its validation accuracy (best epoch, last step), and its trajectories on other images."""

    title: str
    parameters: int
    multiply_adds: float
    validation: float
    result: ReadoutZoneResult
    boot: Bootstrap


def load_search(folder: Path) -> SearchConfig:
    """The configuration in the folder of a search, to read it. Raises FileNotFoundError where there is none."""
    require("yaml")

    import yaml

    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"search: no {CONFIG} in {folder}")
    return SearchConfig(**{**yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), "out": str(folder), "resume": True})


def report_found(config: FoundConfig, *, say: Say = print) -> Path:
    """Train published cells as a search trained its best, and write its report with all of them.

    Each cell takes the place of the best architecture's cell: depth, widths, feedback and options of training stay, so the settings are
    those that suit the best. Runs are in ``published/<cell>/``, trajectories of the images of `split` in ``found/<name>.h5``. Called
    again, it goes on where it was.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: no search, no data, or the weights of the best are on another machine. ValueError: no trial was completed.
    """
    folder = Path(config.search)
    search = load_search(folder)
    space = search.load_space()
    study = open_study(search, create=False)
    done = completed(study)
    if not done:
        raise ValueError(f"search: no trial of {folder} was trained to its end")
    with ImageFile(search.data, required_splits=("train", "val"), argument="data") as file:
        if config.split not in file.split_names:
            raise ValueError(f"split: {search.data} has {', '.join(file.split_names)}, got {config.split!r}")
        image = {"image_size": file.image_size, "num_classes": file.num_classes}
    if not weights_path(done[0], folder).exists():
        raise FileNotFoundError(f"search: the weights of trial {done[0].number} are not in {folder}; another machine trained it")
    architecture, _ = space.suggest(import_optuna().trial.FixedTrial(done[0].params))
    options = TrainConfig.from_dict(train_config(done[0]))
    measured = [_measure(config, search, folder, "best", weights_path(done[0], folder), network_of(done[0]), options)]
    for cell in config.cells:
        network = build_network(with_cell(architecture, cell), **image, name=cell)
        own = dataclasses.replace(options, out=str(folder / PUBLISHED / cell), network=network_to_plain(network))
        train_quietly(own)
        measured.append(_measure(config, search, folder, cell, Path(own.out) / BEST, network, own))
        say(f"{cell}: {measured[-1].parameters:,} parameters, {100 * measured[-1].validation:.2f}% of the validation images")
    return write_report(study, search, space, lambda page: beside_section(page, measured, config))


def with_cell(architecture: Architecture, cell: str) -> Architecture:
    """The architecture with another cell in all layers, with that cell's published options."""
    mine = tuple(one for one in architecture.layers if one[1] in ("width", "kernel_size", "norm", "bypass"))
    return dataclasses.replace(architecture, cell=cell, reciprocal=(), layers=mine, gating=True, cell_norm=False, peepholes=False)


def network_of(trial: FrozenTrial) -> Network:
    """The spec of a trial's network."""
    return network_from_plain(train_config(trial)["network"])


def _measure(
    config: FoundConfig, search: SearchConfig, folder: Path, title: str, checkpoint: Path, network: Network, options: TrainConfig
) -> Measured:
    out = folder / FOUND / f"{title}.h5"
    given = {"split": config.split, "limit": config.limit}
    result = _earlier(out, checkpoint, given)
    if result is None:
        extract(checkpoint, search.data, config.split, out=out, reducers=("readout_zones",), keep_samples=True, limit=config.limit,
                backend=config.backend, overwrite=True, reporter=QuietReporter())  # fmt: skip
        result = ReadoutZoneResult.load(out)
    rows: Sequence[EpochMetrics] = read_metrics(checkpoint.parent)
    assert options.timesteps is not None
    cost = compile_schedule(network, options.timesteps, ("gap",)).multiplications()[0]
    boot = result_bootstrap(result, None, config.bootstrap)
    return Measured(title, count_parameters(network), cost, max(row.val_accuracy[-1] for row in rows), result, boot)


def _earlier(out: Path, checkpoint: Path, given: Mapping[str, Any]) -> ReadoutZoneResult | None:
    """What was found before, of the same weights and images."""
    if not out.exists():
        return None
    found = ReadoutZoneResult.load(out)
    about = found.descriptors.get("options", {})
    same = all(about.get(name) == value for name, value in given.items())
    return found if same and found.descriptors.get("checkpoint", {}).get("sha256") == sha256(checkpoint) else None


def beside_section(page: Page, measured: Sequence[Measured], config: FoundConfig) -> None:
    """The best network and published cells: accuracy, and how their representations move."""
    section = page.section("Beside published cells")
    images = f"{measured[0].result.n:,} images of {config.split}"
    section.text(
        "Each published cell takes the place of the best network's cell, with that network's depth, widths, feedback, training options, "
        f"images and epochs, and with the weights of its best epoch. Options were chosen for the best network alone. On {images}, by which "
        "nothing was chosen; intervals are 95% over images."
    )
    last = measured[0].result.timesteps - 1
    rows: list[list[Cell]] = [
        [one.title, one.parameters, one.multiply_adds / 1e6, 100 * one.validation,
         *(f"{100 * e.value:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})" for e in (one.boot.estimate("accuracy", t) for t in (0, last)))]
        for one in measured
    ]  # fmt: skip
    steps = [f"{config.split}, t = {t} (%)" for t in (0, last)]
    header = ["network", "parameters", "multiply-adds (M)", "validation correct (%)", *steps]
    section.table(header, rows, "The best network and published cells at the same training budget.")
    compared = comparison_rows({one.title: one.boot for one in measured})
    section.plots(
        [
            Plot(
                figure_comparison(compared),
                "How representations move: averages over time steps, of trajectories that settle in their final class and are right.",
                "Dot plots; numbers in the table below.",
                6.8,
            )
        ]
    )
    section.table(
        ["network", "measure", "columns", "first", "second", "difference"],
        [[r["network"], r["measure"], f"{r['column_1']} / {r['column_2']}", r["value_1"], r["value_2"], r["difference"]] for r in compared],
        "The same in numbers.",
    )
