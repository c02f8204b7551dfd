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

from rnndyn_fast.files import reads
from rnndyn_fast.names import nearest
from rnndyn_fast.optional import require
from rnndyn_fast.search.architecture import CELLS, MEANT, Architecture

FEEDBACK = re.compile(r"feedback_(\d+)_(\d+)")
# Options of training that may be searched; everything else about a trial is the same for all.
TRAINING = ("lr", "batch_size", "timesteps", "init", "augment")

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
        fields = {f.name: f for f in dataclasses.fields(Architecture)}
        names = [*fields, *TRAINING, "feedback_2_1"]
        choices: dict[str, Options | Range] = {}
        for name, value in values.items():
            if name == "feedback" or (name not in names and not FEEDBACK.fullmatch(str(name))):
                hint = nearest(name, [n for n in names if n != "feedback"])
                raise ValueError(f"space: unknown choice {name!r}{hint}; there are {names} (and feedback_<from>_<to>)")
            choices[name] = _choice(str(name), value)
        space = cls(choices)
        space._check_values(fields)
        return space

    def _check_values(self, fields: Mapping[str, Any]) -> None:
        """Build an architecture with every value of every choice: an error now instead of in a trial."""
        from rnndyn_fast.train.config import TrainConfig

        deepest = max((int(value) for value in _ends(self.choices.get("depth", Options((Architecture.depth,))))), default=1)
        for name, choice in self.choices.items():
            edge = FEEDBACK.fullmatch(name)
            for value in _ends(choice):
                one: dict[str, Any] = {name: value}
                if edge:
                    if not isinstance(value, bool):
                        raise ValueError(f"space: {name}: expected true or false, got {value!r}")
                    if not deepest >= int(edge[1]) > int(edge[2]) >= 1:
                        raise ValueError(f"space: {name}: expected feedback from a layer to one below it, of at most {deepest} layers")
                elif name in fields:
                    if type(value) is not type(fields[name].default) and not (name == "growth" and isinstance(value, int)):
                        raise ValueError(f"space: {name}: expected {type(fields[name].default).__name__}, got {value!r}")
                    Architecture(**one)
                else:
                    TrainConfig(data="", out="", **one)

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
        made: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Architecture)}
        training: dict[str, Any] = {}
        # Those that decide whether others mean anything come first, the kernel of feedback after its edges.
        order = sorted(self.choices, key=lambda name: (name not in ("cell", "depth"), name == "feedback_kernel_size"))
        for name in order:
            edge = FEEDBACK.fullmatch(name)
            if edge:
                if int(edge[1]) <= made["depth"] and self.choices[name].suggest(trial, name):
                    made["feedback"] = (*made["feedback"], (int(edge[1]), int(edge[2])))
            elif name in TRAINING:
                training[name] = self.choices[name].suggest(trial, name)
            elif name not in MEANT or MEANT[name](made):
                made[name] = self.choices[name].suggest(trial, name)
        return Architecture(**made), training

    @property
    def open(self) -> list[str]:
        """Names of the choices that have more than one value."""
        return [name for name, choice in self.choices.items() if isinstance(choice, Range) or len(choice.values) > 1]


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
        return one
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or any(not isinstance(v, Scalar) for v in values) or len(set(map(repr, values))) != len(values):
        raise ValueError(f"space: {name}: expected a value, a list of different values, or {{low, high}}, got {value!r}")
    return Options(values)


_COMMON: dict[str, Any] = {
    "depth": [1, 2, 3],
    "width": [8, 12, 16],
    "growth": [1.0, 1.5, 2.0],
    "stem_kernel_size": [3, 5],
    "kernel_size": [3, 5],
    "cell_kernel_size": [1, 3, 5],
    "interaction": ["additive", "multiplicative"],
    "bypass": [False, True],
    "norm": ["layer", "none"],
    "feedback_2_1": [False, True],
    "feedback_3_1": [False, True],
    "feedback_3_2": [False, True],
    "feedback_kernel_size": [1, 3],
    "lr": {"low": 5e-4, "high": 1e-2, "log": True},
}
SPACES: dict[str, dict[str, Any]] = {
    # Convolutional layers with lateral connections, and without.
    "blt": {"cell": ["feedforward", "blt"], **_COMMON},
    # Every cell there is, with its switches.
    "cells": {"cell": list(CELLS), **_COMMON, "cell_norm": [False, True], "peepholes": [False, True], "gating": [True, False]},
}


@reads("search space (YAML)")
def load_space(space: str | os.PathLike[str]) -> Space:
    """The space of that name (see SPACES), or in that YAML file.

    Raises: FileNotFoundError, or ValueError for an unknown name (with the nearest) or a file that is no space.
    """
    require("yaml")

    import yaml

    text = os.fspath(space)
    if text in SPACES:
        return Space.from_plain(SPACES[text])
    path = Path(text)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"space: expected one of {sorted(SPACES)} or a .yaml file, got {text!r}{nearest(text, SPACES)}")
    if not path.is_file():
        raise FileNotFoundError(f"space: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"space: {path} cannot be read: {error}") from error
    return Space.from_plain(values)
