"""Declared search spaces: which choices of an architecture and its training are open, and over what."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rnndyn_fast.file_io import reads
from rnndyn_fast.optional import require
from rnndyn_fast.search.architecture import MEANT, PER_LAYER, Architecture
from rnndyn_fast.search.reciprocal_choices import DEFAULTS, FIRST, check_choice_of_cell
from rnndyn_fast.suggestions import nearest

FEEDBACK = re.compile(r"feedback_(\d+)_(\d+)")
OF_LAYER = re.compile(r"layer(\d+)_(\w+)")
# Options of training that may be searched; everything else about a trial is the same for all.
TRAINING = (
    "lr", "batch_size", "timesteps", "init", "augment", "loss", "optimizer", "momentum", "weight_decay", "clip_norm", "label_smoothing",
    "lr_schedule", "lr_warmup", "mixup", "cutmix", "ema",
)  # fmt: skip
_NESTED = ("feedback", "reciprocal", "layers")  # fields of an architecture that are made of choices

Scalar = bool | int | float | str


class Suggests(Protocol):
    """What a space asks for its choices; an Optuna trial is one."""

    def suggest_categorical(self, name: str, choices: list[Any], /) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...


@dataclass(frozen=True)
class Options:
    """One of several values."""

    values: tuple[Scalar, ...]

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """One of them; a single one is not asked for."""
        return self.values[0] if len(self.values) == 1 else trial.suggest_categorical(name, list(self.values))


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; ints where both are ints."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """A number of the range."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, float(self.low), float(self.high), step=self.step, log=self.log)


@dataclass(frozen=True)
class Space:
    """What is searched.

    ``choices`` by name: fields of :class:`Architecture`, feedback edges ``feedback_<from>_<to>`` (booleans), and options of training
    (TRAINING). What is not named has its default. A choice that means nothing with what was chosen before (peepholes of a GRU,
    feedback from a layer that does not exist) is not sampled.

    >>> space = Space.from_plain({"cell": ["gru", "lstm"], "depth": 2, "feedback_2_1": [True, False], "lr": {"low": 1e-3, "high": 1e-2}})
    >>> sorted(space.choices)
    ['cell', 'depth', 'feedback_2_1', 'lr']
    """

    choices: Mapping[str, Options | Range]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Space:
        """A space from plain values: a value, a list of values, or ``{low, high, step, log}``, by name.

        Raises: TypeError, ValueError: an unknown name (with the nearest), values that make no sense.
        """
        if not isinstance(values, Mapping) or not values:
            raise TypeError(f"space: expected a mapping of choices, got {values!r}")
        fields = {f.name: f.default for f in dataclasses.fields(Architecture) if f.name not in _NESTED} | DEFAULTS
        names = [*fields, *TRAINING, "feedback", "feedback_2_1", "layer1_cell"]
        choices: dict[str, Options | Range] = {}
        for name, value in values.items():
            own = OF_LAYER.fullmatch(str(name))
            if name not in names and not FEEDBACK.fullmatch(str(name)) and not (own and own[2] in PER_LAYER):
                raise ValueError(
                    f"space: unknown choice {name!r}{nearest(own[2] if own else name, names)}; there are {names} "
                    "(and feedback_<from>_<to>, layer<number>_<choice>)"
                )
            choices[name] = _choice(str(name), value)
        deepest = max((int(value) for value in _ends(choices.get("depth", Options((Architecture.depth,))))), default=1)
        every = choices.pop("feedback", None)
        if every is not None:  # all pairs
            pairs = [f"feedback_{i}_{k}" for i in range(2, deepest + 1) for k in range(1, i)]
            choices = {**dict.fromkeys(pairs, every), **choices}
        space = cls(choices)
        space._check_values(fields, deepest)
        return space

    def _check_values(self, fields: Mapping[str, Any], deepest: int) -> None:
        """Build an architecture with every value of every choice: an error now instead of in a trial."""
        from rnndyn_fast.train.config import TrainConfig

        for name, choice in self.choices.items():
            edge, own = FEEDBACK.fullmatch(name), OF_LAYER.fullmatch(name)
            if own and not 1 <= int(own[1]) <= deepest:
                raise ValueError(f"space: {name}: expected a layer of 1 .. {deepest}")
            base = own[2] if own else name
            for value in _ends(choice):
                if edge:
                    if not isinstance(value, bool):
                        raise ValueError(f"space: {name}: expected true or false, got {value!r}")
                    if not deepest >= int(edge[1]) > int(edge[2]) >= 1:
                        raise ValueError(f"space: {name}: expected feedback from a layer to one below it, of at most {deepest} layers")
                elif base in fields:
                    default = fields[base]
                    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
                        raise ValueError(f"space: {name}: expected {type(default).__name__}, got {value!r}")
                    if base in DEFAULTS:
                        check_choice_of_cell(base, value)
                    else:
                        field: dict[str, Any] = {base: value}
                        Architecture(**field)
                else:
                    option: dict[str, Any] = {name: value}
                    TrainConfig(data="", out="", **option)

    def to_plain(self) -> dict[str, Any]:
        """The inverse of :meth:`from_plain`."""
        plain: dict[str, Any] = {}
        for name, choice in self.choices.items():
            if isinstance(choice, Options):
                plain[name] = list(choice.values) if len(choice.values) > 1 else choice.values[0]
            else:
                given = dataclasses.asdict(choice)
                plain[name] = {k: v for k, v in given.items() if k in ("low", "high") or v}
        return plain

    def suggest(self, trial: Suggests) -> tuple[Architecture, dict[str, Any]]:
        """An architecture and options of training, with the open choices made by `trial`."""
        shared: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Architecture)}
        own: dict[int, dict[str, Any]] = {}
        edges: list[tuple[int, int]] = []
        training: dict[str, Any] = {}

        def meant(name: str, layer: int) -> bool:
            entering = tuple(edge for edge in edges if edge[1] == layer)
            return name not in MEANT or MEANT[name]({**shared, **own.get(layer, {}), "feedback": entering})

        for name in sorted(self.choices, key=_order):
            choice, edge, of_layer = self.choices[name], FEEDBACK.fullmatch(name), OF_LAYER.fullmatch(name)
            if edge:
                if int(edge[1]) <= shared["depth"] and choice.suggest(trial, name):
                    edges.append((int(edge[1]), int(edge[2])))
            elif name in TRAINING:
                training[name] = choice.suggest(trial, name)
            elif of_layer:
                layer, base = int(of_layer[1]), of_layer[2]
                if layer <= shared["depth"] and meant(base, layer):
                    own.setdefault(layer, {})[base] = choice.suggest(trial, name)
            elif any(name not in own.get(layer, {}) and meant(name, layer) for layer in range(1, shared["depth"] + 1)):
                shared[name] = choice.suggest(trial, name)
        return _architecture(shared, own, edges), training

    @property
    def open(self) -> list[str]:
        """Names of the choices that have more than one value."""
        return [name for name, choice in self.choices.items() if isinstance(choice, Range) or len(choice.values) > 1]


