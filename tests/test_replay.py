"""Recorded rollouts, run again: the same bits as without, whatever happens between one run and the next."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor, nn

from rnndyn_fast import release_memory
from rnndyn_fast.graph import replay, taped_maps
from rnndyn_fast.models import blt_vs, convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.ops.buffers import Region, empty
from rnndyn_fast.ops.program import Program
from rnndyn_fast.ops.recording import Recorder


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """No recordings of other tests."""
    gc.collect()
    release_memory()
    yield
    gc.collect()
    release_memory()


def recordings() -> list[replay.Recording]:
    return [r for r in replay._known.values() if r.forward is not None]


def of_case(case: RolloutCase, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor], Callable[..., list[Tensor]]]:
    """A case as a module, its inputs, and what runs it."""
    torch.manual_seed(0)
    net = RecurrentNetwork(case.network, case.timesteps).to(dtype)
    inputs = []
    for node in case.network.inputs:
        lead = (case.timesteps, case.samples) if node.frames else (case.samples,)
        inputs.append(torch.randn(*lead, node.channels, node.height, node.width, dtype=dtype))
    return net, inputs, lambda xs: net.states(xs, case.record)


def of_model(name: str) -> tuple[nn.Module, list[Tensor], Callable[..., list[Tensor]]]:
    torch.manual_seed(0)
    if name == "blt_vs":
        net: Any = blt_vs(2, 10, 2, bio_unroll=False, image_size=128)
        return net, [torch.randn(1, 3, 128, 128)], lambda xs: net.states(xs, (net.network.readout.source,))
    if name == "rcnn_sat":
        net = rcnn_sat("bl", 10, timesteps=2, image_size=64, width_divisor=32)
        return net, [torch.randn(4, 3, 64, 64)], lambda xs: net.states(xs, (net.network.readout.source,))
    if name == "rgc_intermediate":
        widths = {f"conv{i}": 8 for i in range(1, 11)}
        net = convrnn(name, image_size=64, num_classes=10, widths=widths, cell_channels=8)
        return net, [torch.randn(2, 3, 64, 64)], lambda xs: net.states(xs, (net.network.readout.source,))
    extra = {"residual_channels": 16} if name.startswith("rgc") else {}
    net = ConvCell(name, 16, 16, (9, 7), **extra)
    net.timesteps = 3
    inputs = [torch.randn(*((3, 2) if n.frames else (2,)), n.channels, n.height, n.width) for n in net.network.inputs]
    return net, inputs, lambda xs: net.states(xs, net.recorded)


def life(net: nn.Module, inputs: list[Tensor], run: Callable[..., list[Tensor]], *, train: bool, rounds: int = 5) -> list[Tensor]:
    """States, gradients, parameters and statistics of some steps, each with other images and weights than the last one."""
    found: list[Tensor] = []
    for k in range(rounds):
        leaves = [(x + 0.1 * k).requires_grad_(train) for x in inputs]
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            states = run(leaves)
        if train:
            sum((s * (1 + i)).square().sum() for i, s in enumerate(states)).backward()
            found += [x.grad for x in leaves if x.grad is not None]
            found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found += [s.detach().clone() for s in states] + [b.clone() for b in net.buffers()]
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01 * torch.sin(torch.arange(p.numel(), dtype=p.dtype).view(p.shape)))
    return found


def compare(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *, train: bool, backend: str | None = None) -> None:
    with monkeypatch.context() as off:
        off.setenv("RNNDYN_REPLAY", "0")
        net, inputs, run = make()
        net.train(train).backend = backend
        expected = life(net, inputs, run, train=train)
    assert not recordings()
    net, inputs, run = make()
    net.train(train).backend = backend
    found = life(net, inputs, run, train=train)
    (recording,) = recordings()
    assert (recording.backward is not None) == train
    assert len(found) == len(expected)
    for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, theirs), k


@pytest.mark.parametrize("backend", ["native", "scheduled"])
@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_bits(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(lambda: of_case(CASES[name]), monkeypatch, train=True, backend=backend)


@pytest.mark.parametrize("name", ["simplernn", "gru", "lstm", "rgc_median", "rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_networks_are_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms' statistics included."""
    compare(lambda: of_model(name), monkeypatch, train=True)


