"""The limit cycle of a discrete-time system: an invariant closed curve, its phase, its return map, its multipliers.

Sampled in time, a limit cycle is a closed curve on which the state takes steps; its period need not be a whole number of steps.
Two cases, told apart by ``detect_oscillation``: the orbit never closes and fills the curve (*quasi-periodic*), or the
steps lock to it and the orbit closes after q steps and p turns (*periodic*). Multipliers of a closed orbit are the eigenvalues
of the product of its q Jacobians. Where there is no closed orbit, their place is taken by Lyapunov exponents, which for a closed
orbit are log |multiplier| / q: both are given per turn, so that they can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.optional import require
from rnndyn_fast.phase.oscillation import Oscillation, birkhoff_weights, detect_oscillation
from rnndyn_fast.phase.systems import DynamicalSystem
from rnndyn_fast.phase.trajectories import PCA, fit_pca, wrap

_GRID = 512  # phases at which the curve is kept


@dataclass(frozen=True)
class InvariantCycle:
    r"""The closed curve on which a system without input goes round.

    Its phase is the coordinate in which every step is the same turn: where the orbit is dense on the curve there is one such
    coordinate and the orbit's own step count is it, :math:`\theta(F^n h) = \theta(h) + n\,\Omega`. The *asymptotic phase* of any state
    that is drawn to the curve is that of the point with which it ends up in step (states of equal asymptotic phase form an
    isochron). Unlike an angle in a PCA plane it advances evenly, does not depend on a centre, and a shift of it stays what it is
    however late it is read.

    Phase 0 is the asymptotic phase of the system's initial state, and phases grow in time.

    Attributes:
        system: whose cycle it is.
        oscillation: its long run.
        turn: Omega, radians per step.
        settle: steps after which a state near the curve counts as on it.
        size: root mean square distance of the curve's states from their mean.
    """

    system: DynamicalSystem
    oscillation: Oscillation
    turn: float
    settle: int
    size: float
    _plane: PCA
    _angles: np.ndarray  # [A] ascending angles in the plane
    _phases: np.ndarray  # [A] ascending phases there
    _grid: Tensor  # [_GRID, H] states at even phases
    _offset: float

    @property
    def period(self) -> float:
        """Steps per turn."""
        return 2 * math.pi / self.turn

    def angle(self, states: Tensor) -> np.ndarray:  # [..., H] -> [...]
        """Angle about the curve's centre in its plane, growing in time."""
        plane = self._plane.project(self.system.rates(states).numpy())
        return np.arctan2(plane[..., 1], plane[..., 0])

    def phase_on_cycle(self, states: Tensor) -> np.ndarray:  # [..., H] -> [...]
        """Phase in [-pi, pi) of states on the curve."""
        return wrap(np.interp(self.angle(states), self._angles, self._phases) - self._offset)

    def state_at(self, phases: np.ndarray) -> Tensor:  # [N] -> [N, H]
        """States on the curve."""
        position = (np.asarray(phases) + self._offset) / (2 * np.pi) % 1 * _GRID
        low = np.floor(position).astype(int)
        part = torch.as_tensor(position - low)[:, None]
        return torch.lerp(self._grid[low % _GRID], self._grid[(low + 1) % _GRID], part)

    def distance(self, states: Tensor) -> np.ndarray:  # [N, H] -> [N]
        """Distance from the curve's point of the same angle, as a share of the curve's size."""
        return (states - self.state_at(self.phase_on_cycle(states))).norm(dim=1).numpy() / self.size

    def asymptotic_phase(self, states: Tensor) -> np.ndarray:  # [N, H] -> [N]
        """Asymptotic phase in [-pi, pi); NaN for states that are not drawn to this curve (5% of its size after settling)."""
        flat = states.reshape(-1, states.shape[-1])
        later = self.system.relax(flat, self.settle)
        phase = wrap(self.phase_on_cycle(later) - self.settle * self.turn)
        return np.where(self.distance(later) < 0.05, phase, np.nan).reshape(states.shape[:-1])


