"""Images of one's own: into a file, and into training, without a line of code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rnndyn_fast.cli import main
from rnndyn_fast.data import ImageFile, fit, make_dataset, own_images, read_image

NET = ["--widths", "2,4,8,16,32", "--timesteps", "2", "--threads", "1", "--backend", "reference", "--batch-size", "10", "--epochs", "1"]


def folder(root: Path, seed: int = 0, **classes: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in (classes or {"cat": 40, "dog": 20, "emu": 20}).items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(root / name / f"{k:02d}.png")
    return root


def test_class_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "own")
    (root / "cat" / "notes.txt").write_text("x")
    assert main(["data", "make", "--source", str(root), "--size", "16", "--out", str(tmp_path / "o.h5")]) == 0
    told = capfd.readouterr().out
    assert "80 images of 81 files; left out: 1 no images (.txt)" in told
    assert "val 8, test 8 drawn from the others with seed 0, each class in proportion" in told
    with ImageFile(tmp_path / "o.h5", required_splits=None) as file:
        assert file.split_names == ("train", "val", "test")
        assert file.categories == ["cat", "dog", "emu"]
        index = [file.split(name).extra("source_index") for name in file.split_names]
        assert sorted(np.concatenate(index)) == list(range(80))
        assert np.bincount(file.split("val").labels).tolist() == [4, 2, 2]
        images, labels = file.split("train").read(slice(None))
        values = images.double()
        np.testing.assert_allclose(file.mean, values.mean((0, 2, 3)))
        np.testing.assert_allclose(file.std, values.std((0, 2, 3), correction=0))
        for k in (0, 17):
            name = file.split("train").extra("source_name")[k].decode()
            assert name.startswith(file.categories[int(labels[k])])
            np.testing.assert_array_equal(images[k].permute(1, 2, 0).numpy(), fit(read_image(root / name), 16))
        assert json.loads(file.attrs["parameters"])["fit"] == "crop"


def test_folders_of_splits_and_tables(tmp_path: Path) -> None:
    root = tmp_path / "own"
    for k, (split, count) in enumerate({"train": 10, "valid": 4, "test": 5}.items()):
        folder(root / split, seed=k, a=count, b=count)
    with ImageFile(make_dataset(tmp_path / "o.h5", source=str(root), size=16), required_splits=None) as file:
        assert [len(file.split(name)) for name in ("train", "val", "test")] == [20, 8, 10]
        assert "splits train, val, test as the source says" in file.attrs["source_note"]
        assert all(name.startswith(b"valid/") for name in file.split("val").extra("source_name"))
    rows = [f"train/{c}/{k:02d}.png,{c},{'test' if k < 3 else 'train'}" for c in "ab" for k in range(10)]
    (root / "t.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    with ImageFile(make_dataset(tmp_path / "c.h5", source=str(root / "t.csv"), size=16, num_val=4), required_splits=None) as file:
        assert [len(file.split(name)) for name in ("train", "val", "test")] == [10, 4, 6]
        assert "splits train, test as the source says; val 4 drawn" in file.attrs["source_note"]


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "own")
    monkeypatch.setattr(own_images, "_BLOCK_PIXELS", 10 * 16**2)
    whole = make_dataset(tmp_path / "whole.h5", source=str(root), size=16).read_bytes()
    read: list[str] = []

    def counted(path: Path, background: str) -> Image.Image:
        read.append(path.name)
        return read_image(path, background)

    def stop(split: str, done: int, total: int) -> None:
        if split == "train" and done >= 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(own_images, "read_image", counted)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "o.h5", source=str(root), size=16, progress=stop)
    assert len(read) == 30
    assert not (tmp_path / "o.h5").exists()
    with pytest.raises(ValueError, match=r"holds unfinished work of another kind \(size: 16, now 24\)"):
        make_dataset(tmp_path / "o.h5", source=str(root), size=24)
    make_dataset(tmp_path / "o.h5", source=str(root), size=16)
    assert len(read) == 80
    assert (tmp_path / "o.h5").read_bytes() == whole
    assert not (tmp_path / "o.h5.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fit", "squash"], "--fit: expected one of crop, pad, stretch"),
        (["--background", "pink"], "--background: expected one of white, grey, black"),
        (["--challenging"], "--challenging: expected only with bundled images"),
        (["--num-val", "80"], "--num-val: expected fewer images than the 80"),
        (["--num-train", "70"], "--num-train: expected at most 64 images"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "own")
    assert main(["data", "make", "--source", str(root), "--size", "16", "--out", str(tmp_path / "o.h5"), *options]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,label,label", "a/00.png,a,b", "expected one column label, got 2"),
        ("path,path,label", "a/00.png,a/01.png,a", "expected one column path, got 2"),
        ("path,label", "a/00.png,a,small", "line 2: expected 2 cells, got 3; quote a text that has commas"),
        ("path,label", "a/00.png,a\n./a/../a/00.png,a", r"line 3: ./a/../a/00.png is in line 2 too"),
    ],
)
def test_tables_that_can_be_read_in_two_ways(header: str, row: str, message: str, tmp_path: Path) -> None:
    folder(tmp_path, a=2)
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ValueError, match=message):
        make_dataset(tmp_path / "o.h5", source=str(tmp_path / "t.csv"), size=16)


def test_empty_cells_at_the_end_of_a_line(tmp_path: Path) -> None:
    """As spreadsheets write them."""
    folder(tmp_path, a=20, b=20)
    rows = [f"{c}/{k:02d}.png,{c},," for c in "ab" for k in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    assert make_dataset(tmp_path / "o.h5", source=str(tmp_path / "t.csv"), size=16).exists()


def test_a_class_without_training_images(tmp_path: Path) -> None:
    folder(tmp_path, a=20, b=2)
    rows = [f"a/{k:02d}.png,a,train" for k in range(20)] + [f"b/{k:02d}.png,b,test" for k in range(2)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    with pytest.raises(ValueError, match="source: no training image of class 'b'"):
        make_dataset(tmp_path / "o.h5", source=str(tmp_path / "t.csv"), size=16)


def test_a_bad_image_is_named_and_nothing_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "own")
    (root / "emu" / "07.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert main(["data", "make", "--source", str(root), "--size", "16", "--out", str(tmp_path / "o.h5")]) == 2
    assert "07.png: is a Git LFS pointer" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_training_on_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, run = folder(tmp_path / "own"), tmp_path / "run"
    words = ["train", "--data", str(root), "--out", str(run), "--image-size", "16", *NET]
    assert main(words) == 0
    told = capfd.readouterr().out
    assert "80 images of 80 files" in told
    assert "val 8, test 8 drawn" in told
    assert (run / "last.pt").exists()
    assert main([*words, "--resume", "--epochs", "2"]) == 0
    assert "images made before" in capfd.readouterr().out
    made = tmp_path / "run_images.h5"
    assert (
        main(["extract", str(run / "last.pt"), str(made), "--split", "test", "--out", str(tmp_path / "r.h5"), "--reducers", "norms"]) == 0
    )
    (root / "cat" / "00.png").unlink()
    assert main([*words, "--resume", "--epochs", "3"]) == 2
    assert "run_images.h5 was made from other images or with other options" in capfd.readouterr().err
    assert main(["train", "--data", str(made), "--out", str(tmp_path / "b"), "--image-size", "16", *NET]) == 2
    assert "--image-size: expected only with a folder or table" in capfd.readouterr().err
