"""Image files and folders: converted by what a file declares or refused, and nothing left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from torch.utils.data import Dataset

from rnndyn_fast.cli import main
from rnndyn_fast.data import check_unit_range, fit, list_folder, list_table, make_dataset, read_image
from rnndyn_fast.extract import FolderSource
from rnndyn_fast.extract.sources import DatasetSource, read_rows
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.train import save_checkpoint

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def written(path: Path, values: np.ndarray | Image.Image, **options: Any) -> Path:
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(path, **options)
    return path


def grey(path: Path) -> np.ndarray:
    pixels = np.asarray(read_image(path)).astype(int)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_of_grey_are_rescaled(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, RAMP.astype(np.uint16) * 257)
    np.testing.assert_array_equal(grey(path), RAMP)


def tiff_tags(**tags: Any) -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[int(tag[1:])] = value
    return directory


def test_floats_are_rescaled_by_declared_limits_and_refused_without(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32) / 255 * 4 - 1  # -1..3
    path = written(tmp_path / "a.tif", values, tiffinfo=tiff_tags(_340=-1.0, _341=3.0))
    np.testing.assert_array_equal(grey(path), RAMP)
    with pytest.raises(ValueError, match=r"b\.tif: grey as floats \(-1 to 3\), and the file does not declare"):
        read_image(written(tmp_path / "b.tif", values))
    with pytest.raises(ValueError, match=r"c\.tif: grey as integers of 32 bits \(0 to 255\)"):
        read_image(written(tmp_path / "c.tif", RAMP.astype(np.int32)))
    with pytest.raises(ValueError, match=r"d\.tif: grey values beyond the limits that the file declares, 0 to 1"):
        read_image(written(tmp_path / "d.tif", values, tiffinfo=tiff_tags(_340=0.0, _341=1.0)))
    values[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity among them"):
        read_image(written(tmp_path / "e.tif", values))


def test_white_is_zero(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", RAMP.astype(np.uint16) * 257, tiffinfo=tiff_tags(_262=0))
    np.testing.assert_array_equal(grey(path), 255 - RAMP)


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("grey", 128), ("black", 0)])
def test_transparent_pixels_show_the_background(background: str, level: int, tmp_path: Path) -> None:
    """What lies hidden under alpha 0 (red) is not seen; half transparent is half of both."""
    colour = np.zeros((4, 4, 4), np.uint8)
    colour[..., 0] = 200
    colour[1, 1, 3], colour[2, 2, 3] = 255, 51
    rgba = read_image(written(tmp_path / "a.png", colour), background)
    assert rgba.getpixel((0, 0)) == (level,) * 3
    assert rgba.getpixel((1, 1)) == (200, 0, 0)
    assert np.allclose(rgba.getpixel((2, 2)), [0.2 * 200 + 0.8 * level, 0.8 * level, 0.8 * level], atol=1)
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    for name, image, options in (
        ("p.png", palette, {"transparency": 3}),
        ("p.gif", palette, {"transparency": 3}),
        ("rgb.png", Image.new("RGB", (4, 4), (9, 8, 7)), {"transparency": (9, 8, 7)}),
        ("l.png", Image.new("L", (4, 4), 77), {"transparency": 77}),
        ("la.png", Image.new("LA", (4, 4), (77, 0)), {}),
        ("a.webp", Image.new("RGBA", (4, 4), (77, 0, 0, 0)), {"lossless": True, "exact": True}),
    ):
        read = read_image(written(tmp_path / name, image, **options), background)
        x, y = (3, 0) if image is palette else (0, 0)
        assert read.getpixel((x, y)) == (level,) * 3, name


def test_orientation_and_several_images_in_a_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(tmp_path / "a.png", RAMP[:, :8].copy(), exif=exif)
    np.testing.assert_array_equal(grey(path), np.rot90(RAMP[:, :8], -1))
    frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
    for name in ("b.gif", "b.tif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=rf"{name}: expected one image, the file holds 2"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s12--0.png\n", "is a git-annex pointer"),
        (b"<html>no</html>", "is an HTML page"),
        (b"", r"is empty \(0 bytes\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), r"a\.png: "),
    ],
)
def test_files_that_are_no_images(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=message) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value).count("a.png") == 1


def test_modes_without_a_conversion_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tif: images of mode LAB have no conversion"):
        read_image(written(tmp_path / "a.tif", Image.new("LAB", (4, 4))))


def test_fit() -> None:
    image = Image.new("RGB", (20, 10), (10, 20, 30))
    assert (fit(image, 8, "crop") == (10, 20, 30)).all()
    assert (fit(image, 8, "stretch") == (10, 20, 30)).all()
    padded = fit(image, 8, "pad", "black")
    assert (padded[2:6] == (10, 20, 30)).all()
    assert (padded[[0, 1, 6, 7]] == 0).all()
    with pytest.raises(ValueError, match="fit: expected one of"):
        fit(image, 8, "squash")


# ---------------------------------------------------------------- folders


def folder(root: Path, **classes: int) -> Path:
    for name, count in (classes or {"cat": 3, "dog": 2}).items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            written(root / name / f"{k}.png", np.full((16, 16, 3), 10 * k, np.uint8))
    return root


def test_linked_folders_are_entered_and_hidden_files_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    elsewhere = folder(tmp_path / "b", more=4)
    (root / "cat" / "linked").symlink_to(elsewhere / "more")
    (root / "bird").symlink_to(elsewhere / "more")
    (root / "dog" / "round").symlink_to(root / "dog")  # ends all the same
    for hidden in (root / ".git" / "x.png", root / "cat" / ".thumbs" / "deep" / "1.png", root / "cat" / ".DS_Store"):
        hidden.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "dog" / "9.heic").write_text("x")
    (root / "README").write_text("x")
    listing = list_folder(root)
    assert listing.class_names == ("bird", "cat", "dog")
    assert np.bincount(listing.labels).tolist() == [4, 7, 2]
    assert listing.left_out == {
        "hidden": 3, "no images (.txt)": 1, "no images (.heic)": 1, "beside the class folders": 1, "links to a folder above them": 1,
    }  # fmt: skip
    assert "13 images of 20 files; left out: 1 beside the class folders; 3 hidden" in str(listing)


def test_broken_links_are_an_error_with_their_number(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    for k in range(2):
        (root / "dog" / f"b{k}.png").symlink_to("../.git/annex/objects/x.png")
    with pytest.raises(FileNotFoundError, match=r"data: 2 of 7 image files of .* are broken links .*b0.png to .*annex.*git annex get"):
        list_folder(root)
    (root / "cow").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"cow is a broken link to nowhere"):
        list_folder(root)


def test_tables(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    table = root / "t.csv"
    table.write_text("path,label,split,note\ncat/0.png,10,train,x\ndog/1.png,9,test,y\n")
    listing = list_table(table)
    assert listing.class_names == ("9", "10")
    assert listing.labels.tolist() == [1, 0]
    assert listing.splits == ["train", "test"]
    for text, message in (
        ("file,label\na,b\n", "expected the columns path and label"),
        ("path,label\n", "expected a row per image, got none"),
        ("path,label\ncat/0.png,\n", "line 2: label is empty"),
        ("path,label\ncat/0.png,a\ncat/0.png,b\n", "line 3: cat/0.png is in line 2 too"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            list_table(table)
    table.write_text("path,label\ncat/0.png,a\nabsent.png,b\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 image files of .* are not there"):
        list_table(table)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    net = blt_net_64(num_classes=10, image_size=16, widths=(2, 4, 8, 16, 32), timesteps=2)
    data = {"path": "", "image_size": 16, "categories": [f"c{k}" for k in range(10)], "mean": [127.5] * 3, "std": [60.0] * 3}
    return save_checkpoint(tmp_path / "net.pt", {"model": net.config, "state_dict": net.state_dict(), "epoch": 0, "data": data})


def test_commands_say_what_they_read(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "a", c0=3, c4=12)
    (root / "c0" / "x.txt").write_text("x")
    for words in (["extract", "--out", str(tmp_path / "r.h5"), "--reducers", "norms"], ["react", "--out", str(tmp_path / "re")]):
        assert main([words[0], str(checkpoint), str(root), *words[1:]]) == 0
        assert "15 images of 16 files; left out: 1 no images (.txt)" in capfd.readouterr().out
    written(root / "c4" / "f.tif", np.zeros((16, 16), np.float32))
    assert main(["react", str(checkpoint), str(root), "--out", str(tmp_path / "re")]) == 2
    assert "f.tif (image 15): grey as floats (0 to 0), and the file does not declare" in capfd.readouterr().err


def test_folder_source_lays_transparency_over_its_background(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    written(tmp_path / "a" / "x.png", np.zeros((4, 4, 4), np.uint8))
    for background, level in (("white", 255), ("black", 0)):
        images, _ = FolderSource(tmp_path, 4, background=background).read(np.array([0]))
        assert (images == level).all()


# ---------------------------------------------------------------- floats and labels of datasets


class Given(Dataset):
    """Images of one dtype and range with given labels."""

    def __init__(self, image: torch.Tensor, labels: list[Any]) -> None:
        self.image, self.labels = image, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self.image, self.labels[index]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (255 * torch.rand(3, 16, 16), r"got values from 0\.\d+ to 25\d\.?\d*; are they on the scale 0..255\?"),
        (torch.randn(3, 16, 16), r"got values from -\d.* are they normalised already\?"),
    ],
)
def test_floats_out_of_range_are_refused(image: torch.Tensor, message: str, checkpoint: Path, tmp_path: Path) -> None:
    from rnndyn_fast.extract import extract

    with pytest.raises(ValueError, match=rf"Given\[0\].*expected floating-point images in 0..1 .*{message}"):
        extract(checkpoint, Given(image, [0] * 9), out=tmp_path / "r.h5", reducers=("norms",))
    check_unit_range(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("reducers", [("norms",), ("moments", "change"), ("readout_zones",), ("decodability", "rdm")])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10, r"Given\[4\]: expected a label of at least 0 and below 10, the number of categories, got 10"),
        (-1, r"Given\[4\]: expected a label of at least 0 and below 10, the number of categories, got -1"),
        (0.7, r"Given\[4\]: expected a whole number as the label, got 0\.7"),
        (torch.tensor(0.7), r"Given\[4\]: expected a whole number as the label, got 0\.69"),
        (float("nan"), r"Given\[4\]: "),
    ],
)
def test_labels_are_checked_whatever_reducers_run(
    reducers: tuple[str, ...], label: Any, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    from rnndyn_fast.extract import extract

    data = Given(torch.rand(3, 16, 16), [0, 1, 2.0, np.int8(3), label, 9])
    with pytest.raises(ValueError, match=message):
        extract(checkpoint, data, out=tmp_path / "r.h5", reducers=reducers)


def test_whole_numbers_of_any_type_are_labels() -> None:
    labels = read_rows(DatasetSource(Given(torch.zeros(1), [0, 2.0, np.int8(3), torch.tensor(4)])), np.arange(4))[1]
    assert labels.tolist() == [0, 2, 3, 4]


def test_hdf5_files_say_what_was_read(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_dataset(tmp_path / "i.h5", source="digits", size=16, num_train=20, num_val=20, num_test=20, num_testplus=20)
    words = ["import", str(tmp_path / "w.pt"), "--data", str(path), "--out", str(tmp_path / "o.pt"), "--model", "blt_net_64"]
    torch.save(blt_net_64(num_classes=10, image_size=16, widths=(2, 4, 8, 16, 32)).state_dict(), tmp_path / "w.pt")
    assert main(words) == 0
    assert main(["extract", str(tmp_path / "o.pt"), str(path), "--out", str(tmp_path / "r.h5"), "--reducers", "norms", "--limit", "7"]) == 0
    assert "split testplus, 20 images; 7 of them, evenly spaced" in capfd.readouterr().out
