"""What a comparison of cells is told, and what it keeps of each training."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from rnndyn_fast.search.architecture import CELLS, FEEDFORWARD
from rnndyn_fast.suggestions import others
from rnndyn_fast.train import TrainConfig
from rnndyn_fast.train.options import check_least, check_type, option

REPORT = "report.html"
SPLITS = ("test", "testplus")
UNGATED = "rgc_ungated"  # the reciprocal gated cell, its halves not gating each other
NETWORKS = (*CELLS, UNGATED)


@dataclass(frozen=True)
class CompareConfig:
    """A comparison. What each field means is in its ``metadata["help"]``, which is also what ``rnndyn compare --help`` prints.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.

    >>> CompareConfig(data="images.h5", out="runs/compare").networks
    ('feedforward', 'simplernn', 'lstm', 'rgc')
    """

    data: str = field(metadata={"help": "HDF5 image file with train, val, test and testplus (rnndyn data make --challenging)"})
    out: str = field(metadata={"help": "folder: a training run for every network and seed, tables, report"})
    networks: tuple[str, ...] = option((FEEDFORWARD, "simplernn", "lstm", "rgc"), "what is compared, of " + ", ".join(NETWORKS))
    parameters: int = option(30_000, "parameters of every network, within 5%; widths follow from it")
    depth: int = option(2, "layers after the stem")
    bypass: bool = option(False, "a layer's input, pooled, is added to its output, in all networks")
    seeds: int = option(2, "trainings of every network")
    timesteps: int = option(5, "time steps T")
    epochs: int = option(6, "epochs of a training")
    batch_size: int = option(64, "images per training step")
    lr: float = option(3e-3, "learning rate of Adam")
    max_train_images: int | None = option(6000, "train on that many images, evenly spaced over the split")
    max_val_images: int | None = option(1000, "validate on that many images, evenly spaced over the split")
    augment: Literal["trivialaugmentwide", "none", "flip"] = option("none", "augmentation of training images")
    threads: int | None = option(None, "CPU threads; default: PyTorch's")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    backend: Literal["native", "reference"] | None = option(None, "as in rnndyn train")
    engine: Literal["auto", "direct", "winograd", "amx"] = option("auto", "as in rnndyn train")
    resume: bool = option(False, "go on with the comparison in `out`: what is finished is not trained again")
    overwrite: bool = option(False, "replace the comparison that is in `out`")

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(self.networks) if isinstance(self.networks, list) else self.networks)
        for name in ("data", "out"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name, least in (("parameters", 100), ("depth", 1), ("seeds", 1)):
            check_least(name, getattr(self, name), least)
        for name in self.networks:
            if name not in NETWORKS:
                raise ValueError(f"networks: unknown network {name!r}{others(name, NETWORKS)}")
        if len(self.networks) < 2 or len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks: expected at least two different ones, got {list(self.networks)}")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them, got both")
        self.training("o", {}, 0)  # what training would refuse is refused now

    def training(self, out: str, network: dict[str, Any], seed: int) -> TrainConfig:
        """The training run of one network."""
        names = (
            "timesteps",
            "epochs",
            "batch_size",
            "lr",
            "max_train_images",
            "max_val_images",
            "augment",
            "threads",
            "device",
            "backend",
            "engine",
        )
        options = {name: getattr(self, name) for name in names}
        return TrainConfig(data=self.data, out=out, model="network", network=network, loss="mean", seed=seed, **options)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types."""
        return {**dataclasses.asdict(self), "networks": list(self.networks)}


@dataclass(frozen=True)
class Trained:
    """One training: parameters, multiply-adds per image, seconds of training, epochs, and accuracy and images by split; [T] each."""

    network: str
    seed: int
    width: int
    growth: float
    parameters: int
    multiply_adds: float
    seconds: float
    best_epoch: int
    accuracy: dict[str, list[float]]
    images: dict[str, int]

    def last(self, split: str) -> float:
        """Accuracy at the last time step."""
        return self.accuracy[split][-1]
