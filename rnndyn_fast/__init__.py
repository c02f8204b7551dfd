"""Fast convolutional recurrent networks, and streaming analysis of their representation dynamics.

What the package offers is imported when it is first used, so that ``import rnndyn_fast`` and ``rnndyn --help`` take no time.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnndyn_fast.graph import Network, compile_schedule
    from rnndyn_fast.models.accelerate import accelerate
    from rnndyn_fast.ops.core import build_info
    from rnndyn_fast.program.plan import release_memory
    from rnndyn_fast.program.rollout import can_run_native, rollout

__version__ = "0.1.0"
__all__ = ["Network", "accelerate", "build_info", "can_run_native", "compile_schedule", "release_memory", "rollout"]

_HOMES = {
    "Network": "graph", "accelerate": "models", "build_info": "ops.core", "can_run_native": "program", "compile_schedule": "graph",
    "release_memory": "program", "rollout": "program",
}  # fmt: skip


def _load(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"rnndyn_fast.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("__") and importlib.util.find_spec(f"rnndyn_fast.{name}") is not None:  # rnndyn_fast.models.blt_net_64
        if name == "_core":
            import torch  # noqa: F401  -- first, so that the native core shares torch's OpenMP runtime
        return importlib.import_module(f"rnndyn_fast.{name}")
    raise AttributeError(f"module 'rnndyn_fast' has no attribute {name!r}")


if not TYPE_CHECKING:  # (a checker of types would take every name to be there)
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
