"""The CUDA kernels on the CPU: builds the module of the SIMT harness (csrc/simt) and puts it where the launches look for ``_cuda``.

Tensors stay on the CPU. Every buffer of a launch is registered at exactly its size, with what the kernel may do with it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rnndyn_fast.ops import addresses, cuda_module
from rnndyn_fast.ops.addresses import Use, device_address

ROOT = Path(__file__).resolve().parents[1]
# Kept, so that only what has changed is built again.
BUILD = ROOT / "build" / f"simt-{sys.implementation.cache_tag}"

LEAST_SHARED_BYTES = 99 * 1024  # that a block can have, over the architectures supported: of sm_86, sm_89 and sm_120


@cache
def build() -> Any:
    """The module ``_simt``; RNNDYN_SIMT_MODULE names another one than that of this source."""
    path = os.environ.get("RNNDYN_SIMT_MODULE")
    if path is None:
        BUILD.parent.mkdir(exist_ok=True)
        command = ["sh", str(ROOT / "scripts" / "simt.sh"), sys.executable, str(BUILD)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        path = done.stdout.strip()
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(module: Any, tensor: Tensor, name: str, use: Use) -> None:
    """Let device code use a tensor's memory, and nothing beside it. (What lies between rows that lie apart is not told from them.)"""
    size = tensor.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    module.register_buffer(name, tensor.data_ptr(), extent * size, size, use is not Use.READ, use is not Use.WRITE)


class Watched:
    """Stands for ``_cuda`` in ``cuda_module``: before each launch, its buffers are registered."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.pending: list[tuple[Tensor, str, Use]] = []  # buffers of the launch to come

    def address(self, tensor: Tensor | None, name: str, *rest: Any, **options: Any) -> int:
        """In place of ``device_address``, whose arguments after the device say what the kernel does."""
        address = device_address(tensor, name, *rest, **options)
        if tensor is not None:
            self.pending.append((tensor, name, rest[3]))
        return address

    def launch(self, op: str, *args: Any) -> Any:
        """A launch, before which its buffers are registered, each part of its scratch on its own."""
        buffers, self.pending = self.pending, []
        launch = self.module.launch(op, *args)

        def call(device: int, stream: int, memory: int) -> None:
            self.module.forget_buffers()
            for tensor, what, use in buffers:
                register(self.module, tensor, what, use)
            for number, (first, elements, size) in enumerate(launch.scratch_parts):
                self.module.register_buffer(f"scratch {number}", memory + first, elements * size, size, True, False)
            try:
                launch(device, stream, memory)
            finally:
                self.module.forget_buffers()

        return Launched(call, launch.scratch_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass(frozen=True)
class Launched:
    """A launch as the module gives it."""

    call: Callable[[int, int, int], None]
    scratch_bytes: int

    def __call__(self, device: int, stream: int, memory: int) -> None:
        self.call(device, stream, memory)


class OnDevice:
    """Stands for the harness where the kernels run on a device: threads there have no order to be chosen."""

    class Order:
        FORWARD = REVERSED = RANDOM = None

    def set_order(self, order: None, seed: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda_module._module, name)


@cache
def registers() -> dict[str, int]:
    """The most registers that a thread of each kernel takes, from docs/notes/kernel_resources.md (a test holds it to ptxas's report)."""
    most: dict[str, int] = {}
    page = (ROOT / "docs" / "notes" / "kernel_resources.md").read_text(encoding="utf-8")
    for kernel, cells in re.findall(r"^\| `(\w+_kernel)`[ x0-9]* \|((?:[^|]*\|){3})", page, re.MULTILINE):
        most[kernel] = max(most.get(kernel, 0), *(int(n) for n in re.findall(r"\d+", cells)))
    assert len(most) > 20, "docs/notes/kernel_resources.md: no table of registers"
    return most


def install(patch: pytest.MonkeyPatch) -> Any:
    """Launches run in the harness from now on. Returns the module."""
    watched = Watched(build())
    patch.setattr(cuda_module, "_module", watched)
    patch.setattr(cuda_module, "unavailable", None)
    patch.setattr(cuda_module, "device_error", lambda index: None)
    patch.setattr(addresses, "device_address", watched.address)
    patch.setattr(addresses, "device_queue", lambda device: (0, 0))
    watched.module.set_limits(LEAST_SHARED_BYTES, registers())
    watched.module.set_order(watched.module.Order.RANDOM, 1)
    return watched.module
