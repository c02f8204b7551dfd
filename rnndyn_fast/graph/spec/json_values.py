"""Specs as plain JSON values: objects by field, enums by value."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeVar

from rnndyn_fast.graph.spec.areas import Interaction, Norm
from rnndyn_fast.graph.spec.connections import Pool, Role
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import Cell, cell_from_plain
from rnndyn_fast.ops.engines import Operator

T = TypeVar("T")

_DECODERS: dict[str, Any] = {
    "interaction": Interaction,
    "norm": Norm,
    "activation": Activation,
    "drive_activation": Activation,
    "role": Role,
    "operator": Operator,
    "pool": Pool,
    "cell": lambda v: v if v is None else cell_from_plain(v),
    "concat": lambda v: v if v is None else tuple(v),
    "steps": lambda v: v if v is None else tuple(v),
    "kernel_size": lambda v: tuple(v) if isinstance(v, list) else v,
    "initial": lambda v: v if isinstance(v, str) else tuple(v),
}


def to_plain(value: Any) -> Any:
    """A spec, or a part of one, as JSON values."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.name.startswith("_")}
        return {"kind": value.kind, **plain} if isinstance(value, Cell) else plain
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """An input, area, connection or readout from its JSON object."""
    return cls(**{k: _DECODERS[k](v) if k in _DECODERS else v for k, v in values.items()})
