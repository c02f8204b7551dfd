"""Antialiased resizing of grey images."""

from __future__ import annotations

import numpy as np
import torch


def resize(images: np.ndarray, size: int) -> np.ndarray:  # [n, h, w] -> [n, size, size]
    """Resize by bilinear interpolation with a low-pass filter where it shrinks.

    Args:
        images: uint8 [n, h, w], 0-255.
        size: H = W of the result in pixels, >= 1.

    Returns:
        uint8 [n, size, size], rounded to nearest.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: `images` is not [n, h, w], or `size` < 1.

    Deterministic: yes. Memory: float32 copies of input and result; pass large sets in blocks.

    >>> resize(np.full((1, 8, 8), 7, dtype=np.uint8), 2).tolist()
    [[[7, 7], [7, 7]]]
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
    if images.ndim != 3:
        raise ValueError(f"images: expected shape [n, h, w], got {list(images.shape)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if len(images) == 0:
        return np.empty((0, size, size), dtype=np.uint8)
    values = torch.from_numpy(images.astype(np.float32))[:, None]
    resized = torch.nn.functional.interpolate(values, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized[:, 0].round_().clamp_(0, 255).to(torch.uint8).numpy()
