"""Images through a trained network into the analysis of reaction times."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from rnndyn_fast.analysis.human_times import ReactionTimeComparison, compare_reaction_times, load_reaction_times
from rnndyn_fast.analysis.reaction_times import ReactionTimeReducer
from rnndyn_fast.analysis.speed_accuracy import UNREACHED, ReactionTimeResult
from rnndyn_fast.data import SPLITS, check_unit_range, normalise
from rnndyn_fast.extract.plan import Rows
from rnndyn_fast.extract.run import sha256
from rnndyn_fast.extract.sources import open_source, read_rows
from rnndyn_fast.models import BLTVS
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.suggestions import check_choice
from rnndyn_fast.train.checkpoint import load_checkpoint, versions
from rnndyn_fast.train.foreign import Foreign
from rnndyn_fast.train.progress import Reporter, choose_reporter


def react(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    split: str = "test",
    *,
    human: str | os.PathLike[str] | None = None,
    strict: bool = False,
    cumulative: bool = False,
    unreached: str = "last",
    batch_size: int = 250,
    timesteps: int | None = None,
    limit: int | None = None,
    resize: bool = False,
    background: str = "white",
    foreign: Foreign | None = None,
    backend: str | None = None,
    engine: str = "auto",
    reporter: Reporter | None = None,
) -> tuple[ReactionTimeResult, ReactionTimeComparison | None]:
    """Reaction times of a trained network on a split, and their comparison with those of people.

    Args:
        checkpoint: file written by ``train``.
        data: HDF5 image file with this split, or a folder of image files (a subfolder per class).
        split: "train", "val", "test" or "testplus".
        human: file of reaction times, see :func:`rnndyn_fast.analysis.load_reaction_times`; its images are rows of the split.
        strict, cumulative, unreached: see :class:`rnndyn_fast.analysis.ReactionTimeReducer` and ``ReactionTimeResult.curve``.
        batch_size, timesteps, limit, resize, background, foreign, backend, engine, reporter: as for ``extract``.

    Returns:
        The result, with the multiply-adds per image as cost, and the comparison (None without ``human``).

    Raises:
        ValueError, TypeError, FileNotFoundError: as ``extract``; ``limit`` together with ``human``.

    Deterministic: yes on a CPU with a fixed number of threads. Memory: a few batches, and 9 T bytes per image with ``human``.
    """
    check_choice("split", split, SPLITS)
    check_choice("unreached", unreached, UNREACHED)
    if human is not None and limit is not None:
        raise ValueError("limit: expected None together with human, whose images are rows of the whole split")
    net, contents = load_checkpoint(checkpoint, timesteps=timesteps, backend=backend, engine=engine, foreign=foreign)
    if isinstance(net, BLTVS) and net.readout_type != "multi":
        raise ValueError(f"checkpoint: expected answers at several time steps, got a network of readout_type {net.readout_type!r}")
    trained = contents["data"]
    with open_source(data, split, trained["image_size"], trained["categories"], resize=resize, background=background) as source:
        rows = Rows(len(source), limit)
        people = None if human is None else load_reaction_times(human, len(rows))
        steps = net.timesteps - net.first_output
        num_classes = len(trained["categories"])
        reducer = ReactionTimeReducer(num_classes, steps, strict=strict, cumulative=cumulative, keep_samples=people is not None)
        mean, std = (np.asarray(trained[name]) for name in ("mean", "std"))
        with reporter or choose_reporter() as shown, torch.inference_mode():
            if read := source.describe().get("read"):
                shown.line(str(read))
            shown.start(f"{split}, {len(rows)} images", len(rows))
            for first in range(0, len(rows), batch_size):
                pixels, labels = read_rows(source, rows.between(first, min(first + batch_size, len(rows))), num_classes)
                check_unit_range(pixels)
                reducer.update(net.run(normalise(pixels, mean, std)), labels)
                shown.advance(len(labels), "")
    descriptors = {
        "checkpoint": {"path": str(Path(checkpoint)), "sha256": sha256(checkpoint), "epoch": contents["epoch"]},
        "data": {"path": str(data), "split": split, "images": len(rows)},
        "versions": versions(),
    }
    result = reducer.result(cost=costs(net), descriptors=descriptors)
    if people is None:
        return result, None
    return result, compare_reaction_times(result.entropy, people, result.thresholds, strict=strict, unreached=unreached)


def costs(net: RecurrentNetwork) -> np.ndarray:  # [T]
    """Multiply-adds per image of stopping after each output, by the schedule, which computes nothing twice."""
    return np.array([net.schedule(timesteps=t + 1).multiplications()[0] for t in range(net.first_output, net.timesteps)], dtype=np.float64)