def _order(name: str) -> tuple[int, int, int]:
    """Choices that decide whether others mean anything come first, those of single layers before the shared ones."""
    of_layer = OF_LAYER.fullmatch(name)
    base = of_layer[2] if of_layer else name
    stages = ("depth", "cell")
    if base in stages:
        stage, place = stages.index(base), 0
    elif FEEDBACK.fullmatch(name):
        stage, place = 2, 0
    else:
        stage, place = (3, FIRST.index(base)) if base in FIRST else (4, 0)
    return stage, place, 0 if of_layer else 1


def _architecture(shared: dict[str, Any], own: dict[int, dict[str, Any]], edges: list[tuple[int, int]]) -> Architecture:
    fields = {name: value for name, value in shared.items() if name not in DEFAULTS and name not in _NESTED}
    return Architecture(
        **fields,
        feedback=tuple(edges),
        reciprocal=tuple((name, value) for name, value in shared.items() if name in DEFAULTS),
        layers=tuple((layer, name, value) for layer, values in sorted(own.items()) for name, value in values.items()),
    )


def _ends(choice: Options | Range) -> tuple[Scalar, ...]:
    return choice.values if isinstance(choice, Options) else (choice.low, choice.high)


def _choice(name: str, value: Any) -> Options | Range:
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("low", "high", "step", "log")]
        if unknown or not {"low", "high"} <= value.keys():
            raise ValueError(f"space: {name}: expected low and high (and step, log), got {dict(value)}")
        numbers = [float(v) if isinstance(v, str) else v for v in (value["low"], value["high"])]  # YAML reads 1e-3 as text
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in numbers):
            raise ValueError(f"space: {name}: expected numbers as low and high, got {dict(value)}")
        one = Range(numbers[0], numbers[1], value.get("step"), bool(value.get("log", False)))
        if not one.low < one.high or (one.log and (one.low <= 0 or one.step)):
            raise ValueError(f"space: {name}: expected low < high, and with log a positive low and no step, got {dict(value)}")
        if one.step is not None and not 0 < one.step <= one.high - one.low:
            raise ValueError(f"space: {name}: expected a step of more than 0 and at most high - low, got {dict(value)}")
        if one.step is not None and isinstance(one.low, int) and isinstance(one.high, int) and not isinstance(one.step, int):
            raise ValueError(f"space: {name}: expected an int as step between ints, got {dict(value)}")
        return one
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or any(not isinstance(v, Scalar) for v in values) or len(set(map(repr, values))) != len(values):
        raise ValueError(f"space: {name}: expected a value, a list of different values, or {{low, high}}, got {value!r}")
    return Options(values)


SPACES = {path.stem: path for path in sorted((Path(__file__).parent / "spaces").glob("*.yaml"))}


@reads("search space (YAML)")
def load_space(space: str | os.PathLike[str]) -> Space:
    """The space of that name (see SPACES), or in that YAML file.

    Raises: FileNotFoundError, or ValueError for an unknown name (with the nearest) or a file that is no space.
    """
    require("yaml")

    import yaml

    text = os.fspath(space)
    path = SPACES.get(text, Path(text))
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"space: expected one of {sorted(SPACES)} or a .yaml file, got {text!r}{nearest(text, SPACES)}")
    if not path.is_file():
        raise FileNotFoundError(f"space: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"space: {path} cannot be read: {error}") from error
    return Space.from_plain(values)
