"""``rollout`` in plain PyTorch, one term after another, as the equations say it: the specification, and the fallback.

Nothing is scheduled here: every term is evaluated at every time step. Any float dtype, any device, differentiable any number of times,
forward and reverse mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph.spec.network import ABSENT, ZERO, Area, Connection, Interaction, Network, Norm, Operator, Pool
from rnndyn_fast.reference.area_step import area_value
from rnndyn_fast.reference.cells import ACTIVATIONS, cell_step

Statistics = dict[str, tuple[Tensor, Tensor]]
Maps = dict[str | None, Tensor]  # of an area by state; None is its output


def pooled(x: Tensor, pool: Pool) -> Tensor:
    """A map [N, C, H, W] after pooling."""
    if pool in (Pool.MAX, Pool.MAX_SAME):
        return functional.max_pool2d(x, 2, 2, ceil_mode=pool is Pool.MAX_SAME)
    return x.mean((2, 3), keepdim=True) if pool is Pool.MEAN else x


def term(
    network: Network,
    connection: Connection,
    source: Tensor,  # [N, C, H, W]
    parameters: Mapping[str, Tensor],
) -> Tensor:
    """A connection's term, bias included: [N, C', H', W']."""
    c, x = connection, pooled(source, connection.pool)
    if c.resize and tuple(x.shape[2:]) != network.read_size(c):
        x = functional.interpolate(x, network.read_size(c), mode="bilinear", align_corners=True)
    if c.operator is Operator.IDENTITY:
        return x
    weight = parameters[c.weights[0]]
    bias = parameters[c.biases[0]] if c.biases and c.middle_channels is None else None
    if c.operator is Operator.LINEAR:
        return functional.linear(x.flatten(1), weight, bias)[:, :, None, None]
    window = network.window(c)
    if c.operator is Operator.CONV_TRANSPOSE:
        return functional.conv_transpose2d(x, weight, bias, c.stride, window.before, window.output_padding)
    (top, left), (bottom, right) = window.before, window.after
    x = functional.pad(x, (left, right, top, bottom))
    if c.concat is not None:
        weight = weight[:, c.concat[0] : c.concat[0] + x.shape[1]]
    if c.middle_channels is None:
        return functional.conv2d(x, weight, bias, c.stride, groups=c.groups)
    middle = functional.conv2d(x, weight, parameters[c.biases[0]] if c.middle_bias else None, c.stride, groups=c.groups)
    return functional.conv2d(middle, parameters[c.weights[1]], parameters[c.biases[-1]] if c.bias else None)


def _normed(area: Area, value: Tensor, t: int, parameters: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    if area.norm is Norm.NONE:
        return value
    prefix = f"{area.norm_parameter}.{t}" if area.norm is Norm.BATCH else area.norm_parameter
    gamma, beta = parameters[f"{prefix}.weight"], parameters[f"{prefix}.bias"]
    if area.norm is Norm.LAYER:
        shape = value.shape[1:]
        return functional.layer_norm(value, shape, gamma.reshape(shape), beta.reshape(shape), area.eps)
    if area.norm is Norm.GROUP:
        return torch.group_norm(value, area.norm_groups, gamma, beta, area.eps)
    if statistics is None or area.norm_frozen:
        mean, var = parameters[f"{prefix}.running_mean"], parameters[f"{prefix}.running_var"]
        return functional.batch_norm(value, mean, var, gamma, beta, False, 0.0, area.eps)
    with torch.no_grad():
        var, mean = torch.var_mean(value, (0, 2, 3), correction=min(1, value[:, 0].numel() - 1))
        statistics[f"{prefix}"] = (mean, var)
    return functional.batch_norm(value, None, None, gamma, beta, True, 0.0, area.eps)


def update_area(
    network: Network,
    area: Area,
    t: int,
    terms: Sequence[tuple[Connection, Tensor]],
    parameters: Mapping[str, Tensor],
    statistics: Statistics | None,
    constant: tuple[int, ...] | None = None,
) -> Maps | None:
    """The maps of an area at one time step by name, the output also as None; None if it has none yet.

    ``constant``: the shape [N, C, H, W] of the drive that is zero where no term is given (a squashed modulator of a missing drive, whose
    value has no effect).
    """
    ports: dict[str, list[Tensor]] = {name: [] for name in area.ports}
    for c, value in terms:
        ports[network.port(c)].append(value)
    first = next(iter(ports))
    if area.cell is not None:
        if not ports[first]:
            return None
        sums = {name: torch.stack(values).sum(0) if len(values) > 1 else values[0] for name, values in ports.items() if values}
        prefix = f"{area.cell_parameter}."
        own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        states: Maps = dict(zip(area.states, cell_step(area.cell, sums, own), strict=True))
        return {**states, None: states[area.states[0]]}
    squash = area.interaction is Interaction.SQUASHED
    drives, modulators = ports["drive"], ports.get("modulator", [])
    if not drives and squash and constant is not None and not modulators:
        modulators = [next(iter(parameters.values())).new_zeros(constant)]
    if not drives and not (squash and modulators):
        return None
    if drives:
        drives = [ACTIVATIONS[area.drive_activation](torch.stack(drives).sum(0) if len(drives) > 1 else drives[0])]
    value = area_value(drives, modulators, squash=squash)
    assert area.activation is not None
    return {None: ACTIVATIONS[area.activation](_normed(area, value, t, parameters, statistics))}


def rollout(
    network: Network,
    timesteps: int,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],  # and buffers, where there are any
    record: Sequence[str],
    statistics: Statistics | None = None,
) -> list[Tensor]:
    """Run a network through time.

    Args:
        statistics: None: batch norms use the running statistics; a dict: those of the batch, mean and unbiased variance of which
            it receives by ``<prefix>.<t>``.

    Returns, for each area in ``record``, its states [T', N, C, H, W]; T' counts from the first step at which the area has one.
    """
    given = {node.name: x for node, x in zip(network.inputs, inputs, strict=True)}
    nodes = {node.name: node for node in network.inputs}
    samples = next(x.shape[1] if nodes[name].frames else x.shape[0] for name, x in given.items())
    maps: list[dict[str, Maps]] = []

    def shown(name: str, t: int) -> Tensor:
        node, x = nodes[name], given[name]
        if node.off_at is not None and t >= node.off_at:
            return torch.full_like(x, node.off_value)
        return x[t] if node.frames else x

    def read(c: Connection, t: int) -> Tensor | None:
        if not c.is_there(t):
            return None
        when = t - network.delay(c)
        if when >= 0 and c.source in maps[when]:
            return maps[when][c.source][c.state]
        if c.source in nodes:
            return None
        initial = network.area(c.source).initial_of(c.state)
        if initial == ZERO:
            return inputs[0].new_zeros((samples, *network.shapes[c.source]))
        return None if initial == ABSENT else given[initial]

    for t in range(timesteps):
        maps.append({name: {None: shown(name, t)} for name in given})
        for area in network.areas:
            incoming = [(c, read(c, t)) for c in network.connections if c.target == area.name]
            terms = [(c, term(network, c, x, parameters)) for c, x in incoming if x is not None]
            updated = update_area(network, area, t, terms, parameters, statistics)
            if updated is not None:
                maps[t][area.name] = updated
    recorded = [network.recorded(name) for name in record]
    return [torch.stack([m[area][state] for m in maps if area in m]) for area, state in recorded]
