"""The launches of the native core: named here, run at once, or taken down to be run later (:mod:`rnndyn_fast.program.bind`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Functions that write memory and nothing else; those of two dtypes are named once.
LAUNCHES = (
    "activation_backward", "amx_conv", "amx_pack_weight", "amx_weight_grad", "area_step_backward", "area_step_forward", "channels_last",
    "depthwise_conv", "depthwise_weight_grad", "gate_step", "norm_step_backward", "norm_step_forward", "separable_conv", "winograd_conv",
    "winograd_pack_weight", "winograd_weight_grad",
)  # fmt: skip

Call = tuple[Callable[..., None], tuple[Any, ...]]
_taken = threading.local()


class Core:
    """The native core's functions; a launch is taken down instead of run where this thread asks for that."""

    def __init__(self, module: ModuleType) -> None:
        launches = {f"{name}{dtype}" for name in LAUNCHES for dtype in ("", "_float32", "_float64")}
        for name, value in vars(module).items():
            setattr(self, name, _taking(value) if name in launches else value)


def _taking(function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        calls = getattr(_taken, "calls", None)
        if calls is None:
            function(*args)
        else:
            calls.append((function, args))

    return call


@contextmanager
def taken_down() -> Iterator[list[Call]]:
    """Launches of this thread are not run, but listed."""
    before = getattr(_taken, "calls", None)
    _taken.calls = calls = list[Call]()
    try:
        yield calls
    finally:
        _taken.calls = before
