"""Comparison with recordings: fits, reliability, noise ceilings, files, the command."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from rnndyn_fast.cli import main
from rnndyn_fast.predictivity import (
    PredictivityResult,
    Recordings,
    load_features,
    load_recordings,
    predictivity,
    split_half_reliability,
    steps_of_bins,
)
from rnndyn_fast.predictivity.fits import ALPHAS, _ridge_path, assign_folds, held_out_predictions, pls_fit, reduced, ridge_fit
from rnndyn_fast.predictivity.reliability import correlation

NEURONS = 40


def simulated(
    *,
    explainable: float = 0.7,
    bins: int = 2,
    stimuli: int = 400,
    repeats: int = 6,
    noise: float = 2.0,
    seed: int = 0,
    same_map: bool = True,
) -> tuple[np.ndarray, Recordings]:
    """Features [bins, stimuli, 12] and neurons of which they explain exactly `explainable` (a correlation) but for noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(bins, stimuli, 12))
    maps = rng.normal(size=(1 if same_map else bins, 12, NEURONS))
    linear = features @ (maps / np.sqrt((maps**2).sum(1, keepdims=True)))
    signal = explainable * linear + np.sqrt(1 - explainable**2) * rng.normal(size=linear.shape)
    responses = signal[:, :, None] + rng.normal(size=(bins, stimuli, repeats, NEURONS)) * noise
    return features, Recordings(responses)


# ---------------------------------------------------------------- parts


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 50, 4))
    expected = [[np.corrcoef(x[b, :, k], y[b, :, k])[0, 1] for k in range(4)] for b in range(3)]
    np.testing.assert_allclose(correlation(x, y), expected, atol=1e-12)
    constant = np.full((50, 4), 0.1)
    assert np.isnan(correlation(constant, y[0])).all()


def test_correlation_within_folds_has_no_bias_where_nothing_is_predicted() -> None:
    """The mean of the other folds as prediction: worthless, and without the groups strongly negative."""
    y = np.random.default_rng(0).normal(size=(60, 200))
    fold = assign_folds(60, 5, 0)
    predicted = np.stack([y[fold != f].mean(0) for f in fold])
    noise = np.random.default_rng(1).normal(size=y.shape) * 1e-3
    assert np.median(correlation(predicted, y)) < -0.2
    assert abs(np.median(correlation(predicted + noise, y, fold))) < 0.03


@pytest.mark.parametrize("repeats", [2, 5, 8])
def test_reliability_is_the_share_of_signal(repeats: int) -> None:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(1, 3000, 1, 4))
    noise = np.array([0.5, 1.0, 2.0, 3.0])
    responses = signal + noise * rng.normal(size=(1, 3000, repeats, 4))
    # The standard error of a correlation over 3000 stimuli is below 0.02, that of its Spearman-Brown value below 0.04.
    np.testing.assert_allclose(split_half_reliability(responses, num_splits=20)[0], 1 / (1 + noise**2 / repeats), atol=0.05)


def test_reliability_with_missing_repeats() -> None:
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(1, 3000, 1, 2)), 1.5
    responses = signal + noise * rng.normal(size=(1, 3000, 7, 2))
    count = rng.integers(2, 8, size=3000)
    missing = np.arange(7) >= count[:, None]
    responses[0, missing] = np.nan
    expected = 1 / (1 + noise**2 * (1 / count).mean())
    np.testing.assert_allclose(split_half_reliability(responses, num_splits=20), expected, atol=0.05)
    responses[0, 5, 1:, 1] = np.nan  # one stimulus once only, in one neuron
    one = split_half_reliability(responses, num_splits=2)
    assert np.isfinite(one[0, 0])
    assert np.isnan(one[0, 1])


def test_ridge_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for rows, dimensions in ((60, 8), (20, 35)):
        x, y, test = rng.normal(size=(rows, dimensions)), rng.normal(size=(rows, 3)), rng.normal(size=(5, dimensions))
        index = np.array([2, 8, 14])
        expected = Ridge(alpha=np.asarray(ALPHAS)[index] * rows).fit(x, y).predict(test)
        np.testing.assert_allclose(_ridge_path(x, y, test)(index), expected, atol=1e-8)


