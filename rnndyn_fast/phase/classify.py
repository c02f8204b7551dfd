"""Which kind of solution a network found, by criteria that are written down (docs/phase_analysis.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from rnndyn_fast.optional import require
from rnndyn_fast.phase.automaton import cluster
from rnndyn_fast.phase.limit_cycle import InvariantCycle
from rnndyn_fast.phase.phase_response import circular_std
from rnndyn_fast.phase.systems import DynamicalSystem
from rnndyn_fast.phase.trajectories import PCA, TrialRun, circular_mean, fit_pca, wrap

# A turn of more than an eighth of the circle per step jumps across it: drawn as lines, a star.
STAR_PERIOD = 8.0
# Share of the end states' variance along one axis from which they are a line.
LINE_SHARE = 0.85


# Below this accuracy there is no solution to name.
SOLVED = 0.9


class Solution(enum.Enum):
    """Kinds of solution. Phase code, star, line, hexagon and lattice are the publication's names."""

    UNSOLVED = "unsolved"  # fewer than nine of ten trials right

    PHASE_CODE = "phase code"  # a limit cycle on which the answer is a shift of the phase
    LIMIT_CYCLE = "limit cycle"  # a limit cycle, but the sum is not in its phase
    STAR = "star"  # a cycle gone round in fewer than 8 steps
    IRREGULAR = "irregular"  # endless motion that is neither
    MIXED = "mixed"  # some trials end in motion, others at rest
    LINE = "line"  # rests along one dimension
    HEXAGON = "hexagon"  # six rests around a ring, with or without one in the middle
    LATTICE = "lattice"  # other rests in two or more dimensions
    FIXED_POINTS = "fixed points"  # fewer than four rests, not along a line


@dataclass(frozen=True)
class Classification:
    """A kind of solution and the numbers it rests on.

    Attributes:
        solution: the kind.
        moving: share of trials that are still in motion long after their end.
        period: steps per turn; NaN without an oscillation.
        phase_spread: largest circular standard deviation (radians) of the relative phase among trials of equal sum; NaN without a cycle.
        phase_gap: least distance (radians) between the mean relative phases of different sums; NaN without a cycle.
        end_clusters: clusters of end states at the last step.
        line_share: variance of their centres along the first principal component.
        hull: how many of them lie on the convex hull in the plane of the first two.
        reason: one sentence.
    """

    solution: Solution
    moving: float
    period: float
    phase_spread: float
    phase_gap: float
    end_clusters: int
    line_share: float
    hull: int
    reason: str


def classify(system: DynamicalSystem, trials: TrialRun, moving: np.ndarray, period: float, cycle: InvariantCycle | None) -> Classification:
    """Name the kind of solution.

    In this order, first match: fewer than 90% of the trials right: *unsolved*. Trials that move for ever (share `moving` >= 0.9):
    *star* if a turn takes fewer than 8 steps; *phase code* if there is a limit cycle and the relative phases of trials lie closer to
    those of equal sum than to others (the least gap between sums is at least a quarter of an even spacing, and the largest circular
    standard deviation at most a quarter of that gap); *limit cycle* if there is one; else *irregular*.
    Some but not all (0.1 to 0.9): *mixed*. Otherwise trials come to rest: *line* if the centres of the end states' clusters have
    85% of their variance along one axis; *hexagon* if they are six on a convex ring without a gap of more than 100 degrees, with
    at most one more inside; *lattice* if they are four or more; else *fixed points*.

    Args:
        system, trials: the system, and what it did in trials.
        moving: [N] whether trials are still in motion in the long run (``find_end_states``).
        period: steps per turn of the undisturbed run, NaN for none.
        cycle: its limit cycle, if there is one.
    """
    share = float(moving.mean())
    spread, gap = (np.nan, np.nan) if cycle is None else _phases_by_sum(system, trials, cycle)
    clusters, line, hull, widest = end_geometry(trials)

    def result(solution: Solution, reason: str) -> Classification:
        return Classification(solution, share, period, spread, gap, clusters, line, hull, reason)

    if trials.accuracy < SOLVED:
        return result(Solution.UNSOLVED, f"{trials.accuracy:.0%} of the trials are answered right")
    if share >= 0.9:
        if np.isfinite(period) and period < STAR_PERIOD:
            return result(Solution.STAR, f"it moves for ever, one turn in {period:.2f} steps")
        if cycle is not None and gap >= 2 * np.pi / system.modulus / 4 and spread <= gap / 4:
            why = f"on a cycle of {period:.2f} steps, sums lie {gap:.2f} rad or more apart and spread by {spread:.2f} rad at most"
            return result(Solution.PHASE_CODE, why)
        if cycle is not None:
            return result(
                Solution.LIMIT_CYCLE, f"a cycle of {period:.2f} steps, on which sums lie {gap:.2f} rad apart, spread {spread:.2f}"
            )
        return result(Solution.IRREGULAR, "it moves for ever, but not around one centre")
    if share > 0.1:
        return result(Solution.MIXED, f"{share:.0%} of the trials end in motion, the others at rest")
    if line >= LINE_SHARE and clusters > 1:
        return result(Solution.LINE, f"{line:.0%} of the end states' variance lies along one axis")
    if hull == 6 and clusters in (6, 7) and widest <= 100:
        return result(Solution.HEXAGON, f"six end states around a ring, {clusters - 6} inside")
    if clusters >= 4:
        return result(Solution.LATTICE, f"{clusters} end states in the plane, {hull} of them on its edge")
    return result(Solution.FIXED_POINTS, f"{clusters} end states")


