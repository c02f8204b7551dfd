"""Stream images through a trained network into the readout-zone reducer, and trajectories to disk if asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnndyn_fast.analysis import ReadoutZoneReducer
from rnndyn_fast.data import SPLITS, BatchLoader, ImageFile, normalise
from rnndyn_fast.extract.trajectories import TrajectoryWriter
from rnndyn_fast.files import replaced_atomically
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.train.checkpoint import load_checkpoint, versions
from rnndyn_fast.train.loop import INITIAL, limited
from rnndyn_fast.train.progress import Reporter, choose_reporter

REPRESENTATIONS = "gap"
DTYPES = ("float32", "float16")


def extract(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    split: str = "testplus",
    *,
    out: str | os.PathLike[str],
    batch_size: int = 250,
    save: Sequence[str] = (),
    dtype: str = "float32",
    timesteps: int | None = None,
    limit: int | None = None,
    keep_samples: bool = False,
    untrained: bool = False,
    backend: str | None = None,
    engine: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Run a split through a network and write the result of the readout-zone analysis to `out`.

    Images are normalised with the statistics of the data that the network was trained on. Activations pass through the
    reducer batch by batch and are gone then, unless `save` names areas: those go to ``<stem of out>_trajectories.h5``
    beside `out` (see `TrajectoryWriter`). Both files are written whole or not at all. The result's descriptors hold the
    checkpoint (SHA-256), the data, these options and versions.

    Args:
        checkpoint: file written by `train`.
        data: HDF5 image file with this split.
        split: "train", "val", "test" or "testplus".
        out: the result file (HDF5); read it with ``ReadoutZoneResult.load`` or ``rnndyn analyse``.
        batch_size: images at a time.
        save: areas whose activations are kept; "gap" is the pooled representations.
        dtype: of the kept activations, "float32" or "float16".
        timesteps: unroll that many steps instead of as many as in training.
        limit: take that many images, evenly spaced over the split.
        keep_samples: keep every sample's group and scalars in the result.
        untrained: use the network as it was before training (``initial.pt`` beside `checkpoint`).
        backend: "native", "reference" or None.
        engine: how the native backend convolves: "auto", "direct" or "winograd".
        overwrite: replace files that exist.
        reporter: shows progress; None chooses a bar or lines.

    Returns:
        The path of the result file.

    Raises:
        TypeError: `save` is a single string, or a number is not an int.
        ValueError: unknown split, area or dtype; `out` is the checkpoint or the data;
            image size or classes of `data` are not those of the network; damaged files.
        FileNotFoundError: no checkpoint, data, or (with `untrained`) no initial checkpoint.
        FileExistsError: an output exists and `overwrite` is False.

    Deterministic: yes on a CPU with a fixed number of threads. Memory: a few batches.

    >>> extract("runs/lateral/last.pt", "images.h5", out="lateral.h5", save=("gap",))  # doctest: +SKIP
    """
    out = Path(out)
    _check_options(split, save, dtype, batch_size, limit)
    trajectories = trajectories_path(out) if save else None
    for path in filter(None, (out, trajectories)):
        if path.is_dir():
            raise ValueError(f"out: expected a file, got the folder {path}")
        for name, read in (("checkpoint", checkpoint), ("data", data)):
            if path.exists() and os.path.exists(read) and path.samefile(read):
                raise ValueError(f"out: expected another file than {name}, got {path}")
        if path.exists() and not overwrite:
            raise FileExistsError(f"out: {path} exists; pass overwrite=True (--overwrite) to replace it")
    used = Path(checkpoint).with_name(INITIAL) if untrained else Path(checkpoint)
    if untrained and not used.exists():
        raise FileNotFoundError(f"untrained: no {INITIAL} beside {checkpoint}")
    net, contents = load_checkpoint(used, timesteps=timesteps, backend=backend, engine=engine)
    areas = _check_areas(net, save)
    readout = net.network.readout
    if readout is None:
        raise ValueError(f"checkpoint: the network in {used} has no readout, so there are no readout zones")
    parameters = dict(net.named_parameters())

    with ImageFile(data, required_splits=(split,)) as file, ExitStack() as outputs:
        check_fits(file, contents)
        images = limited(file.split(split), limit)
        options = {
            "split": split,
            "batch_size": batch_size,
            "save": list(save),
            "dtype": dtype,
            "timesteps": net.timesteps,
            "limit": limit,
            "untrained": untrained,
        }
        schedule = net.schedule(areas)
        first_step = {name: schedule.first_step[name] for name in (*areas, readout.source)}
        descriptors = _descriptors(used, contents, {**contents["model"], "timesteps": net.timesteps}, file, len(images), options)
        descriptors["first_step"] = first_step  # 0 but in a biological unroll, where later areas start later
        reducer = ReadoutZoneReducer(
            parameters[f"{readout.parameter}.weight"],
            parameters.get(f"{readout.parameter}.bias"),
            timesteps=net.timesteps - first_step[readout.source],
            keep_samples=keep_samples,
            backend=backend,
        )
        writer = None
        if trajectories is not None:
            temporary = outputs.enter_context(replaced_atomically(trajectories))
            writer = TrajectoryWriter(temporary, len(images), dtype, descriptors)
            # Closed before the file takes its name: contexts end in reverse order.
            outputs.callback(writer.close)
        mean, std = (np.asarray(contents["data"][name]) for name in ("mean", "std"))
        recorded = tuple(area for area in areas if area != REPRESENTATIONS)
        shown = outputs.enter_context(reporter or choose_reporter())
        shown.start(f"{split}, {len(images)} images", len(images))
        with torch.inference_mode():
            for pixels, labels in BatchLoader(images, batch_size):
                log_probs, representations, *rest = net(
                    normalise(pixels, mean, std),
                    return_representations=True,
                    **({"record": recorded} if recorded else {}),
                )
                reducer.update(representations, labels, log_probs)
                if writer is not None:
                    activations = {REPRESENTATIONS: representations, **(rest[0] if rest else {})}
                    writer.add({area: activations[area] for area in areas}, labels, log_probs.argmax(2))
                shown.advance(len(labels), "")
    # After the trajectories have taken their name: a result is never there without the trajectories it was asked to
    # have.
    return reducer.result(descriptors).save(out)