def test_penalty_grows_with_noise() -> None:
    """Chosen per neuron: almost none for one that features determine, so that its prediction is exact."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 30))
    y = np.stack([x @ rng.normal(size=30), rng.normal(size=80)], 1)
    inner = assign_folds(60, 4, 0)
    predicted = ridge_fit(x[:60], y[:60], inner, x[60:])
    np.testing.assert_allclose(predicted[:, 0], y[60:, 0], atol=0.1)
    assert predicted[:, 1].std() < 0.3


@pytest.mark.parametrize("method", ["ridge", "pls"])
def test_reducing_dimensions_is_exact_where_there_are_more_than_stimuli(method: str) -> None:
    rng = np.random.default_rng(0)
    features, y = rng.normal(size=(40, 90)), rng.normal(size=(40, 2))
    fit = ridge_fit if method == "ridge" else pls_fit(3)
    fold, stimulus = assign_folds(40, 4, 0), np.arange(40)
    rotated = reduced(features, 1000, 0)
    assert rotated.shape == (40, 40)
    centred = features - features.mean(0)
    whole = centred / np.sqrt((centred**2).sum(1).mean())
    one, two = (held_out_predictions(x, y, stimulus, fold, fit, 0) for x in (rotated, whole))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert reduced(features, 10, 0).shape == (40, 10)


def test_steps_of_bins() -> None:
    edges = np.arange(0.0, 80.0, 10.0)
    assert steps_of_bins(edges, 20, 10, timesteps=2).tolist() == [-1, 0, 0, 1, 1, -1, -1]
    assert steps_of_bins(edges, 20, 10, first_step=1, timesteps=2).tolist() == [-1, -1, -1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="step_ms: expected a positive number"):
        steps_of_bins(edges, 0.0, timesteps=2)


# ---------------------------------------------------------------- noise ceilings


@pytest.mark.parametrize("method", ["ridge", "pls"])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_corrected_value_is_the_explainable_one(method: str, noise: float) -> None:
    """Neurons whose signal correlates 0.7 with what the features hold: recovered whatever the noise.

    One neuron's corrected value has a standard error near 0.06 at the higher noise; the median of 2 x 40 is good to 0.02. Fits to 320
    noisy averages lose up to 0.05 more, always in one direction.
    """
    features, recordings = simulated(noise=noise, same_map=False)
    result = predictivity(features, recordings, method=method, num_components=12)
    assert 0.7 - 0.06 < result.over_bins().median < 0.7 + 0.03
    uncorrected = 0.7 * np.sqrt(1 / (1 + noise**2 / 6))
    assert result.over_bins("correlation").median == pytest.approx(uncorrected, abs=0.04)
    np.testing.assert_allclose(result.summary("reliability").median, 1 / (1 + noise**2 / 6), atol=0.04)
    summary = result.over_bins()
    assert summary.low < summary.median < summary.high
    assert summary.n == NEURONS


def test_correction_for_the_fit_makes_up_for_noise_in_training() -> None:
    """Few, noisy stimuli: the fit itself suffers, and the correction for both noises comes nearer the truth."""
    features, recordings = simulated(stimuli=100, noise=3.0, same_map=False)
    plain = predictivity(features, recordings, num_splits=100).over_bins().median
    both = predictivity(features, recordings, num_splits=100, correct_fit=True).over_bins().median
    assert plain < 0.63
    assert abs(both - 0.7) < abs(plain - 0.7)
    assert both < 0.78


def test_features_without_information_predict_nothing() -> None:
    features, recordings = simulated(explainable=0.0, noise=1.0)
    result = predictivity(features, recordings)
    assert abs(result.over_bins().median) < 0.05


def test_one_map_for_all_bins_needs_a_map_that_does_not_change() -> None:
    same, changing = (simulated(bins=3, stimuli=150, noise=1.0, explainable=0.9, same_map=m) for m in (True, False))
    fixed = predictivity(*same, mapping="fixed").over_bins().median
    assert fixed > predictivity(*same).over_bins().median - 0.01
    assert fixed > 0.8
    assert predictivity(*changing, mapping="fixed").over_bins().median < 0.6
    assert predictivity(*changing).over_bins().median > 0.8


def test_bins_find_their_steps_and_rows_their_stimuli() -> None:
    features, recordings = simulated(bins=3, noise=0.5, same_map=False)
    order = np.random.default_rng(0).permutation(recordings.num_stimuli)
    shuffled = np.empty_like(features)
    shuffled[:, order] = features
    timed = Recordings(recordings.responses, [50, 70, 90, 110], order)
    result = predictivity(shuffled[:2], timed, step_ms=20, latency_ms=50)
    assert result.bins.tolist() == result.steps.tolist() == [0, 1]
    assert result.bin_edges_ms is not None
    assert result.bin_edges_ms.tolist() == [[50, 70], [70, 90]]
    np.testing.assert_allclose(result.correlation, predictivity(features, recordings).correlation[:2], atol=1e-9)
    wrong = predictivity(features, timed)
    assert abs(wrong.over_bins().median) < 0.1
    late = predictivity(shuffled[1:], Recordings(recordings.responses, [50, 70, 90, 110], order), step_ms=20, latency_ms=50, first_step=1)
    assert late.steps.tolist() == [1, 2]
    np.testing.assert_allclose(late.correlation[0], result.correlation[1], atol=1e-9)


@pytest.mark.parametrize("correct_fit", [False, True])
def test_steps_before_the_stimulus_arrives_predict_nothing(correct_fit: bool) -> None:
    features, recordings = simulated(bins=3, stimuli=60)
    features[0] = 0.1  # (which no sum of float64 gives exactly)
    found = predictivity(features, recordings, correct_fit=correct_fit, num_splits=10)
    assert np.isnan(found.correlation[0]).all()
    assert np.isnan(found.corrected[0]).all()
    assert not np.isnan(found.reliability).any()
    later = predictivity(features[1:], Recordings(recordings.responses[1:]), correct_fit=correct_fit, num_splits=10)
    np.testing.assert_array_equal(found.correlation[1:], later.correlation)
    np.testing.assert_array_equal(found.over_bins("correlation").median, later.over_bins("correlation").median)
    assert not np.isnan(predictivity(features, recordings, mapping="fixed", num_splits=10).correlation[1:]).any()
    with pytest.raises(ValueError, match="the same vector for all at every step"):
        predictivity(features[:1], Recordings(recordings.responses[:1]))


def test_without_repeats_nothing_is_corrected() -> None:
    features, recordings = simulated()
    result = predictivity(features, Recordings(recordings.mean()))
    assert np.isnan(result.corrected).all()
    assert result.over_bins().n == 0
    assert result.over_bins("correlation").median > 0.4


def test_unreliable_neurons_do_not_count() -> None:
    features, recordings = simulated(noise=1.0)
    responses = recordings.responses.copy()
    responses[..., :10] = np.random.default_rng(0).normal(size=responses[..., :10].shape)
    result = predictivity(features, Recordings(responses), min_reliability=0.3)
    assert np.isnan(result.corrected[:, :10]).all()
    assert (result.summary().n == NEURONS - 10).all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rigde"}, r"method: expected one of .* got 'rigde', did you mean 'ridge'"),
        ({"mapping": "fixd"}, r"mapping: .*did you mean 'fixed'"),
        ({"num_folds": 1}, r"num_folds: expected 2..400"),
        ({"num_splits": 0}, "num_splits: expected at least 1"),
        ({"min_reliability": 2.0}, r"min_reliability: expected 0..1, got 2.0"),
        ({"step_ms": 10.0}, "step_ms: the recordings have no bin_edges_ms"),
        ({"steps": [0]}, r"steps: expected 2 integers in -1..1"),
        ({"steps": [0, 2]}, r"steps: expected 2 integers in -1..1"),
        ({"steps": [-1, -1]}, "step_ms: no time bin has a model step"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictivity(*simulated(), **options)


def test_bad_features_and_recordings() -> None:
    features, recordings = simulated()
    in_order = Recordings(recordings.responses, recordings.bin_edges_ms)
    with pytest.raises(ValueError, match=r"features: expected 400 stimuli, those of the recordings, got 401; rows"):
        predictivity(np.concatenate([features, features[:, :1]], axis=1), in_order)
    for bad, message in (
        (features[:, :100], "up to row 399, features .* hold 100"),
        (features[0], "features: expected shape"),
        (features[:1], "2 time bins and 1 model steps"),
        (np.full_like(features, np.nan), "features: expected finite values"),
        (np.zeros_like(features), "features that differ between stimuli"),
    ):
        with pytest.raises(ValueError, match=message):
            predictivity(bad, recordings)
    responses = recordings.responses
    gap = responses.copy()
    gap[0, 3, 1, 0] = np.nan
    for arguments, message in (
        ((responses[0, 0],), "responses: expected shape"),
        ((responses * np.inf,), "responses: expected finite values"),
        ((gap,), r"missing in all time bins; .*\[1, 3, 1, 0\]|missing in all time bins"),
        ((responses * np.nan,), "at least one repeat"),
        ((responses, [0, 1]), "bin_edges_ms: expected 3 increasing numbers"),
        ((responses, None, [0] * 400), "rows: expected 400 different"),
        ((responses, None, None, ["a"]), f"neurons: expected {NEURONS} names"),
    ):
        with pytest.raises(ValueError, match=message):
            Recordings(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="responses: expected numbers"):
        Recordings(np.array([[["a"]]]))


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def spike_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An NWB file, and the spike counts [bins, stimuli, repeats, units] from which its spike times were drawn."""
    pynwb = pytest.importorskip("pynwb")
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, size=(4, 12, 3, 5)).astype(float)
    counts[:, 4, 2] = np.nan  # shown twice only
    file = pynwb.NWBFile("simulated", "test", datetime(2024, 1, 1, tzinfo=UTC))
    file.add_trial_column("picture", "row of the picture")
    shown = [(s, r) for s in range(12) for r in range(3) if not np.isnan(counts[0, s, r, 0])]
    rng.shuffle(shown)
    repeat_of: dict[int, int] = {}
    spikes: list[list[float]] = [[] for _ in range(5)]
    drawn = np.full_like(counts, np.nan)
    for k, (s, r) in enumerate(shown):
        start = 1.0 + 0.5 * k
        file.add_trial(start_time=start, stop_time=start + 0.2, picture=s + 100)
        repeat = repeat_of.setdefault(s, 0)
        repeat_of[s] += 1
        drawn[:, s, repeat] = counts[:, s, r]
        for unit in range(5):
            for b in range(4):
                spikes[unit] += list(start + 0.05 * b + 0.05 * rng.random(int(counts[b, s, r, unit])))
    for unit in range(5):
        file.add_unit(spike_times=np.sort(spikes[unit]))
    path = tmp_path_factory.mktemp("nwb") / "spikes.nwb"
    with pynwb.NWBHDF5IO(path, "w") as io:
        io.write(file)
    return path, drawn


