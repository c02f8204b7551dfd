"""Making data sets: layout, disjoint and stratified splits, reproducible contents, nothing lost on disk."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_data_sources import write_fashion_mnist

from rnndyn_fast.data import CONDITIONS, SPLITS, ImageFile, load_source, make_dataset, resize

COUNTS = {"num_train": 60, "num_val": 20, "num_test": 30, "num_testplus": 40}


def small(out: Path, **options: object) -> Path:
    return make_dataset(out, **{"source": "digits", "size": 16, **COUNTS, **options})  # type: ignore[arg-type]


def contents(path: Path) -> str:
    """Hash of all arrays and attributes."""
    digest = hashlib.sha256()

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        digest.update(name.encode())
        digest.update(repr(sorted((key, np.asarray(value).tolist()) for key, value in item.attrs.items())).encode())
        if isinstance(item, h5py.Dataset):
            digest.update(repr((item.shape, item.dtype)).encode() + item[()].tobytes())

    with h5py.File(path, "r") as file:
        add("/", file)
        file.visititems(add)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("made") / "digits.h5")


def test_layout_and_counts(made: Path) -> None:
    with ImageFile(made) as file:
        assert file.image_size == 16
        assert file.categories[:2] == ["zero", "one"]
        assert {f"num_{name}": len(file.split(name)) for name in SPLITS} == COUNTS
        assert file.attrs["source"] == "digits"
        assert file.attrs["seed"] == 0
        assert file.attrs["size"] == 16
        assert "digits" in file.attrs["source_note"]
        assert file.attrs["version"]
        parameters = json.loads(file.attrs["parameters"])
        assert {key: parameters[key] for key in COUNTS} == COUNTS
        assert [entry["name"] for entry in parameters["testplus"]["conditions"]] == [c.name for c in CONDITIONS]


def test_statistics_are_those_of_train(made: Path) -> None:
    with ImageFile(made) as file:
        images, _ = file.split("train").read(slice(None))
        values = images.double()
        np.testing.assert_allclose(file.mean, values.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(file.std, values.std((0, 2, 3), correction=0), rtol=1e-12)


def test_splits_share_no_source_image_and_hold_the_classes_equally(made: Path) -> None:
    source = load_source("digits")
    with ImageFile(made) as file:
        index = {name: file.split(name).extra("source_index") for name in SPLITS}
        everything = np.concatenate(list(index.values()))
        assert len(np.unique(everything)) == len(everything) == 150
        assert set(np.concatenate([index["train"], index["val"]])) <= set(source.train_index)
        assert set(np.concatenate([index["test"], index["testplus"]])) <= set(source.test_index)
        for name in SPLITS:
            counts = np.bincount(file.split(name).labels, minlength=10)
            assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_plain_splits_hold_the_source_images(made: Path, name: str) -> None:
    source = load_source("digits")
    images = np.empty((1797, 8, 8), dtype=np.uint8)
    labels = np.empty(1797, dtype=np.int64)
    images[source.train_index], images[source.test_index] = source.train_images, source.test_images
    labels[source.train_index], labels[source.test_index] = source.train_labels, source.test_labels
    with ImageFile(made) as file:
        split = file.split(name)
        index = split.extra("source_index")
        got, _ = split.read(slice(None))
        np.testing.assert_array_equal(split.labels, labels[index])
        expected = resize(images[index], 16)
        for channel in range(3):
            np.testing.assert_array_equal(got[:, channel].numpy(), expected)


def test_testplus_records_its_conditions(made: Path) -> None:
    with ImageFile(made) as file:
        split = file.split("testplus")
        assert split.attrs["condition_names"].tolist() == [settings.name for settings in CONDITIONS]
        assert split.attrs["seed"] == 0
        assert json.loads(split.attrs["condition_parameters"])["conditions"][3]["parameters"]["fragments"] == 10
        condition = split.extra("condition")
        assert np.bincount(condition).tolist() == [4] * len(CONDITIONS)
        images, _ = split.read(np.flatnonzero(condition == 8))
        assert CONDITIONS[8].name == "low_contrast"
        assert images.min() > 80


def test_challenging_puts_training_images_under_conditions_too(made: Path, tmp_path: Path) -> None:
    path = small(tmp_path / "hard.h5", challenging=True)
    with ImageFile(path) as hard, ImageFile(made) as plain:
        assert hard.attrs["challenging"]
        for name in SPLITS:
            one, two = hard.split(name), plain.split(name)
            np.testing.assert_array_equal(one.extra("source_index"), two.extra("source_index"))
            same = (one.read(slice(None))[0] == two.read(slice(None))[0]).flatten(1).all(1)
            if name in ("test", "testplus"):
                assert same.all()
            else:
                assert same.float().mean() < 0.2
                counts = np.bincount(one.extra("condition"), minlength=len(CONDITIONS))
                assert counts.max() - counts.min() <= 1
        assert not np.allclose(hard.mean, plain.mean)


def test_equal_arguments_give_equal_contents(made: Path, tmp_path: Path) -> None:
    assert contents(small(tmp_path / "again.h5")) == contents(made)
    assert contents(small(tmp_path / "other.h5", seed=1)) != contents(made)


def test_default_counts(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "all.h5", source="digits", size=8)
    with ImageFile(path) as file:
        numbers = [len(file.split(name)) for name in SPLITS]
    assert numbers == [971, 107, 359, 360]
    assert sum(numbers) == 1797
    path = make_dataset(tmp_path / "some.h5", source="digits", size=8, num_train=90, num_testplus=50)
    with ImageFile(path) as file:
        assert [len(file.split(name)) for name in SPLITS] == [90, 10, 50, 50]


def test_fashion_mnist_files(tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path)
    path = make_dataset(tmp_path / "f.h5", source="fashion-mnist", size=32, folder=folder)
    with ImageFile(path) as file:
        assert [len(file.split(name)) for name in SPLITS] == [36, 4, 10, 10]
        assert file.categories[9] == "ankle-boot"
        everything = np.concatenate([file.split(name).extra("source_index") for name in SPLITS])
        np.testing.assert_array_equal(np.sort(everything), np.arange(60))


def test_progress_reaches_the_end_of_every_split(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    # 512 px makes blocks of 8 images, so there are several of them.
    small(tmp_path / "f.h5", size=512, num_train=20, num_testplus=20, progress=lambda *call: calls.append(call))
    for name, total in (("train", 20), ("val", 20), ("test", 30), ("testplus", 20)):
        done = [done for split, done, of in calls if split == name and of == total]
        assert len(done) > 1
        assert done[-1] == total
        assert all(a < b for a, b in pairwise(done))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 7}, ValueError, r"size: expected 8\.\.512, got 7"),
        ({"size": 513}, ValueError, r"size: expected 8\.\.512"),
        ({"size": 16.0}, TypeError, "size: expected an int, got float"),
        ({"seed": -1}, ValueError, "seed: expected at least 0"),
        ({"num_train": 0}, ValueError, "num_train: expected at least 1, got 0"),
        ({"num_val": True}, TypeError, "num_val: expected an int"),
        ({"num_train": 1070}, ValueError, r"num_train, num_val: digits has 1078 images.*asked for 1070 \+ 20"),
        ({"num_testplus": 719, "num_test": None}, ValueError, "num_testplus, num_test: digits has 719"),
        ({"num_testplus": 1}, ValueError, "at least 2 categories"),
        ({"source": "cifar"}, ValueError, "source: expected 'fashion-mnist'"),
    ],
)
def test_refuses_and_leaves_nothing(tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(tmp_path / "out.h5", **options)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.h5 exists; pass overwrite=True"):
        small(path)
    assert path.read_text() == "precious"

    def stop(*call: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # interrupted half-way: the old file is still whole
        small(path, overwrite=True, progress=stop)
    assert path.read_text() == "precious"
    assert [item.name for item in tmp_path.iterdir()] == ["out.h5"]
    small(path, overwrite=True)
    with ImageFile(path) as file:
        assert len(file.split("train")) == 60
    with pytest.raises(ValueError, match="out: expected a file, got the folder"):
        small(tmp_path, overwrite=True)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    assert small(tmp_path / "a" / "b.h5").is_file()


def test_resize_refuses() -> None:
    with pytest.raises(TypeError, match="images: expected dtype uint8"):
        resize(np.zeros((1, 8, 8)), 4)
    with pytest.raises(ValueError, match=r"images: expected shape \[n, h, w\]"):
        resize(np.zeros((8, 8), dtype=np.uint8), 4)
    with pytest.raises(ValueError, match="size"):
        resize(np.zeros((1, 8, 8), dtype=np.uint8), 0)
    assert resize(np.zeros((0, 8, 8), dtype=np.uint8), 4).shape == (0, 4, 4)
