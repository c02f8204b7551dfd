"""HDF5 image files of the MiniEcoset layout: validated on open, streamed from disk, never held in memory.

Layout (H, W equal in every split)::

    /train, /val, /test, /testplus     groups
        data    uint8  [n, H, W, 3]
        labels  int    [n]              0 <= label < len(categories)
    /train_img_mean_channels  float [3]  scale 0-255      (dataset, or a file attribute of this name)
    /train_img_std_channels   float [3]  scale 0-255
    /categories               bytes [num_classes]

Whatever else a group holds (`condition`, `source_index`, ...) is kept as it is and read with `ImageSplit.extra`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rnndyn_fast.file_io import reading, stand_in
from rnndyn_fast.optional import require

if TYPE_CHECKING:
    import h5py

SPLITS: tuple[str, ...] = ("train", "val", "test", "testplus")


class _Handle:
    """An HDF5 file opened when first needed, once per process: HDF5 handles survive neither fork nor pickle."""

    def __init__(self, path: Path, argument: str) -> None:
        self.path = path
        self.argument = argument
        self._file: h5py.File | None = None
        self._pid = -1
        self._closed = False

    def file(self) -> h5py.File:
        if self._closed:
            raise ValueError(f"{self.path}: the file was closed; open it again with ImageFile(path)")
        if self._file is None or self._pid != os.getpid():
            self._file = _open_hdf5(self.path, self.argument)
            self._pid = os.getpid()
        return self._file

    def close(self) -> None:
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = None
        self._closed = True

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "argument": self.argument, "_file": None, "_pid": -1, "_closed": self._closed}


class ImageSplit(Dataset[tuple[torch.Tensor, int]]):
    """One split of an `ImageFile`: a map-style dataset that reads from disk what it is asked for.

    It can be pickled and used in worker processes; each process opens the file for itself.
    Memory: the labels (8 bytes per image); images are read on demand.
    Deterministic: yes.

    Attributes:
        name: the split's name.
        labels: int64 [n], categories of all images.
        image_size: H = W in pixels.
        attrs: attributes of the split's group.
        extras: names of further datasets in the group, for `extra(name)`.
    """

    def __init__(self, handle: _Handle, name: str, labels: np.ndarray, image_size: int) -> None:
        group = handle.file()[name]
        self._handle = handle
        self.name = name
        self.labels = labels
        self.image_size = image_size
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.extras: tuple[str, ...] = tuple(key for key in group if key not in ("data", "labels"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as (uint8 [3, H, W] 0-255, label). Raises IndexError out of range, TypeError if not an int."""
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"index: expected an int, got {type(index).__name__} (use read() for several)") from None
        images, labels = self.read([index])
        return images[0], int(labels[0])

    def read(self, indices: slice | Sequence[int] | np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `indices`, in that order (repeats are allowed, negative counts from the end).

        Args:
            indices: slice, or integers [N].

        Returns:
            images: uint8 [N, 3, H, W], 0-255, contiguous.
            labels: int64 [N].

        Raises:
            TypeError: `indices` are not integers.
            ValueError: `indices` are not one-dimensional, or the file was closed.
            IndexError: an index is out of range.
            OSError: the file cannot be read any more (names the path and the split).

        Memory: twice the returned images.
        """
        wanted = self._positions(indices)
        # Positions are read in ascending order, each once: chunks are then decompressed once, and runs are one call.
        positions, inverse = np.unique(wanted, return_inverse=True)
        size = self.image_size
        pixels = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        if len(positions):
            data = self._handle.file()[self.name]["data"]
            starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
            try:
                # One read per run of neighbours: h5py's own index lists cost about 15 times as much per image.
                for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
                    source = np.s_[positions[start] : positions[stop - 1] + 1]
                    data.read_direct(pixels, source, np.s_[start:stop])
            except (OSError, RuntimeError) as error:  # (h5py raises both)
                raise OSError(f"{self._handle.path}: cannot read images of split {self.name!r}: {error}") from error
        if not np.array_equal(positions, wanted):
            pixels = pixels[inverse]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(self.labels[wanted])

    def extra(self, name: str) -> np.ndarray:
        """Array `name` of the split's group (for example `condition`), whole. Raises ValueError if there is none."""
        if name not in self.extras:
            raise ValueError(f"name: split {self.name!r} of {self._handle.path} has no dataset {name!r}; it has {self.extras}")
        return np.asarray(self._handle.file()[self.name][name][()])

    def _positions(self, indices: slice | Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """`indices` as int64 positions in 0..n-1, checked."""
        if isinstance(indices, slice):
            return np.arange(*indices.indices(len(self)), dtype=np.int64)
        array = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
        if array.size == 0 and array.ndim == 1:
            return np.empty(0, dtype=np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"indices: expected integers [N] or a slice, got dtype {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"indices: expected one dimension [N], got shape {list(array.shape)}")
        array = array.astype(np.int64)
        outside = array[(array < -len(self)) | (array >= len(self))]
        if len(outside):
            raise IndexError(f"indices: {outside[0]} is out of range for split {self.name!r} of {len(self)} images")
        return np.where(array < 0, array + len(self), array)


class ImageFile:
    """A validated, read-only HDF5 image file of the MiniEcoset layout; a context manager.

    Args:
        path: the file.
        required_splits: splits that must be there and are validated on open; others are validated when asked for. None: one at least.
        argument: what the user calls the path, for messages.

    Attributes:
        path: Path.
        image_size: H = W in pixels.
        categories: names of the classes; num_classes = len(categories).
        mean, std: float64 [3], per channel over the training images, scale 0-255.
        attrs: attributes of the file.
        split_names: the splits that the file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, truncated, or not of the layout; says what is missing or wrong, and where.
        TypeError: `required_splits` is a single string.

    Memory: labels of the splits that were asked for.

    >>> with ImageFile("images.h5") as file:  # doctest: +SKIP
    ...     images, labels = file.split("test").read(slice(0, 16))
    """

    def __init__(self, path: str | os.PathLike[str], required_splits: Sequence[str] | None = SPLITS, *, argument: str = "path") -> None:
        if isinstance(required_splits, str):
            raise TypeError(f"required_splits: expected a sequence of names, got the string {required_splits!r}")
        if required_splits is not None and (not required_splits or any(name not in SPLITS for name in required_splits)):
            raise ValueError(f"required_splits: expected some of {SPLITS}, got {tuple(required_splits)}")
        self.path = Path(path)
        self._handle = _Handle(self.path, argument)
        self._splits: dict[str, ImageSplit] = {}
        try:
            with reading(self.path, "image file (HDF5)"):
                self._open(required_splits)
        except BaseException:
            self._handle.close()
            raise

    def _open(self, required_splits: Sequence[str] | None) -> None:
        require("h5py")
        import h5py

        file = self._handle.file()
        self.attrs: dict[str, Any] = dict(file.attrs)
        self.split_names: tuple[str, ...] = tuple(name for name in SPLITS if isinstance(file.get(name), h5py.Group))
        if required_splits is None:
            required_splits = self.split_names[:1] or SPLITS
        missing = [name for name in required_splits if name not in self.split_names]
        if missing:
            raise ValueError(
                f"{self.path}: group {missing[0]!r} is missing; expected groups {tuple(required_splits)}, the file holds {tuple(file)}"
            )
        self.categories = _read_categories(file, self.path)
        self.num_classes = len(self.categories)
        self.mean, self.std = _read_statistics(file, self.path)
        self.image_size = _image_size(file, required_splits[0], self.path)
        for name in required_splits:
            self.split(name)

    def split(self, name: str) -> ImageSplit:
        """The split `name`, validated. Raises ValueError for an unknown split or one that breaks the layout."""
        if name not in self.split_names:
            raise ValueError(f"name: {self.path} has no split {name!r}; it has {self.split_names}")
        if name not in self._splits:
            file = self._handle.file()
            size = _image_size(file, name, self.path)
            if size != self.image_size:
                raise ValueError(
                    f"{self.path}: {name}/data holds images of {size} px, another split of {self.image_size} px; "
                    "expected one image size in all splits"
                )
            labels = _read_labels(file, name, self.num_classes, self.path)
            self._splits[name] = ImageSplit(self._handle, name, labels, size)
        return self._splits[name]

    def close(self) -> None:
        """Close the file; its splits can no longer read. Closing twice does no harm."""
        self._handle.close()

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _open_hdf5(path: Path, argument: str) -> h5py.File:
    require("h5py")
    import h5py

    if not path.exists():
        link = f" (a broken link to {os.readlink(path)}: not fetched?)" if path.is_symlink() else ""
        raise FileNotFoundError(f"{argument}: no such file: {path}{link}")
    if path.is_dir():
        raise ValueError(
            f"{argument}: expected an HDF5 file, got a folder: {path} (rnndyn data make --source {path} --out images.h5 makes one)"
        )
    try:
        return h5py.File(path, "r")
    except PermissionError:
        raise
    except OSError as error:
        if "truncated file" in str(error):
            raise ValueError(f"{path}: the HDF5 file is truncated (incomplete copy or download?): {error}") from error
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path}: {stand_in(path) or f'not an HDF5 file: {error}'}") from error
        raise OSError(f"{path}: cannot open the HDF5 file: {error}") from error


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    require("h5py")
    import h5py

    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        group = file[name.rpartition("/")[0] or "/"]
        raise ValueError(f"{path}: dataset {name!r} is missing; its group holds {tuple(group)}")
    return found


def _image_size(file: h5py.File, split: str, path: Path) -> int:
    """H = W of `split`, after checking dtype, rank, channels and that there is an image."""
    data = _dataset(file, f"{split}/data", path)
    if data.dtype != np.uint8:
        raise ValueError(f"{path}: {split}/data: expected dtype uint8, got {data.dtype}")
    if data.ndim != 4 or data.shape[3] != 3:
        raise ValueError(f"{path}: {split}/data: expected shape [n, H, W, 3], got {list(data.shape)}")
    count, height, width, _ = data.shape
    if height != width or height == 0:
        raise ValueError(f"{path}: {split}/data: expected square images (H = W), got H = {height}, W = {width}")
    if count == 0:
        raise ValueError(f"{path}: {split}/data: expected at least one image, got shape {list(data.shape)}")
    return int(height)


def _read_labels(file: h5py.File, split: str, num_classes: int, path: Path) -> np.ndarray:
    """Labels of `split` as int64 [n], checked against the images and the categories."""
    stored = _dataset(file, f"{split}/labels", path)
    count = file[f"{split}/data"].shape[0]
    if not np.issubdtype(stored.dtype, np.integer):
        raise ValueError(f"{path}: {split}/labels: expected an integer dtype, got {stored.dtype}")
    if stored.ndim != 1:
        raise ValueError(f"{path}: {split}/labels: expected shape [n], got {list(stored.shape)}")
    if stored.shape[0] != count:
        raise ValueError(f"{path}: {split}: {count} images in data but {stored.shape[0]} labels")
    labels = stored[()]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise ValueError(f"{path}: {split}/labels: expected 0..{num_classes - 1}, got the negative label {lowest}")
    if highest >= num_classes:
        raise ValueError(
            f"{path}: {split}/labels: label {highest} is out of range; there are {num_classes} categories (0..{num_classes - 1})"
        )
    return np.asarray(labels, dtype=np.int64)


def _dataset_or_attribute(file: h5py.File, name: str, path: Path) -> np.ndarray:
    require("h5py")
    import h5py

    found = file.get(name)
    if isinstance(found, h5py.Dataset):
        return np.asarray(found[()])
    if name in file.attrs:
        return np.asarray(file.attrs[name])
    raise ValueError(f"{path}: {name!r} is missing; expected a dataset (or an attribute) at file level")


def _read_categories(file: h5py.File, path: Path) -> list[str]:
    raw = _dataset_or_attribute(file, "categories", path).ravel()
    if not len(raw):
        raise ValueError(f"{path}: 'categories': expected at least one name, got none")
    if not all(isinstance(name, bytes | str) for name in raw):
        raise ValueError(f"{path}: 'categories': expected names (bytes), got dtype {raw.dtype}")
    try:
        return [name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in raw]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: 'categories': expected UTF-8 names: {error}") from error


def _read_statistics(file: h5py.File, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the training images, float64 [3] each, scale 0-255."""
    values = []
    for name in ("train_img_mean_channels", "train_img_std_channels"):
        raw = _dataset_or_attribute(file, name, path).ravel()
        if raw.dtype.kind not in "iuf" or raw.size != 3:
            raise ValueError(f"{path}: {name!r}: expected 3 numbers, got dtype {raw.dtype}, {raw.size} value(s)")
        value = raw.astype(np.float64)
        if not np.isfinite(value).all() or value.min() < 0 or value.max() > 255:
            raise ValueError(f"{path}: {name!r}: expected 3 finite numbers in 0..255, got {value.tolist()}")
        values.append(value)
    mean, std = values
    if std.min() <= 0:
        raise ValueError(f"{path}: 'train_img_std_channels': expected positive numbers, got {std.tolist()}")
    # Statistics of images in 0..1 would normalise silently to nonsense; real images are never this dark.
    if mean.max() <= 1 and std.max() <= 1:
        raise ValueError(
            f"{path}: 'train_img_mean_channels' {mean.tolist()} and 'train_img_std_channels' {std.tolist()} look like "
            "statistics of images in 0..1; expected the scale 0..255"
        )
    return mean, std
