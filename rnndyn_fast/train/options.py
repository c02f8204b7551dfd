"""Fields of configurations: their help, and checks of type and range."""

from __future__ import annotations

import math
import typing
from dataclasses import field
from types import UnionType
from typing import Any, Literal, Union


def option(default: Any, text: str) -> Any:
    """A field of a configuration, with its help."""
    return field(default=default, metadata={"help": text})


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


def check_range(name: str, value: float, least: float, below: float = math.inf) -> None:
    """Raise unless ``least <= value < below``."""
    if not least <= value < below:
        most = f"below {below:g}" if math.isfinite(below) else "finite"
        raise ValueError(f"{name}: expected at least {least:g} and {most}, got {value}")
