"""Checkpoints: one file with the network, what it was trained on, how, and all that going on needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rnndyn_fast import models
from rnndyn_fast.file_io import reads, written_whole
from rnndyn_fast.models.foreign import find_state_dict, load_tensors
from rnndyn_fast.nn import RecurrentNetwork

if TYPE_CHECKING:
    from rnndyn_fast.train.foreign import Foreign

FORMAT = "rnndyn_fast.checkpoint/1"
_REQUIRED = ("model", "state_dict", "epoch", "data")
_OF_DATA = ("path", "image_size", "categories", "mean", "std")


def save_checkpoint(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> Path:
    """Write `checkpoint` to `path`, atomically.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        checkpoint: tensors and plain types only. "format" and "versions" are added.

    Returns:
        The path.

    Raises:
        ValueError: "model", "state_dict", "epoch" or "data" is missing.
        OSError: the file cannot be written; an existing one stays as it was.
    """
    missing = [name for name in _REQUIRED if name not in checkpoint]
    if missing:
        raise ValueError(f"checkpoint: expected the entries {_REQUIRED}, missing are {missing}")
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **checkpoint, "versions": versions()}, file)
    return Path(path)


@reads("checkpoint")
def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU. No code from the file is run (``weights_only=True``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not a checkpoint of this project, truncated, or entries are missing.
    """
    contents = load_tensors(path)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        found = contents.get("format") if isinstance(contents, dict) else type(contents).__name__
        if isinstance(found, str) and found.startswith(FORMAT.partition("/")[0]):
            raise ValueError(f"checkpoint: {path} is of another version of rnndyn: expected the format {FORMAT}, got {found}")
        try:
            find_state_dict(contents, path)
        except ValueError:
            raise ValueError(f"checkpoint: {path} is not a checkpoint (format {FORMAT!r}, found {found!r})") from None
        raise ValueError(
            f"checkpoint: {path} holds weights from elsewhere (a state_dict); say of which network: --model blt_net_64 and its "
            "--model-options, or rnndyn import once"
        )
    missing = [name for name in _REQUIRED if name not in contents]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks the entries {missing}")
    for name in ("model", "state_dict", "data"):
        if not isinstance(contents[name], dict):
            raise ValueError(f"checkpoint: {path}: {name}: expected a dict, got {type(contents[name]).__name__}")
    missing = [name for name in _OF_DATA if name not in contents["data"]]
    if missing:
        raise ValueError(f"checkpoint: {path}: data lacks the entries {missing}")
    return contents


@reads("checkpoint")
def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    timesteps: int | None = None,
    backend: str | None = None,
    engine: str = "auto",
    foreign: Foreign | None = None,
) -> tuple[RecurrentNetwork, dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode on the CPU, and the checkpoint's contents.

    Args:
        path: file written by `save_checkpoint`.
        timesteps: unroll that many steps instead of as many as in training.
        foreign: the network of weights from elsewhere (:class:`rnndyn_fast.train.foreign.Foreign`); what was done for them is printed to
            standard error.
        backend, engine: how it runs, see `rnndyn_fast.rollout`; what it was trained with does not matter.

    Returns:
        The network and the contents.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, truncated, its weights do not fit its network (lists what does not), or no such backend or engine.
    """
    if foreign is None:
        checkpoint = read_checkpoint(path)
    else:
        checkpoint, notes = foreign.read(path)
        if notes:
            print(f"{os.fspath(path)}: {'; '.join(notes)}", file=sys.stderr)
    options = {**checkpoint["model"], "backend": backend, "engine": engine}
    if timesteps is not None:
        options["timesteps"] = timesteps
    net = models.build(options)
    load_weights(net, checkpoint["state_dict"], path)
    net.eval()
    return net, checkpoint


def load_weights(net: nn.Module, state_dict: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Copy `state_dict` into `net`. Raises ValueError, changing nothing, that lists every entry that does not fit."""
    own = net.state_dict()
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    shapes = [
        f"{name} {list(state_dict[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state_dict and own[name].shape != state_dict[name].shape
    ]
    kinds = [
        f"{name} {state_dict[name].dtype}"
        for name in own
        if name in state_dict
        and (own[name].is_floating_point(), False) != (state_dict[name].is_floating_point(), state_dict[name].is_complex())
    ]
    faults = [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing:", missing),
            ("unexpected:", unexpected),
            ("other shapes:", shapes),
            ("other kinds of numbers:", kinds),
        )
        if names
    ]
    if faults:
        raise ValueError(f"checkpoint: {os.fspath(path)} is of another architecture; {'; '.join(faults)}")
    net.load_state_dict(state_dict)


def versions() -> dict[str, str]:
    """Versions of what computed a result, for its record."""
    try:
        own = importlib.metadata.version("rnndyn-fast")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        own = "unknown"
    return {"rnndyn_fast": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
