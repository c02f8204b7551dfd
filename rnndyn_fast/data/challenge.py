"""Challenging viewing conditions for images of single objects on black.

After Spoerer, McClure & Kriegeskorte 2017 (Front Psychol 8:1551), with the objects of a data set in place of digits.
Their images of several digits have several targets; here every image keeps its one label, so the target stays at the
centre at full size, and what is added is smaller:

- clutter: 2, 3 or 4 other objects (3, 4, 5 objects in all, as published) of other categories, 35-55% of the image
  wide, around the target and partly overlapping it; each lies on top of the target or behind it with probability 1/2;
- debris: 10, 30 or 50 fragments of objects of other categories, always on top: square crops, of which the object's
  pixels alone are pasted. Published crops are 6-9 of 32 pixels wide; ours are 5-8 of 64, since solid objects cover far
  more of the target than strokes of digits do (50 of ours hide about 40%);
- occlusion by grey bars (any orientation) or by grey blobs;
- low contrast: shrunk towards mid grey;
- noise: additive Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rnndyn_fast.data.resize import resize

# A pixel belongs to its object fully from this grey level on and in proportion below: the background is black, and
# edges fade into it. What is left of the fading is a thin dark outline, which keeps overlapping objects apart as the
# outline of the published digits does.
OPAQUE_LEVEL = 16.0
GREY = 128.0


@dataclass(frozen=True)
class Condition:
    """One viewing condition: `kind` says how it is made, `parameters` how strong it is (lengths in image widths)."""

    name: str
    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _clutter(level: str, objects: int) -> Condition:
    ring = {"widths": (0.35, 0.45, 0.55), "distance": (0.28, 0.45), "on_top_probability": 0.5}
    return Condition(f"clutter_{level}", "clutter", {"objects": objects, **ring})


def _debris(level: str, fragments: int) -> Condition:
    return Condition(f"debris_{level}", "debris", {"fragments": fragments, "side": (5 / 64, 8 / 64)})


CONDITIONS: tuple[Condition, ...] = (
    _clutter("light", 2),
    _clutter("medium", 3),
    _clutter("heavy", 4),
    _debris("light", 10),
    _debris("medium", 30),
    _debris("heavy", 50),
    Condition("occlusion_bars", "bars", {"period": (0.2, 0.4), "covered": (0.35, 0.5), "grey": GREY}),
    Condition("occlusion_blobs", "blobs", {"blobs": 6, "radius": (0.09, 0.15), "centre": (0.15, 0.85), "grey": GREY}),
    Condition("low_contrast", "contrast", {"contrast": (0.1, 0.3), "grey": GREY}),
    Condition("noise", "noise", {"sigma": (0.15, 0.35)}),
)


class ObjectPool:
    """Objects that serve as clutter and debris.

    Args:
        images: uint8 [p, S, S], objects on black.
        labels: integers [p]; at least two categories.

    Raises:
        ValueError: fewer than two categories, no object pixels, or shapes that do not fit.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1]:
            raise ValueError(f"images, labels: expected [p, S, S] and [p], got {list(images.shape)} and {list(labels.shape)}")
        visible = (images >= OPAQUE_LEVEL).any(axis=(1, 2))
        order = np.flatnonzero(visible)[np.argsort(labels[visible], kind="stable")]
        self.images = images[order]
        self.labels = labels[order]
        if len(np.unique(self.labels)) < 2:
            raise ValueError(f"labels: clutter and debris need objects of at least 2 categories, got {len(np.unique(self.labels))}")
        opaque = self.images >= OPAQUE_LEVEL
        # Bounding boxes: first row and column, height and width of the object's pixels, each [p].
        rows, columns = np.asarray(opaque.any(axis=2)), np.asarray(opaque.any(axis=1))
        self.top, self.left = rows.argmax(axis=1), columns.argmax(axis=1)
        self.height = rows.shape[1] - rows[:, ::-1].argmax(axis=1) - self.top
        self.width = columns.shape[1] - columns[:, ::-1].argmax(axis=1) - self.left
        self._smaller: dict[int, np.ndarray] = {}

    def draw_other(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # [m] -> [m]
        """Pool positions, uniform over the objects whose category is not the given one."""
        first = np.searchsorted(self.labels, labels, side="left")
        same = np.searchsorted(self.labels, labels, side="right") - first
        drawn = rng.integers(0, len(self.labels) - same)
        return np.where(drawn < first, drawn, drawn + same)

    def smaller(self, side: int) -> np.ndarray:  # [p, side, side]
        """All objects at another size, uint8; kept once made."""
        if side not in self._smaller:
            self._smaller[side] = resize(self.images, side)
        return self._smaller[side]


def assign_conditions(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # [n] -> [n]
    """One condition per image, as equally often as can be, over all images and within every category.

    Args:
        labels: integers [n].

    Returns:
        uint8 [n], index into `CONDITIONS`.
    """
    grouped = np.lexsort((rng.random(len(labels)), labels))
    result = np.empty(len(labels), dtype=np.uint8)
    # Dealing on from category to category keeps the total balanced too; a random deal order spares no condition.
    result[grouped] = rng.permutation(len(CONDITIONS))[np.arange(len(labels)) % len(CONDITIONS)]
    return result


def challenge(
    images: np.ndarray,  # [n, S, S]
    labels: np.ndarray,  # [n]
    condition: np.ndarray,  # [n]
    pool: ObjectPool,
    rng: np.random.Generator,
) -> np.ndarray:  # [n, S, S]
    """Put each image under its condition.

    Args:
        images: uint8 [n, S, S], objects on black.
        labels: integers [n], categories of the objects.
        condition: integers [n], index into `CONDITIONS`.
        pool: objects of size S for clutter and debris.
        rng: source of the randomness.

    Returns:
        uint8 [n, S, S].

    Raises:
        TypeError: `images` is not uint8.
        ValueError: shapes that do not fit, or a condition out of range.

    Deterministic: given `rng`. Memory: about 20 times `images`; pass large sets in blocks.
    Source: Spoerer, McClure & Kriegeskorte 2017; see the head of this file for what differs.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
    if images.ndim != 3 or images.shape[1:] != pool.images.shape[1:]:
        raise ValueError(f"images: expected [n, S, S] with S = {pool.images.shape[1]}, got {list(images.shape)}")
    if labels.shape != images.shape[:1] or condition.shape != images.shape[:1]:
        raise ValueError(f"labels, condition: expected [n] with n = {len(images)}, got {labels.shape}, {condition.shape}")
    if len(condition) and not 0 <= condition.min() <= condition.max() < len(CONDITIONS):
        raise ValueError(f"condition: expected 0..{len(CONDITIONS) - 1}, got {condition.min()}..{condition.max()}")
    result = np.empty_like(images)
    for code, settings in enumerate(CONDITIONS):
        rows = np.flatnonzero(condition == code)
        if len(rows):
            values = images[rows].astype(np.float32)
            if settings.kind in ("clutter", "debris"):
                values = _ADD[settings.kind](values, labels[rows], pool, settings.parameters, rng)
            else:
                values = _DEGRADE[settings.kind](values, settings.parameters, rng)
            result[rows] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return result


def _uniform(rng: np.random.Generator, bounds: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(rng.uniform(bounds[0], bounds[1], shape))


def _alpha(values: np.ndarray) -> np.ndarray:
    """Opacity 0..1 of object pixels."""
    return np.minimum(values / OPAQUE_LEVEL, 1.0).astype(np.float32)


def _paste(
    canvas: np.ndarray,  # [m, S + 2 P, S + 2 P], changed in place
    values: np.ndarray,  # [m, p, p]
    alpha: np.ndarray,  # [m, p, p]
    top: np.ndarray,  # [m], row in the canvas
    left: np.ndarray,  # [m]
) -> None:
    offset = np.arange(values.shape[1])
    place = (
        np.arange(len(canvas))[:, None, None],
        (top[:, None] + offset)[:, :, None],
        (left[:, None] + offset)[:, None, :],
    )
    below = canvas[place]
    canvas[place] = below + alpha * (values - below)


def _add_clutter(
    images: np.ndarray, labels: np.ndarray, pool: ObjectPool, parameters: Mapping[str, Any], rng: np.random.Generator
) -> np.ndarray:
    count, size, _ = images.shape
    objects = parameters["objects"]
    sides = np.array([max(1, round(width * size)) for width in parameters["widths"]])
    border = int(sides.max())  # objects may reach over the edge of the image
    which = np.stack([pool.draw_other(labels, rng) for _ in range(objects)])
    side = rng.choice(sides, (objects, count))
    on_top = rng.random((objects, count)) < parameters["on_top_probability"]
    # Spread around the target, so that the objects do not hide each other.
    turn = rng.random(count) + (np.arange(objects)[:, None] + rng.uniform(-0.25, 0.25, (objects, count))) / objects
    distance = _uniform(rng, parameters["distance"], (objects, count)) * size
    top = np.rint(size / 2 + distance * np.sin(2 * np.pi * turn) - side / 2).astype(np.int64) + border
    left = np.rint(size / 2 + distance * np.cos(2 * np.pi * turn) - side / 2).astype(np.int64) + border
    canvas = np.zeros((count, size + 2 * border, size + 2 * border), dtype=np.float32)
    inside = np.s_[:, border : border + size, border : border + size]
    for above in (False, True):
        for k in range(objects):
            for length in np.unique(sides):
                rows = np.flatnonzero((on_top[k] == above) & (side[k] == length))
                values = pool.smaller(int(length))[which[k, rows]].astype(np.float32)
                part = canvas[rows]
                _paste(part, values, _alpha(values), top[k, rows], left[k, rows])
                canvas[rows] = part
        if not above:
            canvas[inside] += _alpha(images) * (images - canvas[inside])
    return canvas[inside]


def _add_debris(
    images: np.ndarray, labels: np.ndarray, pool: ObjectPool, parameters: Mapping[str, Any], rng: np.random.Generator
) -> np.ndarray:
    count, size, _ = images.shape
    shortest, longest = (max(1, round(share * size)) for share in parameters["side"])
    # Room for the part of the largest crop that is beyond the fragment; it is transparent.
    canvas = np.pad(images, ((0, 0), (0, longest), (0, longest)))
    offset = np.arange(longest)
    for _ in range(parameters["fragments"]):
        which = pool.draw_other(labels, rng)
        height, width = pool.height[which], pool.width[which]
        side = np.minimum(rng.integers(shortest, longest, count, endpoint=True), np.minimum(height, width))
        row = pool.top[which] + rng.integers(0, height - side, endpoint=True)
        column = pool.left[which] + rng.integers(0, width - side, endpoint=True)
        values = pool.images[
            which[:, None, None],
            np.minimum(row[:, None] + offset, size - 1)[:, :, None],
            np.minimum(column[:, None] + offset, size - 1)[:, None, :],
        ].astype(np.float32)
        within = offset < side[:, None]
        alpha = _alpha(values) * (within[:, :, None] & within[:, None, :])
        top, left = (rng.integers(0, size - side, endpoint=True) for _ in range(2))
        _paste(canvas, values, alpha, top, left)
    return canvas[:, :size, :size]


def _occlude_with_bars(images: np.ndarray, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    count, size, _ = images.shape
    angle = _uniform(rng, (0.0, np.pi), (count,))
    period = _uniform(rng, parameters["period"], (count,)) * size
    covered = _uniform(rng, parameters["covered"], (count,))
    phase = _uniform(rng, (0.0, 1.0), (count,))
    row, column = np.mgrid[:size, :size]
    across = row * np.sin(angle)[:, None, None] + column * np.cos(angle)[:, None, None]
    hidden = (across / period[:, None, None] + phase[:, None, None]) % 1.0 < covered[:, None, None]
    return np.where(hidden, parameters["grey"], images)


def _occlude_with_blobs(images: np.ndarray, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    count, size, _ = images.shape
    row, column = np.mgrid[:size, :size]
    hidden = np.zeros(images.shape, dtype=bool)
    for _ in range(parameters["blobs"]):
        centre_row, centre_column = _uniform(rng, parameters["centre"], (2, count, 1, 1)) * size
        radius = _uniform(rng, parameters["radius"], (count, 1, 1)) * size
        hidden |= (row - centre_row) ** 2 + (column - centre_column) ** 2 < radius**2
    return np.where(hidden, parameters["grey"], images)


def _lower_contrast(images: np.ndarray, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    contrast = _uniform(rng, parameters["contrast"], (len(images), 1, 1))
    return parameters["grey"] + contrast * (images - parameters["grey"])


def _add_noise(images: np.ndarray, parameters: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    sigma = _uniform(rng, parameters["sigma"], (len(images), 1, 1)) * 255.0
    return images + sigma * rng.standard_normal(images.shape)


_ADD = {"clutter": _add_clutter, "debris": _add_debris}
_DEGRADE = {
    "bars": _occlude_with_bars,
    "blobs": _occlude_with_blobs,
    "contrast": _lower_contrast,
    "noise": _add_noise,
}
