"""Rollouts as programs: float32 by our engines, graphs that are kept, what forward keeps for backward, refusals, transforms."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast import release_memory
from rnndyn_fast.graph import Area, Connection, Input, Network, compile_schedule
from rnndyn_fast.graph import Role as Way
from rnndyn_fast.models import convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.ops import buffers, core, kept_packs
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.program import conv_kinds, kinds, lower, maps, rollout
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.describe import kept_bytes, plan_for
from rnndyn_fast.program.gradients import Gradients
from rnndyn_fast.program.ir import Program, Role, Value, instr_lives
from rnndyn_fast.program.linear import Dense
from rnndyn_fast.program.lower import Lowering
from rnndyn_fast.program.place import place, validate

KINDS = ("simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", "rgc_shallow", "rgc_median")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """No programs of other tests, nor of other settings."""
    gc.collect()
    release_memory()
    yield
    release_memory()


def program_of(
    network: Network, timesteps: int, record: tuple[str, ...], samples: int, dtype: torch.dtype = torch.float32, *, training: bool
) -> Program:
    schedule = compile_schedule(network, timesteps, record)
    return plan_for(schedule, "auto", dtype, samples, training=training).versions[0].executable.program


def cell_of(kind: str, channels: int = 16, size: int = 14) -> ConvCell:
    torch.manual_seed(0)
    extra = {"residual_channels": channels} if kind.startswith("rgc") else {}
    net = ConvCell(kind, channels, channels, (size, size), **extra, **({"cell_channels": 24} if kind == "rgc_median" else {}))
    net.timesteps = 4
    return net


def inputs_of(net: ConvCell, samples: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(*((4, samples) if n.frames else (samples,)), n.channels, n.height, n.width) for n in net.network.inputs]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(net: ConvCell, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """States, and gradients of inputs and parameters."""
    net = net.to(dtype)
    net.backend = backend
    net.zero_grad(set_to_none=True)
    leaves = [x.to(dtype, copy=True).requires_grad_(True) for x in inputs]
    states = net.states(leaves, net.recorded)
    sum((s * (1 + k)).square().sum() for k, s in enumerate(states)).backward()
    found = {f"state {name}": s.detach() for name, s in zip(net.recorded, states, strict=True)}
    found |= {f"input {k}": x.grad for k, x in enumerate(leaves)}
    return found | {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_in_float32(kind: str) -> None:
    """By our engines, sums in the Winograd domain included: error in norm against float64 at most 1e-5, or twice that of PyTorch."""
    net = cell_of(kind)
    inputs = inputs_of(net)
    truth = results(net, inputs, "reference", torch.float64)
    plain, ours = results(net, inputs, "reference", torch.float32), results(net, inputs, "native", torch.float32)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        error, reference = ((r[name].double() - expected).norm() / expected.norm() for r in (ours, plain))
        assert error <= max(1e-5, 2 * reference), (name, error.item(), reference.item())
    if kind in ("gru", "lstm", "ugrnn", "intersectionrnn"):  # [x, h] is one convolution, where Winograd's engine runs
        program = program_of(net.network, 4, net.recorded, 5, training=True)
        assert any(i.kind == "conv" and len(i.operands["xs"]) > 1 for i in program.instrs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_gives_the_same_again(kind: str) -> None:
    """With ``retain_graph`` nothing that forward kept is written over; without it the second time raises."""
    net = cell_of(kind, 4, 5).double()
    net.backend = "native"
    loss = sum(s.square().sum() for s in net.states(inputs_of(net, 2), net.recorded))
    parameters = list(net.parameters())
    found = [torch.autograd.grad(loss, parameters, retain_graph=keep) for keep in (True, True, False)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_windows_change_nothing(kind: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows of one and of up to three time steps: states and gradients, a kept graph's too, are those of all steps at once."""
    net = cell_of(kind, 4, 5)
    inputs = inputs_of(net, 2)
    whole = results(net, inputs, "native", torch.float64)
    before = program_of(net.network, 4, net.recorded, 2, torch.float64, training=True)
    monkeypatch.setattr(maps, "WINDOW_BYTES", slots * 2 * 4 * 25 * 8)
    release_memory()
    after = program_of(net.network, 4, net.recorded, 2, torch.float64, training=True)
    if slots == 1 and kind != "simplernn":  # (whose states are recorded, and so lie where they are whatever windows there are)
        assert str(after) != str(before)
    for name, found in results(net, inputs, "native", torch.float64).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    loss = sum(s.square().sum() for s in net.states(inputs, net.recorded))
    parameters = list(net.parameters())
    kept = [torch.autograd.grad(loss, parameters, retain_graph=keep) for keep in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "every second step"])
