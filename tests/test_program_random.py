"""Random networks: the native rollout equals the reference, and its programs read nothing that was not written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast.graph import (
    Activation,
    Area,
    Connection,
    Input,
    Interaction,
    Network,
    Norm,
    Operator,
    Pool,
    Role,
    Unroll,
    compile_schedule,
)
from rnndyn_fast.graph.spec.connections import FIT, SAME
from rnndyn_fast.ops.cells import LSTM, UGRNN, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated, TimeDecay
from rnndyn_fast.program import passes, plan, rollout
from rnndyn_fast.program.describe import plan_for
from rnndyn_fast.program.ir import Program
from rnndyn_fast.program.place import validate

SPECS = 500
TOLERANCE = 1e-9  # of a tensor's largest entry; below the last digits of the largest gradient it is noise


def random_cell(rng: random.Random) -> Any:
    normed = rng.random() < 0.3
    gain = Gain(rng.choice((0.0, 1.0)), rng.choice((-1.0, 0.5)), rng.choice((Activation.SIGMOID, Activation.TANH, Activation.IDENTITY)))
    return rng.choice(
        (
            TimeDecay(), GRUGates(layer_norm=normed, eps=1e-3), GRUUpdate(layer_norm=normed, eps=1e-3), UGRNN(),
            LSTM(layer_norm=normed, peepholes=rng.random() < 0.4, eps=1e-3), IntersectionRNN(layer_norm=normed, eps=1e-3),
            ReciprocalGated(gain, Gain(bias=rng.choice((0.0, 0.6))), rng.choice((Activation.ELU, Activation.TANH)),
                            drive_bias=rng.choice((0.0, -0.4))),
        )
    )  # fmt: skip


def random_area(rng: random.Random, name: str, steps: int) -> Area:
    channels = rng.choice((1, 2, 3, 4, 6))
    if rng.random() < 0.25:
        return Area(name, channels, cell=random_cell(rng))
    norm = rng.choice((Norm.NONE, Norm.NONE, Norm.LAYER, Norm.GROUP, Norm.BATCH))
    return Area(
        name,
        channels,
        rng.choice(list(Interaction)),
        norm,
        rng.choice((None, *Activation)),
        drive_activation=rng.choice((Activation.IDENTITY, Activation.IDENTITY, *Activation)),
        norm_groups=rng.choice([n for n in (1, 2, 3) if channels % n == 0]) if norm is Norm.GROUP else 1,
        norm_steps=steps + rng.randrange(2) if norm is Norm.BATCH else None,
        eps=1e-2,
        norm_parameter=rng.choice((None, "shared_norm")) if norm is not Norm.NONE and rng.random() < 0.1 else None,
    )


def random_connection(rng: random.Random, source: Input | Area, target: Area, role: Role, number: int) -> Connection:
    operator = rng.choice((Operator.CONV, Operator.CONV, Operator.CONV, *Operator))
    options: dict[str, Any] = dict(
        pool=rng.choice((Pool.NONE, Pool.NONE, *Pool)),
        delay=rng.choice((None, None, None, 0, 1)),
        resize=operator is not Operator.LINEAR and rng.random() < 0.2,
    )
    if operator is not Operator.IDENTITY:
        options["bias"] = rng.random() < 0.5
        if rng.random() < 0.9:
            options["parameter"] = f"{target.name}.{role.value}{number}"
    if operator in (Operator.CONV, Operator.CONV_TRANSPOSE):
        options["kernel_size"] = rng.choice((1, 2, 3, 3, 4, 5))
        strided = role is Role.BOTTOM_UP or operator is Operator.CONV_TRANSPOSE
        options["stride"] = rng.choice((1, 1, 2, 3)) if strided else 1
        options["padding"] = rng.choice((None, None, 0, 1, 2))
    if operator is Operator.CONV_TRANSPOSE:
        options["output_padding"] = rng.choice((None, FIT, 0))
    if operator is Operator.CONV:
        options["padding"] = rng.choice((options["padding"], SAME))
        options["cut_kernel"] = rng.random() < 0.2
        options["groups"] = rng.choice((1, 1, 1, 2, 3, source.channels))
        if rng.random() < 0.2:
            options["middle_channels"], options["middle_bias"] = rng.choice((source.channels, 2 * source.channels)), rng.random() < 0.5
        elif options["groups"] == 1 and rng.random() < 0.1:
            first = rng.randrange(3)
            options["concat"] = first, first + source.channels + rng.randrange(2)
    if options["resize"] and operator in (Operator.CONV, Operator.CONV_TRANSPOSE):  # what makes a map of the target's size from one of it
        options["stride"] = 1
        if operator is Operator.CONV_TRANSPOSE or options["padding"] != SAME:
            options |= dict(kernel_size=1, padding=0)
        if operator is Operator.CONV_TRANSPOSE:
            options["output_padding"] = 0
    if isinstance(source, Area) and source.cell is not None and rng.random() < 0.5:
        options["state"] = rng.choice(source.states)
    if rng.random() < 0.5:
        options["port"] = rng.choice(list(target.ports))
    return Connection(source.name, target.name, role, operator, **options)


def random_network(rng: random.Random, steps: int) -> Network:
    """Areas one after another, each with a connection that gives it its size; then further ones of those that are drawn and valid."""
    frames = [rng.random() < 0.4 for _ in range(rng.choice((1, 1, 2)))]
    inputs = [
        Input(
            name, rng.choice((1, 2, 3, 4)), rng.randrange(1, 7), rng.randrange(1, 7), moving,
            rng.choice((1, 2)) if not moving and rng.random() < 0.2 else None, rng.choice((0.0, 0.5)),
        )
        for name, moving in zip(("image", "movie"), frames, strict=False)
    ]  # fmt: skip
    unroll = rng.choice((Unroll.ENGINEERING, Unroll.ENGINEERING, Unroll.BIOLOGICAL))
    areas: list[Area] = []
    connections: list[Connection] = []
    network: Network | None = None

    def taken(inputs: list[Input], areas: list[Area], connections: list[Connection]) -> bool:
        nonlocal network
        try:
            made = Network("random", tuple(inputs), tuple(areas), tuple(connections), unroll)
            made.parameter_shapes  # noqa: B018  -- (weights of one name have one shape)
        except ValueError:
            return False
        if any(c.pool is Pool.MAX and min(made.shapes[c.source][1:]) < 2 for c in connections):
            return False  # (a maximum of nothing)
        if any(max(made.window(c).output_padding) >= c.stride for c in connections if c.operator is Operator.CONV_TRANSPOSE):
            return False  # (PyTorch has no such convolution)
        if any(a.norm is Norm.LAYER and len(made.norm_shape(a)) == 1 and made.shapes[a.name][1:] != (1, 1) for a in areas):
            return False  # (a vector by construction whose padding makes it a map)
        network = made
        return True

    for k in range(rng.randrange(1, 5)):
        while True:
            area = random_area(rng, f"area{k}", steps)
            c = random_connection(rng, rng.choice([*inputs, *areas]), area, Role.BOTTOM_UP, len(connections))
            if taken(inputs, [*areas, area], [*connections, c]):
                areas.append(area)
                connections.append(c)
                break
    for _ in range(rng.randrange(3 * len(areas))):
        role = rng.choice(list(Role))
        target = rng.choice(areas)
        source = target if role is Role.LATERAL and rng.random() < 0.8 else rng.choice([*inputs, *areas])
        c = random_connection(rng, source, target, role, len(connections))
        if taken(inputs, areas, [*connections, c]):
            connections.append(c)
    for k, area in enumerate(areas):
        if rng.random() < 0.3 and network is not None:
            start = Input(f"start{k}", *network.shapes[area.name])
            initial: Any = [rng.choice(("zero", "absent", start.name)) for _ in area.states]
            begun = replace(area, initial=initial[0] if len(initial) == 1 else tuple(initial))
            used = [*inputs, start] if start.name in initial else inputs
            if taken(used, [*areas[:k], begun, *areas[k + 1 :]], connections):
                inputs, areas[k] = used, begun
    assert network is not None
    return network


class Spec:
    """A random network, for how long, on how many samples, what is recorded, and what is differentiated."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.steps, self.samples = rng.randrange(1, 5), rng.randrange(1, 4)
        while True:
            self.network = random_network(rng, self.steps)
            names = [f"{a.name}:{s}" if s and rng.random() < 0.5 else a.name for a in self.network.areas for s in a.states]
            record = tuple(dict.fromkeys(rng.sample(names, rng.randrange(1, len(names) + 1))))
            # (Variances of one value are not defined.)
            alone = any(
                a.norm is Norm.BATCH and self.samples * self.network.shapes[a.name][1] * self.network.shapes[a.name][2] == 1
                for a in self.network.areas
            )
            try:
                self.schedule = compile_schedule(self.network, self.steps, record)
            except ValueError:  # (an area has no state within so few steps)
                continue
            if not self.network.parameter_shapes:
                continue
            self.record, self.training = record, bool(self.network.buffer_shapes) and not alone and rng.random() < 0.6
            break
        self.some = [rng.random() < 0.9 for _ in range(40)]  # which tensors want gradients, which states have them
        self.expanded = seed % 9  # of three states, the one whose gradient is expanded, if any
        self.generator = torch.Generator().manual_seed(seed)
        n = self.network
        self.inputs = [
            self.normal((self.steps, self.samples) * node.frames or (self.samples,), node.channels, node.height, node.width)
            for node in n.inputs
        ]
        self.parameters = {name: self._parameter(name, shape) for name, shape in {**n.parameter_shapes, **n.buffer_shapes}.items()}
        if self.training:
            self.parameters = {name: self.parameters[name] for name in n.parameter_shapes}

    def normal(self, lead: tuple[int, ...], *shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=self.generator, dtype=torch.float64)

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = self.normal((), *shape)
        if name.endswith("running_var"):
            return 0.5 + value.square()
        if len(shape) < 2 or name.endswith("bias"):
            return 0.5 + 0.3 * value
        return value / max(1, value[0].numel()) ** 0.5

    def results(self, backend: str, *, again: bool = False, dtype: torch.dtype = torch.float64, engine: str = "auto") -> dict[str, Tensor]:
        """States, statistics, and gradients (zeros where there is none)."""
        leaves = dict(zip((n.name for n in self.network.inputs), self.inputs, strict=True)) | self.parameters
        leaves = {name: t.to(dtype, copy=True) for name, t in leaves.items()}
        buffers = self.network.buffer_shapes
        for want, (name, t) in zip(self.some * 10, leaves.items(), strict=False):
            t.requires_grad_(want and name not in buffers)
        statistics: dict[str, tuple[Tensor, Tensor]] | None = {} if self.training else None
        given = [leaves[n.name] for n in self.network.inputs]
        states = rollout(self.network, self.steps, given, leaves, self.record, backend=backend, engine=engine, statistics=statistics)
        found = {f"state {name}": s.detach().clone() for name, s in zip(self.record, states, strict=True)}
        for name, moments in (statistics or {}).items():
            found |= {f"mean {name}": moments[0], f"variance {name}": moments[1]}
        used = [s for s, want in zip(states, self.some[::-1], strict=False) if want] or states
        # (Gradients of every layout: contiguous, expanded.)
        terms = [s.sum() if k % 3 == self.expanded else (s * torch.cos(torch.arange(s.numel(), dtype=s.dtype)).view(s.shape)).sum()
                 + s.square().sum() for k, s in enumerate(used)]  # fmt: skip
        wanted = {name: t for name, t in leaves.items() if t.requires_grad}
        loss = sum(terms)
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and isinstance(loss, Tensor) and loss.requires_grad:
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=again)
            if again:
                more = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                for (name, a), b in zip(zip(wanted, grads, strict=True), more, strict=True):
                    assert (a is None) == (b is None), name
                    if a is not None and b is not None:
                        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"again: {n}: {m}")
        found |= {f"grad {name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)}
        return found


@cache
def spec_of(seed: int) -> Spec:
    return Spec(seed)


def validate_apart(made: plan.Plan, backward: plan.Passes) -> None:
    """A backward pass in an arena of its own, after any of the forward passes, whose values it may read and never writes."""
    program = backward.executable.program
    # (A norm step by statistics that are given says that it may write them.)
    assert not {view.value for i in program.instrs for view in i.writes if view not in i.reads} & set(backward.kept)
    for version in made.versions:
        forward = version.executable.program
        own = {number: forward.nbytes + offset for number, offset in program.offsets.items()}
        instrs = (*forward.part(backward=False), *program.instrs)
        validate(Program(instrs, {**forward.offsets, **own}, forward.nbytes + program.nbytes, forward.split))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a rollout gets is full of NaN."""
    monkeypatch.setattr(plan, "_plans", type(plan._plans)())
    arena, empty = passes.arena, passes.empty
    monkeypatch.setattr(passes, "arena", lambda *args: arena(*args).fill_(255))
    monkeypatch.setattr(passes, "empty", lambda *args: empty(*args).fill_(torch.nan))


@pytest.mark.parametrize("seed", range(SPECS))
def test_native_equals_the_reference(seed: int) -> None:
    spec = spec_of(seed)
    expected, found = spec.results("reference"), spec.results("native", again=seed % 4 == 0)
    what = f"{spec.network.to_json()}, {spec.steps} steps of {spec.samples} samples, record={spec.record}, training={spec.training}"
    evaluated = {f"{kind} {name}" for name in spec.schedule.batch_norms() for kind in ("mean", "variance") if spec.training}
    statistics = {name for name in expected if name.startswith(("mean", "variance"))}  # (of what nobody asks for too)
    assert found.keys() == (expected.keys() - statistics) | evaluated, what
    assert evaluated <= statistics, what
    largest = max(float(t.abs().max()) for name, t in expected.items())
    for name, right in expected.items():
        if name in statistics - evaluated:
            continue
        assert found[name].shape == right.shape, (name, what)
        error, size = float((found[name] - right).abs().max()), float(right.abs().max())
        assert error <= TOLERANCE * size + 1e-12 * largest, (name, error, size, what)
    for made in plan._plans.values():
        for version in made.versions:
            validate(version.executable.program)
        for backward in made.apart.values():
            validate_apart(made, backward)


@pytest.mark.parametrize("seed", range(0, SPECS, 10))
@pytest.mark.parametrize("engine", ["auto", "winograd"])
def test_programs_of_our_engines_are_valid(seed: int, engine: str) -> None:
    """In float32, where convolutions are packed ahead."""
    spec = spec_of(seed)
    for training in (False, True):
        validate(plan_for(spec.schedule, engine, torch.float32, spec.samples, training=training).versions[0].executable.program)


@pytest.mark.parametrize("seed", range(1, SPECS, 4))
@pytest.mark.parametrize("engine", ["amx", "winograd"])
def test_our_engines_equal_the_reference(seed: int, engine: str) -> None:
    """In float32, in a second pass too: errors against float64 are at most some times those of the reference in float32, plus roundings."""
    spec = spec_of(seed)
    if any(c.operator is Operator.CONV and c.kernel_size == 1 and c.stride > 1 for c in spec.network.connections):
        pytest.skip("PyTorch's own gradient of such a weight writes beyond it on processors with AVX2 (oneDNN)")
    exact, plain = spec.results("reference"), spec.results("reference", dtype=torch.float32)
    largest = max(float(t.abs().max()) for name, t in exact.items())
    for number in range(2):
        for name, found in spec.results("native", dtype=torch.float32, engine=engine).items():
            error, expected = (float((t[name].double() - exact[name]).abs().max()) for t in ({name: found}, plain))
            size = float(exact[name].abs().max())
            assert error <= 20 * expected + 1e-4 * size + 1e-6 * largest, (number, name, error, expected, size, spec.network.to_json())


def test_the_draw_has_everything() -> None:
    """Of every word for a network some, so that nothing is tested in name only."""
    specs = [spec_of(seed) for seed in range(SPECS)]
    areas = [a for s in specs for a in s.network.areas]
    connections = [c for s in specs for c in s.network.connections]
    assert all(sum(c.operator is operator for c in connections) > 50 for operator in Operator)
    assert all(sum(c.role is role for c in connections) > 50 for role in Role)
    assert all(sum(c.pool is pool for c in connections) > 20 for pool in Pool)
    assert all(sum(c.kernel_size == k for c in connections) > 20 for k in range(1, 6))
    assert all(sum(a.interaction is i for a in areas) > 50 for i in Interaction)
    assert all(sum(a.norm is norm for a in areas) > 50 for norm in Norm)
    assert len({type(a.cell) for a in areas}) == 8
    assert all(sum(s.network.unroll is unroll for s in specs) > 50 for unroll in Unroll)
    for what in ("groups", "stride"):
        assert sum(getattr(c, what) > 1 for c in connections) > 20, what
    for what in ("middle_channels", "resize", "concat", "cut_kernel", "state", "port"):
        assert sum(bool(getattr(c, what)) for c in connections) > 10, what
    assert sum(a.initial != "absent" for a in areas) > 50
    assert sum(s.training for s in specs) > 30
    assert {len(s.network.areas) for s in specs} == {s.steps for s in specs} == {1, 2, 3, 4}
