"""Scheduled rollouts on a tape: float32 by our engines, graphs that are kept, refusals, and the schedule by PyTorch beside it."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast.graph import rollout, taped, taped_maps, taped_terms
from rnndyn_fast.graph.linear import DenseMap
from rnndyn_fast.graph.replay import release_memory
from rnndyn_fast.graph.scheduled import rollout_scheduled
from rnndyn_fast.graph.tape import Gradients, stacked
from rnndyn_fast.graph.taped import TapedRun
from rnndyn_fast.models import convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.ops import buffers, convolution
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator

KINDS = ("simplernn", "gru", "lstm", "ugrnn", "intersectionrnn", "rgc_shallow", "rgc_median")


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
def test_accuracy_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our engines, sums in the Winograd domain included: error in norm against float64 at most 1e-5, or twice that of PyTorch."""
    net = cell_of(kind)
    inputs = inputs_of(net)
    calls = []
    once = taped_terms.convolve_sum
    monkeypatch.setattr(taped_terms, "convolve_sum", lambda *args: calls.append(len(args[0])) or once(*args))
    truth = results(net, inputs, "reference", torch.float64)
    plain, ours = results(net, inputs, "reference", torch.float32), results(net, inputs, "scheduled", torch.float32)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        error, reference = ((r[name].double() - expected).norm() / expected.norm() for r in (ours, plain))
        assert error <= max(1e-5, 2 * reference), (name, error.item(), reference.item())
    if kind in ("gru", "lstm", "ugrnn", "intersectionrnn"):  # [x, h] is one convolution, where Winograd's engine runs
        assert calls


@pytest.mark.parametrize("kind", ["lstm", "rgc_median"])
def test_the_same_as_in_pytorchs_operations(kind: str) -> None:
    net = cell_of(kind).double()
    inputs = inputs_of(net)
    net.backend = "scheduled"
    ours = net.states(inputs, net.recorded)
    theirs = rollout_scheduled(net.schedule(net.recorded), inputs, dict(net.named_parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_gives_the_same_again(kind: str) -> None:
    """With ``retain_graph`` no buffer of the tape is written over; without it the second time raises."""
    net = cell_of(kind, 4, 5).double()
    net.backend = "scheduled"
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
    whole = results(net, inputs, "scheduled", torch.float64)
    monkeypatch.setattr(taped_maps, "WINDOW_BYTES", slots * 2 * 4 * 25 * 8)
    for name, found in results(net, inputs, "scheduled", torch.float64).items():
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
    expected = results(net, inputs, "scheduled", torch.float64)
    if layout == "channels_last":
        inputs = [x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if x.dim() == 5 else x for x in inputs]
    else:
        inputs = [x.repeat_interleave(2, 0)[::2] if x.dim() == 5 else x for x in inputs]
    before = [x.clone() for x in inputs]
    net.backend = "scheduled"
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
def test_what_is_held(kind: str) -> None:
    """Between forward and backward: the maps that are documented, and half a map for weights and rooms of single steps."""
    torch.manual_seed(0)
    extra = {"residual_channels": 64} if kind.startswith("rgc") else {}
    net = ConvCell(kind, 64, 64, (28, 28), **extra, backend="scheduled")
    net.timesteps = 16
    inputs = [torch.randn(*((16, 4) if n.frames else (4,)), n.channels, n.height, n.width) for n in net.network.inputs]
    before = bytes_in_use()
    states = net.states(inputs, net.recorded)
    held = bytes_in_use() - before
    assert all(s.requires_grad for s in states)
    assert held / inputs[0].nbytes < HELD[kind] + 0.5


def test_states_of_normed_areas_are_not_held() -> None:
    """Between forward and backward: the sum before the norm and a pooled form of each layer and step. What is made again is the same."""
    torch.manual_seed(0)
    net = rcnn_sat("bl", 10, timesteps=4, image_size=64, width_divisor=4).train()
    net.backend = "scheduled"
    x = torch.randn(8, 3, 64, 64)
    first = 8 * 24 * 64 * 64 * 4  # bytes of a map of the first layer
    gc.collect()  # (graphs of other tests)
    before = bytes_in_use()
    answers = net.run(x)
    held = bytes_in_use() - before
    assert 4 * first < held < 1.9 * 4 * first  # (with their states, more than twice as much)
    answers.sum().backward(retain_graph=True)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    answers.sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in net.parameters() if p.grad is not None), strict=True))


