"""HDF5 image files: the layout is validated, images are streamed, splits survive pickling and worker processes."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rnndyn_fast.data import SPLITS, ImageFile

COUNTS = {"train": 12, "val": 5, "test": 6, "testplus": 7}


def write_layout(path: Path, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, count in COUNTS.items():
            group = file.create_group(split)
            group["data"] = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
            group["labels"] = (np.arange(count) % 3).astype(np.uint8)
        file["train_img_mean_channels"] = np.array([100.0, 110.0, 120.0])
        file["train_img_std_channels"] = np.array([50.0, 60.0, 70.0], dtype=np.float32)
        file["categories"] = np.array([b"cat", b"dog", b"owl"])
        file.attrs["source"] = "noise"
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "images.h5")


def replace(file: h5py.File, name: str, value: object) -> None:
    del file[name]
    file[name] = value


def test_attributes(path: Path) -> None:
    with ImageFile(path) as file:
        assert file.path == path
        assert (file.image_size, file.num_classes, file.categories) == (8, 3, ["cat", "dog", "owl"])
        assert file.mean.dtype == file.std.dtype == np.float64
        np.testing.assert_array_equal(file.mean, [100, 110, 120])
        np.testing.assert_array_equal(file.std, [50, 60, 70])
        assert file.attrs == {"source": "noise"}
        assert file.split_names == SPLITS
        assert {name: len(file.split(name)) for name in SPLITS} == COUNTS


def test_statistics_and_categories_as_attributes(path: Path) -> None:
    names = ("train_img_mean_channels", "train_img_std_channels", "categories")
    with h5py.File(path, "a") as file:
        for name in names:
            file.attrs[name] = file[name][()]
            del file[name]
    with ImageFile(path) as opened:
        assert opened.categories == ["cat", "dog", "owl"]
        np.testing.assert_array_equal(opened.mean, [100, 110, 120])


@pytest.mark.parametrize(
    "indices",
    [
        slice(None),
        slice(1, 9, 3),
        slice(8, 2, -2),
        [3],
        [7, 2, 2, 11, 3, 4, -1],
        np.array([5, 6, 7]),
        torch.tensor([9, 0]),
    ],
    ids=str,
)
def test_read_returns_what_is_stored_in_the_order_asked_for(path: Path, indices: object) -> None:
    with h5py.File(path, "r") as file:
        data, labels = file["train/data"][()], file["train/labels"][()]
    with ImageFile(path) as opened:
        images, got = opened.split("train").read(indices)  # type: ignore[arg-type]
    where = indices.numpy() if isinstance(indices, torch.Tensor) else indices
    assert images.dtype == torch.uint8
    assert got.dtype == torch.int64
    assert images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), data[where].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(got.numpy(), labels[where])


def test_getitem_and_empty_read(path: Path) -> None:
    with ImageFile(path) as file:
        split = file.split("val")
        image, label = split[-1]
        images, labels = split.read(slice(None))
        assert image.shape == (3, 8, 8)
        assert torch.equal(image, images[4])
        assert type(label) is int
        assert label == labels[4]
        assert split.read([])[0].shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([12], IndexError, "12 is out of range.*'train' of 12"),
        ([-13], IndexError, "-13 is out of range"),
        ([0.5], TypeError, "expected integers"),
        ([True, False], TypeError, "expected integers"),
        ([[1]], ValueError, "one dimension"),
    ],
)
def test_read_refuses(path: Path, indices: list, error: type[Exception], message: str) -> None:
    with ImageFile(path) as file, pytest.raises(error, match=message):
        file.split("train").read(indices)


def test_getitem_refuses_slices(path: Path) -> None:
    with ImageFile(path) as file, pytest.raises(TypeError, match="index: expected an int, got slice"):
        file.split("train")[0:2]  # type: ignore[index]


BREAKS: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "group": (lambda f: f.__delitem__("testplus"), "group 'testplus' is missing"),
    "data": (lambda f: f.__delitem__("val/data"), "dataset 'val/data' is missing.*labels"),
    "labels": (lambda f: f.__delitem__("val/labels"), "dataset 'val/labels' is missing"),
    "mean": (lambda f: f.__delitem__("train_img_mean_channels"), "'train_img_mean_channels' is missing"),
    "std": (lambda f: f.__delitem__("train_img_std_channels"), "'train_img_std_channels' is missing"),
    "categories": (lambda f: f.__delitem__("categories"), "'categories' is missing"),
    "dtype": (
        lambda f: replace(f, "val/data", np.zeros((5, 8, 8, 3), np.float32)),
        "expected dtype uint8, got float32",
    ),
    "rank": (lambda f: replace(f, "val/data", np.zeros((5, 8, 8), np.uint8)), r"expected shape \[n, H, W, 3\]"),
    "channels": (
        lambda f: replace(f, "val/data", np.zeros((5, 3, 8, 8), np.uint8)),
        r"\[n, H, W, 3\], got \[5, 3, 8, 8\]",
    ),
    "not_square": (lambda f: replace(f, "val/data", np.zeros((5, 8, 9, 3), np.uint8)), "H = 8, W = 9"),
    "sizes": (lambda f: replace(f, "val/data", np.zeros((5, 9, 9, 3), np.uint8)), "9 px, another split of 8 px"),
    "empty": (lambda f: replace(f, "val/data", np.zeros((0, 8, 8, 3), np.uint8)), "at least one image"),
    "lengths": (lambda f: replace(f, "val/labels", np.zeros(4, np.int64)), "val: 5 images in data but 4 labels"),
    "label_dtype": (lambda f: replace(f, "val/labels", np.zeros(5)), "expected an integer dtype, got float64"),
    "label_rank": (lambda f: replace(f, "val/labels", np.zeros((5, 1), int)), r"expected shape \[n\], got \[5, 1\]"),
    "negative": (lambda f: replace(f, "val/labels", np.array([0, 0, -1, 0, 0])), "negative label -1"),
    "too_large": (
        lambda f: replace(f, "val/labels", np.array([0, 3, 1, 0, 0])),
        "label 3 is out of range.*3 categories",
    ),
    "zero_std": (lambda f: replace(f, "train_img_std_channels", np.array([1.0, 0, 1])), "expected positive numbers"),
    "nan_mean": (lambda f: replace(f, "train_img_mean_channels", np.array([1.0, np.nan, 1])), "3 finite numbers"),
    "one_mean": (lambda f: replace(f, "train_img_mean_channels", np.array([9.0])), r"expected 3 numbers.*1 value"),
    "unit_scale": (
        lambda f: (
            replace(f, "train_img_mean_channels", np.full(3, 0.5)),  # type: ignore[func-returns-value]
            replace(f, "train_img_std_channels", np.full(3, 0.2)),
        )[0],
        r"look like statistics of images in 0\.\.1",
    ),
    "category_numbers": (lambda f: replace(f, "categories", np.arange(3)), "expected names"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_layout_errors_name_the_path_and_the_fault(path: Path, case: str) -> None:
    change, message = BREAKS[case]
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message) as caught:
        ImageFile(path)
    assert str(path) in str(caught.value)


def test_only_required_splits_must_be_there(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["train"]
        replace(file, "val/labels", np.zeros(4, np.int64))
    with ImageFile(path, required_splits=("testplus",)) as opened:
        assert opened.split_names == ("val", "test", "testplus")
        assert len(opened.split("testplus").read(slice(0, 2))[1]) == 2
        with pytest.raises(ValueError, match=r"no split 'train'.*'val', 'test', 'testplus'"):
            opened.split("train")
        with pytest.raises(ValueError, match="5 images in data but 4 labels"):
            opened.split("val")


def test_required_splits_are_checked(path: Path) -> None:
    with pytest.raises(TypeError, match="required_splits"):
        ImageFile(path, required_splits="train")
    with pytest.raises(ValueError, match="required_splits"):
        ImageFile(path, required_splits=("training",))


def test_files_that_are_not_hdf5(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        ImageFile(tmp_path / "absent.h5")
    with pytest.raises(ValueError, match="got a folder"):
        ImageFile(tmp_path)
    other = tmp_path / "notes.txt"
    other.write_text("not images")
    with pytest.raises(ValueError, match=r"notes\.txt: not an HDF5 file"):
        ImageFile(other)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_file(path: Path, share: float) -> None:
    before = path.read_bytes()
    path.write_bytes(before[: int(share * len(before))])
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"images\.h5: the HDF5 file is truncated"):
        ImageFile(path)
    assert path.read_bytes() == kept


def test_closed_file_says_so(path: Path) -> None:
    file = ImageFile(path)
    split = file.split("test")
    file.close()
    file.close()
    with pytest.raises(ValueError, match="the file was closed"):
        split.read([0])


def test_failed_open_leaves_no_open_handle(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["train"]
    with pytest.raises(ValueError, match="'train' is missing"):
        ImageFile(path)
    with h5py.File(path, "a") as file:  # HDF5 refuses this while the file is open for reading
        file.create_group("train")


def test_pickled_split_reads_by_itself(path: Path, tmp_path: Path) -> None:
    with ImageFile(path) as file:
        expected, _ = file.split("test").read(slice(None))
        packed = pickle.dumps(file.split("test"))
    copy = pickle.loads(packed)
    images, _ = copy.read(slice(None))
    assert torch.equal(images, expected)
    assert len(packed) < 4000  # a handle, not the images


def test_worker_processes(path: Path) -> None:
    with ImageFile(path) as file:
        split = file.split("train")
        expected, labels = split.read(slice(None))  # the parent's handle is open before the fork
        loader = DataLoader(split, batch_size=4, num_workers=2, multiprocessing_context="fork")
        batches = list(loader)
        assert torch.equal(torch.cat([images for images, _ in batches]), expected)
        assert torch.equal(torch.cat([batch for _, batch in batches]), labels)
        assert torch.equal(split.read(slice(None))[0], expected)  # and still works after the workers left


def test_extra_datasets(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["testplus/condition"] = np.arange(7, dtype=np.uint8)
        file["testplus"].attrs["seed"] = 3
    with ImageFile(path) as opened:
        split = opened.split("testplus")
        assert split.extras == ("condition",)
        assert split.attrs["seed"] == 3
        np.testing.assert_array_equal(split.extra("condition"), np.arange(7))
        with pytest.raises(ValueError, match="no dataset 'depth'"):
            split.extra("depth")


def test_reading_does_not_hold_the_images(tmp_path: Path) -> None:
    """Opening and reading one batch of a 100 MB split keeps far less than that in memory."""
    path = write_layout(tmp_path / "large.h5", size=64)
    count = 8192
    with h5py.File(path, "a") as file:
        del file["train"]
        file.create_dataset("train/data", (count, 64, 64, 3), np.uint8, chunks=(16, 64, 64, 3), fillvalue=7)
        file["train/labels"] = np.zeros(count, np.int64)
    import psutil

    before = psutil.Process(os.getpid()).memory_info().rss
    with ImageFile(path) as opened:
        images, _ = opened.split("train").read(np.arange(0, count, 64))
        after = psutil.Process(os.getpid()).memory_info().rss
    assert images.shape == (128, 3, 64, 64)
    assert after - before < 40 * 2**20
    shutil.rmtree(tmp_path)


def test_stand_ins_and_folders_are_told_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "i.h5"
    path.symlink_to(".git/annex/objects/x.h5")
    with pytest.raises(FileNotFoundError, match=r"path: no such file: .*i\.h5 \(a broken link to \.git/annex/objects/x\.h5"):
        ImageFile(path)
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"i\.h5: is a Git LFS pointer, not the file itself"):
        ImageFile(path)
    with pytest.raises(ValueError, match=r"path: expected an HDF5 file, got a folder: .* \(rnndyn data make --source .*makes one\)"):
        ImageFile(tmp_path)
