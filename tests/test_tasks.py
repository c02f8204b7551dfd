"""Tasks: the published trials, the distribution of the rejection-free sampler, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import golden

from rnndyn_fast.tasks import ModuloArithmetic, SetGame, draw_colours
from rnndyn_fast.tasks.trials import draw_onsets


def test_trials_are_the_published_ones() -> None:
    data = golden("ctrnn_m3a")
    trials = ModuloArithmetic().trials_at(data["sequences"], data["pulse_index"])
    assert np.array_equal(trials.inputs, data["inputs"])
    assert np.array_equal(trials.labels, data["labels"])


@pytest.mark.parametrize(("window", "pulses", "gap"), [(8, 2, 3), (9, 3, 3), (6, 1, 5), (7, 3, 1), (9, 3, 4)])
def test_onsets_are_uniform_over_all_that_fit(window: int, pulses: int, gap: int) -> None:
    """Against what redrawing until the gaps fit would give: every set of onsets that fits, equally often."""
    fits = [c for c in itertools.combinations(range(2, 2 + window), pulses) if all(b - a >= gap for a, b in itertools.pairwise(c))]
    draws = 2000 * len(fits)
    onsets = draw_onsets(np.random.default_rng(1), draws, pulses, first=2, window=window, gap=gap)
    found, counts = np.unique(onsets, axis=0, return_counts=True)
    assert [tuple(row) for row in found.tolist()] == fits
    chi_squared = float(((counts - 2000) ** 2 / 2000).sum())
    freedom = len(fits) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_published_counts_of_onsets() -> None:
    """4960 triples and 42504 quintuples fit (C(32, 3) and C(24, 5))."""
    for pulses, count in ((3, 4960), (5, 42504)):
        onsets = ModuloArithmetic(pulses=pulses).balanced(200_000, seed=0).onsets
        assert int(onsets.min()) == 5
        assert int(onsets.max()) == 44
        assert int(onsets.diff(dim=1).min()) == 5
        distinct = len(onsets.unique(dim=0))
        expected = count * (1 - np.exp(-200_000 / count))  # of that many draws, by a Poisson law
        assert distinct <= count
        assert abs(distinct - expected) < 5 * (count * np.exp(-200_000 / count)) ** 0.5 + 1


def test_labels_are_the_rule_of_the_game() -> None:
    """Three pulses modulo 3: accepted if all equal or all different. Otherwise by the sum."""
    task = ModuloArithmetic()
    for sequence, accepted in zip(task.all_sequences(), task.accepts(task.all_sequences()), strict=True):
        assert accepted == (len(set(sequence.tolist())) != 2)
    assert int(task.accepts(task.all_sequences()).sum()) == 9
    five = ModuloArithmetic(modulus=5, pulses=2)
    trials = five.balanced(500, seed=3)
    assert trials.inputs.shape == (500, 50, 5)
    assert torch.equal(trials.labels == 1, trials.sequences.sum(1) % 5 == 0)
    assert int((trials.labels == 1).sum()) == 250
    pulses = trials.inputs.reshape(500, -1).sum(1)
    assert torch.equal(pulses, torch.full((500,), 2 * 2 * 5.0))  # two pulses of two steps of height 5


def test_sequences_are_uniform_within_a_class() -> None:
    trials = ModuloArithmetic().balanced(36_000, seed=2)
    for label, kinds in ((1, 9), (-1, 18)):
        _, counts = trials.sequences[trials.labels == label].unique(dim=0, return_counts=True)
        expected = 18_000 / kinds
        assert len(counts) == kinds
        assert float(((counts - expected) ** 2 / expected).sum()) < kinds + 5 * (2 * kinds) ** 0.5


def test_published_sets() -> None:
    task = ModuloArithmetic()
    for trials, accept, reject in ((task.validation_set(1), 50, 25), (task.test_set(1), 30, 15)):
        assert len(trials) == 9 * accept + 18 * reject
        kinds, counts = trials.sequences.unique(dim=0, return_counts=True)
        assert counts.tolist() == [accept if int(k.sum()) % 3 == 0 else reject for k in kinds]
        assert float(trials.labels.sum()) == 0
    train = task.train_set(1)
    assert len(train) == 2500
    assert float(train.labels.sum()) == 0
    assert len(set(train.labels[:1000].tolist())) == 2  # mixed


def test_reproducible_by_seed() -> None:
    task = ModuloArithmetic()
    first, again, other = task.train_set(5), task.train_set(5), task.train_set(6)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.onsets, again.onsets)
    assert not torch.equal(first.onsets, other.onsets)
    some = first.select(torch.tensor([3, 1]))
    assert len(some) == 2
    assert torch.equal(some.inputs[0], first.inputs[3])


def test_set_game() -> None:
    task = SetGame(draw_colours(seed=3))
    trials = task.train_set(seed=4)
    assert len(trials) == 1080
    assert float(trials.labels.sum()) == 0
    assert int(trials.onsets.min()) >= 3
    assert int(trials.onsets.max()) <= 39
    n, k = 7, 1
    shown = trials.inputs[n, int(trials.onsets[n, k])]
    torch.testing.assert_close(shown, torch.from_numpy(task.colours[int(trials.sequences[n, k])]))
    assert int((trials.inputs[n].abs().sum(1) > 0).sum()) == 6
    assert np.array_equal(draw_colours(3), task.colours)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"modulus": 1}, ValueError, "modulus: expected at least 2, got 1"),
        ({"modulus": 0}, ValueError, "modulus: expected at least 1"),
        ({"modulus": 2.5}, TypeError, "modulus: expected an integer, got float"),
        ({"pulses": 9}, ValueError, "pulses: 9 pulses at least 5 steps apart need a window of 41 steps, got window 40"),
        ({"timesteps": 45}, ValueError, "window: a pulse of 2 steps at the last onset 44 needs 46 time steps, got 45"),
        ({"gap": 0}, ValueError, "gap: expected at least 1"),
        ({"amplitude": float("inf")}, ValueError, "amplitude: expected a finite number"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ModuloArithmetic(**options)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    task = ModuloArithmetic()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"sequences: expected \[N, K\] with K = 3"):
        task.trials(np.zeros((4, 2), np.int64), rng)
    with pytest.raises(ValueError, match=r"sequences: expected symbols in \[0, 3\)"):
        task.trials(np.full((4, 3), 3), rng)
    with pytest.raises(ValueError, match="onsets: expected the shape"):
        task.trials_at(np.zeros((4, 3), np.int64), np.zeros((4, 2), np.int64))
    with pytest.raises(ValueError, match="onsets: expected pulses within 50 steps"):
        task.trials_at(np.zeros((1, 3), np.int64), np.array([[0, 5, 49]]))
    with pytest.raises(ValueError, match="trials: expected at least 1"):
        task.balanced(0, 1)
    with pytest.raises(ValueError, match="colours: expected"):
        SetGame(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="colours: expected finite"):
        SetGame(np.full((3, 5), np.nan, np.float32))