def test_inputs_in_other_layouts(layout: str) -> None:
    """Inputs that lie as the maps do are read where they are, and strided ones too; none of them is written."""
    net = cell_of("intersectionrnn", 4, 5)
    inputs = inputs_of(net, 2)
    expected = results(net, inputs, "native", torch.float64)
    if layout == "channels_last":
        inputs = [x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if x.dim() == 5 else x for x in inputs]
    else:
        inputs = [x.repeat_interleave(2, 0)[::2] if x.dim() == 5 else x for x in inputs]
    before = [x.clone() for x in inputs]
    net.backend = "native"
    states = net.states(inputs, net.recorded)
    grads = torch.autograd.grad(sum((s * (1 + k)).square().sum() for k, s in enumerate(states)), list(net.parameters()))
    for name, s in zip(net.recorded, states, strict=True):
        torch.testing.assert_close(s, expected[f"state {name}"], rtol=1e-11, atol=1e-12)
    for (name, _), grad in zip(net.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def bytes_in_use() -> int:
    """Of all large buffers."""
    release_memory()  # (which joins the gaps)
    return sum(len(region._bytes) - sum(end - first for first, end in region.gaps) for region in buffers._regions)


# Maps per time step that a training step holds, the recorded states included (docs/networks.md).
HELD = {"simplernn": 1, "gru": 6, "lstm": 6, "ugrnn": 3, "intersectionrnn": 6, "rgc_shallow": 7, "rgc_median": 9}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind: str) -> None:
    """Values that forward leaves for backward, and recorded states: the maps that are documented, and half a map for weights and rooms
    of single steps. What a rollout holds meanwhile is its arena."""
    torch.manual_seed(0)
    extra = {"residual_channels": 64} if kind.startswith("rgc") else {}
    net = ConvCell(kind, 64, 64, (28, 28), **extra, backend="native")
    net.timesteps = 16
    inputs = [torch.randn(*((16, 4) if n.frames else (4,)), n.channels, n.height, n.width) for n in net.network.inputs]
    program = program_of(net.network, 16, net.recorded, 4, training=True)
    core.drop_workspace()
    before = bytes_in_use()
    states = net.states(inputs, net.recorded)
    core.drop_workspace()
    held = bytes_in_use() - before
    assert all(s.requires_grad for s in states)
    recorded = sum(s.nbytes for s in states)
    kept = kept_bytes(program) + recorded
    assert kept / inputs[0].nbytes < HELD[kind] + 0.5
    assert held <= program.nbytes + recorded + (1 << 20)


def kept_values(program: Program) -> list[Value]:
    """What forward leaves in the arena for backward."""
    return [v for v, (first, last) in instr_lives(program.instrs).items() if first < program.split <= last]


