"""What the schedule compiler finds, and how often the program of a rollout computes its convolutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import ADD, CASES, IMAGE, RolloutCase, lateral, up

from rnndyn_fast.graph import Area, Network, Operator, compile_schedule
from rnndyn_fast.graph.schedule import Drive, Schedule
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.program.describe import plan_for
from rnndyn_fast.program.ir import Program
from rnndyn_fast.program.plan import Request, make_plan

by_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
T = 6


def schedule_of(timesteps: int = T, record: tuple[str, ...] = ("gap",), **options: Any) -> Schedule:
    return compile_schedule(blt_net_64(**options).network, timesteps, record)


def drive(schedule: Schedule, parameter: str) -> Drive:
    (found,) = [d for d in schedule.drives if d.connection.parameter == parameter]
    return found


@pytest.mark.parametrize("topdown", [False, True])
@pytest.mark.parametrize("interaction", ["additive", "multiplicative"])
def test_static_drives_are_found(topdown: bool, interaction: str) -> None:
    schedule = schedule_of(topdown_connections=topdown, LT_interaction=interaction)
    static = {d.connection.parameter for d in schedule.drives if d.static}
    assert static == {"retina", "v1.bottom_up", "v2.bottom_up"}
    assert {name: n for name, n in schedule.num_slots.items() if n == 1} == {"image": 1, "retina": 1, "v1": 1}
    for name in ("v2", "v4", "it", "gap"):
        assert schedule.num_slots[name] == T
    assert len(drive(schedule, "v4.bottom_up").slots) == T
    assert len(drive(schedule, "v4.lateral").slots) == T - 1


def test_static_with_frames_is_nothing() -> None:
    schedule = compile_schedule(CASES["frames_additive"].network, T, ("b",))
    assert not any(d.static for d in schedule.drives)


def test_components() -> None:
    def components(**options: Any) -> list[tuple[str, ...]]:
        return [c.areas for c in schedule_of(**options).components]

    assert components(topdown_connections=False) == [("retina",), ("v1",), ("v2",), ("v4",), ("it",), ("gap",)]
    assert components() == [("retina",), ("v1",), ("v2", "v4", "it"), ("gap",)]
    assert components(LT_position="last") == [("retina",), ("v1",), ("v2",), ("v4",), ("it",), ("gap",)]
    recurrent = {c.areas: c.recurrent for c in schedule_of().components}
    assert recurrent == {("retina",): False, ("v1",): False, ("v2", "v4", "it"): True, ("gap",): True}
    batched = {c.areas[0]: c.batched for c in compile_schedule(CASES["feed_forward_frames"].network, T, ("c",)).components}
    assert batched == {"a": True, "b": True, "c": True}


def test_one_recurrent_area_leaves_all_else_static() -> None:
    schedule = schedule_of(LT_position="last")
    assert {n: k for n, k in schedule.num_slots.items() if k > 1} == {"gap": T}


def test_without_recurrence_everything_is_computed_once() -> None:
    schedule = schedule_of(lateral_connections=False, topdown_connections=False)
    assert set(schedule.num_slots.values()) == {1}
    assert schedule.slot_of["gap"] == [0] * T


def test_multiplications_of_the_published_network() -> None:
    """By hand, per image and step: retina 3.5 M multiply-adds, V1, V2's, V4's and IT's bottom-up 75.5 M each, V2's,
    V4's and IT's lateral
    151 M each, either top-down term 75.5 M. The first three never change."""
    map_ = 2 * 75_497_472
    steady, once = 3 * map_ + 2 * map_ // 2 + 512**2, 3 * 32 * 9 * 64**2 + map_ // 2 + map_ // 2
    for topdown in (False, True):
        scheduled, every_step = schedule_of(1001, topdown_connections=topdown).multiplications()
        recurrent = 3 * map_ + 512**2 + topdown * map_
        assert scheduled == once + 1001 * map_ + 1000 * recurrent
        assert every_step == 1001 * (once + map_) + 1000 * recurrent
    assert 2 * (steady + once) == pytest.approx(1.51e9, rel=0.01)  # GFLOP without top-down connections, as measured on the published code


def test_unread_areas_are_not_computed() -> None:
    schedule = schedule_of(record=("v2",), topdown_connections=False)
    assert schedule.num_slots == {"image": 1, "retina": 1, "v1": 1, "v2": T, "v4": 0, "it": 0, "gap": 0}
    assert {d.connection.target for d in schedule.drives} == {"retina", "v1", "v2"}
    # With feedback the areas above are needed, but not what they would become after the last step that is read.
    schedule = schedule_of(record=("v2",))
    assert schedule.num_slots["v4"] == schedule.num_slots["it"] + 1 == T - 1
    assert schedule.num_slots["gap"] == 0


def test_biological_unroll_starts_areas_one_by_one() -> None:
    schedule = compile_schedule(blt_net_64(timesteps=8, unroll="biological").network, 8, ("retina", "v1", "v2", "v4", "it", "gap"))
    assert schedule.first_step == {"retina": 0, "v1": 1, "v2": 2, "v4": 3, "it": 4, "gap": 5}
    with pytest.raises(ValueError, match=r"timesteps: area 'gap' .* has no state within 5 time steps \(biological unroll\)"):
        compile_schedule(blt_net_64(timesteps=8, unroll="biological").network, 5, ("gap",))


@by_case
def test_schedule_is_consistent(case: RolloutCase) -> None:
    """Every update comes after what it reads, in both orders; every term is evaluated where its reader looks."""
    schedule = compile_schedule(case.network, case.timesteps, case.record)
    updates = {(name, slot) for name in schedule.slot_of for slot in schedule.slot_of[name] if slot >= 0}
    updates = {u for u in updates if u[0] in {a.name for a in case.network.areas}}
    inputs = {n.name for n in case.network.inputs}
    for order in (schedule.time_major, [u for c in schedule.components for u in c.updates]):
        assert len(order) == len(set(order))
        assert set(order) == updates
        done = set()
        for update in order:
            for term in schedule.terms[update]:
                d = schedule.drives[term.drive]
                assert d.source in inputs or (d.source, d.slots[term.position]) in done
            done.add(update)
    assert {name for c in schedule.components for name in c.areas} == {u[0] for u in updates}
    used = {(t.drive, t.position) for terms in schedule.terms.values() for t in terms}
    assert used == {(d.index, i) for d in schedule.drives for i in range(len(d.slots))}


# ---------------------------------------------------------------- calls


class Calls:
    """The convolutions that a program computes, by map and weight."""

    def __init__(self, program: Program) -> None:
        self.forward: list[int] = []  # samples (of all time steps) of each that forward computes
        self.again = 0  # of those that backward computes once more
        self.grad_x = 0
        self.grad_weight: Counter[str] = Counter()  # by the weight's name
        for instr in program.part(backward=False):
            self.forward += self._samples(instr.kind, instr.operands)
        for instr in program.part(backward=True):
            kind, operands = instr.kind, instr.operands
            if kind == "conv" and operands["forms"][0].backward:
                self.grad_x += len(operands["xs"])
            elif kind == "conv_weight_grad":
                self.grad_weight[self._name(operands["out"])] += 1
            elif kind == "direct_conv_backward":
                self.grad_x += operands["grad_x"] is not None
                self.grad_weight.update([self._name(operands["grad_weight"])] if operands["grad_weight"] is not None else [])
            else:
                self.again += len(self._samples(kind, operands))

    @staticmethod
    def _samples(kind: str, operands: dict[str, Any]) -> list[int]:
        if kind == "conv":
            return [x.shape[0] for x in operands["xs"]]
        # (Of grouped convolutions there are none here, and no term that PyTorch computes.)
        assert kind not in ("grouped_conv", "depthwise_conv", "separable_conv", "by_torch", "fused_conv")
        return [operands["x"].shape[0]] if kind == "direct_conv" else []

    @staticmethod
    def _name(view: Any) -> str:
        name: str = view.value.name
        return name.removesuffix(" channels last").removesuffix(" grad")


def calls_of(case: RolloutCase, *, training: bool, engine: str = "auto") -> Calls:
    """Of the rollout of a case in float32, with the gradients of all parameters or none."""
    schedule = compile_schedule(case.network, case.timesteps, case.record)
    plan = plan_for(schedule, engine, torch.float32, case.samples, training=training)
    return Calls(plan.versions[0].executable.program)


def small_blt(topdown: bool) -> RolloutCase:
    network = blt_net_64(topdown_connections=topdown, image_size=16, widths=(2, 4, 8, 16, 32)).network
    return RolloutCase("blt", network, ("gap",), T, samples=2)


by_engine = pytest.mark.parametrize("engine", ["auto", "direct", "winograd", "amx"])


@by_engine
@pytest.mark.parametrize(("topdown", "calls"), [(False, 3 + 2 + 4 * (T - 1)), (True, 3 + 4 * (T - 1) + 2 * T + 2 * (T - 1))])
def test_training_calls_each_convolution_as_often_as_it_must(topdown: bool, calls: int, engine: str) -> None:
    """retina, V1 and V2's bottom-up once. Lateral: T - 1 steps in V2, V4, IT, GAP. Bottom-up of V4 and IT: one call
    over T * N each where
    the areas are components of their own; T each, and T - 1 for each top-down term, where they step together. Backward computes none of
    them once more."""
    count = calls_of(small_blt(topdown), training=True, engine=engine)
    assert len(count.forward) == calls
    assert count.forward.count(2 * T) == (0 if topdown else 2)
    assert count.again == 0
    # One weight-gradient call per connection, whatever its number of steps.
    connections = [c for c in small_blt(topdown).network.connections if c.operator is not Operator.IDENTITY]
    assert count.grad_weight == {c.weights[0]: 1 for c in connections}


@by_engine
@pytest.mark.parametrize("topdown", [False, True])
def test_inference_calls(topdown: bool, engine: str) -> None:
    count = calls_of(small_blt(topdown), training=False, engine=engine)
    expected = 3 + 2 * T + 4 * (T - 1) + (2 * (T - 1) if topdown else 0)
    assert len(count.forward) == expected
    assert set(count.forward) == {2}


@by_case
def test_no_term_is_evaluated_twice_and_one_weight_gradient_per_connection(case: RolloutCase) -> None:
    schedule = compile_schedule(case.network, case.timesteps, case.record)
    drives = [d for d in schedule.drives if d.connection.operator is not Operator.IDENTITY]
    for training in (True, False):
        count = calls_of(case, training=training)
        assert sum(count.forward) == case.samples * sum(len(d.slots) for d in drives)
        assert count.again == 0
        assert count.grad_weight == (Counter(d.connection.weights[0] for d in drives) if training else {})


def test_frozen_weights_cost_no_weight_gradient() -> None:
    case = small_blt(False)
    inputs = {node.name: x for node, x in zip(case.network.inputs, case.inputs(torch.float32), strict=True)}
    wanted = frozenset(["it.lateral.weight"])
    schedule = compile_schedule(case.network, T, ("gap",))
    plan = make_plan(Request(schedule, inputs, case.parameters(torch.float32), wanted, "auto", training=False))
    count = Calls(plan.versions[0].executable.program)
    assert count.grad_weight == {"it.lateral.weight": 1}
    assert count.grad_x == 2 * (T - 1)  # back through GAP's and IT's own lateral terms, and not below IT
    assert plan.versions[0].gradients.keys() == wanted


def test_a_term_that_two_areas_read_is_evaluated_once() -> None:
    network = Network(
        "two_readers",
        (IMAGE,),
        (Area("a", 4), Area("b", 4, ADD), Area("c", 4, ADD)),
        (
            up("image", "a"),
            lateral("a"),
            up("a", "b", parameter="w"),
            lateral("b"),
            up("a", "c", parameter="w"),
            lateral("c"),
        ),
    )
    schedule = compile_schedule(network, T, ("b", "c"))
    assert [d.connection.parameter for d in schedule.drives].count("w") == 1
    count = calls_of(RolloutCase("two_readers", network, ("b", "c"), T, samples=1), training=True)
    assert len(count.forward) == 1 + 1 + 3 * (T - 1)
    assert sum(count.grad_weight.values()) == 5


# ---------------------------------------------------------------- arguments


def test_compile_schedule_arguments() -> None:
    network = small_blt(True).network
    schedule = compile_schedule(network, 3, ["gap"])
    assert schedule is compile_schedule(network, 3, ("gap",))
    assert compile_schedule(network, 1, ("gap",)).timesteps == 1
    for bad in (True, 3.0, "3", None):
        with pytest.raises(TypeError, match="timesteps: expected an int, got"):
            compile_schedule(network, bad, ("gap",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timesteps: expected at least 1, got -1"):
        compile_schedule(network, -1, ("gap",))
    with pytest.raises(ValueError, match="record: expected at least one area"):
        compile_schedule(network, 3, ())
    with pytest.raises(ValueError, match="record: expected every area once"):
        compile_schedule(network, 3, ("gap", "gap"))
    with pytest.raises(TypeError, match="record: expected a sequence of area names, got the string 'gap'"):
        compile_schedule(network, 3, "gap")
    with pytest.raises(ValueError, match=r"unknown area 'v3'; areas are \['retina'"):
        compile_schedule(network, 3, ("v3",))


def test_text_says_when_connections_are_there() -> None:
    """Those that are off at some steps, and an area that others find changed at some."""
    net = blt_net_64(timesteps=6, image_size=16, widths=(2, 4, 8, 16, 32))
    assert "{t=" not in str(net.schedule())
    with net.lesion("v4:lateral", slice(3, None)), net.lesion("it>v4", 2), net.lesion("gap:lateral"), net.intervene("it", [1, 5]):
        text = str(net.schedule())
    assert "conv3(v4, v4.lateral){t=0..2} + convT3/2(it, v4.top_down){t=0..1,3..5}" in text
    assert "it = it before{t=0,2..4} + it clamp 1{t=1,5}" in text
    assert "off at all steps: gap -> gap (lateral)" in text
