"""Training that has diverged without a NaN is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.train.objective import clamped


@pytest.mark.parametrize(
    ("loss", "classes", "diverged"), [(23.0, 10, True), (20.7, 10, True), (math.log(10), 10, False), (15.0, 10, False), (11.5, 2, True)]
)
def test_loss_at_the_clamp(loss: float, classes: int, diverged: bool) -> None:
    assert clamped(loss, classes) == diverged


@pytest.mark.parametrize(("lr", "loss"), [("1e4", "sum"), ("1e4", "mean"), ("1e-3", "sum")])
def test_an_epoch_at_the_clamp_warns(lr: str, loss: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "i.h5", source="digits", size=8, num_train=200, num_val=20, num_test=20, num_testplus=20)
    words = ["--widths", "2,4,8,16,32", "--timesteps", "2", "--threads", "1", "--batch-size", "10", "--epochs", "2", "--augment", "none"]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--lr", lr, "--loss", loss, *words]) == 0
    told = capfd.readouterr().out
    assert ("training has diverged; a smaller --lr than 10000 may help" in told) == (lr == "1e4"), told