def find_cycle(
    system: DynamicalSystem,
    *,
    oscillation: Oscillation | None = None,
    initial: Tensor | None = None,
    transient: int = 2000,
    steps: int = 4000,
    settle: int = 320,
) -> InvariantCycle:
    """The invariant cycle that a system without input comes to.

    Args:
        system: the system.
        oscillation: what ``detect_oscillation`` said, if it has been asked.
        initial: [H] start; None: the system's own.
        transient, steps: length of the run before, and of the run that samples the curve.
        settle: see ``InvariantCycle``.

    Raises:
        ValueError: the system does not oscillate, or its orbit is not a curve that winds once around its centre.
    """
    start = system.initial_state if initial is None else initial
    seen = oscillation or detect_oscillation(system, initial=initial)
    if seen.kind not in ("periodic", "quasi-periodic") or not np.isfinite(seen.period):
        raise ValueError(f"system: expected a limit cycle, {system.name!r} ends in a {seen.kind} (period {seen.period:.4g})")
    states = system.run_free(steps, system.relax(start[None], transient))[0]
    rates = system.rates(states).numpy()
    plane = fit_pca(rates, 2)
    if _turn(plane.project(rates)) < 0:
        plane = PCA(plane.mean, plane.components * np.array([[1.0], [-1.0]]), plane.variance_ratio)
    turn = _turn(plane.project(rates))
    if seen.kind == "periodic":  # the orbit repeats itself
        states = states[: seen.closest_return_steps]
        turn = 2 * np.pi * round(turn * len(states) / (2 * np.pi)) / len(states)
    phases = turn * np.arange(len(states)) % (2 * np.pi)
    coordinates = plane.project(system.rates(states).numpy())
    angles = np.arctan2(coordinates[:, 1], coordinates[:, 0])
    order = angles.argsort()
    unwrapped = np.unwrap(phases[order])
    if (np.diff(unwrapped) < -1e-6).any() or not np.isclose(unwrapped[-1] - unwrapped[0], 2 * np.pi, atol=2 * np.pi / min(len(states), 20)):
        raise ValueError(f"system: the orbit of {system.name!r} is not a curve that winds once around its centre")
    # One turn more on either side, so that interpolation need not know where the circle is cut.
    table = np.concatenate([angles[order] + k * 2 * np.pi for k in (-1, 0, 1)])
    values = np.concatenate([unwrapped + k * 2 * np.pi for k in (-1, 0, 1)])
    grid = _resample(states.numpy(), phases)
    size = float((states - states.mean(0)).pow(2).sum(1).mean().sqrt())
    cycle = InvariantCycle(system, seen, turn, settle, size, plane, table, values, torch.as_tensor(grid), 0.0)
    origin = float(cycle.asymptotic_phase(start[None])[0])
    return InvariantCycle(
        system, seen, turn, settle, size, plane, table, values, torch.as_tensor(grid), 0.0 if np.isnan(origin) else origin
    )


def _turn(plane: np.ndarray) -> float:  # [T, 2]
    """Mean turn per step, in (-pi, pi]."""
    increments = np.diff(np.arctan2(plane[:, 1], plane[:, 0]))
    # Around the mean direction, so that turns near half a circle are not torn apart.
    middle = float(np.angle(np.exp(1j * increments).mean()))
    increments = middle + wrap(increments - middle)
    turn = float(birkhoff_weights(len(increments)) @ increments)
    return turn


def _resample(states: np.ndarray, phases: np.ndarray) -> np.ndarray:  # [L, H], [L] -> [_GRID, H]
    """States at even phases: linear between dense samples, a periodic cubic spline through few."""
    require("scipy")

    from scipy.interpolate import CubicSpline, interp1d

    order = phases.argsort()
    phases, states = phases[order], states[order]
    kept = np.concatenate([[True], np.diff(phases) > 1e-9])
    phases, states = phases[kept], states[kept]
    wanted = 2 * np.pi * np.arange(_GRID) / _GRID
    if len(phases) < 4 * _GRID:
        closed = np.concatenate([states, states[:1]])
        spline = CubicSpline(np.append(phases, phases[0] + 2 * np.pi), closed, bc_type="periodic")
        return spline(np.where(wanted < phases[0], wanted + 2 * np.pi, wanted))
    around = np.concatenate([phases[-1:] - 2 * np.pi, phases, phases[:1] + 2 * np.pi])
    return interp1d(around, np.concatenate([states[-1:], states, states[:1]]), axis=0)(wanted)


