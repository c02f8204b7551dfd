"""Reaction times by an entropy threshold: reducer against a loop, matched thresholds, comparison with people, the command."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rnndyn_fast.analysis import (
    ReactionTimeReducer,
    ReactionTimeResult,
    compare_reaction_times,
    entropies,
    load_reaction_times,
    reaction_times,
)
from rnndyn_fast.analysis.human_times import fisher_mean
from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.extract.reactions import costs
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.report.speed_accuracy import write_reaction_times

T, N, C = 5, 120, 4


def sharpening(seed: int = 0, samples: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, N, C] of noisy evidence that grows over time, at a pace of its own in every image, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (samples,), generator=generator)
    pace = torch.rand(samples, 1, generator=generator) * 2
    truth = torch.nn.functional.one_hot(labels, C).float()
    steps = [(t + 1) * pace * truth + 0.7 * torch.randn(samples, C, generator=generator) for t in range(T)]
    return torch.log_softmax(torch.stack(steps), -1), labels


def looped(log_probs: np.ndarray, labels: np.ndarray, theta: float, strict: bool, unreached: str) -> tuple[list[float], list[bool]]:
    """The definition, one image after the other."""
    times, hits = [], []
    for i in range(log_probs.shape[1]):
        for t in range(len(log_probs)):
            h = -sum(math.exp(v) * v for v in log_probs[t, i])
            if h < theta or (not strict and h == theta):
                break
        else:
            if unreached == "exclude":
                continue
        times.append(t)
        hits.append(bool(log_probs[t, i].argmax() == labels[i]))
    return times, hits


@pytest.mark.parametrize("unreached", ["last", "exclude"])
@pytest.mark.parametrize("strict", [False, True])
def test_reducer_is_the_definition(strict: bool, unreached: str) -> None:
    log_probs, labels = sharpening()
    thresholds = [0.0, 0.05, 0.3, 0.8, 1.2, math.log(C) + 1e-9]
    reducer = ReactionTimeReducer(C, T, thresholds=thresholds, strict=strict, keep_samples=True)
    for batch in (slice(0, 50), slice(50, 51), slice(51, N)):
        reducer.update(log_probs[:, batch], labels[batch])
    result = reducer.result()
    curve = result.curve(unreached)
    values = log_probs.double().numpy()
    for k, theta in enumerate(thresholds):
        times, hits = looped(values, labels.numpy(), theta, strict, unreached)
        assert curve.n[k] == len(times)
        if times:
            assert curve.accuracy[k] == pytest.approx(np.mean(hits))
            assert curve.mean_step[k] == pytest.approx(np.mean(times))
            assert curve.low[k] < curve.accuracy[k] + 1e-12 < curve.high[k] + 2e-12
        assert result.entropy is not None
        one = reaction_times(result.entropy, theta, strict=strict, unreached=unreached)
        assert one[~np.isnan(one)].tolist() == times
    np.testing.assert_allclose(result.accuracy, (log_probs.argmax(-1) == labels).double().mean(1))


def test_threshold_equal_to_an_entropy() -> None:
    log_probs = torch.log(torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], dtype=torch.float64))
    half = float(entropies(log_probs)[0, 0])
    for strict, step in ((False, 0.0), (True, 1.0)):
        reducer = ReactionTimeReducer(2, 2, thresholds=[half], strict=strict)
        reducer.update(log_probs, torch.tensor([0]))
        assert reducer.result().curve().mean_step.tolist() == [step]


def test_merged_reducers_are_one() -> None:
    log_probs, labels = sharpening()
    whole, one, two = (ReactionTimeReducer(C, T, keep_samples=True) for _ in range(3))
    whole.update(log_probs, labels)
    one.update(log_probs[:, :40], labels[:40])
    two.update(log_probs[:, 40:], labels[40:])
    one.merge(two)
    for name in ("counts", "correct", "step_correct", "entropy", "hits"):
        np.testing.assert_array_equal(getattr(one.result(), name), getattr(whole.result(), name))
    with pytest.raises(ValueError, match="other: expected strict = False, got True"):
        one.merge(ReactionTimeReducer(C, T, strict=True, keep_samples=True))


def test_cumulative_readout_sums_logits() -> None:
    """From log-probabilities as from logits: what they differ by is the same for all classes."""
    logits = torch.randn(T, 7, C, dtype=torch.float64)
    expected = torch.softmax(torch.cumsum(logits, 0), -1)
    expected_entropy = -(expected * expected.log()).sum(-1)
    torch.testing.assert_close(entropies(torch.log_softmax(logits, -1), cumulative=True), expected_entropy)


def test_threshold_trades_speed_for_accuracy() -> None:
    log_probs, labels = sharpening(samples=3000)
    reducer = ReactionTimeReducer(C, T)
    reducer.update(log_probs, labels)
    cost = np.array([1.0, 3.0, 5.0, 7.0, 9.0])
    result = reducer.result(cost=cost)
    curve = result.curve()
    assert (np.diff(curve.mean_step) <= 0).all()
    np.testing.assert_allclose(curve.mean_cost, 1 + 2 * curve.mean_step)
    # The point of it: at the same mean number of steps, better than giving all images as many.
    for t in range(1, T - 1):
        assert result.matched(mean_step=t).accuracy > result.accuracy[t]
    match = result.matched(accuracy=0.8)
    assert match.accuracy >= 0.8
    assert match.mean_step == curve.mean_step[curve.accuracy >= 0.8].min()
    assert result.matched(mean_cost=4.0).mean_cost <= 4.0


def test_matched_says_what_is_possible() -> None:
    log_probs, labels = sharpening()
    reducer = ReactionTimeReducer(C, T)
    reducer.update(log_probs, labels)
    result = reducer.result()
    with pytest.raises(ValueError, match=r"no threshold gives accuracy >= 1.5; the best is 0\.\d+"):
        result.matched(accuracy=1.5)
    with pytest.raises(ValueError, match="result without cost"):
        result.matched(mean_cost=1.0)
    with pytest.raises(ValueError, match="goal: expected one of"):
        result.matched(speed=1.0)
    with pytest.raises(ValueError, match=r"unreached: .*did you mean 'last'"):
        result.curve("lats")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(T, 3, C), torch.zeros(3)), ValueError, r"probabilities sum to .* apply log_softmax"),
        ((torch.zeros(T, 3), torch.zeros(3)), ValueError, r"log_probs: expected shape \[T, N, C\]"),
        ((torch.zeros(T, 3, 1), torch.zeros(3)), ValueError, r"\[5, any, 4\]"),
        ((sharpening()[0][:, :3], torch.tensor([0, 1])), ValueError, r"labels: expected shape \[N\] = \[3\]"),
        ((sharpening()[0][:, :3], torch.tensor([0, 1, C])), ValueError, "labels: expected integers"),
        ((sharpening()[0][:, :3] * torch.nan, torch.tensor([0, 1, 2])), ValueError, "log_probs"),
        ((torch.zeros(T, 3, C, dtype=torch.long), torch.zeros(3)), TypeError, "log_probs: expected a floating-point dtype"),
    ],
)
def test_bad_updates(arguments: Any, error: type[Exception], message: str) -> None:
    reducer = ReactionTimeReducer(C, T)
    with pytest.raises(error, match=message):
        reducer.update(*arguments)
    with pytest.raises(ValueError, match="at least one image"):
        reducer.result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5, 0.2]}, "thresholds: expected ascending"),
        ({"thresholds": [-1.0]}, "thresholds: expected ascending"),
        ({"num_classes": 1}, "num_classes: expected at least 2"),
        ({"timesteps": 0}, "timesteps: expected at least 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReactionTimeReducer(**{"num_classes": C, "timesteps": T, **options})


def test_result_file_round_trip(tmp_path: Path) -> None:
    log_probs, labels = sharpening()
    reducer = ReactionTimeReducer(C, T, keep_samples=True)
    reducer.update(log_probs, labels)
    result = reducer.result(cost=np.arange(5.0), descriptors={"a": [1]})
    again = ReactionTimeResult.load(result.save(tmp_path / "r.npz"))
    for name in ("thresholds", "counts", "correct", "step_correct", "cost", "entropy", "hits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert (again.strict, again.cumulative, again.descriptors) == (False, False, {"a": [1]})
    np.savez(tmp_path / "x.npz", a=1)
    with pytest.raises(ValueError, match="not a result of reaction times"):
        ReactionTimeResult.load(tmp_path / "x.npz")


# ---------------------------------------------------------------- people


def people(entropy: np.ndarray, theta: float, subjects: int = 8, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """Subjects who take 300 ms and 40 ms for each step of the network at a threshold, with noise of their own."""
    rng = np.random.default_rng(seed)
    steps = reaction_times(entropy, theta)
    times = 300 + 40 * (steps + noise * rng.normal(size=(subjects, len(steps)))) + 30 * rng.normal(size=(subjects, 1))
    return np.maximum(times, 1.0)


@pytest.fixture(scope="module")
def entropy() -> np.ndarray:
    return entropies(sharpening(samples=600)[0]).numpy()


def test_model_that_made_the_times_reaches_the_ceiling_at_its_threshold(entropy: np.ndarray) -> None:
    grid = np.linspace(0.05, 1.3, 26)
    comparison = compare_reaction_times(entropy, people(entropy, 0.6), grid)
    assert comparison.threshold == pytest.approx(np.full(8, 0.6), abs=0.11)
    low, high = comparison.estimate("ceiling_low")[0], comparison.estimate("ceiling_high")[0]
    assert low < high
    assert comparison.estimate()[2] > low  # it predicts at least as well as the other people do
    assert comparison.share_of_ceiling > 0.95
    assert comparison.by_threshold.max() > comparison.by_threshold[0] + 0.05
    assert grid[comparison.by_threshold.argmax()] == pytest.approx(0.6, abs=0.06)


def test_ceiling_and_scores_by_hand(entropy: np.ndarray) -> None:
    human = people(entropy, 0.6, subjects=3)
    comparison = compare_reaction_times(entropy, human, [0.3, 0.6])
    times = {theta: reaction_times(entropy, theta) for theta in (0.3, 0.6)}
    for j in range(3):
        others = np.delete(human, j, 0)
        ranks = np.argsort(np.argsort(others, 1), 1).mean(0)  # no ties among these times
        assert comparison.ceiling_low[j] == pytest.approx(spearmanr(human[j], ranks)[0])
        assert comparison.correlation[j] == pytest.approx(spearmanr(times[comparison.threshold[j]], human[j])[0])
    assert comparison.by_threshold[1] == pytest.approx(np.mean([spearmanr(times[0.6], row)[0] for row in human]))
    assert comparison.by_entropy[2] == pytest.approx(np.mean([spearmanr(entropy[2], row)[0] for row in human]))


def test_unrelated_people_are_not_predicted(entropy: np.ndarray) -> None:
    human = np.random.default_rng(0).uniform(300, 600, size=(6, 600))
    _, low, high = compare_reaction_times(entropy, human, [0.3, 0.6, 0.9]).estimate()
    assert low - 0.05 < 0 < high + 0.05


def test_intervals_of_correlations_stay_within_bounds(entropy: np.ndarray) -> None:
    """Three people of whom one is unlike the others: a normal interval would reach beyond 1."""
    rng = np.random.default_rng(1)
    human = people(entropy, 0.6, subjects=3)
    human[2] = rng.uniform(300, 600, human.shape[1])
    comparison = compare_reaction_times(entropy, human, [0.6])
    for name in ("correlation", "ceiling_low", "ceiling_high"):
        value, low, high = comparison.estimate(name)
        assert -1 <= low < value < high <= 1
    plain = comparison.correlation.mean() + 4.303 * comparison.correlation.std(ddof=1) / np.sqrt(3)
    assert plain > 1
    assert fisher_mean([1.0, 1.0, 1.0]) == pytest.approx((1.0, 1.0, 1.0))


def test_intervals_of_correlations_cover() -> None:
    """Subjects whose z is normal about the true one."""
    z = np.random.default_rng(2).normal(0.8, 0.5, size=(500, 5))
    found = [fisher_mean(np.tanh(row)) for row in z]
    assert 0.92 <= np.mean([low <= np.tanh(0.8) <= high for _, low, high in found]) <= 0.98


def test_missing_times_are_left_out(entropy: np.ndarray) -> None:
    human = people(entropy, 0.6)
    whole = compare_reaction_times(entropy, human, [0.3, 0.6])
    gaps = human.copy()
    gaps[np.random.default_rng(0).random(human.shape) < 0.2] = np.nan
    gaps[:, 5] = np.nan
    partial = compare_reaction_times(entropy, gaps, [0.3, 0.6])
    assert partial.images == 599
    assert partial.estimate()[0] == pytest.approx(whole.estimate()[0], abs=0.05)
    excluded = compare_reaction_times(entropy, gaps, [0.3, 0.6], unreached="exclude")
    assert np.isfinite(excluded.correlation).all()


def test_bad_people(entropy: np.ndarray) -> None:
    human = people(entropy, 0.6)
    lonely = human.copy()
    lonely[0, 2:] = np.nan
    for values, grid, message in (
        (human[:2], [0.5], "at least 3 subjects, got 2"),
        (human[:, :5], [0.5], r"\[any, 600\]"),
        (-human, [0.5], "expected reaction times >= 0"),
        (lonely, [0.5], "at least 10 images, .* that subject 0 shares with another, got 2 of them"),
        (human, [50.0], "at no threshold do reaction times differ"),
        (human, [], "thresholds: expected numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_reaction_times(entropy, values, grid)


def test_files_of_reaction_times(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("subject,image,reaction_time\nb,0,400\na,1,500\na,1,600\na,2,\nb,2,450\n")
    np.testing.assert_array_equal(load_reaction_times(path, 3), [[np.nan, 550, np.nan], [400, np.nan, 450]])
    np.savez(tmp_path / "people.npz", reaction_times=np.ones((2, 3)))
    assert load_reaction_times(tmp_path / "people.npz", 3).shape == (2, 3)
    for text, message in (
        ("subject,image,reaction_times\n", r"no column 'reaction_time', did you mean 'reaction_times'"),
        ("subject,image,reaction_time\na,3,400\n", r"line 2: expected an image in 0..2, got 3"),
        ("subject,image,reaction_time\na,0,400\na,x,400\n", "line 3: expected an image"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_reaction_times(path, 3)
    with pytest.raises(ValueError, match=r"expected reaction_times \[subjects, 4\]"):
        load_reaction_times(tmp_path / "people.npz", 4)


# ---------------------------------------------------------------- networks, report, command


def test_costs_are_those_of_shorter_unrolls() -> None:
    options: dict[str, Any] = {"image_size": 16, "widths": (4, 6, 8, 10, 12), "topdown_connections": False}
    net = blt_net_64(timesteps=4, **options)
    expected = [blt_net_64(timesteps=t, **options).schedule().multiplications()[0] for t in (1, 2, 3, 4)]
    assert costs(net).tolist() == expected
    assert len(costs(blt_net_64(timesteps=7, unroll="biological", **options))) == 7 - 5


def test_command_on_a_trained_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "i.h5", source="digits", size=16, num_train=96, num_val=40, num_test=60, num_testplus=40)
    quick = ["--widths", "4,6,8,10,12", "--timesteps", "3", "--batch-size", "16", "--epochs", "2", "--threads", "1", "--lr", "0.01"]
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *quick]) == 0
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "people.npz", reaction_times=300 + 50 * rng.random((4, 60)))
    words = ["react", str(tmp_path / "run" / "last.pt"), str(data), "--out", str(tmp_path / "out")]
    assert main([*words, "--human", str(tmp_path / "people.npz"), "--cumulative"]) == 0
    told = capfd.readouterr().out
    assert "60 images" in told
    assert "noise ceiling" in told
    with (tmp_path / "out" / "speed_accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 102
    assert all(float(row["mean_cost"]) > 0 for row in rows)
    with (tmp_path / "out" / "subjects.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("<svg") == 3
    assert ReactionTimeResult.load(tmp_path / "out" / "reaction_times.npz").n == 60
    for more, message in (
        (["--split", "tset"], "got 'tset', did you mean 'test'"),
        (["--human", "absent.csv"], "human: no such file"),
        (["--human", str(tmp_path / "people.npz"), "--limit", "9"], "limit: expected None together with human"),
        (["--unreached", "skip"], "unreached: expected one of"),
    ):
        assert main([*words, *more]) == 2
        assert message in capfd.readouterr().err


def test_report_without_people_or_costs(tmp_path: Path) -> None:
    log_probs, labels = sharpening()
    reducer = ReactionTimeReducer(C, T)
    reducer.update(log_probs, labels)
    paths = write_reaction_times(reducer.result(), tmp_path, unreached="exclude")
    assert {path.name for path in paths} >= {"report.html", "speed_accuracy.csv", "steps.csv", "reaction_times.npz"}
    assert all(path.exists() for path in paths)
