"""Which words of a spec the native engine knows: where it meets another one, the reference runs the network."""

from __future__ import annotations

from functools import lru_cache

from rnndyn_fast.graph.areas import ABSENT
from rnndyn_fast.graph.spec import Activation, Area, Connection, Interaction, Network, Norm, Operator, Pool


def _area(area: Area) -> str | None:
    if area.cell is not None:
        return f"the cell {area.cell.kind}"
    if area.interaction is Interaction.SQUASHED:
        return "a squashed modulator"
    if area.norm in (Norm.GROUP, Norm.BATCH):
        return f"a {area.norm.value} norm"
    for activation in (area.activation, area.drive_activation):
        if activation not in (Activation.IDENTITY, Activation.RELU):
            return f"the activation {activation.value if activation else None}"
    if area.drive_activation is not Activation.IDENTITY:
        return "an activation of the drive"
    return None if area.initial == ABSENT else "an initial state"


def _connection(c: Connection) -> str | None:
    if c.pool is Pool.MAX_SAME:
        return "a maximum over an odd map's edge"
    if isinstance(c.padding, str) or isinstance(c.output_padding, str):
        return f"padding {c.padding!r}" if isinstance(c.padding, str) else f"output padding {c.output_padding!r}"
    if c.groups > 1 or c.middle_channels is not None:
        return "a grouped or separable convolution"
    if c.cut_kernel or c.resize or c.concat is not None:
        return "a cut kernel" if c.cut_kernel else "a resized map" if c.resize else "a concatenated source"
    return None


@lru_cache(maxsize=256)
def unknown_to_native(network: Network) -> str | None:
    """The first word of a spec that the native engine does not know, in words; None if it knows them all."""
    for area in network.areas:
        if reason := _area(area):
            return f"area {area.name!r} has {reason}, which the native engine does not compute yet"
    for c in network.connections:
        if (c.operator is not Operator.IDENTITY or c.pool is Pool.MAX_SAME or c.resize) and (reason := _connection(c)):
            return f"connection {c.label} has {reason}, which the native engine does not compute yet"
    for node in network.inputs:
        if node.off_at is not None:
            return f"input {node.name!r} is taken away at time step {node.off_at}, which the native engine does not compute yet"
    return None
