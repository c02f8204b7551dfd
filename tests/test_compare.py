"""Comparison of cells at equal numbers of parameters: matching, resuming, the table and what it says."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.models import build
from rnndyn_fast.search import CompareConfig, compare, count_parameters
from rnndyn_fast.search import compare as compare_function
from rnndyn_fast.search.compare import RESULTS, matched
from rnndyn_fast.search.compare_config import NETWORKS, Trained
from rnndyn_fast.search.compare_report import statement, summarise
from rnndyn_fast.train import read_checkpoint

TINY: dict[str, Any] = {
    "networks": ("feedforward", "simplernn"), "parameters": 3000, "seeds": 1, "timesteps": 2, "epochs": 1, "batch_size": 20,
    "max_train_images": 20, "threads": 1,
}  # fmt: skip
IMAGE = {"image_size": 16, "num_classes": 10}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=40, num_val=20, num_test=20, num_testplus=20, challenging=True)


def config(images: Path, out: Path, **options: Any) -> CompareConfig:
    return CompareConfig(data=str(images), out=str(out), **{**TINY, **options})


@pytest.mark.parametrize("target", [20_000, 30_000])
@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_matched(name: str, target: int) -> None:
    made = CompareConfig(data="d", out="o", parameters=target)
    one, network = matched(name, made, IMAGE)
    assert abs(count_parameters(network) - target) <= 0.05 * target
    assert one.cell == name.removesuffix("_ungated")
    if target == 20_000:
        from rnndyn_fast.graph.spec.yaml_files import network_to_plain

        net = build({"model": "network", "network": network_to_plain(network)})
        assert sum(p.numel() for p in net.parameters()) == count_parameters(network)


def test_parameters_that_cannot_be_matched_are_told() -> None:
    with pytest.raises(ValueError, match=r"parameters: no lstm comes within 5% of 100; the nearest has \d"):
        matched("lstm", CompareConfig(data="d", out="o", parameters=100), IMAGE)


def test_it_goes_on_where_it_was(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare"
    module = compare_function.__globals__
    train, trained = module["train_quietly"], []

    def counted(options: Any, **kwargs: Any) -> Any:
        trained.append(Path(options.out).parent.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(options, **kwargs)

    monkeypatch.setitem(module, "train_quietly", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(config(images, out))
    assert "feedforward, seed 0:" in capsys.readouterr().out
    report = compare(config(images, out, resume=True))
    assert trained == ["feedforward", "simplernn", "simplernn"]  # what is finished is not trained again
    assert (out / "simplernn" / "seed_0" / RESULTS).exists()
    text = report.read_text(encoding="utf-8")
    assert "training images are under the challenging conditions" in text
    assert "On challenging images" in text
    with (out / "networks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["feedforward", "simplernn"]
    assert all(abs(int(row["parameters"]) - 3000) <= 150 for row in rows)
    net = build({**read_checkpoint(out / "simplernn" / "seed_0" / "last.pt")["model"]})
    assert sum(p.numel() for p in net.parameters()) == int(rows[1]["parameters"])
    # A control without recurrence has one answer.
    assert rows[0]["test_accuracy_t0"] == rows[0]["test_accuracy_t1"]
    with pytest.raises(FileExistsError, match="is not empty; use --resume"):
        compare(config(images, out))
    with pytest.raises(ValueError, match="begun with other options: parameters was 3000, is 4000"):
        compare(config(images, out, resume=True, parameters=4000))
    with pytest.raises(FileNotFoundError, match=r"resume: no compare.yaml"):
        compare(config(images, tmp_path / "other", resume=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--networks", "feedforward,rgx"], "networks: unknown network 'rgx', did you mean 'rgc'"),
        (["--networks", "rgc,rgc"], "networks: expected at least two different ones"),
        (["--epochs", "0"], "epochs: expected at least 1"),
        ([], "data: no such file: absent.h5"),
    ],
)
def test_bad_options_are_one_line(words: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--data", "absent.h5", "--out", str(tmp_path / "c"), *words]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "c").exists()


def made_up(name: str, *accuracies: float, images: int = 1000) -> list[Trained]:
    one = Trained(name, 0, 8, 1.5, 1000, 1e6, 1.0, 1, {}, {"test": images, "testplus": images})
    return [dataclasses.replace(one, seed=k, accuracy={"test": [0.1, a], "testplus": [0.1, a]}) for k, a in enumerate(accuracies)]


def test_statement_says_what_the_intervals_allow() -> None:
    done = [*made_up("rgc", 0.80, 0.81), *made_up("lstm", 0.79, 0.80), *made_up("feedforward", 0.70, 0.70), *made_up("simplernn", 0.9, 0.9)]
    text = statement(done, "rgc", "testplus")
    assert text.startswith("On challenging images rgc (80.5%) is better than feedforward (+10.5 +- ")
    assert "; worse than simplernn (-9.5" in text
    assert "; not told apart from lstm (+1.0" in text
    assert summarise(made_up("a", 0.5), "test").half == pytest.approx(1.96 * (0.25 / 1000) ** 0.5, rel=1e-4)
    # Unequal seeds widen the interval.
    assert summarise(made_up("a", 0.4, 0.6), "test").half > summarise(made_up("a", 0.5, 0.5), "test").half
