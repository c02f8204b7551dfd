"""Graphed networks and training steps: what is captured when, and what is copied, with an object in the place of CUDA's graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_rollouts import in_harness
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import GraphedNetwork, GraphedTrainingStep
from rnndyn_fast.nn.cuda_graphs import can_capture

pytestmark = in_harness


class FakeGraphs:
    """As CUDA graphs: capturing computes nothing, a replay computes from the same tensors into the same tensors."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.network, self.optimizer = network, optimizer
        self.captured = self.eager = 0

    def check(self, tensors: Any) -> None:
        """Any tensors will do."""

    def aside(self, run: Callable[[], Any]) -> Any:
        self.eager += 1
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        parameters = copy.deepcopy(self.network.state_dict())
        state = copy.deepcopy(self.optimizer.state_dict()) if self.optimizer else None
        result = run()
        with torch.no_grad():
            for name, p in self.network.state_dict().items():
                p.copy_(parameters[name])
        if self.optimizer and state:
            self.optimizer.load_state_dict(state)
        grads = [p.grad for p in self.network.parameters()]

        def replay() -> None:
            again = run()
            for mine, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                mine.copy_(new)
            for grad, p in zip(grads, self.network.parameters(), strict=True):
                if grad is not None and p.grad is not None:
                    grad.copy_(p.grad)

        return replay, result


def network(**options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"timesteps": 2, "image_size": 16, "widths": (2, 2, 4, 4, 8), "num_classes": 5, "topdown_connections": False}
    return blt_net_64(**{**sizes, **options})


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_graphed_network_gives_what_the_network_gives() -> None:
    net = network()
    fake = FakeGraphs(net)
    graphed = GraphedNetwork(net, graphs=fake)
    for seed in range(4):
        for n in (2, 3):
            x = images(n, seed)
            with torch.no_grad():
                expected = net(x, record=("v4",))
            ours = graphed(x, record=["v4"])
            torch.testing.assert_close(ours[0], expected[0])
            torch.testing.assert_close(ours[1]["v4"], expected[1]["v4"])
            assert not ours[0].requires_grad
    assert (fake.eager, fake.captured) == (2, 2)  # one of each per shape


def test_results_are_copies_unless_asked_otherwise() -> None:
    net = network()
    for copied in (True, False):
        graphed = GraphedNetwork(net, copy=copied, graphs=FakeGraphs(net))
        graphed(images(2))
        first = graphed(images(2, 1))
        before = first.clone()
        graphed(images(2, 2))
        assert torch.equal(first, before) == copied


def test_parameters_may_change_in_place_and_are_found_where_they_move() -> None:
    net = network()
    fake = FakeGraphs(net)
    graphed = GraphedNetwork(net, graphs=fake)
    x = images(2)
    for _ in range(2):
        graphed(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
        torch.testing.assert_close(graphed(x), net(x))
        assert fake.captured == 1
        for p in net.parameters():
            p.data = p.data * 3
        graphed(x)
        torch.testing.assert_close(graphed(x), net(x))
    assert fake.captured == 2
    net.timesteps = 3
    assert graphed(x).shape[0] == graphed(x).shape[0] == 3


def test_the_precision_of_float32_products_is_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    fake = FakeGraphs(net)
    graphed = GraphedNetwork(net, graphs=fake)
    x = images(2)
    for _ in range(3):
        graphed(x)
    assert fake.captured == 1
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for _ in range(3):
        graphed(x)
    assert fake.captured == 2
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(3):
            graphed(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert fake.captured == 3


def test_the_shapes_used_last_are_kept() -> None:
    net = network()
    fake = FakeGraphs(net)
    graphed = GraphedNetwork(net, max_graphs=2, graphs=fake)
    for n in (1, 2, 3):
        for _ in range(2):
            graphed(images(n))
    assert (fake.captured, len(graphed._cache)) == (3, 2)
    graphed(images(2))
    assert fake.captured == 3
    graphed(images(1))  # it has come often enough before
    assert fake.captured == 4


def loss_of(net: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = net(x)
        return sum((functional.nll_loss(step, labels) for step in log_probs), torch.zeros(())), log_probs[-1]

    return loss


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    }


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("name", optimizers())
def test_graphed_training_is_training(name: str, scaled: bool) -> None:
    nets, results = (network(), network()), []
    for graphed, net in zip((False, True), nets, strict=True):
        optimizer = optimizers()[name](net.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if scaled else None
        fake = FakeGraphs(net, optimizer)
        step = GraphedTrainingStep(net, loss_of(net), optimizer, scaler=scaler, calls_before=2 if graphed else 1000, graphs=fake)
        assert step.captures_optimizer == (name == "fused" or (name == "sgd" and not scaled))
        losses = []
        for i in range(6):
            n = 3 if i == 4 else 4
            loss, last = step(images(n, i), torch.arange(n) % 5)
            assert not loss.requires_grad
            losses += [loss, last]
        results.append((losses, dict(net.named_parameters()), scaler.get_scale() if scaler else 0))
        assert fake.captured == int(graphed)
    for (losses, parameters, scale), (theirs, expected, expected_scale) in [results]:
        torch.testing.assert_close(losses, theirs)
        assert scale == expected_scale
        for key, p in parameters.items():
            torch.testing.assert_close(p, expected[key])


def test_a_captured_learning_rate_is_captured_anew() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    fake = FakeGraphs(net, optimizer)
    step = GraphedTrainingStep(net, loss_of(net), optimizer, calls_before=1, graphs=fake)
    batch = images(4), torch.arange(4)
    for _ in range(3):
        step(*batch)
    assert fake.captured == 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        step(*batch)
    assert fake.captured == 2
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_gradients_are_those_of_the_graph_that_ran() -> None:
    """With an optimiser outside the graph, and shapes that alternate."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    step = GraphedTrainingStep(net, loss_of(net), optimizer, calls_before=1, graphs=FakeGraphs(net, optimizer))
    for i in range(6):
        n = 2 + i % 2
        step(images(n, i), torch.arange(n))
        ours = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        loss, _ = loss_of(net)(images(n, i), torch.arange(n))
        expected = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        torch.testing.assert_close(ours, [g for g in expected if g is not None])


def test_which_optimisers_can_be_captured() -> None:
    p = [torch.zeros(2, requires_grad=True)]
    assert can_capture(torch.optim.SGD(p, lr=0.1), scaled=False)
    assert not can_capture(torch.optim.SGD(p, lr=0.1), scaled=True)
    assert can_capture(torch.optim.SGD(p, lr=0.1, fused=True), scaled=True)
    assert not can_capture(torch.optim.Adam(p), scaled=False)


def test_bad_arguments_are_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match="argument 0: a CUDA graph needs tensors on a CUDA device, got one on cpu"):
        GraphedNetwork(net)(images(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="argument 0: a CUDA graph needs tensors on a CUDA device, got one on cpu"):
        GraphedTrainingStep(net, loss_of(net), optimizer)(images(2), torch.arange(2))
    with pytest.raises(ValueError, match="max_graphs: expected at least 1, got 0"):
        GraphedNetwork(net, max_graphs=0)
    with pytest.raises(ValueError, match=r"autocast: expected torch.float16, torch.bfloat16 or None, got torch.float64"):
        GraphedTrainingStep(net, loss_of(net), optimizer, autocast=torch.float64)
