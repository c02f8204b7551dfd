"""Lesions in extraction: what is written is what the network gives with them, and going on asks for the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from rnndyn_fast.cli import main
from rnndyn_fast.data import ImageFile, make_dataset, normalise
from rnndyn_fast.extract import extract, load_results, trajectories_path
from rnndyn_fast.train import QuietReporter, TrainConfig, load_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = QuietReporter()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and images."""
    folder = tmp_path_factory.mktemp("lesions")
    images = make_dataset(folder / "digits.h5", source="digits", size=16, num_train=64, num_val=20, num_test=20, num_testplus=20)
    config = TrainConfig(
        data=str(images), out=str(folder / "run"), widths=(2, 4, 8, 16, 32), timesteps=4, epochs=1, batch_size=32, augment="none",
        topdown_connections=True,
    )  # fmt: skip
    return train(config, reporter=QUIET), images


def test_command_line(files: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, images = files
    out = tmp_path / "lesion.h5"
    words = ["extract", str(checkpoint), str(images), "--reducers", "norms", "--save", "gap", "--batch-size", "8"]
    assert main([*words, "--out", str(out), "--lesion", "v4:lateral@2-,it>v4@1-2,v2@3"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole.h5")]) == 0
    net, contents = load_checkpoint(checkpoint)
    mean, std = (np.array(contents["data"][name]) for name in ("mean", "std"))
    with ImageFile(images) as file, torch.inference_mode():
        x = normalise(file.split("testplus").read(slice(None))[0], mean, std)
        with net.lesion("v4:lateral", [2, 3]), net.lesion("it>v4", [1, 2]), net.intervene("v2", 3):
            _, expected = net(x, return_representations=True)
        _, whole = net(x, return_representations=True)
    for path, representations in ((out, expected), (tmp_path / "whole.h5", whole)):
        with h5py.File(trajectories_path(path)) as file:
            np.testing.assert_allclose(file["trajectories/gap"][()], representations.numpy(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, whole, atol=1e-3)
    descriptors = next(iter(load_results(out).values())).descriptors
    assert descriptors["options"]["lesion"] == ["v4:lateral@2-", "it>v4@1-2", "v2@3"]
    capfd.readouterr()
    for text, message in (
        ("v4:lateral@9-", "lesion: 'v4:lateral@9-': steps: expected some of 0 .. 3, got none"),
        ("v4:lateral@x", "lesion: 'v4:lateral@x': lesion: expected time steps as 3, 3- or 3-5, got 'x'"),
        ("v5@1", "lesion: 'v5@1': record: unknown area 'v5'"),
        ("v1:lateral", "lesion: 'v1:lateral': connection: network"),
    ):
        assert main([*words, "--out", str(tmp_path / "bad.h5"), "--lesion", text]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


def test_going_on_with_other_lesions_is_refused(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast.extract import engine

    checkpoint, images = files
    options: dict[str, Any] = {"out": tmp_path / "r.h5", "reducers": ("norms",), "reporter": QUIET, "batch_size": 2, "shards": 2}
    monkeypatch.setattr(engine, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(engine.Journal, "close_if_empty", lambda self: None)
    finish = engine._Job.finish

    def stop(*_: Any) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(engine._Job, "finish", stop)
    with pytest.raises(OSError, match="stopped"):
        extract(checkpoint, images, lesion=("v4@1",), **options)
    monkeypatch.setattr(engine._Job, "finish", finish)
    with pytest.raises(ValueError, match="lesion"):
        extract(checkpoint, images, lesion=("v4@2",), **options)
    extract(checkpoint, images, lesion=("v4@1",), **options)
    with pytest.raises(TypeError, match="lesion: expected a sequence of names"):
        extract(checkpoint, images, lesion="v4@1", **options)
