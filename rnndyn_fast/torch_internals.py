"""What is used of PyTorch that it does not promise to keep; tests/test_torch_internals.py says what is expected of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

Function = TypeVar("Function", bound=Callable[..., Any])


_PLAIN = {Tensor, torch.nn.Parameter}
# Hooks of all modules, those of ``torch.nn.modules.module.register_module_forward_hook`` and the like.
GLOBAL_HOOKS: dict[str, dict[int, Any]] = {
    "register_module_forward_pre_hook": _module._global_forward_pre_hooks,
    "register_module_forward_hook": _module._global_forward_hooks,
    "register_module_full_backward_pre_hook": _module._global_backward_pre_hooks,
    "register_module_full_backward_hook": _module._global_backward_hooks,
}


def constant_when_compiled(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without what that imports, the whole compiler, which takes longer than torch itself.

    The mark is the same attribute in torch 2.6 to 2.13 (a test compares them).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def graph_is_kept() -> bool:
    """Within a backward pass: whether it was started with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def in_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp) surrounds the call."""
    return bool(get_interpreter_stack())


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether what is done to tensors goes through Python: a dispatch mode is on (FakeTensorMode, make_fx, a counter of operations), or one
    of them is of a subclass that does so, and may have no memory."""
    if torch._C._len_torch_dispatch_stack():
        return True
    others: set[Any] = set(map(type, tensors)) - _PLAIN
    return any(cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ for cls in others)


@constant_when_compiled  # torch.compile guards on these transforms itself, but cannot trace the question
def in_jvp() -> bool:
    """Whether a ``torch.func.jvp`` surrounds the call."""
    return any(i.key() == TransformType.Jvp for i in get_interpreter_stack() or ())


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Within ``torch.autograd.forward_ad.dual_level``: whether a tensor has a tangent; while compiling, whether one might have."""
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any([forward_ad.unpack_dual(t).tangent is not None for t in tensors])
