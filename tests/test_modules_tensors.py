"""Tensors of other kinds than plain ones, in parameters and inputs: read as PyTorch reads them, or refused; never another memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_modules_interventions import pair
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from rnndyn_fast.nn import BLTConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


def negative(x: Tensor) -> Tensor:
    """The same numbers, whose memory holds their negatives until somebody looks (as the imaginary part of a conjugate)."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def test_negative_views() -> None:
    """Inputs and parameters, with gradients."""
    _, ours, x = pair()
    expected = ours(x)
    torch.testing.assert_close(ours(negative(x)), expected)
    ours.v2.lateral.weight = nn.Parameter(negative(ours.v2.lateral.weight.detach()))
    assert ours.v2.lateral.weight.is_neg()
    found = ours(x)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), ours.v2.lateral.weight)
    ours.v2.lateral.weight = nn.Parameter(ours.v2.lateral.weight.detach().resolve_neg().clone())
    (wanted,) = torch.autograd.grad(ours(x).sum(), ours.v2.lateral.weight)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(grad, wanted)
    layer, small = BLTConv(3, 4, 3), torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(layer(negative(small)), layer(small))


def test_tensors_without_memory() -> None:
    """They have shapes alone."""
    _, ours, x = pair()
    expected = ours(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = ours(mode.from_tensor(x))
    assert found.shape == expected.shape
    assert type(found) is not Tensor
    ours.backend = None
    ours.to("meta")
    found = ours(x.to("meta"))
    assert (found.shape, found.device.type) == (expected.shape, "meta")


def test_what_looks_on_sees_the_rollout() -> None:
    """A dispatch mode, and a tracer, which would otherwise record constants."""
    _, ours, x = pair()
    expected = ours(x)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watching():
        torch.testing.assert_close(ours(x), expected)
    assert "rnndyn.rollout.default" in seen
    with torch.no_grad():
        traced = make_fx(lambda a: ours(a))(x)
        torch.testing.assert_close(traced(x + 1), ours(x + 1))


def test_parametrizations_are_computed_once_per_call() -> None:
    """In the first call too, in which the network is looked at."""
    _, ours, x = pair()
    count = 0

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return weight

    parametrize.register_parametrization(ours.v2.lateral, "weight", Counted())
    count = 0
    for n in (1, 2, 3):
        ours(x)
        assert count == n


SPECIAL: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: x.to_sparse(), r"image: expected a dense tensor, got torch.sparse_coo"),
    (lambda x: torch.nested.nested_tensor([x[0], x[1]]), r"image: expected a dense tensor, got a nested tensor"),
    (lambda x: x.float().to_mkldnn(), r"image: expected a dense tensor, got torch._mkldnn"),
    (lambda x: x.to(torch.complex128), r"image: expected a floating-point tensor, got torch.complex128"),
    (lambda x: x.numpy(), r"image: expected a torch.Tensor, got ndarray"),
]


@pytest.mark.parametrize("backend", ["native", "reference", None])
def test_special_inputs(backend: str | None) -> None:
    _, ours, x = pair()
    ours.backend = backend
    for make, message in SPECIAL:
        with pytest.raises(TypeError, match=message):
            ours(make(x))


def test_special_parameters() -> None:
    """The odd one is named, not the image."""
    _, ours, x = pair()
    ours.v2.lateral.half()
    with pytest.raises(TypeError, match=r"v2.lateral.weight: expected torch.float64 on cpu like 'image', got torch.float16 on cpu"):
        ours(x)
    ours.v2.lateral.to(torch.float64).to("meta")
    with pytest.raises(TypeError, match=r"v2.lateral.weight: expected torch.float64 on cpu like 'image', got torch.float64 on meta"):
        ours(x)
    _, ours, x = pair()
    with pytest.raises(TypeError, match=r"image: expected torch.float64 on cpu like parameter 'retina.weight', got torch.float32 on cpu"):
        ours(x.float())
    ours.gap.lateral.weight = nn.Parameter(ours.gap.lateral.weight.detach().to_sparse())
    with pytest.raises(
        ValueError, match=r'backend="native": gap.lateral.weight is torch.sparse_coo; the native engine takes dense tensors'
    ):
        ours(x)
    _, ours, x = pair()
    quantised = torch.ao.quantization.quantize_dynamic(ours.float(), {nn.Linear})
    with pytest.raises(TypeError, match=r"gap.lateral: expected torch.nn.Linear, got torch.ao.nn.quantized"):
        quantised(x.float())


PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "spectral norm": lambda net: parametrizations.spectral_norm(net.v2.lateral),
    "orthogonal": lambda net: parametrizations.orthogonal(net.v4.bottom_up),
    "of a norm": lambda net: parametrize.register_parametrization(net.it_ln, "bias", nn.Tanh()),
    "of a transposed convolution": lambda net: parametrize.register_parametrization(net.v2.top_down, "weight", nn.Tanh()),
    "tied in a layer": lambda net: setattr(net.it_ln, "weight", net.it_ln.bias),
    "not contiguous": lambda net: setattr(net.v2.lateral, "weight", nn.Parameter(net.v2.lateral.weight.detach().permute(1, 0, 3, 2))),
    "expanded": lambda net: setattr(net.v2.lateral, "weight", nn.Parameter(net.v2.lateral.weight.detach()[..., :1, :1].expand(8, 8, 3, 3))),
    "another convolution": lambda net: net.set_submodule("v2.lateral", nn.Conv2d(8, 8, 3, padding=1, bias=True).double()),
    "data": lambda net: setattr(net.v2.lateral.weight, "data", net.v2.lateral.weight.detach() * 2),
    "assigned": lambda net: net.load_state_dict({name: value * 1.1 for name, value in net.state_dict().items()}, assign=True),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_as_they_are(name: str) -> None:
    """Between two calls, in the published network and in ours."""
    published, ours, x = pair()
    ours(x)
    for net in (published, ours):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            PARAMETERS[name](net.eval())
    torch.testing.assert_close(ours(x), torch.stack(published(x)))
    calls = torch.func.functional_call(ours, {k: v * 1.2 for k, v in ours.named_parameters()}, (x,))
    assert (calls - ours(x)).abs().max() > 1e-6
