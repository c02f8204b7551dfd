"""The ``torch.nn`` layers that hold the parameters of a spec, by their paths."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from rnndyn_fast.graph.spec.network import Area, Connection, Network, Norm, Operator


def connection_layers(network: Network, c: Connection) -> dict[str, nn.Module]:
    """The ``torch.nn`` modules that hold a connection's parameters, by name."""
    modules: dict[str, nn.Module] = {}
    for name, shape in network.weight_shapes(c).items():
        prefix = name.removesuffix(".weight")
        bias = f"{prefix}.bias" in c.biases
        if c.operator is Operator.LINEAR:
            modules[prefix] = nn.Linear(shape[1], shape[0], bias=bias)
        elif c.operator is Operator.CONV_TRANSPOSE:
            window = network.window(c)
            modules[prefix] = nn.ConvTranspose2d(
                shape[0], shape[1], window.kernel, c.stride, window.before, window.output_padding, bias=bias
            )
        else:
            # (Only its parameters are used; a padding that torch has no word for is left out.)
            first = name == c.weights[0]
            groups, window = c.groups if first else 1, network.window(c)
            padding = window.before if first and window.before == window.after else 0
            kernel = window.kernel if first else (1, 1)
            modules[prefix] = nn.Conv2d(shape[1] * groups, shape[0], kernel, c.stride if first else 1, padding, groups=groups, bias=bias)
    return modules


def norm_layer(network: Network, area: Area) -> nn.Module:
    """An area's norm, of one time step."""
    if area.norm is Norm.GROUP:
        return nn.GroupNorm(area.norm_groups, area.channels, area.eps)
    if area.norm is Norm.BATCH:
        return nn.BatchNorm2d(area.channels, area.eps)
    return nn.LayerNorm(network.norm_shape(area), eps=area.eps)


def cell_layers(network: Network, area: Area) -> Iterable[tuple[str, nn.Module | nn.Parameter]]:
    """A cell's own parameters: norms as modules, others (a decay, peepholes) as they are, zero at first."""
    assert area.cell is not None
    for name, shape in area.cell.parameter_shapes(*network.shapes[area.name]).items():
        prefix, _, kind = f"{area.cell_parameter}.{name}".rpartition(".")
        if kind == "weight":
            yield prefix, nn.GroupNorm(shape[0] // area.channels, shape[0], area.cell.eps)  # type: ignore[attr-defined]
        elif kind != "bias":
            yield f"{prefix}.{kind}", nn.Parameter(torch.zeros(shape))


def leaf_layers(network: Network) -> Iterable[tuple[str, nn.Module | nn.Parameter]]:
    """All layers and single parameters of a network, each once."""
    placed: set[str] = set()
    for area in network.areas:
        leaves: list[tuple[str, nn.Module | nn.Parameter]] = []
        for c in network.connections:
            if c.target == area.name and not placed.issuperset(w.removesuffix(".weight") for w in c.weights):
                leaves += connection_layers(network, _with_bias(network, c)).items()
        leaves += [(prefix, norm_layer(network, area)) for prefix in network.norm_prefixes(area)]
        leaves += cell_layers(network, area) if area.cell is not None else ()
        for prefix, module in leaves:
            if prefix not in placed:
                placed.add(prefix)
                yield prefix, module
    if network.readout is not None and network.readout.parameter is not None:
        channels = network.shapes[network.readout.source][0]
        yield network.readout.parameter, nn.Linear(channels, network.readout.num_classes, bias=network.readout.bias)


def _with_bias(network: Network, c: Connection) -> Connection:
    """A connection, or one that shares its parameters and uses the bias too."""
    return next((other for other in network.connections if other.weights == c.weights and other.bias), c)
