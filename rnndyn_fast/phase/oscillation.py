"""Does the undisturbed system oscillate, and with what period?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rnndyn_fast.optional import require
from rnndyn_fast.phase.systems import DynamicalSystem
from rnndyn_fast.phase.trajectories import fit_pca

# Below this share of the rates' own size nothing moves: rounding of float64 over thousands of steps stays well under it.
STILL = 1e-6

Kind = Literal["fixed point", "periodic", "quasi-periodic", "irregular"]


def published_period(pc1: np.ndarray) -> int:  # [T]
    """The published detector: peaks of the first principal component at least 5 steps apart, and the most frequent distance
    between neighbours (the smallest of several such). Fewer than two peaks: -1.

    >>> published_period(np.cos(2 * np.pi * np.arange(100) / 20))
    20
    >>> published_period(np.arange(100.0))
    -1
    """
    require("scipy")

    from scipy.signal import find_peaks

    peaks, _ = find_peaks(pc1, distance=5)
    if len(peaks) < 2:
        return -1
    intervals, counts = np.unique(np.diff(peaks), return_counts=True)
    return int(intervals[counts.argmax()])


def birkhoff_weights(count: int) -> np.ndarray:  # [count]
    """Weights exp(-1 / (s (1 - s))), s = (n + 1) / (count + 1), with sum 1: averages along a quasi-periodic orbit converge faster
    than any power of its length instead of like 1 / length (Das, Saiki, Sander & Yorke 2017)."""
    s = np.arange(1, count + 1) / (count + 1)
    weights = np.exp(-1 / (s * (1 - s)))
    return weights / weights.sum()


@dataclass(frozen=True)
class Oscillation:
    """The long run of a system without input.

    Attributes:
        kind: see ``detect_oscillation``.
        period: steps per turn in the plane of the orbit's first two principal components, not a whole number in general; NaN for a
            fixed point or where the angle does not turn one way.
        return_steps: whole number of steps after which the orbit first comes back to itself (to within 5% of its size); -1 never.
        closest_return: least distance of a return, as a share of the orbit's size; and ``closest_return_steps``, when.
        amplitude: root mean square distance of the rates from their mean.
        published_period: of the first 100 steps, by the published detector.
    """

    kind: Kind
    period: float
    return_steps: int
    closest_return: float
    closest_return_steps: int
    amplitude: float
    published_period: int

    @property
    def oscillates(self) -> bool:
        """Whether it keeps moving."""
        return self.kind != "fixed point"


def detect_oscillation(
    system: DynamicalSystem, *, initial: torch.Tensor | None = None, transient: int = 2000, steps: int = 4000
) -> Oscillation:
    """Let a system run without input and say where it ends.

    After `transient` steps, of the rates of the next `steps`:

    - *fixed point*: they move by less than 1e-6 of their size;
    - *periodic*: the orbit comes back to within 1e-6 of its size, and does so again (locked: a closed orbit);
    - *quasi-periodic*: it winds around its centre one way, and returns ever closer without closing;
    - *irregular*: neither.

    The period is the reciprocal of the rotation number, by a weighted Birkhoff average of the angle's increments, so it is
    not tied to whole steps as peak-to-peak distances are. A rotation of more than half a turn per step cannot be told from one the
    other way: the period is at least 2.

    Args:
        system: the system.
        initial: [H] start; None: the system's own.
        transient, steps: lengths.

    Raises:
        ValueError: the run leaves the finite numbers.
    """
    start = system.initial_state if initial is None else initial
    first = system.rates(system.run_free(100, start[None]))[0].numpy()
    if not np.isfinite(first).all():
        raise ValueError(f"system: the free run of {system.name!r} left the finite numbers within 100 steps")
    published = published_period(fit_pca(first, 1).project(first)[:, 0]) if np.ptp(first) > 0 else -1
    states = system.relax(start[None], transient)
    rates = system.rates(system.run_free(steps, states))[0].numpy()
    if not np.isfinite(rates).all():
        raise ValueError(f"system: the free run of {system.name!r} left the finite numbers")
    centred = rates - rates.mean(0)
    amplitude = float(np.sqrt((centred**2).sum(1).mean()))
    size = float(np.sqrt((rates**2).sum(1).mean()))
    if amplitude <= STILL * max(size, 1e-12):
        return Oscillation("fixed point", np.nan, -1, 0.0, 1, amplitude, published)
    distance = np.linalg.norm(rates[1 : steps // 2] - rates[0], axis=1) / amplitude
    closest = int(distance.argmin())
    near = np.flatnonzero(distance < 0.05)
    period = _rotation_period(rates)
    if distance[closest] < STILL and np.linalg.norm(rates[2 * closest + 2] - rates[0]) < 2 * STILL * amplitude:
        kind: Kind = "periodic"
    else:
        kind = "quasi-periodic" if np.isfinite(period) and distance[closest] < 0.05 else "irregular"
    return_steps = int(near[0]) + 1 if len(near) else -1
    if kind == "periodic":
        closest = int(np.flatnonzero(distance < STILL)[0])
    return Oscillation(kind, period, return_steps, float(distance[closest]), closest + 1, amplitude, published)


def _rotation_period(rates: np.ndarray) -> float:  # [T, R]
    """Steps per turn in the plane of the first two components; NaN where the angle goes back and forth."""
    if rates.shape[1] < 2:
        return np.nan
    pca = fit_pca(rates, 2)
    if pca.variance_ratio[1] < STILL:
        # Along a line: two alternating points, or a swing that has no angle.
        along = pca.project(rates)[:, 0]
        return 2.0 if (along[1:] * along[:-1] < 0).all() else np.nan
    plane = pca.project(rates)
    increments = np.diff(np.angle(plane[:, 0] + 1j * plane[:, 1]))
    increments = (increments + np.pi) % (2 * np.pi) - np.pi
    turn = float(birkhoff_weights(len(increments)) @ increments)
    forward = increments * np.sign(turn)
    # Near half a turn per step the sign of single increments means nothing.
    if abs(turn) < 1e-9 or (forward.min() < 0 and abs(turn) < 2.5):
        return np.nan
    if forward.min() < 0:
        turn = float(birkhoff_weights(len(increments)) @ (increments % (2 * np.pi)))
        turn = min(turn, 2 * np.pi - turn)
    return 2 * np.pi / abs(turn)
