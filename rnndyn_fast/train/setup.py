"""What a run is made of before it starts: images, network, weights, and a description of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rnndyn_fast import models
from rnndyn_fast.data import ImageFile, ImageSplit
from rnndyn_fast.data.own_images import images_for_training
from rnndyn_fast.data.shard_index import is_shards
from rnndyn_fast.data.shards import ShardFile, ShardSplit, index_for_training
from rnndyn_fast.job_device import backend_on
from rnndyn_fast.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.optional import require
from rnndyn_fast.train.config import TrainConfig


class SpacedSubset:
    """`count` images of a split, evenly spaced over it, so that a split sorted by class still yields all classes."""

    def __init__(self, split: ImageSplit | ShardSplit, count: int) -> None:
        self._split = split
        self._rows = np.arange(count) * len(split) // count
        self.labels = split.labels[self._rows]
        self.shards = split.shards[self._rows] if isinstance(split, ShardSplit) else None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `indices` of the subset."""
        return self._split.read(self._rows[indices])


def limited(split: ImageSplit | ShardSplit, count: int | None) -> ImageSplit | ShardSplit | SpacedSubset:
    """The split, or `count` of its images, evenly spaced, if it holds more than that."""
    return split if count is None or count >= len(split) else SpacedSubset(split, count)


def initialise(net: nn.Module) -> None:
    """Xavier-uniform weights of every Conv2d and Linear, in place; transposed convolutions and biases stay as they are.

    Source: the published training script of arXiv 2308.12435.
    """
    for module in net.modules():
        # ConvTranspose2d is no subclass of Conv2d.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def build_network(config: TrainConfig, data: ImageFile | ShardFile, device: torch.device) -> RecurrentNetwork:
    """The network of a configuration for some data, on a device, with its initial weights.

    Raises: ValueError: no such network, or not for such images; names both.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            net = models.build_for(config.build_options(), num_classes=data.num_classes, image_size=data.image_size)
        except ValueError as error:
            what = "" if str(error).startswith("model ") else f"model {config.model}: "
            images = f"{config.data} has {data.image_size} px and {data.num_classes} categories"
            raise ValueError(f"{what}{error} ({images})") from error
        if config.init == "xavier":
            initialise(net)
    net.backend = backend_on(device, net.backend)
    return net.to(device)


def training_images(config: TrainConfig, note: Callable[[str], None], progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The HDF5 image file to train on, made of image files where the configuration names those, or the index of its tar shards; `note` is
    called with a word on it.

    Raises: ValueError: ``image_size`` is given and the file has a size of its own.
    """
    size = config.image_size or models.image_size_of(config.build_options())
    if is_shards(config.data):
        index, told = index_for_training(config.data, Path(config.out), config.image_size, size, progress)
        note(told)
        return index
    images, told = images_for_training(config.data, Path(config.out), size, config.overwrite, progress)
    if told:
        note(told)
    if images == Path(config.data) and config.image_size is not None:
        raise ValueError(f"image_size: expected only with a folder or table of image files, {images} has a size of its own")
    return images


def describe_data(data: ImageFile | ShardFile, normalise: str = "data") -> dict[str, Any]:
    """What a checkpoint keeps of the data: categories, image size, their statistics, and what the network's input is normalised by."""
    statistics = {"mean": [float(value) for value in data.mean], "std": [float(value) for value in data.std]}
    return {
        "path": str(data.path),
        "image_size": data.image_size,
        "categories": list(data.categories),
        "images": {name: len(data.split(name)) for name in ("train", "val") if name in data.split_names},
        "shards": np.bincount(data.split("train").shards).tolist() if isinstance(data, ShardFile) else [],
        **describe_input(normalise, statistics),
    }


def describe_input(normalise: str, statistics: dict[str, list[float]] | None) -> dict[str, Any]:
    """What the input is normalised by, "mean" and "std" on the scale 0-255, and the data's own statistics, where they are known.

    "data": those statistics; "signed": what takes 0-255 to -1..1; "imagenet": ImageNet's.
    """
    of_input = {
        "data": statistics or {},
        "signed": {"mean": [127.5] * 3, "std": [127.5] * 3},
        "imagenet": {"mean": [255 * value for value in IMAGENET_MEAN], "std": [255 * value for value in IMAGENET_STD]},
    }
    return {**of_input[normalise], **({} if statistics is None else {"statistics": statistics})}


def config_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``rnndyn train --config`` reads."""
    require("yaml")
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """That many CPU threads in the block; None: as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
