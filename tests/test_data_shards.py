"""Tar shards: what is written is read, once, by any number of processes and workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rnndyn_fast.data import ImageFile, make_dataset
from rnndyn_fast.data.shards import ShardLoader, read_index, write_shards

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=50, num_val=20, num_test=20, num_testplus=20)


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    with ImageFile(images) as file:
        write_shards(file, "train", out, 8)
        write_shards(file, "val", out, 50)
    return out


def rows(loader: ShardLoader) -> list[bytes]:
    """Image and label of every row, in order."""
    return [image.numpy().tobytes() + bytes([label]) for x, y in loader for image, label in zip(x, y.tolist(), strict=True)]


def expected(images: Path) -> list[bytes]:
    with ImageFile(images) as file:
        x, y = file.split("train").read(np.arange(50))
    return [image.numpy().tobytes() + bytes([label]) for image, label in zip(x, y.tolist(), strict=True)]


def test_shards_hold_the_split(images: Path, folder: Path) -> None:
    index = read_index(folder)
    assert [shard["images"] for shard in index["train"]["shards"]] == [8] * 6 + [2]
    assert [shard["images"] for shard in index["val"]["shards"]] == [20]
    loader = ShardLoader(folder, "train", 12)
    x, y = next(iter(loader))
    assert (x.shape, x.dtype, y.dtype) == ((12, 3, 16, 16), torch.uint8, torch.int64)
    assert rows(loader) == expected(images)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_image_twice_and_none_left_out(images: Path, folder: Path, count: int) -> None:
    loaders = [ShardLoader(folder, "train", 5, shuffle=True, seed=1, rank=rank, count=count) for rank in range(count)]
    found = [rows(loader) for loader in loaders]
    assert sorted(row for part in found for row in part) == sorted(expected(images))
    assert [len(part) for part in found] == [loader.images for loader in loaders]


def test_order_is_that_of_seed_and_epoch(images: Path, folder: Path) -> None:
    loader, again = (ShardLoader(folder, "train", 5, shuffle=True, seed=1) for _ in range(2))
    first = rows(loader)
    assert first == rows(again)
    loader.set_epoch(1)
    assert first != rows(loader)
    assert sorted(first) == sorted(expected(images))


def test_workers_share_the_shards(images: Path, folder: Path) -> None:
    loader = ShardLoader(folder, "train", 5, shuffle=True, seed=1, workers=2)
    assert sorted(rows(loader)) == sorted(expected(images))


def test_refuses(images: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"split: .* holds no shards of 'test'"):
        ShardLoader(folder, "test", 5)
    with pytest.raises(ValueError, match="val has 1 shards; expected one for each of 1 workers of 2 processes"):
        ShardLoader(folder, "val", 5, rank=1, count=2)
    with pytest.raises(FileNotFoundError, match=r"no shards\.json"):
        ShardLoader(tmp_path, "train", 5)
    with ImageFile(images) as file:
        with pytest.raises(FileExistsError, match="holds shards of val already"):
            write_shards(file, "val", folder)
        with pytest.raises(ValueError, match="images_per_shard: expected at least 1"):
            write_shards(file, "val", tmp_path, 0)
        monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
        with pytest.raises(ImportError, match=r'pip install "rnndyn-fast\[webdataset\]"'):
            write_shards(file, "val", tmp_path)
