"""What users change in layers counts as when the layers are called one by one, or is refused with the names of module and attribute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import PublishedConv, PublishedNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rnndyn_fast import accelerate
from rnndyn_fast.models import BLTNet, blt_net_64
from rnndyn_fast.nn import BLTConv

SMALL: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "num_classes": 5, "timesteps": 3, "image_size": 32}


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LoudConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class NamedConv(nn.Conv2d):
    """A subclass that computes the same."""


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute."""

    def change(net: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(net.get_submodule(owner), name, value() if isinstance(value, type | functools.partial) else copy.deepcopy(value))

    return change


def forward_of(path: str, factor: float) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        module = net.get_submodule(path)
        module.forward = functools.partial(lambda old, *args: factor * old(*args), module.forward)

    return change


def hook(path: str, kind: str, function: Any = lambda *_: None) -> Callable[[Any], None]:
    return lambda net: getattr(net.get_submodule(path), kind)(function)


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for one in changes:
            one(net)

    return change


def subclass(cls: type[nn.Module]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        conv = cls(8, 8, 3, padding=1, bias=False)
        conv.load_state_dict(net.v2.lateral.state_dict())
        net.v2.lateral = conv

    return change


def seeded(make: Callable[[], nn.Module]) -> functools.partial[nn.Module]:
    """A layer that is the same whenever it is made."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layer = make()
            for p in layer.parameters():
                nn.init.normal_(p, 0.5, 0.5)
            return layer

    return functools.partial(made)


HONOURED: dict[str, Callable[[Any], None]] = {
    "nothing": lambda net: None,
    "lateral off": put("v2.lateral_connect", value=False),
    "top-down off": put("v4.topdown_connect", value=False),
    "both off": both(put("v2.lateral_connect", value=False), put("v2.topdown_connect", value=False)),
    "multiplicative in one area": put("v4.LT_interaction", "multiplicative"),
    "interaction None": put("v4.LT_interaction", None),
    "eps of one norm": put("it_ln.eps", 0.1),
    "eps of the vector's norm": put("gap_ln.eps", 0.3),
    "no affine map": put("v2_ln", functools.partial(nn.LayerNorm, (8, 16, 16), elementwise_affine=False)),
    "norm without bias": put("it_ln", seeded(lambda: nn.LayerNorm((32, 4, 4), bias=False))),
    "affine map removed": both(put("v4_ln.weight", None), put("v4_ln.bias", None)),
    "norm removed": put("it_ln", nn.Identity),
    "vector's norm removed": put("gap_ln", nn.Identity),
    "group norm": put("v4_ln", seeded(lambda: nn.GroupNorm(4, 16))),
    "group norm of the vector": put("gap_ln", seeded(lambda: nn.GroupNorm(4, 32))),
    "group norm without affine map": put("v4_ln", functools.partial(nn.GroupNorm, 2, 16, affine=False)),
    "larger kernel": put("v2.lateral", seeded(lambda: nn.Conv2d(8, 8, 5, padding=2, bias=False))),
    "kernel of one": put("it.lateral", seeded(lambda: nn.Conv2d(32, 32, 1, bias=False))),
    "groups": put("v2.lateral", seeded(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False))),
    "a bias that comes": put("v2.bottom_up.bias", seeded(lambda: nn.Linear(2, 8)).func().bias),
    "a lateral bias that comes": put("gap.lateral.bias", seeded(lambda: nn.Linear(2, 32)).func().bias),
    "a bias that goes": put("retina.bias", None),
    "bias registered as None": lambda net: net.retina.register_parameter("bias", None),
    "padding as a word": put("v2.lateral.padding", "same"),
    "padding as a number": put("v2.lateral.padding", 1),
    "a subclass that computes the same": subclass(NamedConv),
    "parametrized": lambda net: parametrize.register_parametrization(net.v2.lateral, "weight", Doubled()) and None,
    "weight norm": lambda net: parametrizations.weight_norm(net.v2.lateral) and None,
    "pruned for good": lambda net: prune.remove(prune.l1_unstructured(net.v2.lateral, "weight", 0.5), "weight") and None,
    "readout of several layers": put("readout", seeded(lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)))),
    "no readout layer": put("readout", nn.Identity),
    "readout's hook": hook("readout", "register_forward_hook", lambda m, i, o: 2 * o),
    "readout without bias": put("readout.bias", None),
    "fewer steps": put("timesteps", 2),
    "frozen": lambda net: net.requires_grad_(False) and None,
    "backbone frozen": lambda net: net.v2.requires_grad_(False) and None,
    "unused layer": put("v1.lateral.dilation", (2, 2)),
    "hook of an unused layer": hook("v1.lateral", "register_forward_hook"),
}
WITHOUT_EFFECT = (
    "nothing", "interaction None", "padding as a word", "padding as a number", "frozen", "backbone frozen", "unused layer", "weight norm",
    "a subclass that computes the same", "hook of an unused layer",
)  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "dilation": (put("v2.lateral.dilation", (2, 2)), r"v2.lateral.dilation: expected 1, got \(2, 2\)"),
    "padding mode": (put("v2.lateral.padding_mode", "circular"), r"v2.lateral.padding_mode: expected 'zeros', got 'circular'"),
    "stride that does not fit": (put("v2.lateral.stride", (2, 2)), r"v2.lateral.stride = 2: connection v2 -> v2"),
    "padding that does not fit": (put("v2.bottom_up.padding", 0), r"v2.bottom_up.padding = 0: "),
    "uneven padding": (put("v2.lateral.padding", (1, 0)), r"v2.lateral.padding: expected the same for height and width"),
    "output padding": (put("v2.top_down.output_padding", (0, 0)), r"v2.top_down.output_padding = 0: "),
    "pooling that does not fit": (put("v4.pool_input", value=False), r"v4.pool_input = False: "),
    "interaction": (put("v4.LT_interaction", "subtractive"), r"v4.LT_interaction: expected 'additive' or 'multiplicative'"),
    "no lateral": (put("v2.lateral", None), r"v2.lateral: expected torch.nn.Conv2d, got None \(to leave .* set v2.lateral_connect = False"),
    "no area": (put("v2", None), r"v2.*: expected a module"),
    "layer of another kind": (put("v2.lateral", nn.Identity), r"v2.lateral: expected torch.nn.Conv2d, got torch.nn.Identity"),
    "a sequence": (
        put("v2.lateral", functools.partial(nn.Sequential, nn.Conv2d(8, 8, 3, padding=1))),
        r"v2.lateral: expected torch.nn.Conv2d",
    ),
    "transposed": (
        put("v2.lateral", functools.partial(nn.ConvTranspose2d, 8, 8, 3, padding=1)),
        r"v2.lateral: expected torch.nn.Conv2d, got",
    ),
    "subclass": (subclass(LoudConv), r"v2.lateral: expected torch.nn.Conv2d, got LoudConv with methods of its own"),
    "forward of an instance": (
        forward_of("v2.lateral", 2.0),
        r"v2.lateral.forward: expected that of torch.nn.Conv2d, got functools.partial",
    ),
    "forward of an area": (forward_of("v2", 2.0), r"v2.forward: expected that of .*Conv"),
    "forward of a norm": (forward_of("v2_ln", 2.0), r"v2_ln.forward: expected that of torch.nn.LayerNorm"),
    "hook": (hook("v2.lateral", "register_forward_hook"), r"v2.lateral._forward_hooks: expected no forward hooks, got 1"),
    "pre-hook": (hook("v2_ln", "register_forward_pre_hook"), r"v2_ln._forward_pre_hooks: expected no forward pre-hooks, got 1"),
    "hook of an area": (hook("it", "register_forward_hook"), r"it._forward_hooks"),
    "backward hook": (hook("it.lateral", "register_full_backward_hook"), r"it.lateral._backward_hooks"),
    "backward pre-hook": (hook("gap", "register_full_backward_pre_hook"), r"gap._backward_pre_hooks"),
    "old weight norm": (lambda net: nn.utils.weight_norm(net.v2.lateral) and None, r"v2.lateral._forward_pre_hooks.*parametrizations"),
    "old spectral norm": (lambda net: nn.utils.spectral_norm(net.v2.lateral) and None, r"v2.lateral._forward_pre_hooks"),
    "pruned": (lambda net: prune.l1_unstructured(net.v2.lateral, "weight", 0.5) and None, r"v2.lateral._forward_pre_hooks.*prune.remove"),
    "batch norm": (
        put("v2_ln", functools.partial(nn.BatchNorm2d, 8)),
        r"v2_ln: expected torch.nn.LayerNorm or .*, got torch.nn.BatchNorm2d",
    ),
    "norm of the map alone": (put("v2_ln", functools.partial(nn.LayerNorm, (16, 16))), r"v2_ln.normalized_shape: expected \(8, 16, 16\)"),
    "activation for a norm": (put("v2_ln", nn.ReLU), r"v2_ln: expected torch.nn.LayerNorm .*, got torch.nn.ReLU"),
    "no norm": (put("v2_ln", None), r"v2_ln: expected torch.nn.LayerNorm .*, got None"),
    "no weight": (put("v2.lateral.weight", None), r"v2.lateral.weight: expected a tensor, got None"),
}


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


def pair() -> tuple[Any, Any, Tensor]:
    """The published network, ours with the same parameters, and images."""
    torch.manual_seed(3)
    published = PublishedNet(**SMALL).double().eval()
    for p in published.parameters():
        nn.init.normal_(p, 0.0, 0.3) if p.dim() > 1 else None
    ours = blt_net_64(backend="native", **SMALL).double().eval()
    ours.load_state_dict(published.state_dict())
    return published, ours, torch.randn(2, 3, 32, 32, dtype=torch.float64)


def doubled(change: Callable[[Any], None], net: Any) -> None:
    change(net)
    net.double()


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name: str) -> None:
    """By ours, changed between two calls, and by the accelerated form of the changed published network."""
    published, ours, x = pair()
    with torch.no_grad():
        before = ours(x)
        torch.testing.assert_close(before, torch.stack(published(x)))
        for net in (published, ours):
            doubled(HONOURED[name], net)
        expected = torch.stack(published(x))
        if name not in WITHOUT_EFFECT:
            assert expected.shape != before.shape or (expected - before).abs().max() > 1e-4, "the change has no effect"
        for _ in range(2):
            torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(copy.deepcopy(ours)(x), expected)
    if name not in ("readout of several layers", "no readout layer", "larger kernel", "kernel of one", "groups", "hook of an unused layer"):
        again = accelerate(published)
        assert isinstance(again, BLTNet)
        torch.testing.assert_close(again(x), expected)


def test_honoured_with_gradients() -> None:
    """Of what was changed too."""
    changes = (
        "lateral off",
        "multiplicative in one area",
        "eps of one norm",
        "norm without bias",
        "group norm",
        "larger kernel",
        "a bias that comes",
    )
    published, ours, x = pair()
    for net in (published, ours):
        for name in changes[1:]:
            doubled(HONOURED[name], net)
        net.it.lateral_connect = False
    weights = torch.randn(3, 2, 5, dtype=torch.float64)
    for net in (published, ours):
        result = net(x)
        ((torch.stack(result) if isinstance(result, list) else result) * weights).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert "it.lateral.weight" not in found
    assert "v2.bottom_up.bias" in found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, backend: str) -> None:
    """By ours, before the first number; and by accelerate."""
    change, message = REFUSED[name]
    published, ours, x = pair()
    ours.backend = backend
    ours(x)
    change(ours)
    with pytest.raises((TypeError, ValueError), match=message):
        ours(x)
    if backend == "reference" or name in ("no area", "old weight norm", "old spectral norm", "pruned"):
        return
    change(published)
    with pytest.raises((TypeError, ValueError)):
        accelerate(published)


def test_readouts_are_called_step_by_step() -> None:
    """A batch norm in a readout sees samples, not time steps."""
    published, ours, x = pair()
    for net in (published, ours):
        net.readout = seeded(lambda: nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5))).func().double()
        net.train()
    torch.testing.assert_close(ours(x), torch.stack(published(x)))
    torch.testing.assert_close(ours.readout[0].running_mean, published.readout[0].running_mean)
    with pytest.raises(TypeError, match=r"readout: expected torch.nn.Linear, got torch.nn.Sequential \(the zones of a readout"):
        ours.readout_map()
    ours.readout = None
    with pytest.raises(TypeError, match=r"readout: expected a module from \[N, D\] to \[N, classes\], got None"):
        ours(x)


def test_a_layer_by_itself() -> None:
    """One step of one area."""
    torch.manual_seed(0)
    theirs, ours = PublishedConv(3, 4, 3).double(), BLTConv(3, 4, 3, backend="native").double()
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((3, 16), (4, 8), (8, 4))]
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    kernel = seeded(lambda: nn.Conv2d(4, 4, 5, padding=2, bias=True))
    for net in (theirs, ours):
        net.lateral, net.LT_interaction = kernel.func().double(), "multiplicative"
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    with pytest.raises(TypeError, match=r"lateral.weight has shape \[4, 4, 5, 5\], expected \[4, 4, 3, 3\]"):
        accelerate(theirs)
    ours.lateral.dilation = (2, 2)
    with pytest.raises(TypeError, match=r"lateral.dilation: expected 1, got \(2, 2\)"):
        ours(*inputs)
    ours.lateral_connect = False
    torch.testing.assert_close(ours(*inputs), theirs(inputs[0], None, inputs[2]))
    ours.bottom_up = nn.Identity()
    with pytest.raises(TypeError, match=r"bottom_up: expected torch.nn.Conv2d, got torch.nn.Identity"):
        ours(*inputs)


def test_changes_hold_for_compiled_calls() -> None:
    """Those made before the compilation, and after it."""
    _, ours, x = pair()
    ours.v2.lateral_connect, ours.it_ln.eps = False, 0.1
    ours.v2_ln = nn.LayerNorm((8, 16, 16), elementwise_affine=False).double()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    changes = (
        put("timesteps", 2),
        put("it_ln.eps", 0.3),
        put("it_ln.eps", 0.1),
        put("v2.lateral_connect", value=True),
        HONOURED["larger kernel"],
    )
    torch.testing.assert_close(compiled(x), ours(x))
    for change in changes:
        doubled(change, ours)
        torch.testing.assert_close(compiled(x), ours(x))