@dataclass(frozen=True)
class PoincareReturns:
    """Passages through the half-plane where the cycle's angle is 0, between steps by interpolation of four points."""

    times: np.ndarray  # [N, C] steps since the start
    distances: np.ndarray  # [N, C] of the passage from where the cycle itself passes, as a share of the cycle's size

    @property
    def return_times(self) -> np.ndarray:  # [N, C - 1]
        """Steps between passages."""
        return np.diff(self.times, axis=1)


def poincare_returns(cycle: InvariantCycle, states: Tensor, turns: int) -> PoincareReturns:  # [N, H]
    """Follow states for some turns and take their passages of the section at angle 0.

    Distances shrink by the modulus of the leading transverse multiplier per turn: what the Jacobians say, measured without them.

    Raises:
        ValueError: a state does not pass that often.
    """
    steps = math.ceil((turns + 2.5) * cycle.period) + 4
    on_cycle = cycle.state_at(np.zeros(1))
    orbit = torch.cat([torch.cat([on_cycle, states])[:, None], cycle.system.run_free(steps, torch.cat([on_cycle, states]))], dim=1)
    angles = np.unwrap(cycle.angle(orbit), axis=1)
    times, points = [], []
    for path, angle in zip(orbit.numpy(), angles, strict=True):
        crossed = np.flatnonzero(np.floor(angle[2:-1] / (2 * np.pi)) > np.floor(angle[1:-2] / (2 * np.pi))) + 1
        if len(crossed) < turns + 1:
            raise ValueError(f"states: expected {turns + 1} passages of the section, got {len(crossed)}: not on this cycle")
        crossed = crossed[: turns + 1]
        target = 2 * np.pi * np.floor(angle[crossed + 1] / (2 * np.pi))
        around = np.stack([angle[crossed + k] for k in (-1, 0, 1, 2)], axis=1) - target[:, None]
        part = _cubic_root(around)
        weights = _lagrange(part)  # [C, 4]
        times.append(crossed + part)
        points.append(np.einsum("ck,ckh->ch", weights, np.stack([path[crossed + k] for k in (-1, 0, 1, 2)], axis=1)))
    distances = np.linalg.norm(np.stack(points[1:]) - points[0][None], axis=2) / cycle.size
    return PoincareReturns(np.stack(times[1:]), distances)


def _lagrange(s: np.ndarray) -> np.ndarray:  # [C] -> [C, 4]
    """Weights of values at -1, 0, 1, 2 for the value at s."""
    return np.stack([-s * (s - 1) * (s - 2) / 6, (s + 1) * (s - 1) * (s - 2) / 2, -(s + 1) * s * (s - 2) / 2, (s + 1) * s * (s - 1) / 6], 1)


def _cubic_root(values: np.ndarray) -> np.ndarray:  # [C, 4] -> [C]
    """Where the cubic through four growing values is 0, between the second and the third."""
    low, high = np.zeros(len(values)), np.ones(len(values))
    for _ in range(50):
        middle = (low + high) / 2
        below = (_lagrange(middle) * values).sum(1) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def lyapunov_exponents(system: DynamicalSystem, state: Tensor, *, steps: int = 2000, count: int = 6) -> np.ndarray:  # [H] -> [count]
    """Leading exponents per step along the orbit from `state`, largest first: QR of exact Jacobians applied one after the other.

    Growth rates are averaged with the weights of ``birkhoff_weights``, which for quasi-periodic orbits makes a few
    thousand steps enough for eight digits.
    """
    count = min(count, len(state))
    frame = np.linalg.qr(np.random.default_rng(0).standard_normal((len(state), count)))[0]
    orbit = torch.cat([state[None], system.run_free(steps - 1, state[None])[0]])
    growth = np.empty((steps, count))
    for first in range(0, steps, 200):
        for offset, jacobian in enumerate(system.jacobian(orbit[first : first + 200]).numpy()):
            frame, triangle = np.linalg.qr(jacobian @ frame)  # less to call than torch's, thousands of times
            growth[first + offset] = np.log(np.maximum(np.abs(triangle.diagonal()), 1e-300))
    # The frame needs time to turn into the leading directions.
    warm = steps // 10
    return np.sort(birkhoff_weights(steps - warm) @ growth[warm:])[::-1]