def test_nwb_gives_rates_per_bin_and_repeat(spike_file: tuple[Path, np.ndarray]) -> None:
    path, counts = spike_file
    recordings = load_recordings(path, stimulus_column="picture", stop_ms=200, bin_ms=50)
    np.testing.assert_allclose(recordings.responses, counts / 0.05)
    assert recordings.rows is not None
    assert recordings.rows.tolist() == list(range(100, 112))
    assert recordings.bin_edges_ms is not None
    assert recordings.bin_edges_ms.tolist() == [0, 50, 100, 150, 200]
    with pytest.raises(ValueError, match=r"no column 'pictures', did you mean 'picture'"):
        load_recordings(path, stimulus_column="pictures")
    with pytest.raises(ValueError, match=r"no table of presentations 'trial', did you mean 'trials'"):
        load_recordings(path, table="trial")
    with pytest.raises(ValueError, match="bin_ms: expected"):
        load_recordings(path, bin_ms=0)


def test_files_that_are_no_recordings(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", response=np.zeros((1, 2, 3)))
    np.savez(tmp_path / "b.npz", responses=np.zeros((1, 2, 3)), bin_edge_ms=[0, 1])
    (tmp_path / "c.npz").write_text("no")
    (tmp_path / "d.nwb").write_text("no")
    (tmp_path / "e.csv").write_text("no")
    for name, message in (
        ("a.npz", r"no array 'responses', did you mean 'response'"),
        ("b.npz", r"unknown array 'bin_edge_ms', did you mean 'bin_edges_ms'"),
        ("c.npz", "is not an NPZ file"),
        ("d.nwb", "is not an NWB file"),
        ("e.csv", "expected a .npz or .nwb file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recordings(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_recordings(tmp_path / "absent.npz")


def test_result_file_round_trip(tmp_path: Path) -> None:
    result = predictivity(*simulated())
    again = PredictivityResult.load(result.save(tmp_path / "r.npz"))
    for name in ("correlation", "reliability", "corrected", "steps", "bins"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert (again.area, again.neurons, again.descriptors) == (result.area, result.neurons, result.descriptors)
    np.savez(tmp_path / "x.npz", a=1)
    with pytest.raises(ValueError, match="not a predictivity result"):
        PredictivityResult.load(tmp_path / "x.npz")


def test_command_writes_tables_and_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    features, recordings = simulated(bins=3, stimuli=80)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.attrs["descriptors"] = '{"first_step": {"it": 1}}'
        file["trajectories/v4"] = features.reshape(3, 80, 3, 2, 2)
        file["trajectories/it"] = features[1:]
    np.savez(tmp_path / "r.npz", responses=recordings.responses, bin_edges_ms=[0, 10, 20, 30])
    words = ["predict", str(tmp_path / "f.h5"), str(tmp_path / "r.npz")]
    assert main([*words, "--out", str(tmp_path / "out"), "--step-ms", "10", "--num-splits", "10", "--mapping", "fixed"]) == 0
    assert "corrected" in capfd.readouterr().out
    with (tmp_path / "out" / "predictivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["area"], row["bin"], row["step"]) for row in rows] == [
        ("it", "1", "1"), ("it", "2", "2"), ("v4", "0", "0"), ("v4", "1", "1"), ("v4", "2", "2"),
    ]  # fmt: skip
    assert all(float(row["corrected_low"]) <= float(row["corrected_median"]) <= float(row["corrected_high"]) for row in rows)
    assert "neurons" in (tmp_path / "out" / "report.html").read_text()
    assert load_features(tmp_path / "f.h5", ["it"])["it"].first_step == 1
    assert main([*words, "--out", str(tmp_path / "out"), "--areas", "v3"]) == 2
    assert "no area 'v3'" in capfd.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out"), "--method", "lasso"]) == 2
    assert "method: " in capfd.readouterr().err
