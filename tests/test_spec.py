"""Network specs: what they refuse, the shapes they infer, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cases import CASES, FRAMES, IMAGE, MUL, RolloutCase, down, identity, lateral, linear, up
from torch.nn import functional

from rnndyn_fast.graph import Area, Connection, Input, Network, Norm, Pool, Readout, Role, Unroll
from rnndyn_fast.models import blt_net_64, blt_net_128
from rnndyn_fast.ops.engines import Geometry, Operator

A, B = Area("a", 4), Area("b", 4)


def network(areas: Any = (A, B), connections: Any = (), inputs: Any = (IMAGE,), **options: Any) -> Network:
    return Network("net", inputs, areas, connections, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_json_round_trip(case: RolloutCase) -> None:
    text = case.network.to_json()
    again = Network.from_json(text)
    assert again == case.network
    assert hash(again) == hash(case.network)
    assert again.to_json() == text
    assert again.parameter_shapes == case.network.parameter_shapes
    assert json.loads(text)["name"] == case.network.name


def test_models_round_trip() -> None:
    for net in (
        blt_net_64(LT_interaction="multiplicative", timesteps=8, unroll="biological"),
        blt_net_128(norm_type="None"),
    ):
        assert Network.from_json(net.network.to_json()) == net.network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"connections": [up("eye", "a")]},
            r"eye -> a \(bottom_up\): unknown source 'eye'; there are \['image', 'a', 'b'\]",
        ),
        ({"connections": [up("image", "c")]}, r"unknown target 'c'; areas are \['a', 'b'\]"),
        ({"connections": [up("a", "image")]}, "unknown target 'image'"),
        ({"areas": (A, A), "connections": [up("image", "a")]}, "'a' is used more than once"),
        ({"areas": (Area("image", 3),), "connections": []}, "'image' is used more than once"),
        ({"areas": (Area("a", 0),), "connections": [up("image", "a")]}, "area 'a': expected channels >= 1, got 0"),
        ({"inputs": [Input("image", 3, 0, 8)], "connections": [up("image", "a")]}, "input 'image': expected positive"),
        ({"connections": [up("image", "a", 0)]}, "expected kernel_size and stride >= 1, got 0 and 1"),
        ({"connections": [up("image", "a", stride=0)]}, "expected kernel_size and stride >= 1, got 3 and 0"),
        ({"connections": [up("image", "a", delay=2)]}, "expected delay 0, 1 or None, got 2"),
        (
            {"areas": (A,), "connections": [up("image", "a"), lateral("a", delay=0)]},
            "no delay, so 'a' must stand before 'a'",
        ),
        (
            {"connections": [up("image", "a"), up("a", "b"), Connection("b", "a", Role.TOP_DOWN, delay=0)]},
            r"b -> a \(top_down\): it has no delay, so 'b' must stand before 'a'.*delay=1",
        ),
        ({"connections": [up("image", "a"), lateral("b")]}, r"\['b'\] are not reached from any input"),
        (
            {"connections": [up("image", "a"), Connection("a", "b", Role.LATERAL)]},
            "area 'b': expected at least one bottom-up connection",
        ),
        (
            {"connections": [up("image", "a"), up("a", "b"), up("image", "b", pool=Pool.MAX)]},
            r"image -> b \(bottom_up\): it makes a map of \(4, 4\), but the area has \(8, 8\)",
        ),
        (
            {"connections": [up("image", "a"), up("a", "b"), down("b", "a")]},
            r"makes a map of \(16, 16\), but the area has \(8, 8\)",
        ),
        ({"areas": (A,), "connections": [identity("image", "a")]}, "the identity needs equal channels, got 3 and 4"),
        (
            {"areas": (A,), "connections": [identity("image", "a", bias=True)]},
            "the identity has no parameters, so expected bias=False",
        ),
        (
            {"areas": (A,), "connections": [linear("image", "a")]},
            r"linear map needs a 1 x 1 map \(pool=Pool.MEAN\?\), got 8 x 8",
        ),
        ({"connections": [up("image", "a", output_padding=1)]}, "output_padding is of transposed convolutions, not conv"),
        ({"areas": (A,), "connections": [up("image", "a", 11, padding=0)]}, r"too small, the result would be -2 x -2"),
        (
            {"areas": (A,), "connections": [up("image", "a")], "readout": Readout("it", 10)},
            r"readout: unknown area 'it'; areas are \['a'\]",
        ),
        (
            {"areas": (A,), "connections": [up("image", "a")], "readout": Readout("a", 10)},
            "readout: area 'a' must have a 1 x 1 map",
        ),
        (
            {"areas": (A,), "connections": [linear("image", "a", pool=Pool.MEAN)], "readout": Readout("a", 0)},
            "readout: expected num_classes >= 1, got 0",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_refuses_one_parameter_with_two_shapes() -> None:
    net = network(connections=[up("image", "a", parameter="w"), up("a", "b", parameter="w")])
    with pytest.raises(ValueError, match=r"'w.weight' is used with the shapes \(4, 3, 3, 3\) and \(4, 4, 3, 3\)"):
        _ = net.parameter_shapes


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (5, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("padding", "extra"), [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_sizes_are_those_of_pytorch(kernel: tuple[int, int], stride: int, padding: int, extra: int) -> None:
    """A convolution's output padding is zeros below and right of the map; a transposed one's is less than its stride."""
    x = torch.zeros(2, 3, 7, 9)
    y = functional.conv2d(functional.pad(x, (padding, padding + extra) * 2), torch.zeros(5, 3, *kernel), stride=stride)
    geometry = Geometry(Operator.CONV, stride, padding, extra)
    assert geometry.output_size((7, 9), kernel) == y.shape[2:]
    if extra < stride:
        y = functional.conv_transpose2d(x, torch.zeros(3, 5, *kernel), None, stride, padding, extra)
        geometry = Geometry(Operator.CONV_TRANSPOSE, stride, padding, extra)
        assert geometry.output_size((7, 9), kernel) == y.shape[2:]
        if kernel[0] == kernel[1]:
            c = Connection("image", "a", Role.TOP_DOWN, Operator.CONV_TRANSPOSE, kernel[0], stride, padding, extra)
            assert c.output_size((3, 7, 9)) == y.shape[2:]


def test_shapes_follow_from_connections() -> None:
    net = network(
        (Area("a", 5), Area("b", 6), Area("c", 7, norm=Norm.NONE), Area("d", 2)),
        (
            up("image", "a", 5), up("a", "b", 3, pool=Pool.MAX, stride=2), up("b", "c", 2, padding=0), linear("c",
            "d", bias=True),
            down("b", "a", 3, stride=4, padding=0, output_padding=1),
        ),
    )  # fmt: skip
    assert net.shapes == {"image": (3, 8, 8), "a": (5, 8, 8), "b": (6, 2, 2), "c": (7, 1, 1), "d": (2, 1, 1)}
    assert net.parameter_shapes == {
        "a.bottom_up.weight": (5, 3, 5, 5),
        "a.top_down.weight": (6, 5, 3, 3),
        "a_ln.weight": (5, 8, 8),
        "a_ln.bias": (5, 8, 8),
        "b.bottom_up.weight": (6, 5, 3, 3),
        "b_ln.weight": (6, 2, 2),
        "b_ln.bias": (6, 2, 2),
        "c.bottom_up.weight": (7, 6, 2, 2),
        "d.bottom_up.weight": (2, 7),
        "d.bottom_up.bias": (2,),
        "d_ln.weight": (2,),
        "d_ln.bias": (2,),
    }


@pytest.mark.parametrize(("unroll", "delays"), [(Unroll.ENGINEERING, [0, 0, 1, 1, 0]), (Unroll.BIOLOGICAL, [0, 1, 1, 1, 0])])
def test_delays(unroll: Unroll, delays: list[int]) -> None:
    connections = [
        up("image", "a"), up("a", "b"), lateral("b"), Connection("b", "a", Role.TOP_DOWN), Connection("movie", "b",
        Role.TOP_DOWN),
    ]  # fmt: skip
    net = network((A, Area("b", 4, MUL)), connections, (IMAGE, FRAMES), unroll=unroll)
    assert [net.delay(c) for c in connections] == delays


def test_area_by_name() -> None:
    net = network((A,), (up("image", "a"),))
    assert net.area("a") is A
    with pytest.raises(ValueError, match=r"unknown area 'v1'; areas are \['a'\]"):
        net.area("v1")
