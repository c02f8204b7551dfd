"""BLT-VS: a recurrent model of the ventral stream whose areas hold a bottom-up and a top-down stream that modulate each other.

Source: KietzmannLab/BLT-VS (Thorat & Kietzmann 2024). Every area is two areas of the spec, ``<area>.bu`` and ``<area>.td``; terms that both
streams read are one term. With D the drive of a stream and M that of the other without its lateral term::

    state = GroupNorm(relu(D) * 2 sigmoid(M))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from rnndyn_fast.graph.spec.network import (
    FIT,
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
from rnndyn_fast.nn.layers import connection_layers
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork
from rnndyn_fast.suggestions import check_choice

AREAS = ("Retina", "LGN", "V1", "V2", "V3", "V4", "LOC", "Readout")
CHANNELS = (32, 32, 576, 480, 352, 256, 352)
STRIDES = (2, 2, 2, 1, 1, 1, 2, 2)
KERNELS = {224: (7, 7, 5, 1, 5, 3, 3, 5), 128: (5, 3, 3, 1, 3, 3, 3, 3)}
LATERAL_KERNEL = {224: 5, 128: 3}
SKIP_KERNELS = {224: (7, 3), 128: (5, 3)}  # V1 -> V4, V4 -> V1
V1, V4 = 2, 5
UP, LATERAL, DOWN = Role.BOTTOM_UP, Role.LATERAL, Role.TOP_DOWN


@dataclass(frozen=True)
class Options:
    """What the spec depends on; see :func:`blt_vs`."""

    num_classes: int
    add_feats: int
    lateral: bool
    topdown: bool
    skip: bool
    bio: bool
    image_size: int


def _stream(name: str, stream: str, channels: int) -> Area:
    return Area(
        f"{name}.{stream}", channels, Interaction.SQUASHED, Norm.GROUP, Activation.IDENTITY,
        norm_parameter=f"connections.{name}.layer_norm_{stream}", drive_activation=Activation.RELU,
    )  # fmt: skip


def _separable(source: str, target: str, role: Role, name: str, kernel_size: int, channels: tuple[int, int], **options: Any) -> Connection:
    """A grouped convolution to the target's channels, then a 1 x 1 one, both with biases."""
    return Connection(
        source, target, role, Operator.CONV, kernel_size, bias=True, groups=gcd(*channels), middle_channels=channels[1], middle_bias=True,
        parameter=name, **options,
    )  # fmt: skip


def _area(i: int, o: Options) -> list[Connection]:
    """The terms of both streams of an area."""
    name, channels = AREAS[i], (*CHANNELS, o.num_classes + o.add_feats)
    bu, td, prefix = f"{name}.bu", f"{name}.td", f"connections.{name}."
    kernel, lateral = KERNELS[o.image_size], LATERAL_KERNEL[o.image_size]
    step = 1 if o.bio else 0  # the delay of what a sweep sees at once
    connections = []

    def drive_and_modulate(drives: str, modulates: str | None, delays: tuple[int, int], **term: Any) -> None:
        connections.append(Connection(target=drives, port="drive", delay=delays[0], **term))
        if modulates is not None:
            connections.append(Connection(target=modulates, port="modulator", delay=delays[1], **term))

    below = "image" if i == 0 else f"{AREAS[i - 1]}.bu"
    drive_and_modulate(
        bu, td if i > 0 or not o.bio else None, (step, step) if i else (0, 0), source=below, role=UP, kernel_size=kernel[i],
        stride=STRIDES[i], bias=True, parameter=prefix + "bu_conv",
    )  # fmt: skip
    if o.lateral and i >= V1:
        connections.append(_separable(bu, bu, LATERAL, prefix + "bu_l_conv", lateral, (channels[i],) * 2, port="drive", delay=1))
    if o.topdown and i > 0:
        # Kernel, stride and padding are those of the area above; so is the order of the sweeps: down now, up at the next step.
        drive_and_modulate(
            td, bu, (step, 1), source=f"{AREAS[i + 1]}.td", role=DOWN, operator=Operator.CONV_TRANSPOSE, kernel_size=kernel[i + 1],
            stride=STRIDES[i + 1], output_padding=FIT, bias=True, parameter=prefix + "td_conv",
        )  # fmt: skip
        if o.lateral and i >= V1:
            connections.append(_separable(td, td, LATERAL, prefix + "td_l_conv", lateral, (channels[i],) * 2, port="drive", delay=1))
    # As published, one sweep at a time uses no skip to V1, and going down none to V4.
    if o.skip and i == V4:
        skip = ("V1.bu", UP, prefix + "skip_bu", SKIP_KERNELS[o.image_size][0], (channels[V1], channels[V4]))
        for target, port in ((bu, "drive"), (td, "modulator")):
            if port == "drive" or o.bio:
                connections.append(_separable(skip[0], target, *skip[1:], port=port, delay=step))
    if o.skip and i == V1 and o.bio:
        skip = ("V4.td", DOWN, prefix + "skip_td", SKIP_KERNELS[o.image_size][1], (channels[V4], channels[V1]))
        for target, port in ((td, "drive"), (bu, "modulator")):
            connections.append(_separable(skip[0], target, *skip[1:], port=port, delay=1))
    return connections


