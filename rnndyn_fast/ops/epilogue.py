"""What becomes of a convolution's results as they leave it: an area's interaction, and the statistics of its LayerNorm.

Equations: ``csrc/conv_epilogue.h`` and ``csrc/cpu/conv_epilogue_kernel.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.launch import CpuCall


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


def end_fields(e: Epilogue | None, out: Tensor, call: CpuCall) -> dict[str, Any]:
    """The epilogue of a convolution whose result is ``out``, as the core takes it."""
    if e is None:
        return {}
    shape = tuple(out.shape)

    def address(tensor: Tensor | None, name: str, expected: tuple[int, ...]) -> Any:
        return None if tensor is None else call.address(tensor, name, expected, torch.float32)

    return {
        "end": address(out, "out", shape),
        "modulates": e.modulates,
        "drives": [address(t, f"drives[{i}]", shape) for i, t in enumerate(e.drives)],
        "drive_bias": address(e.drive_bias, "drive_bias", shape[3:]),
        "modulators": [address(t, f"modulators[{i}]", shape) for i, t in enumerate(e.modulators)],
        "modulator_bias": address(e.modulator_bias, "modulator_bias", shape[3:]),
        "modulator_sum": address(e.modulator_sum, "modulator_sum", shape),
        "mean": address(e.mean, "mean", shape[:1]),
        "rstd": address(e.rstd, "rstd", shape[:1]),
        "end_eps": [e.eps],
    }
