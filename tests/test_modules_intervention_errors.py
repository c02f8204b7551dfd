"""Interventions that cannot be: refused when the block begins, or at the call, naming the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_modules_interventions import pair
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.nn.interventions import parse_lesion

pytestmark = pytest.mark.usefixtures("one_thread")


def test_functions_that_hold_parameters() -> None:
    """Their gradient would be lost natively; the reference has it."""
    _, ours, x = pair()
    direction = torch.ones(32, 1, 1, dtype=torch.float64, requires_grad=True)

    def push(h: Tensor, t: int) -> Tensor:
        return h + direction

    with ours.intervene("it", 2, push):
        with pytest.raises(TypeError, match="action: expected a function of the state alone"):
            ours(x)
        with torch.no_grad():
            inferred = ours(x)
        ours.backend = "reference"
        found = ours(x)
        torch.testing.assert_close(found, inferred)
        found.square().sum().backward()
    assert direction.grad is not None


def test_functions_that_draw() -> None:
    """The backward pass calls them again."""
    _, ours, x = pair()
    with ours.intervene("it", 2, lambda h, t: functional.dropout(h, 0.5)):
        with pytest.raises(TypeError, match="action: expected a function that gives the same for the same state"):
            ours(x)
        with torch.no_grad():
            ours(x)


def test_functions_that_work_in_place() -> None:
    """They change a copy."""
    _, ours, x = pair()
    units = torch.rand(32, 2, 2) > 0.5
    weights = torch.randn(5, 3, 5, dtype=torch.float64)
    results = []
    for function in (lambda h, t: h.mul_(2), lambda h, t: 2 * h):
        with ours.intervene("it", 2, function, units=units):
            found = ours(x)
            results.append((found.detach(), torch.autograd.grad((found * weights).sum(), ours.v2.lateral.weight)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_block_that_nobody_enters() -> None:
    """It would change nothing without a word."""
    _, ours, x = pair()
    before = ours(x)
    with pytest.warns(UserWarning, match=r"net.lesion\(...\) does nothing by itself; it lasts as long as the block of: with net.lesion"):
        ours.lesion("v4:lateral")
    block = ours.lesion("v4:lateral")
    with block, block:
        assert len(ours.interventions) == 2
        lesioned = ours(x)
    assert ours.interventions == ()
    torch.testing.assert_close(block(lambda: ours(x))(), lesioned)
    torch.testing.assert_close(ours(x), before)


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda net: net.intervene("v5", 1), r"unknown area 'v5'; areas are"),
    (lambda net: net.intervene("v4:c", 1), r"area 'v4' has no state 'c'"),
    (lambda net: net.intervene("v4", 5), r"steps: expected some of 0 .. 4, got 5"),
    (lambda net: net.intervene(3, 1), r"area: expected the name of an area, got 3"),
    (lambda net: net.lesion(None), r"connection: expected the name of a connection, as 'v4:lateral', got None"),
    (lambda net: net.intervene("v4", 1, "noise", std=1.0, seed=2**63), r"seed: expected an int of 64 bits, got 9223372036854775808"),
    (lambda net: net.intervene("v4", -1), r"steps: expected some of 0 .. 4, got -1"),
    (lambda net: net.intervene("v4", slice(9, None)), r"steps: expected some of 0 .. 4, got none"),
    (lambda net: net.intervene("v4", "3-"), r"steps: expected an int, a range, a slice, ints, or None for all, got '3-'"),
    (lambda net: net.intervene("v4", [0.5]), r"steps: expected ints, got 0.5"),
    (lambda net: net.intervene("v4", torch.tensor([0.0, 1.0])), r"steps: expected ints, got tensor"),
    (lambda net: net.intervene("v4", torch.tensor([False, True])), r"steps: expected ints, got tensor\(False\)"),
    (lambda net: net.intervene("v4", 1, "scale", "half"), r"value: expected a number or a tensor .*, got 'half'"),
    (lambda net: net.intervene("v4", 1, "noise", std=torch.tensor(-1.0)), r"std: expected at least 0, got -1.0"),
    (lambda net: net.intervene("v4", 1, "noise", std="1"), r"std: expected a number or a tensor"),
    (lambda net: net.intervene("v4", 1, "zeros"), r"action: expected one of zero, .*, got 'zeros'"),
    (lambda net: net.intervene("v4", 1, 0.5), r"action: expected one of zero, .* or a function of a state and a time step, got 0.5"),
    (lambda net: net.intervene("v4", 1, "scale"), r"value: expected a number or a tensor for the action 'scale', got None"),
    (lambda net: net.intervene("v4", 1, "zero", 2.0), r"value: expected none for the action 'zero', got 2.0"),
    (lambda net: net.intervene("v4", 1, "noise"), r"std: expected a number or a tensor for the action 'noise', got None"),
    (lambda net: net.intervene("v4", 1, "noise", std=-1.0), r"std: expected at least 0, got -1.0"),
    (lambda net: net.intervene("v4", 1, "scale", torch.ones(3)), r"value: expected a number or a tensor that expands to .* \[16, 4, 4\]"),
    (lambda net: net.intervene("v4", 1, units=torch.ones(16, 4, 4)), r"units: expected booleans .*, got torch.float32"),
    (lambda net: net.intervene("v4", 1, units=torch.ones(2, 2).bool()), r"units: expected a number or a tensor that expands"),
    (lambda net: net.intervene("v4", range(3), "freeze"), r'steps: "freeze" holds the state of the step before, .* from 1 on, got 0'),
    (lambda net: net.lesion("v4:sideways"), r"connection: expected an area and one of bottom_up, lateral, top_down"),
    (lambda net: net.lesion("v4"), r"connection: expected an area and one of"),
    (lambda net: net.lesion("v1:lateral"), r"connection: network 'blt_net_64' has no 'v1:lateral'; there are "),
    (lambda net: net.lesion("it>v2"), r"has no 'it>v2'"),
    (lambda net: net.lesion("it>gap", 0), r"steps: area 'gap' of network 'blt_net_64' has no state at step 0: nothing drives it then"),
    (lambda net: net.lesion("v4:bottom_up", [0, 1]), r"steps: area 'gap' .* has no state at step 0: nothing drives it then"),
    (lambda net: net.lesion("it>gap"), r"steps: area 'gap' .* has no state at step 0: nothing drives it then"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_refused(change: Callable[[Any], Any], message: str) -> None:
    _, ours, _ = pair()
    with pytest.raises((TypeError, ValueError), match=message), change(ours):
        pass
    assert ours.interventions == ()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_refused_at_the_call(backend: str) -> None:
    """What the network or the function makes impossible."""
    _, ours, x = pair()
    ours.backend = backend
    undriven = r"steps: area 'gap' .* has no state at step 2: nothing drives it then"
    with pytest.raises(ValueError, match=undriven), ours.lesion("it>gap", 2), ours.lesion("gap:lateral", 2):
        ours(x)
    with (
        pytest.raises(ValueError, match=r"action: expected a function that keeps the shape"),
        ours.intervene("it", 1, lambda h, t: h[:, :1]),
    ):
        ours(x)
    with (
        pytest.raises(TypeError, match=r"action: expected a function that gives a tensor, got NoneType"),
        ours.intervene("it", 1, lambda h, t: None),
    ):  # type: ignore[arg-type,return-value]
        ours(x)


def test_what_the_command_line_names() -> None:
    assert parse_lesion("v4:lateral@3-") == ("v4:lateral", slice(3, None))
    assert parse_lesion("it@2-5") == ("it", slice(2, 6))
    assert parse_lesion(" it>v4 @ 4") == ("it>v4", 4)
    assert parse_lesion("v4:top-down") == ("v4:top-down", None)
    for text in ("v4@", "v4@x", "v4@3-x", "v4@-3"):
        with pytest.raises(ValueError, match=r"lesion: expected time steps as 3, 3- or 3-5"):
            parse_lesion(text)
