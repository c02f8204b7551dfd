"""Small networks that between them use everything a spec can say: one table that drives tests of the schedule, the
rollout and its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph import (
    Activation,
    Area,
    Connection,
    Input,
    Interaction,
    Network,
    Norm,
    Operator,
    Pool,
    Readout,
    Role,
    Unroll,
)

ADD, MUL = Interaction.ADDITIVE, Interaction.MULTIPLICATIVE
UP, LATERAL, DOWN = Role.BOTTOM_UP, Role.LATERAL, Role.TOP_DOWN
INTERACTIONS = {"additive": ADD, "multiplicative": MUL}


@dataclass(frozen=True)
class RolloutCase:
    """A network, for how long, on how many samples, and the areas to record."""

    name: str
    network: Network
    record: tuple[str, ...]
    timesteps: int = 4
    samples: int = 2
    tags: frozenset[str] = field(default_factory=frozenset)

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
        """Standard normal inputs, [N, C, H, W] or [T, N, C, H, W]."""
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for node in self.network.inputs:
            lead = (self.timesteps, self.samples) if node.frames else (self.samples,)
            x = torch.randn(*lead, node.channels, node.height, node.width, generator=generator, dtype=torch.float64)
            tensors.append(x.to(dtype))
        return tensors

    def parameters(self, dtype: torch.dtype = torch.float64, seed: int = 2) -> dict[str, Tensor]:
        """Weights of standard deviation 0.8 / sqrt(fan-in) (so that the recurrence contracts), norms near 1, small
        biases."""
        generator = torch.Generator().manual_seed(seed)
        norms = {a.norm_parameter for a in self.network.areas if a.norm is Norm.LAYER}
        result = {}
        for name, shape in self.network.parameter_shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            prefix, kind = name.rsplit(".", 1)
            if kind == "bias":
                value = 0.2 * value
            elif prefix in norms:
                value = 1 + 0.2 * value
            else:
                value = 0.8 * value / max(1, value[0].numel()) ** 0.5
            result[name] = value.to(dtype)
        return result


def up(source: str, target: str, kernel_size: int = 3, **options: Any) -> Connection:
    """A bottom-up convolution."""
    return Connection(source, target, UP, options.pop("operator", Operator.CONV), kernel_size, **options)


def lateral(area: str, kernel_size: int = 3, **options: Any) -> Connection:
    """A lateral convolution."""
    return Connection(area, area, LATERAL, options.pop("operator", Operator.CONV), kernel_size, **options)


def down(source: str, target: str, kernel_size: int = 3, **options: Any) -> Connection:
    """A top-down transposed convolution that doubles the map."""
    options.setdefault("operator", Operator.CONV_TRANSPOSE)
    return Connection(source, target, DOWN, options.pop("operator"), kernel_size, options.pop("stride", 2), **options)


def identity(source: str, target: str, role: Role = UP, **options: Any) -> Connection:
    """The source's map itself."""
    return Connection(source, target, role, Operator.IDENTITY, **options)


def linear(source: str, target: str, role: Role = UP, **options: Any) -> Connection:
    """A dense map between 1 x 1 maps."""
    return Connection(source, target, role, Operator.LINEAR, **options)


IMAGE = Input("image", 3, 8, 8)
FRAMES = Input("movie", 2, 8, 8, frames=True)


def _net(name: str, inputs: Any, areas: Any, connections: Any, **options: Any) -> Network:
    return Network(name, tuple(inputs), tuple(areas), tuple(connections), **options)


def _lateral_only(interaction: Interaction, **area: Any) -> Network:
    bias = area.pop("bias", False)
    return _net(
        "lateral_only",
        [IMAGE],
        [Area("a", 4, norm=Norm.NONE), Area("b", 5, interaction, **area), Area("c", 6, interaction, **area)],
        [
            up("image", "a", bias=True),
            up("a", "b", bias=bias),
            lateral("b", bias=bias),
            up("b", "c", pool=Pool.MAX, bias=bias),
            lateral("c", bias=bias),
        ],
    )


