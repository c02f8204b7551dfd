"""Cheaper trials: rank correlations, and the command that measures them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.search import SearchConfig
from rnndyn_fast.search.proxies import FULL, PROXIES, Curve, ProxiesConfig, compare_proxies, draw, proxy_rows, rank_correlations

pytest.importorskip("optuna")


def test_rank_correlations_are_those_of_ranks() -> None:
    full = np.array([0.1, 0.4, 0.2, 0.9, 0.8, 0.5, 0.3, 0.7])
    rho, tau = rank_correlations(full**3, full, 200)
    assert (rho.value, rho.low, tau.value, tau.high) == pytest.approx((1, 1, 1, 1))
    assert rank_correlations(-full, full, 50)[1].value == pytest.approx(-1)
    swapped = full.copy()
    swapped[[3, 4]] = swapped[[4, 3]]  # one pair of 28 the other way round
    rho, tau = rank_correlations(swapped, full, 500)
    assert tau.value == pytest.approx(1 - 2 / 28)
    assert rho.value == pytest.approx(1 - 6 * 2 / (8 * 63))
    assert tau.low < tau.value <= tau.high <= 1
    assert not rank_correlations(np.ones(8), full, 10)[0].known


def test_intervals_hold_the_correlation_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        x = rng.normal(size=20)
        y = x + rng.normal(size=20)  # Spearman's rho of the population: 6 / pi * asin(r / 2), r = 1 / sqrt(2)
        rho = rank_correlations(x, y, 200, seed)[0]
        held += rho.low <= 6 / np.pi * np.arcsin(0.5**0.5 / 2) <= rho.high
    assert held >= 50


def test_rows_of_proxies() -> None:
    curves = []
    for k in range(8):
        curves.append(Curve(k, FULL, 100, (0.1 * k, 0.2, 0.3, 0.1 * k + 0.35), 8.0, 800.0))
        for proxy, (epochs, part, *_) in PROXIES.items():
            if epochs == 1:
                curves.append(Curve(k, proxy, 100, (0.9 - 0.1 * k,) if "width" in proxy else (0.1 * k,), 2.0, 800.0 * part))
    rows = {row["proxy"]: row for row in proxy_rows(curves, 50)}
    assert rows["quarter of the epochs"]["spearman"].value == pytest.approx(1)
    assert rows["quarter of the epochs"]["cost"] == 25
    assert rows["half of the epochs"]["kendall"].value < 1  # (the second epoch of some is better than their first)
    assert rows["quarter of the images"]["cost"] == 25
    assert rows["quarter of the images"]["lost"] == 0
    assert rows["half the width"]["kendall"].value == pytest.approx(-1)
    assert rows["half the width"]["lost"] == pytest.approx(70)


@pytest.fixture(scope="module")
def search_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a search leaves it, before any trial."""
    folder = tmp_path_factory.mktemp("search")
    images = make_dataset(folder / "digits.h5", source="digits", size=16, num_train=64, num_val=50, num_test=20, num_testplus=20)
    (folder / "space.yaml").write_text(
        yaml.safe_dump(
            {"cell": ["feedforward", "blt"], "depth": 1, "width": [4, 6, 8], "norm": "group", "lr": {"low": 0.002, "high": 0.02}}
        )
    )
    config = SearchConfig(data=str(images), out=str(folder), space=str(folder / "space.yaml"), timesteps=2, batch_size=32, epochs=1)
    (folder / "search.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return folder


def test_command(search_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "proxies"
    words = ["search", "proxies", str(search_folder), "--out", str(out), "--architectures", "4", "--epochs", "4", "--bootstrap", "50"]
    assert main(words) == 0, capsys.readouterr().err
    curves = json.loads((out / "results.json").read_text())
    assert len(curves) == 4 * (1 + sum(epochs == 1 for epochs, *_ in PROXIES.values()))
    full = [curve for curve in curves if curve["proxy"] == FULL]
    assert all(len(curve["accuracy"]) == 4 for curve in full)
    cost = {curve["proxy"]: curve["multiply_adds"] for curve in curves if curve["architecture"] == 0}
    assert cost["quarter of the images"] == cost[FULL] / 4
    assert cost["half the resolution"] < cost[FULL] / 3
    assert cost["half the width"] < cost[FULL] / 1.5
    with (out / "proxies.csv").open() as file:
        rows = {row["proxy"]: row for row in csv.DictReader(file)}
    assert rows.keys() == PROXIES.keys()
    assert "Rank correlation" in (out / "proxies.html").read_text()
    # Squares of four pixels are one, and all else of the images is as it was.
    with h5py.File(out / "half.h5") as half, h5py.File(search_folder / "digits.h5") as whole:
        assert half["val/data"].shape == (50, 8, 8, 3)
        wanted = whole["val/data"][:].astype(float).reshape(50, 8, 2, 8, 2, 3).mean((2, 4))
        assert np.abs(half["val/data"][:] - wanted).max() <= 0.5
        assert (half["train/labels"][:] == whole["train/labels"][:]).all()
    # Again: nothing is trained anew. With other options: not in this folder.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("best.pt")}
    assert len(before) == len(curves)
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*words, "--epochs", "5"]) == 2
    assert "holds proxies with other epochs" in capsys.readouterr().err


def test_architectures_are_different_ones_that_can_be_built(search_folder: Path) -> None:
    config = SearchConfig(**{**yaml.safe_load((search_folder / "search.yaml").read_text()), "max_parameters": 400})
    drawn = draw(config, {"image_size": 16, "num_classes": 10}, 5, 0)
    assert len({repr(one) for one in drawn}) == 5
    assert draw(config, {"image_size": 16, "num_classes": 10}, 5, 0) == drawn
    assert max(architecture.width for architecture, _ in drawn) < 8
    with pytest.raises(ValueError, match=r"architectures: the space has 0 that can be built on 2 px"):
        draw(config, {"image_size": 2, "num_classes": 10}, 5, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architectures": 2}, "architectures: expected at least 4, got 2"),
        ({"epochs": 1}, "epochs: expected at least 4"),
        ({"bootstrap": 1}, "bootstrap: expected at least 2"),
        ({"max_train_images": 2}, "max_train_images: expected at least 8"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ProxiesConfig(search="s", out="o", **options)
    with pytest.raises(FileNotFoundError, match=r"no search.yaml"):
        compare_proxies(ProxiesConfig(search=str(tmp_path), out=str(tmp_path / "o")))
