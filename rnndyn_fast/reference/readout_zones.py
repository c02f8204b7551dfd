"""Readout zones of representations, in plain PyTorch: the specification of ``ops.readout_zones``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReadoutZoneMeasures(NamedTuple):
    """What one pass over representations [T, N, D] yields; every table is [T, N] unless it says otherwise."""

    predicted: Tensor  # [T, N] int64, class of the zone the representation lies in (or of the largest log-probability)
    norm: Tensor  # [T, N] L2 norm
    cos_predicted: Tensor  # [T, N] cosine to the readout vector of the predicted class
    cos_label: Tensor  # [T, N] cosine to the readout vector of the label
    margin: Tensor  # [T, N] logit of the predicted class minus the largest other logit; +inf with one class
    boundary_distance: Tensor  # [T, N] signed distance to the nearest zone boundary; +inf where there is none
    change: Tensor  # [T, N] L2 distance to the previous time step; NaN where there is none
    cosine: Tensor  # [T, N, C] cosine to every readout vector


def readout_distance(readout_weight: Tensor) -> Tensor:  # [C, D] -> [C, C]
    """Distances ``||w_c - w_j||`` between readout vectors, by differences (no ``|a|^2 - 2ab + |b|^2``)."""
    # PyTorch's cdist takes no half precision.
    wide = readout_weight.to(torch.promote_types(readout_weight.dtype, torch.float32))
    return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").to(readout_weight.dtype)


def first_argmax(scores: Tensor) -> Tensor:  # [..., C] -> [...]
    """The first of the largest entries, as in NumPy (``torch.argmax`` does not promise which)."""
    order = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
    return ((scores == scores.amax(-1, keepdim=True)) * order).argmax(-1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:  # [...], [...] -> [...]
    """numerator / denominator, and 0 where the denominator is 0: a zero vector has cosine 0 to every vector."""
    zero = denominator == 0
    return torch.where(zero, torch.zeros_like(numerator), numerator / torch.where(zero, 1.0, denominator))


def readout_zones(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [C]
    log_probs: Tensor | None = None,  # [T, N, C]
    previous: Tensor | None = None,  # [N, D]
    distance: Tensor | None = None,  # [C, C]
) -> ReadoutZoneMeasures:
    r"""Where representations lie among the zones of a linear readout.

    With logits ``l_c = w_c . r + b_c`` and predicted class ``p = argmax_c l_c`` (of ``log_probs`` where given; the
    first on ties)::

        norm              = ||r||
        cosine_c          = w_c . r / (||w_c|| ||r||)         0 where a vector is zero
        margin            = l_p - max_{j != p} l_j
        boundary_distance = min_{j != p} (l_p - l_j) / ||w_p - w_j||
        change            = ||r[t] - r[t-1]||

    Classes whose readout vectors equal that of p have no boundary with p and are left out of the minimum. Margin and
    boundary distance are negative where ``log_probs`` predict a class other than that of the largest logit.

    Args:
        representations: [T, N, D], any float dtype.
        readout_weight: [C, D], same dtype.
        labels: [N], int64, in [0, C).
        bias: [C], same dtype, or None for zero.
        log_probs: [T, N, C], any float dtype, or None.
        previous: [N, D], the representations at the step before the first one here, or None at the start.
        distance: [C, C], ``readout_distance(readout_weight)`` where the caller keeps it, or None.

    Returns:
        ReadoutZoneMeasures: ``predicted`` [T, N] int64, ``cosine`` [T, N, C], and [T, N] tables in the input's dtype.

    Differentiable: where the measures are smooth, by PyTorch's own rules.
    Forward-mode: yes.
    Double backward: yes.
    Deterministic: yes.
    Memory: a few [T, N, C] tables.

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435, for norm, cosine and change; the boundary distance is
    the distance of a point to a hyperplane.

    >>> import torch
    >>> m = readout_zones(torch.tensor([[[3.0, 4.0]]]), torch.eye(2), torch.tensor([0]))
    >>> m.predicted.item(), m.norm.item(), round(m.boundary_distance.item(), 4)
    (1, 5.0, 0.7071)
    """
    if distance is None:
        distance = readout_distance(readout_weight)
    product = representations @ readout_weight.T  # [T, N, C]
    logits = product if bias is None else product + bias
    scores = logits if log_probs is None else log_probs
    predicted = first_argmax(scores)  # [T, N]

    norm = torch.linalg.vector_norm(representations, dim=-1)
    cosine = _ratio(product, norm.unsqueeze(-1) * torch.linalg.vector_norm(readout_weight, dim=-1))
    index = predicted.unsqueeze(-1)
    label_index = labels.expand(predicted.shape).unsqueeze(-1)

    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
    difference = logits.gather(-1, index) - logits  # [T, N, C]
    gap = distance[predicted]  # [T, N, C]
    infinite = torch.full_like(difference, torch.inf)
    margin = torch.where(own, infinite, difference).amin(-1)
    no_boundary = own | (gap == 0)
    boundary = torch.where(no_boundary, infinite, difference / torch.where(gap == 0, 1.0, gap)).amin(-1)

    start = torch.full_like(representations[:1], torch.nan) if previous is None else previous.unsqueeze(0)
    change = torch.linalg.vector_norm(representations - torch.cat([start, representations[:-1]]), dim=-1)
    return ReadoutZoneMeasures(
        predicted,
        norm,
        cosine.gather(-1, index).squeeze(-1),
        cosine.gather(-1, label_index).squeeze(-1),
        margin,
        boundary,
        change,
        cosine,
    )
