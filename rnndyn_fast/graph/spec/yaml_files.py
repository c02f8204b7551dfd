"""Specs as files: YAML (or JSON) that says what differs from the defaults, to read, to edit, and to train."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rnndyn_fast.file_io import reads
from rnndyn_fast.graph.spec.json_values import from_plain, to_plain
from rnndyn_fast.graph.spec.network import Area, Connection, Input, Network, Readout, Unroll
from rnndyn_fast.optional import require
from rnndyn_fast.plain_values import plain_values
from rnndyn_fast.suggestions import nearest

SUFFIXES = (".yaml", ".yml", ".json")
_PARTS: dict[str, type] = {"inputs": Input, "areas": Area, "connections": Connection}


def network_to_plain(network: Network) -> dict[str, Any]:
    """A spec as plain values without what follows from the rest: fields that have, or would get, the same value by themselves.

    :func:`network_from_plain` undoes it exactly.
    """
    plain: dict[str, Any] = {"name": network.name}
    if network.unroll is not Unroll.ENGINEERING:
        plain["unroll"] = network.unroll.value
    for part in _PARTS:
        plain[part] = [_short(item) for item in getattr(network, part)]
    if network.readout is not None:
        plain["readout"] = _short(network.readout)
    return plain


def _short(item: Any) -> dict[str, Any]:
    values: dict[str, Any] = to_plain(item)
    fields = dataclasses.fields(item)
    given = [f.name for f in fields if f.default is dataclasses.MISSING]
    # Fields that are None by default follow from others, so those come first; an area's norm and activation from its cell.
    order = sorted((f for f in fields if f.name not in given), key=lambda f: (f.name != "cell", f.default is None))
    for _ in order:
        made = from_plain(type(item), {k: v for k, v in values.items() if k in given})
        different = [f.name for f in order if getattr(made, f.name) != getattr(item, f.name)]
        if not different:
            break
        given.append(different[0])
    return {k: v for k, v in values.items() if k in given}


def network_from_plain(values: Mapping[str, Any]) -> Network:
    """A spec from plain values; what is left out has its default.

    Raises:
        TypeError: not a mapping, or a part of it is not what it should be.
        ValueError: an unknown or missing field (with the nearest names), an unknown word, or a graph that makes no sense.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"network: expected a mapping with the fields {_fields(Network)}, got {type(values).__name__}")
    _check_fields("network", Network, values)
    parts = {}
    for name, kind in _PARTS.items():
        if not isinstance(values[name], list | tuple):
            raise TypeError(f"network: {name}: expected a list, got {type(values[name]).__name__}")
        parts[name] = tuple(_part(f"network: {name}[{k}]", kind, value) for k, value in enumerate(values[name]))
    readout = values.get("readout")
    unroll = values.get("unroll", Unroll.ENGINEERING.value)
    if unroll not in [word.value for word in Unroll]:
        raise ValueError(f"network: unroll: expected one of {[word.value for word in Unroll]}, got {unroll!r}")
    return Network(
        name=str(values["name"]),
        unroll=Unroll(unroll),
        readout=None if readout is None else _part("network: readout", Readout, readout),
        **parts,
    )


def _part(where: str, kind: type, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}: expected a mapping with the fields {_fields(kind)}, got {values!r}")
    _check_fields(where, kind, values)
    values = {name: _number(f"{where}: {name}", hint, values[name]) for name, hint in typing.get_type_hints(kind).items() if name in values}
    try:
        return from_plain(kind, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _number(where: str, hint: Any, value: Any) -> Any:
    """The value, where the hint is a number or a name after a check of its type. YAML reads 1e-5 as text."""
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise TypeError(f"{where}: expected a number, got {value!r}") from error
    kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    wanted = kinds.get(hint)
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool)):
        raise TypeError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _check_fields(where: str, kind: type, values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in _fields(kind):
            raise ValueError(f"{where}: unknown field {name!r}{nearest(name, _fields(kind))}; fields are {_fields(kind)}")
    required = [f.name for f in dataclasses.fields(kind) if f.init and f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{where}: missing fields {missing}")


def is_network_file(name: str) -> bool:
    """Whether a model is named by a file (of a suffix in SUFFIXES) instead of a published name."""
    return Path(name).suffix.lower() in SUFFIXES


@reads("spec of a network (YAML or JSON)")
def read_network(path: str | os.PathLike[str]) -> Network:
    """The spec in a YAML or JSON file.

    A file of training options with a spec under ``network`` (the ``train.yaml`` of a run) will do too.

    Raises:
        FileNotFoundError: no such file. ValueError, TypeError: not YAML, or as :func:`network_from_plain`.
    """
    require("yaml")

    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"network: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        values = plain_values(text, is_json=path.suffix.lower() == ".json")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"network: {path} cannot be read: {error}") from error
    if isinstance(values, Mapping) and isinstance(values.get("network"), Mapping):
        values = values["network"]
    return network_from_plain(values)


def network_yaml(network: Network) -> str:
    """A spec as YAML, one line for each area and connection."""
    require("yaml")

    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    class Line(dict[str, Any]):
        pass

    Dumper.add_representer(Line, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True))
    plain = network_to_plain(network)
    for part in _PARTS:
        plain[part] = [Line(item) for item in plain[part]]
    if "readout" in plain:
        plain["readout"] = Line(plain["readout"])
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, width=1000, allow_unicode=True)
