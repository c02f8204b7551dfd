"""Make an HDF5 image file of the MiniEcoset layout from real images."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnndyn_fast.data.challenge import CONDITIONS, OPAQUE_LEVEL, ObjectPool, assign_conditions, challenge
from rnndyn_fast.data.hdf5 import SPLITS
from rnndyn_fast.data.own_images import make_from_files
from rnndyn_fast.data.resize import resize
from rnndyn_fast.data.sources import BUNDLED, ImageSource, load_source, stratified_order
from rnndyn_fast.file_io import replaced_atomically
from rnndyn_fast.hdf5_out import Patient, checked, hdf5_out

if TYPE_CHECKING:
    import h5py

Progress = Callable[[str, int, int], None]

MIN_SIZE, MAX_SIZE = 8, 512
POOL_SIZE = 512
CHALLENGING = ("train", "val", "testplus")  # splits under conditions where training is to be on hard images too
_STREAMS = {"train": (1,), "val": (2,)}  # of random numbers; testplus is that of files without them
_BLOCK_PIXELS = 2**21
# A chunk is what one random read must decompress: about 32 KiB, at least one image.
_CHUNK_BYTES = 2**15


@dataclass(frozen=True)
class _Part:
    """The images of one split, at the source's resolution."""

    images: np.ndarray  # uint8 [n, h, w]
    labels: np.ndarray  # int64 [n]
    index: np.ndarray  # int64 [n], numbers in the source


def make_dataset(
    out: str | os.PathLike[str],
    *,
    source: str = "auto",
    size: int = 64,
    seed: int = 0,
    num_train: int | None = None,
    num_val: int | None = None,
    num_test: int | None = None,
    num_testplus: int | None = None,
    challenging: bool = False,
    fit: str = "crop",
    background: str = "white",
    overwrite: bool = False,
    progress: Progress | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Write real images as an HDF5 file that `ImageFile` reads.

    train and val come from the source's training images, test and testplus from its test images; no source image is in
    two splits (`source_index` [n] of each split says which they are). Subsets are stratified by class. test is plain,
    testplus under the conditions of `challenge.CONDITIONS`, one per image (`condition` [n] in its group), whose other
    objects are themselves testplus images. Every split has its own random stream.

    Args:
        out: the file to write; missing folders are made.
        source: "fashion-mnist", "digits" or "auto"; or images of one's own: a folder with a subfolder per class (or train, val, ..., and in
            each a subfolder per class), or a CSV with the columns path, label and perhaps split (see ``own_images``).
        size: H = W in pixels, 8..512; images are resized with antialiasing and get three equal channels.
        seed: int >= 0.
        num_train, num_val, num_test, num_testplus: number of images. None: val is a tenth of train and val together,
            test half of test and testplus together, train and testplus take all that is left.
        fit, background: of images of one's own, see :func:`rnndyn_fast.data.fit` and :func:`rnndyn_fast.data.read_image`.
        challenging: put train and val under these conditions too, with other objects of their own split.
        overwrite: replace an existing file.
        progress: called with (split, images done, images in all).
        folder: where the Fashion-MNIST files are; None is where the Debian package puts them.

    Returns:
        The path of the file.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number out of range, more images wanted than there are, unknown source, damaged source files.
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, ImportError: the source is not installed; says how to get it.

    Deterministic: equal arguments, sources and library versions give equal contents.
    Memory: the source, and blocks of 2 million pixels; never a whole split. On disk nothing is there until all is.
    """
    path = Path(out)
    _check_int("size", size, MIN_SIZE, MAX_SIZE)
    _check_int("seed", seed, 0, None)
    wanted = {"train": num_train, "val": num_val, "test": num_test, "testplus": num_testplus}
    for split, number in wanted.items():
        if number is not None:
            _check_int(f"num_{split}", number, 1, None)
    if path.is_dir():
        raise ValueError(f"out: expected a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"out: {path} exists; pass overwrite=True (--overwrite) to replace it")
    if is_own(source):
        for name, asked in (("challenging", challenging), ("num_testplus", num_testplus)):
            if asked:
                raise ValueError(f"{name}: expected only with bundled images, which are of objects on black, got {asked}")
        return make_from_files(
            path, source, size=size, fit=fit, background=background, seed=seed, wanted=wanted, overwrite=overwrite, progress=progress
        )
    images = load_source(source, folder=folder, seed=seed)
    parts = _divide(images, wanted, seed)
    with replaced_atomically(path) as unfinished, hdf5_out(unfinished) as (file, below):
        _write(file, below, images, parts, size, seed, CHALLENGING if challenging else ("testplus",), progress)
    return path


def is_own(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a folder or table of image files, and not the name of bundled ones."""
    text = os.fspath(source)
    return os.sep in text or text.lower().endswith(".csv") or (text not in BUNDLED and Path(text).is_dir())


