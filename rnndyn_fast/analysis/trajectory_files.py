"""Anybody's trajectories: arrays in a NumPy or HDF5 file into the readout-zone analysis, no network needed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis.reducer import readout_zones
from rnndyn_fast.analysis.results import FORMAT, ReadoutZoneResult
from rnndyn_fast.file_io import reads
from rnndyn_fast.optional import require

# What is looked for under which names, the first that is there; the last names are those of the published extraction.
NAMES = {
    "trajectories": ("trajectories", "trajectories/gap", "representations", "representations_all"),  # [T, N, D]
    "readout_weight": ("readout_weight", "readout/weight", "weight"),  # [C, D]
    "labels": ("labels", "labels_all"),  # [N]
    "bias": ("bias", "readout_bias", "readout/bias"),  # [C], may be absent or empty
    "log_probs": ("log_probs", "outputs_all"),  # [T, N, C], may be absent
    "class_names": ("class_names", "categories"),  # [C], may be absent
}
_RESULTS = (FORMAT, "rnndyn_fast.extraction")  # formats of files that hold a result
_REQUIRED = ("trajectories", "readout_weight", "labels")


@reads("result or file of trajectories")
def load_result(path: str | os.PathLike[str], names: Mapping[str, str] | None = None, *, backend: str | None = None) -> ReadoutZoneResult:
    """The result in a file of ``rnndyn extract``, or that of the trajectories in a file from other software.

    Args:
        path: a result; or an NPZ or HDF5 file with ``trajectories`` [T, N, D], ``readout_weight`` [C, D], ``labels`` [N], and
            where there are any ``bias`` [C], ``log_probs`` [T, N, C] and ``class_names`` [C]. An HDF5 file is read block by
            block; the files of the published extraction are understood as they are.
        names: other names of arrays in the file, by the names above.
        backend: "native", "reference" or None.

    Returns:
        ReadoutZoneResult; with kept samples where it was made from trajectories.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; an array is missing (lists those there are), or has a wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    names = {name: value for name, value in (names or {}).items() if value}
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
    with ExitStack() as stack:
        file = _open(path, stack)
        if not isinstance(file, dict) and str(file.attrs.get("format", "")).startswith(_RESULTS):
            return ReadoutZoneResult.load(path)
        arrays = {name: _find(file, name, names.get(name), path) for name in NAMES}
        bias = arrays["bias"]
        if bias is not None and 0 in bias.shape:  # the published extraction writes an empty one
            bias = None
        labels = np.asarray(arrays["labels"][()])
        descriptors: dict[str, Any] = {"data": {"path": str(path), "images": len(labels)}}
        if arrays["class_names"] is not None:
            descriptors["class_names"] = [n.decode() if isinstance(n, bytes) else str(n) for n in arrays["class_names"][()].tolist()]
        result = readout_zones(
            arrays["trajectories"],
            np.asarray(arrays["readout_weight"][()]),
            labels,
            None if bias is None else np.asarray(bias[()]),
            arrays["log_probs"],
            backend,
        )
    result.descriptors = descriptors
    return result


def _open(path: Path, stack: ExitStack) -> Any:
    """The arrays of a file by name: a dict (NPZ) or an HDF5 file."""
    with path.open("rb") as stream:
        start = stream.read(8)
    try:
        if start[:2] == b"PK":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if start == b"\x89HDF\r\n\x1a\n":
            require("h5py")

            import h5py

            return stack.enter_context(h5py.File(path, "r"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: expected a readable NPZ or HDF5 file, {path} is truncated or none ({error})") from error
    raise ValueError(f"path: expected a result of rnndyn extract, or an NPZ or HDF5 file, {path} is neither")


def _find(file: Any, name: str, given: str | None, path: Path) -> Any:
    """An array of a file, or None where it may be absent and is."""
    require("h5py")

    import h5py

    candidates = (given,) if given else NAMES[name]
    for candidate in candidates:
        found = file.get(candidate)
        if isinstance(found, np.ndarray | h5py.Dataset):
            return found
    if given is None and name not in _REQUIRED:
        return None
    there: list[str] = []
    if isinstance(file, dict):
        there = list(file)
    else:
        file.visititems(lambda key, item: there.append(key) if isinstance(item, h5py.Dataset) else None)
    raise ValueError(f"{name}: expected an array {' or '.join(map(repr, candidates))} in {path}, which has {', '.join(there) or 'none'}")
