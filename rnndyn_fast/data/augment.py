"""TrivialAugmentWide on batches, built on kornia's batched image operations."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from rnndyn_fast.optional import require

NUM_BINS = 31
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS: tuple[str, ...] = (
    "identity",
    "auto_contrast",
    "equalize",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    *_GEOMETRIC,
)


@dataclass(frozen=True)
class Part:
    """Which rows of a batch some images are. Random numbers are drawn for all ``total`` images of the batch, so that an image gets the
    same ones however the batch is cut."""

    rows: slice
    total: int

    @classmethod
    def whole(cls, images: torch.Tensor) -> Part:
        """All of a batch."""
        return cls(slice(None), len(images))


class TrivialAugmentWide:
    """One operation per image, drawn uniformly, at a strength drawn uniformly from 31 bins.

    With u = bin / 30 and a random sign s, the 14 operations are: identity; auto-contrast; equalize; solarize above
    1 - u; posterize to 8 - round(6 u) bits; colour, contrast, brightness, sharpness by the factor 1 + 0.99 s u; rotate
    by 135 s u degrees about the centre; shear x or y by 0.99 s u about the upper left corner; translate x or y by
    32 s u pixels. What is moved in from outside is black; pixels are moved by nearest neighbour.

    The images of a batch are grouped by operation, and each group is one call with a strength per image.

    Args:
        generator: CPU generator of all random draws; None draws from torch's default generator.

    Raises:
        ImportError: kornia is not installed.
        TypeError: `generator` is not a torch.Generator.
        ValueError: `generator` is not on the CPU.

    Deterministic: given the generator's state and the batch sizes, yes.
    Memory: a few float32 copies of the batch.
    Source: Mueller & Hutter 2021, "TrivialAugment" (wide space); the training augmentation of arXiv 2308.12435.

    >>> augment = TrivialAugmentWide(torch.Generator().manual_seed(0))
    >>> augment(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator: expected a CPU generator, got one on {generator.device}")
        self.generator = generator
        self._kornia = _import_kornia()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:  # [N, 3, H, W]
        """Augment a batch.

        Args:
            images: uint8 [N, 3, H, W], 0-255.

        Returns:
            float32 [N, 3, H, W] in 0-1, on the device of `images`.

        Raises:
            TypeError: `images` is not a uint8 tensor.
            ValueError: `images` is not [N, 3, H, W].
        """
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"images: expected a uint8 tensor [N, 3, H, W], got {got}")
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images: expected shape [N, 3, H, W], got {list(images.shape)}")
        return self.drawn(images, self.generator, None)

    def drawn(
        self,
        images: torch.Tensor,  # uint8 [N, 3, H, W]
        generator: torch.Generator | None,
        part: Part | None,
    ) -> torch.Tensor:
        """Augment with draws of another generator, as part of a batch."""
        part = part or Part.whole(images)
        operation, bins, negative = (
            torch.randint(high, (part.total,), generator=generator)[part.rows] for high in (len(OPERATIONS), NUM_BINS, 2)
        )
        strength = bins.to(torch.float32) / (NUM_BINS - 1)
        return self.apply(images, operation, strength, 1.0 - 2.0 * negative)

    def apply(
        self,
        images: torch.Tensor,  # [N, 3, H, W]
        operation: torch.Tensor,  # [N]
        strength: torch.Tensor,  # [N]
        sign: torch.Tensor,  # [N]
    ) -> torch.Tensor:
        """The operations without the draw: index into `OPERATIONS`, u in 0..1 and s = +-1, per image."""
        result = images.to(torch.float32, memory_format=torch.contiguous_format) / 255.0
        moved = torch.isin(operation, torch.tensor([OPERATIONS.index(name) for name in _GEOMETRIC]))
        # All five geometric operations are one warp: they differ in the matrix only.
        groups = {"warp": moved} | {
            name: operation == index for index, name in enumerate(OPERATIONS) if name not in ("identity", *_GEOMETRIC)
        }
        for name, chosen in groups.items():
            rows = chosen.nonzero().flatten()
            if len(rows) == 0:
                continue
            on_device = rows.to(images.device)
            group = result[on_device]
            if name == "warp":
                result[on_device] = self._warp(group, operation[rows], (sign * strength)[rows])
            else:
                result[on_device] = self._colour(name, group, strength[rows], sign[rows])
        return result

    def _colour(
        self,
        name: str,
        images: torch.Tensor,  # [M, 3, H, W]
        strength: torch.Tensor,  # [M]
        sign: torch.Tensor,  # [M]
    ) -> torch.Tensor:
        enhance: Any = self._kornia.enhance
        factor = (1.0 + 0.99 * sign * strength).to(images.device)
        if name == "auto_contrast":
            flat = images.amax(dim=(2, 3), keepdim=True) == images.amin(dim=(2, 3), keepdim=True)
            return torch.where(flat, images, enhance.normalize_min_max(images)).clamp(0.0, 1.0)
        if name == "equalize":
            return enhance.equalize(images)
        if name == "solarize":
            return enhance.solarize(images, (1.0 - strength).to(images.device))
        if name == "posterize":
            return enhance.posterize(images, (8 - torch.round(6.0 * strength)).to(torch.int64).to(images.device))
        if name == "color":
            return enhance.adjust_saturation_with_gray_subtraction(images, factor)
        if name == "contrast":
            return enhance.adjust_contrast_with_mean_subtraction(images, factor)
        if name == "brightness":
            return enhance.adjust_brightness_accumulative(images, factor)
        return enhance.sharpness(images, factor)

    def _warp(
        self,
        images: torch.Tensor,  # [M, 3, H, W]
        operation: torch.Tensor,  # [M]
        amount: torch.Tensor,  # [M], signed
    ) -> torch.Tensor:
        height, width = images.shape[2:]
        # Source -> destination in pixels, x' = A x + b.
        matrix = torch.eye(2, 3).repeat(len(amount), 1, 1)
        for name in _GEOMETRIC:
            rows = (operation == OPERATIONS.index(name)).nonzero().flatten()
            value = amount[rows]
            if name == "rotate":
                angle = torch.deg2rad(135.0 * value)
                cos, sin = torch.cos(angle), torch.sin(angle)
                centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
                top = torch.stack([cos, sin, (1 - cos) * centre_x - sin * centre_y], dim=1)
                bottom = torch.stack([-sin, cos, sin * centre_x + (1 - cos) * centre_y], dim=1)
                matrix[rows] = torch.stack([top, bottom], dim=1)
            elif name == "shear_x":
                matrix[rows, 0, 1] = 0.99 * value
            elif name == "shear_y":
                matrix[rows, 1, 0] = 0.99 * value
            elif name == "translate_x":
                matrix[rows, 0, 2] = torch.trunc(32.0 * value)  # whole pixels, as published
            else:
                matrix[rows, 1, 2] = torch.trunc(32.0 * value)
        warp: Any = self._kornia.geometry.transform.warp_affine
        return warp(images, matrix.to(images.device), (height, width), mode="nearest", padding_mode="zeros")


def _import_kornia() -> ModuleType:
    require("kornia")
    import kornia

    return kornia
