"""A pytest plugin (``-p sanitized_core``): the tests run on the native core at RNNDYN_SANITIZED_CORE in place of the installed one.

Every buffer is as large as it must be and no larger: those that are used again would hide a step past the end.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

_NAME = "rnndyn_fast._core"


class _Finder:
    """Comes before the finder of the editable install."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(_NAME, os.environ["RNNDYN_SANITIZED_CORE"]) if name == _NAME else None


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]

import rnndyn_fast  # noqa: E402
from rnndyn_fast.ops import amx_conv, core, winograd_conv  # noqa: E402
from rnndyn_fast.program import one_map  # noqa: E402


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Poisoned, of exactly this size."""
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)


def _workspace_of(floats: int) -> tuple[Tensor, int]:
    scratch = _empty((floats,), torch.float32)
    assert scratch.data_ptr() % 64 == 0
    return scratch, scratch.data_ptr()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run on any other core."""
    if not rnndyn_fast.build_info()["sanitized"]:
        raise pytest.UsageError(f"{os.environ['RNNDYN_SANITIZED_CORE']}: this core was built without AddressSanitizer")
    core.workspace_of = _workspace_of
    core.empty = winograd_conv.empty = amx_conv.empty = one_map.empty = _empty
