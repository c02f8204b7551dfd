"""Registers, spills, shared memory and tensor-core instructions of the Triton kernels, compiled without a device, as a table.

python scripts/triton_resources.py [--update docs/notes/kernel_resources.md]

The kernels are compiled with the arguments of real launches, for sm_80, sm_90 and sm_100: to cubins, by the ptxas of Triton's wheel.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_resources import replaced
from torch import Tensor

from rnndyn_fast.ops import triton_conv
from rnndyn_fast.ops.fused_conv import ConvTerm
from rnndyn_fast.ops.triton_conv import Launch

START, END = "<!-- triton kernel resources -->", "<!-- end of triton kernel resources -->"
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTRUCTIONS = {"wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma"}
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def _map(channels: int, size: int, dtype: torch.dtype, samples: int = 64) -> Tensor:
    return torch.empty(samples, size, size, channels, dtype=dtype, device="meta")


def forward(channels: int, dtype: torch.dtype, capability: tuple[int, int], samples: int = 64) -> Launch:
    """A lateral convolution that is added to what is there, as most time steps have it."""
    x, weight = _map(channels, 16, dtype, samples), torch.empty(channels, 3, 3, channels, dtype=dtype, device="meta")
    value, bias = torch.empty_like(x), torch.empty(channels, device="meta")
    groups = triton_conv.recurrent_conv_moment_groups(*value.shape)[0]
    moments = torch.empty(samples, groups, 2, device="meta")
    return triton_conv.conv_launch([ConvTerm(x, weight, 1, 1)], bias, [torch.empty_like(x)], None, value, None, moments, capability)


def several(channels: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """Bottom-up, lateral and top-down terms that modulate a drive."""
    value = _map(channels, 16, dtype)
    below, above = _map(channels // 2, 16, dtype), _map(2 * channels, 8, dtype)
    terms = [(below, False), (torch.empty_like(value), False), (above, True)]
    given = [
        ConvTerm(x, torch.empty(channels, 3, 3, x.shape[3], dtype=dtype, device="meta"), 2 if transposed else 1, 1, transposed)
        for x, transposed in terms
    ]
    groups = triton_conv.recurrent_conv_moment_groups(*value.shape)[0]
    moments, outputs = torch.empty(64, groups, 2, device="meta"), [torch.empty_like(value) for _ in range(3)]
    return triton_conv.conv_launch(given, None, outputs[:1], outputs[1], value, outputs[2], moments, capability)


def weight_grad(channels: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """Of a 3 x 3 convolution, in four splits."""
    rows, gathered = _map(channels, 16, dtype), _map(channels, 16, dtype)
    precision = triton_conv.precision_of(dtype, product=False)
    tile = triton_conv.weight_grad_tile(channels, channels, dtype, precision, capability)
    out = torch.empty(4, channels, 3, 3, channels, device="meta")
    return triton_conv.weight_grad_launch(rows, gathered, out, 1, 1, tile, precision)


def launches(dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, Launch]:
    """By what they are, with their tile: the default tile first."""
    found = [
        ("1 term", forward(256, dtype, capability)),
        ("1 term", forward(64, dtype, capability, samples=256)),
        ("1 term", forward(64, dtype, capability, samples=2)),
        ("3 terms, modulating", several(256, dtype, capability)),
        ("", weight_grad(256, dtype, capability)),
        ("", weight_grad(64, dtype, capability)),
    ]
    # A slab's depth and the stages follow from dtype and architecture.
    return {
        f"`{x.kernel.removesuffix('_kernel')}` {x.options['ROWS']} x {x.options['COLUMNS']}{', ' if what else ''}{what}": x
        for what, x in found
    }


@dataclass(frozen=True)
class Resources:
    """Of one kernel, storage type and architecture."""

    kernel: str
    storage: str
    architecture: int
    registers: int
    stack_bytes: int  # what is spilled
    shared_bytes: int
    instructions: dict[str, int]  # of tensor cores, in the PTX


class _Architecture:
    """Stands for Triton's driver of a device."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number  # (kernels are kept by device)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    """Triton's driver says that the current device is of that architecture."""
    from triton.runtime import driver

    driver.set_active(_Architecture(architecture))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # there is no device, nor a driver to go back to
            driver.reset_active()


def _cuobjdump() -> str:
    import triton

    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump: neither in Triton's wheel nor on the PATH")
    return found


def compiled(name: str, launch: Launch, dtype: torch.dtype, architecture: int) -> Resources:
    """Compile a launch's kernel, without launching it."""
    from rnndyn_fast.ops import triton_kernels

    with compiling_for(architecture):
        kernel = getattr(triton_kernels, launch.kernel).warmup(*launch.arguments, grid=launch.grid, **launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = USAGE.search(said)
    if usage is None:
        raise ValueError(f"cuobjdump: not understood: {said[:300]}")
    counts = {what: len(re.findall(pattern, kernel.asm["ptx"])) for what, pattern in INSTRUCTIONS.items()}
    storage = str(dtype).removeprefix("torch.")
    return Resources(name, storage, architecture, int(usage[1]), int(usage[2]), int(kernel.metadata.shared), counts)


def rows(resources: Sequence[Resources]) -> list[str]:
    """Of the table: a kernel on one architecture, with the numbers of all storage types where these are not the same."""
    lines = []
    for kernel, architecture in dict.fromkeys((r.kernel, r.architecture) for r in resources):
        found = [r for r in resources if (r.kernel, r.architecture) == (kernel, architecture)]
        columns: list[list[int]] = [[r.registers for r in found], [r.stack_bytes for r in found], [r.shared_bytes for r in found]]
        columns += [[r.instructions[what] for r in found] for what in INSTRUCTIONS]
        cells = [str(c[0]) if len(set(c)) == 1 else ", ".join(map(str, c)) for c in columns]
        lines.append(f"| {kernel} | sm_{architecture} | {' | '.join(cells)} |")
    return lines


def table() -> str:
    """Kernels and architectures in rows; float32 (TF32), float16 and bfloat16 in cells."""
    import triton

    torch.backends.cudnn.allow_tf32 = True
    found = []
    by_dtype = {(d, a): launches(d, (a // 10, a % 10)) for a in ARCHITECTURES for d in DTYPES}
    for name in by_dtype[DTYPES[0], ARCHITECTURES[0]]:
        for architecture in ARCHITECTURES:
            for dtype in DTYPES:
                found.append(compiled(name, by_dtype[dtype, architecture][name], dtype, architecture))
            print(rows(found)[-1], file=sys.stderr, flush=True)
    head = ["kernel", "architecture", "registers", "spilled bytes", "shared bytes", *(f"`{what}`" for what in INSTRUCTIONS)]
    lines = [f"By Triton {triton.__version__}; float32 (TF32), float16, bfloat16.", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *rows(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--update", type=Path, help="page whose table is replaced; else the table is printed")
    arguments = parser.parse_args()
    text = table()
    if arguments.update is None:
        print(text)
    else:
        page = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(replaced(page, text, START, END), encoding="utf-8")


if __name__ == "__main__":
    main()
