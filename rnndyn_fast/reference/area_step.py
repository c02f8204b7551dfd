"""``area_step`` in plain PyTorch: the specification of the native op, for any float dtype, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def area_value(
    drives: Sequence[Tensor],  # each [N, C, H, W]
    modulators: Sequence[Tensor] = (),  # each [N, C, H, W]
    *,
    squash: bool = False,
) -> Tensor:
    r"""Drive times modulator, before any norm: [N, C, H, W].

    .. math:: z = \Big(\sum_i b_i\Big)\Big(1 + \sum_j m_j\Big)

    or, squashed,

    .. math:: z = \Big(\sum_i b_i\Big)\,2\,s\Big(\sum_j m_j\Big)

    The factor is left out without modulators; without drives the drive is zero.
    """
    if not drives:
        return torch.zeros_like(modulators[0])
    value = drives[0]
    for term in drives[1:]:
        value = value + term
    if modulators:
        total = modulators[0]
        for term in modulators[1:]:
            total = total + term
        value = value * (2 * torch.sigmoid(total) if squash else 1.0 + total)
    return value


def area_step(
    drives: Sequence[Tensor],  # each [N, C, H, W]
    modulators: Sequence[Tensor] = (),  # each [N, C, H, W]
    *,
    gamma: Tensor | None = None,  # [C, H, W]
    beta: Tensor | None = None,  # [C, H, W]
    eps: float = 1e-5,
    rectify: bool = True,
) -> Tensor:
    r"""One time step of one area.

    .. math:: z = \Big(\sum_i b_i\Big)\Big(1 + \sum_j m_j\Big), \quad h = \max(\mathrm{LN}(z), 0)

    LN normalises over (C, H, W) with an affine value per element and is left out where ``gamma`` is None; the factor is left out without
    modulators. Biases belong to the terms.

    Returns: [N, C, H, W].

    Source: Thorat, Doerig & Kietzmann, arXiv 2308.12435.
    """
    value = area_value(drives, modulators)
    if gamma is not None and beta is not None:
        shape = value.shape[1:]
        value = torch.nn.functional.layer_norm(value, shape, gamma.reshape(shape), beta.reshape(shape), eps)
    return torch.relu(value) if rectify else value
