"""Extraction: streamed results, trajectories on disk, checks of what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from rnndyn_fast.analysis import ReadoutZoneResult, readout_zones
from rnndyn_fast.data import ImageFile, make_dataset, normalise
from rnndyn_fast.extract import REDUCERS, extract, load_results, sha256, trajectories_path
from rnndyn_fast.train import QuietReporter, TrainConfig, load_checkpoint, train

QUIET = QuietReporter()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=40, num_test=20, num_testplus=50)


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(
        data=str(images), out=str(tmp_path_factory.mktemp("runs") / "a"), widths=(4, 6, 8, 10, 12), timesteps=3,
        epochs=1, batch_size=32, backend="reference", augment="none",
    )  # fmt: skip
    return train(config, reporter=QUIET)


def run(checkpoint: Path, images: Path, out: Path, **options: Any) -> Path:
    return extract(checkpoint, images, out=out, **{"backend": "reference", "reporter": QUIET, **options})


def test_streamed_result_and_saved_trajectories_agree_with_the_network(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = run(checkpoint, images, tmp_path / "r.h5", batch_size=16, save=("gap", "it"), keep_samples=True)
    result = ReadoutZoneResult.load(out)
    net, contents = load_checkpoint(checkpoint, backend="reference")
    with ImageFile(images) as file, torch.inference_mode():
        pixels, labels = file.split("testplus").read(slice(None))
        x = normalise(pixels, np.array(contents["data"]["mean"]), np.array(contents["data"]["std"]))
        log_probs, representations, recorded = net(x, return_representations=True, record=("it",))
    expected = readout_zones(representations, net.readout.weight.detach(), labels, log_probs=log_probs, backend="reference")
    assert result.n == 50
    assert result.counts == expected.counts
    np.testing.assert_array_equal(result.stable_correct, expected.stable_correct)
    np.testing.assert_allclose(result.norm_now_vs_later, expected.norm_now_vs_later, rtol=1e-5)
    with h5py.File(trajectories_path(out)) as file:
        assert set(file["trajectories"]) == {"gap", "it"}
        assert file["trajectories/gap"].dtype == np.float32
        # Batches of another size may be summed in another order.
        np.testing.assert_allclose(file["trajectories/gap"][()], representations.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file["trajectories/it"][()], recorded["it"].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(file["labels"][()], labels.numpy())
        np.testing.assert_array_equal(file["predictions"][()], log_probs.argmax(2).numpy())
        assert file["trajectories/it"].chunks is not None
        assert json.loads(file.attrs["descriptors"])["options"]["save"] == ["gap", "it"]


def test_record_says_where_the_result_comes_from(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = run(checkpoint, images, tmp_path / "r.h5", split="val", limit=10)
    descriptors = ReadoutZoneResult.load(out).descriptors
    assert descriptors["checkpoint"]["sha256"] == sha256(checkpoint)
    assert descriptors["data"]["images"] == 10
    assert descriptors["data"]["attributes"]["source"] == "digits"
    assert descriptors["options"]["split"] == "val"
    assert len(descriptors["class_names"]) == 10
    assert descriptors["versions"]["torch"] == torch.__version__
    assert not trajectories_path(out).exists()


def test_half_precision_and_more_time_steps(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = run(checkpoint, images, tmp_path / "r.h5", save=("gap",), dtype="float16", timesteps=5)
    assert ReadoutZoneResult.load(out).timesteps == 5
    with h5py.File(trajectories_path(out)) as file:
        assert file["trajectories/gap"].shape == (5, 50, 12)
        assert file["trajectories/gap"].dtype == np.float16


def test_untrained_is_the_initial_checkpoint(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    result = ReadoutZoneResult.load(run(checkpoint, images, tmp_path / "u.h5", untrained=True))
    assert result.descriptors["checkpoint"]["epoch"] == 0
    alone = tmp_path / "alone.pt"
    alone.write_bytes(checkpoint.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"untrained: no initial.pt"):
        run(alone, images, tmp_path / "v.h5", untrained=True)


def test_existing_files_are_kept_unless_told(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = run(checkpoint, images, tmp_path / "r.h5", limit=10)
    with pytest.raises(FileExistsError, match=r"out: .* exists"):
        run(checkpoint, images, out)
    assert ReadoutZoneResult.load(out).n == 10
    assert ReadoutZoneResult.load(run(checkpoint, images, out, overwrite=True)).n == 50
    beside = trajectories_path(tmp_path / "s.h5")
    beside.write_text("mine")
    with pytest.raises(FileExistsError, match=r"s_trajectories.h5 exists"):
        run(checkpoint, images, tmp_path / "s.h5", save=("gap",))
    assert beside.read_text() == "mine"
    assert not (tmp_path / "s.h5").exists()


def test_failure_halfway_leaves_files_as_they_were(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    class Failing(QuietReporter):
        def advance(self, images: int, text: str) -> None:
            raise KeyboardInterrupt

    out = run(checkpoint, images, tmp_path / "r.h5", save=("gap",))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, images, out, save=("gap", "it"), overwrite=True, reporter=Failing())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_all_reducers_of_several_areas(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = run(checkpoint, images, tmp_path / "r.h5", areas=("v1", "v4", "gap"), pooled=("it", "gap"), rdm_images=[0, 3, 5])
    results = load_results(out)
    assert set(results) == set(REDUCERS)
    norms = results["norms"]
    assert norms["norm"].shape == (3, 3)
    np.testing.assert_allclose(results["change"]["change"][0], 0, atol=1e-6)  # V1 does not change in time
    assert (results["change"]["change"][1:] > 0).all()
    assert results["rdm"]["rdm.it"].shape == (3, 3, 3)
    assert results["decodability"].options["num_classes"] == 10
    assert norms.options == {"areas": ["v1", "v4", "gap"]}
    assert norms.descriptors["options"]["pooled"] == ["it", "gap"]
    assert norms.descriptors["class_names"] == results["readout_zones"].descriptors["class_names"]


def test_some_reducers(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    assert list(load_results(run(checkpoint, images, tmp_path / "r.h5", reducers=("norms",), limit=9))) == ["norms"]


def as_folder(images: Path, root: Path, count: int) -> None:
    from PIL import Image

    with ImageFile(images) as file:
        pixels, labels = file.split("testplus").read(slice(0, count))
        for k, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / file.categories[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")


def test_a_folder_of_images_and_a_dataset_are_the_same_images(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    as_folder(images, tmp_path / "folder", 30)
    results = {}
    with ImageFile(images) as file:
        split = file.split("testplus")
        dataset = torch.utils.data.Subset(split, range(30))
        for name, data in (("folder", tmp_path / "folder"), ("dataset", dataset)):
            out = run(checkpoint, data, tmp_path / f"{name}.h5", reducers=("norms", "readout_zones"))  # type: ignore[arg-type]
            results[name] = load_results(out)
    one, two = results["folder"], results["dataset"]
    assert one["norms"].n == two["norms"].n == 30
    np.testing.assert_allclose(one["norms"]["norm"], two["norms"]["norm"], rtol=1e-6)
    assert one["readout_zones"].counts == two["readout_zones"].counts
    assert one["norms"].descriptors["class_names"] == two["norms"].descriptors["class_names"]


def test_image_files_that_do_not_fit_are_named(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "folder"
    as_folder(images, root, 30)
    wrong = min(path for path in root.rglob("*.png"))
    Image.new("RGB", (20, 12)).save(wrong)
    with pytest.raises(ValueError, match=rf"{wrong} \(image 0\): expected 16 x 16 px, got 20 x 12; resize=True"):
        run(checkpoint, root, tmp_path / "r.h5")
    assert load_results(run(checkpoint, root, tmp_path / "r.h5", resize=True))["norms"].n == 30
    wrong.write_bytes(wrong.read_bytes()[:45])
    with pytest.raises(OSError, match=rf"{wrong} \(image 0\): "):
        run(checkpoint, root, tmp_path / "s.h5", resize=True)
    (root / "zebra").mkdir()
    with pytest.raises(ValueError, match="zebra is none of the 10 categories"):
        run(checkpoint, root, tmp_path / "s.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: expected a folder per class"):
        run(checkpoint, tmp_path / "empty", tmp_path / "s.h5")
    with pytest.raises(TypeError, match="data: expected a path, a torch Dataset or a Source, got int"):
        run(checkpoint, 3, tmp_path / "s.h5")  # type: ignore[arg-type]


def test_truncated_hdf5_names_the_image(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(images.read_bytes())
    with h5py.File(damaged, "r+") as file:
        data = file["testplus/data"]
        values = data[()]
        del file["testplus/data"]
        chunked = file["testplus"].create_dataset("data", data=values, chunks=(10, *values.shape[1:]), compression="gzip")
        chunked.id.write_direct_chunk((30, 0, 0, 0), b"not what gzip writes")
    with pytest.raises(OSError, match=r"damaged.h5, split 'testplus', image 30: .*cannot read"):
        run(checkpoint, damaged, tmp_path / "r.h5", batch_size=7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"save": ("gap", "v3")},
            ValueError,
            "save: no area 'v3' in this network; its areas are retina, v1, v2, v4, it, gap",
        ),
        ({"save": "gap"}, TypeError, "save: expected a sequence"),
        ({"dtype": "float64"}, ValueError, "dtype: expected one of"),
        ({"reducers": ("norm",)}, ValueError, "reducers: expected some of readout_zones, .*got norm"),
        ({"areas": ("v9",)}, ValueError, "areas: no area 'v9' in this network"),
        ({"compression": 10}, ValueError, "compression: expected at most 9"),
        ({"rdm_classes": [0], "rdm_images": [0]}, ValueError, "rdm_classes: expected either"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"limit": 2.5}, TypeError, "limit: expected an int"),
        ({"split": "nope"}, ValueError, "nope"),
    ],
)
def test_bad_options_are_named(
    checkpoint: Path, images: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(checkpoint, images, tmp_path / "r.h5", **options)
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit_is_refused(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    large = make_dataset(tmp_path / "large.h5", source="digits", size=24, num_train=40, num_val=20, num_test=20, num_testplus=20)
    with pytest.raises(ValueError, match="data: expected images of 16 px"):
        run(checkpoint, large, tmp_path / "r.h5")
    renamed = tmp_path / "renamed.h5"
    renamed.write_bytes(images.read_bytes())
    with h5py.File(renamed, "r+") as file:
        file["categories"][0] = b"other"
    with pytest.raises(ValueError, match="data: expected the 10 categories"):
        run(checkpoint, renamed, tmp_path / "r.h5")
    assert not (tmp_path / "r.h5").exists()


def test_biological_unroll_counts_from_its_first_output(images: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(images), out=str(tmp_path / "b"), widths=(4, 6, 8, 10, 12), timesteps=8, epochs=1, unroll="biological",
        max_train_images=16, max_val_images=16, backend="reference",
    )  # fmt: skip
    out = run(train(config, reporter=QUIET), images, tmp_path / "r.h5", save=("gap", "v1"))
    result = ReadoutZoneResult.load(out)
    first = result.descriptors["first_step"]
    assert first["v1"] < first["gap"]
    assert result.timesteps == 8 - first["gap"]
    with h5py.File(trajectories_path(out)) as file:
        assert file["trajectories/v1"].shape[0] == 8 - first["v1"]


def test_output_never_replaces_what_it_is_made_from(checkpoint: Path, images: Path) -> None:
    for path, name in ((checkpoint, "checkpoint"), (images, "data")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"out: expected another file than {name}"):
            run(checkpoint, images, path, overwrite=True)
        assert path.read_bytes() == before
