"""The general words of a spec: what each means (reference against plain PyTorch), and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import identity, lateral, linear, up
from torch.nn import functional

from rnndyn_fast.graph import Area, Connection, Input, Interaction, Network, Norm, Operator, Pool, Role, compile_schedule
from rnndyn_fast.graph.spec.areas import ZERO
from rnndyn_fast.graph.spec.network import FIT, SAME, Activation
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.ops.cells import LSTM, UGRNN, GRUGates, IntersectionRNN, ReciprocalGated, TimeDecay
from rnndyn_fast.program import rollout

PLAIN: dict[str, Any] = {"norm": Norm.NONE, "activation": Activation.IDENTITY}


def one(connection: Connection, height: int = 7, width: int = 6, channels: int = 4, source: int = 6, **area: Any) -> Network:
    """An area `a` with one connection from the image."""
    return Network("one", (Input("image", source, height, width),), (Area("a", channels, **(PLAIN | area)),), (connection,))


def run(network: Network, *inputs: torch.Tensor, timesteps: int = 1, **options: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    parameters = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in network.parameter_shapes.items()}
    parameters |= {n: torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for n, s in network.buffer_shapes.items()}
    names = [a.name for a in network.areas]
    return rollout(network, timesteps, inputs, parameters, names, backend="reference", **options), parameters


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "size", "pads"),
    [
        (7, 2, (8, 8), (2, 3, 2, 3)), (7, 2, (9, 7), (3, 3, 3, 3)), (2, 1, (5, 5), (0, 1, 0, 1)), (4, 1, (6, 5), (1, 2, 1, 2)),
        (3, 2, (7, 8), (0, 1, 1, 1)),
    ],
)  # fmt: skip
def test_same_padding(kernel_size: int, stride: int, size: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    net = one(up("image", "a", kernel_size, stride=stride, padding=SAME, bias=True), *size)
    x = image(2, 6, *size)
    (y,), p = run(net, x)
    expected = functional.conv2d(functional.pad(x, pads), p["a.bottom_up.weight"], p["a.bottom_up.bias"], stride)
    torch.testing.assert_close(y[0], expected)
    assert y.shape[3:] == tuple(-(-n // stride) for n in size)


def test_kernel_is_cut_to_the_map() -> None:
    net = one(up("image", "a", 7, padding=SAME, cut_kernel=True), 5, 4)
    assert net.parameter_shapes["a.bottom_up.weight"] == (4, 6, 5, 4)
    x = image(1, 6, 5, 4)
    (y,), p = run(net, x)
    torch.testing.assert_close(y[0], functional.conv2d(functional.pad(x, (1, 2, 2, 2)), p["a.bottom_up.weight"]))


def test_grouped_and_separable() -> None:
    x = image(2, 6, 7, 6)
    (y,), p = run(one(up("image", "a", 3, groups=2)), x)
    torch.testing.assert_close(y[0], functional.conv2d(x, p["a.bottom_up.weight"], padding=1, groups=2))
    net = one(up("image", "a", 3, groups=3, middle_channels=9, middle_bias=True, bias=True))
    assert list(net.parameter_shapes) == [
        f"a.bottom_up_{part}.{kind}" for part in ("depthwise", "pointwise") for kind in ("weight", "bias")
    ]
    (y,), p = run(net, x)
    deep = functional.conv2d(x, p["a.bottom_up_depthwise.weight"], p["a.bottom_up_depthwise.bias"], padding=1, groups=3)
    torch.testing.assert_close(y[0], functional.conv2d(deep, p["a.bottom_up_pointwise.weight"], p["a.bottom_up_pointwise.bias"]))
    assert net.multiply_adds(net.connections[0]) == 42 * (9 * 2 * 9 + 4 * 9)


def test_pooling_and_resizing() -> None:
    x = image(1, 6, 7, 5)
    (y,), _ = run(one(identity("image", "a", pool=Pool.MAX_SAME), 7, 5, 6), x)
    torch.testing.assert_close(y[0], functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 2))
    small = image(1, 2, 3, 3)
    feedback = Connection("small", "a", Role.TOP_DOWN, resize=True, parameter="fb")
    net = Network("r", (Input("image", 6, 7, 5), Input("small", 2, 3, 3)), (Area("a", 4, **PLAIN),), (up("image", "a"), feedback))
    (y,), p = run(net, x, small)
    enlarged = functional.interpolate(small, (7, 5), mode="bilinear", align_corners=True)
    torch.testing.assert_close(y[0], functional.conv2d(x, p["a.bottom_up.weight"], padding=1) + functional.conv2d(enlarged, p["fb.weight"]))


def test_concatenated_sources_share_one_weight() -> None:
    parts = [up("image", "a", 3, parameter="w", concat=(0, 8), bias=True), up("other", "a", 3, parameter="w", concat=(6, 8))]
    net = Network("c", (Input("image", 6, 7, 5), Input("other", 2, 7, 5)), (Area("a", 4, **PLAIN),), tuple(parts))
    assert net.parameter_shapes == {"w.weight": (4, 8, 3, 3), "w.bias": (4,)}
    x, other = image(1, 6, 7, 5), image(1, 2, 7, 5)
    (y,), p = run(net, x, other)
    torch.testing.assert_close(y[0], functional.conv2d(torch.cat([x, other], 1), p["w.weight"], p["w.bias"], padding=1))
    assert sum(net.multiply_adds(c) for c in parts) == 35 * 9 * 8 * 4


def test_transposed_to_a_given_size() -> None:
    down = Connection("small", "a", Role.TOP_DOWN, Operator.CONV_TRANSPOSE, 3, 2, output_padding=FIT)
    net = Network("t", (Input("image", 6, 5, 4), Input("small", 2, 3, 2)), (Area("a", 4, **PLAIN),), (up("image", "a"), down))
    assert net.window(down).output_padding == (0, 1)
    x, small = image(1, 6, 5, 4), image(1, 2, 3, 2)
    (y,), p = run(net, x, small)
    top = functional.conv_transpose2d(small, p["a.top_down.weight"], None, 2, 1, (0, 1))
    torch.testing.assert_close(y[0], functional.conv2d(x, p["a.bottom_up.weight"], padding=1) + top)


def test_squashed_modulator_and_missing_drive() -> None:
    """A missing drive under a modulator is zero, and so the state is the norm's bias; the value is one and the same at all such steps."""
    area = Area("a", 4, Interaction.SQUASHED, Norm.GROUP, Activation.IDENTITY, drive_activation=Activation.RELU)
    source = Area("b", 4, norm=Norm.NONE)
    connections = (
        up("image", "b"),
        up("image", "a", parameter="m", port="modulator"),
        Connection("b", "a", Role.TOP_DOWN, Operator.CONV, 3, port="drive", parameter="d"),
    )
    net = Network("s", (Input("image", 6, 4, 4),), (area, source), connections)
    x = image(2, 6, 4, 4)
    (a, b), p = run(net, x, timesteps=3)
    torch.testing.assert_close(a[0], p["a_ln.bias"][:, None, None].expand(2, 4, 4, 4))
    drive = functional.relu(functional.conv2d(b[0], p["d.weight"], padding=1))
    value = drive * 2 * torch.sigmoid(functional.conv2d(x, p["m.weight"], padding=1))
    torch.testing.assert_close(a[1], functional.group_norm(value, 1, p["a_ln.weight"], p["a_ln.bias"], 1e-5))
    schedule = compile_schedule(net, 3, ("a",))
    assert schedule.slot_of["a"] == [0, 1, 1]
    assert schedule.terms["a", 0] == ()


