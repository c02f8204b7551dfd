"""The study from end to end at a tiny size: what it writes, that it continues where it stopped, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from rnndyn_fast.analysis import ReadoutZoneResult, check_claims
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
        for claim in check_claims(result):
            heading = text.index(f"{claim.statement} — lateral{' + top-down, multiplicative' if 'topdown' in name else ', additive'}")
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
            shown = [float(row[f"value_{k}"] or "nan") for k in (1, 2)]
            np.testing.assert_allclose(shown, result.published_summary("norm_now_vs_later"))
    for name in ("comparison", "along_training"):
        assert {path.suffix for path in (out / "comparison").glob(f"{name}.*")} == {".csv", ".png", ".svg", ".pdf"}


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("lateral",)}, "networks: expected different ones of lateral_additive"),
        ({"networks": ("lateral_additive",) * 2}, "networks: expected different ones"),
        ({"checkpoints": ("a.pt",)}, "data: expected the image file"),
        ({"widths": (8, 16, 32, 48, 64)}, "widths: with top-down connections"),
        ({"bootstrap": 0}, "bootstrap: expected at least 1"),
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
