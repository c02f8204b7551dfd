"""Parameters are read as they are now, whatever has become of a module since its last call; hooks that would not run are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnndyn_fast.models import blt_net_64, blt_vs, rcnn_sat
from rnndyn_fast.nn import BLTConv

ROUNDS = 4  # as ever, recorded, replayed


def small(backend: str | None = None) -> Any:
    torch.manual_seed(0)
    return blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=3, backend=backend).eval()


def assigned(net: Any) -> None:
    net.v2.lateral.weight = nn.Parameter(2 * net.v2.lateral.weight.detach())


def changed_in_place(net: Any) -> None:
    net.v2.lateral.weight.data.mul_(2)


def replaced_layer(net: Any) -> None:
    conv = copy.deepcopy(net.v2.lateral)
    conv.weight.data.mul_(2)
    net.v2.lateral = conv


def replaced_area(net: Any) -> None:
    area = copy.deepcopy(net.v2)
    area.lateral.weight.data.mul_(2)
    net.v2 = area


def loaded(net: Any) -> None:
    net.load_state_dict({name: 2 * t if name == "v2.lateral.weight" else t.clone() for name, t in net.state_dict().items()}, assign=True)


def parametrized(net: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(net.v2.lateral, "weight", Twice())


def a_plain_attribute(net: Any) -> None:
    weight = net.v2.lateral.weight.detach()
    del net.v2.lateral.weight
    net.v2.lateral.weight = 2 * weight


def tied(net: Any) -> None:
    """Named parameters list it once, by the first name."""
    assigned(net)
    net._modules = {"alias": net.v2.lateral, **net._modules}


CHANGES = (assigned, changed_in_place, replaced_layer, replaced_area, loaded, parametrized, a_plain_attribute, tied)


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_are_seen(change: Callable[[Any], None], backend: str) -> None:
    net, x = small(backend), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        twin = small("reference")
        before = twin(x)
        twin.v2.lateral.weight.mul_(2)
        after = twin(x)
        assert not torch.allclose(before, after, atol=1e-4)
        for _ in range(ROUNDS):
            torch.testing.assert_close(net(x), before)
        change(net)
        for _ in range(ROUNDS):
            torch.testing.assert_close(net(x), after)


def test_conversions_are_seen() -> None:
    net, x = small(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(ROUNDS):
            single = net(x)
        net.double()
        double = net(x.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, small("reference").double()(x.double()))
        torch.testing.assert_close(net.float()(x), single)


def test_gradients_reach_what_was_replaced() -> None:
    net, x = small(), torch.rand(1, 3, 16, 16)
    for _ in range(ROUNDS):
        net(x).sum().backward()
    before = net.v2.lateral.weight
    before.grad = None
    assigned(net)
    net(x).square().sum().backward()
    assert before.grad is None
    assert net.v2.lateral.weight.grad is not None


def test_buffers_that_were_replaced_are_seen() -> None:
    """Running statistics of a batch norm, which a batch in training moves, and inference reads."""
    torch.manual_seed(0)
    net: Any = rcnn_sat("bl", 3, timesteps=2, image_size=64, width_divisor=32).eval()
    x = torch.rand(2, 3, 64, 64)
    name = next(iter(net.network.buffer_shapes)).rpartition(".")[0]
    with torch.no_grad():
        states = [net.states((x,), (net.network.areas[0].name,))[0] for _ in range(ROUNDS)]
        norm = net.get_submodule(name)
        norm.running_mean = norm.running_mean + 1
        moved = net.states((x,), (net.network.areas[0].name,))[0]
    assert torch.equal(states[0], states[-1])
    assert not torch.allclose(moved, states[0])


def test_a_single_layer() -> None:
    torch.manual_seed(0)
    layer = BLTConv(3, 4, 3)
    inputs = torch.rand(1, 3, 8, 8), torch.rand(1, 4, 4, 4), torch.rand(1, 8, 2, 2)
    expected = layer(*inputs)
    nn.utils.parametrizations.weight_norm(layer.lateral)
    torch.testing.assert_close(layer(*inputs), expected)
    layer.lateral.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"lateral._forward_hooks: expected no forward hooks, got 1"):
        layer(*inputs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles_before_its_first_run() -> None:
    torch.manual_seed(0)
    net = blt_net_64(timesteps=1, image_size=24, widths=(2, 4, 8, 16, 32), num_classes=3, backend="native").eval()
    x = torch.rand(1, 3, 24, 24)
    torch._dynamo.reset()
    found = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, net(x))


# ---------------------------------------------------------------- hooks


@pytest.mark.parametrize("path", ["v2.lateral", "v2"])
@pytest.mark.parametrize(
    "kind",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks_that_would_not_run_are_refused(path: str, kind: str) -> None:
    """As soon as they are there, and no longer."""
    net, x = small(), torch.rand(1, 3, 16, 16)
    net(x)
    handle = getattr(net.get_submodule(path), kind)(lambda *_: None)
    with pytest.raises(TypeError, match=rf"{path}\._.*_hooks: expected no .*hooks, got 1: a rollout reads the parameters of '{path}'"):
        net(x)
    handle.remove()
    net(x)


def test_hooks_that_run_are_not_refused() -> None:
    """Those of the network, its readout, modules that it calls, and parametrizations."""
    ran: list[str] = []
    net = small()
    nn.utils.parametrizations.weight_norm(net.v2.lateral)
    for path in ("", "readout", "v2.lateral.parametrizations.weight"):
        net.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    streams = blt_vs(2, 4, 2, bio_unroll=False, image_size=128, hook_type="separate", backend="reference").eval()
    streams.get_submodule("V2_1_TD").register_forward_hook(lambda *_: ran.append("V2_1_TD"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        net(torch.rand(1, 3, 16, 16))
        streams(torch.rand(1, 3, 128, 128))
    assert set(ran) == {"", "readout", "v2.lateral.parametrizations.weight", "V2_1_TD"}
