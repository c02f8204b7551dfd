"""The printed plan says what is computed once, per component and per step, by whom, and how much memory it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor

from rnndyn_fast.graph import compile_schedule
from rnndyn_fast.models import blt_net_64, blt_vs, build
from rnndyn_fast.program import place
from rnndyn_fast.program.describe import describe, kept_bytes, plan_for, size_text
from rnndyn_fast.program.ir import Program, Role, Value, instr_lives
from rnndyn_fast.program.passes import run_backward, run_forward
from rnndyn_fast.program.plan import Plan

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
        "for each of 10 steps:",
    ):
        assert expected in lines, text
    once = [line for line in lines if line.startswith("once:") and len(line) > 5]
    assert ["v2.bottom_up" in line for line in once] == [False, False, True], once
    assert any(line.startswith("one call over 10 steps x N") and "v4.bottom_up" in line for line in lines)
    assert any(line.startswith("v4 = relu(LayerNorm(") and "* (1 + " in line for line in lines)
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


def test_plan_of_a_network_says_who_computes_each_map() -> None:
    text = describe(blt_vs(image_size=128, timesteps=2, bio_unroll=False).schedule())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "engine of each connection (float32 on the CPU, batches of 16, engine='auto'):" in lines
    assert "V2.bu -> V2.bu (lateral) depthwise_conv groups of few channels" in lines
    starts = [line.split(" (")[0] for line in lines]
    assert starts.count("V2.bu -> V2.bu") == 2, "a depthwise convolution and a 1 x 1 one"
    assert starts.count("V1.bu -> V2.bu") == 1


def test_plan_says_what_is_not_computed() -> None:
    text = str(compile_schedule(blt_net_64(topdown_connections=False).network, 3, ("v2",)))
    assert "never computed (nothing reads them): v4, it, gap" in text


# ---------------------------------------------------------------- memory

NETWORKS = {
    "blt_net": {"model": "blt_net_64", "timesteps": 3, "image_size": 32, "widths": [4, 4, 8, 16, 32]},
    "blt_net_lateral": {"model": "blt_net_64", "timesteps": 3, "image_size": 32, "widths": [4] * 5, "topdown_connections": False},
    "blt_vs": {"model": "blt_vs", "bio_unroll": False, "timesteps": 2, "image_size": 128},
    "rcnn_sat": {"model": "rcnn_sat", "kind": "bl", "timesteps": 2, "image_size": 64, "width_divisor": 32},
    "convrnn": {"model": "convrnn", "name": "rgc_shallow", "timesteps": 6, "image_size": 72},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_of_every_network_is_printed(name: str) -> None:
    with torch.device("meta"):
        net = build(NETWORKS[name])
    schedule = net.schedule()
    lines = [line.strip() for line in describe(schedule, samples=2).splitlines()]
    for kind in ("inference", "training"):
        plan = plan_for(schedule, "auto", torch.float32, 2, training=kind == "training")
        program = plan.versions[0].executable.program
        at = next(k for k, line in enumerate(lines) if line.startswith(f"{kind}: "))
        assert lines[at].startswith(f"{kind}: one arena of {size_text(program.nbytes)}"), lines[at]
        packed = {v.value: v.value.nbytes for i in program.instrs for v in i.reads if v.value.role is Role.PACKED}
        assert (f"and {size_text(sum(packed.values()))} of packed weights" in lines[at]) == bool(packed)
        assert lines[at + 1].startswith(f"forward: {program.split} instructions (")
        if kind == "training":
            assert f"of which forward keeps {size_text(kept_bytes(program))} for backward" in lines[at]
            assert lines[at + 2].startswith(f"backward: {len(program.instrs) - program.split} instructions (")
            assert 0 < kept_bytes(program) <= program.nbytes


def test_instructions_are_printed_where_they_are_asked_for() -> None:
    schedule = compile_schedule(CASES["topdown_multiplicative"].network, 2, ("gap",))
    lines = [line.strip() for line in describe(schedule, "direct", samples=2, instructions="training").splitlines()]
    plan = plan_for(schedule, "direct", torch.float32, 2, training=True)
    program = plan.versions[0].executable.program
    printed = lines[lines.index("backward:") - program.split :][: len(program.instrs) + 1]
    assert [line.split() for line in printed] == [line.split() for line in str(program).splitlines()]
    assert not any(line == "backward:" for line in describe(schedule, "direct", samples=2, instructions="inference").splitlines())


def leaves(case: RolloutCase) -> dict[str, Tensor]:
    """Inputs and parameters by name, in float32."""
    inputs = dict(zip((node.name for node in case.network.inputs), case.inputs(torch.float32), strict=True))
    return inputs | case.parameters(torch.float32)


def plan_of_case(case: RolloutCase) -> Plan:
    return plan_for(compile_schedule(case.network, case.timesteps, case.record), "auto", torch.float32, case.samples, training=True)


@by_case
def test_what_the_op_returns_is_what_backward_reads(case: RolloutCase) -> None:
    """Shapes, dtypes and total bytes: the plan's promise about memory."""
    given, plan = leaves(case), plan_of_case(case)
    count = len(case.network.inputs)
    tensors = list(given.values())
    needs = [False] * count + [True] * (len(tensors) - count)
    results = torch.ops.rnndyn.rollout(
        tensors[:count], tensors[count:], case.network.to_json(), case.timesteps, list(case.record), needs, False, "auto"
    )
    program, kept, saved = plan.versions[0].executable.program, plan.forward_alone().kept, results[len(case.record) :]
    assert [(tuple(t.shape), t.dtype) for t in saved] == [(v.shape, v.dtype) for v in kept]
    assert all(t.is_contiguous() for t in saved)
    # (What lies beside what in one arena may be overwritten on the way back; as tensors a few more are kept.)
    total = sum(t.numel() * t.element_size() for t in saved)
    assert kept_bytes(program) <= total <= program.nbytes
    assert not any(t.is_floating_point() and t.isnan().any() for t in saved)
    place.validate(program)


