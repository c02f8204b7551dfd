"""Extraction from a checkpoint: a trained network's trajectories into the reducers."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from rnndyn_fast.analysis import (
    DecodabilityReducer,
    MomentReducer,
    NormReducer,
    RdmReducer,
    ReadoutZoneReducer,
    Reducer,
    RepresentationChangeReducer,
)
from rnndyn_fast.data import SPLITS, check_unit_range, normalise
from rnndyn_fast.extract.engine import Activations, stream, trajectories_path
from rnndyn_fast.extract.sources import Source, open_source
from rnndyn_fast.extract.trajectories import DTYPES
from rnndyn_fast.job_device import analysed_on, backend_on, check_precision, choose_device, in_precision, to_device
from rnndyn_fast.nn import GraphedNetwork, RecurrentNetwork
from rnndyn_fast.nn.cuda_graphs import Graphs
from rnndyn_fast.train.checkpoint import load_checkpoint, versions
from rnndyn_fast.train.foreign import Foreign
from rnndyn_fast.train.loop import INITIAL
from rnndyn_fast.train.progress import Reporter

REDUCERS = ("readout_zones", "norms", "change", "moments", "rdm", "decodability")
MOST_CLASSES = 100  # conditions of the RDMs, unless others are chosen


def extract(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str] | Dataset[Any] | Source,
    split: str = "testplus",
    *,
    out: str | os.PathLike[str],
    reducers: Sequence[str] = REDUCERS,
    areas: Sequence[str] = (),
    pooled: Sequence[str] = (),
    rdm_classes: Sequence[int] | None = None,
    rdm_images: Sequence[int] | None = None,
    rdm_distance: str = "correlation",
    save: Sequence[str] = (),
    dtype: str = "float32",
    compression: int = 1,
    batch_size: int = 250,
    timesteps: int | None = None,
    limit: int | None = None,
    shards: int = 8,
    keep_samples: bool = False,
    untrained: bool = False,
    lesion: Sequence[str] = (),
    resize: bool = False,
    background: str = "white",
    foreign: Foreign | None = None,
    device: str | None = None,
    precision: str = "float32",
    backend: str | None = None,
    engine: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Run images through a trained network, its trajectories through reducers, and write what they found to `out`.

    Images are normalised with the statistics of the data that the network was trained on. Activations pass through the reducers batch by
    batch and are gone then, unless `save` names areas: those go to ``<stem of out>_trajectories.h5`` beside `out`. The results'
    descriptors hold the checkpoint (SHA-256), the data (a hash of what was read), these options and versions. An interrupted extraction
    continues when it is called again, and under `torchrun` it is shared: see `stream`.

    Args:
        checkpoint: file written by `train`.
        data: HDF5 image file, folder of image files (a subfolder per class), map-style torch Dataset, or a Source.
        split: "train", "val", "test" or "testplus", of an HDF5 file.
        out: the result file (HDF5); read it with `load_results`, or with ``ReadoutZoneResult.load``, ``rnndyn analyse``.
        reducers: some of REDUCERS.
        areas: areas for norms, change and moments; none: that of the representations. Those of a batch are held in memory, T N C H W
            values each.
        pooled: areas for RDMs and decodability, averaged over their places; none: that of the representations.
        rdm_classes: conditions of the RDMs; None: the first 100 classes.
        rdm_images: single images as conditions, by number, in place of classes.
        rdm_distance: "correlation" or "euclidean".
        save: areas whose activations are kept.
        dtype: of the kept activations, "float32" or "float16".
        compression: of the kept activations, level of gzip, 0 to 9.
        batch_size: images at a time.
        timesteps: unroll that many steps instead of as many as in training.
        limit: take that many images, evenly spaced over the data.
        shards: at least the number of processes; sums are taken per shard, so it is part of what must be equal for equal bytes.
        keep_samples: keep every sample's group and scalars in the readout-zone result.
        untrained: use the network as it was before training (``initial.pt`` beside `checkpoint`).
        lesion: connections that are off, and areas that are silent, at some time steps: "v4:lateral@3-" (from step 3 on), "it>v4@2-5",
            "it@4"; see ``RecurrentNetwork.lesion`` and ``intervene``.
        resize: scale and crop image files of other sizes.
        background: what transparent pixels of image files are laid over: "white", "grey" or "black".
        foreign: for weights from elsewhere: the network that they are of.
        device: "cpu", "cuda", ...; None: a GPU where there is one. There the network is replayed as CUDA graphs.
        precision: of maps, "float32", "float16" (on a GPU) or "bfloat16".
        backend: "native", "reference" or None.
        engine: how the native backend convolves: "auto", "direct", "winograd", "amx", or on a GPU "fused" or "triton".
        overwrite: replace files that exist.
        reporter: shows progress; None chooses a bar or lines.

    Returns:
        The path of the result file.

    Raises:
        TypeError: a list of names is a single string, or a number is not an int.
        ValueError: unknown split, area, reducer or dtype; `out` is the checkpoint or the data; image size or classes of `data` are not
            those of the network; an image or activation with NaN; damaged files; another unfinished extraction; no such device, and why.
        FileNotFoundError: no checkpoint, data, or (with `untrained`) no initial checkpoint.
        FileExistsError: an output exists and `overwrite` is False.
        OSError: an image cannot be read, or a file not be written (a full disk); run the same command again to continue.

    Deterministic: yes on a CPU with a fixed number of threads. Memory: a few batches, and the reducers.

    >>> extract("runs/lateral/last.pt", "images.h5", out="lateral.h5", save=("gap",))  # doctest: +SKIP
    """
    out = Path(out)
    lists = {"reducers": reducers, "areas": areas, "pooled": pooled, "save": save, "lesion": lesion}
    _check_options(split, lists, dtype, {"batch_size": batch_size, "limit": limit, "shards": shards}, compression)
    for path in (out, trajectories_path(out)):
        for name, read in (("checkpoint", checkpoint), ("data", data)):
            if isinstance(read, str | os.PathLike) and path.exists() and os.path.exists(read) and path.samefile(read):
                raise ValueError(f"out: expected another file than {name}, got {path}")
    used = Path(checkpoint).with_name(INITIAL) if untrained else Path(checkpoint)
    if untrained and not used.exists():
        raise FileNotFoundError(f"untrained: no {INITIAL} beside {checkpoint}")
    net, contents = load_checkpoint(used, timesteps=timesteps, backend=backend, engine=engine, foreign=foreign)
    if net.network.readout is None:
        raise ValueError(f"checkpoint: the network in {used} has no readout, so there are no readout zones")
    representations = net.network.readout.source
    experiment = ExitStack()
    experiment.enter_context(net.lesions_named(lesion))
    chosen = {name: _check_areas(net, name, lists[name]) for name in ("areas", "pooled", "save")}
    measured, compared = chosen["areas"] or (representations,), chosen["pooled"] or (representations,)
    trained = contents["data"]
    classes = len(trained["categories"])
    rdm_options: dict[str, Any] = {"distance": rdm_distance, "images": rdm_images}
    if rdm_images is None:
        rdm_options["classes"] = range(min(classes, MOST_CLASSES)) if rdm_classes is None else rdm_classes
    elif rdm_classes is not None:
        raise ValueError("rdm_classes: expected either rdm_classes or rdm_images, got both")
    if rdm_classes is not None and max(rdm_classes, default=0) >= classes:
        raise ValueError(f"rdm_classes: expected classes below {classes}, the number of categories, got {max(rdm_classes)}")
    weight, bias = net.readout_map()
    begins = net.first_output
    steps = net.timesteps - begins
    makers: dict[str, Callable[[], Reducer]] = {
        "readout_zones": lambda: ReadoutZoneReducer(weight, bias, steps, area=representations, keep_samples=keep_samples, backend=backend),
        "norms": lambda: NormReducer(measured),
        "change": lambda: RepresentationChangeReducer(measured),
        "moments": lambda: MomentReducer(measured),
        "rdm": lambda: RdmReducer(compared, **rdm_options),
        "decodability": lambda: DecodabilityReducer(compared, num_classes=classes),
    }
    patterns = [makers[name]() for name in dict.fromkeys(reducers)]
    needed = tuple(dict.fromkeys((*(area for reducer in patterns for area in reducer.requires), *chosen["save"])))
    where = choose_device(device)
    net.backend = backend_on(where, net.backend)
    check_precision(precision, where)
    first_step = {name: net.schedule(needed).first_step[name] for name in (*needed, representations)}
    first_step[representations] = begins
    mean, std = np.asarray(trained["mean"]), np.asarray(trained["std"])
    forward = network_forward(net.to(where), needed, mean, std, precision)
    options: dict[str, Any] = {
        "split": split, "reducers": [r.name for r in patterns], "areas": list(measured), "pooled": list(compared),
        "save": list(chosen["save"]), "dtype": dtype, "batch_size": batch_size, "timesteps": net.timesteps,
        "limit": limit, "shards": shards, "untrained": untrained,
    }  # fmt: skip
    if lesion:
        options["lesion"] = list(lesion)
    made_with = {"options": options, "backend": backend, "engine": engine, "device": where.type, "versions": versions()}
    if precision != "float32":
        made_with["precision"] = precision
    sha = sha256(used)
    images = open_source(data, split, trained["image_size"], trained["categories"], resize=resize, background=background)
    with experiment, images as source:
        descriptors = {
            "checkpoint": {"path": str(used), "sha256": sha, "epoch": contents["epoch"]},
            "network": {**contents["model"], "timesteps": net.timesteps},
            "class_names": list(source.class_names),
            "data": source.describe(),
            "first_step": first_step,  # 0 but in a biological unroll, where later areas start later
            **made_with,
        }
        return stream(
            forward, source, patterns, out=out, save=chosen["save"], dtype=dtype, compression=compression, batch_size=batch_size,
            limit=limit, num_classes=classes, shards=shards,
            overwrite=overwrite, manifest={"checkpoint": sha, "machine": platform.machine(), **made_with},
            descriptors=descriptors, reporter=reporter, title=split,
        )  # fmt: skip


