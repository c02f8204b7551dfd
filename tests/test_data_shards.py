"""Tar shards: what is written is read; which images there are, in which order, and by which process; training on them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnndyn_fast.cli import main
from rnndyn_fast.data import BatchLoader, ImageFile, make_dataset
from rnndyn_fast.data.order import LANES, cuts_by_lane, in_lanes
from rnndyn_fast.data.shard_index import INDEX, count, find_shards, is_shards, read_index
from rnndyn_fast.data.shards import ShardFile, index_for_training, write_shards
from rnndyn_fast.train import QuietReporter, Stopped, TrainConfig, read_checkpoint, read_metrics, train

pytest.importorskip("webdataset")

TINY: dict[str, Any] = {
    "widths": (2, 4, 6, 8, 10), "timesteps": 2, "epochs": 2, "batch_size": 16, "val_batch_size": 20, "lr": 3e-3, "backend": "reference",
    "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=50, num_val=20, num_test=10, num_testplus=10)


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    with ImageFile(images) as file:
        write_shards(file, out, images_per_shard=8)
    return out


def run(data: Path | str, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(data), out=str(out), **{**TINY, **options}), reporter=QuietReporter())


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of one's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(colour: tuple[int, int, int] = (0, 0, 255), size: tuple[int, int] = (20, 12)) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def labelled(number: int, first: int = 0) -> dict[str, bytes]:
    """So many images of changing colour, of the classes 0, 1, 2."""
    found = {}
    for k in range(first, first + number):
        found |= {f"{k:04}.png": png((40 * k % 256, 90 * k % 256, 7 * k % 256)), f"{k:04}.cls": b"%d\n" % (k % 3)}
    return found


# ---------------------------------------------------------------- what is in them


def test_shards_hold_the_splits(images: Path, folder: Path) -> None:
    assert len(list(folder.glob("train-*.tar"))) == 7
    with ImageFile(images) as file, ShardFile(folder / INDEX) as shards:
        assert shards.split_names == file.split_names
        assert (shards.image_size, shards.categories, shards.num_classes) == (16, file.categories, 10)
        assert np.array_equal(shards.mean, file.mean)
        assert np.array_equal(shards.std, file.std)
        for name in file.split_names:
            one, two = file.split(name), shards.split(name)
            rows = np.random.default_rng(0).permutation(len(one))[:13]
            for a, b in zip(one.read(rows), two.read(rows), strict=True):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype
            assert np.array_equal(one.labels, two.labels)
        assert [len(part) for part in shards.split("val").read(np.array([], np.int64))] == [0, 0]
        with pytest.raises(IndexError):
            shards.split("val").read(np.array([20]))
        with pytest.raises(ValueError, match="has no split 'more'"):
            shards.split("more")


def test_writing_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["data", "shards", str(images), "--out", str(tmp_path / "s")]
    assert main([*words, "--images-per-shard", "30"]) == 0
    assert "90 images in 5 tar shards: train 50, val 20, test 10, testplus 10" in capfd.readouterr().out
    before = (tmp_path / "s" / "train-000000.tar").read_bytes()
    assert main(words) == 2
    assert "test-000000.tar exists; --overwrite replaces the shards in" in capfd.readouterr().err
    assert main([*words, "--images-per-shard", "30", "--overwrite"]) == 0
    assert (tmp_path / "s" / "train-000000.tar").read_bytes() == before
    assert main([*words, "--overwrite"]) == 0
    assert len(list((tmp_path / "s").glob("*.tar"))) == 4  # none of before is left
    assert main([*words, "--images-per-shard", "0", "--overwrite"]) == 2
    assert "--images-per-shard: expected at least 1, got 0" in capfd.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    assert main(["data", "shards", str(images), "--out", str(tmp_path / "t")]) == 2
    assert 'pip install "rnndyn-fast[webdataset]"' in capfd.readouterr().err


@pytest.mark.parametrize("by", ["number", "name", "folder"])
def test_labels_and_files_of_ones_own(by: str, tmp_path: Path) -> None:
    """PNG of another size; the label is a number, a name, or the folder of the key."""
    classes = ("bird", "cat")
    samples = {}
    for k in range(12):
        kind, key = k % 2, f"{k:03}" if by != "folder" else f"pets/{classes[k % 2]}/{k:03}"
        samples[f"{key}.PNG"] = png((250, 0, k)) if kind else png((0, 250, k))
        samples[f"{key}.json"] = b"{}"
        if by != "folder":
            samples[f"{key}.cls"] = (str(kind) if by == "number" else classes[kind]).encode()
    tar(tmp_path / "d" / "000.tar", dict(list(samples.items())[:18]))
    tar(tmp_path / "d" / "001.tar", dict(list(samples.items())[18:]))
    assert is_shards(tmp_path / "d")
    path, told = index_for_training(tmp_path / "d", tmp_path / "run", None, 8)
    assert "12 images in 2 tar shards: train 11, val 1 (val drawn from train with seed 0, each class in proportion)" in told
    with ShardFile(path) as file:
        assert file.categories == (["0", "1"] if by == "number" else list(classes))
        assert file.image_size == 8
        x, y = file.split("train").read(slice(None))
        assert x.shape == (11, 3, 8, 8)
        for image, label in zip(x, y.tolist(), strict=True):
            assert int(image[0].float().mean()) == (250 if label else 0)
        mean = x.double().mean((0, 2, 3))
        assert file.mean == pytest.approx(mean.numpy())
        assert file.std == pytest.approx(x.double().permute(1, 0, 2, 3).flatten(1).std(1, correction=0).numpy())


def test_splits_by_name_of_file_or_folder(tmp_path: Path) -> None:
    for name in ("imagenet-train-000", "imagenet-train-001", "imagenet-val-000"):
        tar(tmp_path / "a" / f"{name}.tar", labelled(4))
    for name in ("train/000", "train/001", "validation/000"):
        tar(tmp_path / "b" / f"{name}.tar", labelled(4))
    for data in (tmp_path / "a", f"{tmp_path}/a/imagenet-{{train-00{{0,1}},val-000}}.tar", f"{tmp_path}/a/*.tar", tmp_path / "b"):
        assert is_shards(data)
        index = count(find_shards(data))
        assert [len(index.rows(split)) for split in ("train", "val", "test")] == [8, 4, 0]
        assert "(splits as files are named)" in index.note
    several = f"{tmp_path}/a/imagenet-train-000.tar::{tmp_path}/b/train/000.tar"
    assert [file.name for file in find_shards(several)] == ["imagenet-train-000.tar", "000.tar"]
    (tmp_path / "b" / "cats").mkdir()
    assert not is_shards(tmp_path / "b")  # a folder per class


def test_counted_once_and_anew_where_shards_have_changed(folder: Path, tmp_path: Path) -> None:
    tar(tmp_path / "d" / "000.tar", labelled(6))
    given = (tmp_path / "d", tmp_path / "run", None, 8)
    path, _ = index_for_training(*given)
    assert path == tmp_path / "run_shards.npz"
    before = path.stat().st_mtime_ns
    assert index_for_training(*given)[0].stat().st_mtime_ns == before
    tar(tmp_path / "d" / "001.tar", labelled(6, 6))
    assert "12 images in 2 tar shards" in index_for_training(*given)[1]
    assert read_index(path).image_size == 8
    index_for_training(*given[:2], 16, 8)
    assert read_index(path).image_size == 16
    assert index_for_training(folder, tmp_path / "run", None, 64)[0] == folder / INDEX  # written with the shards
    assert index_for_training(folder, tmp_path / "run", 8, 64)[0] == path  # of another size


# ---------------------------------------------------------------- what is wrong with them


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BAD: dict[str, tuple[Any, str]] = {
    "empty": (lambda f: f.write_bytes(b""), "truncated or damaged, or no tar file"),
    "text": (lambda f: f.write_text("no tar at all" * 100), "truncated or damaged, or no tar file"),
    "header": (lambda f: cut(f, 1024 + 700), "truncated"),
    "content": (lambda f: cut(f, 512 + 60), "truncated"),
    "end": (lambda f: cut(f, 12 * 1024), "truncated: the end of the archive is missing"),
    "no label": (
        lambda f: tar(f, {"a.png": png(), "a.cls": b"0", "b.png": png()}),
        r"b has no label; expected b.cls \(a number or a name\)",
    ),
    "two images": (lambda f: tar(f, {"a.png": png(), "a.jpg": png(), "a.cls": b"0"}), "two images of one key: a.jpg"),
    "no images": (lambda f: tar(f, {"a.txt": b"0", "a.cls": b"0"}), "no images .* in 1 tar shards"),
    "negative": (lambda f: tar(f, {"a.png": png(), "a.cls": b"-1"}), "expected labels from 0 to 99999 .*, got -1"),
    "huge": (lambda f: tar(f, {"a.png": png(), "a.cls": b"123456789"}), "expected labels from 0 to 99999"),
    "one image": (lambda f: tar(f, labelled(1)), "at least 2 training images"),
    "one colour": (lambda f: tar(f, {f"{k}.{s}": v for k in range(9) for s, v in (("png", png()), ("cls", b"0"))}), "all of one colour"),
    "damaged image": (
        lambda f: tar(f, {**labelled(5), "0002.png": b"no png"}),
        "the image at byte 4608 cannot be read: cannot identify image file$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_refused_in_one_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, message = BAD[case]
    file = tar(tmp_path / "d" / "000.tar", labelled(6))
    damage(file)
    with pytest.raises(ValueError, match=message):
        index_for_training(tmp_path / "d", tmp_path / "run", None, 8)
    assert main(["train", "--data", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("rnndyn: error: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run_shards.npz").exists()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("shards/{000..002}.tar", FileNotFoundError, r"3 of 3 shards are not there \(the first: shards/000.tar\)"),
        ("shards/*.tar", FileNotFoundError, r"no file fits shards/\*.tar"),
        ("shards/000.tar.gz", ValueError, "000.tar.gz is packed; expected plain tar files"),
        ("https://there/000.tar", ValueError, "expected tar shards on disk, got https"),
    ],
)
def test_bad_names_are_refused(data: str, error: type[Exception], message: str) -> None:
    assert is_shards(data)
    with pytest.raises(error, match=message):
        find_shards(data)


def test_shards_that_change_after_they_were_counted(images: Path, tmp_path: Path) -> None:
    with ImageFile(images) as file:
        index = write_shards(file, tmp_path, images_per_shard=20)
    shard = tmp_path / "train-000001.tar"
    with ShardFile(index) as shards:
        whole = shard.read_bytes()
        cut(shard, 30_000)
        with pytest.raises((OSError, ValueError), match=r"train-000001.tar"):
            shards.split("train").read(np.arange(50))
    with pytest.raises(ValueError, match=f"has 30000 bytes; it had {len(whole)} when it was counted"):
        ShardFile(index)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar is not there"):
        ShardFile(index)
    cut(index, 100)
    with pytest.raises(ValueError, match=r"index\.npz is damaged, or no index of tar shards"):
        read_index(index)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("sizes", [[5], [7, 3], [8] * 6 + [2], [10] * 64, [9, 1, 30] * 40])
@pytest.mark.parametrize("batch", [4, 32])
def test_every_image_once_and_each_process_its_shards(sizes: list[int], batch: int) -> None:
    """The batches of all processes together are those of one; whatever their number, a shard is read by one process."""

    class Numbers:
        shards = np.repeat(np.arange(len(sizes)), sizes)

        def __len__(self) -> int:
            return len(self.shards)

        def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(indices), 3, 1, 1), torch.from_numpy(indices)

    source = Numbers()
    single = BatchLoader(source, batch, shuffle=True, seed=3)
    batches = [part.indices for part in single.requests()]
    assert sorted(np.concatenate(batches)) == list(range(len(source)))
    assert [len(part) for part in batches[:-1]] == [batch] * (len(batches) - 1)
    for number in {1, 2, 3, min(len(sizes), 8)}:
        if number > len(sizes):
            continue
        parts = [BatchLoader(source, batch, shuffle=True, seed=3, rank=rank, count=number).requests() for rank in range(number)]
        for whole, pieces in zip(batches, zip(*parts, strict=True), strict=True):
            assert np.array_equal(np.concatenate([piece.indices for piece in pieces]), whole)
            assert np.concatenate([np.arange(len(whole))[piece.part.rows] for piece in pieces]).tolist() == list(range(len(whole)))
        read = [set(source.shards[np.concatenate([piece.indices for piece in part])]) for part in parts]
        assert sum(map(len, read)) == len(sizes)
    single.set_epoch(1)
    other = [part.indices for part in single.requests()]
    assert len(source) < 6 or not all(map(np.array_equal, other, batches))


def test_lanes_are_balanced_and_shards_are_read_one_after_another() -> None:
    shards = np.repeat(np.arange(300), 20)
    order, lane = in_lanes(shards, np.random.default_rng(0))
    assert lane.max() == LANES - 1
    assert np.ptp(np.bincount(lane)) <= 20
    for number in (0, 17):
        own = shards[order[lane == number]]
        assert (np.diff(own) != 0).sum() == len(set(own)) - 1
    for start in range(0, 6000, 256):
        rows = np.sort(lane[start : start + 256])
        parts = np.diff(cuts_by_lane(rows, LANES, 8))
        assert parts.min() >= len(rows) // 8 - 4
        assert parts.max() <= len(rows) // 8 + 4
    assert np.diff(cuts_by_lane(np.sort(lane[:250]), LANES, 100)).tolist().count(3) == 50


# ---------------------------------------------------------------- training


def test_training_on_shards_whatever_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    one = run(folder, tmp_path / "one")
    losses = [row.train_loss for row in read_metrics(one.parent)]
    assert losses[1] < losses[0]
    two = run(folder, tmp_path / "two", workers=2, augment="none", epochs=1)
    three = run(folder, tmp_path / "three", augment="none", epochs=1)
    a, b = (read_checkpoint(path) for path in (two, three))
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name


def test_resume_within_an_epoch_is_exact(folder: Path, tmp_path: Path) -> None:
    import signal

    class StopAtStep(QuietReporter):
        seen = 0

        def advance(self, images: int, text: str) -> None:
            self.seen += 1
            if self.seen == 6:  # (with the steps of validation: the second of epoch 2)
                signal.raise_signal(signal.SIGTERM)

    whole = run(folder, tmp_path / "whole", ema=0.9)
    given = TrainConfig(data=str(folder), out=str(tmp_path / "parts"), ema=0.9, **TINY)
    with pytest.raises(Stopped):
        train(given, reporter=StopAtStep())
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["progress"]["step"] > 0
    parts = run(folder, tmp_path / "parts", ema=0.9, resume=True)
    one, two = (read_checkpoint(path)["state_dict"] for path in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_on_other_shards_of_the_same_images_is_refused(images: Path, folder: Path, tmp_path: Path) -> None:
    """Their order would be another one."""
    run(folder, tmp_path / "run", epochs=1)
    with ImageFile(images) as file:
        write_shards(file, tmp_path / "other", images_per_shard=10)
    for data in (tmp_path / "other", images):
        with pytest.raises(ValueError, match=r"resume: shards of .* differs from that of the data the run was started with"):
            run(data, tmp_path / "run", resume=True)
