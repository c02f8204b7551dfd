"""A checkpoint holds what was changed in the layers of its network, or is refused: loaded, it gives the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_modules_changed import HONOURED, both, hook, pair, put
from torch import nn

from rnndyn_fast import accelerate
from rnndyn_fast.graph.spec.yaml_files import network_to_plain
from rnndyn_fast.models import blt_net_64, blt_vs, build, convrnn, rcnn_sat
from rnndyn_fast.models.spec_network import SpecNetwork
from rnndyn_fast.train import load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

DATA = {"path": "", "image_size": 32, "categories": [str(n) for n in range(5)], "mean": [0.5] * 3, "std": [0.5] * 3}
UNSAVED = {
    "parametrized": r"v2.lateral.weight: expected a parameter, got one with a parametrization",
    "weight norm": r"v2.lateral.weight: expected a parameter, got one with a parametrization",
    "readout of several layers": r"readout: expected Linear, as the network was built, got torch.nn.Sequential, which is not saved",
    "readout's hook": r"readout._forward_hooks: expected no forward hooks, which are not saved, got 1",
    "hook of an unused layer": r"v1.lateral._forward_hooks: expected no forward hooks",
}


def saved(net: Any, path: Path) -> Path:
    return save_checkpoint(path, {"model": net.config, "state_dict": net.state_dict(), "epoch": 0, "data": DATA})


@pytest.mark.parametrize("name", HONOURED)
def test_every_honoured_change(name: str, tmp_path: Path) -> None:
    _, net, x = pair()
    net, x = net.float(), x.float()
    HONOURED[name](net)
    with torch.no_grad():
        expected = net(x)
        if name in UNSAVED:
            with pytest.raises(TypeError, match=UNSAVED[name]):
                saved(net, tmp_path / "net.pt")
            return
        again, contents = load_checkpoint(saved(net, tmp_path / "net.pt"), backend="native")
        torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    assert build(contents["model"]).config == contents["model"] == net.config
    assert ("layers" in contents["model"]) == (name not in WITHOUT_CHANGE)


WITHOUT_CHANGE = ("nothing", "fewer steps", "frozen", "backbone frozen", "a subclass that computes the same", "pruned for good",
                  "padding as a number", "interaction None")  # fmt: skip


def test_interventions_are_not_saved(tmp_path: Path) -> None:
    _, net, _ = pair()
    with (
        net.lesion("v4:lateral"),
        pytest.raises(TypeError, match=r"interventions: expected none in force, which are not saved, got 1"),
    ):
        saved(net, tmp_path / "net.pt")
    assert "layers" not in net.config


@pytest.mark.parametrize("name", ["multiplicative in one area", "norm without bias", "a bias that comes", "lateral off"])
def test_accelerated(name: str, tmp_path: Path) -> None:
    """What was changed in a published instance."""
    published, _, x = pair()
    HONOURED[name](published)
    published, x = published.float(), x.float()
    net: Any = accelerate(published)
    with torch.no_grad():
        again, _ = load_checkpoint(saved(net, tmp_path / "net.pt"))
        torch.testing.assert_close(again(x), torch.stack(published(x)), rtol=1e-4, atol=1e-5)


WIDTHS = {"conv1": 2, "conv2": 2, "conv3": 3, "conv4": 3, "conv5": 3}
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None], int]] = {
    "eps of batch norms": (
        lambda: rcnn_sat("bl", image_size=64, num_classes=5, width_divisor=48),
        lambda net: [setattr(m, "eps", 0.1) for m in net.BatchNorm_Layer_0_Time.children()] and None,
        64,
    ),
    "batch norms without statistics": (
        lambda: rcnn_sat("b", image_size=64, num_classes=5, width_divisor=48),
        lambda net: [both(put("track_running_stats", value=False))(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)] and None,
        64,
    ),
    "padding of a spec": (
        lambda: SpecNetwork(
            network_to_plain(blt_net_64(widths=(2, 4, 8, 16, 32), image_size=32, num_classes=5).network), timesteps=2
        ),
        both(put("v2_ln", functools.partial(nn.GroupNorm, 2, 8)), put("readout", nn.Identity), put("it_ln.eps", 0.2)),
        32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name: str, tmp_path: Path) -> None:
    make, change, size = OTHERS[name]
    torch.manual_seed(0)
    net = make().eval()
    before = net.config
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        first = net(x)
        change(net)
        expected = net(x)
        assert expected.shape != first.shape or (expected - first).abs().max() > 1e-6 or "statistics" in name
        again, contents = load_checkpoint(saved(net, tmp_path / "net.pt"))
        torch.testing.assert_close(again(x), expected)
    assert contents["model"]["layers"]
    assert {**contents["model"], "layers": None} == {**before, "layers": None}


def test_what_cannot_be_saved() -> None:
    net = convrnn("lstm_shallow", image_size=96, num_classes=4, widths=WIDTHS)
    net.timesteps = 8
    with pytest.raises(TypeError, match=r"timesteps: expected 16, as the network was built, got 8; build it with as many"):
        net.config  # noqa: B018
    net.timesteps = 16
    net.decoder.windowed = not net.decoder.windowed
    with pytest.raises(TypeError, match=r"decoder.windowed: expected None, as the network was built, got "):
        net.config  # noqa: B018
    net = blt_vs(timesteps=8, image_size=128, num_classes=4, hook_type="concat")
    assert "layers" not in net.config
    hook("V1_0", "register_forward_hook")(net)
    assert "layers" not in net.config  # (a module that is there for hooks)
    small = blt_net_64(widths=(2, 4, 8, 16, 32), image_size=32)
    small.head = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"head: expected no module, as the network was built, got torch.nn.Linear"):
        small.config  # noqa: B018
    small = blt_net_64(widths=(2, 4, 8, 16, 32), image_size=32)
    small.network = blt_net_64(widths=(2, 4, 8, 16, 32), image_size=16).network
    with pytest.raises(TypeError, match=r"network: expected the spec that 'blt_net_64' was built with, got another one"):
        small.config  # noqa: B018


BAD: list[tuple[Any, str]] = [
    (3, r"layers: expected a dict of changed layers, got 3"),
    ({"v9": {"class": "Identity"}}, r"layers: v9: the network has no such layer"),
    ({"v2.lateral": {"class": "Exec"}}, r"layers: v2.lateral: expected one of Conv2d, .*, got 'Exec'"),
    ({"v2.lateral": {"class": "Conv2d"}}, r"layers: v2.lateral: 'weight'"),
    ({"v2.lateral": 7}, r"layers: v2.lateral: argument of type 'int'"),
    ({"v2": {"forward": 1}}, r"layers: v2: unknown attribute 'forward'"),
    ({"v2": {"LT_interaction": "none"}}, r"v2.LT_interaction: expected 'additive' or 'multiplicative', got 'none'"),
    ({"it_ln": {"class": "LayerNorm", "normalized_shape": [3, 4], "eps": 0.1}}, r"layers: it_ln: 'weight'"),
    ({"it_ln": {"class": "LayerNorm", "normalized_shape": [3, 4], "eps": "x", "weight": [3, 4], "bias": [3, 4]}},
     r"layers: it_ln: eps: cannot make LayerNorm with 'x'"),
    ({"it.lateral": {"class": "None"}}, r"layers: it.lateral: expected torch.nn.Conv2d, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "message"), BAD, ids=[message for _, message in BAD])
def test_descriptions_that_make_no_sense(layers: Any, message: str) -> None:
    """Of a file that was written by something else."""
    config = blt_net_64(widths=(2, 4, 8, 16, 32), image_size=32).config
    with pytest.raises(ValueError, match=message):
        build({**config, "layers": layers})
