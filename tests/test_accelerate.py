"""accelerate: published instances become ours, on the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import PublishedConv, PublishedNet
from torch import nn

from rnndyn_fast import accelerate
from rnndyn_fast.models import BLTVS, BLTNet, blt_vs
from rnndyn_fast.nn import BLTConv

SMALL: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "num_classes": 7}
NETS: list[dict[str, Any]] = [
    {},
    {"LT_interaction": "multiplicative", "timesteps": 4},
    {"norm_type": None, "classifier_bias": False},
    {"norm_type": None, "image_size": 32},
    {"topdown_connections": False},
    {"lateral_connections": False},
    {"lateral_connections": False, "topdown_connections": False, "norm_type": None},
    {"LT_position": "last", "classifier_bias": False},
    {"LT_position": "last", "lateral_connections": False},
    {"LT_interaction": None, "timesteps": 1},
    {"kernel_size": 5, "image_size": 128, "timesteps": 3},
    {"kernel_size": 5, "image_size": 128, "norm_type": None, "LT_interaction": "multiplicative"},
]


def batch(net: Any, size: int, samples: int = 2) -> torch.Tensor:
    return torch.randn(samples, net.retina.in_channels, size, size, dtype=next(net.parameters()).dtype)


@pytest.mark.parametrize("options", NETS, ids=str)
def test_network(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    published = PublishedNet(**options, **SMALL).double()
    ours = accelerate(published, backend="native")
    assert isinstance(ours, BLTNet)
    x = batch(published, options.get("image_size", 64))
    theirs = published(x)
    outputs = ours(x)
    assert len(outputs) == len(theirs) == published.timesteps
    for mine, expected in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(published.named_parameters()).keys()
    for name, parameter in published.named_parameters():
        assert mine[name] is parameter, name
    published.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(published.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_shared(training: bool) -> None:
    published = PublishedNet(**SMALL).train(training)
    published.v2.lateral.weight.requires_grad_(False)
    ours = accelerate(published)
    assert ours.training is training
    assert all(m.training is training for m in ours.modules())
    optimizer = torch.optim.SGD(published.parameters(), lr=0.1)
    before = published.v4.lateral.weight.clone()
    ours(batch(published, 64)).sum().backward()
    assert published.v2.lateral.weight.grad is None
    assert published.v1.lateral.weight.grad is None
    optimizer.step()
    assert not torch.equal(ours.get_parameter("v4.lateral.weight"), before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("interaction", ["additive", "multiplicative"])
@pytest.mark.parametrize(("lateral", "topdown"), [(True, True), (True, False), (False, True), (False, False)])
def test_convolution(lateral: bool, topdown: bool, interaction: str, pool: bool, bias: bool) -> None:
    published = PublishedConv(3, 4, 5, lateral, topdown, interaction, pool, bias).double().eval()
    ours = accelerate(published)
    assert isinstance(ours, BLTConv)
    assert not ours.training
    size = 16 if pool else 8
    inputs = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((3, size), (4, 8), (8, 4))]
    torch.testing.assert_close(ours(*inputs), published(*inputs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(inputs[0]), published(inputs[0]), rtol=1e-10, atol=1e-10)
    assert all(ours.get_parameter(n) is p for n, p in published.named_parameters())


class StandIn(nn.Module):
    """The interface of the published two-stream class, without its loop: attributes, modules for hooks, parameters by name and in order."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        like = blt_vs(**options)
        names = ("timesteps", "num_classes", "add_feats", "image_size", "bio_unroll", "readout_type", "hook_type")
        for name in names:
            setattr(self, name, getattr(like, name))
        for name, parameter in like.named_parameters():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.randn_like(parameter) * 0.1))
        for name, child in like.named_children():
            if isinstance(child, nn.Identity):
                self.add_module(name, nn.Identity())


TWO_STREAMS: list[dict[str, Any]] = [
    {"timesteps": 6},
    {"timesteps": 2, "bio_unroll": False, "readout_type": "single"},
    {"timesteps": 5, "image_size": 224, "topdown_connections": False},
    {"timesteps": 6, "lateral_connections": False, "hook_type": "concat"},
    {"timesteps": 2, "bio_unroll": False, "skip_connections": False, "hook_type": "separate"},
]