def gradients(plan: Plan, given: dict[str, Tensor], spoilt: Sequence[Value]) -> dict[str, Tensor]:
    """The gradients of one rollout, where some of the arena's bytes are made NaN between the passes."""
    program = plan.versions[0].executable.program
    forward = run_forward(plan.versions[0], given)
    if spoilt:
        spared = torch.zeros(forward.arena.numel(), dtype=torch.bool)
        for v in kept_values(program):
            spared[program.offsets[v.number] : program.offsets[v.number] + v.nbytes] = v not in spoilt
        forward.arena[~spared] = 255
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(view.shape, generator=generator).permute(0, 1, 4, 2, 3) for view in plan.states]
    found = run_backward(plan, forward, given, grads, keep=False)
    assert len(plan.versions) == 1, "gradients of another layout than the plan's"
    return found


def kept_values(program: Program) -> list[Value]:
    return [v for v, (first, last) in instr_lives(program.instrs).items() if first < program.split <= last]


@by_case
def test_backward_reads_of_the_arena_what_the_plan_says_and_no_more(case: RolloutCase) -> None:
    """All other bytes of the arena may be anything between the passes."""
    plan, given = plan_of_case(case), leaves(case)
    program = plan.versions[0].executable.program
    kept = kept_values(program)
    assert kept_bytes(program) == sum(v.nbytes for v in kept)
    assert set(kept) <= {view.value for instr in program.part(backward=True) for view in instr.reads}
    nothing = Value(-1, "nothing", (), torch.float32)
    expected, found = gradients(plan, given, []), gradients(plan, given, [nothing])
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.mark.parametrize("name", ["topdown_multiplicative", "lateral_additive", "skip_additive"])
def test_every_map_that_forward_keeps_is_needed(name: str) -> None:
    plan, given = plan_of_case(CASES[name]), leaves(CASES[name])
    expected = gradients(plan, given, [])
    maps = [v for v in kept_values(plan.versions[0].executable.program) if not v.name.endswith("channels last")]
    assert maps
    for value in maps:
        found = gradients(plan, given, [value])
        assert not all(torch.equal(found[name], g) for name, g in expected.items()), value.name


# ---------------------------------------------------------------- golden plans


def test_no_plan_became_worse_unnoticed() -> None:
    """Instructions of each kind, and bytes, are those of tests/plans; where they are meant to change, the script writes them anew."""
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "scripts" / "dump_plans.py"), str(root / "tests" / "plans"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_another_plan_is_noticed(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    for path in (root / "tests" / "plans").iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("16 gate_step\n", "15 gate_step\n"))
    command = [sys.executable, str(root / "scripts" / "dump_plans.py"), str(tmp_path), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stderr
    assert "-       15 gate_step\n+       16 gate_step" in result.stdout
    assert "lstm.txt: another plan now" in result.stdout