@pytest.mark.parametrize("name", ["lstm", "rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_inference_is_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that change, so that recordings are given up; and with weights that do not."""

    def still() -> Any:
        net, inputs, run = of_model(name)
        return net.requires_grad_(False), inputs, run

    with monkeypatch.context() as off:
        off.setenv("RNNDYN_REPLAY", "0")
        expected = life(*of_model(name), train=False)
    found = life(*of_model(name), train=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    net, inputs, run = still()
    net.eval()
    with torch.no_grad():
        first = [[s.clone() for s in run([x + k for x in inputs])] for k in range(4)]
        assert recordings()
        release_memory()
        again = [run([x + k for x in inputs]) for k in range(4)]
    assert all(torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_inference_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded first, before training and inference without it: the same bits, and nothing of it is in the way of the others."""

    def validated() -> list[Tensor]:
        net, inputs, run = of_model(name)
        found: list[Tensor] = []
        for _ in range(2):
            net.eval()
            with torch.inference_mode():
                found += [s.clone() for k in range(4) for s in run([x + k for x in inputs])]
            found += life(net.train(), inputs, run, train=True, rounds=4)
        return [*found, *life(net.eval(), inputs, run, train=False, rounds=4)]

    with monkeypatch.context() as off:
        off.setenv("RNNDYN_REPLAY", "0")
        expected = validated()
    release_memory()
    monkeypatch.setattr(replay._stage, "region", None)
    found = validated()
    assert len(recordings()) >= 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("backend", ["native", "scheduled"])
def test_nothing_is_read_before_it_is_written(backend: str, train: bool) -> None:
    """Between two runs the memory of recorded rollouts is filled with NaN."""
    net, inputs, run = of_case(CASES["topdown_multiplicative"])
    net.backend = backend
    if not train:
        net.requires_grad_(False)
    results = []
    for _ in range(4):
        net.zero_grad(set_to_none=True)
        states = run(inputs)
        if train:
            sum(s.square().sum() for s in states).backward()
        results.append([s.detach().clone() for s in states] + [p.grad.clone() for p in net.parameters() if p.grad is not None])
        region = replay._stage.region
        if region is not None and region.touched:
            assert not region.in_use()
            region.alias(region.start, (region._farthest // 4,), (1,), torch.float32).fill_(torch.nan)
    assert recordings()
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


def _small(backend: str | None = None) -> tuple[Any, Tensor]:
    net, (x,), _ = of_case(CASES["lateral_additive"])
    net.backend = backend
    return net, x


def _step(net: Any, x: Tensor, **options: Any) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    (states,) = net.states((x,), (net.network.areas[-1].name,))
    states.square().sum().backward(**options)
    return [states.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["native", "scheduled"])
def test_graphs_that_are_kept(backend: str) -> None:
    net, x = _small(backend)
    expected, *_ = (_step(net, x) for _ in range(3))
    net.zero_grad(set_to_none=True)
    (states,) = net.states((x,), (net.network.areas[-1].name,))
    loss = states.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for grad, once in zip((p.grad for p in net.parameters() if p.grad is not None), expected[1:], strict=True):
        torch.testing.assert_close(grad, 2 * once, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(_step(net, x), expected, strict=True))


@pytest.mark.parametrize("backend", ["native", "scheduled"])
def test_two_at_once_and_graphs_without_a_backward_pass(backend: str) -> None:
    net, x = _small(backend)
    other = x.flip(0) + 1
    (area,) = (net.network.areas[-1].name,)
    expected = {0: _step(net, x), 1: _step(net, other)}
    for _ in range(2):  # (what was recorded first may have been dropped before its backward pass)
        net.states((x,), (area,))
    assert all(torch.equal(a, b) for a, b in zip(_step(net, x), expected[0], strict=True))
    _step(net, x)
    assert recordings()
    (first,), (second,) = net.states((x,), (area,)), net.states((other,), (area,))
    for states, right in ((second, expected[1]), (first, expected[0])):
        net.zero_grad(set_to_none=True)
        states.square().sum().backward()
        found = [states.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("backend", ["native", "scheduled"])
def test_gradients_of_another_kind(backend: str) -> None:
    """Fewer parameters want gradients, and the gradient of the states has other strides: neither is what was recorded."""
    net, x = _small(backend)
    (area,) = (net.network.areas[-1].name,)
    for _ in range(3):
        expected = _step(net, x)
    net.zero_grad(set_to_none=True)
    (states,) = net.states((x,), (area,))
    states.sum().backward()  # an expanded one
    ones = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    release_memory()
    net.zero_grad(set_to_none=True)
    net.states((x,), (area,))[0].sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(ones, (p for p in net.parameters() if p.grad is not None), strict=True))
    next(net.parameters()).requires_grad_(False)
    for _ in range(4):
        fewer = _step(net, x)
        assert all(torch.equal(a, b) for a, b in zip(fewer, [expected[0], *expected[2:]], strict=True))


def test_threads_do_not_share_what_is_recorded() -> None:
    net, x = _small()
    net.requires_grad_(False)
    (area,) = (net.network.areas[-1].name,)
    images = [x + k for k in range(4)]
    expected = [net.states((image,), (area,))[0].clone() for image in images]
    wrong: list[int] = []

    def run(k: int) -> None:
        for _ in range(50):
            if not torch.equal(net.states((images[k],), (area,))[0], expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_changed_behind_versions_are_seen() -> None:
    """Recorded inference holds weights packed ahead."""
    net, x = _small()
    net.requires_grad_(False)
    (area,) = (net.network.areas[-1].name,)
    for _ in range(3):
        net.states((x,), (area,))
    assert recordings()
    for p in net.parameters():
        p.data.mul_(1.5)
    found = net.states((x,), (area,))[0]
    release_memory()
    assert torch.equal(found, net.states((x,), (area,))[0])


@pytest.mark.parametrize("backend", ["native", "scheduled"])
def test_a_loop_that_holds_its_last_loss_is_replayed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As most training loops do: the graph of a step is still there when the next one begins."""
    net, x = _small(backend)
    runs: list[object] = []
    once = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda program, given: runs.append(program) or once(program, given))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(6):
        states = net.states((x,), (net.network.areas[-1].name,))[0]
        loss = states.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert len(runs) == 8  # four steps, forward and backward


def test_results_are_the_callers_own() -> None:
    """A later run does not write into what an earlier one returned, nor into its gradients."""
    net, x = _small()
    kept = [(_step(net, x), [p.grad for p in net.parameters()]) for _ in range(2)]
    copies = [[t.clone() for t in (*states, *grads) if t is not None] for states, grads in kept]
    for _ in range(3):
        kept.append((_step(net, x + 1), [p.grad for p in net.parameters()]))
    for (states, grads), before in zip(kept, copies, strict=False):
        assert all(torch.equal(a, b) for a, b in zip((t for t in (*states, *grads) if t is not None), before, strict=True))


def test_parameters_that_lie_elsewhere_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of such runs keeps its memory low for a replay; and however many they are, recordings of others stay."""
    net, x = _small("scheduled")
    steady, image = _small("scheduled")
    tidied = [0]
    monkeypatch.setattr(taped_maps, "tidy_buffers", lambda: tidied.append(tidied.pop() + 1))

    def once(parameters: dict[str, Tensor]) -> None:
        (states,) = torch.func.functional_call(net, parameters, (x,)).values()
        states.square().sum().backward()

    expected = _step(steady, image)
    first = tidied[0]
    assert first
    for _ in range(2):
        _step(steady, image)
    (recording,) = recordings()
    tidied[0] = 0
    kept = []  # (so that no run finds the place of an earlier one)
    for k in range(replay._MOST + 2):
        kept.append({name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()})
        once(kept[-1])
        assert tidied[0] == first, k
    assert recordings() == [recording]
    assert len(replay._known) == 1
    assert all(torch.equal(a, b) for a, b in zip(_step(steady, image), expected, strict=True))
    assert tidied[0] == first
    once(kept[-1])  # where one ran before: it is recorded, and keeps little
    assert tidied[0] > first
    assert len(recordings()) == 2


def test_release_memory_gives_recordings_back() -> None:
    net, x = _small()
    for _ in range(3):
        _step(net, x)
    assert recordings()
    assert release_memory() > 0
    assert not recordings()
    assert not replay._stage.in_use()


def _recorder(*given: Tensor) -> Recorder:
    return Recorder(Region(1 << 24), given, ())


def test_a_program_does_what_was_noted() -> None:
    """Operations of PyTorch's of every kind: views, in place, with and without a variant that writes where it is told, several results."""

    def compute(x: Tensor) -> list[Tensor]:
        a = torch.nn.functional.max_pool2d(x, 2)
        values, index = torch.nn.functional.max_pool2d(x, 3, 1, return_indices=True)
        b = x.permute(0, 2, 3, 1).contiguous()[:, ::2].mul_(2.0).add_(torch.ones_like(x.permute(0, 2, 3, 1)[:, ::2]))
        buffer = empty((2, *b.shape), torch.float32)
        buffer[0].copy_(b)
        buffer[1] = torch.where(b > 0, b, -b)
        parts = torch.split(buffer, 1)
        c = torch.cat([p * (1 + i) for i, p in enumerate(parts)]).sum(0)
        d = torch.roll(c, (1, 2), (1, 2)) + torch.full((1,), torch.inf).clamp(max=3.0)
        return [a, values, index, c, d, d, torch.zeros(3) + c[0, 0, 0, :1]]

    x, y = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    recorder = _recorder(x)
    with recorder.noting():
        found = compute(x)
    program = recorder.program(found)
    assert program is not None, recorder.failed
    for image in (x, y, x):
        results, _ = program([image])
        for mine, right in zip(results, compute(image), strict=True):
            assert mine is not None
            assert torch.equal(mine, right)
            assert mine.stride() == right.stride()
    assert results[4] is results[5]


def test_what_python_reads_cannot_be_recorded() -> None:
    x = torch.ones(3)
    recorder = _recorder(x)
    with recorder.noting():
        found = x * float(x.sum())
    assert recorder.program([found]) is None
    assert "gives a value to Python" in str(recorder.failed)


def test_arguments_in_one_storage() -> None:
    """They are as far apart in every run: their layout tells."""
    room = torch.arange(12.0)
    x, y = room[:4], room[4:8]
    recorder = _recorder(x, y)
    with recorder.noting():
        found = x + 2 * y
    program = recorder.program([found])
    assert program is not None
    other = torch.randn(12)
    (result,), _ = program([other[:4], other[4:8]])
    assert torch.equal(result, other[:4] + 2 * other[4:8])
    assert replay.layout([x, y]) == replay.layout([other[:4], other[4:8]]) != replay.layout([other[:4], torch.randn(4)])
