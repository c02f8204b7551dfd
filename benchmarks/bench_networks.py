"""Forward and training of gated cells and of the networks beyond the first, against the plain way in PyTorch's operations: eager, eager
with maps and weights in channels_last, and by torch.compile. Peak memory of forward and of a training step against eager. The plain way
is the published loop (:mod:`published_networks`) of BLT-VS and RCNN-SAT, else every term at every time step (``backend="reference"``).
The loss is the sum of all states: nothing of what is measured is the loss's own.

    pytest benchmarks/bench_networks.py

Cells: T = 16, batch 8, 64 channels on 28 x 28; rgc_intermediate at a quarter of its width; BLT-VS and RCNN-SAT BL as published, batch 4
of 128 x 128, T = 3 and T = 4. States and gradients are checked against float64.
RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. RNNDYN_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import published_networks
import pytest
import torch
from measure import QUICK, alternate, peak_memory, summary, write_result

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
    size = 64 if QUICK else 128
    return rcnn_sat("bl", 100, timesteps=4, image_size=size, width_divisor=32 if QUICK else 1), [torch.randn(4, 3, size, size)]


def recorded(net: RecurrentNetwork) -> tuple[str, ...]:
    """What the loss is taken of."""
    if isinstance(net, ConvCell):
        return net.recorded
    return (net.network.readout.source if net.network.readout else net.network.areas[-1].name,)


PUBLISHED = {"blt_vs": published_networks.blt_vs, "rcnn_sat_bl": published_networks.rcnn_sat_bl}
States = list[torch.Tensor]


def ours(net: RecurrentNetwork, inputs: list[torch.Tensor]) -> States:
    net.backend = "native"
    return net.states(inputs, recorded(net))


def plainly(name: str) -> Callable[[RecurrentNetwork, list[torch.Tensor]], States]:
    """The same states the plain way."""

    def published(net: RecurrentNetwork, inputs: list[torch.Tensor]) -> States:
        return [PUBLISHED[name](net, inputs[0], net.timesteps)]

    def reference(net: RecurrentNetwork, inputs: list[torch.Tensor]) -> States:
        net.backend = "reference"
        return net.states(inputs, recorded(net))

    return published if name in PUBLISHED else reference


def step(call: Callable[..., States], net: RecurrentNetwork, inputs: list[torch.Tensor], train: bool) -> States:
    net.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        states = call(net, inputs)
        if train:
            sum(s.sum() for s in states).backward()
    return states


def contenders(name: str, net: RecurrentNetwork, inputs: list[torch.Tensor], train: bool) -> dict[str, Callable[[], Any]]:
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    inputs_last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    plain = plainly(name)
    found: dict[str, Callable[[], Any]] = {
        "rnndyn": lambda: step(ours, net, inputs, train),
        "eager": lambda: step(plain, net, inputs, train),
        "eager_channels_last": lambda: step(plain, last, inputs_last, train),
    }
    if COMPILE:
        torch._dynamo.reset()  # (after eight networks it gives a function up, and runs it eagerly)
        compiled = torch.compile(plain)
        found["compiled"] = lambda: step(compiled, net, inputs, train)
    check(name, net, inputs, train)
    return found


def check(name: str, net: RecurrentNetwork, inputs: list[torch.Tensor], train: bool) -> None:
    """States and gradients are right: in norm as near to those of float64 as eager PyTorch's are, to a factor of two and a
    floor (rounding in the Winograd domain, 1e-6, goes through many norms and rectifiers). A batch norm over four numbers, as at the tiny
    size, is nearly a sign: so eight images."""
    exact = copy.deepcopy(net).double()
    if name == "rcnn_sat_bl" and QUICK:
        inputs = [torch.cat([x, x.roll((7, 13), (2, 3))]) for x in inputs]

    def values(call: Callable[..., States], net: RecurrentNetwork, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
        states = step(call, net, inputs, train)
        grads = {key: p.grad for key, p in net.named_parameters()} if train else {}
        return {**{f"state {k}": s.detach() for k, s in enumerate(states)}, **grads}

    right = values(plainly(name), exact, [x.double() for x in inputs])
    mine, eager = values(ours, net, inputs), values(plainly(name), net, inputs)
    for key, truth in right.items():
        if truth is None:
            assert mine[key] is None or not mine[key].any(), key
            continue
        error, theirs = ((found[key].double() - truth).norm() / truth.norm().clamp(min=1e-6) for found in (mine, eager))
        assert error <= 2 * theirs + 2e-2, f"{key}: off by {error:.1e} in norm, eager PyTorch by {theirs:.1e}"


def made(name: str, train: bool) -> tuple[RecurrentNetwork, list[torch.Tensor]]:
    """A cell's or a network's module, in its mode for training or for inference, and input."""
    torch.manual_seed(0)
    net, inputs = cell(name) if name in CELLS else network(name)
    return net.train(train), inputs


def passes(name: str, what: str, contender: str) -> None:
    """Four passes, for the measurement of memory: the second one is recorded, later ones are replayed."""
    net, inputs = made(name, what == "training")
    for _ in range(4):
        step(ours if contender == "rnndyn" else plainly(name), net, inputs, what == "training")


@pytest.mark.parametrize("what", ["forward", "training"])
@pytest.mark.parametrize("name", [*CELLS, "rgc_intermediate", "blt_vs", "rcnn_sat_bl"])
def test_memory(name: str, what: str) -> None:
    load = f"import torch\nfrom bench_networks import passes\ntorch.set_num_threads({torch.get_num_threads()})"
    peaks = {key: peak_memory(f"passes({name!r}, {what!r}, {key!r})", baseline=load) for key in ("rnndyn", "eager")}
    print(name, what, {k: f"{v / 2**20:.0f} MiB" for k, v in peaks.items()})
    if not QUICK:
        write_result(f"networks_memory_{what}_{name}", {"section": "networks", "what": f"{what}, {name}", "peak_bytes": peaks})


@pytest.mark.parametrize("what", ["forward", "training"])
@pytest.mark.parametrize("name", [*CELLS, "rgc_intermediate", "blt_vs", "rcnn_sat_bl"])
def test_networks(name: str, what: str) -> None:
    net, inputs = made(name, what == "training")
    times = alternate(contenders(name, net, inputs, what == "training"), ROUNDS)
    result = summary(times, "rnndyn")
    print(name, what, {k: f"{v['median_s']:.3f} s, {v['ours_is_faster_by']:.2f}x" for k, v in result.items()})
    if not QUICK:
        write_result(f"networks_{what}_{name}", {"section": "networks", "what": f"{what}, {name}", "contenders": result})
