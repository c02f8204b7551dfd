"""Gated cells and the networks beyond the first on a CUDA device: our kernels (``backend="native"``), also as CUDA graphs, against every
term at every time step in PyTorch's operations, eager and with maps and weights in channels_last; float16 by autocast, in the same run,
alternating. Peak memory of a training step.

    pytest benchmarks/bench_networks_cuda.py

Cells: T = 16, batch 64, 64 channels on 28 x 28; BLT-VS as published, T = 6, batch 32; RCNN-SAT BL as published, T = 8, batch 32.
Outputs are checked here too. Times are medians by CUDA events. Without a device everything is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from measure import QUICK
from on_device import DEVICE, DRY, NO_DEVICE, alternate_on_device, keep, keep_peaks, mixed_precision, peak_bytes, use_harness
from torch import Tensor

from rnndyn_fast.models import blt_vs, rcnn_sat
from rnndyn_fast.nn import ConvCell, GraphedNetwork, GraphedTrainingStep, RecurrentNetwork

pytestmark = pytest.mark.skipif(NO_DEVICE is not None, reason=str(NO_DEVICE))

SMALL = QUICK or DRY
STEPS, BATCH, CHANNELS, SIZE = (2, 2, 8, 5) if SMALL else (16, 64, 64, 28)
CELLS = ("lstm", "rgc_median")
NAMES = CELLS if DRY else (*CELLS, "blt_vs", "rcnn_sat_bl")  # (whole networks would keep the harness busy for minutes)


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        use_harness(monkeypatch)


def made(name: str) -> tuple[RecurrentNetwork, list[Tensor], tuple[str, ...]]:
    """A network, its inputs, and what the loss is taken of."""
    torch.manual_seed(0)
    net: Any
    if name in CELLS:
        net = ConvCell(name, CHANNELS, CHANNELS, (SIZE, SIZE), **({"residual_channels": CHANNELS} if name.startswith("rgc") else {}))
        net.timesteps = STEPS
        record = net.recorded
    else:
        net = blt_vs(6, 565, bio_unroll=False) if name == "blt_vs" else rcnn_sat("bl", 565, timesteps=8)
        record = (net.network.readout.source,)
    batch = BATCH if name in CELLS else 2 if SMALL else 32
    shapes = [(*((net.timesteps, batch) if n.frames else (batch,)), n.channels, n.height, n.width) for n in net.network.inputs]
    if DRY:
        net.engine = "fused"  # nothing can be timed
    return net.to(DEVICE), [torch.randn(shape).to(DEVICE) for shape in shapes], record


def contenders(name: str) -> dict[str, tuple[RecurrentNetwork, list[Tensor], tuple[str, ...]]]:
    """The same parameters and inputs in each."""
    ours, inputs, record = made(name)
    ours.backend = "native"
    eager = copy.deepcopy(ours)
    eager.backend = "reference"
    last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    inputs_last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    return {"rnndyn": (ours, inputs, record), "eager": (eager, inputs, record), "channels_last": (last, inputs_last, record)}


def loss_of(net: RecurrentNetwork, inputs: Sequence[Tensor], record: Sequence[str]) -> Tensor:
    return torch.stack([s.float().square().mean() for s in net.states(inputs, record)]).sum()


@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str) -> None:
    runs: dict[str, Callable[[], Any]] = {}
    nets = contenders(name)
    for contender, (net, inputs, record) in nets.items():
        net.eval()

        def run(net: RecurrentNetwork = net, inputs: list[Tensor] = inputs, record: tuple[str, ...] = record) -> list[Tensor]:
            with torch.no_grad(), mixed_precision():
                return net.states(inputs, record)

        runs[contender] = run
    if not DRY:
        net, inputs, record = nets["rnndyn"]
        graphed = GraphedNetwork(net, call=lambda *xs: net.states(xs, record), copy=False)

        def replay() -> Any:
            with mixed_precision():
                return graphed(*inputs)

        runs["rnndyn_graph"] = replay
    expected = runs["eager"]()
    for contender, run in runs.items():
        for _ in range(1 if DRY else 3):
            found = run()
        for a, b in zip(found, expected, strict=True):
            error = float((a.float() - b.float()).norm() / b.float().norm())
            assert error < 5e-2, f"{contender}: {error:.2g}"
    keep(f"cuda_networks_forward_{name}", alternate_on_device(runs), batch=len(inputs[0]), dtype="float16 autocast")


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name: str) -> None:
    steps: dict[str, Callable[[], Any]] = {}
    nets = contenders(name)
    for contender, (net, inputs, record) in nets.items():
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=not DRY)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)

        def step(net: Any = net, inputs: Any = inputs, record: Any = record, optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            optimizer.zero_grad(set_to_none=True)
            with mixed_precision():
                loss = loss_of(net, inputs, record)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        steps[contender] = step
    if not DRY:
        net, inputs, record = nets["rnndyn"]
        graphed = GraphedTrainingStep(
            net, lambda *xs: loss_of(net, xs, record), torch.optim.Adam(net.parameters(), lr=1e-4, fused=True, capturable=True),
            scaler=torch.amp.GradScaler("cuda", init_scale=1024.0), autocast=torch.float16,
        )  # fmt: skip
        steps["rnndyn_graph"] = lambda: graphed(*inputs)
    peaks = {}
    for contender, step in steps.items():
        for _ in range(1 if DRY else 5):  # (past the capture of graphs)
            step()
        if contender != "rnndyn_graph":  # its memory stays
            peaks[contender] = peak_bytes(step)
    keep(f"cuda_networks_training_{name}", alternate_on_device(steps), batch=len(inputs[0]), dtype="float16 autocast")
    keep_peaks(f"cuda_networks_memory_{name}", peaks, batch=len(inputs[0]), dtype="float16 autocast")
