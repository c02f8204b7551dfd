"""Where trajectories go and how: to a fixed point, round a cycle or neither; how straight; and speed against margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.accumulators import divide
from rnndyn_fast.analysis.inputs import as_floats
from rnndyn_fast.analysis.results import MIN_GROUP, ReadoutZoneResult
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.optional import require
from rnndyn_fast.program import rollout

CONVERGES, CYCLES, WANDERS = "converges", "cycles", "wanders"


@dataclass(frozen=True)
class Motion:
    """Where each of N trajectories goes.

    Args:
        kind: [N] "converges", "cycles" or "wanders".
        period: [N] of a cycle in steps, 1 of a fixed point, 0 where there is none.
        distance: [T, N] to the trajectory's own fixed point, NaN where it has none.
        rate: [N] factor by which that distance shrinks per step, NaN where it has none or was there from the start.
        final_change: [N] change in the last step as a share of the norm.
    """

    kind: np.ndarray
    period: np.ndarray
    distance: np.ndarray
    rate: np.ndarray
    final_change: np.ndarray

    @property
    def shares(self) -> dict[str, float]:
        """Share of trajectories of each kind."""
        return {kind: float((self.kind == kind).mean()) for kind in (CONVERGES, CYCLES, WANDERS)}


def motion(
    trajectories: Any,  # [T, N, D]
    *,
    tolerance: float = 1e-3,
) -> Motion:
    r"""Tell by its last quarter where each trajectory goes.

    With W = max(3, T // 4) last steps and s the largest norm on the way, a trajectory *converges* where
    :math:`\lVert r[t] - r[t-1] \rVert \le \epsilon s` in all of them; else it *cycles* with the smallest period p from 2 to W for which
    :math:`\lVert r[t] - r[t-p] \rVert \le \epsilon s` in all of them; else it *wanders* (which a cycle longer than W, and convergence
    slower than T, do too). The fixed point is r[T - 1]. The rate is the exponential of the least-squares slope of the logarithm of
    the distance to it, over the steps from the first on at which that distance is above :math:`\epsilon s`.

    Args:
        trajectories: floating point, T >= 8.
        tolerance: epsilon.

    Raises:
        ValueError, TypeError: a shape, dtype or value is wrong.

    Deterministic: yes. Source: ours; for attractors of networks: Sussillo & Barak (2013), Neural Computation 25:626.

    >>> t = np.arange(40.0)[:, None, None]
    >>> motion(1 + 0.5**t).kind.tolist(), motion((-1.0) ** t).period.tolist()
    (['converges'], [2])
    """
    r = as_floats("trajectories", trajectories, "[T, N, D]", (None, None, None)).double().cpu()
    steps, count = r.shape[:2]
    if steps < 8:
        raise ValueError(f"trajectories: expected T of at least 8 time steps, got {steps}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected more than 0 and less than 1, got {tolerance}")
    norm = torch.linalg.vector_norm(r, dim=2)
    if not bool(torch.isfinite(norm).all()):
        raise ValueError("trajectories: expected finite values")
    near = tolerance * norm.amax(0).numpy()  # [N]
    window = max(3, steps // 4)
    period = np.zeros(count, np.int64)
    for p in range(window, 0, -1):  # the smallest period comes last, and stays
        apart = torch.linalg.vector_norm(r[-window:] - r[-window - p : steps - p], dim=2).amax(0).numpy()
        period[apart <= near] = p
    kind = np.where(period == 1, CONVERGES, np.where(period > 1, CYCLES, WANDERS))
    distance = torch.linalg.vector_norm(r - r[-1], dim=2).numpy()
    rate = np.exp(_slope(distance, near))
    distance[:, period != 1] = np.nan
    rate[period != 1] = np.nan
    change = torch.linalg.vector_norm(r[-1] - r[-2], dim=1).numpy()
    return Motion(kind, period, distance, rate, divide(change, norm[-2].numpy()))


def _slope(distance: np.ndarray, near: np.ndarray) -> np.ndarray:  # [T, N], [N] -> [N]
    above = np.logical_and.accumulate(distance > near, axis=0)
    t = np.arange(len(distance), dtype=np.float64)[:, None]
    y = np.where(above, np.log(np.where(above, distance, 1.0)), 0.0)
    centred = np.where(above, t - divide((above * t).sum(0), above.sum(0)), 0.0)
    return divide((centred * y).sum(0), (centred**2).sum(0))


@torch.no_grad()
def settle(
    net: RecurrentNetwork,
    *inputs: Tensor,  # [N, C, H, W] each
    steps: int = 100,
    tolerance: float = 1e-3,
    area: str | None = None,
) -> Motion:
    """Run a network on, past the steps that it was trained for, and tell where each image goes; see `motion`.

    ``distance`` at the network's own steps says how far an image then is from its fixed point. The network should be in evaluation mode.

    Args:
        net: any network of this package.
        inputs: constant in time.
        steps: T.
        tolerance: see `motion`.
        area: whose states; None: those that the readout reads.

    Raises:
        ValueError: `steps` below 8, no such area.

    Deterministic: yes. Memory: T states of the area.
    """
    if steps < 8:
        raise ValueError(f"steps: expected at least 8, got {steps}")
    names = _areas(net, area)
    now = net.current()
    named = {**now.parameters, **now.buffers(net)} if now.network.buffer_shapes and not net.training else now.parameters
    names = [now.names.get(name, name) for name in names]
    (states,) = rollout(now.network, steps, inputs, named, names, backend=net.backend, engine=net.engine)
    return motion(states.flatten(2), tolerance=tolerance)


def _areas(net: RecurrentNetwork, area: str | None) -> Sequence[str]:
    if area is not None:
        return [area]
    if net.network.readout is None:
        raise ValueError(f"area: expected a name, since network {net.network.name!r} has no readout")
    return [net.network.readout.source]


def straightness(
    trajectories: Any,  # [T, N, D]
    *,
    start: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # [N], [T - start - 2, N]
    r"""How straight trajectories are from step `start` on (1: the onset of recurrence is left out).

    Straightness is :math:`\lVert r[T-1] - r[start] \rVert \,/\, \sum_t \lVert r[t+1] - r[t] \rVert`: 1 on a line, 0 where a trajectory
    comes back. The second is the local curvature, the angle between successive displacements in radians; NaN where nothing moves.

    Raises ValueError where fewer than three steps are left.

    Deterministic: yes. Source: Hénaff, Goris & Simoncelli (2019), Nature Neuroscience 22:984, for the curvature.

    >>> straightness(np.arange(5.0)[:, None, None] * np.ones(3))[0].tolist()
    [1.0]
    """
    r = as_floats("trajectories", trajectories, "[T, N, D]", (None, None, None)).double().cpu()
    if start < 0 or len(r) - start < 3:
        raise ValueError(f"start: expected 0 to T - 3 = {len(r) - 3}, got {start}")
    moved = r[start + 1 :] - r[start:-1]
    length = torch.linalg.vector_norm(moved, dim=2).numpy()
    direct = torch.linalg.vector_norm(r[-1] - r[start], dim=1).numpy()
    cosine = divide((moved[1:] * moved[:-1]).sum(2).numpy(), length[1:] * length[:-1])
    return divide(direct, length.sum(0)), np.arccos(np.clip(cosine, -1, 1))


def speed_against_margin(result: ReadoutZoneResult) -> dict[str, np.ndarray]:
    r"""Rank correlation of :math:`\lVert r[t+1] - r[t] \rVert` with the margin at t, over stable-correct samples that are stable at t.

    Negative: what is classified with a wide margin moves less. Returns ``correlation``, ``low``, ``high`` (95%, Fisher's transform with
    the standard error :math:`\sqrt{1.06 / (n - 3)}` of rank correlations) and ``n``, [T - 1] each; NaN with fewer than 10 samples, and
    at t = 0, the onset of recurrence.

    Raises ValueError where the result has no kept samples.

    Source: Fieller, Hartley & Pearson (1957), Biometrika 44:470, for the standard error.
    """
    require("scipy")
    from scipy.stats import spearmanr

    if result.samples is None:
        raise ValueError("result: expected one with kept samples (keep_samples=True, --keep-samples)")
    samples = result.samples
    out = {name: np.full(result.timesteps - 1, np.nan) for name in ("correlation", "low", "high")}
    out["n"] = np.zeros(result.timesteps - 1, np.int64)
    for t in range(1, result.timesteps - 1):
        rows = np.flatnonzero((samples["group"] == 0) & (samples["time"] <= t) & np.isfinite(samples["margin"][:, t]))
        out["n"][t] = len(rows)
        change, margin = samples["change"][rows, t], samples["margin"][rows, t]
        if len(rows) < MIN_GROUP or np.ptp(change) == 0 or np.ptp(margin) == 0:
            continue
        r = float(spearmanr(change, margin)[0])
        z, half = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15)), 1.959963984540054 * np.sqrt(1.06 / (len(rows) - 3))
        out["correlation"][t], out["low"][t], out["high"][t] = r, np.tanh(z - half), np.tanh(z + half)
    return out
