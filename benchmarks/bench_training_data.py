"""Images/s of what feeds a training run, and of the run's own steps: the loader must not be the bottleneck.

    pytest benchmarks/bench_training_data.py -q

Of an image folder `rnndyn train` makes an HDF5 file once, and trains on that: what is measured of it is the making.
RNNDYN_BENCH_QUICK=1 runs it tiny, to see that it works.

Prediction: on two cores, at 64 px, training steps of the published lateral network take 10 to 20 images/s and every reader gives a
hundred times that; at 224 px steps of BLT-VS take less than one, HDF5 and arrays in shards give some hundreds, and JPEG in shards, which
has to be decoded, about two hundred, with two workers less than twice that.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import QUICK, alternate, summary, write_result
from PIL import Image

from rnndyn_fast import models
from rnndyn_fast.data import BatchLoader, ImageFile, make_dataset, normalise
from rnndyn_fast.data.own_images import images_for_training
from rnndyn_fast.data.shards import ShardFile, index_for_training, write_shards
from rnndyn_fast.train import loss_over_time
from rnndyn_fast.train.transform import TrainingTransform

SIZES, BATCH, BATCHES, ROUNDS = ((16,), 4, 12, 1) if QUICK else ((64, 224), 32, 4, 5)
IMAGES = BATCH * BATCHES
STEP_IMAGES = {16: 4, 64: 32, 224: 2}  # of a training step


def image_file(folder: Path, size: int) -> Path:
    """Training images of one size, enough for all batches."""
    return make_dataset(folder / "images.h5", source="digits", size=size, num_train=IMAGES, num_val=20, num_test=20, num_testplus=20)


def write_jpeg(file: ImageFile, out: Path) -> tuple[Path, Path]:
    """The training images as JPEG: a folder per class, and four tar shards."""
    split = file.split("train")
    pixels, labels = split.read(slice(None))
    (out / "tar").mkdir(parents=True)
    per_shard = -(-IMAGES // 4)
    for start in range(0, IMAGES, per_shard):
        with tarfile.open(out / "tar" / f"train-{start // per_shard:06}.tar", "w") as archive:
            for k in range(start, min(start + per_shard, IMAGES)):
                buffer = io.BytesIO()
                Image.fromarray(pixels[k].permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=90)
                name = file.categories[int(labels[k])]
                path = out / "folder" / name / f"{k:06}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(buffer.getvalue())
                info = tarfile.TarInfo(f"{name}/{k:06}.jpg")
                info.size = len(buffer.getvalue())
                archive.addfile(info, io.BytesIO(buffer.getvalue()))
    return out / "folder", out / "tar"


def epochs(split: Any, **options: Any) -> Callable[[], int]:
    """Reads an epoch, another one at each call; returns the number of images."""
    loader, count = BatchLoader(split, BATCH, shuffle=True, **options), iter(range(10**6))

    def run() -> int:
        loader.set_epoch(next(count))
        return sum(len(batch.labels) for batch in loader.batches())

    return run


def training_step(size: int) -> Callable[[], int]:
    """A training step on images that are in memory: of the published lateral network at 64 px, of BLT-VS at 224 px."""
    if size == 224:
        net = models.build({"model": "blt_vs", "num_classes": 10})
    else:
        options: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "image_size": 16, "timesteps": 3} if QUICK else {"timesteps": 10}
        net = models.blt_net_64(num_classes=10, topdown_connections=False, **options)
    number = STEP_IMAGES[size]
    images, labels = torch.rand(number, 3, size, size), torch.arange(number) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def run() -> int:
        optimizer.zero_grad()
        loss_over_time(net.run(normalise(images, np.full(3, 0.5), np.full(3, 0.5))), labels, "sum").backward()
        optimizer.step()
        return number

    return run


@pytest.mark.parametrize("size", SIZES)
def test_loader_against_training_steps(size: int, tmp_path: Path) -> None:
    """Readers as they are, with TrivialAugmentWide, with both in two workers; against a training step, in turns."""
    augment = TrainingTransform("trivialaugmentwide", seed=0, num_classes=10)
    made = iter(range(10**6))
    with ExitStack() as stack:
        file = stack.enter_context(ImageFile(image_file(tmp_path, size)))
        arrays = ShardFile(write_shards(file, tmp_path / "arrays", images_per_shard=-(-IMAGES // 4))).split("train")
        folder, tar = write_jpeg(file, tmp_path / "jpeg")
        jpeg = ShardFile(index_for_training(tar, tmp_path / "run", size, size)[0]).split("train")
        split = file.split("train")

        def of_folder() -> int:
            images_for_training(folder, tmp_path / f"made{next(made)}", size, False)
            return IMAGES

        contenders: dict[str, Callable[[], int]] = {
            "training step": training_step(size),
            "HDF5": epochs(split),
            "HDF5, augmented": epochs(split, transform=augment),
            "HDF5, augmented, 2 workers": epochs(split, transform=augment, workers=2),
            "tar shards, arrays": epochs(arrays),
            "tar shards, arrays, augmented, 2 workers": epochs(arrays, transform=augment, workers=2),
            "tar shards, JPEG": epochs(jpeg),
            "tar shards, JPEG, augmented, 2 workers": epochs(jpeg, transform=augment, workers=2),
            "image folder (JPEG) into HDF5, once": of_folder,
        }
        numbers = {name: run() for name, run in contenders.items()}
        times = alternate(contenders, ROUNDS, warmup=0)
    result = summary(times, "training step")
    for found in result.values():
        del found["ours_is_faster_by"]  # (numbers of images differ)
    write_result(
        f"training_data_{size}",
        {
            "section": "training data",
            "batch": BATCH,
            "size": size,
            "contenders": result,
            "images_per_s": {name: numbers[name] / found["median_s"] for name, found in result.items()},
        },
    )
