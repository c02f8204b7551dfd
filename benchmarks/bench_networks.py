"""Forward and training of gated cells and of the networks beyond the first, against the plain way: every term at every
time step, in PyTorch's operations (``backend="reference"``): eager, eager with maps and weights in channels_last, and by
torch.compile. Peak memory of forward and of a training step against eager. The loss is the sum of all states: nothing of what is
measured is the loss's own.

    pytest benchmarks/bench_networks.py

Cells: T = 16, batch 8, 64 channels on 28 x 28; rgc_intermediate and RCNN-SAT at a quarter of their width. States and
gradients are checked against float64.
RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. RNNDYN_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

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
    return rcnn_sat("bl", 100, timesteps=4, image_size=64, width_divisor=32 if QUICK else 4), [torch.randn(4, 3, 64, 64)]


def recorded(net: RecurrentNetwork) -> tuple[str, ...]:
    """What the loss is taken of."""
    if isinstance(net, ConvCell):
        return net.recorded
    return (net.network.readout.source if net.network.readout else net.network.areas[-1].name,)


def contenders(net: RecurrentNetwork, inputs: list[torch.Tensor], train: bool) -> dict[str, Callable[[], Any]]:
    plain, last = net, copy.deepcopy(net).to(memory_format=torch.channels_last)
    inputs_last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]

    def run(plain: RecurrentNetwork, inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        plain.backend = backend
        return plain.states(inputs, recorded(plain))

    compiled = torch.compile(run) if COMPILE else None

    def step(
        call: Callable[..., list[torch.Tensor]], net: RecurrentNetwork, inputs: list[torch.Tensor], backend: str
    ) -> list[torch.Tensor]:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            states = call(net, inputs, backend)
            if train:
                sum(s.sum() for s in states).backward()
        return states

    found: dict[str, Callable[[], Any]] = {
        "rnndyn": lambda: step(run, net, inputs, "scheduled"),
        "eager": lambda: step(run, plain, inputs, "reference"),
        "eager_channels_last": lambda: step(run, last, inputs_last, "reference"),
    }
    if compiled is not None:
        found["compiled"] = lambda: step(compiled, plain, inputs, "reference")
    check(found, net, copy.deepcopy(net).double(), lambda truth: step(run, truth, [x.double() for x in inputs], "reference"))
    return found


def check(
    found: dict[str, Callable[[], Any]],
    net: RecurrentNetwork,
    truth: RecurrentNetwork,
    exactly: Callable[[RecurrentNetwork], list[torch.Tensor]],
) -> None:
    """States and gradients are as near float64 as eager's, within what a relu that decides a tie otherwise does to a few of them."""
    states = exactly(truth)
    exact = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None}

    def errors(contender: str) -> tuple[list[float], list[float]]:
        pairs = [(a.detach(), e.detach()) for a, e in zip(found[contender](), states, strict=True)]
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert grads.keys() == exact.keys()
        both = (pairs, [(grads[name], e) for name, e in exact.items()])
        first, second = ([float((a.double() - e).norm() / e.norm().clamp(min=1e-6)) for a, e in part] for part in both)
        return first, second

    (states_here, grads_here), (states_eager, grads_eager) = errors("rnndyn"), errors("eager")
    assert max(states_here) < max(1e-4, 4 * max(states_eager)), f"states: {max(states_here):.1e} from float64"
    if exact:
        assert statistics.median(grads_here) < max(1e-4, 4 * statistics.median(grads_eager)), "gradients: too far from float64"
        assert max(grads_here) < max(3e-2, 4 * max(grads_eager)), f"gradients: {max(grads_here):.1e} from float64"


def made(name: str) -> tuple[RecurrentNetwork, list[torch.Tensor]]:
    """A cell's or a network's module and input."""
    torch.manual_seed(0)
    net, inputs = cell(name) if name in CELLS else network(name)
    return net.eval(), inputs


def once(name: str, what: str, backend: str) -> None:
    """One pass, for the measurement of memory."""
    net, inputs = made(name)
    net.backend = backend
    with torch.set_grad_enabled(what == "training"):
        states = net.states(inputs, recorded(net))
        if what == "training":
            sum(s.sum() for s in states).backward()


@pytest.mark.parametrize("what", ["forward", "training"])
@pytest.mark.parametrize("name", [*CELLS, "rgc_intermediate", "blt_vs", "rcnn_sat_bl"])
def test_memory(name: str, what: str) -> None:
    load = f"import torch\nfrom bench_networks import once\ntorch.set_num_threads({torch.get_num_threads()})"
    backends = {"rnndyn": "scheduled", "eager": "reference"}
    peaks = {key: peak_memory(f"once({name!r}, {what!r}, {backend!r})", baseline=load) for key, backend in backends.items()}
    print(name, what, {k: f"{v / 2**20:.0f} MiB" for k, v in peaks.items()})
    if not QUICK:
        write_result(f"networks_memory_{what}_{name}", {"section": "networks", "what": f"{what}, {name}", "peak_bytes": peaks})


@pytest.mark.parametrize("what", ["forward", "training"])
@pytest.mark.parametrize("name", [*CELLS, "rgc_intermediate", "blt_vs", "rcnn_sat_bl"])
def test_networks(name: str, what: str) -> None:
    net, inputs = made(name)
    times = alternate(contenders(net, inputs, what == "training"), ROUNDS)
    result = summary(times, "rnndyn")
    print(name, what, {k: f"{v['median_s']:.3f} s, {v['ours_is_faster_by']:.2f}x" for k, v in result.items()})
    if not QUICK:
        write_result(f"networks_{what}_{name}", {"section": "networks", "what": f"{what}, {name}", "contenders": result})