def relative_phases(system: DynamicalSystem, trials: TrialRun, cycle: InvariantCycle) -> np.ndarray:  # -> [N]
    """Asymptotic phase at the end of trials, less that of the undisturbed run at the same step; NaN off the cycle."""
    steps = trials.states.shape[1]
    return wrap(cycle.asymptotic_phase(trials.states[:, -1]) - steps * cycle.turn)


def _phases_by_sum(system: DynamicalSystem, trials: TrialRun, cycle: InvariantCycle) -> tuple[float, float]:
    """Largest spread within a sum, least gap between sums; NaN where more than a tenth of the trials is off the cycle."""
    phases = relative_phases(system, trials, cycle)
    sums = trials.sequences.sum(1) % system.modulus
    on = np.isfinite(phases)
    if on.mean() < 0.9 or len(np.unique(sums[on])) < system.modulus:
        return np.nan, np.nan
    groups = [phases[on & (sums == k)] for k in range(system.modulus)]
    centres = np.array([circular_mean(group) for group in groups])
    apart = np.abs(wrap(centres[:, None] - centres[None]))[~np.eye(len(centres), dtype=bool)]
    return max(float(circular_std(group, 0)) for group in groups), float(apart.min())


def end_geometry(trials: TrialRun, most: int = 24) -> tuple[int, float, int, float]:
    """Clusters of the rates at the last step: their number, the share of their variance along one axis, how many lie on the
    convex hull in the plane, and the widest gap between neighbours around their centre in degrees."""
    rates = trials.rates[:, -1]
    pca = fit_pca(rates, min(8, rates.shape[1]))
    labels, _ = cluster(pca.project(rates), most, enough=1.0)
    centres = np.stack([rates[labels == k].mean(0) for k in range(labels.max() + 1)])
    if len(centres) < 2:
        return len(centres), 1.0, len(centres), 360.0
    plane: PCA = fit_pca(centres, min(2, centres.shape[1]))
    points = plane.project(centres)
    line = float(plane.variance_ratio[0])
    if len(centres) < 3 or points.shape[1] < 2 or plane.variance_ratio[1] < 1e-9:
        return len(centres), line, min(2, len(centres)), 180.0
    require("scipy")

    from scipy.spatial import ConvexHull

    hull = ConvexHull(points).vertices
    middle = points[hull].mean(0)
    angles = np.sort(np.degrees(np.arctan2(points[hull, 1] - middle[1], points[hull, 0] - middle[0])))
    gaps = np.diff(np.append(angles, angles[0] + 360))
    return len(centres), line, len(hull), float(gaps.max())
