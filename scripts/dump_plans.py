"""Golden plans: how many instructions of each kind, and what memory, the rollouts of published networks and cells take.

python scripts/dump_plans.py tests/plans           write them, one file per network
python scripts/dump_plans.py tests/plans --check   fail where a plan is another one, and say how

Plans are those of the portable build, whatever the processor is: it decides engines and the sizes of packed weights.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["RNNDYN_ISA"] = "portable"

import torch

from rnndyn_fast.graph import compile_schedule
from rnndyn_fast.models import blt_net_64, blt_net_128, blt_vs, convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.program.describe import kept_bytes, plan_for
from rnndyn_fast.program.ir import Instr, Role

SAMPLES = 4
CELLS = ("simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", "rgc_shallow", "rgc_median")


def cell(kind: str) -> RecurrentNetwork:
    """16 steps of 64 channels on 28 x 28."""
    net = ConvCell(kind, 64, 64, (28, 28), **({"residual_channels": 64} if kind.startswith("rgc") else {}))
    net.timesteps = 16
    return net


NETWORKS: dict[str, Callable[[], RecurrentNetwork]] = {
    "blt_net_64": lambda: blt_net_64(timesteps=10),
    "blt_net_64_lateral": lambda: blt_net_64(timesteps=10, topdown_connections=False),
    "blt_net_128": lambda: blt_net_128(timesteps=10),
    "blt_vs": lambda: blt_vs(3, 100, 20, bio_unroll=False, image_size=128),
    "rcnn_sat_bl": lambda: rcnn_sat("bl", 100, timesteps=4, image_size=128),
    "rgc_intermediate": lambda: convrnn("rgc_intermediate", image_size=112, num_classes=100),
    **{kind: lambda kind=kind: cell(kind) for kind in CELLS},  # type: ignore[misc]
}


def _counts(name: str, instrs: tuple[Instr, ...]) -> list[str]:
    found = Counter(i.kind for i in instrs)
    return [f"  {name}: {len(instrs)} instructions", *(f"    {found[kind]:5d} {kind}" for kind in sorted(found))]


def dump(net: RecurrentNetwork) -> str:
    """The plans of a network that need not have memory."""
    record = net.recorded if isinstance(net, ConvCell) else (net.network.readout.source,) if net.network.readout else ()
    schedule = compile_schedule(net.network, net.timesteps, record)
    lines = []
    for training in (False, True):
        program = plan_for(schedule, "auto", torch.float32, SAMPLES, training=training).versions[0].executable.program
        packed = {v.value for i in program.instrs for v in i.reads if v.value.role is Role.PACKED}
        lines += [
            f"{'training' if training else 'inference'}, {SAMPLES} samples, {net.timesteps} time steps",
            f"  arena: {program.nbytes} bytes, {kept_bytes(program)} of them kept for backward",
            f"  packed weights: {sum(v.nbytes for v in packed)} bytes",
            *_counts("forward", program.part(backward=False)),
        ]
        if training:
            lines += _counts("backward", program.part(backward=True))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = 0
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            text = dump(make())
        path = options.folder / f"{name}.txt"
        if not options.check:
            path.write_text(text)
            continue
        before, after = path.read_text().splitlines() if path.exists() else [], text.splitlines()
        if before != after:
            others += 1
            print(f"{path}: another plan now:")
            print("\n".join(difflib.unified_diff(before, after, lineterm="", n=1)))
    if others:
        print(f"{others} plans differ. Where that is wanted: python scripts/dump_plans.py {options.folder}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
