"""Registers, shared memory and spills of the CUDA kernels, from what ptxas said when they were built, as a table.

python scripts/kernel_resources.py BUILD [--update docs/notes/kernel_resources.md]

BUILD is the folder of a build of ``_cuda``, for example build/cp311-cp311-linux_x86_64.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

START, END = "<!-- kernel resources -->", "<!-- end of kernel resources -->"
STORAGE = {"f": "float32", "NS0_4HalfE": "float16", "NS0_8BFloat16E": "bfloat16"}
ENTRY = re.compile(r"Compiling entry function '_Z\S*?\d([a-z_]+_kernel)I(f|NS0_4HalfE|NS0_8BFloat16E)((?:Li\d+E)*)E\S*' for '(sm_\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """Of one kernel, storage type and architecture."""

    kernel: str  # with its sizes: elements of a vector, or rows x columns of a tile
    storage: str
    architecture: str
    registers: int
    shared_bytes: int  # known at compile time; tiles are asked for at launch
    spill_bytes: int  # stores and loads


def read(build: Path) -> list[Resources]:
    """Every kernel of a build; raises ``FileNotFoundError`` where there are none."""
    logs = sorted((build / "csrc" / "cuda").glob("*.o.log"))
    if not logs:
        raise FileNotFoundError(f"{build}: no build of the CUDA kernels (expected csrc/cuda/*.o.log)")
    found = []
    for log in logs:
        for part in log.read_text(encoding="utf-8").split("ptxas info    : Compiling")[1:]:
            entry = ENTRY.match("Compiling" + part)
            spills, used = SPILLS.search(part), USED.search(part)
            if entry is None or spills is None or used is None:
                raise ValueError(f"{log.name}: not understood: {part[:300]}")
            kernel, storage, sizes, architecture = entry.groups()
            numbers = " x ".join(re.findall(r"\d+", sizes))
            shared = SHARED.search(part)
            found.append(
                Resources(
                    f"`{kernel}` {numbers}".strip(),
                    STORAGE[storage],
                    architecture,
                    int(used[1]),
                    int(shared[1]) if shared else 0,
                    int(spills[2]) + int(spills[3]),
                )
            )
    return found


def table(resources: list[Resources]) -> str:
    """Kernels in rows; registers as the range over the architectures."""
    lines = [
        f"Architectures: {', '.join(sorted({r.architecture for r in resources}, key=lambda name: int(name[3:])))}.",
        "",
        "| kernel | registers, float32 | float16 | bfloat16 | shared bytes | spilled bytes |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in sorted({r.kernel for r in resources}):
        rows = [r for r in resources if r.kernel == kernel]
        cells = []
        for storage in STORAGE.values():
            registers = [r.registers for r in rows if r.storage == storage]
            low, high = (min(registers), max(registers)) if registers else (0, 0)
            cells.append("" if not registers else str(low) if low == high else f"{low} to {high}")
        lines.append(f"| {kernel} | {' | '.join(cells)} | {max(r.shared_bytes for r in rows)} | {max(r.spill_bytes for r in rows)} |")
    return "\n".join(lines)


def replaced(page: str, new: str, start: str = START, end: str = END) -> str:
    """The page with what is between its marks replaced."""
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"page: expected one {start} and one {end}")
    return page[: page.index(start)] + f"{start}\n{new}\n" + page[page.index(end) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--update", type=Path, help="page whose table is replaced; else the table is printed")
    arguments = parser.parse_args()
    text = table(read(arguments.build))
    if arguments.update is None:
        print(text)
    else:
        page = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(replaced(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