def network_forward(
    net: RecurrentNetwork, areas: Sequence[str], mean: np.ndarray, std: np.ndarray, precision: str = "float32", graphs: Graphs | None = None
) -> Callable[[Tensor], Activations]:
    """The forward function of a network with a readout for `stream`: images [N, 3, H, W] (uint8 or 0-1) -> activations of `areas`.

    On a GPU as CUDA graphs (`graphs`: what captures, for tests). Activations are float32 at least.
    """
    assert net.network.readout is not None
    source = net.network.readout.source
    recorded = tuple(area for area in areas if area != source)
    place = next(net.parameters())
    run: Callable[..., Any] = net.run
    home = analysed_on(place.device)
    if place.is_cuda or graphs is not None:
        run = GraphedNetwork(net, call=net.run, graphs=graphs)

    def forward(images: Tensor) -> Activations:
        check_unit_range(images)
        x = normalise(to_device(images, place.device), mean, std).to(place.dtype)
        with in_precision(precision, place.device):
            log_probs, representations, *rest = run(x, return_representations=True, **({"record": recorded} if recorded else {}))
        states = {source: representations, **(rest[0] if rest else {})}
        # (One answer for all steps is no step's: predictions are then those of each step's logits.)
        answers = log_probs.to(home) if len(log_probs) == len(representations) else None
        return Activations({area: states[area].to(home, place.dtype) for area in dict.fromkeys((source, *areas))}, answers)

    return forward


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_options(split: str, lists: dict[str, Sequence[str]], dtype: str, numbers: dict[str, int | None], compression: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    for name, names in lists.items():
        if isinstance(names, str):
            raise TypeError(f"{name}: expected a sequence of names, got the string {names!r}")
    unknown = [name for name in lists["reducers"] if name not in REDUCERS]
    if unknown or not lists["reducers"]:
        raise ValueError(f"reducers: expected some of {', '.join(REDUCERS)}, got {unknown[0] if unknown else 'none'}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    for name, value, least in (*((name, value, 1) for name, value in numbers.items()), ("compression", compression, 0)):
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if compression > 9:
        raise ValueError(f"compression: expected at most 9, got {compression}")


def _check_areas(net: RecurrentNetwork, option: str, names: Sequence[str]) -> tuple[str, ...]:
    """Areas, each once, checked against those of the network."""
    known = tuple(area.name for area in net.network.areas)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option}: no area {unknown[0]!r} in this network; its areas are {', '.join(known)}")
    return tuple(dict.fromkeys(names))
