"""Batch norms, one for each time step, as ``nn.BatchNorm2d``: modes, momentum, statistics, eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast.graph import Activation, Area, Connection, Input, Network, Norm, Operator, Pool, Readout, Role
from rnndyn_fast.models import rcnn_sat
from rnndyn_fast.nn import RecurrentNetwork

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
BACKENDS = ["native", "reference"]


def network(size: int = 6) -> Network:
    """Two areas with batch norms, the first of them recurrent."""
    areas = (
        Area("a", 4, norm=Norm.BATCH, norm_steps=STEPS, eps=1e-3),
        Area("b", 5, norm=Norm.BATCH, norm_steps=STEPS),
        Area("mean", 5, norm=Norm.NONE, activation=Activation.IDENTITY),
    )
    connections = (
        Connection("image", "a", Role.BOTTOM_UP, kernel_size=3),
        Connection("a", "a", Role.LATERAL, kernel_size=3),
        Connection("a", "b", Role.BOTTOM_UP, kernel_size=3, pool=Pool.MAX),
        Connection("b", "mean", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN),
    )
    return Network("norms", (Input("image", 3, size, size),), areas, connections, readout=Readout("mean", 5, parameter=None, clamp=None))


def by_hand(net: Any, x: Tensor) -> Tensor:
    """The layers called one by one."""
    logits, a = [], None
    for t in range(STEPS):
        drive = net.a.bottom_up(x) + (net.a.lateral(a) if a is not None else 0)
        a = torch.relu(net.a_ln.get_submodule(str(t))(drive))
        b = torch.relu(net.b_ln.get_submodule(str(t))(net.b.bottom_up(functional.max_pool2d(a, 2))))
        logits.append(b.mean((2, 3)))
    return torch.log_softmax(torch.stack(logits), -1)


def norms(net: Any) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def each(function: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for norm in norms(net):
            function(norm)

    return change


def in_order(*changes: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for one in changes:
            one(net)

    return change


def untracked(net: Any) -> None:
    for name in ("a_ln", "b_ln"):
        channels = norms(getattr(net, name))[0].num_features
        for t in range(STEPS):
            getattr(net, name).add_module(str(t), nn.BatchNorm2d(channels, eps=1e-3, track_running_stats=False).double())


def plain(net: Any) -> None:
    for t in range(STEPS):
        net.b_ln.add_module(str(t), nn.BatchNorm2d(5, affine=False).double())


CHANGES: dict[str, Callable[[Any], None]] = {
    "training": lambda net: None,
    "evaluation": lambda net: net.eval() and None,
    "frozen in training": each(lambda norm: norm.eval()),
    "one area frozen in training": lambda net: net.a_ln.eval() and None,
    "the other area frozen in training": lambda net: net.b_ln.eval() and None,
    "one area training in evaluation": in_order(lambda net: net.eval(), lambda net: net.b_ln.train()),
    "training in evaluation": in_order(lambda net: net.eval(), each(lambda norm: norm.train())),
    "momentum None": each(lambda norm: setattr(norm, "momentum", None)),
    "momentum of one": lambda net: setattr(norms(net)[0], "momentum", 0.7),
    "no running statistics": untracked,
    "no running statistics in evaluation": in_order(untracked, lambda net: net.eval()),
    "statistics no longer tracked": each(lambda norm: setattr(norm, "track_running_stats", False)),
    "statistics no longer tracked in evaluation": in_order(
        each(lambda norm: setattr(norm, "track_running_stats", False)), lambda net: net.eval()
    ),
    "eps": lambda net: [setattr(m, "eps", 0.3) for m in norms(net.a_ln)] and None,
    "no affine map": plain,
    "frozen affine maps": each(lambda norm: norm.requires_grad_(False)),
}


def pair(backend: str) -> tuple[Any, Any, Tensor]:
    """The same network twice, with statistics that have moved."""
    torch.manual_seed(1)
    nets = [RecurrentNetwork(network(), STEPS, backend=backend).double() for _ in range(2)]
    for norm in norms(nets[0]):
        for p in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(p, 0.5, 0.3)
    nets[1].load_state_dict(nets[0].state_dict())
    return nets[0], nets[1], torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_as_the_layers_themselves(name: str, backend: str) -> None:
    """Results, gradients and statistics of two batches."""
    net, twin, x = pair(backend)
    net(x)
    twin.load_state_dict(net.state_dict())
    for one in (net, twin):
        CHANGES[name](one)
    for k in range(2):
        images = x * (k + 1) + k
        found, expected = net(images), by_hand(twin, images)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(expected)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
    state = net.state_dict()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(state[key], value, msg=lambda text, key=key: f"{key}: {text}")
    grads = {key: p.grad for key, p in net.named_parameters()}
    for key, p in twin.named_parameters():
        assert (grads[key] is None) == (p.grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(grads[key], p.grad, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_steps_of_an_area_are_frozen_together(backend: str) -> None:
    net, _, x = pair(backend)
    norms(net)[1].eval()
    message = r"a_ln.1.training: expected the same at all time steps of area 'a', got False there and True in a_ln"
    with pytest.raises(TypeError, match=message):
        net(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(norms(net)[1], "eps", 0.2), r"a_ln.1.eps: expected 0.001, as at the other time steps of area 'a' \(a_ln"),
        (lambda net: net.b_ln.add_module("1", nn.Identity()), r"b_ln.1: expected torch.nn.BatchNorm2d, got torch.nn.Identity"),
        (lambda net: net.b_ln.add_module("1", nn.BatchNorm2d(4).double()), r"b_ln.1.num_features: expected 5, got 4"),
        (lambda net: net.b_ln.add_module("1", nn.SyncBatchNorm(5).double()), r"b_ln.1: expected .*BatchNorm2d, got torch.nn.SyncBatchNorm"),
        (lambda net: net.b_ln.get_submodule("0").register_forward_hook(print), r"b_ln.0._forward_hooks: expected no forward hooks"),
    ],
    ids=["eps", "identity", "channels", "another class", "hook"],
)  # fmt: skip
def test_refused(change: Callable[[Any], Any], message: str, backend: str) -> None:
    net, _, x = pair(backend)
    change(net)
    with pytest.raises((TypeError, ValueError), match=message):
        net(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel(backend: str) -> None:
    """As PyTorch refuses it."""
    net = RecurrentNetwork(network(size=2), STEPS, backend=backend)
    x = torch.randn(1, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"image: expected more than one value per channel for the batch norm of area 'b' in training, got 1"
    ):
        net(x)
    net(x.expand(2, -1, -1, -1))
    net.eval()(x)


def test_published_network_with_frozen_norms() -> None:
    """Fine-tuning: no statistics move, and logits are those of evaluation."""
    torch.manual_seed(0)
    net: Any = rcnn_sat("bl", 3, timesteps=2, image_size=64, width_divisor=32, backend="native")
    x = torch.rand(2, 3, 64, 64)
    expected = net.eval()(x)
    net.train()
    each(lambda norm: norm.eval())(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = net(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
