"""Forward and training of gated cells and of the networks beyond the first, against the plain way: every term at every
time step, cells in PyTorch's operations (``backend="reference"``), eager and by torch.compile.

    pytest benchmarks/bench_networks.py

Cells: T = 16, batch 8, 64 channels on 28 x 28; networks at a quarter of their width. Outputs are checked here too.
RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. RNNDYN_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import QUICK, alternate, summary, write_result

from rnndyn_fast.models import blt_vs, convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork

STEPS, BATCH, CHANNELS, SIZE, ROUNDS = (3, 2, 4, 6, 2) if QUICK else (16, 8, 64, 28, 5)
COMPILE = os.environ.get("RNNDYN_BENCH_COMPILE", "1") == "1" and not QUICK
CELLS = ("simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", "rgc_shallow", "rgc_median")
WIDTHS = {f"conv{i}": c for i, c in zip(range(1, 11), (16, 32, 32, 32, 32, 64, 64, 64, 128, 128), strict=True)}


def cell(kind: str) -> tuple[RecurrentNetwork, list[torch.Tensor]]:
    extra = {"residual_channels": CHANNELS} if kind.startswith("rgc") else {}
    net = ConvCell(kind, CHANNELS, CHANNELS, (SIZE, SIZE), **extra)
    net.timesteps = STEPS
    inputs = []
    for node in net.network.inputs:
        lead = (STEPS, BATCH) if node.frames else (BATCH,)
        inputs.append(torch.randn(*lead, node.channels, node.height, node.width))
    return net, inputs


def network(name: str) -> tuple[RecurrentNetwork, list[torch.Tensor]]:
    if name == "rgc_intermediate":
        size = 64 if QUICK else 112
        return convrnn(name, image_size=size, num_classes=100, widths=WIDTHS, cell_channels=16), [torch.randn(4, 3, size, size)]
    if name == "blt_vs":
        return blt_vs(1 if QUICK else 3, 100, 20, bio_unroll=False, image_size=128), [torch.randn(1 if QUICK else 4, 3, 128, 128)]
    return rcnn_sat("bl", 100, timesteps=4, image_size=64, width_divisor=32 if QUICK else 4), [torch.randn(4, 3, 64, 64)]


def contenders(net: RecurrentNetwork, inputs: list[torch.Tensor], train: bool) -> dict[str, Callable[[], Any]]:
    names = net.recorded if isinstance(net, ConvCell) else (net.network.areas[-1].name,)

    def run(backend: str) -> list[torch.Tensor]:
        net.backend = backend
        return net.states(inputs, names)

    compiled = torch.compile(run) if COMPILE else None

    def step(call: Callable[[str], list[torch.Tensor]], backend: str) -> list[torch.Tensor]:
        with torch.set_grad_enabled(train):
            states = call(backend)
            if train:
                sum(s.square().sum() for s in states).backward()
        return states

    found: dict[str, Callable[[], Any]] = {"ours": lambda: step(run, "scheduled"), "plain": lambda: step(run, "reference")}
    if compiled is not None:
        found["compiled"] = lambda: step(compiled, "reference")
    for a, b in zip(found["ours"](), found["plain"](), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    return found


@pytest.mark.parametrize("what", ["forward", "training"])
@pytest.mark.parametrize("name", [*CELLS, "rgc_intermediate", "blt_vs", "rcnn_sat_bl"])
def test_networks(name: str, what: str) -> None:
    torch.manual_seed(0)
    net, inputs = cell(name) if name in CELLS else network(name)
    net.eval()
    times = alternate(contenders(net, inputs, what == "training"), ROUNDS)
    result = summary(times, "ours")
    print(name, what, {k: f"{v['median_s']:.3f} s, {v['ours_is_faster_by']:.2f}x" for k, v in result.items()})
    if not QUICK:
        write_result(f"networks_{what}_{name}", {"contenders": result})
