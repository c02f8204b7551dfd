"""The table of published networks in docs/networks.md: parameters, multiply-adds, and bytes that training keeps.

python scripts/model_table.py                             print it (some minutes: every network runs once, on one image)
python scripts/model_table.py --update docs/networks.md   put it between the page's marks
python scripts/model_table.py --check docs/networks.md    fail where the page says something else; only small networks run
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rnndyn_fast.graph.taped import TapedRun
from rnndyn_fast.models import build
from rnndyn_fast.models.convrnn_nets import BASES
from rnndyn_fast.nn import RecurrentNetwork

START, END = "<!-- model table -->", "<!-- end of model table -->"
SMALL = 5e9  # multiply-adds of networks that a check runs
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
    "float32 tensors that a training step holds from its forward to its backward pass on the CPU, parameters and image apart. "
    "Made by `scripts/model_table.py`."
)


def kept_bytes(net: RecurrentNetwork) -> int:
    """Bytes of the tensors that autograd, and a rollout's own tape, keep of a forward pass over one image: storages counted once, less
    parameters and the image."""
    image = net.network.inputs[0]
    x = torch.zeros(1, image.channels, image.height, image.width)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *net.parameters(), *net.buffers())}
    kept: dict[int, tuple[torch.Tensor, int, int]] = {}  # of each storage (held, so that no address is used twice) the bytes first .. last

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and tensor.numel():
            first = tensor.storage_offset() * tensor.itemsize
            last = first + (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize
            _, low, high = kept.get(address, (tensor, first, last))
            kept[address] = tensor, min(low, first), max(high, last)
        return tensor

    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        warnings.filterwarnings("ignore", message="running backend")
        answers = net.train().run(x)
    for tensor in taped(answers):
        pack(tensor)
    return sum(last - first for _, first, last in kept.values())


def taped(answers: torch.Tensor) -> list[torch.Tensor]:
    """What the tapes of rollouts hold that led to these values."""
    found, seen, nodes = [], set(), [answers.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
        if isinstance(run := getattr(node, "run", None), TapedRun):
            found.extend(run.tape.held())
    return found


def cells(name: str, options: Mapping[str, Any], run: float) -> list[str]:
    """A row. Networks of more than `run` multiply-adds are not run: their last cell is empty."""
    with torch.device("meta"):
        net = build(options)
    steps = net.timesteps
    total = net.schedule().multiplications()[0]
    # (Before the first answer there is nothing to compute.)
    further = total - net.schedule(timesteps=steps - 1).multiplications()[0] if steps > 1 else None
    held = 0
    if total <= run:
        net = build(options)
        net.engine = "direct"  # (the same on every processor)
        held = kept_bytes(net)
    kept = f"{held / 2**20:,.0f}" if held else ""
    parameters = sum(p.numel() for p in net.parameters())
    return [name, f"{parameters:,}", str(steps), f"{total / 1e9:.3g}", "" if further is None else f"{further / 1e9:.3g}", kept]


def table(run: float = float("inf")) -> str:
    """The table as Markdown."""
    rows = [cells(name, options, run) for name, options in NETWORKS.items()]
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", NOTE])


def between(page: str) -> tuple[str, str, str]:
    """A page before, between and after its marks. Raises ValueError where it has not one of each."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"page: expected one {START} and after it one {END}")
    before, _, rest = page.partition(START)
    inside, _, after = rest.partition(END)
    return before, inside.strip(), after


def same(one: str, other: str) -> bool:
    """Whether two tables say the same where both say something."""
    lines = [text.splitlines() for text in (one, other)]
    if len(lines[0]) != len(lines[1]):
        return False
    for a, b in zip(*lines, strict=True):
        pairs = list(zip(a.split("|"), b.split("|"), strict=False))
        if a.count("|") != b.count("|") or any(x.strip() != y.strip() and x.strip() and y.strip() for x, y in pairs):
            return False
    return True


def main() -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", type=Path, metavar="PAGE")
    parser.add_argument("--run", type=float, default=float("inf"), help="multiply-adds of the largest network to run; default: all")
    mode.add_argument("--check", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if options.check:
        agrees = same(between(options.check.read_text(encoding="utf-8"))[1], table(SMALL))
        print(f"{options.check}: {'up to date' if agrees else 'differs; run scripts/model_table.py --update'}")
        return int(not agrees)
    made = table(options.run)
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
