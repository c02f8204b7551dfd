"""Everything that determines a training run, as one dataclass: a command line, a YAML file or a few keywords."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rnndyn_fast.train.options import check_least, check_range, check_type, option

# Options of blt_net that are fields here; every other network takes its own from `model_options`.
BLT_NET_OPTIONS = (
    "lateral_connections",
    "topdown_connections",
    "LT_interaction",
    "LT_position",
    "classifier_bias",
    "norm_type",
    "widths",
    "unroll",
)
COMMON_OPTIONS = ("timesteps", "backend", "engine")  # of every network
NETWORK_OPTIONS = (*BLT_NET_OPTIONS, *COMMON_OPTIONS)
DEFAULT_TIMESTEPS = 10  # of blt_net and of a spec, which have no published number of their own
LR_RULES = ("lr_schedule", "lr_patience", "lr_steps", "lr_trend")
TUPLES = ("widths", "keep", "lr_steps", "time_weights")
# What a resumed run may change: how and how long it runs, not what it computes.
FREE_ON_RESUME = (
    "data",
    "out",
    "epochs",
    "patience",
    "keep",
    "threads",
    "device",
    "cuda_graphs",
    "backend",
    "engine",
    "workers",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "wandb",
    "profile",
    "resume",
    "overwrite",
    "replay_failure",
)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the published recipe for the lateral, additive network (arXiv 2308.12435).

    Recipe: Adam at a constant 1e-3, batches of 1024 (validation 250), 60 epochs, ``loss = sum over time steps of the
    mean negative log-likelihood`` of the clamped log-probabilities, Xavier-uniform weights, TrivialAugmentWide. Recipes of
    other networks are files (``rnndyn_fast.train.recipes``). What each field means is in its ``metadata["help"]``, which is
    also what ``rnndyn train --help`` prints. Image size and number of classes are those of the data.

    Raises:
        TypeError: a field has another type than declared.
        ValueError: a field is out of range; names the field, what was expected and what came.

    >>> TrainConfig(data="images.h5", out="runs/lateral", epochs=3).batch_size
    1024
    """

    data: str = field(
        metadata={
            "help": "HDF5 image file (any of the MiniEcoset layout); tar shards (WebDataset), as 'shards/{000000..000007}.tar' or their "
            "folder; or image files, as for rnndyn data make --source"
        }
    )
    out: str = field(metadata={"help": "folder of the run: checkpoints, metrics, configuration"})
    model: str = option(
        "blt_net_64", "network: blt_net_64, blt_net_128, blt_vs, rcnn_sat, a ConvRNN (rgc_shallow, ...), or a file (YAML) with a spec"
    )
    model_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of blt_vs, rcnn_sat or a ConvRNN, as YAML: '{kind: b, width_divisor: 8}'; those of blt_net are below"},
    )
    network: dict[str, Any] | None = option(None, "the spec itself, in a configuration file (what a file under `model` becomes)")  # noqa: RUF009
    lateral_connections: bool = option(True, "recurrence within areas")
    topdown_connections: bool = option(False, "recurrence from the area above; blt_net_64() in Python has it, as the published constructor")
    LT_interaction: Literal["additive", "multiplicative"] = option(
        "additive", "how lateral and top-down terms meet the bottom-up one: b + l + d or b * (1 + l + d)"
    )
    timesteps: int | None = option(
        None, "time steps T; default: 10 (blt_net, as the published training; blt_net_64() in Python: 2; a spec), or as published"
    )
    LT_position: Literal["all", "last"] = option("all", "areas with recurrence: all, or the last alone")
    classifier_bias: bool = option(
        False, "bias of the readout; without it the readout zones are cones; blt_net_64() in Python has it, as the published constructor"
    )
    norm_type: Literal["LN", "None"] = option("LN", "LayerNorm in every area, or none (then with biases)")
    widths: tuple[int, ...] = option((32, 64, 128, 256, 512), "channels of retina, V1, V2, V4, IT")
    unroll: Literal["engineering", "biological"] = option(
        "engineering", "bottom-up connections within a time step, as published, or one step per connection"
    )
    backend: Literal["native", "reference"] | None = option(
        None, "native kernels, the same schedule in PyTorch's operations, plain PyTorch, or the first that can run"
    )
    engine: Literal["auto", "direct", "winograd", "amx", "fused", "triton"] = option(
        "auto", "convolutions of the native backend: ours where they save work, PyTorch's, or ours wherever they can run"
    )
    epochs: int = option(60, "epochs in all, those before a resume included")
    batch_size: int = option(1024, "images per training step, of all processes together")
    accumulate: int = option(1, "parts in which a process takes its images of a training step, for less memory: gradients are summed")
    val_batch_size: int = option(250, "images per validation batch, of all processes together")
    patience: int | None = option(None, "stop after that many epochs without a better validation accuracy; default: train all epochs")
    loss: Literal["sum", "mean", "last"] = option("sum", "cross-entropy over time steps: the sum, the mean, or the last step's")
    time_weights: tuple[float, ...] = option((), "weights of the time steps in the loss, one for each answer of the network: 0,0.5,1")
    label_smoothing: float = option(0.0, "share of the label's probability that is spread over all classes, in 0..1")
    class_weights: Literal["none", "inverse_frequency"] = option("none", "weights of classes in the loss, scaled to sum 1")
    optimizer: Literal["adam", "adamw", "sgd", "lars", "lamb"] = option(
        "adam", "optimiser; lars and lamb, for large batches, need the extra large-batch"
    )
    momentum: float = option(0.9, "momentum of sgd and lars")
    weight_decay: float = option(
        0.0,
        "of kernels (convolutions, dense layers): with adam, times their sum of squares is added to the loss; else the optimiser's own",
    )
    weight_decay_of: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": 'weight decay of parameters by pattern of their name; the last that fits counts: \'{"readout.*": 0, "*.bias": 1e-5}\''
        },
    )
    clip: float | None = option(None, "gradients of a tensor longer than that share of the tensor are scaled back to it")
    clip_norm: float | None = option(None, "gradients of all parameters together longer than that are scaled back to it")
    lr: float = option(1e-3, "learning rate; of one_cycle the highest")
    adam_eps: float = option(1e-8, "epsilon of adam, adamw and lamb")
    ema: float | None = option(None, "decay of an exponential average of the weights, as 0.999; it is what is validated and used")
    lr_schedule: Literal["constant", "cosine", "one_cycle"] = option(
        "constant", "learning rate over all training steps: constant, a half cosine down to lr_least, or up and down once"
    )
    lr_warmup_steps: int = option(0, "training steps in which the learning rate rises linearly, from a hundredth of it")
    lr_warmup: int = option(0, "epochs in which the learning rate rises linearly, from a hundredth of it, once an epoch")
    lr_patience: int | None = option(
        None, "divide the learning rate by 4 after that many epochs without a better validation accuracy; default: it is constant"
    )
    lr_steps: tuple[int, ...] = option((), "divide the learning rate by 10 after each of these epochs: 30,60")
    lr_trend: bool = option(
        False,
        "halve the learning rate when a line through the last 5 validation losses has fallen less than 1% for the third epoch in a row",
    )
    lr_least: float = option(0.0, "training ends when the learning rate has fallen to that; of cosine the last one")
    init: Literal["xavier", "default"] | None = option(
        None, "Xavier-uniform weights of convolutions and dense layers (default of blt_net), or the network's own"
    )
    normalise: Literal["data", "signed", "imagenet"] | None = option(
        None, "input: by the data's mean and deviation, to -1..1, or by those of ImageNet; default: as the network was published"
    )
    augment: Literal["trivialaugmentwide", "none", "flip", "blur_flip_trivialaugmentwide"] = option(
        "trivialaugmentwide", "augmentation of training images; flips are horizontal"
    )
    image_size: int | None = option(None, "height and width that image files are brought to; default: the model's")
    mixup: float = option(0.0, "images are mixed with others of their batch by shares from Beta(m, m)")
    cutmix: float = option(0.0, "rectangles come from other images of the batch, of areas from Beta(c, c); with mixup, either by chance")
    max_train_images: int | None = option(None, "train on that many images, evenly spaced over the split")
    max_val_images: int | None = option(None, "validate on that many images, evenly spaced over the split")
    keep: tuple[int, ...] = option((), "epochs whose checkpoints are kept, as epoch_1.pt: 1,2,4,8")
    seed: int = option(0, "of initial weights, order of images and augmentation")
    threads: int | None = option(None, "CPU threads; default: PyTorch's")
    workers: int = option(0, "processes that read and augment images; 0: a thread reads")
    device: str | None = option(None, "cpu, cuda, cuda:1, ..., mps, xpu; default: an NVIDIA GPU where there is one")
    precision: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "of maps, by autocast; parameters stay float32; float16, on a GPU, with a gradient scaler"
    )
    cuda_graphs: bool = option(True, "on a GPU, replay training steps and validation as CUDA graphs")
    sync_batch_norm: bool = option(False, "statistics of batch norms over all processes; runs on the reference backend")
    checkpoint_every: int | None = option(None, "training steps between checkpoints within an epoch; default: one at an epoch's end")
    log_every: int = option(50, "training steps between entries of steps.jsonl, TensorBoard and Weights & Biases")
    tensorboard: bool = option(False, "write TensorBoard events to the folder tensorboard of the run (extra tensorboard)")
    wandb: str | None = option(None, "project of Weights & Biases to report to (extra wandb; with WANDB_MODE=offline to files)")
    profile: int = option(0, "training steps to profile, after three others; trace.json opens in Perfetto")
    resume: bool = option(False, "go on from the last checkpoint in `out`")
    overwrite: bool = option(False, "replace a run that is in `out`")
    replay_failure: bool = option(
        False, "compute the step again at which the run in `out` found NaN or infinity, and say where; writes nothing"
    )

    def __post_init__(self) -> None:
        for name in TUPLES:  # YAML and JSON have lists only
            if isinstance(getattr(self, name), Sequence) and not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("data", "out"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        self._take_model()
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(item.name, getattr(self, item.name), hints[item.name])
        for name in ("epochs", "batch_size", "val_batch_size", "accumulate", "log_every"):
            check_least(name, getattr(self, name), 1)
        for name in ("seed", "lr_warmup", "lr_warmup_steps", "workers", "profile"):
            check_least(name, getattr(self, name), 0)
        for name in (
            "checkpoint_every",
            "timesteps",
            "patience",
            "lr_patience",
            "max_train_images",
            "max_val_images",
            "threads",
            "image_size",
        ):
            if getattr(self, name) is not None:
                check_least(name, getattr(self, name), 1)
        for name in ("keep", "lr_steps"):
            if any(epoch < 1 for epoch in getattr(self, name)):
                raise ValueError(f"{name}: expected epochs of at least 1, got {getattr(self, name)}")
        late = [epoch for epoch in self.keep if epoch > self.epochs]
        if late:
            raise ValueError(f"keep: expected epochs from 1 to {self.epochs}, got {late[0]}")
        if len(self.widths) != 5 or min(self.widths) < 1:
            raise ValueError(f"widths: expected 5 positive numbers (retina, V1, V2, V4, IT), got {self.widths}")
        for name in ("lr", "adam_eps", "clip", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")
        for name in ("label_smoothing", "momentum"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("weight_decay", "lr_least", "mixup", "cutmix"):
            check_range(name, getattr(self, name), 0)
        if self.lr_least >= self.lr:
            raise ValueError(f"lr_least: expected less than lr, {self.lr}, got {self.lr_least}")
        if self.ema is not None:
            check_range("ema", self.ema, 0, 1)
        self._check_objective()
        self._check_model()
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected at most one of them, got both")

    def _check_objective(self) -> None:
        """What must fit together in loss, optimiser and learning rate."""
        for pattern, value in self.weight_decay_of.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"weight_decay_of: expected a number for {pattern!r}, got {value!r} ({type(value).__name__})")
            check_range(f"weight_decay_of[{pattern!r}]", value, 0)
        if any(not (math.isfinite(w) and w >= 0) for w in self.time_weights) or (self.time_weights and not any(self.time_weights)):
            raise ValueError(f"time_weights: expected finite numbers of at least 0, not all 0, got {self.time_weights}")
        if self.time_weights and self.loss == "last":
            raise ValueError("time_weights: expected loss sum or mean; loss last takes the last time step alone")
        rules = [name for name in LR_RULES if getattr(self, name) not in ("constant", None, (), False)]
        if len(rules) > 1:
            raise ValueError(f"{', '.join(rules)}: expected at most one of them")
        if self.lr_warmup and (self.lr_warmup_steps or self.lr_schedule != "constant"):
            raise ValueError("lr_warmup: expected lr_warmup_steps with lr_schedule, and one of lr_warmup and lr_warmup_steps")
        if self.sync_batch_norm:
            if self.backend not in (None, "reference"):
                raise ValueError(f"sync_batch_norm: runs with backend reference alone, got backend {self.backend!r}")
            object.__setattr__(self, "backend", "reference")

    def _take_model(self) -> None:
        """Put what a name or file stands for in its place, and the defaults of the network, so that the configuration stands for itself."""
        from rnndyn_fast.models import named

        if isinstance(self.model, str) and self.network is None:
            found = named(self.model)
            object.__setattr__(self, "model", found.pop("model"))
            object.__setattr__(self, "network", found.pop("network", None))
            if found and isinstance(self.model_options, dict):
                object.__setattr__(self, "model_options", {**self.model_options, **found})
        own = self.own_fields
        published = {"blt_vs": "signed", "rcnn_sat": "signed", "convrnn": "imagenet"}
        for name, value in (
            ("timesteps", DEFAULT_TIMESTEPS if own else None),
            ("init", "xavier" if own else "default"),
            ("normalise", published.get(self.model, "data") if isinstance(self.model, str) else "data"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def own_fields(self) -> bool:
        """Whether the network is described by fields of the configuration: blt_net, or a spec."""
        return self.network is not None or str(self.model).startswith("blt_net")

    def _check_model(self) -> None:
        from rnndyn_fast.models import options_of
        from rnndyn_fast.models.registry import OF_DATA
        from rnndyn_fast.models.spec_network import NETWORK
        from rnndyn_fast.suggestions import nearest

        known = options_of(self.model)
        if (self.model == NETWORK) != (self.network is not None):
            raise ValueError(f"network: expected a spec with model = {NETWORK!r} and with no other, got model = {self.model!r}")
        fields = ("network", *COMMON_OPTIONS, *(BLT_NET_OPTIONS if self.own_fields else ()))
        options = [name for name in known if name not in (*fields, *OF_DATA)]
        for name in self.model_options:
            if name in OF_DATA:
                raise ValueError(f"model_options: {name!r} is that of the data")
            if name in fields:
                raise ValueError(f"model_options: {name!r} is an option of its own, beside model_options")
            if name not in options:
                raise ValueError(f"model_options: {self.model} has no option {name!r}{nearest(name, options)}; options are {options}")
        if self.model.startswith("blt_net"):
            return
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in BLT_NET_OPTIONS:
            if getattr(self, name) != defaults[name]:
                what = "is part of the spec of a network" if self.network is not None else f"is an option of blt_net, not of {self.model}"
                raise ValueError(f"{name}: {what}; expected its default, got {getattr(self, name)!r}")

    def build_options(self) -> dict[str, Any]:
        """The network for `rnndyn_fast.models.build`, less what comes from the data."""
        fields = NETWORK_OPTIONS if self.own_fields and self.network is None else COMMON_OPTIONS
        options: dict[str, Any] = {"model": self.model, **{name: getattr(self, name) for name in fields}, **self.model_options}
        if self.network is not None:
            options["network"] = self.network
        if self.timesteps is None:
            del options["timesteps"]
        return options

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain types, for JSON, YAML and checkpoints."""
        return {**dataclasses.asdict(self), **{name: list(getattr(self, name)) for name in TUPLES}}

    def as_new(self) -> TrainConfig:
        """The same run without `resume`, `overwrite` and `replay_failure`: goes on record, so that using it again replaces nothing."""
        return dataclasses.replace(self, resume=False, overwrite=False, replay_failure=False)

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
            if item.name not in FREE_ON_RESUME or (item.name == "epochs" and self.lr_schedule != "constant")
        ]
        different = [f"{name} was {old!r}, is {new!r}" for name, old, new in pairs if old != new]
        if different:
            raise ValueError(f"resume: the run in {self.out} was started with other options: {'; '.join(different)}")
