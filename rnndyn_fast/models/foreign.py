"""Weights from elsewhere: state_dicts as published scripts, DataParallel, torch.compile and Lightning save them."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.file_io import reads, stand_in

_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
_WRAPPERS = re.compile(r"(?<![^.])_orig_mod\.")  # of torch.compile, around the network or a part of it


@reads("file of torch.save")
def load_tensors(path: str | os.PathLike[str]) -> Any:
    """The contents of a file of torch.save, tensors on the CPU. No code from the file is run (``weights_only=True``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or another kind of file: says which, and where it can be told what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint: expected a file, got the folder {path} (did you mean {path / 'last.pt'}?)")
    if not path.exists():
        broken = f" ({path} is a link to {os.readlink(path)}, which is not there)" if path.is_symlink() else ""
        raise FileNotFoundError(f"checkpoint: no such file: {path}{broken}")
    other = stand_in(path) or _other_kind(path)
    if other:
        raise ValueError(f"checkpoint: {path} {other}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, InterruptedError):
        raise
    except Exception as error:  # torch raises OSError (of a seek), RuntimeError, UnpicklingError, EOFError, KeyError, ... by kind of damage
        text = str(error)
        pickled = re.search(r"GLOBAL (\S+)|(?:Unsupported (?:global|class)|type) (\S+)", text)
        if "eights only load failed" in text and pickled and ("Unsupported" in text or "not an allowed global" in text):
            name = (pickled[1] or pickled[2]).strip("`'\",.")
            what = f"a pickled object ({name})"
            if not name.startswith(("numpy", "argparse", "collections", "builtins", "pathlib", "omegaconf")):
                what = f"a pickled module ({name})"
            raise ValueError(
                f"checkpoint: {path} holds {what}, which cannot be read without running its code; save net.state_dict()"
            ) from error
        # The first sentence: torch goes on with advice, among it to run code from the file.
        reason = text.strip().split(". ")[0].splitlines()[0] if text.strip() else type(error).__name__
        raise ValueError(f"checkpoint: {path} is truncated or not a PyTorch file: {reason}") from error


def _other_kind(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file, not one of torch.save"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "is a safetensors file; save net.state_dict() by torch.save"
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return "is an NPZ file of NumPy, not one of torch.save"
        if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
            return "is a TorchScript archive, which holds code; save net.state_dict()"
    return None


def find_state_dict(contents: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by name in what a file holds: a state_dict itself, or under the names that training scripts and Lightning use.

    Raises ``ValueError`` that lists what there is.
    """
    level = contents
    for _ in range(4):
        if not isinstance(level, Mapping):
            break
        tensors = {str(name): value for name, value in level.items() if isinstance(value, Tensor)}
        if tensors and not any(isinstance(level.get(name), Mapping) for name in _NESTS):
            return tensors
        level = next((level[name] for name in _NESTS if isinstance(level.get(name), Mapping)), None)
    found = f"entries {', '.join(map(str, list(contents)[:8]))}" if isinstance(contents, Mapping) else type(contents).__name__
    raise ValueError(f"checkpoint: {os.fspath(path)}: expected a state_dict, or one under {', '.join(_NESTS[:4])}, found {found}")


def fitted(tensors: Mapping[str, Tensor], names: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under a network's names, and what was done for it, in words.

    A prefix that they all have (``module.`` of DataParallel, ``model.`` of Lightning, any other) goes, and so does torch.compile's.
    """
    wanted, notes = set(names), list[str]()
    plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    if plain.keys() != tensors.keys():
        notes.append("names without _orig_mod. of torch.compile")
    count: dict[str, int] = {}
    for name in plain:
        parts = name.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in wanted:
                prefix = ".".join([*parts[:k], ""]) if k else ""
                count[prefix] = count.get(prefix, 0) + 1
    prefix = max(count, key=lambda p: (count[p], -len(p)), default="")
    if not prefix:
        return plain, notes
    notes.append(f"names without {prefix}")
    found = {name[len(prefix) :]: value for name, value in plain.items() if name.startswith(prefix)}
    rest = [name for name in plain if not name.startswith(prefix)]
    if rest:
        notes.append(f"{len(rest)} tensors beside the network left out: {', '.join(rest[:4])}{', ...' if len(rest) > 4 else ''}")
    return found, notes


def blt_net_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the shapes of a blt_net's tensors say of its options; LT_interaction and timesteps they do not.

    Raises ``ValueError`` where they are not those of a blt_net.
    """
    needed = ("retina.weight", "v1.bottom_up.weight", "v2.bottom_up.weight", "v4.bottom_up.weight", "it.bottom_up.weight", "readout.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"checkpoint: expected the tensors of a blt_net, missing {', '.join(missing)}; there are {', '.join(list(shapes)[:6])}"
        )
    recurrent = "it.lateral.weight" in shapes
    options: dict[str, Any] = {
        "lateral_connections": "gap.lateral.weight" in shapes,
        "topdown_connections": "v2.top_down.weight" in shapes,
        "LT_position": "last" if "gap.lateral.weight" in shapes and not recurrent and "v2.top_down.weight" not in shapes else "all",
        "classifier_bias": "readout.bias" in shapes,
        "norm_type": "LN" if "v1_ln.weight" in shapes else "None",
        "num_classes": shapes["readout.weight"][0],
        "in_channels": shapes["retina.weight"][1],
        "widths": [shapes[name][0] for name in needed[:5]],
    }
    if "v1_ln.weight" in shapes:
        options["image_size"] = shapes["v1_ln.weight"][-1]
    return options
