"""accelerate: what was changed in a published instance is taken over or refused, wrappers are told of, and one image is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import PublishedConv, PublishedNet
from torch import Tensor, nn

from rnndyn_fast import accelerate
from rnndyn_fast.models import BLTNet

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "num_classes": 5, "timesteps": 3, "image_size": 32}


class Doubled(PublishedNet):
    """A subclass with a forward of its own."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        return super().forward(1.2 * inputs)


class LoudConv(PublishedConv):
    """An area with a forward of its own."""

    def forward(self, b_input: Tensor, l_input: Tensor | None = None, t_input: Tensor | None = None) -> Tensor:
        return super().forward(b_input, None if l_input is None else 2 * l_input, t_input)


class Shorter(PublishedNet):
    """Another number of results."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        return super().forward(inputs)[:-1]


class Broken(PublishedNet):
    """It cannot be called."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        raise RuntimeError("no such thing")


def published(cls: type[PublishedNet] = PublishedNet, **options: Any) -> Any:
    torch.manual_seed(3)
    net = cls(**SMALL, **options).eval()
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0.0, 0.3)
    return net


def loud_area(net: Any) -> None:
    area = LoudConv(4, 8, 3)
    area.load_state_dict(net.v2.state_dict())
    net.v2 = area


def dropout_before_the_norm(net: Any) -> None:
    net.v2.add_module("drop", nn.Dropout(0.5))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward of an area's class": (loud_area, r"module: PublishedNet computes something else than .* differ by up to "),
    "hook of the network": (lambda net: net.register_forward_hook(lambda *_: None), r"module._forward_hooks: expected no forward hooks"),
    "pre-hook of the network": (lambda net: net.register_forward_pre_hook(lambda *_: None), r"module._forward_pre_hooks"),
    "hook of a layer": (lambda net: net.v2.lateral.register_forward_hook(lambda *_: None), r"v2.lateral._forward_hooks"),
    "hook of an area": (lambda net: net.v2.register_forward_hook(lambda *_: None), r"v2._forward_hooks"),
    "hook of a pooling": (lambda net: net.v2.pool.register_forward_hook(lambda *_: None), r"v2.pool._forward_hooks"),
    "hook of a norm": (lambda net: net.it_ln.register_forward_hook(lambda *_: None), r"it_ln._forward_hooks"),
    "forward of the instance": (
        lambda net: setattr(net, "forward", functools.partial(net.forward)), r"module.forward: expected that of PublishedNet, got functools"
    ),
    "mean pooling": (lambda net: setattr(net.v2, "pool", nn.AvgPool2d(2, 2)), r"v2.pool: expected .*MaxPool2d\(2, 2\), got AvgPool2d"),
    "overlapping pooling": (lambda net: setattr(net.v2, "pool", nn.MaxPool2d(3, 2, 1)), r"v2.pool.kernel_size: expected 2, got 3"),
    "stride of a pooling": (lambda net: setattr(net.v2.pool, "stride", 1), r"v2.pool.stride: expected 2, got 1"),
    "maximum for the mean": (lambda net: setattr(net.gap, "pool", nn.MaxPool2d(4)), r"gap.pool: expected .*AvgPool2d over the whole map"),
    "another activation": (lambda net: net.add_module("relu", nn.GELU()), r"relu: expected torch.nn.ReLU, got torch.nn.GELU"),
    "dropout": (dropout_before_the_norm, r"v2.drop: expected no dropout, got Dropout"),
    "a flag without its layer": (lambda net: setattr(net.it, "topdown_connect", True), r"it.topdown_connect: expected False, .*top_down"),
    "dilation": (lambda net: setattr(net.v4.lateral, "dilation", (2, 2)), r"v4.lateral.dilation: expected 1"),
    "another readout": (lambda net: setattr(net, "readout", nn.Identity()), r"readout: expected .*Linear, whose sizes .*, got Identity"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    net = published()
    accelerate(net)
    change, message = REFUSED[name]
    change(net)
    with pytest.raises(TypeError, match=message):
        accelerate(net)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            Doubled,
            r"module: Doubled computes something else than the published class: for one random image the results differ by up to 0\.\d",
        ),
        (Shorter, r"module: Shorter gives 2 tensors .* for one image, its accelerated form 3"),
        (Broken, r"module: Broken fails on random inputs \[1, 3, 32, 32\] \(no such thing\)"),
    ],
)
def test_one_image_is_compared(cls: type[PublishedNet], message: str) -> None:
    net = published(cls)
    with pytest.raises(TypeError, match=message):
        accelerate(net)
    assert isinstance(accelerate(net, check=False), BLTNet)


def test_the_comparison_leaves_no_trace() -> None:
    """Neither modes, gradients nor random numbers."""
    net = published().train()
    net.v2.eval()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    ours = accelerate(net)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net.training
    assert not net.v2.training
    assert ours.training
    assert not ours.get_submodule("v2").training
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.Sequential], ids=["DataParallel", "compile", "Sequential"])
def test_wrappers_are_told_what_to_pass(wrap: Callable[[Any], Any]) -> None:
    net = wrap(published())
    message = {
        "DataParallel": r"got DataParallel around PublishedNet; pass module.module, and give the result to DataParallel again",
        "OptimizedModule": r"got OptimizedModule around PublishedNet; pass module._orig_mod, and give the result to torch.compile again",
        "Sequential": r"Sequential is not a published class",
    }[type(net).__name__]
    with pytest.raises(TypeError, match=message):
        accelerate(net)


def test_distributed_wrapper() -> None:
    """Without a process group one cannot be made: its shape is enough."""

    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(TypeError, match=r"got DistributedDataParallel around PublishedNet; pass module.module"):
        accelerate(DistributedDataParallel(published()))


def test_layers_are_shared() -> None:
    """What is changed in a layer later counts in both; hooks of the readout run."""
    net = published()
    ours = accelerate(net)
    assert ours.get_submodule("v2.lateral") is net.v2.lateral
    x = torch.randn(2, 3, 32, 32)
    net.it_ln.eps = 0.2
    calls: list[int] = []
    net.readout.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), torch.stack(net(x)), rtol=1e-4, atol=1e-4)
        assert len(calls) == 6
        ours.get_submodule("v2").lateral_connect = False  # type: ignore[assignment]
        net.v2.lateral_connect = False
        torch.testing.assert_close(ours(x), torch.stack(net(x)), rtol=1e-4, atol=1e-4)


def test_an_adaptive_pooling_is_a_mean() -> None:
    net = published()
    net.gap.pool = nn.AdaptiveAvgPool2d(1)
    assert isinstance(accelerate(net), BLTNet)
