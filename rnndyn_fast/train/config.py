"""Everything that determines a training run, as one dataclass: a command line, a YAML file or a few keywords."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union

NETWORK_OPTIONS = (
    "lateral_connections",
    "topdown_connections",
    "LT_interaction",
    "timesteps",
    "LT_position",
    "classifier_bias",
    "norm_type",
    "widths",
    "unroll",
    "backend",
    "engine",
)
OPTIONS_WITH_SPEC = ("timesteps", "backend", "engine")  # those of them that are no part of a spec
# What a resumed run may change: how and how long it runs, not what it computes.
FREE_ON_RESUME = ("data", "out", "epochs", "patience", "keep", "threads", "backend", "engine", "resume", "overwrite")


def option(default: Any, text: str) -> Any:
    """A field of a configuration, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the published recipe for the lateral, additive network (arXiv 2308.12435).

    Recipe: Adam at a constant 1e-3, batches of 1024 (validation 250), 60 epochs, ``loss = sum over time steps of the
    mean negative log-likelihood`` of the clamped log-probabilities, Xavier-uniform weights, TrivialAugmentWide. What
    each field means is in its ``metadata["help"]``, which is also what ``rnndyn train --help`` prints. Image size and
    number of classes are those of the data.

    Raises:
        TypeError: a field has another type than declared.
        ValueError: a field is out of range; names the field, what was expected and what came.

    >>> TrainConfig(data="images.h5", out="runs/lateral", epochs=3).batch_size
    1024
    """

    data: str = field(metadata={"help": "HDF5 image file (rnndyn data make, or any MiniEcoset file)"})
    out: str = field(metadata={"help": "folder of the run: checkpoints, metrics, configuration"})
    model: str = option("blt_net_64", "network: blt_net_64, blt_net_128, or a file (YAML) with a spec; see rnndyn plan MODEL")
    network: dict[str, Any] | None = option(None, "the spec itself, in a configuration file (what a file under `model` becomes)")  # noqa: RUF009
    lateral_connections: bool = option(True, "recurrence within areas")
    topdown_connections: bool = option(False, "recurrence from the area above")
    LT_interaction: Literal["additive", "multiplicative"] = option(
        "additive", "how lateral and top-down terms meet the bottom-up one: b + l + d or b * (1 + l + d)"
    )
    timesteps: int = option(10, "time steps T")
    LT_position: Literal["all", "last"] = option("all", "areas with recurrence: all, or the last alone")
    classifier_bias: bool = option(False, "bias of the readout; without it the readout zones are cones")
    norm_type: Literal["LN", "None"] = option("LN", "LayerNorm in every area, or none (then with biases)")
    widths: tuple[int, ...] = option((32, 64, 128, 256, 512), "channels of retina, V1, V2, V4, IT")
    unroll: Literal["engineering", "biological"] = option(
        "engineering", "bottom-up connections within a time step, as published, or one step per connection"
    )
    backend: Literal["native", "reference"] | None = option(None, "native kernels, plain PyTorch, or whichever can run")
    engine: Literal["auto", "direct", "winograd", "amx", "fused"] = option(
        "auto", "convolutions of the native backend: ours where they save work, PyTorch's, or ours wherever they can run"
    )
    epochs: int = option(60, "epochs in all, those before a resume included")
    batch_size: int = option(1024, "images per training step")
    val_batch_size: int = option(250, "images per validation batch")
    patience: int | None = option(None, "stop after that many epochs without a better validation accuracy; default: train all epochs")
    lr: float = option(1e-3, "learning rate of Adam")
    lr_patience: int | None = option(
        None, "divide the learning rate by 4 after that many epochs without a better validation accuracy; default: it is constant"
    )
    init: Literal["xavier", "default"] = option("xavier", "Xavier-uniform weights of convolutions and dense layers, or PyTorch's default")
    augment: Literal["trivialaugmentwide", "none"] = option("trivialaugmentwide", "augmentation of training images")
    max_train_images: int | None = option(None, "train on that many images, evenly spaced over the split")
    max_val_images: int | None = option(None, "validate on that many images, evenly spaced over the split")
    keep: tuple[int, ...] = option((), "epochs whose checkpoints are kept, as epoch_1.pt: 1,2,4,8")
    seed: int = option(0, "of initial weights, order of images and augmentation")
    threads: int | None = option(None, "CPU threads; default: PyTorch's")
    resume: bool = option(False, "go on from the last checkpoint in `out`")
    overwrite: bool = option(False, "replace a run that is in `out`")

    def __post_init__(self) -> None:
        if isinstance(self.widths, Sequence) and not isinstance(self.widths, str):
            object.__setattr__(self, "widths", tuple(self.widths))  # YAML and JSON have lists only
        if isinstance(self.keep, Sequence) and not isinstance(self.keep, str):
            object.__setattr__(self, "keep", tuple(self.keep))
        for name in ("data", "out"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        self._take_spec()
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name, least in (("timesteps", 1), ("epochs", 1), ("batch_size", 1), ("val_batch_size", 1), ("seed", 0)):
            check_least(name, getattr(self, name), least)
        for name in ("patience", "lr_patience", "max_train_images", "max_val_images", "threads"):
            if getattr(self, name) is not None:
                check_least(name, getattr(self, name), 1)
        if any(epoch < 1 for epoch in self.keep):
            raise ValueError(f"keep: expected epochs of at least 1, got {self.keep}")
        if len(self.widths) != 5 or min(self.widths) < 1:
            raise ValueError(f"widths: expected 5 positive numbers (retina, V1, V2, V4, IT), got {self.widths}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a positive finite number, got {self.lr}")
        self._check_model()
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them, got both")

    def _take_spec(self) -> None:
        """Put the spec in the place of the file that names it, so that the configuration stands for itself."""
        from rnndyn_fast.models import named

        if isinstance(self.model, str) and self.network is None:
            for name, value in named(self.model).items():
                object.__setattr__(self, name, value)

    def _check_model(self) -> None:
        from rnndyn_fast.models import MODELS
        from rnndyn_fast.models.spec_network import NETWORK

        if self.model not in MODELS:
            near = difflib.get_close_matches(self.model, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"model: expected one of {sorted(MODELS)} or a file of a spec, got {self.model!r}; {hint}a file ends in .yaml")
        if (self.model == NETWORK) != (self.network is not None):
            raise ValueError(f"network: expected a spec with model = {NETWORK!r} and with no other, got model = {self.model!r}")
        if self.network is None:
            return
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in NETWORK_OPTIONS:
            if name not in OPTIONS_WITH_SPEC and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}: is part of the spec of a network; expected its default, got {getattr(self, name)!r}")

    def network_options(self) -> dict[str, Any]:
        """Keyword options of the network that do not come from the data."""
        if self.network is not None:
            return {"network": self.network, **{name: getattr(self, name) for name in OPTIONS_WITH_SPEC}}
        return {name: getattr(self, name) for name in NETWORK_OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types, for JSON, YAML and checkpoints."""
        return {**dataclasses.asdict(self), "widths": list(self.widths), "keep": list(self.keep)}

    def as_new(self) -> TrainConfig:
        """The same run without `resume` and `overwrite`: goes on record, so that using it again replaces nothing."""
        return dataclasses.replace(self, resume=False, overwrite=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ValueError for fields that are unknown or missing."""
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        missing = [name for name in ("data", "out") if name not in values]
        if unknown or missing:
            raise ValueError(f"values: unknown fields {unknown}, missing fields {missing}; fields are {sorted(known)}")
        return cls(**values)

    def check_resumes(self, earlier: TrainConfig) -> None:
        """Raise ValueError, listing the differences, unless this is the run `earlier`, only longer or elsewhere."""
        pairs = [
            (item.name, getattr(earlier, item.name), getattr(self, item.name))
            for item in dataclasses.fields(self)
            if item.name not in FREE_ON_RESUME
        ]
        different = [f"{name} was {old!r}, is {new!r}" for name, old, new in pairs if old != new]
        if different:
            raise ValueError(f"resume: the run in {self.out} was started with other options: {'; '.join(different)}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise unless `value` is of the declared type."""
    if not _matches(value, hint):
        if typing.get_origin(hint) is Literal or any(typing.get_origin(h) is Literal for h in typing.get_args(hint)):
            raise ValueError(f"{name}: expected one of {_choices(hint)}, got {value!r}")
        wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        raise TypeError(f"{name}: expected {wanted}, got {value!r} ({type(value).__name__})")


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _choices(hint: Any) -> list[Any]:
    found: list[Any] = []
    for argument in typing.get_args(hint):
        if argument is type(None):
            found.append(None)
        else:
            found += _choices(argument) if typing.get_origin(argument) is Literal else [argument]
    return found


def check_least(name: str, value: int, least: int) -> None:
    """Raise unless `value` is at least `least`."""
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