def test_states_of_normed_areas_are_not_kept() -> None:
    """Between forward and backward: the sum before the norm and a pooled form of each layer and step. What is made again is the same."""
    torch.manual_seed(0)
    net = rcnn_sat("bl", 10, timesteps=4, image_size=64, width_divisor=4).train()
    net.backend = "native"
    x = torch.randn(8, 3, 64, 64)
    first = 8 * 24 * 64 * 64 * 4  # bytes of a map of the first layer
    program = program_of(net.network, 4, net._recorded(net.network, ()), 8, training=True)
    kept = kept_values(program)
    maps_kept = sum(v.nbytes for v in kept if v.nbytes >= 1 << 20 and not v.name.endswith("channels last"))  # (no weights)
    assert 4 * first < maps_kept < 1.9 * 4 * first  # (with their states, more than twice as much)
    assert kept_bytes(program) < 2.4 * 4 * first
    assert net.network.shapes[net.network.areas[0].name] == (24, 64, 64)
    assert sum(v.nbytes for v in kept if v.shape[-3:] == (64, 64, 24)) == 4 * first  # (a map per step: the sum before the norm)
    answers = net.run(x)
    answers.sum().backward(retain_graph=True)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    answers.sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in net.parameters() if p.grad is not None), strict=True))


def packed_at_once(program: Program) -> int:
    """The most bytes of packed weights that are in memory at once: those of the arena while they live, and those that are kept."""
    lives = {v: life for v, life in instr_lives(program.instrs).items() if v.name.endswith("packed")}
    kept = {v.value for i in program.instrs for v in i.reads if v.value.role is Role.PACKED}
    steps = range(len(program.instrs))
    return sum(v.nbytes for v in kept) + max(sum(v.nbytes for v, (a, b) in lives.items() if a <= k <= b) for k in steps)


def test_inference_component_by_component_holds_the_packed_weights_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them together are much; the same states, and none are kept for the next time."""
    torch.manual_seed(0)
    net = rcnn_sat("bl", 10, timesteps=3, image_size=64, width_divisor=4).eval()
    x, areas = torch.randn(2, 3, 64, 64), tuple(a.name for a in net.network.areas)
    net.backend = "native"
    found, peaks = [], []
    for much in (lower.MUCH_PACKED, 0):
        monkeypatch.setattr(lower, "MUCH_PACKED", much)
        for record in (areas, ("gap",)):
            release_memory()
            peaks.append(packed_at_once(program_of(net.network, 3, record, 2, training=False)))
            with torch.no_grad():
                found.append(net.states([x], record))
            assert bool(kept_packs._kept) == bool(much)
    assert peaks[2] == peaks[3] < 0.7 * peaks[0] == 0.7 * peaks[1]
    assert torch.equal(found[1][0], found[0][-1])
    assert torch.equal(found[3][0], found[2][-1])
    for name, a, b in zip(areas, found[0], found[2], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["rcnn_sat", "rgc_intermediate"])
def test_inference_with_some_samples_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Components before the first recorded one, two samples of five at a time, in the first run and later: what all samples give."""
    torch.manual_seed(0)
    if name == "rcnn_sat":
        net: RecurrentNetwork = rcnn_sat("bl", 5, timesteps=3, image_size=64, width_divisor=16)
    else:
        net = convrnn(name, image_size=64, num_classes=5, widths={f"conv{i}": 4 for i in range(1, 11)}, cell_channels=4)
    x = torch.rand(5, 3, 64, 64)
    net.eval().backend = "native"
    area = net.network.readout.source if net.network.readout else net.network.areas[-1].name
    monkeypatch.setattr(lower, "MUCH_PACKED", -1)
    counts: list[int] = []
    run_large = Lowering._run_large
    monkeypatch.setattr(Lowering, "_run_large", lambda self, count: (counts.append(count), run_large(self, count))[1])
    found, arenas = {}, {}
    for some in (5, 2):
        schedule = net.schedule((area,))
        first = max(math.prod(net.network.shapes[a]) for a in schedule.components[0].areas)
        monkeypatch.setattr(lower, "LARGE_MAP", 4 * first * some if some == 2 else 1 << 40)
        release_memory()
        with torch.no_grad():
            found[some] = [net.states([x], (area,))[0] for _ in range(4)]
        arenas[some] = program_of(net.network, schedule.timesteps, (area,), 5, training=False).nbytes
        assert all(torch.equal(a, found[some][0]) for a in found[some])
        assert bool(counts) == (some == 2)
    torch.testing.assert_close(found[2][0], found[5][0], rtol=1e-4, atol=1e-4)
    if name == "rcnn_sat":  # (the other one's maps are small)
        assert arenas[2] < arenas[5]
    net.train()
    counts.clear()
    with torch.no_grad():
        net.states([x], (area,))
    assert not counts or not net.network.buffer_shapes  # (statistics are of all samples)


