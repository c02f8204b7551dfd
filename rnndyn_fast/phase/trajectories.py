"""Trajectories of trials: principal components of the rates, the undisturbed run, the published phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rnndyn_fast.phase.systems import DynamicalSystem


@dataclass(frozen=True)
class PCA:
    """Principal components of rates: mean-centred, not scaled."""

    mean: np.ndarray  # [R]
    components: np.ndarray  # [D, R], rows of unit length
    variance_ratio: np.ndarray  # [min(samples, R)] share of the variance, all components

    def project(self, rates: np.ndarray) -> np.ndarray:  # [..., R] -> [..., D]
        """Coordinates on the components."""
        return (rates - self.mean) @ self.components.T


def fit_pca(rates: np.ndarray, dims: int = 3) -> PCA:  # [..., R]
    """Principal components of all rates stacked; the largest entry of every component is positive.

    Raises:
        ValueError: fewer than two samples, non-finite rates, or more components asked for than there are.

    >>> fit_pca(np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), dims=1).components.round(6)
    array([[0.6, 0.8]])
    """
    rates = np.asarray(rates, dtype=np.float64)
    samples = rates.reshape(-1, rates.shape[-1])
    if len(samples) < 2 or not 1 <= dims <= samples.shape[1]:
        raise ValueError(f"rates: expected at least 2 samples and {dims} dimensions, got {list(samples.shape)}")
    if not np.isfinite(samples).all():
        raise ValueError("rates: expected finite numbers")
    mean = samples.mean(0)
    centred = samples - mean
    # The covariance is small (R x R), the stack of samples is long.
    variance, vectors = np.linalg.eigh(centred.T @ centred)
    variance, vectors = np.clip(variance[::-1], 0, None), vectors[:, ::-1]
    components = vectors[:, :dims].T
    largest = np.abs(components).argmax(1)
    components = components * np.sign(components[np.arange(dims), largest])[:, None]
    total = variance.sum()
    ratio = variance / total if total > 0 else np.zeros_like(variance)
    return PCA(mean, components, ratio)


@dataclass(frozen=True)
class TrialRun:
    """What was shown to a system, and what it did."""

    sequences: np.ndarray  # [N, L] symbols
    onsets: np.ndarray  # [N, L] steps
    labels: np.ndarray  # [N] +1 or -1
    states: torch.Tensor  # [N, T, H]
    rates: np.ndarray  # [N, T, R]
    outputs: np.ndarray  # [N, T]

    @property
    def accuracy(self) -> float:
        """Share of trials whose answer at the last step is the label (`answers`)."""
        return float((answers(self.outputs[:, -1]) == self.labels).mean())

    def mean_squared_error(self, steps: int = 3) -> float:
        """Of the outputs of the last steps against the labels."""
        return float(((self.outputs[:, -steps:] - self.labels[:, None]) ** 2).mean())


def answers(outputs: np.ndarray) -> np.ndarray:  # [...] -> [...] int
    """+1 above 0.5, -1 below -0.5, otherwise 0, which is no answer.

    >>> answers(np.array([0.9, 0.2, -0.7])).tolist()
    [1, 0, -1]
    """
    return np.where(outputs > 0.5, 1, np.where(outputs < -0.5, -1, 0))


def run_trials(system: DynamicalSystem, sequences: np.ndarray, onsets: np.ndarray, timesteps: int | None = None) -> TrialRun:
    """Run a system on trials [N, L], noise-free; labels are +1 where the sum is 0 modulo the system's modulus."""
    states = system.run(system.pulses(sequences, onsets, timesteps))
    rates = system.rates(states)
    labels = np.where(np.asarray(sequences).sum(1) % system.modulus == 0, 1, -1)
    outputs = system.readout(rates).numpy()
    return TrialRun(np.asarray(sequences), np.asarray(onsets), labels, states, rates.numpy(), outputs)


def wrap(angle: np.ndarray) -> np.ndarray:
    """Angle in [-pi, pi).

    >>> wrap(np.array([np.pi, 3.0, -4.0])).round(4).tolist()
    [-3.1416, 3.0, 2.2832]
    """
    return (angle + np.pi) % (2 * np.pi) - np.pi


def pca_phase(pca: PCA, rates: np.ndarray) -> np.ndarray:  # [..., R] -> [...]
    """The published phase: atan2(PC2, PC1), origin at the mean of the PCA.

    It depends on the signs and on the mean of the PCA, and does not grow evenly in time: the mean is not the centre of the cycle,
    and the cycle is not a circle. ``InvariantCycle.asymptotic_phase`` has none of that.
    """
    projected = pca.project(rates)
    return np.arctan2(projected[..., 1], projected[..., 0])


def circular_mean(angles: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Direction of the mean unit vector."""
    return np.angle(np.exp(1j * angles).mean(axis=axis))
