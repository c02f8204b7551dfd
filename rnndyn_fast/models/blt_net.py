"""The networks of the study of representation dynamics: ``blt_net_64`` and ``blt_net_128``.

Source: Thorat, Doerig & Kietzmann, "Characterising representation dynamics in recurrent neural networks for object recognition",
arXiv 2308.12435. Areas: retina, V1, V2, V4, IT, and GAP (mean over IT's map with a dense lateral term), then a linear readout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rnndyn_fast.graph.spec.network import Area, Connection, Input, Interaction, Network, Norm, Operator, Pool, Readout, Role, Unroll
from rnndyn_fast.nn.blt_conv import BLTConv
from rnndyn_fast.nn.derived_network import parse_interaction
from rnndyn_fast.nn.recurrent_network import RecurrentNetwork

WIDTHS = (32, 64, 128, 256, 512)
AREAS = ("v1", "v2", "v4", "it")


def _parse_norm(norm_type: str | None) -> Norm:
    if norm_type in (None, "None"):
        return Norm.NONE
    if norm_type == "LN":
        return Norm.LAYER
    raise ValueError(f"norm_type: expected 'LN' or 'None', got {norm_type!r}")


def blt_network(
    *,
    kernel_size: int,
    image_size: int,
    in_channels: int,
    widths: Sequence[int],
    lateral: bool,
    topdown: bool,
    recurrent_areas: bool,
    interaction: Interaction,
    norm: Norm,
    num_classes: int,
    classifier_bias: bool,
    unroll: Unroll,
    name: str,
) -> Network:
    """The spec. ``recurrent_areas`` False: only GAP keeps its lateral term (``LT_position='last'``)."""
    bias = norm is Norm.NONE
    retina_width, *area_widths = widths
    areas = [Area("retina", retina_width, norm=Norm.NONE)]
    connections = [Connection("image", "retina", Role.BOTTOM_UP, Operator.CONV, kernel_size, bias=True, parameter="retina")]
    below = "retina"
    for i, (area, width) in enumerate(zip(AREAS, area_widths, strict=True)):
        areas.append(Area(area, width, interaction, norm))
        pool = Pool.NONE if area == "v1" else Pool.MAX
        connections.append(Connection(below, area, Role.BOTTOM_UP, Operator.CONV, kernel_size, pool=pool, bias=bias))
        if area != "v1" and recurrent_areas and lateral:
            connections.append(Connection(area, area, Role.LATERAL, Operator.CONV, kernel_size, bias=bias))
        if area in ("v2", "v4") and recurrent_areas and topdown:
            connections.append(Connection(AREAS[i + 1], area, Role.TOP_DOWN, Operator.CONV_TRANSPOSE, kernel_size, 2, bias=bias))
        below = area
    areas.append(Area("gap", area_widths[-1], interaction, norm))
    connections.append(Connection("it", "gap", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN))
    if lateral:
        connections.append(Connection("gap", "gap", Role.LATERAL, Operator.LINEAR, bias=bias))
    return Network(
        name,
        (Input("image", in_channels, image_size, image_size),),
        tuple(areas),
        tuple(connections),
        unroll,
        Readout("gap", num_classes, classifier_bias),
    )


class BLTNet(RecurrentNetwork):
    """``BLT_net_64`` / ``BLT_net_128`` with the published options and parameter names; see :func:`blt_net_64`.

    V1's lateral and top-down parameters exist, as published, and are never used.
    """

    def __init__(self, model: str, kernel_size: int, options: dict[str, Any]) -> None:
        self._check(options)
        interaction = parse_interaction(options["LT_interaction"])
        norm = _parse_norm(options["norm_type"])
        if options["LT_position"] not in ("all", "last", None):
            raise ValueError(f"LT_position: expected 'all' or 'last', got {options['LT_position']!r}")
        recurrent_areas = options["LT_position"] != "last"
        lateral, topdown = bool(options["lateral_connections"]), bool(options["topdown_connections"])
        widths = options["widths"]
        network = blt_network(
            kernel_size=kernel_size,
            image_size=options["image_size"],
            in_channels=options["in_channels"],
            widths=widths,
            lateral=lateral,
            topdown=topdown,
            recurrent_areas=recurrent_areas,
            interaction=interaction,
            norm=norm,
            num_classes=options["num_classes"],
            classifier_bias=bool(options["classifier_bias"]),
            unroll=Unroll(options["unroll"]),
            name=model,
        )
        modules: dict[str, nn.Module] = {
            "retina": nn.Conv2d(options["in_channels"], widths[0], kernel_size, padding=(kernel_size - 1) // 2)
        }
        for i, area in enumerate(AREAS):
            modules[area] = BLTConv(
                widths[i],
                widths[i + 1],
                kernel_size,
                lateral and recurrent_areas,
                topdown and recurrent_areas and area != "it",
                options["LT_interaction"],
                pool_input=area != "v1",
                bias=norm is Norm.NONE,
                backend=options["backend"],
            )
            modules[f"{area}_ln"] = nn.LayerNorm(network.shapes[area]) if norm is Norm.LAYER else nn.Identity()
        modules["gap"] = nn.Module()
        if lateral:
            modules["gap"].add_module("lateral", nn.Linear(widths[-1], widths[-1], bias=norm is Norm.NONE))
        modules["gap_ln"] = nn.LayerNorm([widths[-1]]) if norm is Norm.LAYER else nn.Identity()
        modules["readout"] = nn.Linear(widths[-1], options["num_classes"], bias=bool(options["classifier_bias"]))
        super().__init__(network, options["timesteps"], backend=options["backend"], engine=options["engine"], modules=modules)
        self.config = {"model": model, **options, "widths": list(widths)}

    @staticmethod
    def _check(options: dict[str, Any]) -> None:
        for name in ("image_size", "in_channels", "num_classes"):
            if isinstance(options[name], bool) or not isinstance(options[name], int):
                raise TypeError(f"{name}: expected an int, got {type(options[name]).__name__} {options[name]!r}")
        widths = options["widths"] = tuple(options["widths"])
        if any(isinstance(w, bool) or not isinstance(w, int) for w in widths):
            raise TypeError(f"widths: expected ints, got {list(widths)}")
        if len(widths) != 5 or min(widths) < 1:
            raise ValueError(f"widths: expected 5 positive numbers (retina, V1, V2, V4, IT), got {list(widths)}")
        if options["image_size"] < 8 or options["image_size"] % 8:
            raise ValueError(f"image_size: expected a multiple of 8, got {options['image_size']}")
        unrolls = [unroll.value for unroll in Unroll]
        if options["unroll"] not in unrolls:
            raise ValueError(f"unroll: expected one of {unrolls}, got {options['unroll']!r}")
        for name in ("in_channels", "num_classes"):
            if options[name] < 1:
                raise ValueError(f"{name}: expected at least 1, got {options[name]}")
        full = bool(options["topdown_connections"]) and options["LT_position"] != "last"
        if full and any(widths[i + 1] != 2 * widths[i] for i in (1, 2, 3)):
            raise ValueError(
                f"widths: with top-down connections each area from V1 to IT needs twice the channels of the one below, got {list(widths)}"
            )


def blt_net_64(
    lateral_connections: bool = True,
    topdown_connections: bool = True,
    LT_interaction: str | None = "additive",
    timesteps: int = 2,
    LT_position: str | None = "all",
    classifier_bias: bool = True,
    norm_type: str | None = "LN",
    *,
    num_classes: int = 100,
    in_channels: int = 3,
    image_size: int = 64,
    widths: Sequence[int] = WIDTHS,
    unroll: str = "engineering",
    backend: str | None = None,
    engine: str = "auto",
) -> BLTNet:
    """The published network for 64-pixel images, 3 x 3 kernels.

    The defaults are those of the published constructor. ``rnndyn train`` has those of the published training instead: the network
    with ``topdown_connections=False, timesteps=10, classifier_bias=False``.

    Args:
        lateral_connections, topdown_connections: recurrent terms of V2, V4, IT and GAP (lateral), V2 and V4 (top-down).
        LT_interaction: "additive" (b + l + d) or "multiplicative" (b (1 + l + d)).
        timesteps: T; the published constructor's default is 2, its training uses 10.
        LT_position: "all", or "last": only GAP keeps its lateral term.
        classifier_bias: whether the readout has a bias.
        norm_type: "LN", or "None": no norm, and biases in all convolutions.
        num_classes, in_channels, image_size, widths: for other data and smaller networks; ``widths`` are the channels of retina, V1,
        V2, V4,
            IT (with top-down connections each from V1 on twice the one before).
        unroll: "engineering" (as published) or "biological" (one time step per connection).
        backend, engine: see :func:`rnndyn_fast.rollout`.

    Returns: a module; ``net(x)`` with x [N, in_channels, S, S] gives log-probabilities [T, N, num_classes].

    Raises: ``ValueError`` naming the option, what was expected, what came.

    Source: arXiv 2308.12435.

    >>> import torch
    >>> net = blt_net_64(timesteps=4, widths=(2, 4, 8, 16, 32))
    >>> net(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([4, 1, 100])
    """
    return BLTNet("blt_net_64", 3, dict(locals()))


def blt_net_128(
    lateral_connections: bool = True,
    topdown_connections: bool = True,
    LT_interaction: str | None = "additive",
    timesteps: int = 2,
    LT_position: str | None = "all",
    classifier_bias: bool = True,
    norm_type: str | None = "LN",
    *,
    num_classes: int = 100,
    in_channels: int = 3,
    image_size: int = 128,
    widths: Sequence[int] = WIDTHS,
    unroll: str = "engineering",
    backend: str | None = None,
    engine: str = "auto",
) -> BLTNet:
    """The published network for 128-pixel images, 5 x 5 kernels; arguments as for :func:`blt_net_64`.

    >>> blt_net_128(widths=(2, 4, 8, 16, 32)).network.shapes["it"]
    (32, 16, 16)
    """
    return BLTNet("blt_net_128", 5, dict(locals()))