def test_uneven_padding_on_matrix_units() -> None:
    """A 2 x 2 convolution with SAME padding reads the zeros past the map's edge without a padded copy."""
    net = cell_of("rgc_median")
    net.engine = "amx"
    inputs = inputs_of(net)
    truth = results(net, inputs, "reference", torch.float64)
    ours = results(net, inputs, "native", torch.float32)
    schedule = net.schedule(net.recorded)
    made = plan_for(schedule, "amx", torch.float32, 5, training=False)
    drive = next(d for d in schedule.drives if (d.connection.target, d.connection.kernel_size) == ("cell.c", 2))
    linear = made.lowering.linear_of(drive)
    assert isinstance(linear, Dense)
    assert linear.border is None
    for name, expected in truth.items():
        assert (ours[name].double() - expected).norm() <= 1e-5 * expected.norm(), name


def test_second_derivatives_raise() -> None:
    net = cell_of("ugrnn", 4, 5)
    net.backend = "native"
    (states,) = net.states([x.float() for x in inputs_of(net, 2)], net.recorded[:1])
    with pytest.raises(RuntimeError, match="native rollout cannot be differentiated twice"):
        torch.autograd.grad(states.sum(), list(net.parameters()), create_graph=True)


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_changes_in_place_before_backward_raise(what: str) -> None:
    net = cell_of("lstm", 4, 5)
    net.backend = "native"
    states = net.states([x.float() for x in inputs_of(net, 2)], net.recorded)
    loss = sum(s.sum() for s in states)
    with torch.no_grad():
        (next(net.parameters()) if what == "parameter" else states[0]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp", "vmap of grad"])
def test_functional_transforms(transform: str) -> None:
    """As the same transform of the reference."""
    net = cell_of("lstm", 4, 5).double()
    inputs = inputs_of(net, 2)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def states(values: dict[str, Tensor], images: list[Tensor], backend: str) -> Tensor:
        return rollout(net.network, 4, images, values, net.recorded, backend=backend)[0]

    def transformed(backend: str) -> Any:
        def loss(values: dict[str, Tensor]) -> Tensor:
            return states(values, inputs, backend).square().sum()

        several = {name: torch.stack([p, 0.5 * p, p.flip(0)]) for name, p in parameters.items()}
        if transform == "grad":
            return torch.func.grad(loss)(parameters)
        if transform == "vmap":
            return torch.func.vmap(loss)(several)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(loss))(several)
        if transform == "jacrev":
            return torch.func.jacrev(lambda values: states(values, inputs, backend).sum((0, 2, 3, 4)))(parameters)
        return torch.func.jvp(loss, (parameters,), ({name: torch.sin(p) for name, p in parameters.items()},))

    ours, theirs = transformed("native"), transformed("reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_only_what_is_wanted() -> None:
    """Gradients of some parameters alone, and of inputs alone, are those of all."""
    net = cell_of("gru", 4, 5).double()
    net.backend = "native"
    inputs = [x.requires_grad_(True) for x in inputs_of(net, 2)]
    named = dict(net.named_parameters())

    def grads(names: list[str]) -> list[Tensor]:
        leaves = [named[name] for name in names] + inputs
        for name, p in named.items():
            p.requires_grad_(name in names)
        return list(torch.autograd.grad(sum(s.square().sum() for s in net.states(inputs, net.recorded)), leaves))

    whole = dict(zip([*named, *range(len(inputs))], grads(list(named)), strict=True))
    for names in ([], list(named)[:1], list(named)[-1:]):
        for key, grad in zip([*names, *range(len(inputs))], grads(names), strict=True):
            torch.testing.assert_close(grad, whole[key], rtol=1e-11, atol=1e-12)


def test_statistics_of_batches_in_float32() -> None:
    net = rcnn_sat("bl", 5, timesteps=2, image_size=64, width_divisor=32)
    image = torch.randn(8, 3, 64, 64)
    found = []
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        net.train().backend = backend
        net(image)
        found.append({name: b.clone() for name, b in net.named_buffers()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_large_pooled_maps_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and they are not kept meanwhile."""
    net = rcnn_sat("bl", 5, timesteps=3, image_size=64, width_divisor=8).train()
    net.backend = "native"
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    found, kept = [], []
    for large in (1 << 40, 1):
        monkeypatch.setattr(maps, "LARGE_FORM", large)
        release_memory()
        net.zero_grad()
        (states,) = net.states([x], ("layer6",))
        kept.append(kept_bytes(program_of(net.network, 3, ("layer6",), 2, training=True)))
        states.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 40
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < 0.95 * kept[0]


def test_direct_convolutions_some_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = kinds.KINDS["direct_conv"].run
    for operator, shape, options in (
        (Operator.CONV, (5, 3, 7, 7), (2, 3, 0)),
        (Operator.CONV_TRANSPOSE, (3, 5, 3, 3), (2, 1, 1)),
        (Operator.LINEAR, (5, 3), ()),
        (Operator.CONV, (5, 3, 1, 1), ()),  # a matrix product over pixels
    ):
        geometry, weight = Geometry(operator, *options), torch.randn(*shape, dtype=torch.float64)
        height, width = (1, 1) if operator is Operator.LINEAR else (6, 9)
        x = torch.randn(5, height, width, 3, dtype=torch.float64)
        size = geometry.output_size((height, width), shape[2:]) if len(shape) == 4 else (1, 1)
        whole, parts = (torch.full((5, *size, 5), torch.nan, dtype=torch.float64) for _ in range(2))
        once, calls = conv_kinds.direct, []
        with monkeypatch.context() as m:
            m.setattr(conv_kinds, "direct", lambda g, w, x, out, once=once, calls=calls: calls.append(len(x)) or once(g, w, x, out))
            m.setattr(conv_kinds, "_DIRECT_BYTES", 1 << 40)
            run(x=x, weight=weight, out=whole, geometry=geometry)
            m.setattr(conv_kinds, "_DIRECT_BYTES", whole[:2].nbytes)
            run(x=x, weight=weight, out=parts, geometry=geometry)
        assert calls == [5, 2, 2, 1]
        maps = x.permute(0, 3, 1, 2)
        if operator is Operator.LINEAR:
            expected = (x.flatten(1) @ weight.t())[:, None, None]
        elif operator is Operator.CONV:
            expected = torch.nn.functional.conv2d(maps, weight, None, *options[:2]).permute(0, 2, 3, 1)
        else:
            expected = torch.nn.functional.conv_transpose2d(maps, weight, None, *options).permute(0, 2, 3, 1)
        assert torch.allclose(whole, expected, rtol=1e-12)
        assert torch.allclose(parts, whole, rtol=1e-12)


def test_stacked_is_a_view_of_neighbours() -> None:
    b = Builder()
    block, other = b.new((4, 2, 3), torch.float32, "block"), b.new((2, 3), torch.float32, "other")
    together = b.stacked([block[1], block[2]])
    assert together.same_place(block[1])
    assert together.shape == (4, 3)
    assert not b.instrs
    for apart in ([block[2], block[1]], [block[0], other], [block[0], block[2]]):
        copied = b.stacked(apart)
        assert copied.value not in (block.value, other.value)
        assert b.instrs[-1].kind == "cat"
        assert list(b.instrs[-1].reads) == apart
        assert copied.shape == (4, 3)


def test_gradients_write_only_what_is_theirs() -> None:
    b = Builder()
    one, two = b.new((2,), torch.float32, "one"), b.new((2,), torch.float32, "two")
    grads = Gradients(b)
    for grad in (one, one, two):
        grads.add(("k",), grad, own=False)
    found, own = grads.take(("k",))
    assert own
    assert found is not None
    assert all(view.value not in (one.value, two.value) for i in b.instrs for view in i.writes)
    assert sum(view.value in (one.value, two.value) for i in b.instrs for view in i.reads) == 3
    b.instrs.clear()
    grads.add(("k",), two, own=True)
    grads.add(("k",), one, own=False)
    assert grads.take(("k",)) == (two, True)
    assert {view.value for i in b.instrs for view in i.writes} == {two.value}
    assert grads.take(("k",)) == (None, False)


def test_scratch_that_stays_is_none_of_the_buffers() -> None:
    """It would lie between two of them for good, and cut the memory that they leave."""
    core.drop_workspace()
    scratch, _ = core.workspace_of(1 << 19)
    assert not buffers.lies_in_region(scratch)
    assert core.workspace_of(1 << 19)[0] is scratch
    core.drop_workspace()


def test_validation_finds_a_sum_over_a_later_term() -> None:
    for number, allowed in ((0, True), (2, False)):
        b = Builder()
        terms = [b.zeros((1, 2, 2, 3), torch.float32, f"term {k}") for k in range(3)]
        b.emit("norm_step", drives=terms, drive_sum=terms[number], modulators=[], state=b.new((1, 2, 2, 3), torch.float32, "state"))
        offsets, nbytes = place(b.instrs)
        with nullcontext() if allowed else pytest.raises(AssertionError, match="a sum is written over a term"):
            validate(Program(tuple(b.instrs), offsets, nbytes, len(b.instrs)))


def test_pixels_that_a_strided_map_does_not_read_have_no_gradient() -> None:
    """In every pass, whatever lay in the arena: matrix units write what the taps reach."""
    areas = (Area("v0", channels=8), Area("v1", channels=8), Area("v2", channels=8))
    connections = (
        Connection("image", "v0", Way.BOTTOM_UP, kernel_size=3),
        Connection("v0", "v1", Way.BOTTOM_UP, kernel_size=1, stride=2, padding=0),
        Connection("v1", "v1", Way.LATERAL, kernel_size=3),
        Connection("v1", "v2", Way.BOTTOM_UP, kernel_size=1, stride=3, padding=0),
    )
    net = Network("strided", (Input("image", channels=8, height=9, width=9),), areas, connections)
    weights = {name: (0.3 * torch.randn(shape)).requires_grad_(True) for name, shape in net.parameter_shapes.items()}
    for _ in range(3):
        x = torch.randn(2, 8, 9, 9, requires_grad=True)
        grads = []
        for options in ({"backend": "native", "engine": "amx"}, {"backend": "reference"}):
            states = rollout(net, 3, [x], weights, ("v1", "v2"), **options)  # type: ignore[arg-type]
            grads.append(torch.autograd.grad(sum(s.square().sum() for s in states), [x, *weights.values()]))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_large_weights_in_the_vendors_order_are_not_kept() -> None:
    """Each pass puts them in order for itself, which costs less than their memory between the passes."""
    with torch.device("meta"):
        net = rcnn_sat("bl", 10, timesteps=3, image_size=64)
    plan = plan_for(net.schedule(), "direct", torch.float32, 2, training=True)
    program = plan.versions[0].executable.program
    large = [v for v in instr_lives(program.instrs) if v.name.endswith("channels last") and v.nbytes >= 1 << 20]
    assert len(large) > 8
    lives = instr_lives(program.instrs)
    assert not [v for v in large if lives[v][0] < program.split <= lives[v][1]]
