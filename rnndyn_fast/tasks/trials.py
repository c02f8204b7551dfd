"""A set of trials, and what tasks share: onsets of pulses, and input sequences made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Trials:
    """N trials: what was shown when, and what is right.

    inputs [N, T, I] float32; labels [N] float32, +1 (accept) or -1 (reject); sequences [N, K] int64, the symbols in their order;
    onsets [N, K] int64, the first step of each pulse.
    """

    inputs: Tensor
    labels: Tensor
    sequences: Tensor
    onsets: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Trials:
        """The trials at these indices (int64 or bool)."""
        return Trials(self.inputs[index], self.labels[index], self.sequences[index], self.onsets[index])


def draw_onsets(rng: np.random.Generator, trials: int, pulses: int, *, first: int, window: int, gap: int) -> NDArray[np.int64]:
    """Onsets [N, K] of K pulses, each row ascending and uniform over all sets of K steps in [first, first + window) that lie at least
    ``gap`` apart.

    No draw is rejected: K distinct values out of ``window - (K - 1) (gap - 1)`` are drawn and spread, the k-th by ``k (gap - 1)``.
    """
    free = window - (pulses - 1) * (gap - 1)
    # K distinct values of `free`, by Floyd's algorithm on all trials at once: uniform over sets.
    chosen = np.empty((trials, pulses), np.int64)
    for k in range(pulses):
        high = free - pulses + k
        value = rng.integers(0, high + 1, trials)
        taken = (chosen[:, :k] == value[:, None]).any(1)
        chosen[:, k] = np.where(taken, high, value)
    chosen.sort(1)
    return chosen + first + (gap - 1) * np.arange(pulses)


def make_trials(
    symbols: NDArray[np.float32],  # [S, I]
    sequences: NDArray[np.int64],  # [N, K]
    onsets: NDArray[np.int64],  # [N, K]
    accepted: NDArray[np.bool_],  # [N]
    timesteps: int,
    pulse_steps: int,
) -> Trials:
    """Trials whose input is the vector of each symbol, added at ``pulse_steps`` steps from its onset on."""
    count, pulses = sequences.shape
    inputs = np.zeros((count, timesteps, symbols.shape[1]), np.float32)
    rows = np.arange(count)
    for k in range(pulses):
        for step in range(pulse_steps):
            inputs[rows, onsets[:, k] + step] += symbols[sequences[:, k]]
    labels = np.where(accepted, 1, -1).astype(np.float32)
    return Trials(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(sequences), torch.from_numpy(onsets))
