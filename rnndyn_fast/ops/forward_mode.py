"""Whether forward-mode derivatives are being taken: native ops then give way to their references."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rnndyn_fast.torch_internals import has_tangent, in_jvp


def in_forward_mode(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives are being taken: by a ``torch.func.jvp`` around the call, or of a tensor with a tangent."""
    return in_jvp() or has_tangent(tensors)