def blt_vs_network(o: Options) -> Network:
    """The spec."""
    width, last = o.num_classes + o.add_feats, len(AREAS) - 1
    up = [_stream(name, "bu", c) for name, c in zip(AREAS, CHANNELS, strict=False)]
    # (Nothing makes a top-down map of the retina in the biological unrolling.)
    down = [_stream(AREAS[i], "td", CHANNELS[i]) for i in range(last - 1, 0 if o.bio else -1, -1)]
    connections = [c for i in range(last) for c in _area(i, o)]
    plain: dict[str, Any] = {"norm": Norm.NONE, "activation": Activation.IDENTITY}
    top_down = Area(
        "Readout.td", width, norm=Norm.GROUP, activation=Activation.IDENTITY, norm_parameter="connections.Readout.layer_norm_td",
        drive_activation=Activation.RELU,
    )  # fmt: skip
    readout = [Area("Readout.map", width, **plain), top_down, Area("Readout.logits", width, **plain)]
    connections += [
        Connection("LOC.bu", "Readout.map", UP, kernel_size=KERNELS[o.image_size][last], stride=STRIDES[last], bias=True,
                   parameter="connections.Readout.readout_conv", delay=0),
        Connection("Readout.map", "Readout.td", UP, Operator.IDENTITY, delay=0),
        Connection("Readout.map", "Readout.logits", UP, Operator.IDENTITY, pool=Pool.MEAN, delay=0),
    ]  # fmt: skip
    areas = [*up, *down, *readout] if o.bio else [*up, *readout, *down]
    return Network(
        "blt_vs", (Input("image", 3, o.image_size, o.image_size),), tuple(areas), tuple(connections),
        Unroll.BIOLOGICAL if o.bio else Unroll.ENGINEERING,
        Readout("Readout.logits", o.num_classes, parameter=None, clamp=None),
    )  # fmt: skip


def _modules(o: Options, network: Network) -> nn.ModuleDict:
    """Parameters under their published names and in their order, used or not."""
    used = {prefix: m for c in network.connections for prefix, m in connection_layers(network, c).items()}
    # The skip to V1 has parameters in both unrollings.
    whole = blt_vs_network(Options(**{**o.__dict__, "bio": True})) if o.skip and not o.bio else network
    used |= {p: m for c in whole.connections if "skip_td" in str(c.parameter) for p, m in connection_layers(whole, c).items()}
    order = ["bu_conv", "bu_l_conv", "td_conv", "td_l_conv", "skip_bu", "skip_td", "readout_conv"]
    modules = nn.ModuleDict()
    for i, name in enumerate(AREAS):
        channels = CHANNELS[i] if i < len(CHANNELS) else o.num_classes + o.add_feats
        area = nn.Module()
        for part in order:
            for suffix in ("", "_depthwise", "_pointwise"):
                module = used.get(f"connections.{name}.{part}{suffix}")
                if module is not None:
                    area.add_module(part + suffix, module)
        for stream in ("td",) if name == "Readout" else ("bu", "td"):
            area.add_module(f"layer_norm_{stream}", nn.GroupNorm(1, channels))
        modules[name] = area
    return modules


