"""Images in tar shards (WebDataset): splits that read like those of an HDF5 file, and writing shards from one."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from rnndyn_fast.data.hdf5 import SPLITS, ImageFile
from rnndyn_fast.data.image_files import decode, fit
from rnndyn_fast.data.shard_index import INDEX, KINDS, Progress, ShardIndex, count, find_shards, read_index, up_to_date
from rnndyn_fast.file_io import replaced_atomically
from rnndyn_fast.optional import require

STATISTICS_IMAGES = 10_000  # mean and deviation are those of so many training images
_BLOCK = 256  # images in memory while they are counted or written


class ShardSplit:
    """One split of a `ShardFile`: reads from the shards what it is asked for; each worker process opens them for itself.

    Attributes:
        name: the split's name.
        labels: int64 [n].
        shards: int32 [n], number of the file that each image is in.
        image_size: H = W that images are brought to.

    Memory: 29 bytes per image. Deterministic: yes.
    """

    def __init__(self, index: ShardIndex, files: Sequence[Path], name: str) -> None:
        rows = index.rows(name)
        self.name, self.image_size = name, index.image_size
        self.labels, self.shards = index.labels[rows], index.shard[rows]
        self._places = index.offset[rows], index.length[rows], index.kind[rows]
        self._files = [str(file) for file in files]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: slice | Sequence[int] | np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 [N, 3, H, W], 0-255, and labels int64 [N] at `indices`, in that order; shards are read forwards.

        Raises: IndexError: out of range; OSError, ValueError: an image cannot be read or is none; names the shard.
        """
        wanted = np.arange(len(self))[indices]
        pixels = np.empty((len(wanted), self.image_size, self.image_size, 3), np.uint8)
        offset, length, kind = (values[wanted] for values in self._places)
        shard = self.shards[wanted]
        order = np.lexsort((offset, shard))
        starts = np.flatnonzero(np.diff(shard[order], prepend=-1))
        for start, stop in pairwise([*starts, len(order)]):
            path = self._files[shard[order[start]]]
            with open(path, "rb", buffering=0) as stream:
                for k in order[start:stop]:
                    stream.seek(int(offset[k]))
                    content = stream.read(int(length[k]))
                    if len(content) < length[k]:
                        raise OSError(f"{path} is truncated: it ends within an image; it has changed since it was counted")
                    try:
                        pixels[k] = _pixels(content, KINDS[kind[k]], self.image_size)
                    except Exception as error:  # (libraries raise nearly everything, by kind of damage)
                        raise ValueError(f"{path}: the image at byte {offset[k]} cannot be read: {_told(error)}") from error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[wanted])


def _pixels(content: bytes, kind: str, size: int) -> np.ndarray:  # uint8 [S, S, 3]
    """An image as it is in a shard, brought to the size."""
    if kind != "npy":
        return fit(decode(io.BytesIO(content)), size)
    array = _array(content)
    if array.shape == (size, size, 3):
        return array
    require("PIL")
    from PIL import Image

    return fit(Image.fromarray(array), size)


def _told(error: Exception) -> str:
    """What an error says, without the address of what was in memory."""
    return re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))


def _array(content: bytes) -> np.ndarray:  # uint8 [H, W, 3]
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return array


class ShardFile:
    """Tar shards by their index, with what an `ImageFile` tells of an HDF5 file; a context manager.

    Args:
        path: the index, see :func:`write_shards` and :func:`index_for_training`.

    Attributes: as those of `ImageFile`.

    Raises: FileNotFoundError: no index, or a shard is not there; ValueError: damaged, or shards have changed since they were counted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index = read_index(path)
        self._files = self._index.files(self.path.parent)
        for file, size in zip(self._files, self._index.sizes, strict=True):
            if not file.is_file():
                raise FileNotFoundError(f"data: shard {file} is not there; {self.path} counts it")
            if file.stat().st_size != size:
                raise ValueError(f"data: shard {file} has {file.stat().st_size} bytes; it had {size} when it was counted in {self.path}")
        self.image_size, self.categories = self._index.image_size, self._index.categories
        self.num_classes = len(self.categories)
        self.mean, self.std = np.array(self._index.mean), np.array(self._index.std)
        self.split_names = tuple(name for name in SPLITS if len(self._index.rows(name)))

    def split(self, name: str) -> ShardSplit:
        """The split `name`. Raises ValueError for one that is not there."""
        if name not in self.split_names:
            raise ValueError(f"name: {self.path} has no split {name!r}; it has {self.split_names}")
        return ShardSplit(self._index, self._files, name)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is kept open."""


