"""Weights from elsewhere as a checkpoint of ours: which network they are of, and what its input is normalised by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rnndyn_fast import models
from rnndyn_fast.data import ImageFile
from rnndyn_fast.models.foreign import blt_net_options, find_state_dict, fitted, load_tensors
from rnndyn_fast.suggestions import check_choice
from rnndyn_fast.train.checkpoint import FORMAT, load_weights, save_checkpoint
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.setup import describe_data, describe_input

NORMALISE = ("data", "signed", "imagenet")


@dataclass(frozen=True)
class Foreign:
    """What a file of weights alone does not say.

    Args:
        model: name of the network, or a file (YAML) with its spec, as for ``rnndyn train``.
        data: the HDF5 image file, or the folder with a subfolder per category, whose categories the readout answers.
        options: of the model; those that shapes of tensors tell (of blt_net all but LT_interaction, timesteps and unroll) may be left out.
        normalise: "data" (statistics of the HDF5 file), "signed", "imagenet"; None: as the network was published.
    """

    model: str
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    normalise: str | None = None

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
        """The contents of a checkpoint of ours made of the weights in a file, and what was done for it, in words.

        Raises:
            FileNotFoundError: no such file or data.
            ValueError: no weights, of another network, or another number of categories; says what does not fit.
        """
        contents = load_tensors(path)
        if isinstance(contents, Mapping) and contents.get("format") == FORMAT:
            raise ValueError(f"model: {os.fspath(path)} is a checkpoint of rnndyn, which says its network itself; leave model out")
        tensors = find_state_dict(contents, path)
        options, notes = self._options(tensors)
        try:
            with torch.device("meta"):
                names = models.build(options).state_dict()
        except ValueError as error:
            raise ValueError(f"model_options: {error}") from error
        state, renamed = fitted(tensors, names)
        # A network that is used once: weights that do not fit are listed before anything else is done.
        net = models.build(options)
        load_weights(net, state, path)
        config: Any = net.config
        description = self._description(config)
        return {
            "model": config, "state_dict": net.state_dict(), "epoch": 0, "data": description,
            "imported": {"from": str(path), "notes": [*renamed, *notes]},
        }, [*renamed, *notes]  # fmt: skip

    def _options(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], list[str]]:
        """Everything that the network is built by."""
        found = {**models.named(self.model)}
        known = models.options_of(found["model"])
        given = {}
        for name, value in self.options.items():
            plain = name.replace("-", "_")
            given[next((one for one in known if one.lower() == plain.lower()), plain)] = value
        options = {**found, **given}
        if not found["model"].startswith("blt_net"):
            classes = self._categories()
            for name, value in (("num_classes", len(classes)), ("image_size", self._image_size())):
                if name in known and value is not None:
                    options.setdefault(name, value)
            return options, []
        probe = models.build({"model": found["model"], "widths": (1, 2, 4, 8, 16)})
        plain_names, _ = fitted(tensors, [*probe.state_dict(), *(f"{a}.{p}.bias" for a in ("v1", "v2") for p in ("bottom_up", "lateral"))])
        told = blt_net_options({name: tuple(value.shape) for name, value in plain_names.items()})
        for name, value in told.items():
            here = given.get(name, value)
            if (list(here) if isinstance(here, tuple) else here) != value:
                raise ValueError(f"model_options: {name} is {value!r} by the shapes of the weights, got {given[name]!r}")
        assumed = {"LT_interaction": "additive", "timesteps": 10}
        notes = [f"{name} is taken to be {value}" for name, value in assumed.items() if name not in given]
        size = self._image_size()
        if "image_size" not in told and "image_size" not in given and size is not None:
            told["image_size"] = size
        return {**assumed, **told, **options}, notes

    def _image_size(self) -> int | None:
        if Path(self.data).is_dir():
            return None
        with ImageFile(self.data, required_splits=None, argument="data") as file:
            return file.image_size

    def _categories(self) -> list[str]:
        if Path(self.data).is_dir():
            from rnndyn_fast.data.image_folder import list_folder

            return list(list_folder(self.data).class_names)
        with ImageFile(self.data, required_splits=None, argument="data") as file:
            return list(file.categories)

    def _description(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        normalise = self.normalise or TrainConfig(data="", out="", model=str(self.model)).normalise or "data"
        check_choice("normalise", normalise, NORMALISE)
        if Path(self.data).is_dir():
            if normalise == "data":
                raise ValueError(
                    f"normalise: {self.data} is a folder and has no mean and deviation; expected signed or imagenet, or an HDF5 file that "
                    "the network was trained on"
                )
            size = model.get("image_size")
            description = {"path": str(self.data), "image_size": size, "categories": self._categories(), **describe_input(normalise, None)}
        else:
            with ImageFile(self.data, required_splits=None, argument="data") as file:
                description = describe_data(file, normalise)
        classes, names = model.get("num_classes"), description["categories"]
        if classes is not None and classes != len(names):
            raise ValueError(f"data: expected {classes} categories, those of the readout, {self.data} has {len(names)}")
        return description


def import_checkpoint(path: str | os.PathLike[str], foreign: Foreign, out: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """Write weights from elsewhere as a checkpoint that every command takes; the path, and what was done, in words."""
    contents, notes = foreign.read(path)
    return save_checkpoint(out, contents), notes
