"""Real images to make data sets from: Fashion-MNIST (Debian package) and scikit-learn's digits."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnndyn_fast.optional import require

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CATEGORIES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
DIGIT_CATEGORIES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
BUNDLED = ("auto", "fashion-mnist", "digits")
_DIGITS_TEST_SHARE = 0.4


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Grey images of objects on a black background, with labels.

    Attributes:
        name: "fashion-mnist" or "digits".
        train_images, test_images: uint8 [n, h, w], 0-255.
        train_labels, test_labels: int64 [n].
        train_index, test_index: int64 [n], each image's number in the source as a whole; no number occurs twice.
        categories: names of the classes.
        note: what was taken and why, for people.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    train_index: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    test_index: np.ndarray
    categories: tuple[str, ...]
    note: str


def stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # [n] -> [n]
    """A random permutation of 0..n-1 in which every run of consecutive entries holds the classes in proportion.

    Item number r of a class of m items gets the key (r + 1/2) / m; the keys are sorted, equal ones at random.

    Args:
        labels: integers [n].
        rng: source of the randomness.

    Returns:
        int64 [n].

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> sorted(labels[stratified_order(labels, np.random.default_rng(0))][:2].tolist())
    [0, 1]
    """
    shuffled = rng.permutation(len(labels))
    keys = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.lexsort((rng.random(len(labels)), keys))]


def load_source(source: str = "auto", *, folder: str | os.PathLike[str] | None = None, seed: int = 0) -> ImageSource:
    """Load real images.

    Args:
        source: "fashion-mnist", "digits", or "auto" (Fashion-MNIST where it is installed, otherwise digits).
        folder: folder of the four Fashion-MNIST files; None is where the Debian package puts them.
        seed: for digits, which have no test set of their own: a stratified permutation gives 40% to the test images.

    Returns:
        ImageSource; its `note` says what was taken.

    Raises:
        ValueError: unknown `source`, or a damaged file (names it).
        FileNotFoundError: Fashion-MNIST requested but not installed; says how to get it.
        ImportError: digits without scikit-learn.

    Deterministic: yes. Memory: all images (Fashion-MNIST 55 MB).
    """
    place = FASHION_MNIST_FOLDER if folder is None else Path(folder)
    if source == "fashion-mnist":
        return _load_fashion_mnist(place)
    if source == "digits":
        return _load_digits(seed, "scikit-learn's bundled digits (8 x 8 px)")
    if source != "auto":
        raise ValueError(f"source: expected 'fashion-mnist', 'digits', 'auto', or a folder or table (.csv) of image files, got {source!r}")
    if not _missing(place):
        return _load_fashion_mnist(place)
    return _load_digits(
        seed,
        f"scikit-learn's bundled digits (8 x 8 px), because Fashion-MNIST is not in {place} (apt-get install dataset-fashion-mnist)",
    )


def has_fashion_mnist() -> bool:
    """Whether the Debian package of Fashion-MNIST is installed."""
    return not _missing(FASHION_MNIST_FOLDER)


def _missing(folder: Path) -> list[str]:
    return [file for file in _FILES if not (folder / file).is_file()]


def _load_fashion_mnist(folder: Path) -> ImageSource:
    missing = _missing(folder)
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST: {missing[0]} is not in {folder}; `apt-get install dataset-fashion-mnist` puts it into "
            f"{FASHION_MNIST_FOLDER}, or use `--source digits`"
        )
    train_images, test_images = (_read_idx(folder / file, 3) for file in _FILES[0::2])
    train_labels, test_labels = (_read_idx(folder / file, 1).astype(np.int64) for file in _FILES[1::2])
    for part, images, labels in (("train", train_images, train_labels), ("t10k", test_images, test_labels)):
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {part} has {len(images)} images but {len(labels)} labels")
        if len(labels) and labels.max() >= len(FASHION_MNIST_CATEGORIES):
            raise ValueError(f"{folder}: {part} labels: expected 0..9, got {labels.max()}")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"{folder}: train images are {train_images.shape[1:]}, t10k images {test_images.shape[1:]} px")
    count = len(train_images)
    return ImageSource(
        name="fashion-mnist",
        train_images=train_images,
        train_labels=train_labels,
        train_index=np.arange(count),
        test_images=test_images,
        test_labels=test_labels,
        test_index=count + np.arange(len(test_images)),
        categories=FASHION_MNIST_CATEGORIES,
        note=f"Fashion-MNIST from {folder}",
    )


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """One gzipped idx file of uint8: magic 0x0000_08_rank, `rank` big-endian int32 lengths, the values."""
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file: {error}") from error
    header = 4 * (1 + rank)
    if len(raw) < header:
        raise ValueError(f"{path}: truncated idx file: {len(raw)} bytes, expected a header of {header}")
    magic, *shape = np.frombuffer(raw, dtype=">i4", count=1 + rank).tolist()
    if magic != 0x0800 + rank:
        raise ValueError(f"{path}: expected magic number {0x0800 + rank}, got {magic}")
    if min(shape) < 0 or len(raw) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: expected {shape} bytes of values after the header, got {len(raw) - header}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _load_digits(seed: int, note: str) -> ImageSource:
    require("sklearn")
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)  # stored as 0..16
    labels = bundle.target.astype(np.int64)
    order = stratified_order(labels, np.random.default_rng(seed))
    num_test = round(_DIGITS_TEST_SHARE * len(labels))
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return ImageSource(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        train_index=train,
        test_images=images[test],
        test_labels=labels[test],
        test_index=test,
        categories=DIGIT_CATEGORIES,
        note=note,
    )
