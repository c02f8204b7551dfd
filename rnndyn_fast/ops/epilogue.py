"""What becomes of a convolution's results as they leave it: an area's interaction, and the statistics of its LayerNorm.

Equations: ``csrc/conv_epilogue.h`` and ``csrc/cpu/conv_epilogue_kernel.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """The convolution's result r is one more drive, or with ``modulates`` one more modulator; in its place is written
    ``value = (sum of drives + drive_bias) * (1 + sum of modulators + modulator_bias)``, the factor left out without modulators.

    No map may overlap the result. Of the value, ``mean`` and ``rstd = 1 / sqrt(variance + eps)`` over (H, W, C) where they are given.
    """

    drives: Sequence[Tensor] = ()  # the other ones, each [M, H, W, C]
    modulators: Sequence[Tensor] = ()  # each [M, H, W, C]
    modulates: bool = False
    drive_bias: Tensor | None = None  # [C]
    modulator_bias: Tensor | None = None  # [C]
    modulator_sum: Tensor | None = None  # [M, H, W, C], written: the second factor
    mean: Tensor | None = None  # [M], written
    rstd: Tensor | None = None  # [M], written
    eps: float = 1e-5