def _check_int(name: str, value: int, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least}..{most}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _divide(source: ImageSource, wanted: dict[str, int | None], seed: int) -> dict[str, _Part]:
    """Disjoint, stratified parts of the source."""
    parts = {}
    for large, small, share, images, labels, index, stream in (
        ("train", "val", 10, source.train_images, source.train_labels, source.train_index, 0),
        ("testplus", "test", 2, source.test_images, source.test_labels, source.test_index, 1),
    ):
        here = len(labels)
        # By default the small one is a share of both together, or as much of it as there is room for.
        asked = wanted[large]
        both = here if asked is None else asked * share // (share - 1)
        number_small = wanted[small] or max(1, min(both // share, here - (asked or 1)))
        number_large = asked or here - number_small
        if number_small < 1 or number_large < 1 or number_small + number_large > here:
            raise ValueError(
                f"num_{large}, num_{small}: {source.name} has {here} images for {large} and {small} together, "
                f"asked for {number_large} + {number_small}"
            )
        order = stratified_order(labels, np.random.default_rng([seed, stream]))
        for split, rows in (
            (small, order[:number_small]),
            (large, order[number_small : number_small + number_large]),
        ):
            parts[split] = _Part(images[rows], labels[rows], index[rows])
    return parts


def _write(
    file: h5py.File,
    below: Patient,
    source: ImageSource,
    parts: dict[str, _Part],
    size: int,
    seed: int,
    hard: tuple[str, ...],
    progress: Progress | None,
) -> None:
    block = max(1, _BLOCK_PIXELS // size**2)
    for split in SPLITS:
        part = parts[split]
        count = len(part.labels)
        group = file.create_group(split)
        group.create_dataset("labels", data=part.labels, **checked(part.labels))
        group.create_dataset("source_index", data=part.index)
        data = group.create_dataset(
            "data",
            shape=(count, size, size, 3),
            dtype=np.uint8,
            chunks=(min(count, max(1, _CHUNK_BYTES // (3 * size**2))), size, size, 3),
            compression="gzip",  # the one filter every HDF5 reader has; level 1 makes three equal channels small
            compression_opts=1,
        )
        stream = _STREAMS.get(split, ())
        if split in hard:
            condition, pool = _prepare_conditions(group, part, size, seed, stream)
        total, total_of_squares = 0, 0
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            grey = resize(part.images[rows], size)
            if split in hard:
                rng = np.random.default_rng([seed, 3, *stream, start])
                grey = challenge(grey, part.labels[rows], condition[rows], pool, rng)
            below.check()
            data[rows] = np.repeat(grey[:, :, :, None], 3, axis=3)
            total += int(grey.sum(dtype=np.int64))
            total_of_squares += int(np.square(grey, dtype=np.int64).sum())
            if progress is not None:
                progress(split, rows.stop, count)
        if split == "train":
            _write_statistics(file, total, total_of_squares, count * size**2)
    file.create_dataset("categories", data=np.array([name.encode() for name in source.categories]))
    file.attrs.update(
        {
            "source": source.name,
            "source_note": source.note,
            "seed": seed,
            "size": size,
            "challenging": len(hard) > 1,
            "version": _version(),
            "parameters": json.dumps(
                {
                    **{f"num_{split}": len(parts[split].labels) for split in SPLITS},
                    "resize": "bilinear, antialiased",
                    "channels": "grey, three times",
                    "testplus": _testplus_parameters(),
                }
            ),
        }
    )


def _prepare_conditions(group: h5py.Group, part: _Part, size: int, seed: int, stream: tuple[int, ...]) -> tuple[np.ndarray, ObjectPool]:
    condition = assign_conditions(part.labels, np.random.default_rng([seed, 2, *stream]))
    group.create_dataset("condition", data=condition)
    group.attrs["condition_names"] = [settings.name for settings in CONDITIONS]
    group.attrs["condition_parameters"] = json.dumps(_testplus_parameters())
    group.attrs["seed"] = seed
    # The images are in stratified order, so the first of them hold all categories.
    pool = ObjectPool(resize(part.images[:POOL_SIZE], size), part.labels[:POOL_SIZE])
    return condition, pool


def _testplus_parameters() -> dict[str, object]:
    conditions = [asdict(settings) for settings in CONDITIONS]
    return {"conditions": conditions, "opaque_level": OPAQUE_LEVEL, "pool_size": POOL_SIZE}


def _write_statistics(file: h5py.File, total: int, total_of_squares: int, pixels: int) -> None:
    """Mean and (population) standard deviation over all pixels of train, per channel, scale 0-255."""
    mean = total / pixels
    variance = (total_of_squares * pixels - total * total) / pixels**2  # integers: exact before the division
    if variance <= 0:
        raise ValueError("num_train: the training images are all of one grey; they cannot be normalised")
    file.create_dataset("train_img_mean_channels", data=np.full(3, mean))
    file.create_dataset("train_img_std_channels", data=np.full(3, variance**0.5))


def _version() -> str:
    try:
        return importlib.metadata.version("rnndyn-fast")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"