def trajectories_path(out: str | os.PathLike[str]) -> Path:
    """Where the trajectories that belong to the result file `out` are."""
    out = Path(out)
    return out.with_name(f"{out.stem}_trajectories.h5")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_options(split: str, save: Sequence[str], dtype: str, batch_size: int, limit: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    if isinstance(save, str):
        raise TypeError(f"save: expected a sequence of areas, got the string {save!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_areas(net: RecurrentNetwork, save: Sequence[str]) -> tuple[str, ...]:
    """The areas to save, each once, checked against those of the network."""
    known = tuple(area.name for area in net.network.areas)
    unknown = [name for name in save if name not in known]
    if unknown:
        raise ValueError(f"save: no area {unknown[0]!r} in this network; its areas are {', '.join(known)}")
    return tuple(dict.fromkeys(save))


def check_fits(file: ImageFile, contents: dict[str, Any]) -> None:
    """Raise ValueError unless a data file has the image size and the categories that a checkpoint was trained on."""
    trained = contents["data"]
    if file.image_size != trained["image_size"]:
        raise ValueError(
            f"data: expected images of {trained['image_size']} px, as the network was trained on, {file.path} has {file.image_size} px"
        )
    if list(file.categories) != list(trained["categories"]):
        raise ValueError(
            f"data: expected the {len(trained['categories'])} categories the network was trained on, {file.path} has "
            f"{file.num_classes}: {', '.join(file.categories[:5])}, ..."
        )


def _descriptors(
    used: Path,
    contents: dict[str, Any],
    network: dict[str, Any],
    file: ImageFile,
    count: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    return {
        "checkpoint": {"path": str(used), "sha256": sha256(used), "epoch": contents["epoch"]},
        "network": dict(network),
        "class_names": list(file.categories),
        "data": {
            "path": str(file.path),
            "images": count,
            "attributes": {name: _plain(value) for name, value in file.attrs.items()},
        },
        "options": options,
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """An HDF5 attribute as JSON can hold it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
