"""Images/s of what feeds a training run, and of the run's own steps: the loader must not be the bottleneck.

    pytest benchmarks/bench_training_data.py -q

RNNDYN_BENCH_QUICK=1 runs it tiny, to see that it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import QUICK, alternate, summary, write_result

from rnndyn_fast.data import BatchLoader, ImageFile, make_dataset, normalise
from rnndyn_fast.data.shards import ShardLoader, write_shards
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.train import loss_over_time
from rnndyn_fast.train.transform import TrainingTransform

SIZES, BATCH, BATCHES, ROUNDS = ((16,), 4, 2, 1) if QUICK else ((64, 224), 32, 4, 5)


def image_file(folder: Path, size: int) -> Path:
    """Training images of one size, enough for all batches."""
    return make_dataset(
        folder / "images.h5", source="digits", size=size, num_train=BATCH * BATCHES, num_val=20, num_test=20, num_testplus=20
    )


def epochs(loader: BatchLoader) -> Callable[[], None]:
    """Reads an epoch, another one at each call."""
    count = iter(range(10**6))

    def run() -> None:
        loader.set_epoch(next(count))
        for _ in loader.batches():
            pass

    return run


def training_steps(size: int) -> Callable[[], None]:
    """As many training steps of the published lateral network, on images that are in memory. Of larger images the network sees 64 px."""
    options: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "image_size": 16, "timesteps": 3} if QUICK else {"timesteps": 10}
    net = blt_net_64(num_classes=10, topdown_connections=False, **options)
    side = min(size, 64)
    images, labels = torch.rand(BATCH, 3, side, side), torch.arange(BATCH) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(BATCHES):
            optimizer.zero_grad()
            loss_over_time(net(normalise(images, np.full(3, 0.5), np.full(3, 0.5))), labels, "sum").backward()
            optimizer.step()

    return run


@pytest.mark.parametrize("size", SIZES)
def test_loader_against_training_steps(size: int, tmp_path: Path) -> None:
    """HDF5 as it is, with TrivialAugmentWide, with augmentation in two workers, and tar shards; against training steps, in turns."""
    path = image_file(tmp_path, size)
    augment = TrainingTransform("trivialaugmentwide", seed=0, num_classes=10)
    with ExitStack() as stack:
        file = stack.enter_context(ImageFile(path))
        write_shards(file, "train", tmp_path / "shards", images_per_shard=max(1, BATCH * BATCHES // 4))
        split = file.split("train")
        contenders: dict[str, Callable[[], None]] = {
            "training steps": training_steps(size),
            "HDF5": epochs(BatchLoader(split, BATCH, shuffle=True)),
            "HDF5, augmented": epochs(BatchLoader(split, BATCH, shuffle=True, transform=augment)),
            "HDF5, augmented, 2 workers": epochs(BatchLoader(split, BATCH, shuffle=True, transform=augment, workers=2)),
            "tar shards": shards(tmp_path / "shards"),
        }
        times = alternate(contenders, ROUNDS, warmup=1)
    result = summary(times, "training steps")
    images = BATCH * BATCHES
    speed = {name: images / found["median_s"] for name, found in result.items()}
    write_result(
        f"training_data_{size}",
        {"section": "training data", "batch": BATCH, "images": images, "size": size, "contenders": result, "images_per_s": speed},
    )


def shards(folder: Path) -> Callable[[], None]:
    """Reads all shards once."""
    loader = ShardLoader(folder, "train", BATCH)

    def run() -> None:
        batches: Iterator[Any] = iter(loader)
        for _ in batches:
            pass

    return run
