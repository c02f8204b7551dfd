"""Where images come from: an HDF5 image file, a folder of image files, or any map-style torch Dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rnndyn_fast.data import ImageFile
from rnndyn_fast.data.image_files import BACKGROUNDS, fit, read_image
from rnndyn_fast.data.image_folder import list_folder
from rnndyn_fast.suggestions import check_choice


class Source(Protocol):
    """Images with labels, numbered 0 to n - 1."""

    class_names: Sequence[str]  # empty where they are not known

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        """Images [N, ...] and labels int64 [N] of these rows. Raises OSError or ValueError; need not say of which row."""

    def place(self, row: int, /) -> str:
        """Where an image is, for messages."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from another at little cost; an extraction continues only with an equal one."""

    def describe(self) -> dict[str, Any]:
        """Where the images come from, for the record."""


class Hdf5Source:
    """A split of an HDF5 image file of the MiniEcoset layout (see docs/data.md)."""

    def __init__(self, file: ImageFile, split: str) -> None:
        self.file = file
        self.split = file.split(split)
        self.class_names: Sequence[str] = list(file.categories)
        self.image_size = file.image_size

    def __len__(self) -> int:
        return len(self.split)

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, 3, H, W] and labels."""
        return self.split.read(rows)

    def place(self, row: int, /) -> str:
        """File, split, number."""
        return f"{self.file.path}, split {self.split.name!r}, image {row}"

    def identity(self) -> dict[str, Any]:
        """Size and time of the file, and the split."""
        stat = self.file.path.stat()
        return {"kind": "hdf5", "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "split": self.split.name}

    def describe(self) -> dict[str, Any]:
        """Path and attributes."""
        read = f"{self.file.path}: split {self.split.name}, {len(self):,} images"
        return {"path": str(self.file.path), "read": read, "attributes": {name: _plain(value) for name, value in self.file.attrs.items()}}


class FolderSource:
    """Image files in a folder per class, as torchvision's ImageFolder finds them: see :func:`rnndyn_fast.data.image_folder.list_folder`.

    Args:
        root: the folder.
        image_size: S, height and width in pixels that the network takes.
        resize: scale and crop images of other sizes to S x S (their centre; shorter side to S); else they are an error.
        class_names: the folders that there may be and the order of their labels; None: those there are.
        background: what transparent pixels are laid over: "white", "grey" or "black".

    Raises:
        FileNotFoundError: files that are broken links.
        ValueError: no class folders, no images, or other classes than `class_names`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        *,
        resize: bool = False,
        class_names: Sequence[str] | None = None,
        background: str = "white",
    ) -> None:
        self.root, self.image_size, self.resize, self.background = Path(root), image_size, resize, background
        check_choice("background", background, tuple(BACKGROUNDS))
        self.listing = list_folder(root, class_names)
        self.class_names: Sequence[str] = list(self.listing.class_names)
        self.labels = self.listing.labels
        self._files = self.listing.names

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, 3, S, S] and labels."""
        size = (self.image_size, self.image_size)
        pixels = np.empty((len(rows), *size, 3), np.uint8)
        for out, row in zip(pixels, rows, strict=True):
            image = read_image(self.root / self._files[row], self.background)
            if image.size != size and not self.resize:
                raise ValueError(f"expected {size[0]} x {size[1]} px, got {image.width} x {image.height}; resize=True (--resize) fits it")
            out[...] = fit(image, self.image_size)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(self.labels[rows])

    def place(self, row: int, /) -> str:
        """The file."""
        return f"{self.root / self._files[row]} (image {row})"

    def identity(self) -> dict[str, Any]:
        """A hash of names, sizes and times of the files."""
        digest = hashlib.sha256()
        for name in self._files:
            stat = (self.root / name).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return {"kind": "folder", "files": digest.hexdigest(), "resize": self.resize, "background": self.background}

    def describe(self) -> dict[str, Any]:
        """The folder."""
        return {"path": str(self.root), "resize": self.resize, "background": self.background, "read": str(self.listing)}


class DatasetSource:
    """A map-style torch Dataset of (image, label): an image is a tensor or array, of any shape but all of the same.

    For `extract` images are [3, H, W], uint8 0-255 or floating point 0-1. Datasets are told apart by type and length only: going on with
    an interrupted extraction is right where the dataset gives the same items.
    """

    def __init__(self, dataset: Dataset[Any], class_names: Sequence[str] = ()) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"data: expected a map-style Dataset (with __getitem__ and __len__), got {type(dataset).__name__}")
        self.dataset, self.class_names = dataset, class_names
        if not len(self):
            raise ValueError("data: expected a dataset of at least one image, got an empty one")

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        """Images [N, ...] and labels."""
        items = [self.dataset[int(row)] for row in rows]
        if any(len(item) != 2 for item in items):
            raise ValueError(f"expected a pair (image, label), got {len(items[0])} values")
        images = [item[0] if isinstance(item[0], Tensor) else torch.from_numpy(np.array(item[0])) for item in items]
        first = images[0]
        for image in images:
            if image.shape != first.shape or image.dtype != first.dtype:
                raise ValueError(
                    f"expected an image {list(first.shape)} of {first.dtype} as others, got {list(image.shape)} of {image.dtype}"
                )
        return torch.stack(images), torch.tensor([_label(item[1]) for item in items], dtype=torch.int64)

    def place(self, row: int, /) -> str:
        """Type and number."""
        return f"{type(self.dataset).__name__}[{row}]"

    def identity(self) -> dict[str, Any]:
        """Type and length."""
        return {"kind": "dataset", "type": type(self.dataset).__qualname__, "images": len(self)}

    def describe(self) -> dict[str, Any]:
        """The type."""
        return {
            "path": None,
            "read": f"{type(self.dataset).__qualname__}: {len(self):,} images",
            "dataset": type(self.dataset).__qualname__,
        }


def open_source(
    data: Any, split: str | None, image_size: int, categories: Sequence[str], *, resize: bool = False, background: str = "white"
) -> AbstractContextManager[Source]:
    """The source behind what a user names: an HDF5 file, a folder, a Dataset, or a Source already; to be used in a ``with``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: its classes or image size are not those given, or it is damaged.
        TypeError: `data` is none of these.
    """
    if isinstance(data, Dataset):
        return nullcontext(DatasetSource(data, categories))
    if isinstance(data, Hdf5Source | FolderSource | DatasetSource):
        return nullcontext(data)
    if not isinstance(data, str | os.PathLike):
        raise TypeError(f"data: expected a path, a torch Dataset or a Source, got {type(data).__name__}")
    path = Path(data)
    if path.is_dir():
        return nullcontext(FolderSource(path, image_size, resize=resize, class_names=categories, background=background))
    return _OpenFile(path, split or "testplus", image_size, categories)


class _OpenFile:
    """An Hdf5Source that closes its file."""

    def __init__(self, path: Path, split: str, image_size: int, categories: Sequence[str]) -> None:
        self.file = ImageFile(path, required_splits=(split,), argument="data")
        self.split = split
        try:
            _check_fits(self.file, image_size, categories)
        except ValueError:
            self.file.close()
            raise

    def __enter__(self) -> Source:
        return Hdf5Source(self.file, self.split)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _check_fits(file: ImageFile, image_size: int, categories: Sequence[str]) -> None:
    if file.image_size != image_size:
        raise ValueError(f"data: expected images of {image_size} px, as the network was trained on, {file.path} has {file.image_size} px")
    if list(file.categories) != list(categories):
        raise ValueError(
            f"data: expected the {len(categories)} categories the network was trained on, {file.path} has "
            f"{file.num_classes}: {', '.join(file.categories[:5])}, ..."
        )


def _plain(value: Any) -> Any:
    """An HDF5 attribute as JSON can hold it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def read_rows(source: Source, rows: np.ndarray, num_classes: int | None = None) -> tuple[Tensor, Tensor]:  # [N] -> [N, ...], [N]
    """Images and labels of some rows. An error names the place of the first row that cannot be read.

    Raises:
        OSError: a file cannot be read.
        ValueError: an image does not fit, or holds NaN; a label that is none of 0..num_classes - 1.
    """
    try:
        images, labels = source.read(rows)
    except Exception as error:
        for row in rows:  # which one is it?
            try:
                source.read(np.array([row]))
            except Exception as single:
                place = source.place(int(row))
                kind = OSError if isinstance(single, OSError) else ValueError
                raise kind(f"{place}: {str(single).removeprefix(place.rpartition(' (image ')[0] + ': ')}") from single
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source.place(int(rows[0]))} and the {len(rows) - 1} after it: {error}") from error
    if images.is_floating_point():
        refuse_rows("image", images.flatten(1).double().sum(1)[None], source, rows)
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        most = "" if num_classes is None else f" and below {num_classes}, the number of categories"
        raise ValueError(f"{source.place(int(rows[first]))}: expected a label of at least 0{most}, got {int(labels[first])}")
    return images, labels


def _label(value: Any) -> int:
    """A label as an int: whole numbers of any type."""
    number = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
        raise ValueError(f"expected a whole number as the label, got {number!r}")
    return int(number)


def refuse_rows(what: str, sums: Tensor, source: Source, rows: np.ndarray) -> None:  # [T, N], [N]
    """Raise ValueError naming the first sample whose sum over something is NaN or infinite, and the time step."""
    bad = ~torch.isfinite(sums)
    if bool(bad.any()):
        sample = int(bad.any(0).nonzero()[0])
        t = int(bad[:, sample].nonzero()[0])
        step = f" at time step {t}" if len(sums) > 1 else ""
        raise ValueError(f"{source.place(int(rows[sample]))}: {what} holds NaN or infinite values{step}")
