"""Modulo arithmetic: pulses of symbols in a row, to be accepted where their sum is 0 modulo m."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rnndyn_fast.tasks.trials import Trials, draw_onsets, make_trials


def check_sizes(**sizes: int) -> None:
    """Raise unless every size is an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class ModuloArithmetic:
    """Trials in which symbols 0 .. modulus - 1 appear one after another as pulses; the label is +1 where their sum is 0 modulo
    ``modulus``, and -1 elsewhere.

    The rule of the card game SET for one feature is modulus 3 with three pulses: a + b + c = 0 (mod 3) means all equal or all
    different. The defaults are the published task.

    Args:
        modulus: m >= 2, which is the number of input channels too (one-hot).
        pulses: K, symbols per trial.
        timesteps: T.
        amplitude: height of a pulse.
        pulse_steps: length of a pulse in steps.
        first_onset: the earliest step at which a pulse may begin.
        window: number of steps at which pulses may begin, from ``first_onset`` on.
        gap: least number of steps between two onsets.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came; also where the pulses do not fit.

    Source: Murray, arXiv 2310.07908.

    >>> task = ModuloArithmetic()
    >>> trials = task.train_set(seed=1)
    >>> trials.inputs.shape, trials.labels.sum().item()
    (torch.Size([2500, 50, 3]), 0.0)
    """

    modulus: int = 3
    pulses: int = 3
    timesteps: int = 50
    amplitude: float = 5.0
    pulse_steps: int = 2
    first_onset: int = 5
    window: int = 40
    gap: int = 5

    def __post_init__(self) -> None:
        check_sizes(modulus=self.modulus, pulses=self.pulses, timesteps=self.timesteps, pulse_steps=self.pulse_steps)
        check_sizes(window=self.window, gap=self.gap, first_onset=self.first_onset + 1)
        if self.modulus < 2:
            raise ValueError(f"modulus: expected at least 2, got {self.modulus}")
        if not np.isfinite(self.amplitude):
            raise ValueError(f"amplitude: expected a finite number, got {self.amplitude}")
        needed = (self.pulses - 1) * self.gap + 1
        if needed > self.window:
            raise ValueError(
                f"pulses: {self.pulses} pulses at least {self.gap} steps apart need a window of {needed} steps, got window {self.window}"
            )
        last = self.first_onset + self.window - 1 + self.pulse_steps
        if last > self.timesteps:
            raise ValueError(
                f"window: a pulse of {self.pulse_steps} steps at the last onset {self.first_onset + self.window - 1} needs {last} time "
                f"steps, got {self.timesteps}"
            )

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.modulus

    @cached_property
    def symbols(self) -> NDArray[np.float32]:
        """Input vector of each symbol, [S, I]."""
        return (self.amplitude * np.eye(self.modulus)).astype(np.float32)

    def accepts(self, sequences: NDArray[np.int64]) -> NDArray[np.bool_]:  # [..., K] -> [...]
        """Whether the symbols of a sequence sum to 0."""
        return np.asarray(sequences).sum(-1) % self.modulus == 0

    def all_sequences(self) -> NDArray[np.int64]:
        """Every sequence of K symbols, [m^K, K], in lexicographic order."""
        if self.modulus**self.pulses > 10**6:
            raise ValueError(f"pulses: {self.modulus}^{self.pulses} sequences are too many to list")
        return np.array(list(itertools.product(range(self.modulus), repeat=self.pulses)), np.int64)

    def balanced(self, trials: int, seed: int) -> Trials:
        """``trials`` trials, half of them (the larger half, if odd) accepted; sequences uniform within a class; in random order."""
        check_sizes(trials=trials)
        rng = np.random.default_rng(seed)
        accepted = np.arange(trials) < (trials + 1) // 2
        # All symbols but the last are free; the last one makes the sum 0, or any other value: uniform over a class without rejection.
        sequences = rng.integers(0, self.modulus, (trials, self.pulses))
        wanted = np.where(accepted, 0, rng.integers(1, self.modulus, trials))
        sequences[:, -1] = (wanted - sequences[:, :-1].sum(1)) % self.modulus
        return self.trials(sequences[rng.permutation(trials)], rng)

    def exhaustive(self, per_accept: int, per_reject: int, seed: int) -> Trials:
        """Every accepted sequence ``per_accept`` times and every other one ``per_reject`` times, in random order."""
        check_sizes(per_accept=per_accept, per_reject=per_reject)
        rng = np.random.default_rng(seed)
        every = self.all_sequences()
        sequences = np.repeat(every, np.where(self.accepts(every), per_accept, per_reject), axis=0)
        return self.trials(sequences[rng.permutation(len(sequences))], rng)

    def train_set(self, seed: int, trials: int = 2500) -> Trials:
        """The published training set: 2500 balanced trials."""
        return self.balanced(trials, seed)

    def validation_set(self, seed: int) -> Trials:
        """The published validation set: accepted sequences 50 times, others 25 times (900 trials with modulus 3)."""
        return self.exhaustive(50, 25, seed)

    def test_set(self, seed: int) -> Trials:
        """The published test set: accepted sequences 30 times, others 15 times (540 trials with modulus 3)."""
        return self.exhaustive(30, 15, seed)

    def trials(self, sequences: NDArray[np.int64], rng: np.random.Generator) -> Trials:  # [N, K]
        """Trials of given sequences, with onsets drawn from ``rng``: uniform over all that fit."""
        sequences = np.asarray(sequences, np.int64)
        if sequences.ndim != 2 or sequences.shape[1] != self.pulses:
            raise ValueError(f"sequences: expected [N, K] with K = {self.pulses}, got {list(sequences.shape)}")
        if sequences.size and (sequences.min() < 0 or sequences.max() >= self.modulus):
            raise ValueError(f"sequences: expected symbols in [0, {self.modulus}), got [{sequences.min()}, {sequences.max()}]")
        onsets = draw_onsets(rng, len(sequences), self.pulses, first=self.first_onset, window=self.window, gap=self.gap)
        return self.trials_at(sequences, onsets)

    def trials_at(self, sequences: NDArray[np.int64], onsets: NDArray[np.int64]) -> Trials:  # [N, K] both
        """Trials of given sequences and onsets."""
        sequences, onsets = np.asarray(sequences, np.int64), np.asarray(onsets, np.int64)
        if sequences.shape != onsets.shape:
            raise ValueError(f"onsets: expected the shape of sequences, {list(sequences.shape)}, got {list(onsets.shape)}")
        if onsets.size and (onsets.min() < 0 or onsets.max() + self.pulse_steps > self.timesteps):
            raise ValueError(f"onsets: expected pulses within {self.timesteps} steps, got onsets in [{onsets.min()}, {onsets.max()}]")
        return make_trials(self.symbols, sequences, onsets, self.accepts(sequences), self.timesteps, self.pulse_steps)
