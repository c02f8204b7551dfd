"""Networks of equal parameter counts and different cells, trained alike and compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from rnndyn_fast.data import ImageFile
from rnndyn_fast.extract import react
from rnndyn_fast.file_io import write_text
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.graph.spec.yaml_files import network_to_plain
from rnndyn_fast.optional import require
from rnndyn_fast.search.architecture import Architecture, build_network, count_parameters
from rnndyn_fast.search.compare_config import NETWORKS, REPORT, SPLITS, UNGATED, CompareConfig, Trained
from rnndyn_fast.search.compare_report import write_report
from rnndyn_fast.search.training import train_quietly
from rnndyn_fast.train import QuietReporter
from rnndyn_fast.train.loop import BEST

TOLERANCE = 0.05  # of the parameters
GROWTHS = tuple(round(1.5 + sign * k / 50, 2) for k in range(26) for sign in ((1, -1) if k else (1,)))  # nearest to 1.5 first, 1 to 2
CONFIG, RESULTS = "compare.yaml", "results.json"
FREE_ON_RESUME = ("data", "out", "threads", "device", "backend", "engine", "resume", "overwrite")
Say = Callable[[str], None]


def architecture(name: str, config: CompareConfig, width: int, growth: float) -> Architecture:
    """A network of a width. Norms are group norms, whose parameters do not depend on the image's size."""
    cell, gating = ("rgc", False) if name == UNGATED else (name, True)
    return Architecture(
        depth=config.depth, width=width, growth=growth, norm="group", cell=cell, gating=gating, cell_norm=False, bypass=config.bypass
    )


def matched(name: str, config: CompareConfig, image: dict[str, int]) -> tuple[Architecture, Network]:
    """The network with the wanted number of parameters: the growth from layer to layer nearest to 1.5 for which a width comes within 5%.

    Raises:
        ValueError: none does, or the image is too small for so many layers; names the nearest.
    """

    def made(width: int, growth: float) -> tuple[int, Architecture, Network]:
        one = architecture(name, config, width, growth)
        network = build_network(one, **image, name=name)
        return count_parameters(network), one, network

    least = 10**12
    for growth in GROWTHS:
        low, high = 1, 2
        while made(high, growth)[0] < config.parameters:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if made(middle, growth)[0] < config.parameters else (low, middle)
        count, one, network = min((made(width, growth) for width in (low, high)), key=lambda found: abs(found[0] - config.parameters))
        if abs(count - config.parameters) <= TOLERANCE * config.parameters:
            return one, network
        least = min(least, count, key=lambda other: abs(other - config.parameters))
    raise ValueError(f"parameters: no {name} comes within 5% of {config.parameters:,}; the nearest has {least:,}")


def compare(config: CompareConfig, *, say: Say = print) -> Path:
    """Train networks of matched parameter counts and compare them.

    In the folder ``config.out``: ``<network>/seed_<k>/`` (each a training run with its ``results.json``), ``networks.csv``,
    ``report.html`` and ``compare.yaml``. Stopped at any moment, it continues with ``resume``.

    Returns:
        The path of the report.

    Raises:
        FileExistsError: ``out`` is not empty, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: no data. ValueError: bad data, widths that cannot be matched, or a comparison begun with other options.

    Deterministic: on a CPU, for a fixed number of threads, but for the seconds.
    """
    out = Path(config.out)
    with ImageFile(config.data, required_splits=("train", "val", *SPLITS), argument="data") as file:
        image = {"image_size": file.image_size, "num_classes": file.num_classes}
    chosen = {name: matched(name, config, image) for name in config.networks}
    _prepare(config, out)
    done = []
    for seed in range(config.seeds):  # (stopped early, all networks have been trained equally often)
        for name, (one, network) in chosen.items():
            folder = out / name / f"seed_{seed}"
            if (folder / RESULTS).exists():
                trained = Trained(**json.loads((folder / RESULTS).read_text(encoding="utf-8")))
            else:
                trained = _train(config, folder, one, network, seed)
                say(f"{name}, seed {seed}: {trained.parameters:,} parameters, {trained.seconds:.0f} s; {_percent(trained)}")
            done.append(trained)
    return write_report(done, config)


def _percent(trained: Trained) -> str:
    return ", ".join(f"{split} {100 * trained.last(split):.1f}%" for split in SPLITS)


def _train(config: CompareConfig, folder: Path, one: Architecture, network: Network, seed: int) -> Trained:
    """Train or resume; then run the test images through the best epoch's network."""
    options = config.training(str(folder), network_to_plain(network), seed)
    rows = train_quietly(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="running backend")  # which runs what is no news here
        results = {
            split: react(folder / BEST, config.data, split, backend=config.backend, engine=config.engine, reporter=QuietReporter())[0]
            for split in SPLITS
        }
    cost = results[SPLITS[0]].cost
    assert cost is not None
    trained = Trained(
        network=network.name, seed=seed, width=one.width, growth=one.growth, parameters=count_parameters(network),
        multiply_adds=float(cost[-1]), seconds=sum(row.seconds for row in rows),
        best_epoch=max(rows, key=lambda row: row.mean_val_accuracy).epoch,
        accuracy={split: result.accuracy.tolist() for split, result in results.items()},
        images={split: result.n for split, result in results.items()},
    )  # fmt: skip
    write_text(folder / RESULTS, json.dumps(dataclasses.asdict(trained), indent=1))
    return trained


def _prepare(config: CompareConfig, out: Path) -> None:
    """Check that the folder may be used, and put the configuration on record."""
    require("yaml")

    import yaml

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    if config.overwrite:
        for path in (*(out / name for name in NETWORKS), out / CONFIG, out / REPORT, out / "networks.csv"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif config.resume:
        if not (out / CONFIG).exists():
            raise FileNotFoundError(f"resume: no {CONFIG} in {out}")
        before = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
        different = [
            f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in config.to_dict().items()
            if name not in FREE_ON_RESUME and before.get(name) != value
        ]
        if different:
            raise ValueError(f"resume: the comparison in {out} was begun with other options: {'; '.join(different)}")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} is not empty; use --resume to continue or --overwrite to replace the comparison")
    write_text(out / CONFIG, yaml.safe_dump({**config.to_dict(), "resume": False, "overwrite": False}, sort_keys=False))