def test_inference_component_by_component_holds_the_packed_weights_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them together are much; the same states, and none are kept for the next time."""
    torch.manual_seed(0)
    net = rcnn_sat("bl", 10, timesteps=3, image_size=64, width_divisor=4).eval()
    x, areas = torch.randn(2, 3, 64, 64), tuple(a.name for a in net.network.areas)
    live: set[int] = set()
    sizes: dict[int, int] = {}
    most = 0
    once = convolution._pack

    def pack(*args: Any, **options: Any) -> convolution.Packed:
        nonlocal most
        packed = once(*args, **options)
        key = len(sizes)
        sizes[key] = packed.nbytes
        live.add(key)
        weakref.finalize(packed, live.discard, key)
        most = max(most, sum(sizes[k] for k in live))
        return packed

    monkeypatch.setattr(convolution, "_pack", pack)
    net.backend = "scheduled"
    found, peaks = [], []
    for much in (taped.MUCH_PACKED, 0):
        monkeypatch.setattr(taped, "MUCH_PACKED", much)
        for record in (areas, ("gap",)):
            release_memory()
            gc.collect()
            live.clear()
            sizes.clear()
            most = 0
            with torch.no_grad():
                found.append(net.states([x], record))
            peaks.append(most)
            assert bool(convolution._kept) == bool(much)
    assert peaks[2] == peaks[3] < 0.7 * peaks[0] == 0.7 * peaks[1]
    assert torch.equal(found[1][0], found[0][-1])
    assert torch.equal(found[3][0], found[2][-1])
    for name, a, b in zip(areas, found[0], found[2], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["rcnn_sat", "rgc_intermediate"])
def test_inference_with_some_samples_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Components before the first recorded one, two samples of five at a time, recorded and replayed too: what all samples give."""
    torch.manual_seed(0)
    if name == "rcnn_sat":
        net: RecurrentNetwork = rcnn_sat("bl", 5, timesteps=3, image_size=64, width_divisor=16)
    else:
        net = convrnn(name, image_size=64, num_classes=5, widths={f"conv{i}": 4 for i in range(1, 11)}, cell_channels=4)
    x = torch.rand(5, 3, 64, 64)
    net.eval().backend = "scheduled"
    area = net.network.readout.source if net.network.readout else net.network.areas[-1].name
    monkeypatch.setattr(taped, "MUCH_PACKED", -1)
    counts: list[int] = []
    run_large = TapedRun._run_large
    monkeypatch.setattr(TapedRun, "_run_large", lambda self, count: (counts.append(count), run_large(self, count))[1])
    found = {}
    for some in (5, 2):
        schedule = net.schedule((area,))
        first = max(math.prod(net.network.shapes[a]) for a in schedule.components[0].areas)
        monkeypatch.setattr(taped, "LARGE_MAP", 4 * first * some if some == 2 else 1 << 40)
        release_memory()
        with torch.no_grad():
            found[some] = [net.states([x], (area,))[0] for _ in range(4)]
        assert all(torch.equal(a, found[some][0]) for a in found[some])
        assert bool(counts) == (some == 2)
    torch.testing.assert_close(found[2][0], found[5][0], rtol=1e-4, atol=1e-4)
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
    ours = results(net, inputs, "scheduled", torch.float32)
    schedule = net.schedule(net.recorded)
    with torch.no_grad():
        run = TapedRun(schedule, [x.float() for x in inputs], dict(net.named_parameters()), None, "amx", set())
    drive = next(d for d in schedule.drives if (d.connection.target, d.connection.kernel_size) == ("cell.c", 2))
    linear = run.linear_of(drive)
    assert isinstance(linear, DenseMap)
    assert linear.border is None
    for name, expected in truth.items():
        assert (ours[name].double() - expected).norm() <= 1e-5 * expected.norm(), name


