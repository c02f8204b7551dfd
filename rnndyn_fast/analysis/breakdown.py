"""Sums by class, by label and prediction, and by time of stabilisation; and the plane of two readout vectors."""

from __future__ import annotations

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, Accumulators, Moments, Trajectories, divide


def plane_coordinates(
    batch: Trajectories,
    chosen: np.ndarray,  # [M] samples
    final: np.ndarray,  # [M] their final class y
    before: np.ndarray,  # [M] another class c
    readout_weight: np.ndarray,  # [C, D] float64
    bias: np.ndarray | None,  # [C] float64
) -> tuple[np.ndarray, np.ndarray]:  # -> [T, M], [T, M]
    """Coordinates of r in the plane of w_y and w_c, per sample and step::

        across = ((w_y - w_c) . r + b_y - b_c) / ||w_y - w_c||
        along  = u . r,  u the unit vector of the plane that is normal to w_y - w_c, towards w_y + w_c

    ``across`` is the signed distance to the boundary between the two zones, positive on the side of y. NaN where the two
    readout vectors are the same (across), or parallel (along).
    """
    length = np.linalg.norm(readout_weight, axis=1)
    rows = np.arange(len(chosen))
    products = []
    for classes in (final, before):
        cosine = np.stack([step.numpy()[chosen, classes] for step in batch.cosine]).astype(np.float64)  # [T, M]
        products.append(cosine * batch.norm[:, chosen] * length[classes])
    own, other = products
    y, c = readout_weight[final], readout_weight[before]
    distance = np.linalg.norm(y - c, axis=1)
    offset = np.zeros(len(rows)) if bias is None else bias[final] - bias[before]
    across = divide(own - other + offset, np.broadcast_to(distance, own.shape))
    # u is w_y + w_c less its part along w_y - w_c; products with r follow from those with w_y and w_c.
    share = divide(length[final] ** 2 - length[before] ** 2, distance**2)
    residual = np.linalg.norm(y + c - np.nan_to_num(share)[:, None] * (y - c), axis=1)
    residual[residual < 1e-9 * (length[final] + length[before])] = 0.0  # parallel: there is no plane
    along = divide(own + other - share * (own - other), np.broadcast_to(residual, own.shape))
    return across, along


def accumulate_breakdown(
    sums: Accumulators,
    batch: Trajectories,
    group: np.ndarray,  # [N]
    time: np.ndarray,  # [N]
    readout_weight: np.ndarray,  # [C, D]
    bias: np.ndarray | None,  # [C]
) -> None:
    """Add one batch of classified trajectories to the sums of this file."""
    steps, classes = sums.timesteps, sums.classes
    cell = batch.label * classes + batch.predicted  # [T, N]
    for t in range(steps):
        sums.confusion[t] += np.bincount(cell[t], minlength=classes**2).reshape(classes, classes)
    sums.class_groups += np.bincount(batch.label * len(GROUPS) + group, minlength=classes * len(GROUPS)).reshape(classes, -1)

    chosen = np.flatnonzero(group == 0)
    label, t_stable = batch.label[chosen], time[chosen]
    for moments, values in (
        (sums.class_t_stable, t_stable.astype(np.float64)),
        (sums.class_norm, batch.norm[-1, chosen]),
        (sums.class_boundary_distance, batch.boundary_distance[-1, chosen]),
    ):
        _add_rows(moments, values[None], label)
    _add_rows(sums.norm_by_t_stable, batch.norm[:, chosen], t_stable)
    _add_rows(sums.boundary_distance_by_t_stable, batch.boundary_distance[:, chosen], t_stable)

    late = t_stable > 0
    if late.any():
        chosen, label, t_stable = chosen[late], label[late], t_stable[late]
        before = batch.predicted[t_stable - 1, chosen]
        across, along = plane_coordinates(batch, chosen, label, before, readout_weight, bias)
        _add_rows(sums.plane_across, across, t_stable)
        _add_rows(sums.plane_along, along, t_stable)


def _add_rows(moments: Moments, values: np.ndarray, row: np.ndarray) -> None:  # [T, M], [M]
    """Add values [T, M] to the rows of an accumulator [R, T] (or [R], with T = 1); what is not finite is left out."""
    rows = moments.count.shape[0]
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0)
    for t in range(len(values)):
        index = (slice(None), t) if moments.count.ndim == 2 else (slice(None),)
        moments.count[index] += np.bincount(row[finite[t]], minlength=rows)
        moments.total[index] += np.bincount(row, kept[t], minlength=rows)
        moments.squares[index] += np.bincount(row, np.square(kept[t]), minlength=rows)
