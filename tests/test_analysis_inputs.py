"""The readout-zone analysis at its edges: one step, one class, empty groups, kinds of arrays, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_analysis_cases import assert_same_result, make

from rnndyn_fast.analysis import ReadoutZoneReducer, readout_zones
from rnndyn_fast.analysis.results import MEASURES

pytestmark = pytest.mark.filterwarnings("error")


def test_one_time_step() -> None:
    data = make(n=20, t=1)
    result = readout_zones(**data)
    assert result.counts["unstable_correct"] == result.counts["unstable_incorrect"] == 0
    assert result.counts["stable_correct"] == round(float(result.accuracy[0]) * 20)
    assert result.max_t_analysed == 1
    assert result.representation_change.shape == (result.counts["stable_correct"], 0)
    assert np.isnan(result.cos_final_vs_other).all()
    assert result.summary("change_after_stable").n == 0


def test_one_class() -> None:
    data = make(n=6, c=1)
    result = readout_zones(**data)
    assert result.counts["stable_correct"] == 6
    assert (result.samples["boundary_distance"] == np.inf).all()
    assert np.isnan(result.boundary_distance_now_vs_later).all()
    assert np.isnan(result.margin_now_vs_later).all()
    assert np.isfinite(result.norm_now_vs_later[:, 0]).all()


def test_nothing_yet_and_empty_groups() -> None:
    empty = ReadoutZoneReducer(np.eye(3), timesteps=4, keep_samples=True).result()
    assert empty.n == 0
    for name in MEASURES:
        assert np.isnan(empty.summary(name).mean).all()
        assert np.isnan(empty.published_summary(name)).all() if empty.summary(name).mean.shape == (4, 2) else True
    assert empty.stable_correct.shape == (0,)
    assert empty.representation_change.shape == (0, 3)
    wrong = readout_zones(np.ones((4, 2, 3)) * [0.0, 0.0, 1.0], np.eye(3), [0, 1])
    assert wrong.counts["stable_incorrect"] == 2
    assert np.isnan(wrong.norm_now_vs_later).all()
    assert wrong.max_t_analysed == 4  # no sample with t_stable = 0 to be a hundredth of


def test_constant_trajectories() -> None:
    r = np.tile(np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]], np.float32), (5, 1, 1))
    result = readout_zones(r, np.eye(3, dtype=np.float32), [0, 1])
    assert result.t_stable_correct.tolist() == [0, 0]
    assert (result.representation_change == 0).all()
    change = result.summary("change_after_stable")
    assert (change.mean, change.sd) == (0.0, 0.0)


def test_zero_vectors_do_not_poison_the_tables() -> None:
    r = np.zeros((3, 2, 4))
    r[:, 1, 0] = 1
    result = readout_zones(r, np.eye(4), [0, 0])
    assert result.counts["stable_correct"] == 2
    np.testing.assert_array_equal(result.cos_current_now_vs_later[:, 0], [0.5, 0.5, 0.5])
    assert result.summary("relative_change_after_stable").n == 1  # the other has no norm to be relative to


def test_kinds_of_input(tmp_path: Path) -> None:
    data = make(n=12, dtype=np.float32)
    expected = readout_zones(**data)
    for dtype in (np.uint8, np.int32, np.float64):
        assert_same_result(readout_zones(**(data | {"labels": data["labels"].astype(dtype)})), expected)
    as_lists = {name: value.astype(float).tolist() for name, value in data.items() if name != "labels"}
    assert readout_zones(**as_lists, labels=data["labels"].tolist()).counts == expected.counts
    swapped = {name: data[name].astype(data[name].dtype.newbyteorder(">")) for name in ("trajectories", "readout_weight")}
    assert_same_result(readout_zones(**(data | swapped)), expected)
    data["trajectories"].setflags(write=False)
    assert_same_result(readout_zones(**data), expected)
    reversed_time = data["trajectories"][::-1].copy()[::-1]
    assert_same_result(readout_zones(**(data | {"trajectories": reversed_time})), expected)
    half = readout_zones(torch.from_numpy(data["trajectories"].copy()).bfloat16(), data["readout_weight"], data["labels"])
    assert half.samples["norm"].dtype == np.float64
    grad = torch.from_numpy(data["trajectories"].copy()).requires_grad_()
    assert_same_result(readout_zones(**(data | {"trajectories": grad})), expected)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["trajectories"] = data["trajectories"]
        from_disk = readout_zones(**(data | {"trajectories": file["trajectories"]}), samples_per_block=5)
    assert_same_result(from_disk, expected, rtol=1e-6)


GOOD = make(n=3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"trajectories": np.zeros((3, 8))}, ValueError, r"trajectories: expected shape \[T, N, D\]"),
    "no steps": (
        {"trajectories": np.zeros((0, 3, 8))},
        ValueError,
        r"trajectories: .* no empty dimension, got \[0, 3, 8\]",
    ),
    "no samples": (
        {"trajectories": np.zeros((6, 0, 8))},
        ValueError,
        r"trajectories: .* no empty dimension, got \[6, 0, 8\]",
    ),
    "dims": (
        {"trajectories": np.zeros((6, 3, 7))},
        ValueError,
        r"trajectories: expected .* \[any, any, 8\] .* got \[6, 3, 7\]",
    ),
    "integers": (
        {"trajectories": np.zeros((6, 3, 8), int)},
        TypeError,
        "trajectories.*: expected a floating-point dtype",
    ),
    "strings": ({"trajectories": np.full((6, 3, 8), "a")}, TypeError, "trajectories.*: expected a numeric array"),
    "NaN": (
        {"trajectories": np.where(np.arange(144).reshape(6, 3, 8) == 50, np.nan, 1.0)},
        ValueError,
        r"trajectories.*: expected finite values, got nan at \[2, 0, 2\]",
    ),
    "inf": (
        {"trajectories": np.full((6, 3, 8), np.inf)},
        ValueError,
        "trajectories.*: expected finite values, got inf",
    ),
    "overflow": (
        {"trajectories": np.full((6, 3, 8), 1e30, np.float32)},
        ValueError,
        "trajectories.*: expected vectors whose L2 norm",
    ),
    "weight rank": ({"readout_weight": np.zeros(8)}, ValueError, r"readout_weight: expected shape \[C, D\]"),
    "weight NaN": ({"readout_weight": np.full((5, 8), np.nan)}, ValueError, "readout_weight: expected finite values"),
    "weight empty": ({"readout_weight": np.zeros((0, 8))}, ValueError, r"readout_weight: expected shape \[C, D\]"),
    "bias": ({"bias": np.zeros(4)}, ValueError, r"bias: expected shape \[C\] = \[5\], got \[4\]"),
    "bias NaN": ({"bias": np.full(5, np.nan)}, ValueError, "bias: expected finite values"),
    "labels": ({"labels": np.zeros(4, int)}, ValueError, r"labels: expected shape \[N\] = \[3\], got \[4\]"),
    "labels NaN": (
        {"labels": np.array([0, np.nan, 1])},
        ValueError,
        r"labels: expected integers \[N\] in \[0, C\) = \[0, 5\), got NaN",
    ),
    "labels half": ({"labels": np.array([0, 0.5, 1])}, ValueError, "labels: expected integers .* got 0.5"),
    "labels high": ({"labels": np.array([0, 5, 1])}, ValueError, r"labels: .* got values in \[0, 5\]"),
    "labels low": ({"labels": np.array([0, -1, 1])}, ValueError, r"labels: .* got values in \[-1, 1\]"),
    "labels of 64 bits without sign": ({"labels": np.array([0, 2**63, 1], np.uint64)}, ValueError, r"labels: .* got values in \[0.0, 9.2"),
    "masked": (
        {"trajectories": np.ma.masked_array(np.ones((6, 3, 8)), mask=np.arange(144).reshape(6, 3, 8) < 5)},
        TypeError,
        "expected an array without masked entries, got 5 of them",
    ),
    "labels bool": ({"labels": np.array([True, False, True])}, TypeError, "labels: expected integers"),
    "log_probs": (
        {"log_probs": np.zeros((6, 3, 4))},
        ValueError,
        r"log_probs: expected shape \[T, N, C\] = \[6, 3, 5\]",
    ),
    "log_probs NaN": (
        {"log_probs": np.full((6, 3, 5), np.nan)},
        ValueError,
        "log_probs: expected finite values, got nan",
    ),
    "log_probs inf": (
        {"log_probs": np.full((6, 3, 5), np.inf)},
        ValueError,
        "log_probs: expected finite values, got inf",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected 'native', 'reference' or None, got 'cuda'"),
    "block": ({"samples_per_block": 0}, ValueError, "samples_per_block: expected at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        readout_zones(**(GOOD | change))


def test_log_probabilities_of_zero_are_fine() -> None:
    log_probs = np.full((6, 3, 5), -np.inf)
    log_probs[..., 2] = 0
    assert (readout_zones(**GOOD, log_probs=log_probs).samples["predicted"] == 2).all()


def test_a_refused_update_changes_nothing() -> None:
    reducer = ReadoutZoneReducer(GOOD["readout_weight"], GOOD["bias"], 6, keep_samples=True)
    reducer.update(GOOD["trajectories"], GOOD["labels"])
    before = reducer.result()
    bad = GOOD["trajectories"].copy()
    bad[3, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"representations: expected finite values, got nan at \[3, 1, 2\]"):
        reducer.update(bad, GOOD["labels"])
    with pytest.raises(ValueError, match=r"representations: expected shape \[T, N, D\] = \[6, any, 8\], got \[5, 3, 8\]"):
        reducer.update(bad[1:], GOOD["labels"])
    assert_same_result(reducer.result(), before)


@pytest.mark.parametrize(("timesteps", "error"), [(None, TypeError), (2.0, TypeError), (True, TypeError), (0, ValueError)])
def test_bad_timesteps(timesteps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timesteps: expected"):
        ReadoutZoneReducer(np.eye(2), timesteps=timesteps)