@pytest.mark.parametrize("options", TWO_STREAMS, ids=str)
def test_two_stream_network(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (2, 2, 4, 4, 4, 2, 2))  # in place of 32 to 576
    options = {"num_classes": 3, "add_feats": 2, "image_size": 128, **options}
    published = StandIn(options).eval()
    seen: list[Any] = []
    if options.get("hook_type", "None") != "None":
        name = "V1_1" if options["hook_type"] == "concat" else "V1_1_BU"
        published.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    ours = accelerate(published, backend="native")
    assert isinstance(ours, BLTVS)
    assert not ours.training
    expected = blt_vs(**options, backend="native")
    expected.load_state_dict(published.state_dict(), strict=True)
    assert ours.config == expected.config
    x = torch.rand(1, 3, options["image_size"], options["image_size"])
    outputs = ours(x)
    for mine, theirs in zip(outputs, expected(x), strict=True):
        assert torch.equal(mine, theirs)
    assert len(seen) == ("hook_type" in options)
    assert all(ours.get_parameter(n) is p for n, p in published.named_parameters())
    sum(output.sum() for output in outputs).backward()
    assert published.get_parameter("connections.V1.bu_conv.weight").grad is not None
    _, activations = ours(x, extract_actvs=True, areas=["V1", "Readout"], timesteps=[1], concat=False)
    assert set(activations["V1"][1]) == {"bu", "td"}
    with pytest.raises(ValueError, match=r"areas: unknown area 'IT'; there are \['Retina'"):
        ours(x, extract_actvs=True, areas=["IT"], timesteps=[1])


def test_refuses_what_only_looks_like_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (2, 2, 4, 4, 4, 2, 2))
    published = StandIn({"timesteps": 5, "num_classes": 3, "add_feats": 2, "image_size": 128})
    published.attention = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"unexpected \['attention.bias', 'attention.weight'\]"):
        accelerate(published)
    del published.attention
    del published.connections.Readout.readout_conv  # type: ignore[union-attr]
    with pytest.raises(TypeError, match=r"missing \['connections.Readout.readout_conv.weight'\]"):
        accelerate(published)
    del published.bio_unroll
    with pytest.raises(TypeError, match=r"a BLT_VS \(attributes connections, timesteps, num_classes, bio_unroll\)"):
        accelerate(published)


def test_ours_is_accepted_as_well() -> None:
    conv = BLTConv(3, 4, 3)
    assert accelerate(conv).get_parameter("lateral.weight") is conv.lateral.weight


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(3, 4, 3), "module: Conv2d is not a published class we know; looked for a BLT_net .* or a BLT_Conv"),
        (nn.Sequential(nn.Linear(2, 2)), "module: Sequential is not"),
        ("blt_net_64", "module: expected a torch.nn.Module, got str"),
        (None, "module: expected a torch.nn.Module, got NoneType"),
    ],
    ids=["conv", "sequential", "string", "none"],
)
def test_refuses_others(module: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        accelerate(module)


def test_refuses_what_only_looks_like_one() -> None:
    odd_kernel = PublishedNet(kernel_size=7, **SMALL)
    with pytest.raises(TypeError, match="expected kernels of 3 or 5"):
        accelerate(odd_kernel)
    extended = PublishedNet(**SMALL)
    extended.attention = nn.Linear(2, 2)
    with pytest.raises(
        TypeError,
        match=r"not those of the published class: missing \[\], unexpected \['attention.bias', 'attention.weight'\]",
    ):
        accelerate(extended)
    swapped = PublishedNet(**SMALL)
    swapped.v2.lateral = nn.Conv2d(8, 8, 5, padding=2, bias=False)
    with pytest.raises(TypeError, match=r"parameter v2.lateral.weight has shape \[8, 8, 5, 5\], expected \[8, 8, 3, 3\]"):
        accelerate(swapped)
