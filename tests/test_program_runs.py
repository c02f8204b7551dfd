"""Programs run again: the same bits as when they are made anew, whatever happens between one run and the next."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rnndyn_fast import release_memory
from rnndyn_fast.models import blt_vs, convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.ops import kept_packs
from rnndyn_fast.program import bind, passes, plan
from rnndyn_fast.program.describe import plan_for
from rnndyn_fast.program.place import validate


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """No programs of other tests."""
    gc.collect()
    release_memory()
    yield
    gc.collect()
    release_memory()


def plans() -> list[plan.Plan]:
    return list(plan._plans.values())


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


def life(
    net: nn.Module, inputs: list[Tensor], run: Callable[..., list[Tensor]], *, train: bool, rounds: int = 5, anew: bool = False
) -> list[Tensor]:
    """States, gradients, parameters and statistics of some steps, each with other images and weights than the last one. ``anew``: each
    makes its program anew."""
    found: list[Tensor] = []
    for k in range(rounds):
        if anew:
            release_memory()
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


def compare(make: Callable[[], Any], *, train: bool, rounds: int = 5) -> None:
    """The first run of a program and later ones give what programs give that are made anew for every run."""
    net, inputs, run = make()
    net.train(train).backend = "native"
    expected = life(net, inputs, run, train=train, rounds=rounds, anew=True)
    release_memory()
    net, inputs, run = make()
    net.train(train).backend = "native"
    found = life(net, inputs, run, train=train, rounds=rounds)
    (made,) = plans()
    assert made.lowering.recording == train
    for version in made.versions:
        validate(version.executable.program)
    assert len(found) == len(expected)
    for k, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, theirs), k


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_bits(name: str) -> None:
    compare(lambda: of_case(CASES[name]), train=True)


@pytest.mark.parametrize("name", ["simplernn", "gru", "lstm", "rgc_median", "rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_networks_are_the_same_bits(name: str) -> None:
    """Batch norms' statistics included."""
    compare(lambda: of_model(name), train=True, rounds=2 if name == "rgc_intermediate" else 5)