def _blt(interaction: Interaction, *, norm: Norm = Norm.LAYER, unroll: Unroll = Unroll.ENGINEERING, kernel_size: int = 3) -> Network:
    bias, k = norm is Norm.NONE, kernel_size
    return _net(
        "blt",
        [IMAGE],
        [
            Area("retina", 3, norm=Norm.NONE),
            Area("v1", 4, interaction, norm),
            Area("v2", 5, interaction, norm),
            Area("gap", 5, interaction, norm),
        ],
        [
            up("image", "retina", k, bias=True, parameter="retina"),
            up("retina", "v1", k, bias=bias),
            lateral("v1", k, bias=bias),
            down("v2", "v1", k, bias=bias),
            up("v1", "v2", k, pool=Pool.MAX, bias=bias),
            lateral("v2", k, bias=bias),
            identity("v2", "gap", pool=Pool.MEAN),
            linear("gap", "gap", LATERAL, bias=bias),
        ],
        unroll=unroll,
        readout=Readout("gap", 7),
    )


def _skip(interaction: Interaction) -> Network:
    """One area read by two others, one of which it also reaches directly through the identity."""
    return _net(
        "skip",
        [IMAGE],
        [Area("a", 4, norm=Norm.NONE), Area("b", 4, interaction), Area("c", 4, interaction), Area("d", 4, interaction)],
        [
            up("image", "a"),
            up("a", "b"),
            lateral("b"),
            up("b", "c"),
            identity("a", "c"),
            lateral("c", 1),
            up("c", "d", parameter="d.from_c"),
            identity("b", "d"),
            up("a", "d", 1, parameter="d.from_a"),
        ],
    )


def _frames(interaction: Interaction) -> Network:
    return _net(
        "frames",
        [FRAMES],
        [Area("a", 3, norm=Norm.NONE), Area("b", 4, interaction)],
        [up("movie", "a", bias=True), up("a", "b", pool=Pool.MAX), lateral("b")],
    )


def _several_inputs(interaction: Interaction) -> Network:
    return _net(
        "several_inputs",
        [IMAGE, FRAMES, Input("cue", 5, 1, 1, frames=True)],
        [Area("a", 4, interaction), Area("vector", 6, interaction)],
        [
            up("image", "a", parameter="a.image"),
            up("movie", "a", parameter="a.movie", bias=True),
            lateral("a"),
            linear("a", "vector", pool=Pool.MEAN, bias=True),
            linear("cue", "vector", DOWN, delay=0),
            linear("vector", "vector", LATERAL),
        ],
    )


def _shared(interaction: Interaction, *, biases: tuple[bool, bool] = (True, True)) -> Network:
    """Two areas read one term; a third uses the same weights on another source."""
    return _net(
        "shared",
        [IMAGE],
        [Area("a", 4), Area("b", 4, interaction), Area("c", 4, interaction), Area("d", 4)],
        [
            up("image", "a", parameter="image"),
            lateral("a"),
            up("a", "b", parameter="shared", bias=biases[0]),
            lateral("b"),
            up("a", "c", parameter="shared", bias=biases[1]),
            lateral("c"),
            up("c", "d", parameter="shared"),
            up("b", "d", 1, parameter="d.from_b"),
        ],
    )


def _shared_with_outside(interaction: Interaction) -> Network:
    """A recurrent term that an area of a later component reads as well, one time step longer."""
    return _net(
        "shared_with_outside",
        [IMAGE],
        [Area("a", 4, interaction), Area("b", 4, interaction)],
        [
            up("image", "a"),
            lateral("a", parameter="shared"),
            up("a", "b", parameter="shared"),
            lateral("b"),
        ],
    )


