"""Augmentations by name: what stands before TrivialAugmentWide in published recipes, and their sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.data.augment import Part, TrivialAugmentWide

BLUR_TAPS = 27
BLUR_SIGMAS = (0.1, 13.5)  # uniform

Augment = Callable[[Tensor, torch.Generator, Part | None], Tensor]


def flip(
    images: Tensor,  # [N, 3, H, W]
    generator: torch.Generator,
    part: Part | None = None,
) -> Tensor:
    """Mirror each image left to right with probability 0.5. ``part``: see :class:`rnndyn_fast.data.augment.Part`."""
    part = part or Part.whole(images)
    chosen = (torch.rand(part.total, generator=generator) < 0.5)[part.rows]
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def blur(
    images: Tensor,  # uint8 [N, 3, H, W]
    generator: torch.Generator,
    part: Part | None = None,
) -> Tensor:
    """Blur each image with probability 0.5 by a Gaussian of a random width over its rows: one axis only, as published (27 taps, reflected).

    Raises: ``ValueError`` for images of fewer than 14 rows.
    """
    reach = BLUR_TAPS // 2
    if images.shape[2] <= reach:
        raise ValueError(f"augment: the blur takes images of at least {reach + 1} px, got {images.shape[2]}")
    part = part or Part.whole(images)
    chosen = (torch.rand(part.total, generator=generator) < 0.5)[part.rows]
    sigma = torch.empty(part.total).uniform_(*BLUR_SIGMAS, generator=generator)[part.rows][chosen]
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0) / sigma[:, None]) ** 2)  # [M, taps]
    weights /= weights.sum(1, keepdim=True)
    padded = functional.pad(images[chosen].float(), (0, 0, reach, reach), mode="reflect")
    rows = padded.unfold(2, BLUR_TAPS, 1)  # [M, 3, H, W, taps]
    result = images.clone()
    result[chosen] = torch.einsum("nchwk,nk->nchw", rows, weights).round().clamp(0, 255).to(torch.uint8)
    return result


def augmentation(name: str) -> Augment | None:
    """The augmentation of that name, (uint8 [N, 3, H, W], generator, part) -> the same or float 0-1; None for "none".

    "flip"; "trivialaugmentwide"; "blur_flip_trivialaugmentwide": one after another, the recipe of KietzmannLab/BLT-VS (2024), whose random
    crop does not move in image files of the network's size.

    Raises: ``ValueError`` for another name; ``ImportError`` where kornia is needed and not installed.
    """
    if name == "none":
        return None
    if name == "flip":
        return flip
    if name not in ("trivialaugmentwide", "blur_flip_trivialaugmentwide"):
        raise ValueError(f"augment: expected one of none, flip, trivialaugmentwide, blur_flip_trivialaugmentwide, got {name!r}")
    trivial = TrivialAugmentWide()
    if name == "trivialaugmentwide":
        return trivial.drawn
    return lambda images, generator, part: trivial.drawn(flip(blur(images, generator, part), generator, part), generator, part)
