"""The printed plan says what is computed once, per component and per step, and what is saved."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, RolloutCase

from rnndyn_fast.graph import compile_schedule
from rnndyn_fast.graph.plan import saved_bytes
from rnndyn_fast.graph.saved import saved_buffers
from rnndyn_fast.models import blt_net_64, blt_vs

by_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)


def test_plan_of_the_published_network() -> None:
    text = str(blt_net_64(timesteps=10, LT_interaction="multiplicative", topdown_connections=False).schedule())
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "blt_net_64: 10 time steps, engineering unroll, recording gap"
    for expected in (
        "component 1 (static): retina",
        "component 2 (static): v1",
        "component 3 (recurrent): v2",
        "component 6 (recurrent): gap",
        "backend: native",
        "for each of 10 steps:",
        "weight gradients: one call per connection and window of its steps (6 MiB)",
        "saved for backward, per image (float32):",
        "nothing of retina, v1: computed again in backward",
    ):
        assert expected in lines, text
    once = [line for line in lines if line.startswith("once:") and len(line) > 5]
    assert ["v2.bottom_up" in line for line in once] == [False, False, True], once
    assert any(line.startswith("one call over 10 steps x N") and "v4.bottom_up" in line for line in lines)
    assert any(line.startswith("v4 = relu(LayerNorm(") and "* (1 + " in line for line in lines)
    assert sum("argmax" in line for line in lines) == 2
    assert "multiply-adds per image" in text


def test_plan_of_merged_areas() -> None:
    lines = [line.strip() for line in str(blt_net_64(timesteps=4).schedule(record=("v4",))).splitlines()]
    assert "component 3 (recurrent): v2, v4, it" in lines
    assert lines[0].endswith("recording gap, v4")


@by_case
def test_every_plan_names_every_area(case: RolloutCase) -> None:
    text = str(compile_schedule(case.network, case.timesteps, case.record))
    for area in case.network.areas:
        assert area.name in text
    for b in saved_buffers(compile_schedule(case.network, case.timesteps, case.record)):
        assert f"{b.owner}.{b.kind}" in text


def test_plan_of_a_scheduled_network_says_who_computes_each_map() -> None:
    text = str(blt_vs(image_size=128, timesteps=2, bio_unroll=False).schedule())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("backend: scheduled (area 'Retina.bu' has a squashed modulator") for line in lines)
    assert "V2.bu -> V2.bu (lateral) depthwise_conv groups of few channels" in lines
    starts = [line.split(" (")[0] for line in lines]
    assert starts.count("V2.bu -> V2.bu") == 2, "a depthwise convolution and a 1 x 1 one"
    assert starts.count("V1.bu -> V2.bu") == 1


def test_plan_says_what_is_not_computed() -> None:
    text = str(compile_schedule(blt_net_64(topdown_connections=False).network, 3, ("v2",)))
    assert "never computed (nothing reads them): v4, it, gap" in text


@by_case
def test_saved_buffers_are_what_the_op_returns(case: RolloutCase) -> None:
    """Shapes, dtypes and total bytes: the plan's promise about memory."""
    schedule = compile_schedule(case.network, case.timesteps, case.record)
    buffers = saved_buffers(schedule)
    results = torch.ops.rnndyn.rollout(
        case.inputs(torch.float32), list(case.parameters(torch.float32).values()), case.network.to_json(),
        case.timesteps,
        list(case.record), True, "direct",
    )  # fmt: skip
    saved = results[len(case.record) :]
    assert [tuple(t.shape) for t in saved] == [(b.slots, case.samples, *b.shape) for b in buffers]
    assert [t.dtype for t in saved] == [torch.uint8 if b.byte else torch.float32 for b in buffers]
    assert all(t.is_contiguous() for t in saved)
    total = sum(t.numel() * t.element_size() for t in saved)
    assert total == case.samples * saved_bytes(buffers)
    assert len({t.untyped_storage().data_ptr() for t in saved if t.numel()}) == sum(t.numel() > 0 for t in saved)
    assert not any(t.is_floating_point() and t.isnan().any() for t in saved)
