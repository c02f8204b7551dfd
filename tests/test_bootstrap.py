"""The bootstrap over images: weights, point values, coverage; and trajectories from other software in files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from test_analysis_cases import assert_same_result, make

from rnndyn_fast.analysis import ReadoutZoneReducer, ReadoutZoneResult, bootstrap, load_result, readout_zones
from rnndyn_fast.analysis.bootstrap import PAIRED, poisson_weights


def test_weights_are_poisson_and_belong_to_the_image() -> None:
    weights = poisson_weights(np.arange(20_000), range(20), seed=3)
    expected = np.exp(-1) / np.array([1, 1, 2, 6, 24])
    np.testing.assert_allclose(np.bincount(weights.ravel())[:5] / weights.size, expected, atol=3e-3)
    assert abs(np.corrcoef(weights.astype(float))[0, 1:]).max() < 0.03  # 4 standard errors
    order = np.random.default_rng(0).permutation(20_000)[:500]
    np.testing.assert_array_equal(poisson_weights(order, range(7, 9), seed=3), weights[7:9, order])
    assert (poisson_weights(np.arange(20_000), range(1), seed=4) != weights[:1]).any()


def test_point_values_are_those_of_the_result() -> None:
    result = readout_zones(**make(n=300))
    boot = bootstrap(result, 3)
    for name in PAIRED:
        np.testing.assert_allclose(boot.values[name], result.summary(name).mean, rtol=1e-6)
        steps = result.analysed_steps(name)
        assert steps.any()
        np.testing.assert_allclose(boot.values[f"{name}.average"], result.summary(name).mean[steps].mean(0), rtol=1e-6)
    for name in ("accuracy", "change_after_stable", "relative_change_after_stable"):
        np.testing.assert_allclose(boot.values[name], result.summary(name).mean)


def test_a_replicate_is_the_result_of_the_resampled_images() -> None:
    """Each image as many times as its weight says, through the analysis itself."""
    data = make(n=200)
    boot = bootstrap(readout_zones(**data), 3, seed=5)
    for replicate, weights in enumerate(poisson_weights(np.arange(200), range(3), seed=5)):
        index = np.repeat(np.arange(200), weights)
        again = readout_zones(**(data | {"trajectories": data["trajectories"][:, index], "labels": data["labels"][index]}))
        for name in (*PAIRED, "accuracy", "change_after_stable"):
            np.testing.assert_allclose(boot.replicates[name][replicate], again.summary(name).mean, rtol=1e-6, err_msg=name)


def test_intervals_agree_with_normal_ones_where_those_hold() -> None:
    result = readout_zones(**make(n=400))
    low, high = bootstrap(result, 1000).interval("accuracy")
    np.testing.assert_allclose((high - low) / 2, result.summary("accuracy").ci95, rtol=0.12)


def test_needs_kept_samples() -> None:
    with pytest.raises(ValueError, match="kept samples"):
        bootstrap(ReadoutZoneReducer(np.eye(3), timesteps=2).result())
    with pytest.raises(ValueError, match="replicates: expected at least 2"):
        bootstrap(readout_zones(**make()), 1)


@pytest.mark.parametrize("case", [{"t": 1}, {"c": 1}, {"n": 1}, {"n": 4, "t": 2}], ids=str)
def test_empty_groups_have_no_interval_and_no_warning(case: dict[str, int]) -> None:
    boot = bootstrap(readout_zones(**make(**case)), 20)
    assert np.isnan(boot.values["norm_now_vs_later.difference"])
    assert all(np.isnan(boot.interval("norm_now_vs_later.difference")))


def test_merged_and_saved_results_resample_alike(tmp_path: Path) -> None:
    data = make(n=120)
    parts = []
    for block in (slice(0, 50), slice(50, 120)):
        part = data | {"trajectories": data["trajectories"][:, block], "labels": data["labels"][block]}
        parts.append(readout_zones(**part))
    merged = parts[0].merge(parts[1])
    loaded = ReadoutZoneResult.load(merged.save(tmp_path / "r.h5"))
    whole = bootstrap(readout_zones(**data), 10).replicates
    for result in (merged, loaded):
        for name, values in bootstrap(result, 10).replicates.items():
            np.testing.assert_allclose(values, whole[name], rtol=1e-9, err_msg=name)


def test_plane_is_the_projection_on_two_readout_vectors() -> None:
    data, s = make(n=300), 2
    result = readout_zones(**data)
    assert result.samples is not None
    across, along = [], []
    for i in np.flatnonzero((result.samples["group"] == 0) & (result.samples["time"] == s)):
        y, c = data["labels"][i], result.samples["predicted"][i, s - 1]
        w, b = data["readout_weight"], data["bias"]
        e = (w[y] - w[c]) / np.linalg.norm(w[y] - w[c])
        u = w[y] + w[c] - ((w[y] + w[c]) @ e) * e
        across.append(e @ data["trajectories"][:, i].T + (b[y] - b[c]) / np.linalg.norm(w[y] - w[c]))
        along.append(u / np.linalg.norm(u) @ data["trajectories"][:, i].T)
    np.testing.assert_allclose(result.summary("plane_across").mean[s], np.mean(across, 0), rtol=1e-9)
    np.testing.assert_allclose(result.summary("plane_along").mean[s], np.mean(along, 0), rtol=1e-9)


def test_breakdown_adds_up() -> None:
    result = readout_zones(**make(n=300))
    samples = result.samples
    assert samples is not None
    np.testing.assert_allclose(np.trace(result.confusion, axis1=1, axis2=2) / 300, result.accuracy)
    assert dict(zip(result.counts, result.sums.class_groups.sum(0).tolist(), strict=True)) == result.counts
    chosen = samples["group"] == 0
    expected = np.corrcoef(samples["time"][chosen], samples["norm"][chosen, 0])[0, 1]
    assert result.norm_t_stable_correlation == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["npz", "h5", "published"])
def test_files_of_trajectories(tmp_path: Path, kind: str) -> None:
    data = make(n=80)
    arrays = dict(data)
    path = tmp_path / f"t.{'h5' if kind == 'h5' else 'npz'}"
    if kind == "published":  # names and dtypes of the published extraction, which knows no bias
        data["bias"] = np.zeros(5)
        arrays = {
            "representations_all": data["trajectories"],
            "readout_weight": data["readout_weight"],
            "labels_all": data["labels"].astype(np.float64),
            "readout_bias": np.array([]),
        }
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("acts/it", data=arrays.pop("trajectories"))
            file.create_dataset("class_names", data=[b"a", b"b", b"c", b"d", b"e"])
            for name, value in arrays.items():
                file.create_dataset(name, data=value)
        result = load_result(path, {"trajectories": "acts/it"})
        assert result.descriptors["class_names"] == ["a", "b", "c", "d", "e"]
    else:
        np.savez(path, **arrays)
        result = load_result(path)
    assert_same_result(result, readout_zones(**data))


def test_files_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "part.npz", labels=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "part.npz").read_bytes()[:100])
    for name, message in (
        ("part.npz", "trajectories: expected an array 'trajectories' or .* which has labels"),
        ("text.npz", "is neither"),
        ("cut.npz", "truncated"),
    ):
        with pytest.raises(ValueError, match=message):
            load_result(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_result(tmp_path / "absent.npz")