def test_second_derivatives_raise() -> None:
    net = cell_of("ugrnn", 4, 5)
    net.backend = "scheduled"
    (states,) = net.states([x.float() for x in inputs_of(net, 2)], net.recorded[:1])
    with pytest.raises(RuntimeError, match="scheduled rollout cannot be differentiated twice"):
        torch.autograd.grad(states.sum(), list(net.parameters()), create_graph=True)


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_changes_in_place_before_backward_raise(what: str) -> None:
    net = cell_of("lstm", 4, 5)
    net.backend = "scheduled"
    states = net.states([x.float() for x in inputs_of(net, 2)], net.recorded)
    loss = sum(s.sum() for s in states)
    with torch.no_grad():
        (next(net.parameters()) if what == "parameter" else states[0]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_transforms_take_pytorchs_operations() -> None:
    net = cell_of("lstm", 4, 5).double()
    inputs = inputs_of(net, 2)
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return rollout(net.network, 4, inputs, values, net.recorded, backend="scheduled")[0].square().sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    loss(parameters).backward()
    for name, p in parameters.items():
        assert p.grad is not None
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-10)


def test_only_what_is_wanted() -> None:
    """Gradients of some parameters alone, and of inputs alone, are those of all."""
    net = cell_of("gru", 4, 5).double()
    net.backend = "scheduled"
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
    for backend in ("reference", "scheduled"):
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
    """To the bit, and they are not held meanwhile."""
    net = rcnn_sat("bl", 5, timesteps=3, image_size=64, width_divisor=8).train()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    found, held = [], []
    monkeypatch.setenv("RNNDYN_REPLAY", "0")
    for large in (1 << 40, 1):
        monkeypatch.setattr(taped_maps, "LARGE_FORM", large)
        net.zero_grad()
        (states,) = net.states([x], ("layer6",))
        held.append(sum({t.untyped_storage().data_ptr(): t.nbytes for t in states.grad_fn.run.tape.held()}.values()))  # type: ignore[union-attr]
        states.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 40
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert held[1] < 0.95 * held[0]


def test_direct_convolutions_some_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, shape, options in (
        (Operator.CONV, (5, 3, 7, 7), (2, 3, 0)),
        (Operator.CONV_TRANSPOSE, (3, 5, 3, 3), (2, 1, 1)),
        (Operator.LINEAR, (5, 3), ()),
    ):
        weight = convolution.Weight(Geometry(operator, *options), torch.randn(*shape, dtype=torch.float64), EngineChoice(None, "test"))
        x = torch.randn(5, 1 if operator is Operator.LINEAR else 6, 1 if operator is Operator.LINEAR else 9, 3, dtype=torch.float64)
        monkeypatch.setattr(convolution, "_DIRECT_BYTES", 1 << 40)
        whole = convolution.convolve(weight, x)
        monkeypatch.setattr(convolution, "_DIRECT_BYTES", whole[:2].nbytes)
        parts = convolution.convolve(weight, x)
        assert parts.shape == whole.shape
        assert torch.allclose(parts, whole, rtol=1e-12)


def test_stacked_is_a_view_of_neighbours() -> None:
    block = torch.arange(24.0).view(4, 2, 3)
    assert stacked([block[1], block[2]]).data_ptr() == block[1].data_ptr()
    assert torch.equal(stacked([block[1], block[2]]), block[1:3].flatten(0, 1))
    assert torch.equal(stacked([block[2], block[1]]), torch.cat([block[2], block[1]]))
    assert torch.equal(stacked([block[0], torch.ones(2, 3)]), torch.cat([block[0], torch.ones(2, 3)]))


def test_gradients_write_only_what_is_theirs() -> None:
    grads, a, b = Gradients(), torch.ones(2), torch.full((2,), 2.0)
    grads.add(("k",), a, own=False)
    grads.add(("k",), a, own=False)
    grads.add(("k",), b, own=False)
    assert grads.take(("k",))[0].tolist() == [4.0, 4.0]
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() == [2.0, 2.0]
    grads.add(("k",), b, own=True)
    grads.add(("k",), a, own=False)
    assert b.tolist() == [3.0, 3.0]
    assert grads.take(("k",)) == (b, True)
    assert grads.take(("k",)) == (None, False)
