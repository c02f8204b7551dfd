"""From pixels to what the published networks take."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _unit(images: Tensor) -> Tensor:
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected [..., 3, H, W], got {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(torch.get_default_dtype()) / 255
    if not images.dtype.is_floating_point:
        raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
    return images / 255 if images.numel() and images.max() > 1 else images


def imagenet(
    images: Tensor,  # [..., 3, H, W]
) -> Tensor:
    """RGB in 0..255 (uint8, or any values above 1) or 0..1, normalised by ImageNet's mean and standard deviation (ConvRNNs)."""
    x = _unit(images)
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def signed_unit(
    images: Tensor,  # [..., 3, H, W], uint8
) -> Tensor:
    """``images / 127.5 - 1`` in [-1, 1] (RCNN-SAT; BLT-VS: 2 x - 1 of x in 0..1 is the same). Raises ``TypeError`` unless uint8."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected [..., 3, H, W], got {list(images.shape)}")
    return images.to(torch.get_default_dtype()) / 127.5 - 1
