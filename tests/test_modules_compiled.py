"""Compiled calls see what happens after the compilation: interventions that begin and end, hooks of layers, areas and all modules."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_modules_interventions import pair
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils.flop_counter import FlopCounterMode

from rnndyn_fast.models import convrnn
from rnndyn_fast.nn import BLTConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

CONV_OPTIONS: dict[str, Any] = {"image_size": 96, "num_classes": 3, "widths": {"conv1": 2, "conv2": 2, "conv3": 3, "conv4": 3, "conv5": 3}}


class Counted:
    """A compiled module, and how often it was compiled."""

    def __init__(self, module: nn.Module, *, fullgraph: bool = True) -> None:
        torch._dynamo.reset()
        self.times = 0
        self.call = torch.compile(module, backend=self.compile, fullgraph=fullgraph)

    def compile(self, graph: Any, inputs: Any) -> Any:
        self.times += 1
        return graph.forward

    def __call__(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def gradients(call: Callable[..., Tensor], net: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    wanted = [*(p for p in net.parameters() if p.requires_grad), *others]
    found = torch.autograd.grad(call(x).square().sum(), wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_interventions_begin_and_end(backend: str) -> None:
    """In a network that was compiled before, with gradients; values of the same kind of change need no compilation of their own."""
    _, ours, x = pair()
    ours.backend = backend
    compiled = Counted(ours)
    intact = ours(x)
    value = torch.full((32, 2, 2), 1.5, dtype=torch.float64, requires_grad=True)
    some = torch.rand(16, 4, 4) > 0.5

    def doubled(h: Tensor, t: int) -> Tensor:
        return 2 * h

    changes: list[Callable[[], Any]] = [
        lambda: ours.lesion("v4:lateral", slice(3, None)),
        lambda: ours.intervene("it", 2, "clamp", 1.0),
        lambda: ours.intervene("it", 2, "clamp", 2.0),
        lambda: ours.intervene("v4", 2, "noise", std=0.5, seed=3, units=some),
        lambda: ours.intervene("v4", 1, doubled),
    ]
    if backend == "reference":  # (which takes a compiler long)
        changes, ours.timesteps = [changes[3]], 3
        intact = ours(x)
    for _ in range(2):
        for change in changes:
            with change():
                found = compiled(x)
                assert (found - intact).abs().max() > 1e-6
                torch.testing.assert_close(found, ours(x))
            torch.testing.assert_close(compiled(x), intact)
        assert backend == "reference" or compiled.times == len(changes)  # (the network itself, and all but one of the two clamps)
    if backend == "reference":
        return
    with ours.intervene("it", [1, 2], "scale", value), ours.lesion("v2:lateral", 1):
        for mine, theirs in zip(gradients(compiled, ours, x, value), gradients(ours, ours, x, value), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert gradients(compiled, ours, x, value)[-1].abs().max() > 1e-6


def test_steps_follow_the_time_steps() -> None:
    """Two blocks that are alike at some number of time steps are not at another."""
    _, ours, x = pair()
    compiled = Counted(ours)
    for steps in (slice(2, None), range(2, 5)):
        with ours.intervene("it", steps, "zero"):
            for timesteps in (5, 7):
                ours.timesteps = timesteps
                torch.testing.assert_close(compiled(x), ours(x))
        ours.timesteps = 5


def test_states_of_cells() -> None:
    """Second states too."""
    torch.manual_seed(0)
    net = convrnn("lstm_shallow", timesteps=6, backend="native", **CONV_OPTIONS).eval()
    x = torch.rand(2, 3, 96, 96)
    compiled = Counted(net)
    intact = compiled(x)
    area = next(a.name for a in net.network.areas if "c" in a.states)
    with net.intervene(f"{area}:c", slice(1, None), "scale", 0.0):
        found = compiled(x)
        torch.testing.assert_close(found, net(x))
        assert (found - intact).abs().max() > 1e-6


def test_blocks_inside_of_a_compiled_function() -> None:
    """Run as they are without a compiler, or refused."""
    _, ours, x = pair()

    def lesioned(x: Tensor) -> Any:
        with ours.lesion("v4:lateral"):
            return ours(x)

    expected = lesioned(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"expected intervene and lesion around a compiled call"):
        torch.compile(lesioned, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(lesioned, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert ours.interventions == ()


def test_functions_that_hold_parameters() -> None:
    """Their gradient would be lost."""
    _, ours, x = pair()
    weight = torch.ones(32, 1, 1, dtype=torch.float64, requires_grad=True)
    lost = r"action: expected a function of the state alone"
    with pytest.raises(Exception, match=lost), ours.intervene("it", 2, lambda h, t: h * weight):
        Counted(ours)(x)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_have_what_was_in_force(strict: bool) -> None:
    _, ours, x = pair()
    with torch.no_grad():
        with ours.lesion("v4:lateral", 2), ours.intervene("it", 3, "scale", 0.5):
            expected = ours(x)
            program = torch.export.export(ours, (x,), strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x), expected)
        assert (ours(x) - expected).abs().max() > 1e-6


HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
)  # fmt: skip


def test_hooks_after_the_compilation() -> None:
    """Refused as in other calls, and forgotten when they are removed."""
    _, ours, x = pair()
    compiled = Counted(ours)
    expected = compiled(x)
    for kind, place in zip((*HOOKS, *HOOKS), ("v2", "v2.lateral", "it_ln", "gap", *["all modules"] * 4), strict=True):
        if place == "all modules":
            handle = getattr(all_modules, kind.replace("register_", "register_module_"))(lambda *_: None)
            message = rf"torch.nn.modules.module.{kind.replace('register_', 'register_module_')}: expected no hooks of all modules"
        else:
            handle = getattr(ours.get_submodule(place), kind)(lambda *_: None)
            message = rf"{place}\._\w+_hooks: expected no "
        try:
            with pytest.raises(TypeError, match=message):
                ours(x)
            with pytest.raises(Exception, match=message):
                compiled(x)
        finally:
            handle.remove()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(ours(x), expected)
    assert compiled.times == 1


def test_hooks_with_keywords() -> None:
    """Another dict of theirs, the same hooks."""
    _, ours, x = pair()
    ours(x)
    handle = ours.v4.register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True)
    with pytest.raises(TypeError, match=r"v4._forward_pre_hooks"):
        ours(x)
    handle.remove()
    handle = ours.v4.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    with pytest.raises(TypeError, match=r"v4._forward_hooks"):
        ours(x)


def test_hooks_of_all_modules_in_a_layer() -> None:
    """A single layer reads its parameters too."""
    layer, x = BLTConv(3, 4, 3), torch.rand(1, 3, 8, 8)
    layer(x)
    handle = all_modules.register_module_forward_hook(lambda m, args, y: 2 * y)
    try:
        with pytest.raises(TypeError, match=r"register_module_forward_hook: expected no hooks of all modules"):
            layer(x)
    finally:
        handle.remove()


def test_pytorchs_own_hooks_look_on() -> None:
    """A counter of operations hooks all modules and changes nothing."""
    _, ours, x = pair()
    with FlopCounterMode(display=False):
        found = ours(x)
    torch.testing.assert_close(found, ours(x))


def test_steps_of_other_kinds() -> None:
    """What is read once, and numbers of arrays."""
    _, ours, x = pair()
    with ours.intervene("it", [2, 3], "scale", 0.5):
        expected = ours(x)
    for steps in ((t for t in (2, 3)), np.arange(2, 4), torch.tensor([3, 2]), {2, 3}):
        with ours.intervene("it", steps, "scale", 0.5):
            torch.testing.assert_close(ours(x), expected)
    with ours.intervene("it", np.int64(2), "zero"):
        one = ours(x)
    with ours.intervene("it", 2, "zero"):
        torch.testing.assert_close(ours(x), one)
