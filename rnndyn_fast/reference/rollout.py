"""``rollout`` in plain PyTorch, one term after another, as the equations say it: the specification, and the fallback.

Nothing is scheduled here: every term is evaluated at every time step. Any float dtype, any device, differentiable any number of times,
forward and reverse mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph.schedule import is_drive_term
from rnndyn_fast.graph.spec import Activation, Connection, Network, Norm, Operator, Pool
from rnndyn_fast.reference.area_step import area_step


def term(
    connection: Connection,
    source: Tensor,  # [N, C, H, W]
    parameters: Mapping[str, Tensor],
) -> Tensor:
    """A connection's term, bias included: [N, C', H', W']."""
    x = source
    if connection.pool is Pool.MAX:
        x = functional.max_pool2d(x, 2, 2)
    elif connection.pool is Pool.MEAN:
        x = x.mean((2, 3), keepdim=True)
    if connection.operator is Operator.IDENTITY:
        return x
    weight = parameters[f"{connection.parameter}.weight"]
    bias = parameters[f"{connection.parameter}.bias"] if connection.bias else None
    if connection.operator is Operator.LINEAR:
        return functional.linear(x.flatten(1), weight, bias)[:, :, None, None]
    g = connection.geometry
    if connection.operator is Operator.CONV:
        return functional.conv2d(x, weight, bias, g.stride, g.padding)
    return functional.conv_transpose2d(x, weight, bias, g.stride, g.padding, g.output_padding)


def rollout(
    network: Network,
    timesteps: int,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],
    record: Sequence[str],
) -> list[Tensor]:
    """Run a network through time.

    Returns, for each area in ``record``, its states [T', N, C, H, W]; T' counts from the first step at which the area has one.
    """
    frames = {node.name: x for node, x in zip(network.inputs, inputs, strict=True)}
    varies = {node.name: node.frames for node in network.inputs}
    states: list[dict[str, Tensor]] = []
    for t in range(timesteps):
        states.append({name: x[t] if varies[name] else x for name, x in frames.items()})
        for area in network.areas:
            drives: list[Tensor] = []
            modulators: list[Tensor] = []
            for c in network.connections:
                if c.target != area.name:
                    continue
                when = t - network.delay(c)
                if when >= 0 and c.source in states[when]:
                    (drives if is_drive_term(network, c) else modulators).append(term(c, states[when][c.source], parameters))
            if drives:
                norm = area.norm is Norm.LAYER
                states[t][area.name] = area_step(
                    drives,
                    modulators,
                    gamma=parameters[f"{area.norm_parameter}.weight"] if norm else None,
                    beta=parameters[f"{area.norm_parameter}.bias"] if norm else None,
                    eps=area.eps,
                    rectify=area.activation is Activation.RELU,
                )
    return [torch.stack([s[name] for s in states if name in s]) for name in record]