class BLTVS(RecurrentNetwork):
    """The two-stream network with its published options and parameter names; see :func:`blt_vs`."""

    readout_weights: nn.Parameter

    def __init__(self, options: dict[str, Any]) -> None:
        _check(options)
        o = Options(
            options["num_classes"], options["add_feats"], bool(options["lateral_connections"]), bool(options["topdown_connections"]),
            bool(options["skip_connections"]), bool(options["bio_unroll"]), options["image_size"],
        )  # fmt: skip
        network = blt_vs_network(o)
        super().__init__(
            network, options["timesteps"], backend=options["backend"], engine=options["engine"],
            modules={"connections": _modules(o, network)},
        )  # fmt: skip
        self.readout_type, self.hook_type = options["readout_type"], options["hook_type"]
        self.num_classes, self.add_feats, self.image_size, self.bio_unroll = o.num_classes, o.add_feats, o.image_size, o.bio
        first = self.schedule().first_step["Readout.logits"]
        if self.readout_type == "single":
            self.readout_weights = nn.Parameter(torch.ones(self.timesteps - first))
        if self.hook_type != "None":
            streams = ("_BU", "_TD") if self.hook_type == "separate" else ("",)
            for name in AREAS if self.hook_type == "separate" else AREAS[:-1]:
                for t in range(self.timesteps):
                    for stream in streams:
                        self.add_module(f"{name}_{t}{stream}", nn.Identity())
        self.config = {"model": "blt_vs", **options}

    def forward(  # type: ignore[override]
        self,
        img: Tensor,  # [N, 3, S, S], in [-1, 1]
        extract_actvs: bool = False,
        areas: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        bu: bool = True,
        td: bool = True,
        concat: bool = False,
    ) -> Any:
        """Logits of every step that has some, a list of [N, num_classes]; with ``readout_type="single"`` a list of their weighted mean.

        With ``extract_actvs`` also ``activations[area][t]``: a dict of the maps "bu" and "td" asked for, or with ``concat`` both along
        channels. A map that does not exist is zeros.

        Raises: ``ValueError`` for an unknown area or time step, which lists those there are.
        """
        for name in ("num_classes", "add_feats", "image_size", "bio_unroll", "readout_type", "hook_type"):
            if getattr(self, name) != self._as_built[0][name]:
                raise TypeError(f"{name}: expected {self._as_built[0][name]!r}, as the network was built, got {getattr(self, name)!r}")
        wanted, steps = self._wanted(areas, timesteps) if extract_actvs else ((), ())
        hooked = AREAS if self.hook_type != "None" else ()
        nodes = [f"{name}.{stream}" for name in AREAS if name in wanted or name in hooked for stream in ("bu", "td")]
        known = [area.name for area in self.network.areas]
        record = self._with_states(("Readout.logits", *(node for node in nodes if node in known)))
        schedule = self.schedule(record)
        maps = dict(zip(record, self.states((img,), record), strict=True))
        readouts = list(self.logits(maps["Readout.logits"].flatten(2)))

        def at(node: str, t: int) -> Tensor | None:
            node = "Readout.logits" if node == "Readout.bu" else node
            if node not in maps or t < schedule.first_step[node]:
                return None
            value = maps[node][t - schedule.first_step[node]]
            return value.flatten(1)[:, : self.num_classes] if node == "Readout.logits" else value

        self._feed_hooks(at, len(img))
        if not extract_actvs:
            return readouts
        activations: dict[str, dict[int, Any]] = {name: {} for name in wanted}
        for name in wanted:
            for t in steps:
                pair = self._pair(name, at(f"{name}.bu", t), at(f"{name}.td", t), img)
                if not concat:
                    activations[name][t] = {key: pair[key] for key, on in (("bu", bu), ("td", td)) if on}
                elif name != "Readout":
                    activations[name][t] = torch.cat([pair["bu"], pair["td"]], 1)
        return readouts, activations

    def logits(
        self,
        representations: Tensor,  # [T, N, D]
    ) -> Tensor:
        """Of every step, or with ``readout_type="single"`` their weighted mean: [T, N, classes] or [1, N, classes]."""
        logits = super().logits(representations)
        if self.readout_type == "multi":
            return logits
        return (torch.softmax(self.readout_weights, 0)[:, None, None] * logits).sum(0, keepdim=True)

    def _with_states(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some areas that get a state within the time steps."""
        reached = []
        for name in dict.fromkeys(names):
            try:
                self.schedule((name,))
                reached.append(name)
            except ValueError:
                if name == "Readout.logits":
                    raise
        return tuple(reached)

    def _wanted(self, areas: Sequence[str] | None, timesteps: Sequence[int] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
        if areas is None or timesteps is None:
            raise ValueError(f"{'areas' if areas is None else 'timesteps'}: name those to extract; areas are {list(AREAS)}")
        for name in areas:
            if name not in AREAS:
                raise ValueError(f"areas: unknown area {name!r}; there are {list(AREAS)}")
        for t in timesteps:
            if not 0 <= t < self.timesteps:
                raise ValueError(f"timesteps: expected some of 0 .. {self.timesteps - 1}, got {t}")
        return tuple(areas), tuple(timesteps)

    def _pair(self, name: str, bu: Tensor | None, td: Tensor | None, img: Tensor) -> dict[str, Tensor]:
        """Both maps of an area; zeros for a missing one, shaped like the other stream's map (or, of both, like the area's)."""
        shape = self.network.shapes[f"{name}.td" if name == "Readout" else f"{name}.bu"]
        blank = img.new_zeros((len(img), *shape))
        if bu is None:
            bu = blank if td is None or name == "Readout" else torch.zeros_like(td)
        return {"bu": bu, "td": blank if td is None else td}

    def _feed_hooks(self, at: Any, samples: int) -> None:
        if self.hook_type == "None":
            return
        for name in AREAS if self.hook_type == "separate" else AREAS[:-1]:
            for t in range(self.timesteps):
                bu, td = at(f"{name}.bu", t), at(f"{name}.td", t)
                if self.hook_type == "separate":
                    self.get_submodule(f"{name}_{t}_BU")(bu)
                    self.get_submodule(f"{name}_{t}_TD")(td)
                else:
                    there = bu if bu is not None else td
                    blank = None if there is None else torch.zeros_like(there)
                    both = [blank if x is None else x for x in (bu, td)]
                    self.get_submodule(f"{name}_{t}")(None if there is None else torch.cat(both, 1))  # type: ignore[arg-type]


def _check(options: dict[str, Any]) -> None:
    if options["image_size"] not in KERNELS:
        raise ValueError(f"image_size: expected one of {sorted(KERNELS)}, got {options['image_size']!r}")
    for name, allowed in (("readout_type", ("multi", "single")), ("hook_type", ("None", "separate", "concat"))):
        check_choice(name, options[name], allowed)
    for name, least in (("num_classes", 1), ("add_feats", 0)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def blt_vs(
    timesteps: int = 12,
    num_classes: int = 565,
    add_feats: int = 100,
    lateral_connections: bool = True,
    topdown_connections: bool = True,
    skip_connections: bool = True,
    bio_unroll: bool = True,
    image_size: int = 224,
    hook_type: str = "None",
    readout_type: str = "multi",
    *,
    backend: str | None = None,
    engine: str = "auto",
) -> BLTVS:
    """The published two-stream network.

    Args:
        timesteps: T; the biological unrolling has its first output at t = 4 (without skips: 6).
        num_classes, add_feats: channels of the readout that are classes, and further ones that only feed back.
        lateral_connections, topdown_connections, skip_connections: switches.
        bio_unroll: every connection takes one step; else each step sweeps up and then down.
        image_size: 224 or 128.
        hook_type: "separate" or "concat" makes identity modules for forward hooks ("<area>_<t>_BU", ...; they are fed None where a map
            does not exist).
        readout_type: "multi": logits of every step; "single": their mean with learned weights.
        backend, engine: see :func:`rnndyn_fast.rollout`.

    Returns: a module; ``net(img)`` with img [N, 3, S, S] in [-1, 1] gives a list of logits [N, num_classes].

    Raises: ``ValueError`` naming the option, what was expected, what came.

    Source: KietzmannLab/BLT-VS (2024).

    >>> sum(p.numel() for p in blt_vs(image_size=128).parameters())
    13682251
    """
    return BLTVS(dict(locals()))
