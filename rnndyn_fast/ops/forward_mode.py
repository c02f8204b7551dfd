"""Whether forward-mode derivatives are being taken, or functions transformed: native ops then give way to their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without what that imports, the whole compiler, which takes longer than torch itself.

    The mark is the same attribute in torch 2.6 to 2.13 (a test compares them).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # torch.compile guards on these transforms itself, but cannot trace the question
def _inside_jvp() -> bool:
    return any(i.key() == TransformType.Jvp for i in get_interpreter_stack() or ())


def in_forward_mode(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives are being taken: by a ``torch.func.jvp`` around the call, or of a tensor with a tangent."""
    if _inside_jvp():
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any([forward_ad.unpack_dual(t).tangent is not None for t in tensors])


def in_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp) surrounds the call."""
    return bool(get_interpreter_stack())
