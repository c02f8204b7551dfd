"""Result objects (dataclasses of arrays, numbers and descriptors) as NPZ files."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.file_io import reads, written_whole


def save_npz(path: str | os.PathLike[str], result: Any, format_name: str) -> Path:
    """Write the fields of a dataclass to an NPZ file, atomically; those that are None are left out, descriptors are JSON."""
    arrays = {item.name: getattr(result, item.name) for item in dataclasses.fields(result)}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    arrays |= {"format": format_name, "descriptors": json.dumps(dict(result.descriptors))}
    with written_whole(path) as file:
        np.savez_compressed(file, **arrays)
    return Path(path)


@reads("result")
def load_npz(path: str | os.PathLike[str], format_name: str, what: str) -> dict[str, Any]:
    """The fields that :func:`save_npz` wrote, as arrays; descriptors as they were.

    Raises: FileNotFoundError, or ValueError for any other kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as data:
            values: dict[str, Any] = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {path} is not a {what}: {error}") from error
    if str(values.pop("format", "")) != format_name:
        raise ValueError(f"path: {path} is not a {what} (expected format {format_name!r})")
    values["descriptors"] = json.loads(str(values["descriptors"]))
    return values
