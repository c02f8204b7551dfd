"""The native module ``_cuda``: whether it is there and can run, and on which devices. Its kernels are launched by
:mod:`rnndyn_fast.ops.launch`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

unavailable: str | None = None  # why there are no CUDA kernels, if there are none
_module: Any = None
try:
    from rnndyn_fast import _cuda as _module  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    unavailable = f"this build has no CUDA kernels ({error})"

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def build_info() -> dict[str, Any]:
    """What the CUDA kernels were built with and for; raises ``ImportError`` with the reason where there are none."""
    if unavailable:
        raise ImportError(unavailable)
    return {**_module.build_info(), "devices": _module.device_count()}


@cache
def device_error(index: int) -> str | None:
    """Why the kernels cannot run on a CUDA device of this machine; None if they can. Asked once, when the device is in use already."""
    error = _module.device_error(index)
    if not error:
        return None
    info = _module.build_info()
    driver = info["driver"]
    supported = f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is no driver"
    return f"the CUDA kernels cannot run on cuda:{index}: {error} (built by nvcc {info['nvcc']} for {info['architectures']}; {supported})"


def module() -> Any:
    """The native module ``_cuda``."""
    return _module


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def check_device(device: torch.device) -> None:
    """Raise ``ValueError`` for a CUDA device that is not there, with the reason where there is none at all."""
    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else f"none that torch can use ({why_no_device()})"
        raise ValueError(f"device: this machine's CUDA devices are {there}, got {device}")


def why_no_device() -> str:
    """Why torch sees no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old: torch says which
        return str(error).strip().splitlines()[0].split(". ")[0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "the driver shows none" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r} shows none"


def why_not(tensor: Tensor, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> str | None:
    """Why a CUDA tensor cannot be used, of these dtypes; None if it can."""
    if unavailable:
        return unavailable
    major, minor = capability(tensor.device)
    if major < 8:
        return f"{tensor.device} has compute capability {major}.{minor}; the kernels need 8.0 or later"
    if error := device_error(tensor.device.index or 0):
        return error
    if tensor.dtype not in dtypes:
        return f"it has {tensor.dtype} on {tensor.device}; expected {' or '.join(str(d) for d in dtypes)}"
    return None


def moment_groups(samples: int, height: int, width: int, channels: int) -> list[int]:
    """How the fused convolution leaves moments: [N, groups, 2], and what ``area_step_forward`` must know of them."""
    return list(_module.recurrent_conv_tiles(samples, height, width, channels)[2])