def _shared_norm() -> Network:
    return _net(
        "shared_norm",
        [IMAGE],
        [Area("a", 4, norm_parameter="ln"), Area("b", 4, norm_parameter="ln"), Area("c", 4)],
        [up("image", "a"), lateral("a"), up("a", "b"), lateral("b"), up("b", "c")],
    )


def _same_term_twice(interaction: Interaction) -> Network:
    """Two connections of one area that are one and the same term: it counts twice."""
    return _net(
        "same_term_twice",
        [IMAGE],
        [Area("a", 3, interaction), Area("b", 3, interaction)],
        [
            up("image", "a"),
            lateral("a"),
            up("a", "b", parameter="same"),
            Connection("a", "b", DOWN, Operator.CONV, 3, parameter="same", delay=0),
            lateral("b"),
        ],
    )


def _feed_forward(frames: bool) -> Network:
    source = FRAMES if frames else IMAGE
    return _net(
        "feed_forward",
        [source],
        [Area("a", 4), Area("b", 5, MUL), Area("c", 6, norm=Norm.NONE)],
        [up(source.name, "a"), up("a", "b", pool=Pool.MAX), up("b", "c", stride=2, bias=True)],
    )


def _delays() -> Network:
    """Delays given one by one: a bottom-up term a step late, a top-down one at once, a frame of the step before."""
    return _net(
        "delays",
        [IMAGE, FRAMES],
        [Area("a", 4), Area("b", 4, MUL), Area("c", 4)],
        [
            up("image", "a", delay=1, parameter="late"),
            up("movie", "a", parameter="movie"),
            up("a", "b", delay=1),
            Connection("a", "b", DOWN, Operator.CONV, 3, delay=0),
            up("b", "c", parameter="c.now"),
            up("movie", "c", delay=1, parameter="c.movie"),
            lateral("c", delay=1),
        ],
    )


def _operators(interaction: Interaction, height: int = 11, width: int = 9) -> Network:
    """Kernels of 5 and 7, a stride, odd maps, one channel and 33, a mean of a map fed back as a vector."""
    return _net(
        "operators",
        [Input("image", 1, height, width)],
        [Area("a", 33, interaction), Area("b", 3, interaction), Area("c", 1, norm=Norm.NONE), Area("g", 4)],
        [
            up("image", "a", 7),
            lateral("a", 5),
            up("a", "b", 3, stride=2),
            lateral("b", 1),
            up("b", "c", 3, pool=Pool.MAX, bias=True),
            linear("b", "g", pool=Pool.MEAN, bias=True),
            linear("g", "g", LATERAL),
        ],
    )


def _many_terms(interaction: Interaction) -> Network:
    """More terms of each kind than a kernel takes at once, and a map with more readers than that."""
    ups = [up("image", "a", 1, parameter=f"u{i}", bias=i % 2 == 0) for i in range(8)]
    laterals = [lateral("a", 1, parameter=f"l{i}", bias=i % 3 == 0) for i in range(8)]
    readers = [up("a", f"r{i}", 1, pool=Pool.MAX if i % 2 else Pool.NONE) for i in range(3)]
    return _net(
        "many_terms",
        [Input("image", 3, 4, 4)],
        [Area("a", 3, interaction), *(Area(f"r{i}", 2) for i in range(3))],
        [*ups, *laterals, *readers],
    )


def _poolings(interaction: Interaction) -> Network:
    """Every form of an input's map and of an area's map, each read twice."""
    connections = [lateral("a", 1)]
    areas = [Area("a", 3, interaction)]
    for source in ("image", "a"):
        for pool in (Pool.NONE, Pool.MAX, Pool.MEAN):
            for i in range(2):
                name = f"{source}_{pool.value}_{i}"
                areas.append(Area(name, 2 if i else 3, norm=Norm.NONE if i else Norm.LAYER))
                connections.append(up(source, name, 1, pool=pool) if i else identity(source, name, pool=pool))
    return _net("poolings", [Input("image", 3, 5, 6)], areas, [up("image", "a"), *connections])


