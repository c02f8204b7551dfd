"""The study from end to end at a tiny size: what it writes, that it continues where it stopped, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from report_numbers import unknown_numbers

from rnndyn_fast.analysis import ReadoutZoneResult, bootstrap, check_claims, pool
from rnndyn_fast.cli import main
from rnndyn_fast.study import StudyConfig, run_study
from rnndyn_fast.train import QuietReporter, TrainConfig, learning_rate, read_checkpoint, read_metrics
from rnndyn_fast.train.metrics import EpochMetrics
from rnndyn_fast.train.rates import epochs_since_best

NETWORKS = ("lateral_additive", "topdown_multiplicative")
OPTIONS = {"networks": NETWORKS, "quick": True, "threads": 1}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "s"
    return run_study(StudyConfig(out=str(out), **OPTIONS), reporter=QuietReporter())


def test_report_has_every_network_and_number(study: Path) -> None:
    text, out = study.read_text(encoding="utf-8"), study.parent
    for name in NETWORKS:
        result = ReadoutZoneResult.load(out / name / "testplus.h5")
        assert result.samples is not None
        title = f"lateral{' + top-down, multiplicative' if 'topdown' in name else ', additive'}"
        for claim in check_claims(result, ReadoutZoneResult.load(out / name / "untrained.h5"), replicates=50):
            heading = text.index(f"{claim.statement} — {title}")
            assert claim.verdict.lower() in text[heading : heading + 600].lower()
        for count in result.counts.values():
            assert f"{count:,}" in text
        assert read_checkpoint(out / name / "best.pt")["config"]["topdown_connections"] == ("topdown" in name)
        assert (out / name / "epoch_1.pt").exists()
        assert (out / name / "analysis" / "report.html").exists()
    assert "22.43" in text  # a published number
    with (out / "comparison" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(NETWORKS)
    for row in rows:
        result = ReadoutZoneResult.load(out / NETWORKS["top-down" in row["network"]] / "testplus.h5")
        if row["measure"] == "norm":
            shown = [float(row[f"value_{k}_value"] or "nan") for k in (1, 2)]
            table, steps = result.norm_now_vs_later, result.analysed_steps("norm_now_vs_later")
            np.testing.assert_allclose(shown, table[steps].mean(0) if steps.any() else [np.nan, np.nan])
    for name in ("comparison", "along_training"):
        assert {path.suffix for path in (out / "comparison").glob(f"{name}.*")} == {".csv", ".png", ".svg", ".pdf"}


def test_every_number_of_the_report_is_in_a_csv(study: Path) -> None:
    folders = [study.parent / "comparison", *(study.parent / name / "analysis" for name in NETWORKS)]
    assert unknown_numbers(study.read_text(encoding="utf-8"), *folders) == []


def test_study_goes_on_where_it_was(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(out=str(study.parent), **OPTIONS)
    with pytest.raises(FileExistsError, match=r"report.html exists"):
        run_study(config, reporter=QuietReporter())
    study.unlink()
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        run_study(StudyConfig(out=str(study.parent), **OPTIONS, seed=1), reporter=QuietReporter())
    kept = [study.parent / NETWORKS[0] / name for name in ("last.pt", "best.pt", "testplus.h5", "epoch_1.h5")]
    before = [path.stat().st_mtime_ns for path in kept[1:]]
    lost = study.parent / NETWORKS[1] / "testplus.h5"
    numbers = ReadoutZoneResult.load(lost).sums
    lost.unlink()
    monkeypatch.setattr("rnndyn_fast.report.analysis_page.write_report", lambda *_, **__: [])  # takes most of the time
    run_study(config, reporter=QuietReporter())
    assert [path.stat().st_mtime_ns for path in kept[1:]] == before
    for (name, mine), (_, theirs) in zip(numbers.arrays(), ReadoutZoneResult.load(lost).sums.arrays(), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_checkpoints_take_the_place_of_training(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.report.analysis_page.write_report", lambda *_, **__: [])
    given = ",".join(str(study.parent / name / "best.pt") for name in reversed(NETWORKS))
    words = ["study", "--checkpoints", given, "--data", str(study.parent / "images.h5"), "--out", str(tmp_path / "s"), "--bootstrap", "20"]
    assert main([*words, "--keep", "1"]) == 0
    for name in NETWORKS:
        mine, theirs = (ReadoutZoneResult.load(folder / name / "testplus.h5") for folder in (tmp_path / "s", study.parent))
        np.testing.assert_array_equal(mine.samples["norm"], theirs.samples["norm"])
        assert not (tmp_path / "s" / name / "best.pt").exists()
    assert list(json.loads((tmp_path / "s" / "study.json").read_text())["keep"]) == [1]


def test_several_seeds_of_a_kind(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.report.analysis_page.write_report", lambda *_, **__: [])
    kind = NETWORKS[:1]
    options = OPTIONS | {"networks": kind, "data": str(study.parent / "images.h5"), "seeds": 2}
    path = run_study(StudyConfig(out=str(tmp_path / "s"), **options), reporter=QuietReporter())
    names = [kind[0], f"{kind[0]}_seed1"]
    weights = [read_checkpoint(tmp_path / "s" / name / "initial.pt")["state_dict"] for name in names]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    text = path.read_text(encoding="utf-8")
    assert text.index("n = 2 networks (seeds) of a kind") < text.index("Do representations")
    results = [ReadoutZoneResult.load(tmp_path / "s" / name / "testplus.h5") for name in names]
    with (tmp_path / "s" / "comparison" / "claims.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["networks"] for row in rows if row["n"] != "0"} <= {"2"}
    with (tmp_path / "s" / "comparison" / "along_training.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    accuracy = [result.accuracy[-1] for result in results]
    assert float(last["accuracy_last_value"]) == pytest.approx(np.mean(accuracy))
    assert last["accuracy_last_networks"] == "2"
    boots = [bootstrap(result, 50, pairs=False) for result in results]  # as many replicates as the quick study has
    estimate = pool(boots).estimate("accuracy", -1)
    assert float(last["accuracy_last_low"]) == pytest.approx(estimate.low)
    assert "lateral, additive: 0, 1" in text  # which seeds
    # The same two, as checkpoints of one kind.
    given = [str(tmp_path / "s" / name / "best.pt") for name in names]
    config = StudyConfig(out=str(tmp_path / "t"), checkpoints=tuple(given), data=options["data"], bootstrap=20, keep=(1,))
    assert "n = 2 networks" in run_study(config, reporter=QuietReporter()).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="hold the same network"):
        run_study(StudyConfig(out=str(tmp_path / "u"), checkpoints=(given[0],) * 2, data=options["data"]), reporter=QuietReporter())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("lateral",)}, "networks: expected different ones of lateral_additive"),
        ({"networks": ("lateral_additive",) * 2}, "networks: expected different ones"),
        ({"checkpoints": ("a.pt",)}, "data: expected the image file"),
        ({"widths": (8, 16, 32, 48, 64)}, "widths: with top-down connections"),
        ({"bootstrap": 1}, "bootstrap: expected at least 2"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"patience": 0}, "patience: expected at least 1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**options)  # type: ignore[arg-type]


def rows(*accuracies: float) -> list[EpochMetrics]:
    return [EpochMetrics(k + 1, 1.0, (a,), 1.0, (a,), 1.0, 1.0) for k, a in enumerate(accuracies)]


def test_learning_rate_falls_on_plateaus() -> None:
    config = TrainConfig(data="d", out="o", lr=0.8, lr_patience=2)
    for accuracies, rate in (
        ((), 0.8),
        ((0.5, 0.4), 0.8),
        ((0.5, 0.4, 0.5), 0.2),
        ((0.5, 0.4, 0.5, 0.4), 0.2),
        ((0.5, 0.4, 0.5, 0.4, 0.4), 0.05),
        ((0.5, 0.4, 0.5, 0.6, 0.5), 0.2),
    ):
        assert learning_rate(config, rows(*accuracies)) == pytest.approx(rate), accuracies
    assert learning_rate(TrainConfig(data="d", out="o", lr=0.8), rows(0.5, 0.4, 0.3)) == 0.8


def test_epochs_since_best_counts_from_the_first_of_equals() -> None:
    config = TrainConfig(data="d", out="o")
    assert [epochs_since_best(config, rows(*a)) for a in ((), (0.5,), (0.5, 0.4), (0.4, 0.5, 0.5))] == [0, 0, 1, 1]


def test_training_stops_when_accuracy_does(study: Path, tmp_path: Path) -> None:
    """With a learning rate of almost nothing, accuracy stays what it is after the first epoch."""
    from rnndyn_fast.train import train

    config = StudyConfig(out=str(tmp_path), **OPTIONS).training(
        NETWORKS[0], str(study.parent / "images.h5"), epochs=9, patience=2, lr=1e-30
    )
    train(config, reporter=QuietReporter())
    assert len(read_metrics(tmp_path / NETWORKS[0])) == 3