def index_for_training(
    data: str | os.PathLike[str], out: Path, size: int | None, default_size: int, progress: Progress | None = None
) -> tuple[Path, str]:
    """The index of tar shards to train on, and a word on it: that of their folder, or ``<out>_shards.npz``, counted once.

    Args:
        data: see :func:`rnndyn_fast.data.shard_index.find_shards`.
        size: that images are brought to; None: that of arrays, which have one, else `default_size`.

    Raises: what :func:`find_shards` and :func:`count` raise.
    """
    files = find_shards(data)
    beside, made = Path(data) / INDEX, out.with_name(f"{out.name}_shards.npz")
    for path in (beside, made):
        if path.exists():
            index = read_index(path)
            if up_to_date(index, path.parent, files) and (size or _own_size(index, path.parent, default_size)) == index.image_size:
                return path, f"{path}: {index.note}"
    index = count(files, progress)
    index.image_size = size or _own_size(index, made.parent, default_size)
    index.mean, index.std = _statistics(ShardSplit(index, files, "train"))
    return index.save(made), f"{made}: {index.note}"


def _own_size(index: ShardIndex, beside: Path, default: int) -> int:
    """Height of the first image where it is a square array, else the default."""
    if KINDS[index.kind[0]] != "npy":
        return default
    path = index.files(beside)[index.shard[0]]
    with open(path, "rb") as stream:
        stream.seek(int(index.offset[0]))
        try:
            array = _array(stream.read(int(index.length[0])))
        except Exception as error:
            raise ValueError(f"{path}: the first image cannot be read: {_told(error)}") from error
    return array.shape[0] if array.shape[0] == array.shape[1] else default


def _statistics(split: ShardSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, scale 0-255, of training images evenly spaced over the split."""
    number = min(STATISTICS_IMAGES, len(split))
    rows = np.arange(number) * len(split) // number
    total, squares, pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), number * split.image_size**2
    for start in range(0, number, _BLOCK):
        images = split.read(rows[start : start + _BLOCK])[0].numpy().astype(np.int64)
        total += images.sum((0, 2, 3))
        squares += np.square(images).sum((0, 2, 3))
    variance = [(int(q) * pixels - int(s) ** 2) / pixels**2 for s, q in zip(total, squares, strict=True)]  # (integers: exact)
    if min(variance) <= 0:
        raise ValueError("data: the training images are all of one colour in a channel; they cannot be normalised")
    return tuple((total / pixels).tolist()), tuple(value**0.5 for value in variance)


def write_shards(
    data: ImageFile,
    out: str | os.PathLike[str],
    *,
    images_per_shard: int = 1000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the splits of an image file as tar files (WebDataset) of ``<number>.npy`` (uint8 [H, W, 3]) and ``<number>.cls`` (the label).

    Args:
        data: the image file.
        out: folder for ``train-000000.tar``, ... and ``index.npz``, which says what is where and is written last.
        images_per_shard: at least 1.
        overwrite: replace shards that are there.
        progress: called with (split, images done, images in all).

    Returns: the path of the index.

    Raises: ImportError: webdataset is not installed; ValueError: fewer than one image per shard; FileExistsError: there are shards.

    Deterministic: equal files. Memory: 256 images.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard: expected at least 1, got {images_per_shard}")
    require("webdataset")
    from webdataset import TarWriter

    out = Path(out)
    there = sorted(out.glob("*.tar"))
    if there and not overwrite:
        raise FileExistsError(f"out: {there[0]} exists; overwrite=True (--overwrite) replaces the shards in {out}")
    for old in (out / INDEX, *there):
        old.unlink(missing_ok=True)
    for name in data.split_names:
        rows = len(data.split(name))
        for number, start in enumerate(range(0, rows, images_per_shard)):
            stop = min(start + images_per_shard, rows)
            with replaced_atomically(out / f"{name}-{number:06}.tar") as unfinished, TarWriter(str(unfinished), mtime=0.0) as writer:
                for key, image, label in _samples(data, name, start, stop):
                    writer.write({"__key__": f"{key:09}", "npy": image, "cls": label})
            if progress is not None:
                progress(name, stop, rows)
    files = find_shards(out)
    index = count(files)
    return dataclasses.replace(
        index,
        names=[file.name for file in files],
        categories=list(data.categories), image_size=data.image_size, mean=tuple(data.mean.tolist()), std=tuple(data.std.tolist()),
    ).save(out / INDEX)  # fmt: skip


def _samples(data: ImageFile, split: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, int]]:
    for first in range(start, stop, _BLOCK):
        images, labels = data.split(split).read(slice(first, min(first + _BLOCK, stop)))
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        yield from zip(range(first, first + len(labels)), pixels, labels.tolist(), strict=True)


def open_images(path: Path, required_splits: Sequence[str], argument: str) -> ImageFile | ShardFile:
    """The images of an HDF5 file, or of an index of tar shards."""
    return ShardFile(path) if path.suffix == ".npz" else ImageFile(path, required_splits, argument=argument)