def _no_recurrence_value() -> Network:
    """Areas with neither norm nor relu."""
    return _net(
        "plain",
        [IMAGE],
        [
            Area("a", 4, norm=Norm.NONE, activation=Activation.IDENTITY),
            Area("b", 4, MUL, norm=Norm.NONE, activation=Activation.IDENTITY),
            Area("c", 4, norm=Norm.LAYER, activation=Activation.IDENTITY),
        ],
        [up("image", "a"), lateral("a"), up("a", "b"), lateral("b"), up("b", "c"), identity("c", "c", LATERAL)],
    )


def _biological_loop(interaction: Interaction) -> Network:
    """Three areas in a ring: with a delay on every connection each starts at its own time."""
    return _net(
        "biological_loop",
        [IMAGE],
        [Area("a", 4, interaction), Area("b", 4, interaction), Area("c", 4, interaction)],
        [
            up("image", "a"),
            up("a", "b", pool=Pool.MAX),
            up("b", "c", parameter="c.bottom_up"),
            lateral("b"),
            down("c", "a"),
            Connection("c", "b", DOWN, Operator.CONV, 3),
        ],
        unroll=Unroll.BIOLOGICAL,
    )


def _cases() -> list[RolloutCase]:
    cases = []

    def add(name: str, network: Network, record: tuple[str, ...], **options: Any) -> None:
        cases.append(RolloutCase(name, network, record, **options))

    for key, interaction in INTERACTIONS.items():
        add(f"lateral_{key}", _lateral_only(interaction), ("c", "b"))
        add(f"lateral_{key}_bias", _lateral_only(interaction, norm=Norm.NONE, bias=True), ("c", "a"))
        add(f"topdown_{key}", _blt(interaction), ("gap", "v1", "retina"))
        add(f"topdown_{key}_bias", _blt(interaction, norm=Norm.NONE), ("gap", "v2"))
        add(f"topdown_{key}_k5", _blt(interaction, kernel_size=5), ("gap",), timesteps=3)
        add(f"topdown_{key}_one_step", _blt(interaction), ("gap", "v1"), timesteps=1)
        add(f"topdown_{key}_one_sample", _blt(interaction), ("gap",), samples=1)
        add(f"biological_{key}", _blt(interaction, unroll=Unroll.BIOLOGICAL), ("gap", "v1"), timesteps=6)
        add(f"biological_loop_{key}", _biological_loop(interaction), ("c", "a"), timesteps=5)
        add(f"skip_{key}", _skip(interaction), ("d",))
        add(f"skip_{key}_record_all", _skip(interaction), ("a", "d", "b", "c"), timesteps=3)
        add(f"frames_{key}", _frames(interaction), ("b", "a"))
        add(f"several_inputs_{key}", _several_inputs(interaction), ("vector", "a"))
        add(f"shared_{key}", _shared(interaction), ("d", "b"))
        add(f"shared_{key}_bias_once", _shared(interaction, biases=(True, False)), ("d", "b"))
        add(f"shared_with_outside_{key}", _shared_with_outside(interaction), ("b",))
        add(f"same_term_twice_{key}", _same_term_twice(interaction), ("b",))
        add(f"operators_{key}", _operators(interaction), ("c", "g"), samples=3)
        add(f"many_terms_{key}", _many_terms(interaction), ("r0", "r1", "r2", "a"), timesteps=3)
        poolings = _poolings(interaction)
        add(f"poolings_{key}", poolings, tuple(a.name for a in poolings.areas), timesteps=3)
    add("shared_norm", _shared_norm(), ("c", "a"))
    add("feed_forward_frames", _feed_forward(True), ("c", "b"))
    add("feed_forward_image", _feed_forward(False), ("c", "b"))
    add("delays", _delays(), ("c", "b"))
    add("no_norm_no_relu", _no_recurrence_value(), ("c", "b", "a"))
    return cases


CASES = {case.name: case for case in _cases()}
