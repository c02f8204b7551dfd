"""Changes in layers of other networks: gated cells, streams, SAME padding, modules that a network was given."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnndyn_fast.graph import Area, Connection, Input, Network, Norm, Role
from rnndyn_fast.models import blt_vs, convrnn
from rnndyn_fast.nn import ConvCell, RecurrentNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def test_norms_of_cells() -> None:
    """A cell's norms are layers too, and show the eps that they use."""
    torch.manual_seed(0)
    cell = ConvCell("lstm", 3, 4, (6, 6), layer_norm=True, backend="native").double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    first, _ = cell(x)
    norms = [m for m in cell.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.eps for m in norms} == {1e-12}
    for m in norms:
        m.eps = 0.5
    second, _ = cell(x)
    assert (first - second).abs().max() > 1e-3
    cell.backend = "reference"
    torch.testing.assert_close(cell(x)[0], second)
    norms[0].eps = 0.1
    with pytest.raises(TypeError, match=r"_norm.eps: expected .*, as in .* of the same cell"):
        cell(x)
    norms[0].eps, norms[0].num_groups = 0.5, 1
    with pytest.raises(TypeError, match=r"_norm.num_groups: expected 4, got 1"):
        cell(x)


def test_layers_whose_spec_says_more_than_torch() -> None:
    """SAME padding of one side, kernels that are cut: as they were built, or refused."""
    net: Any = convrnn(
        "gru_shallow", image_size=96, num_classes=10, widths=dict(conv1=2, conv2=2, conv3=3, conv4=3, conv5=3), backend="native"
    ).eval()
    x = torch.rand(1, 3, 96, 96)
    net(x)
    path = next(path for path, m in net.named_modules() if path.startswith("conv1") and isinstance(m, nn.Conv2d))
    conv = net.get_submodule(path)
    for name, value in (("stride", (1, 1)), ("dilation", (2, 2)), ("padding", (1, 1))):
        before = getattr(conv, name)
        setattr(conv, name, value)
        with pytest.raises(TypeError, match=rf"{path}\.{name}: expected .*, got \({value[0]}"):
            net(x)
        setattr(conv, name, before)
    net(x)


def test_two_streams() -> None:
    """Options of the network that no longer hold, and norms of its areas."""
    torch.manual_seed(0)
    net: Any = blt_vs(2, 3, 2, bio_unroll=False, image_size=128, backend="native").eval()
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        before = torch.stack(net(x))
        net.connections["V4"].layer_norm_bu.eps = 0.5
        net.connections["LOC"].td_conv.bias = None
        found = torch.stack(net(x))
        assert not torch.allclose(found, before, atol=1e-5)
        net.backend = "reference"
        torch.testing.assert_close(found, torch.stack(net(x)), rtol=1e-4, atol=1e-4)
        net.connections["V4"].skip_bu_depthwise.groups = 1
        with pytest.raises(TypeError, match=r"connections.V4.skip_bu_depthwise.groups: expected 64, as the connection was built, got 1"):
            net(x)
        net.connections["V4"].skip_bu_depthwise.groups = 64
        net.bio_unroll = True
        with pytest.raises(TypeError, match=r"bio_unroll: expected False, as the network was built, got True"):
            net(x)


class Held(nn.Module):
    """A user's area, whose layers a network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom_up = nn.Conv2d(3, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottom_up(x)


def test_modules_that_a_network_was_given() -> None:
    """They may have a forward of their own, for other uses; what stands in their place later may not."""
    spec = Network(
        "given", (Input("image", 3, 4, 4),), (Area("a", 4, norm=Norm.NONE),), (Connection("image", "a", Role.BOTTOM_UP, kernel_size=3),)
    )
    held, x = Held(), torch.randn(1, 3, 4, 4)
    net = RecurrentNetwork(spec, 1, modules={"a": held})
    torch.testing.assert_close(net(x)["a"][0], torch.relu(held(x)))
    net.a = nn.Sequential(OrderedDict(bottom_up=held.bottom_up))
    with pytest.raises(TypeError, match=r"a: expected a module whose parameters are read, got Sequential with a forward of its own"):
        net(x)
