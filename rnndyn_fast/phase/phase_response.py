"""What a pulse does to the phase: response curves, shift per symbol, and what sums of shifts predict."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from rnndyn_fast.phase.limit_cycle import InvariantCycle
from rnndyn_fast.phase.systems import DynamicalSystem
from rnndyn_fast.phase.trajectories import PCA, circular_mean, pca_phase, wrap


@dataclass(frozen=True)
class PhaseResponse:
    """Phase shifts by pulses of every symbol at every phase.

    Attributes:
        shift: [K, P, J] radians: symbol, when the pulse came, when the shift was read (J = 1 where that makes no difference).
        pulse_phase: [P] phase of the undisturbed run when the pulse comes.
        definition: "published" or "asymptotic".
    """

    shift: np.ndarray
    pulse_phase: np.ndarray
    definition: str

    @property
    def curve(self) -> np.ndarray:  # [K, P]
        """Response curves as published: mean over the times of reading."""
        return self.shift.mean(2)

    @property
    def band(self) -> np.ndarray:  # [K, P]
        """Standard deviation over the times of reading: what the definition of the phase adds."""
        return self.shift.std(2)

    @property
    def mean(self) -> np.ndarray:  # [K]
        """Shift per symbol as published: plain mean over phases and times of reading."""
        return self.shift.mean((1, 2))

    @property
    def circular_mean(self) -> np.ndarray:  # [K]
        """Shift per symbol, averaged as directions: right also where single shifts wrap around."""
        return circular_mean(self.shift, axis=(1, 2))

    @property
    def flatness(self) -> np.ndarray:  # [K]
        """Circular standard deviation of the curve over the pulse's phase: 0 for a shift that does not ask when."""
        around = circular_mean(self.shift, axis=2)
        return circular_std(around, axis=1)

    @property
    def deviation(self) -> np.ndarray:  # [K]
        """Distance of the shifts from 2 pi k / K, k the symbol, for the sense of rotation that fits better."""
        ideal = 2 * np.pi * np.arange(len(self.shift)) / len(self.shift)
        both = np.stack([np.abs(wrap(self.circular_mean - sign * ideal)) for sign in (1, -1)])
        return both[both.max(1).argmin()]


def circular_std(angles: np.ndarray, axis: int) -> np.ndarray:
    """sqrt(-2 log R), R the length of the mean unit vector.

    >>> circular_std(np.array([np.pi - 0.1, -np.pi + 0.1]), axis=0).round(3)
    np.float64(0.1)
    """
    length = np.abs(np.exp(1j * angles).mean(axis=axis))
    return np.sqrt(2 * np.abs(np.log(np.clip(length, 1e-300, 1.0))))


def published_phase_response(system: DynamicalSystem, pca: PCA, period: int) -> PhaseResponse:
    """The published procedure, all pulses in one batch.

    Symbol i at onset P + t, t = 0..P-1, in a run of 4P steps; the shift is the phase difference to the undisturbed run at
    steps 3P..4P-1, wrapped to [-pi, pi).

    Args:
        system: the system.
        pca: of trials, two components or more.
        period: P, whole steps.

    Raises:
        ValueError: a period below 2.
    """
    if period < 2:
        raise ValueError(f"period: expected at least 2 steps, got {period}: without an oscillation there is no phase")
    symbols, onsets = np.divmod(np.arange(system.modulus * period), period)
    inputs = system.pulses(symbols[:, None], onsets[:, None] + period, 4 * period)
    # One more trial without pulse is the undisturbed run.
    inputs = torch.cat([inputs, torch.zeros_like(inputs[:1])])
    phase = pca_phase(pca, system.rates(system.run(inputs)).numpy())
    null = phase[-1]
    shift = wrap(phase[:-1, 3 * period :] - null[3 * period :]).reshape(system.modulus, period, period)
    return PhaseResponse(shift, null[period : 2 * period], "published")


def asymptotic_phase_response(system: DynamicalSystem, cycle: InvariantCycle, points: int = 32) -> PhaseResponse:
    """Shifts of the asymptotic phase by a pulse that comes at `points` evenly spaced phases of the cycle.

    There is no "when it is read": once the pulse is over the asymptotic phase advances evenly, so the difference to the
    undisturbed run is one number.
    """
    phases = 2 * np.pi * np.arange(points) / points
    states = cycle.state_at(phases).repeat(system.modulus, 1)
    symbols = np.repeat(np.arange(system.modulus), points)
    width = system.pulse_width
    inputs = system.pulses(symbols[:, None], np.zeros((len(symbols), 1), dtype=int), width)
    after = system.run(inputs, states)[:, -1]
    expected = np.tile(phases, system.modulus) + width * cycle.turn
    shift = wrap(cycle.asymptotic_phase(after) - expected).reshape(system.modulus, points, 1)
    return PhaseResponse(shift, phases, "asymptotic")


@dataclass(frozen=True)
class MultisetPrediction:
    """End phases that the shifts per symbol predict, symbols added whatever their order."""

    multisets: np.ndarray  # [M, L]
    residues: np.ndarray  # [M] sum modulo K
    phases: np.ndarray  # [M] in [0, 2 pi)

    @property
    def spread(self) -> float:
        """Largest distance of a phase from the circular mean of its residue."""
        return max(float(np.abs(wrap(group - circular_mean(group))).max()) for group in self._groups())

    @property
    def gap(self) -> float:
        """Least distance between phases of different residues."""
        groups = self._groups()
        pairs = itertools.combinations(groups, 2)
        return min(float(np.abs(wrap(a[:, None] - b[None, :])).min()) for a, b in pairs)

    @property
    def separates(self) -> bool:
        """Whether the residues form clusters: wider apart than any is wide."""
        return self.gap > 2 * self.spread

    def _groups(self) -> list[np.ndarray]:
        return [self.phases[self.residues == residue] for residue in np.unique(self.residues)]


def predict_multisets(shift_per_symbol: np.ndarray, length: int = 3) -> MultisetPrediction:  # [K]
    """Add the constant shifts of every multiset of `length` symbols (10 for 3 of 3), modulo 2 pi.

    >>> predict_multisets(2 * np.pi * np.arange(3) / 3).separates
    True
    """
    modulus = len(shift_per_symbol)
    multisets = np.array(list(itertools.combinations_with_replacement(range(modulus), length)))
    phases = np.asarray(shift_per_symbol)[multisets].sum(1) % (2 * np.pi)
    return MultisetPrediction(multisets, multisets.sum(1) % modulus, phases)
