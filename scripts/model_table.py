"""The table of published networks in docs/networks.md: parameters, multiply-adds, and bytes that training keeps.

python scripts/model_table.py                             print it (no network is run: they are planned, for one image)
python scripts/model_table.py --update docs/networks.md   put it between the page's marks
python scripts/model_table.py --check docs/networks.md    fail where the page says something else
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rnndyn_fast.models import build
from rnndyn_fast.models.convrnn_nets import BASES
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.program import describe

START, END = "<!-- model table -->", "<!-- end of model table -->"
_BLT_NET = {"timesteps": 10, "classifier_bias": False}
NETWORKS: dict[str, dict[str, Any]] = {
    "blt_net_64, lateral": {"model": "blt_net_64", "topdown_connections": False, **_BLT_NET},
    "blt_net_64, lateral and top-down": {"model": "blt_net_64", **_BLT_NET},
    "blt_net_128, lateral and top-down": {"model": "blt_net_128", **_BLT_NET},
    "blt_vs, standard, 224 px, 1000 classes": {"model": "blt_vs", "bio_unroll": False, "timesteps": 6, "num_classes": 1000},
    "blt_vs, biological, 224 px": {"model": "blt_vs"},
    "blt_vs, standard, 128 px": {"model": "blt_vs", "bio_unroll": False, "timesteps": 6, "image_size": 128},
    "blt_vs, biological, 128 px": {"model": "blt_vs", "image_size": 128},
    **{f"rcnn_sat {kind}": {"model": "rcnn_sat", "kind": kind} for kind in ("b", "b_k", "b_f", "b_d", "bl")},
    **{name: {"model": "convrnn", "name": name} for name in BASES},
}
HEADER = ("network", "parameters", "T", "multiply-adds (G)", "of a further step (G)", "kept for backward (MiB)")
NOTE = (
    "Multiply-adds and bytes are per image, of all T steps together; a term is counted once per value of its source. Kept for backward: "
    "what a training step on the CPU keeps from its forward to its backward pass, in float32, with PyTorch's convolutions, copies of "
    "weights in another layout included, of which a batch has one; parameters, image and answers apart. Made by `scripts/model_table.py`."
)


def kept_bytes(net: RecurrentNetwork) -> int:
    """Bytes that the forward pass of a training step keeps of one image for the backward pass, of a network that need not have memory."""
    # (PyTorch's convolutions: the same on every processor.)
    plan = describe.plan_for(net.schedule(), "direct", torch.float32, 1, training=True)
    return describe.kept_bytes(plan.versions[0].executable.program)


def cells(name: str, options: Mapping[str, Any]) -> list[str]:
    """A row."""
    with torch.device("meta"):
        net = build(options)
    steps = net.timesteps
    total = net.schedule().multiplications()[0]
    # (Before the first answer there is nothing to compute.)
    further = total - net.schedule(timesteps=steps - 1).multiplications()[0] if steps > 1 else None
    parameters = sum(p.numel() for p in net.parameters())
    kept = f"{kept_bytes(net) / 2**20:,.0f}"
    return [name, f"{parameters:,}", str(steps), f"{total / 1e9:.3g}", "" if further is None else f"{further / 1e9:.3g}", kept]


def table() -> str:
    """The table as Markdown."""
    rows = [cells(name, options) for name, options in NETWORKS.items()]
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", NOTE])


def between(page: str) -> tuple[str, str, str]:
    """A page before, between and after its marks. Raises ValueError where it has not one of each."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"page: expected one {START} and after it one {END}")
    before, _, rest = page.partition(START)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


def main() -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", type=Path, metavar="PAGE")
    mode.add_argument("--check", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if options.check:
        agrees = between(options.check.read_text(encoding="utf-8"))[1] == table()
        print(f"{options.check}: {'up to date' if agrees else 'differs; run scripts/model_table.py --update'}")
        return int(not agrees)
    made = table()
    if not options.update:
        print(made)
        return 0
    before, _, after = between(options.update.read_text(encoding="utf-8"))
    unfinished = options.update.with_name(f".{options.update.name}.new")
    unfinished.write_text(f"{before}{START}\n{made}\n{END}{after}", encoding="utf-8")
    os.replace(unfinished, options.update)
    return 0


if __name__ == "__main__":
    sys.exit(main())
