"""The file of an extraction: what every reducer found, side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis import ReadoutZoneResult, ReducerResult, Table
from rnndyn_fast.file_io import reads, replaced_atomically
from rnndyn_fast.hdf5_out import checked, hdf5_out
from rnndyn_fast.optional import require

FORMAT = "rnndyn_fast.extraction/1"

Result = ReadoutZoneResult | ReducerResult


def save_results(path: str | os.PathLike[str], results: Mapping[str, Result], descriptors: Mapping[str, Any]) -> Path:
    """Write results by name to an HDF5 file, atomically; equal results give equal bytes::

    <name>/<table>        with an attribute `axes`; of readout zones as ReadoutZoneResult.save lays them out
    attributes            format, descriptors (JSON); of <name>: n, options (JSON)
    """
    text = json.dumps(dict(descriptors))
    with replaced_atomically(path) as temporary, hdf5_out(temporary) as (file, _):
        file.attrs.update({"format": FORMAT, "descriptors": text})
        for name, result in results.items():
            group = file.create_group(name)
            if isinstance(result, ReadoutZoneResult):
                result.write(group)
                continue
            group.attrs.update({"n": result.n, "options": json.dumps(result.options)})
            for table, (axes, values) in result.tables.items():
                dataset = group.create_dataset(table, data=values, track_times=False, **checked(values))
                dataset.attrs["axes"] = json.dumps(list(axes))
    return Path(path)


@reads("result of rnndyn extract")
def load_results(path: str | os.PathLike[str]) -> dict[str, Result]:
    """The results of an extraction, by name of the reducer: ReadoutZoneResult for "readout_zones", else ReducerResult.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of an extraction, or damaged.
    """
    require("h5py")
    import h5py

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    results: dict[str, Result] = {}
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise ValueError(f"path: expected a file of an extraction (format {FORMAT!r}), {path} has {file.attrs.get('format')!r}")
            descriptors = json.loads(file.attrs["descriptors"])
            for name, group in file.items():
                if "options" not in group.attrs:
                    results[name] = ReadoutZoneResult.load(path)
                    continue
                tables = {key: Table(tuple(json.loads(item.attrs["axes"])), np.asarray(item[()])) for key, item in group.items()}
                results[name] = ReducerResult(name, int(group.attrs["n"]), tables, json.loads(group.attrs["options"]), dict(descriptors))
    except (OSError, KeyError) as error:
        raise ValueError(f"path: expected a readable HDF5 file, {path} is truncated or none ({error})") from error
    return results
