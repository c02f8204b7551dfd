"""Fixed and slow points of a system without input, and where trials end if nothing more comes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.phase.systems import DynamicalSystem


@dataclass(frozen=True)
class FixedPoints:
    """Points where a system without input stands still, or nearly.

    Attributes:
        states: [F, H].
        speed: [F] norm of one step's change.
        eigenvalues: [F, H] complex, of the Jacobian there, by modulus.
        starts: [F] how many of the starts ended there.
        fixed: [F] True for fixed points, False for slow points (local minima of the speed).
    """

    states: Tensor
    speed: np.ndarray
    eigenvalues: np.ndarray
    starts: np.ndarray
    fixed: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    @property
    def unstable_dims(self) -> np.ndarray:  # [F]
        """Number of directions that grow: eigenvalues of modulus above 1."""
        return (np.abs(self.eigenvalues) > 1 + 1e-6).sum(1)

    @property
    def marginal_dims(self) -> np.ndarray:  # [F]
        """Number of directions that neither grow nor shrink (modulus within 1% of 1): those of a line attractor."""
        return (np.abs(np.abs(self.eigenvalues) - 1) <= 0.01).sum(1)

    @property
    def stable(self) -> np.ndarray:  # [F]
        """Fixed points at which every direction shrinks."""
        return self.fixed & (np.abs(self.eigenvalues[:, 0]) < 1 - 1e-9)


def find_fixed_points(
    system: DynamicalSystem, starts: Tensor, *, iterations: int = 60, tolerance: float = 1e-9, slow: float = 0.05, merge: float = 1e-3
) -> FixedPoints:  # [N, H]
    r"""Minimise the speed :math:`q(h) = \tfrac12 |F(h) - h|^2` from many starts at once (Levenberg-Marquardt, exact Jacobians).

    Where q reaches zero there is a fixed point, of any stability; where it stops at a positive minimum, a slow point, kept if it
    is slower than `slow` times the median speed of the starts. Points farther from the starts' mean than three times their
    root mean square distance from it are dropped: no trial comes there.

    Args:
        system: the system.
        starts: states of trials, for instance.
        iterations: at most that many steps.
        tolerance: speed of a fixed point, as a share of the starts' size.
        slow: see above; 0 keeps fixed points only.
        merge: fixed points closer than this share of the starts' spread are one; slow points, within twenty times of it.

    Raises:
        ValueError: no starts, or starts that are not finite.
    """
    if starts.dim() != 2 or not len(starts) or not bool(torch.isfinite(starts).all()):
        raise ValueError(f"starts: expected finite states [N, H], at least one, got {list(starts.shape)}")
    centre = starts.mean(0)
    spread = max(float((starts - centre).norm(dim=1).square().mean().sqrt()), 1e-12)
    size = max(float(starts.norm(dim=1).square().mean().sqrt()), 1e-12)
    typical = float(_residual(system, starts).norm(dim=1).median())
    states, gradient = _levenberg_marquardt(system, starts, iterations, tolerance * size)
    speed = _residual(system, states).norm(dim=1)
    fixed = speed <= tolerance * size
    # A minimum of q: nearly all of the residual lies where a move does not change it. (Steps become short there, as the Jacobian of
    # the residual loses a direction, so this is not asked to the last digit, and slow points are merged more generously.)
    still = ~fixed & (gradient <= 0.02 * speed) & (speed <= slow * typical)
    near = (states - centre).norm(dim=1) <= 3 * spread + merge * size
    index, counts = torch.zeros(0, dtype=torch.int64), []
    for mask, distance in ((fixed, merge * spread), (still, 20 * merge * spread)):
        kept = torch.nonzero(mask & near)[:, 0]
        kept = kept[speed[kept].argsort(stable=True)]
        unique, count = _merge(states[kept], distance)
        index, counts = torch.cat([index, kept[unique]]), counts + count
    jacobian = system.jacobian(states[index]) if len(index) else starts.new_zeros(0, starts.shape[1], starts.shape[1])
    eigenvalues = torch.linalg.eigvals(jacobian).numpy()
    order = np.argsort(-np.abs(eigenvalues), axis=1)
    return FixedPoints(
        states[index], speed[index].numpy(), np.take_along_axis(eigenvalues, order, axis=1), np.array(counts), fixed[index].numpy()
    )


def _residual(system: DynamicalSystem, states: Tensor) -> Tensor:
    with torch.no_grad():
        return system.step(states) - states


def _levenberg_marquardt(system: DynamicalSystem, starts: Tensor, iterations: int, target: float) -> tuple[Tensor, Tensor]:
    """States of least speed, and the norm of the gradient of q there."""
    states = starts.clone()
    eye = torch.eye(states.shape[1], dtype=states.dtype)
    damping = torch.full((len(states),), 1e-2, dtype=states.dtype)
    gradients = torch.full_like(damping, torch.inf)
    active = torch.arange(len(states))
    for _ in range(iterations):
        here = states[active]
        residual = _residual(system, here)
        slope = system.jacobian(here) - eye
        gradient = (slope.mT @ residual[:, :, None])[:, :, 0]
        gradients[active] = gradient.norm(dim=1)
        normal = slope.mT @ slope + damping[active, None, None] * eye
        move, _ = torch.linalg.solve_ex(normal, gradient)
        tried = here - move
        better = _residual(system, tried).norm(dim=1) < residual.norm(dim=1)
        states[active[better]] = tried[better]
        # Down to pure Newton steps where they work, up towards the gradient where they do not.
        damping[active] = torch.where(better, damping[active] * 0.1, damping[active] * 10).clamp(1e-14, 1e6)
        going = (residual.norm(dim=1) > target / 10) & (damping[active] < 1e5)
        active = active[going]
        if not len(active):
            break
    return states, gradients


def _merge(states: Tensor, distance: float) -> tuple[list[int], list[int]]:
    """Indices of points none of which lies closer than `distance` to an earlier one, and how many each stands for."""
    unique: list[int] = []
    counts: list[int] = []
    for k in range(len(states)):
        if unique:
            away = (states[unique] - states[k]).norm(dim=1)
            nearest = int(away.argmin())
            if float(away[nearest]) <= distance:
                counts[nearest] += 1
                continue
        unique.append(k)
        counts.append(1)
    return unique, counts


@dataclass(frozen=True)
class EndStates:
    """Where trials end if nothing more comes.

    Attributes:
        states: [N, H] after the long run.
        moving: [N] still in motion there.
        attractor: [N] index of the fixed attractor reached; -1 for moving ones.
        attractors: [A, H] the fixed attractors.
    """

    states: Tensor
    moving: np.ndarray
    attractor: np.ndarray
    attractors: Tensor

    @property
    def counts(self) -> np.ndarray:  # [A]
        """Trials per attractor."""
        return np.bincount(self.attractor[self.attractor >= 0], minlength=len(self.attractors))


def find_end_states(system: DynamicalSystem, states: Tensor, *, steps: int = 3000, merge: float = 0.02) -> EndStates:  # [N, H]
    """Let states run without input and group those that come to rest.

    At rest is a state whose last step is shorter than 1e-5 of the end states' size. Rests closer than `merge` times the end
    states' spread are one attractor (along a line attractor, whose every point is one, these are as many as there is room for).
    """
    end = system.relax(states, steps)
    size = max(float(end.norm(dim=1).square().mean().sqrt()), 1e-12)
    spread = float((end - end.mean(0)).norm(dim=1).square().mean().sqrt())
    moving = (_residual(system, end).norm(dim=1) > 1e-5 * size).numpy()
    rest = np.flatnonzero(~moving)
    unique, _ = _merge(end[rest], max(merge * spread, 1e-4 * size))
    attractors = end[rest[unique]] if unique else end[:0]
    attractor = np.full(len(end), -1)
    if unique:
        attractor[rest] = torch.cdist(end[rest], attractors).argmin(1).numpy()
    return EndStates(end, moving, attractor, attractors)