def test_batch_norm_of_every_step() -> None:
    area = Area("a", 4, norm=Norm.BATCH, norm_steps=3, eps=1e-3)
    net = Network("n", (Input("image", 6, 4, 4),), (area,), (up("image", "a"), lateral("a")))
    x = image(5, 6, 4, 4)
    (y,), p = run(net, x, timesteps=2)
    z = functional.conv2d(x, p["a.bottom_up.weight"], padding=1)
    for t in range(2):
        norm = [p[f"a_ln.{t}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        torch.testing.assert_close(y[t], torch.relu(functional.batch_norm(z, *norm, eps=1e-3)))
        z = functional.conv2d(x, p["a.bottom_up.weight"], padding=1) + functional.conv2d(y[t], p["a.lateral.weight"], padding=1)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    (y,), p = run(net, x, timesteps=1, statistics=seen)
    z = functional.conv2d(x, p["a.bottom_up.weight"], padding=1)
    torch.testing.assert_close(seen["a_ln.0"][1], z.var((0, 2, 3)))
    torch.testing.assert_close(y[0], torch.relu(functional.batch_norm(z, None, None, p["a_ln.0.weight"], p["a_ln.0.bias"], True, eps=1e-3)))
    schedule = compile_schedule(net, 3, ("a",))
    assert schedule.num_slots["a"] == 3
    assert schedule.drives[0].static
    with pytest.raises(ValueError, match="area 'a' of network 'n' has batch norms for 3 time steps, got 4"):
        compile_schedule(net, 4, ("a",))


def test_running_statistics_move_in_training() -> None:
    area = Area("a", 4, norm=Norm.BATCH, norm_steps=2)
    net = RecurrentNetwork(Network("n", (Input("image", 3, 4, 4),), (area,), (up("image", "a"), lateral("a"))), 2, backend="reference")
    x = torch.randn(8, 3, 4, 4)
    z = functional.conv2d(x, net.get_parameter("a.bottom_up.weight"), padding=1)
    net(x)
    moved = dict(net.named_buffers())
    torch.testing.assert_close(moved["a_ln.0.running_mean"], 0.1 * z.mean((0, 2, 3)))
    torch.testing.assert_close(moved["a_ln.0.running_var"], 0.9 + 0.1 * z.var((0, 2, 3)))
    assert moved["a_ln.1.num_batches_tracked"] == 1
    before = {name: b.clone() for name, b in moved.items()}
    net.eval()(x)
    for name, b in net.named_buffers():
        torch.testing.assert_close(b, before[name], rtol=0, atol=0)


def test_image_off() -> None:
    net = Network("o", (Input("image", 3, 4, 4, off_at=2, off_value=0.5),), (Area("a", 2, norm=Norm.NONE), Area("b", 2)), (
        up("image", "a"), up("a", "b"),
    ))  # fmt: skip
    x = image(1, 3, 4, 4)
    (a, b), p = run(net, x, timesteps=4)
    torch.testing.assert_close(a[1], torch.relu(functional.conv2d(x, p["a.bottom_up.weight"], padding=1)))
    torch.testing.assert_close(a[3], torch.relu(functional.conv2d(torch.full_like(x, 0.5), p["a.bottom_up.weight"], padding=1)))
    schedule = compile_schedule(net, 4, ("b",))
    assert schedule.slot_of == {"image": [0, 0, 1, 1], "a": [0, 0, 1, 1], "b": [0, 0, 1, 1]}
    assert b.shape[0] == 4


def test_initial_states() -> None:
    """Zero before the first state is a term (its bias counts); absent is none; an input is what it is."""
    for initial, expected in (("absent", [0, 1]), (ZERO, [0, 1]), ("h0", [0, 1])):
        inputs = (Input("image", 3, 4, 4), Input("h0", 2, 4, 4))
        net = Network("i", inputs, (Area("a", 2, norm=Norm.NONE, initial=initial),), (up("image", "a"), lateral("a", bias=True)))
        x, h = image(1, 3, 4, 4), image(1, 2, 4, 4)
        (a,), p = run(net, x, h, timesteps=2)
        z = functional.conv2d(x, p["a.bottom_up.weight"], padding=1)
        if initial == ZERO:
            z = z + p["a.lateral.bias"][:, None, None]
        elif initial == "h0":
            z = z + functional.conv2d(h, p["a.lateral.weight"], p["a.lateral.bias"], padding=1)
        torch.testing.assert_close(a[0], torch.relu(z))
        schedule = compile_schedule(net, 2, ("a",))
        assert schedule.slot_of["a"] == expected
        assert len(schedule.zeros["a", 0]) == (initial == ZERO)
        # Neither the absent nor the zero term is evaluated.
        assert sum(len(d.slots) for d in schedule.drives if d.connection.role is Role.LATERAL) == (2 if initial == "h0" else 1)


def test_zeros_make_constants() -> None:
    """A biological chain whose areas are zero at first: each is driven by biases alone until the image arrives, and once per value."""
    areas = [Area(f"a{i}", 2, norm=Norm.NONE, initial=ZERO) for i in range(4)]
    connections = [up("image" if i == 0 else f"a{i - 1}", f"a{i}", bias=True, delay=int(i > 0)) for i in range(4)]
    net = Network("chain", (Input("image", 2, 4, 4),), tuple(areas), tuple(connections))
    schedule = compile_schedule(net, 7, ("a3",))
    assert schedule.slot_of["a3"] == [0, 1, 2, 3, 3, 3, 3]
    assert [len(d.slots) for d in schedule.drives] == [1, 1, 2, 3]


CELLS = [
    TimeDecay(), GRUGates(layer_norm=True), LSTM(layer_norm=True, peepholes=True), UGRNN(forget_bias=0.5), IntersectionRNN(),
    ReciprocalGated(activation=Activation.TANH),
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.kind)
def test_json_keeps_cells(cell: Any) -> None:
    port = next(iter(cell.ports))
    area = Area("a", 3, cell=cell, initial=(ZERO, "image") if len(cell.states) == 2 else "image")
    net = Network("j", (Input("image", 3, 4, 4),), (area,), (up("image", "a", port=port, concat=(2, 9), padding=SAME, cut_kernel=True),))
    assert Network.from_json(net.to_json()) == net
    assert net.weight_shape(net.connections[0])[0] == 3 * cell.ports[port]


def test_dtypes_without_kernels_go_to_the_reference_visibly() -> None:
    net = one(up("image", "a", 2, padding=SAME))
    image, weight = torch.zeros(1, 6, 7, 6), torch.zeros(4, 6, 2, 2)
    with pytest.warns(UserWarning, match="running the reference, .*image has dtype torch.bfloat16; the native engine takes float32"):
        rollout(net, 1, [image.bfloat16()], {"a.bottom_up.weight": weight.bfloat16()}, ("a",))
    with warnings.catch_warnings(action="error"):  # (these run in our own kernels)
        rollout(net, 1, [image], {"a.bottom_up.weight": weight}, ("a",))


A = Area("a", 4, cell=UGRNN())
IMAGE = Input("image", 6, 8, 8)


@pytest.mark.parametrize(
    ("areas", "connections", "message"),
    [
        ((A,), [lateral("a", port="memory")], r"area 'a': expected at least one connection into port 'gates' of its cell"),
        ((A,), [up("image", "a", port="tau")], r"unknown port 'tau' of 'a'; there are \['gates', 'memory'\]"),
        ((A,), [up("image", "a"), lateral("a", port="memory", state="c")], r"unknown state 'c' of 'a'; there are \['h'\]"),
        (
            (Area("a", 4, cell=IntersectionRNN()),),
            [up("image", "a"), identity("image", "a", port="input", parameter=None)],
            r"image -> a \(bottom_up\): the identity needs equal channels, got 6 and 4 \(port 'input'\)",
        ),
        ((Area("a", 4), Area("b", 4)), [up("image", "a"), up("a", "b"), Connection("b", "a", Role.TOP_DOWN, delay=0)], "must stand before"),
        ((Area("a", 4),), [up("image", "a", groups=4)], r"expected groups that divide 6 and 4 channels, got 4"),
        ((Area("a", 4),), [up("image", "a", concat=(3, 8))], r"concat: channels 3 .. 9 are not within 8"),
        ((Area("a", 4),), [up("image", "a", padding="valid")], 'expected padding as a number, or "same"'),
        ((Area("a", 4),), [linear("image", "a", pool=Pool.MEAN, groups=2)], "groups, middle_channels and cut_kernel are of convolutions"),
        ((Area("a", 4),), [up("image", "a", middle_bias=True)], "middle_bias needs middle_channels"),
        ((Area("a", 4, norm=Norm.GROUP, norm_groups=3),), [up("image", "a")], "expected norm_groups that divide 4 channels, got 3"),
        ((Area("a", 4, norm=Norm.BATCH),), [up("image", "a")], "norm_steps: expected the number of time steps with a batch norm, got None"),
        ((Area("a", 4, initial="h0"),), [up("image", "a")], r'initial: expected "absent", "zero" or one of the inputs \[\'image\'\], got'),
        ((Area("a", 4, initial="image"),), [up("image", "a")], r"initial: input 'image' must be one map of \(4, 8, 8\), has \(6, 8, 8\)"),
        ((Area("a", 4, initial=(ZERO, ZERO)),), [up("image", "a")], r"initial: expected one for each of \[None\]"),
        (
            (Area("a", 4), Area("b", 4)),
            [up("image", "a"), up("a", "b", 3, stride=2), up("image", "b", 1, stride=2), Connection(
                "b", "a", Role.TOP_DOWN, Operator.CONV_TRANSPOSE, 1, 1, output_padding=FIT)],
            r"no output padding makes a map of \(8, 8\) from one of \(4, 4\) \(kernel 1 x 1, stride 1, padding 0\)",
        ),
    ],
)  # fmt: skip
def test_refuses(areas: Any, connections: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = Network("bad", (IMAGE,), areas, tuple(connections)).parameter_shapes


def test_area_with_a_cell_takes_nothing_else() -> None:
    with pytest.raises(ValueError, match="area 'a': an area with a cell takes no norm and no activation"):
        Area("a", 4, cell=UGRNN(), norm=Norm.GROUP)
    with pytest.raises(ValueError, match="area 'a': an area with a cell takes no interaction"):
        Network("bad", (IMAGE,), (Area("a", 4, Interaction.MULTIPLICATIVE, cell=UGRNN()),), (up("image", "a"),))
