"""YAML and JSON as plain values. A key that is there twice is an error: of two values, readers take the last without a word."""

from __future__ import annotations

import json
from typing import Any

from rnndyn_fast.optional import require


class RepeatedKeyError(ValueError):
    """A mapping has a key twice."""


def _refuse_repeated(keys: list[Any]) -> None:
    for n, key in enumerate(keys):
        if key in keys[:n]:
            raise RepeatedKeyError(f"the key {key!r} is there twice")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def plain_values(text: str, *, is_json: bool = False) -> Any:
    """What a text in YAML or JSON holds.

    Raises:
        RepeatedKeyError: naming the key. ``yaml.YAMLError``, ValueError: no YAML, no JSON.
    """
    if is_json:
        return json.loads(text, object_pairs_hook=_once)
    require("yaml")
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            # (Keys that are merged in with << may be given again, so those are the ones before merging.)
            scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
            _refuse_repeated([self.construct_object(key) for key in scalars])
            return super().construct_mapping(node, deep)

    return yaml.load(text, Once)
