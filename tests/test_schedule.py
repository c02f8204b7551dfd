"""What the schedule compiler finds, and how often a rollout really calls its convolutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import ADD, CASES, IMAGE, RolloutCase, lateral, up

from rnndyn_fast.graph import Area, Network, Operator, compile_schedule, rollout
from rnndyn_fast.graph import backward as backward_module
from rnndyn_fast.graph import forward as forward_module
from rnndyn_fast.graph import update as update_module
from rnndyn_fast.graph.saved import computed_again
from rnndyn_fast.graph.schedule import Drive, Schedule
from rnndyn_fast.models import blt_net_64

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
    """Counts the calls of the convolution seam, by geometry, map and weight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward: list[int] = []  # samples (of all time steps) of each call
        self.grad_weight: Counter[int] = Counter()  # id of the prepared weight -> calls that ask for its gradient
        self.grad_x = 0
        convolve, convolve_backward = forward_module.convolve, backward_module.convolve_backward

        def counted(weight: Any, x: torch.Tensor, *out: torch.Tensor) -> torch.Tensor:
            self.forward.append(x.shape[0])
            return convolve(weight, x, *out)

        def counted_backward(weight: Any, grad: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
            self.grad_weight[id(weight)] += options["need_weight"]
            self.grad_x += options["need_x"]
            return convolve_backward(weight, grad, x, **options)

        convolve_sum = update_module.convolve_sum

        def counted_sum(weights: Any, xs: Any, *rest: Any, **options: Any) -> torch.Tensor:
            self.forward += [x.shape[0] for x in xs]
            return convolve_sum(weights, xs, *rest, **options)

        for module in (forward_module, update_module):
            monkeypatch.setattr(module, "convolve", counted)
        monkeypatch.setattr(update_module, "convolve_sum", counted_sum)
        monkeypatch.setattr(backward_module, "convolve_backward", counted_backward)


def run(case: RolloutCase, training: bool) -> None:
    parameters = {k: v.requires_grad_(training) for k, v in case.parameters(torch.float32).items()}
    outputs = rollout(case.network, case.timesteps, case.inputs(torch.float32), parameters, case.record, backend="native")
    if training:
        sum(o.sum() for o in outputs).backward()


def small_blt(topdown: bool) -> RolloutCase:
    network = blt_net_64(topdown_connections=topdown, image_size=16, widths=(2, 4, 8, 16, 32)).network
    return RolloutCase("blt", network, ("gap",), T, samples=2)


@pytest.mark.parametrize(("topdown", "calls"), [(False, 3 + 2 + 4 * (T - 1)), (True, 3 + 4 * (T - 1) + 2 * T + 2 * (T - 1) - 0)])
def test_training_calls_each_convolution_as_often_as_it_must(topdown: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """retina, V1 and V2's bottom-up once. Lateral: T - 1 steps in V2, V4, IT, GAP. Bottom-up of V4 and IT: one call
    over T * N each where
    the areas are components of their own; T each, and T - 1 for each top-down term, where they step together. Backward runs the
    retina again."""
    count = Calls(monkeypatch)
    run(small_blt(topdown), training=True)
    assert [c.areas for c in computed_again(compile_schedule(small_blt(topdown).network, T, ("gap",)))] == [("retina",)]
    assert len(count.forward) == calls + 1
    assert count.forward.count(2 * T) == (0 if topdown else 2)
    # One weight-gradient call per connection, whatever its number of steps.
    connections = [c for c in small_blt(topdown).network.connections if c.operator is not Operator.IDENTITY]
    assert sum(count.grad_weight.values()) == len(connections)
    assert max(count.grad_weight.values()) == 1


@pytest.mark.parametrize("topdown", [False, True])
def test_inference_calls(topdown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Calls(monkeypatch)
    run(small_blt(topdown), training=False)
    expected = 3 + 2 * T + 4 * (T - 1) + (2 * (T - 1) if topdown else 0)
    assert len(count.forward) == expected
    assert set(count.forward) == {2}


@by_case
def test_no_term_is_evaluated_twice_and_one_weight_gradient_per_connection(case: RolloutCase, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = compile_schedule(case.network, case.timesteps, case.record)
    drives = [d for d in schedule.drives if d.connection.operator is not Operator.IDENTITY]
    for training in (True, False):
        with monkeypatch.context() as patch:
            count = Calls(patch)
            run(case, training)
        assert sum(count.forward) == case.samples * sum(len(d.slots) for d in drives)
        if training:
            assert sum(count.grad_weight.values()) == len(drives)


def test_frozen_weights_cost_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_blt(False)
    parameters = case.parameters(torch.float32)
    parameters["it.lateral.weight"].requires_grad_()
    count = Calls(monkeypatch)
    rollout(case.network, T, case.inputs(torch.float32), parameters, ("gap",), backend="native")[0].sum().backward()
    assert sum(count.grad_weight.values()) == 1
    assert count.grad_x == 2 * (T - 1) - 0  # back through GAP's and IT's own lateral terms, and not below IT


def test_a_term_that_two_areas_read_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
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
    count = Calls(monkeypatch)
    run(RolloutCase("two_readers", network, ("b", "c"), T, samples=1), training=True)
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
