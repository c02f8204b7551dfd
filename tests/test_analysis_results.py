"""Result files, tables, claims and figures of the readout-zone analysis."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_analysis_cases import assert_same_result, make

from rnndyn_fast.analysis import (
    ReadoutZoneReducer,
    ReadoutZoneResult,
    readout_zones,
    tables,
    write_tables,
)
from rnndyn_fast.analysis.figure_files import FIGURES, write_figures
from rnndyn_fast.analysis.figures import figure_representation_change
from rnndyn_fast.analysis.results import MEASURES
from rnndyn_fast.report.analysis_page import analyse

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")


@pytest.mark.parametrize("keep", [False, True])
def test_save_and_load(tmp_path: Path, keep: bool) -> None:
    data = make(n=40)
    reducer = ReadoutZoneReducer(data["readout_weight"], data["bias"], 6, keep_samples=keep)
    reducer.update(data["trajectories"], data["labels"])
    result = reducer.result({"network": "tiny", "seed": 3, "class_names": ["a", "b", "c", "d", "e"]})
    path = result.save(tmp_path / "new folder" / "result.h5")
    loaded = ReadoutZoneResult.load(path)
    assert_same_result(loaded, result)
    assert loaded.descriptors == result.descriptors
    np.testing.assert_array_equal(loaded.readout_weight, data["readout_weight"])
    np.testing.assert_array_equal(loaded.bias, data["bias"])
    assert (loaded.samples is None) != keep
    assert_same_result(loaded.merge(result), result.merge(loaded))
    assert loaded.merge(result).n == 80
    with h5py.File(path) as file:  # other readers find the measures by name
        np.testing.assert_array_equal(file["measures/norm_now_vs_later/mean"], result.norm_now_vs_later)
        assert json.loads(file.attrs["descriptors"])["seed"] == 3


def test_merge_refuses_another_readout() -> None:
    data = make()
    with pytest.raises(ValueError, match="other: expected the same readout_weight"):
        readout_zones(**data).merge(readout_zones(**(data | {"readout_weight": data["readout_weight"] * 2})))
    with pytest.raises(TypeError, match="other: expected a ReadoutZoneResult, got int"):
        readout_zones(**data).merge(3)  # type: ignore[arg-type]


def test_load_refuses_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: expected an analysis file .* found no file"):
        ReadoutZoneResult.load(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match="path: expected a readable HDF5 file"):
        ReadoutZoneResult.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"path: expected an HDF5 file with attributes format = .* got None"):
        ReadoutZoneResult.load(tmp_path / "other.h5")
    path = readout_zones(**make()).save(tmp_path / "result.h5")
    content = path.read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="path: expected a readable HDF5 file"):
        ReadoutZoneResult.load(tmp_path / "cut.h5")
    for name, message in (("accumulators/norm.total", r"norm\.total"), ("samples/predicted", "predicted")):
        path = readout_zones(**make()).save(tmp_path / "result.h5")
        with h5py.File(path, "a") as file:
            del file[name]
        with pytest.raises(ValueError, match=f"state: expected .*{message}"):
            ReadoutZoneResult.load(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="compare: expected a result of T = 6"):
        analyse(path, tmp_path / "out", compare=readout_zones(**make(t=5)).save(tmp_path / "five.h5"))
    with pytest.raises(ValueError, match="compare: expected a result of the same 60 images in the same order"):
        analyse(path, tmp_path / "out", compare=readout_zones(**make(seed=1)).save(tmp_path / "others.h5"))
    assert not (tmp_path / "out").exists()


def test_failed_writes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.h5"
    result = readout_zones(**make())
    result.save(path)
    before = path.read_bytes()
    result.descriptors["bad"] = object()
    with pytest.raises(TypeError, match="JSON"):
        result.save(path)
    result.descriptors.clear()

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", fail)
    with pytest.raises(OSError, match="no space left"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.h5"]


def test_tables(tmp_path: Path) -> None:
    result = readout_zones(**make(n=200))
    rows = tables(result)
    assert [row["n"] for row in rows["groups"]] == list(result.counts.values())
    assert sum(row["fraction"] for row in rows["groups"]) == pytest.approx(1)
    assert [row["stable_correct"] for row in rows["counts"]] == result.counts_t_stable_correct.tolist()
    assert len(rows["representation_change_by_t_stable"]) == 6 * 5
    paths = write_tables(result, tmp_path / "tables")
    assert {p.stem for p in paths} == set(rows)
    with (tmp_path / "tables" / "norm_now_vs_later.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    summary = result.summary("norm_now_vs_later")
    for t, row in enumerate(read):
        for column, name in enumerate(("stable", "not_yet_stable")):
            mean, n = summary.mean[t, column], summary.n[t, column]
            assert int(row[f"{name}_n"]) == n
            assert row[f"{name}_mean"] == ("" if n == 0 else repr(float(mean)))
            if n > 1:
                low, high = float(row[f"{name}_ci95_low"]), float(row[f"{name}_ci95_high"])
                assert (low + high) / 2 == pytest.approx(mean)
                assert high - low == pytest.approx(2 * summary.ci95[t, column])
    with (tmp_path / "tables" / "cos_final_vs_other.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["others_final_n_effective"]) > 1
    with pytest.raises(ValueError, match=r"name: expected one of accuracy, .* got 'acc'"):
        result.summary("acc")


def test_analyse_writes_everything(tmp_path: Path) -> None:
    data = make(n=120)
    path = readout_zones(**data).save(tmp_path / "trained.h5")
    other = readout_zones(**(data | {"trajectories": data["trajectories"] * 0.3})).save(tmp_path / "untrained.h5")
    result, claims, paths = analyse(path, tmp_path / "out", compare=other)
    assert [claim.n for claim in claims] == [result.counts["stable_correct"]] * 2
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert {p.name for p in paths} >= {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg", "pdf", "csv")} | {
        "report.html",
        "claims.csv",
        "estimates.csv",
    }
    for p in paths:
        assert p.stat().st_size > (5000 if p.suffix in (".png", ".svg") else 20)
        if p.suffix == ".png":
            assert p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = (tmp_path / "out" / "accuracy.svg").read_text()
    assert "n = 120" in first
    write_figures(readout_zones(**data), tmp_path / "again")
    for suffix in ("svg", "pdf"):  # the same result makes the same file
        again, earlier = (tmp_path / folder / f"accuracy.{suffix}" for folder in ("again", "out"))
        assert again.read_bytes() == earlier.read_bytes()


def test_figures_show_the_numbers() -> None:
    result = readout_zones(**make(n=200))
    axes = FIGURES["norm_now_vs_later"](result).axes[0]
    table = result.norm_now_vs_later
    count = result.summary("norm_now_vs_later").n
    assert (count < 10).any()  # too few for a point
    for column, line in enumerate(axes.lines):
        shown = count[:, column] >= 10
        np.testing.assert_array_equal(line.get_xdata(), np.flatnonzero(shown))
        np.testing.assert_array_equal(line.get_ydata(), table[shown, column])
    assert len(axes.collections) == 2  # the two bands
    assert len(FIGURES["readout_dendrogram"](result).axes[0].get_xticklabels()) == 5
    panels = figure_representation_change(result, readout_zones(**make(seed=1))).axes
    assert ["untrained" in axes.get_title(loc="left") for axes in panels] == [False, True]


@pytest.mark.parametrize(("t", "c", "n"), [(1, 1, 1), (1, 4, 9), (2, 1, 2), (25, 3, 40)])
def test_figures_of_odd_sizes(tmp_path: Path, t: int, c: int, n: int) -> None:
    result = readout_zones(**make(n=n, t=t, c=c))
    assert len(write_figures(result, tmp_path)) == 3 * len(FIGURES)
    assert len(write_tables(result, tmp_path)) == len(tables(result))


def test_figures_and_tables_of_nothing(tmp_path: Path) -> None:
    result = ReadoutZoneReducer(np.eye(3), timesteps=4).result()
    write_figures(result, tmp_path, untrained=result)
    write_tables(result, tmp_path)
    for name in MEASURES:
        assert np.isnan(result.summary(name).mean).all()
