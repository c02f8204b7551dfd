"""Networks natively against the reference, which schedules nothing: every case and the published networks, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor

from rnndyn_fast.graph import Network, Operator, compile_schedule
from rnndyn_fast.models import blt_vs, convrnn, rcnn_sat
from rnndyn_fast.models.convrnn_nets import BASES
from rnndyn_fast.nn import ConvCell
from rnndyn_fast.program import rollout
from rnndyn_fast.program.describe import plan_for
from rnndyn_fast.program.ir import Program, Value


def compare(network: Network, timesteps: int, inputs: list[Tensor], record: tuple[str, ...], *, training: bool = False) -> None:
    """States, statistics and gradients of all inputs and parameters, in float64, of both backends; and without gradients."""
    generator = torch.Generator().manual_seed(5)
    parameters = {}
    for name, shape in network.parameter_shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        parameters[name] = 0.5 + 0.1 * value if len(shape) == 1 else 0.8 * value / max(1, value[0].numel()) ** 0.5
    buffers = {n: torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for n, s in network.buffer_shapes.items()}
    weights: list[Tensor] = []
    results = []
    for backend in ("reference", "native"):
        leaves = [x.clone().requires_grad_(True) for x in inputs]
        named = {name: p.clone().requires_grad_(True) for name, p in parameters.items()}
        statistics: dict[str, tuple[Tensor, Tensor]] | None = {} if training else None
        options: dict[str, Any] = {"backend": backend, "statistics": statistics}
        states = rollout(network, timesteps, leaves, {**named, **buffers}, record, **options)
        weights = weights or [torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in states]
        sum((s * w).sum() for s, w in zip(states, weights, strict=True)).backward()
        with torch.no_grad():
            again = rollout(network, timesteps, leaves, {**named, **buffers}, record, **options)
        for a, b in zip(states, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        grads = {**{f"input {i}": x.grad for i, x in enumerate(leaves)}, **{name: p.grad for name, p in named.items()}}
        results.append((states, grads, statistics or {}))
    (states, grads, statistics), (ours, our_grads, our_statistics) = results
    for name, a, b in zip(record, states, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, expected in grads.items():
        # (A term without effect, under a missing drive, is not evaluated and gets no gradient; unscheduled it gets zeros.)
        got = our_grads[name] if our_grads[name] is not None else torch.zeros_like(parameters.get(name, torch.zeros(1)))
        wanted = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for name, pair in statistics.items():
        for a, b in zip(our_statistics[name], pair, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_every_case(case: RolloutCase) -> None:
    compare(case.network, case.timesteps, case.inputs(), case.record)


@pytest.mark.parametrize("base", BASES)
def test_convrnn(base: str) -> None:
    shallow = "shallow" in base
    size = 72 if shallow else 40
    widths = {f"conv{i}": 2 + i // 6 for i in range(1, 6 if shallow else 11)}
    net = convrnn(
        base, num_classes=3, image_size=size, widths=widths, cell_channels=2, presentation="custom", timesteps=8 if shallow else 13,
        image_off=3,
    )  # fmt: skip
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    names = tuple(dict.fromkeys(["imnetds", *(f"conv{i}" for i in (3, 4, 5))]))
    compare(net.network, net.timesteps, [image], names)


@pytest.mark.parametrize("kind", ["gru", "lstm", "intersectionrnn", "rgc_median"])
def test_cells(kind: str) -> None:
    extra = {"feedback_channels": 3, "residual_channels": 3, "cell_channels": 2} if kind == "rgc_median" else {}
    cell = ConvCell(kind, 4, 4, (5, 6), **extra, **({"layer_norm": True} if kind in ("gru", "lstm") else {}))
    inputs = [
        torch.randn(*((3, 2) if node.frames else (2,)), node.channels, node.height, node.width, dtype=torch.float64)
        for node in cell.network.inputs
    ]
    compare(cell.network, 3, inputs, cell.recorded)


@pytest.mark.parametrize("training", [False, True])
def test_rcnn_sat(training: bool) -> None:
    net = rcnn_sat("bl", 5, timesteps=3, image_size=64, width_divisor=48)
    compare(net.network, 3, [torch.randn(4, 3, 64, 64, dtype=torch.float64)], ("gap", "layer2"), training=training)


@pytest.mark.parametrize(("bio", "timesteps"), [(False, 2), (True, 5)])
def test_blt_vs(bio: bool, timesteps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a few channels; every term is evaluated once per value of its source and no more."""
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (3, 3, 6, 5, 4, 4, 5))
    net = blt_vs(timesteps, 3, 2, bio_unroll=bio, image_size=128)
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    compare(net.network, timesteps, [image], ("Readout.logits", "V4.td", "V1.bu"))
    schedule = compile_schedule(net.network, timesteps, ("Readout.logits",))
    program = plan_for(schedule, "auto", torch.float64, 1, training=False).versions[0].executable.program
    assert not {i.kind for i in program.instrs} & {"conv", "separable_conv", "by_torch"}, "float64"
    own, between = ("depthwise_conv", "grouped_conv"), middles(program)
    samples = sum(
        i.operands["x"].shape[0]
        for i in program.instrs
        if i.kind in own or (i.kind == "direct_conv" and i.operands["x"].value not in between)
    )
    assert samples == sum(len(d.slots) for d in schedule.drives if d.connection.operator is not Operator.IDENTITY)


def middles(program: Program) -> set[Value]:
    """What lies between the two maps of a separable convolution."""
    return {v.value for i in program.instrs if i.kind in ("depthwise_conv", "grouped_conv") for v in i.writes}
