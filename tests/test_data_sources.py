"""Sources of real images: idx files are checked, digits are split without overlap, absence is explained."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from rnndyn_fast.data import load_source, stratified_order

COUNTS = {"train": 40, "t10k": 20}


def write_idx(path: Path, values: np.ndarray, magic: int | None = None) -> None:
    header = struct.pack(f">{1 + values.ndim}i", 0x0800 + values.ndim if magic is None else magic, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder: Path) -> Path:
    """The four files in small: objects are bright rectangles on black whose height is their class."""
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 : 7 + 2 * label, 6:22] = rng.integers(100, 256)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fashion_mnist(tmp_path)


def test_fashion_mnist(folder: Path) -> None:
    source = load_source("fashion-mnist", folder=folder)
    assert source.name == "fashion-mnist"
    assert source.train_images.shape == (40, 28, 28)
    assert source.train_images.dtype == np.uint8
    assert source.train_labels.dtype == np.int64
    np.testing.assert_array_equal(source.test_labels, np.arange(20) % 10)
    assert source.train_images[3, 4 + 8, 10] > 0
    assert source.train_images[3, 5 + 8, 10] == 0
    assert len(source.categories) == 10
    assert not set(source.train_index) & set(source.test_index)
    assert str(folder) in source.note


def test_auto(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert load_source("auto", folder=folder).name == "fashion-mnist"
    empty = tmp_path_factory.mktemp("empty")
    fallback = load_source("auto", folder=empty)
    assert fallback.name == "digits"
    assert "Fashion-MNIST is not in" in fallback.note
    assert str(empty) in fallback.note


def test_absent_fashion_mnist_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*--source digits"):
        load_source("fashion-mnist", folder=tmp_path)


def test_unknown_source() -> None:
    with pytest.raises(ValueError, match=r"source: expected 'fashion-mnist', 'digits', 'auto', or a folder .* got 'mnist'"):
        load_source("mnist")


IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_truncated_gzip(folder: Path, share: float) -> None:
    path = folder / IMAGES
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match=f"{IMAGES}: truncated"):
        load_source("fashion-mnist", folder=folder)


def test_damaged_idx_files(folder: Path) -> None:
    path = folder / IMAGES
    good = gzip.decompress(path.read_bytes())
    for raw, message in (
        (good[:-5], r"expected \[40, 28, 28\] bytes of values"),
        (good + b"\0", "bytes of values after the header"),
        (good[:10], "truncated idx file: 10 bytes"),
        (struct.pack(">i", 2049) + good[4:], "expected magic number 2051, got 2049"),
        (struct.pack(">2i", 2051, -1) + good[8:], "bytes of values after the header"),
    ):
        path.write_bytes(gzip.compress(raw))
        with pytest.raises(ValueError, match=f"{IMAGES}.*{message}"):
            load_source("fashion-mnist", folder=folder)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=f"{IMAGES}: truncated or damaged gzip"):
        load_source("fashion-mnist", folder=folder)


def test_labels_must_fit_the_images(folder: Path) -> None:
    write_idx(folder / LABELS, np.zeros(39))
    with pytest.raises(ValueError, match="train has 40 images but 39 labels"):
        load_source("fashion-mnist", folder=folder)
    write_idx(folder / LABELS, np.full(40, 10))
    with pytest.raises(ValueError, match=r"expected 0\.\.9, got 10"):
        load_source("fashion-mnist", folder=folder)


def test_digits_are_all_there_once_and_stratified() -> None:
    source = load_source("digits", seed=4)
    index = np.concatenate([source.train_index, source.test_index])
    np.testing.assert_array_equal(np.sort(index), np.arange(1797))
    assert source.train_images.shape[1:] == (8, 8)
    assert source.train_images.dtype == np.uint8
    assert source.train_images.max() == 255
    assert len(source.test_labels) == 719
    counts = np.bincount(source.test_labels, minlength=10)
    everything = counts + np.bincount(source.train_labels, minlength=10)
    assert np.abs(counts - 0.4 * everything).max() <= 1
    np.testing.assert_array_equal(load_source("digits", seed=4).test_index, source.test_index)
    assert not np.array_equal(load_source("digits", seed=5).test_index, source.test_index)


def test_stratified_order_is_a_permutation_with_balanced_runs() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = stratified_order(labels, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    for start in range(0, 81):
        counts = np.bincount(labels[order[start : start + 20]], minlength=3)
        assert np.abs(counts - [12, 6, 2]).max() <= 1
