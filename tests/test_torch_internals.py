"""What is used of PyTorch that it does not promise to keep: each test fails where another version of PyTorch does otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from rnndyn_fast import torch_internals


class Watched(torch.autograd.Function):
    """Notes whether the graph is kept when its backward pass runs."""

    seen: list[bool]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Watched.seen.append(torch_internals.graph_is_kept())
        return grad


def test_backward_knows_whether_the_graph_is_kept() -> None:
    Watched.seen = []
    y = Watched.apply(torch.ones(2, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert Watched.seen == [True, False], torch.__version__


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_are_seen(transform: str) -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_internals.in_transform(), torch_internals.in_jvp()))
        return x.square().sum()

    x = torch.ones(3)
    look(x)
    if transform == "grad":
        torch.func.grad(look)(x)
    elif transform == "vmap":
        torch.func.vmap(look)(x[None])
    else:
        torch.func.jvp(look, (x,), (x,))
    look(x)
    assert seen == [(False, False), (True, transform == "jvp"), (False, False)], torch.__version__


def test_tangents_are_seen() -> None:
    x = torch.ones(3)
    assert not torch_internals.has_tangent([x])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert not torch_internals.has_tangent([x])
        assert torch_internals.has_tangent([x, dual])
    assert not torch_internals.has_tangent([x])


def test_hooks_of_all_modules_are_seen() -> None:
    """Each is registered where we look, by the function of that name."""
    module = torch.nn.modules.module
    assert all(not hooks for hooks in torch_internals.GLOBAL_HOOKS.values())
    for name, hooks in torch_internals.GLOBAL_HOOKS.items():
        handle = getattr(module, name)(lambda *_: None)
        assert len(hooks) == 1, name
        handle.remove()
        assert not hooks
    every = {name for name in dir(module) if name.startswith("register_module_") and name.endswith("_hook")}
    others = {"register_module_backward_hook"}  # (the same as the full one, before it)
    others |= {f"register_module_{kind}_registration_hook" for kind in ("buffer", "module", "parameter")}
    assert every == torch_internals.GLOBAL_HOOKS.keys() | others, torch.__version__
