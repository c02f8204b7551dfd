"""Where a job runs, in what precision, and how its batches get there."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rnndyn_fast.ops.cuda_module import check_device

# Of maps; parameters, statistics and sums are float32.
OTHER_MAKERS = {"mps": "Apple's GPUs", "xpu": "Intel's GPUs"}  # the reference runs there
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def named_device(name: str) -> torch.device:
    """The device of a name; ``ValueError`` for what is none of cpu, cuda, cuda:1, ..., mps, xpu, xpu:1, ..."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", *OTHER_MAKERS):
        raise ValueError(f"device: expected cpu, cuda or cuda:1, ..., mps, or xpu or xpu:1, ..., got {name!r}")
    return device


def backend_on(device: torch.device, backend: str | None) -> str | None:
    """The backend that networks run on there: as asked for, but on GPUs that we have no kernels for the reference, with a warning.

    Raises: ``ValueError``: another backend was asked for there.
    """
    if device.type not in OTHER_MAKERS or backend == "reference":
        return backend
    if backend is not None:
        raise ValueError(f"backend: on {device} expected reference, got {backend!r}: there are no kernels for {OTHER_MAKERS[device.type]}")
    warnings.warn(f"there are no kernels for {OTHER_MAKERS[device.type]}: networks run on the reference backend there", stacklevel=2)
    return "reference"


def analysed_on(device: torch.device) -> torch.device:
    """Where the measures of activations of that device are taken: there, or where it may have no float64 on the CPU."""
    return torch.device("cpu") if device.type in OTHER_MAKERS else device


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, where "cuda" and "xpu" are this process's GPU; None: an NVIDIA GPU where there is one, else the CPU.

    Raises: ``ValueError``: it is not there, and why.
    """
    if name is not None:
        device = named_device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            return choose_device()
        check_device(device)
        if device.type in OTHER_MAKERS:
            count = torch.xpu.device_count() if device.type == "xpu" else int(torch.backends.mps.is_available())
            if (device.index or 0) >= count:
                there = f"{count}" if count else f"none that torch {torch.__version__} can use"
                raise ValueError(f"device: of {OTHER_MAKERS[device.type]} this machine has {there}, got {device}")
            if device.type == "xpu" and device.index is None and "LOCAL_RANK" in os.environ:
                return torch.device("xpu", int(os.environ["LOCAL_RANK"]) % count)
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ``ValueError`` for a precision that is none, or that this device cannot train or run in."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"precision: float16 needs a CUDA device, got {device}; bfloat16 and float32 run on the CPU too")


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to a precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. From the CPU to a GPU by pinned memory, so that nobody waits for the copy but what uses it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
