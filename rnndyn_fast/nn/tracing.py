"""Tracers that cannot record a rollout, and what to take instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch.fx import Proxy

_REMEDY = "take torch.export.export(module, inputs), which records it as one operation, or torch.compile(module)"


def refuse_tracers(name: str, inputs: Any) -> None:
    """Raise ``TypeError`` under ``torch.jit.trace`` and ``torch.fx.symbolic_trace``, which record what one call does in Python."""
    values: Iterable[Any] = () if isinstance(inputs, Proxy) else inputs
    if isinstance(inputs, Proxy) or any(isinstance(x, Proxy) for x in values):
        raise TypeError(f"{name}: torch.fx.symbolic_trace cannot record a rollout; {_REMEDY}")
    if torch.jit.is_tracing():
        raise TypeError(f"{name}: torch.jit.trace (and torch.onnx.export with dynamo=False) cannot record a rollout; {_REMEDY}")


class NotScriptable:
    """A module that ``torch.jit.script`` refuses with a message."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: torch.jit.script cannot compile a rollout; {_REMEDY}")
