"""Everything that determines a search, as one dataclass: a command line, a YAML file or a few keywords."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from rnndyn_fast.search.space import Space, load_space
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.options import check_least, check_type, option

# What a resumed search may change: how long and how it runs, not what a trial computes.
FREE_ON_RESUME = (
    "data",
    "out",
    "trials",
    "workers",
    "threads",
    "device",
    "storage",
    "heartbeat_s",
    "backend",
    "engine",
    "resume",
    "overwrite",
    "space",
)
OF_TRAINING = (
    "timesteps",
    "epochs",
    "batch_size",
    "max_train_images",
    "max_val_images",
    "augment",
    "seed",
    "threads",
    "device",
    "backend",
    "engine",
)


@dataclass(frozen=True)
class SearchConfig:
    """A search. What each field means is in its ``metadata["help"]``, which is also what ``rnndyn search --help`` prints.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.

    >>> SearchConfig(data="images.h5", out="runs/search").trials
    40
    """

    data: str = field(metadata={"help": "HDF5 image file (rnndyn data make, or any MiniEcoset file)"})
    out: str = field(metadata={"help": "folder of the search: storage, trials, report"})
    space: str = option("cells", "what is searched: blt, cells, laptop, paper, or a YAML file")
    trials: int = option(40, "finished trials in all, those before a resume included")
    workers: int = option(1, "processes that run trials side by side")
    storage: str | None = option(None, "database URL, as postgresql://user@host/name; default: an SQLite file in `out`")
    study: str = option("search", "name of the study in the storage")
    objective: Literal["last", "mean"] = option("last", "validation accuracy that is maximised: at the last time step, or mean over steps")
    max_parameters: int | None = option(None, "architectures with more parameters are passed over")
    sampler: Literal["tpe", "random", "cmaes", "nsga2"] = option("tpe", "what proposes architectures; nsga2 is evolution")
    pruner: Literal["median", "hyperband", "none"] = option("median", "what ends trials early")
    minimise: Literal["none", "parameters", "multiply_adds"] = option("none", "what is minimised beside the accuracy that is maximised")
    startup_trials: int = option(10, "trials drawn at random before the sampler learns from them; of nsga2 the size of a generation")
    pruning_trials: int = option(5, "trials that must have finished before any is pruned (median)")
    pruning_epochs: int = option(1, "epochs before a trial may be pruned; of hyperband the fewest that a trial gets")
    timesteps: int = option(6, "time steps T (unless searched)")
    epochs: int = option(4, "epochs of a trial")
    batch_size: int = option(64, "images per training step (unless searched)")
    max_train_images: int | None = option(None, "train on that many images, evenly spaced over the split")
    max_val_images: int | None = option(None, "validate on that many images, evenly spaced over the split")
    augment: Literal["trivialaugmentwide", "none"] = option("none", "augmentation of training images")
    seed: int = option(0, "of every trial's training, and of the sampler")
    threads: int | None = option(1, "CPU threads of a worker")
    device: str | None = option(None, "of every worker: cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    heartbeat_s: int = option(60, "seconds between signs of life; a trial without one for five times as long is run again")
    backend: Literal["native", "reference"] | None = option(None, "as in rnndyn train")
    engine: Literal["auto", "direct", "winograd", "amx"] = option("auto", "as in rnndyn train")
    resume: bool = option(False, "continue the search in `out`, or join the one in `storage`")
    overwrite: bool = option(False, "replace the search that is in `out`")

    def __post_init__(self) -> None:
        for name in ("data", "out", "space"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name, least in (
            ("trials", 1),
            ("workers", 1),
            ("startup_trials", 0),
            ("pruning_trials", 0),
            ("pruning_epochs", 0),
            ("heartbeat_s", 1),
        ):
            check_least(name, getattr(self, name), least)
        for name in ("storage", "study"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: expected {'a database URL' if name == 'storage' else 'a name'}, got ''")
        if self.max_parameters is not None:
            check_least("max_parameters", self.max_parameters, 1)
        if self.minimise != "none" and self.pruner != "none":
            raise ValueError(f"pruner: with two objectives no trial can be pruned, expected 'none' with minimise, got {self.pruner!r}")
        if self.minimise != "none" and self.sampler == "cmaes":
            raise ValueError("sampler: CMA-ES has one objective, expected tpe, random or nsga2 with minimise, got 'cmaes'")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them, got both")
        if self.storage is not None and self.overwrite:
            raise ValueError("overwrite: a study in a storage of your own is not replaced; choose another name (study)")
        self.trial_config("trial", {}, {})  # what training would refuse is refused now
        if self.pruner != "none" and self.pruning_epochs > self.epochs:
            raise ValueError(f"pruning_epochs: expected at most the {self.epochs} epochs of a trial, got {self.pruning_epochs}")

    def trial_config(self, out: str, network: dict[str, Any], training: dict[str, Any]) -> TrainConfig:
        """The training run of one trial."""
        options = {name: getattr(self, name) for name in OF_TRAINING} | training
        return TrainConfig(data=self.data, out=out, model="network", network=network, **options)

    def load_space(self) -> Space:
        """The space it searches."""
        return load_space(self.space)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types."""
        return dataclasses.asdict(self)

    def settings(self) -> dict[str, Any]:
        """What makes trials comparable: goes on record in the study, and a resumed search must have the same."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}