@dataclass(frozen=True)
class ClosedOrbit:
    """An orbit that closes after `steps` steps and `turns` turns."""

    state: Tensor  # [H] one of its points
    steps: int
    turns: int
    residual: float  # norm of F^steps(state) - state
    multipliers: np.ndarray  # [H] complex, by modulus: eigenvalues of the product of its Jacobians


def find_closed_orbit(system: DynamicalSystem, state: Tensor, steps: int, *, turns: int = 1, iterations: int = 30) -> ClosedOrbit:
    """Newton's method on F^steps(h) = h, least squares, so that a neutral direction does no harm.

    Raises:
        ValueError: it does not come below 1e-9: there is no such orbit near `state`.
    """
    best, residual = state.clone(), math.inf
    product = torch.eye(len(state), dtype=state.dtype)
    for _ in range(iterations):
        orbit = torch.cat([state[None], system.run_free(steps, state[None])[0]])
        error = orbit[-1] - state
        norm = float(error.norm())
        if not norm < residual:
            break
        best, residual = state, norm
        product = torch.eye(len(state), dtype=state.dtype)
        for jacobian in system.jacobian(orbit[:-1]):
            product = jacobian @ product
        # Singular values below 1e-7 are the direction along a cycle that is not locked: there is nothing to solve in it.
        state = state - torch.linalg.lstsq(product - torch.eye(len(state)), error, rcond=1e-7, driver="gelsd").solution
    if not residual < 1e-9 * max(1.0, float(best.norm())):
        raise ValueError(f"state: no orbit of {steps} steps near it, the best misses itself by {residual:.2g}")
    multipliers = torch.linalg.eigvals(product).numpy()
    return ClosedOrbit(best, steps, turns, residual, multipliers[np.argsort(-np.abs(multipliers))])


@dataclass(frozen=True)
class Floquet:
    """How fast a cycle forgets: multipliers per turn, the first that of the phase."""

    lyapunov: np.ndarray  # [count] per step
    period: float  # steps per turn
    closed_orbit: ClosedOrbit | None  # where the orbit closes

    @property
    def multipliers(self) -> np.ndarray:  # [count]
        """Moduli per turn, exp(exponent * period); 1 for the phase of a cycle that is not locked."""
        return np.exp(self.lyapunov * self.period)

    @property
    def stable(self) -> bool:
        """Whether every direction but that of the phase contracts, and the phase does not expand."""
        return bool(self.lyapunov[0] < 1e-4 and (self.lyapunov[1:] < -1e-6).all())


def floquet(cycle: InvariantCycle, *, steps: int = 2000, count: int = 6) -> Floquet:
    """Multipliers of a cycle per turn, from exact Jacobians; with the closed orbit where the orbit closes."""
    state = cycle.state_at(np.zeros(1))
    state = cycle.system.relax(state, cycle.settle)[0]
    closed = None
    if cycle.oscillation.kind == "periodic":
        length = cycle.oscillation.closest_return_steps
        start = cycle.system.relax(cycle.system.initial_state[None], 4000)[0]
        closed = find_closed_orbit(cycle.system, start, length, turns=round(length / cycle.period))
    return Floquet(lyapunov_exponents(cycle.system, state, steps=steps, count=count), cycle.period, closed)
