"""``channels_last``: maps as the kernels take them, from the layout of PyTorch's tensors. Traffic: ``csrc/cpu/channels_last_kernel.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from rnndyn_fast.ops import core, launches


def channels_last(
    x: Tensor,  # [N, C, H, W]
    out: Tensor,  # [N, H, W, C], contiguous, written
) -> Tensor:
    """The maps in channels-last order. Returns ``out``."""
    native = core.unavailable is None and x.is_cpu and x.is_contiguous() and x.dtype == out.dtype
    if native and x.dtype in (torch.float32, torch.float64) and x.numel():
        launches.channels_last(x=x, out=out)
        return out
    return out.copy_(x.permute(0, 2, 3, 1))