@pytest.mark.parametrize("name", ["lstm", "rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_inference_is_the_same_bits(name: str) -> None:
    """With weights that change, and with weights that do not."""
    compare(lambda: of_model(name), train=False, rounds=2 if name == "rgc_intermediate" else 5)
    release_memory()
    net, inputs, run = of_model(name)
    net.requires_grad_(False).eval()
    with torch.no_grad():
        first = [[s.clone() for s in run([x + k for x in inputs])] for k in range(4)]
        assert plans()
        release_memory()
        again = [run([x + k for x in inputs]) for k in range(4)]
    assert all(torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["rgc_median", "blt_vs", "rcnn_sat"])
def test_inference_mode(name: str) -> None:
    """Planned and bound first, before training and inference without it: the same bits, and nothing of it is in the way of the others."""

    def validated(*, anew: bool) -> list[Tensor]:
        net, inputs, run = of_model(name)
        found: list[Tensor] = []
        for _ in range(2):
            net.eval()
            with torch.inference_mode():
                for k in range(3):
                    if anew:
                        release_memory()
                    found += [s.clone() for s in run([x + k for x in inputs])]
            found += life(net.train(), inputs, run, train=True, rounds=3, anew=anew)
        return [*found, *life(net.eval(), inputs, run, train=False, rounds=3, anew=anew)]

    expected = validated(anew=True)
    release_memory()
    found = validated(anew=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a rollout gets is full of NaN."""
    arena, empty = passes.arena, passes.empty
    monkeypatch.setattr(passes, "arena", lambda *args: arena(*args).fill_(255))
    monkeypatch.setattr(passes, "empty", lambda *args: empty(*args).fill_(torch.nan))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*CASES, "lstm", "rgc_median", "rgc_intermediate", "blt_vs", "rcnn_sat"])
def test_nothing_is_read_before_it_is_written(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In arenas and results full of NaN: the same bits."""

    def found() -> list[Tensor]:
        net, inputs, run = of_case(CASES[name]) if name in CASES else of_model(name)
        net.train(train).backend = "native"
        return life(net, inputs, run, train=train, rounds=2)

    expected = found()
    poison(monkeypatch)
    release_memory()
    for right, mine in zip(expected, found(), strict=True):
        assert torch.equal(right, mine)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_are_valid(dtype: torch.dtype, training: bool) -> None:
    """Every value that is read was written, and no two that are alive together share a byte: forward alone, and with backward."""
    for case in CASES.values():
        schedule = RecurrentNetwork(case.network, case.timesteps).schedule(case.record)
        validate(plan_for(schedule, "auto", dtype, case.samples, training=training).versions[0].executable.program)
    for name in ("simplernn", "gru", "lstm", "rgc_median", "rgc_intermediate", "blt_vs", "rcnn_sat"):
        net: Any = of_model(name)[0]
        program = plan_for(net.schedule(), "auto", dtype, 3, training=training).versions[0].executable.program
        validate(program)
        assert program.part(backward=False)
        assert bool(program.part(backward=True)) == training


def _small() -> tuple[Any, Tensor]:
    net, (x,), _ = of_case(CASES["lateral_additive"])
    net.backend = "native"
    return net, x


def _step(net: Any, x: Tensor, **options: Any) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    (states,) = net.states((x,), (net.network.areas[-1].name,))
    states.square().sum().backward(**options)
    return [states.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def test_graphs_that_are_kept() -> None:
    net, x = _small()
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


def test_two_at_once_and_graphs_without_a_backward_pass() -> None:
    net, x = _small()
    other = x.flip(0) + 1
    (area,) = (net.network.areas[-1].name,)
    expected = {0: _step(net, x), 1: _step(net, other)}
    for _ in range(2):  # (graphs that are dropped before their backward pass)
        net.states((x,), (area,))
    assert all(torch.equal(a, b) for a, b in zip(_step(net, x), expected[0], strict=True))
    _step(net, x)
    assert len(plans()) == 1
    (first,), (second,) = net.states((x,), (area,)), net.states((other,), (area,))
    for states, right in ((second, expected[1]), (first, expected[0])):
        net.zero_grad(set_to_none=True)
        states.square().sum().backward()
        found = [states.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_gradients_of_another_kind() -> None:
    """Fewer parameters want gradients, and the gradient of the states has other strides than the program was placed for."""
    net, x = _small()
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


def test_threads_do_not_share_memory() -> None:
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


def test_threads_train_at_once() -> None:
    """Forward and backward passes of one program in several threads, each in memory of its own."""
    net, x = _small()
    (area,) = (net.network.areas[-1].name,)
    parameters = list(net.parameters())

    def step(image: Tensor) -> list[Tensor]:
        (states,) = net.states((image,), (area,))
        return [states.detach(), *(g for g in torch.autograd.grad(states.square().sum(), parameters, allow_unused=True) if g is not None)]

    images = [x + k for k in range(3)]
    expected = [step(image) for image in images]
    wrong: list[Any] = []

    def run(k: int) -> None:
        try:
            for _ in range(20):
                if not all(torch.equal(a, b) for a, b in zip(step(images[k]), expected[k], strict=True)):
                    wrong.append(k)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_changed_behind_versions_are_seen() -> None:
    """Inference holds weights packed ahead."""
    net, x = _small()
    net.requires_grad_(False)
    (area,) = (net.network.areas[-1].name,)
    for _ in range(3):
        net.states((x,), (area,))
    assert plans()
    for p in net.parameters():
        p.data.mul_(1.5)
    found = net.states((x,), (area,))[0]
    release_memory()
    assert torch.equal(found, net.states((x,), (area,))[0])


def count_bindings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which passes are bound from now on: backward or not."""
    made: list[bool] = []
    once = bind.Binding.__init__

    def bound(self: bind.Binding, *args: Any, backward: bool) -> None:
        made.append(backward)
        once(self, *args, backward=backward)

    monkeypatch.setattr(bind.Binding, "__init__", bound)
    return made


def test_a_loop_that_holds_its_last_loss_binds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As most training loops do: the graph of a step is still there when the next one begins. Two arenas take turns at most."""
    net, x = _small()
    bound = count_bindings(monkeypatch)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    counts = []
    for _ in range(6):
        states = net.states((x,), (net.network.areas[-1].name,))[0]
        loss = states.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts.append(len(bound))
    assert loss.isfinite()
    assert len(plans()) == 1
    assert counts[-1] == counts[2] <= 4


def test_results_are_the_callers_own() -> None:
    """A later run does not write into what an earlier one returned, nor into its gradients."""
    net, x = _small()
    kept = [(_step(net, x), [p.grad for p in net.parameters()]) for _ in range(2)]
    copies = [[t.clone() for t in (*states, *grads) if t is not None] for states, grads in kept]
    for _ in range(3):
        kept.append((_step(net, x + 1), [p.grad for p in net.parameters()]))
    for (states, grads), before in zip(kept, copies, strict=False):
        assert all(torch.equal(a, b) for a, b in zip((t for t in (*states, *grads) if t is not None), before, strict=True))


def test_parameters_that_lie_elsewhere_in_every_run() -> None:
    """They are bound anew, and however many such runs there are, bindings are few and the plan is one."""
    net, x = _small()
    expected = _step(net, x)
    kept = []  # (so that no run finds the place of an earlier one)
    for _ in range(12):
        kept.append({name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()})
        (states,) = torch.func.functional_call(net, kept[-1], (x,)).values()
        states.square().sum().backward()
        grads = [p.grad for p in kept[-1].values() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip([states.detach(), *grads], expected, strict=True))
    (made,) = plans()
    assert all(len(version.executable._bindings) <= 2 * bind._MOST_BINDINGS for version in made.versions)
    assert all(torch.equal(a, b) for a, b in zip(_step(net, x), expected, strict=True))


def test_parametrizations_are_seen() -> None:
    """Weights that are computed in every call, and so lie elsewhere: the reference's values and gradients."""
    net, x = _small()
    net, x = net.double(), x.double()
    parametrizations.weight_norm(net.get_submodule("b.lateral"))
    expected: list[Tensor] = []
    for backend in ("reference", "native", "native", "native"):
        net.backend = backend
        found = _step(net, x)
        if not expected:
            expected = found
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_other_layouts() -> None:
    """Not contiguous, expanded, None for some outputs; each for the first time and again, in any order: those of the reference."""
    case = CASES["skip_additive_record_all"]
    net, inputs, run = of_case(case, torch.float64)
    parameters = list(net.parameters())
    orders: list[Callable[[list[Tensor]], Tensor]] = [
        lambda states: states[0].square().sum() + states[2].sum(),
        lambda states: states[1].sum(),
        lambda states: sum((s.permute(4, 3, 2, 1, 0) * torch.arange(s.shape[0])).square().sum() for s in states),  # type: ignore[return-value]
        lambda states: states[3][-1].square().sum(),
        lambda states: sum(s.transpose(3, 4).contiguous().square().sum() for s in states),  # type: ignore[return-value]
    ]
    expected = []
    for backend in ("reference", "native"):
        net.backend = backend
        for k in (0, 1, 2, 3, 4, 3, 2, 2, 1, 0, 4, 4):
            grads = torch.autograd.grad(orders[k](run(inputs)), parameters, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            if backend == "reference":
                expected.append(full)
            else:
                torch.testing.assert_close(full, expected.pop(0), rtol=1e-9, atol=1e-10)


def test_norms_of_a_cell_alone_are_trained() -> None:
    """In a process of its own: PyTorch's group norm ends it, with channels last, where the gradient of its argument is not asked for."""
    code = """
import torch
from rnndyn_fast.graph import Area, Connection, Input, Network, Operator, Role
from rnndyn_fast.ops.cells import GRUGates
from rnndyn_fast.program import rollout
network = Network("n", (Input("x", 12, 6, 2),), (Area("a", 6, cell=GRUGates(layer_norm=True)),),
                  (Connection("x", "a", Role.BOTTOM_UP, Operator.IDENTITY, port="gates"),))
found = []
for backend in ("reference", "native"):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 6, 2, dtype=torch.float64)
    p = {k: torch.randn(s, dtype=torch.float64, requires_grad=True) for k, s in network.parameter_shapes.items()}
    found.append(torch.autograd.grad(rollout(network, 1, [x], p, ("a:u",), backend=backend)[0].square().sum(), list(p.values())))
torch.testing.assert_close(found[0], found[1])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-300:])


def test_release_memory_gives_programs_back() -> None:
    net, x = _small()
    for _ in range(3):
        _step(net, x)
    with torch.no_grad():
        before = net.states((x,), (net.network.areas[-1].name,))[0]
    assert plans()
    assert release_memory() > 0
    assert not plans()
    assert not kept_packs._kept
    with torch.no_grad():
        assert torch.equal(net.states((x,), (net.network.areas[-1].name,))[0], before)


def test_memory_can_be_released_between_the_passes() -> None:
    net, x = _small()
    expected = _step(net, x)
    net.zero_grad(set_to_none=True)
    (states,) = net.states((x,), (net.network.areas[-1].name,))
    release_memory()
    _step(net, x + 1)
    net.zero_grad(set_to_none=True)
    states.square().sum().backward()
    found = [states.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_after_ones_that_were_a_sum() -> None:
    """A sum's gradient is one number, expanded; the next rollout is planned for such, and gets another kind."""
    case = CASES["topdown_multiplicative"]
    _, inputs, run = of_case(case)
    losses: list[Callable[[Tensor], Tensor]] = [Tensor.sum, lambda s: s.square().sum(), Tensor.sum, lambda s: s.exp().sum()]
    for loss in losses:
        grads = []
        for repeat in range(2):
            leaves = [x.clone().requires_grad_() for x in inputs]
            if repeat:
                release_memory()  # (planned anew)
            total = sum((loss(s) for s in run(leaves)), torch.zeros(()))
            grads.append(torch.autograd.grad(total, leaves))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
