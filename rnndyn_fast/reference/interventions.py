"""What an intervention makes of a state, in plain PyTorch (:class:`rnndyn_fast.ops.cells.Intervention`)."""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rnndyn_fast.ops.cells import Intervention
from rnndyn_fast.reference.philox import unit_normals

StateFunction = Callable[[Tensor, int], Tensor]  # state [N, C, H, W], time step -> [N, C, H, W]
_MOST_FUNCTIONS = 256
# (Not from 0: a plan or an exported program that names a function of another process must not find one of this.)
_numbers = itertools.count(secrets.randbits(48))
_functions: OrderedDict[int, StateFunction] = OrderedDict()  # by number; specs are plain data and hold numbers


def number_of(function: StateFunction) -> int:
    """The number under which a spec names a function; the same for the same function as long as it is held."""
    for number, held in _functions.items():
        if held is function:
            _functions.move_to_end(number)
            return number
    number = next(_numbers)
    _functions[number] = function
    while len(_functions) > _MOST_FUNCTIONS:
        _functions.popitem(last=False)
    return number


def _of_function(cell: Intervention, x: Tensor) -> Tensor:
    function = _functions.get(cell.function)
    if function is None:
        raise RuntimeError(
            f"action: this function is not held: {_MOST_FUNCTIONS} others came after it (define functions once, outside of loops), or it "
            "is of another process (an exported program holds no functions)"
        )
    y = function(x.clone(), cell.step)  # (which it may change in place)
    if not isinstance(y, Tensor):
        raise TypeError(f"action: expected a function that gives a tensor, got {type(y).__name__}")
    if y.shape != x.shape:
        raise ValueError(f"action: expected a function that keeps the shape {list(x.shape)} ([N, C, H, W]), got {list(y.shape)}")
    return y.to(x.dtype)


def _noise(cell: Intervention, x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    seeds = torch.tensor([cell.seed], dtype=torch.int64, device=x.device)
    drawn = unit_normals(seeds, samples, 1, channels * height * width, stream=cell.step, dtype=x.dtype)
    return drawn.reshape(x.shape)


def intervention(cell: Intervention, ports: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The state that readers find: x outside of ``units``, and there by the rule

    .. math:: v \\quad\\text{(clamp)}, \\qquad v\\,x \\quad\\text{(scale)}, \\qquad h_{t-1} \\quad\\text{(freeze)}, \\qquad
        x + v\\,\\xi \\quad\\text{(noise)}, \\qquad f(x, t) \\quad\\text{(function)}
    """
    x = ports["input"]
    value = parameters.get("value", x)
    changed = {
        "clamp": lambda: value.expand_as(x),
        "scale": lambda: value * x,
        "freeze": lambda: ports["memory"],
        "noise": lambda: x + value * _noise(cell, x),
        "function": lambda: _of_function(cell, x),
    }[cell.rule]()
    return (torch.where(parameters["units"] > 0.5, changed, x) if cell.masked else changed,)
