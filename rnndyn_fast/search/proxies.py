"""Cheaper trials: how well short trainings rank architectures, against full ones."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis.intervals import ALPHA, Estimate
from rnndyn_fast.analysis.outputs import Row, write_csv
from rnndyn_fast.data import ImageFile
from rnndyn_fast.file_io import replaced_atomically, write_text
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.graph.spec.yaml_files import network_to_plain
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page
from rnndyn_fast.search.architecture import Architecture, build_network, count_parameters
from rnndyn_fast.search.config import SearchConfig
from rnndyn_fast.search.found import load_search
from rnndyn_fast.search.storage import import_optuna
from rnndyn_fast.search.training import train_quietly
from rnndyn_fast.train import TrainConfig, read_metrics
from rnndyn_fast.train.options import check_least, check_type, option

FULL = "full"
# A proxy's part of the epochs, of the images, of the image's side, of the width.
PROXIES: dict[str, tuple[float, float, float, float]] = {
    "quarter of the epochs": (0.25, 1, 1, 1),
    "half of the epochs": (0.5, 1, 1, 1),
    "quarter of the images": (1, 0.25, 1, 1),
    "half the resolution": (1, 1, 0.5, 1),
    "half the width": (1, 1, 1, 0.5),
}
RESULTS, REPORT, TABLE, HALF = "results.json", "proxies.html", "proxies.csv", "half.h5"
TRIES = 200  # architectures drawn for each that can be built
Say = Callable[[str], None]


@dataclass(frozen=True)
class ProxiesConfig:
    """Proxies against full training. What each field means is in its ``metadata["help"]``.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
    """

    search: str = field(metadata={"help": "folder of a search, whose space, images and options are taken"})
    out: str = field(metadata={"help": "folder: a training run for every architecture and proxy, table, report"})
    architectures: int = option(16, "how many, drawn at random from the space")
    epochs: int = option(16, "of full training")
    max_train_images: int | None = option(None, "train fully on that many images; default: all")
    bootstrap: int = option(2000, "replicates of the bootstrap over architectures")
    seed: int = option(0, "of the architectures, of every training, and of the bootstrap")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name, least in (("architectures", 4), ("epochs", 4), ("bootstrap", 2), ("seed", 0)):
            check_least(name, getattr(self, name), least)
        if self.max_train_images is not None:
            check_least("max_train_images", self.max_train_images, 8)


@dataclass(frozen=True)
class Curve:
    """One training: validation accuracy after each epoch (last time step), seconds, and multiply-adds of all training steps."""

    architecture: int
    proxy: str
    parameters: int
    accuracy: tuple[float, ...]
    seconds: float
    multiply_adds: float

    @property
    def best(self) -> float:
        """Accuracy of the best epoch: what a trial is worth."""
        return max(self.accuracy)


def compare_proxies(config: ProxiesConfig, *, say: Say = print) -> Path:
    """Train architectures of a search's space fully and by each proxy, and say how well the proxies rank them.

    Fewer epochs need no training of their own: they are the first epochs of full training (learning rates that follow a schedule are
    those of full training there). Half the resolution: every square of 2 x 2 pixels becomes its mean. Called again with the same options,
    it goes on where it was.

    Returns:
        The path of the report; beside it ``proxies.csv``, and ``results.json`` with every curve.

    Raises:
        FileNotFoundError: no search, or no data. FileExistsError: `out` holds results of other options.
        ValueError: the images are too small or too few, or the space holds no network that can be built.
    """
    out = Path(config.out)
    search = load_search(Path(config.search))
    _check_record(config, search, out)
    full = dataclasses.replace(search, epochs=config.epochs, max_train_images=config.max_train_images, seed=config.seed)
    with ImageFile(search.data, required_splits=("train", "val"), argument="data") as file:
        image: dict[str, Any] = {"image_size": file.image_size, "num_classes": file.num_classes}
        images = min(len(file.split("train")), config.max_train_images or len(file.split("train")))
    if images < 8 or image["image_size"] % 2:
        raise ValueError(f"data: expected at least 8 images of an even size, got {images} of {image['image_size']} px")
    half = _halved(Path(search.data), out / HALF)
    curves: list[Curve] = []
    for k, (architecture, training) in enumerate(draw(search, image, config.architectures, config.seed)):
        for proxy, (epochs, part, side, width) in {FULL: (1.0, 1.0, 1.0, 1.0), **PROXIES}.items():
            if epochs < 1:
                continue  # (of the full curve)
            small = {**image, "image_size": round(image["image_size"] * side)}
            network = build_network(_narrowed(architecture, width), **small)
            options = full.trial_config(str(out / f"{k:02d}" / proxy.replace(" ", "_")), network_to_plain(network), training)
            options = dataclasses.replace(
                options, data=search.data if side == 1 else str(half), max_train_images=max(4, round(images * part))
            )  # fmt: skip
            curves.append(_train(options, network, k, proxy))
        say(f"architecture {k + 1} of {config.architectures}: {100 * curves[-1 - sum(e == 1 for e, *_ in PROXIES.values())].best:.1f}%")
    write_text(out / RESULTS, json.dumps([dataclasses.asdict(curve) for curve in curves], indent=1))
    return _write(config, curves, out)


def draw(search: SearchConfig, image: dict[str, Any], count: int, seed: int) -> list[tuple[Architecture, dict[str, Any]]]:
    """Different architectures of a search's space at random, of those that can be built at half the size too, within `max_parameters`.

    Raises ValueError where there are too few.
    """
    optuna, space = import_optuna(), search.load_space()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found: dict[str, tuple[Architecture, dict[str, Any]]] = {}
    for _ in range(TRIES * count):
        trial = study.ask()
        architecture, training = space.suggest(trial)
        try:
            network = build_network(architecture, **image)
            build_network(architecture, **{**image, "image_size": image["image_size"] // 2})
        except ValueError:
            continue
        if search.max_parameters is None or count_parameters(network) <= search.max_parameters:
            found.setdefault(repr(sorted(trial.params.items())), (architecture, training))
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"architectures: the space has {len(found)} that can be built on {image['image_size']} px and half of it, not {count}")


def rank_correlations(proxy: np.ndarray, full: np.ndarray, replicates: int, seed: int = 0) -> tuple[Estimate, Estimate]:  # [n], [n]
    """Spearman's rho and Kendall's tau-b with percentile intervals of a bootstrap over architectures.

    A replicate in which all values of one side are equal has no correlation and is left out.

    >>> rho, tau = rank_correlations(np.arange(8.0), np.arange(8.0) ** 2, 100)
    >>> round(rho.value, 6), round(tau.value, 6)
    (1.0, 1.0)
    """
    require("scipy")

    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, len(full), len(full)) for _ in range(replicates)]
    rows = [r for r in rows if len(set(proxy[r])) > 1 and len(set(full[r])) > 1]
    out = []
    for measure in (spearmanr, kendalltau):
        if len(set(proxy)) == 1 or len(set(full)) == 1:
            out.append(Estimate(float("nan"), float("nan"), float("nan"), float("nan"), 0.0, len(full)))
            continue
        value = float(measure(proxy, full).statistic)
        drawn = np.array([measure(proxy[r], full[r]).statistic for r in rows])
        low, high = np.quantile(drawn, [ALPHA, 1 - ALPHA])
        out.append(Estimate(value, float(low), float(high), float(drawn.std(ddof=1)), len(full) - 1.0, len(full)))
    return out[0], out[1]


def proxy_rows(curves: Sequence[Curve], replicates: int, seed: int = 0) -> list[Row]:
    """Per proxy: rank correlations with full training, cost (multiply-adds, as a share of full training), and what choosing by it loses:
    the full accuracy of the best architecture less that of the architecture that the proxy puts first."""
    of = {(curve.architecture, curve.proxy): curve for curve in curves}
    numbers = sorted({curve.architecture for curve in curves})
    full = np.array([of[k, FULL].best for k in numbers])
    rows: list[Row] = []
    for proxy, (epochs, *_) in PROXIES.items():
        mine = [_first(of[k, FULL], epochs, proxy) if epochs < 1 else of[k, proxy] for k in numbers]
        values = np.array([curve.best for curve in mine])
        rho, tau = rank_correlations(values, full, replicates, seed)
        cost = float(np.mean([curve.multiply_adds / of[k, FULL].multiply_adds for k, curve in zip(numbers, mine, strict=True)]))
        lost = 100 * float(full.max() - full[int(values.argmax())])
        rows.append({"proxy": proxy, "spearman": rho, "kendall": tau, "cost": 100 * cost, "lost": lost, "architectures": len(numbers)})
    return rows


def _first(curve: Curve, part: float, proxy: str) -> Curve:
    """The first epochs of a training."""
    kept = max(1, round(part * len(curve.accuracy)))
    share = kept / len(curve.accuracy)
    return Curve(curve.architecture, proxy, curve.parameters, curve.accuracy[:kept], share * curve.seconds, share * curve.multiply_adds)


def _narrowed(architecture: Architecture, part: float) -> Architecture:
    """The architecture with a part of the channels, those of single layers included."""
    layers = tuple((k, name, max(2, round(part * float(value))) if name == "width" else value) for k, name, value in architecture.layers)
    return dataclasses.replace(architecture, width=max(2, round(architecture.width * part)), layers=layers)


def _train(options: TrainConfig, network: Network, number: int, proxy: str) -> Curve:
    try:
        rows = train_quietly(options)
    except FloatingPointError:  # it is worth what it was before
        rows = read_metrics(Path(options.out))
    assert options.timesteps is not None
    assert options.max_train_images is not None
    # (Backward takes about twice the multiply-adds of forward, in every training alike.)
    adds = 3 * compile_schedule(network, options.timesteps, ("gap",)).multiplications()[0] * options.max_train_images * options.epochs
    accuracy = tuple(row.val_accuracy[-1] for row in rows) or (0.0,)
    return Curve(number, proxy, count_parameters(network), accuracy, sum(row.seconds for row in rows), float(adds))


def _halved(data: Path, out: Path) -> Path:
    """The image file with every square of 2 x 2 pixels as its mean."""
    require("h5py")

    import h5py

    if out.exists():
        return out
    with replaced_atomically(out) as unfinished, h5py.File(data) as old, h5py.File(unfinished, "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        for name, item in old.items():
            if not isinstance(item, h5py.Group):
                old.copy(name, new)
                continue
            group = new.create_group(name)
            for part, values in item.items():
                if part != "data":
                    item.copy(part, group)
                    continue
                count, height, width, channels = values.shape
                made = group.create_dataset("data", (count, height // 2, width // 2, channels), np.uint8)
                for start in range(0, count, 1024):
                    block = values[start : start + 1024].astype(np.float32)
                    made[start : start + 1024] = np.rint(block.reshape(-1, height // 2, 2, width // 2, 2, channels).mean((2, 4)))
    return out


def _check_record(config: ProxiesConfig, search: SearchConfig, out: Path) -> None:
    """The folder is empty, or was begun with the same options."""
    record = json.loads(json.dumps({**dataclasses.asdict(config), "of_search": search.settings(), "space": search.load_space().to_plain()}))
    del record["out"], record["search"], record["bootstrap"]
    path = out / "proxies.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in record if before.get(name) != record[name]]
        if different:
            raise FileExistsError(f"out: {out} holds proxies with other {', '.join(different)}; choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: {out} is not empty")
    write_text(path, json.dumps(record, indent=1))


def _write(config: ProxiesConfig, curves: Sequence[Curve], out: Path) -> Path:
    rows = proxy_rows(curves, config.bootstrap, config.seed)
    write_csv(
        [
            {"proxy": r["proxy"], **{f"{m}{end}": getattr(r[m], part) for m in ("spearman", "kendall")
             for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))}, "cost_percent": r["cost"], "lost_percent": r["lost"],
             "architectures": r["architectures"]}
            for r in rows
        ],
        out / TABLE,
    )  # fmt: skip
    full = [curve.best for curve in curves if curve.proxy == FULL]
    page = Page(
        "Cheaper trials against full training",
        f"{len(full)} architectures at random, trained fully for {config.epochs} epochs: "
        f"{100 * min(full):.1f} to {100 * max(full):.1f}% of the validation images.",
    )
    table: list[list[Cell]] = [[r["proxy"], r["spearman"], r["kendall"], r["cost"], r["lost"]] for r in rows]
    header = ["proxy", "Spearman's rho", "Kendall's tau", "cost (% of full training)", "lost by choosing by it (points)"]
    section = page.section("Rank correlation")
    section.text(
        "How well the validation accuracy of a cheaper training ranks architectures, against that of full training, with 95% intervals "
        "(bootstrap over architectures). Costs are multiply-adds. What is lost: full accuracy of the best architecture less that of the "
        "one that the proxy puts first."
    )
    section.table(header, table, "Proxies and full training.")
    return page.save(out / REPORT)
