"""How connections' linear maps are computed: as a convolution by an engine, by our kernel of grouped convolutions, or by the vendor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rnndyn_fast.graph.spec.network import Connection, Network, Operator
from rnndyn_fast.ops import core
from rnndyn_fast.ops.amx_conv import AmxMap
from rnndyn_fast.ops.cuda_engine import choose_device_engine
from rnndyn_fast.ops.depthwise_conv import MAX_GROUP, MAX_KERNEL
from rnndyn_fast.ops.engines import ASKED_FOR, EngineChoice, Geometry, choose_engine

Chooser = Callable[[Geometry, tuple[int, ...], int, int], EngineChoice]  # of a weight's shape and a map's height and width


def chooser(engine: str, samples: int, reads: int, dtype: torch.dtype, device: torch.device | None) -> Chooser:
    """The engine on a CUDA device, or without one on the CPU."""
    if device is not None:
        return lambda geometry, shape, height, width: choose_device_engine(geometry, shape, height, width, dtype, engine, samples, device)
    return lambda geometry, shape, height, width: choose_engine(geometry, shape, height, width, dtype, engine, samples, reads)


@dataclass(frozen=True)
class DenseForm:
    """How a connection's map is one convolution or product. ``channels``, ``total``, ``border``: see :class:`DenseMap`."""

    geometry: Geometry
    choice: EngineChoice
    channels: tuple[int, int] | None
    border: tuple[int, int, int, int] | None


def dense_form(network: Network, c: Connection, choose: Chooser) -> DenseForm | None:
    window = network.window(c)
    height, width = network.read_size(c)
    shape, channels = network.weight_shape(c), None
    if c.concat is not None:
        channels = (c.concat[0], c.concat[0] + network.shapes[c.source][0])
        shape = (shape[0], channels[1] - channels[0], *shape[2:])
    if len(set(window.kernel)) > 1 or len(set(window.output_padding)) > 1:
        return None
    border, geometry = None, Geometry(c.operator, c.stride, window.before[0], window.output_padding[0])
    if len({*window.before, *window.after}) > 1:
        if c.operator is not Operator.CONV:
            return None
        geometry = Geometry(c.operator, c.stride, window.before[0], window.after[0] - window.before[0])
        uneven = window.before[0] == window.before[1] and window.after[0] == window.after[1]
        if not uneven or choose(geometry, shape, height, width).map is None:
            border, geometry = (window.before[1], window.after[1], window.before[0], window.after[0]), Geometry(c.operator, c.stride)
            height, width = height + window.before[0] + window.after[0], width + window.before[1] + window.after[1]
    if c.operator is Operator.LINEAR:
        geometry = Geometry(c.operator)
    return DenseForm(geometry, choose(geometry, shape, height, width), channels, border)


def is_dense(c: Connection) -> bool:
    return c.operator is not Operator.CONV or (c.groups == 1 and c.middle_channels is None)


def has_own_kernel(network: Network, c: Connection, on_device: bool) -> bool:
    """Whether the groups of a connection are few channels, which our own kernel takes."""
    outputs, inputs, *kernel = network.weight_shape(c)
    most = 1 if on_device else MAX_GROUP
    return max(inputs, outputs // c.groups) <= most and max(kernel) <= MAX_KERNEL


_FEW_CHANNELS = 128  # of a separable convolution, up to which one kernel of vector units is faster than two of which one has matrix units


def is_one_kernel(network: Network, c: Connection, choice: EngineChoice, dtype: torch.dtype, *, on_device: bool) -> bool:
    """Whether both maps of a separable convolution are one kernel: in float32, and where no engine or lower precision is asked for."""
    free = choice.reason != ASKED_FOR and (choice.map is None or (isinstance(choice.map, AmxMap) and choice.map.parts == 3))
    few = max(network.weight_shape(c)[0], network.term_shape(c)[0]) <= _FEW_CHANNELS
    here = dtype == torch.float32 and not on_device and core.unavailable is None
    return free and few and here and has_own_kernel(network, c, on_device)


def engines(network: Network, c: Connection, choose: Chooser, dtype: torch.dtype, *, on_device: bool) -> list[tuple[str, str]]:
    """The engine of each linear map of a connection (not the identity), and why.

    Args:
        choose: the engine of a convolution, for the device, dtype and batch that are meant.
        dtype: of the maps.
    """
    if is_dense(c):
        form = dense_form(network, c, choose)
        return [("torch", "kernel or padding without symmetry")] if form is None else [(str(form.choice), form.choice.reason)]
    own = has_own_kernel(network, c, on_device)
    found = [("depthwise_conv", "groups of few channels") if own else ("torch", "groups of many channels")]
    if c.middle_channels is not None:
        choice = choose(Geometry(Operator.CONV), network.weight_shapes(c)[c.weights[1]], *network.term_shape(c)[1:])
        if is_one_kernel(network, c, choice, dtype, on_device=on_device):
            return [("separable_conv", "groups of few channels and a 1 x 1 convolution of few channels")]
        found.append((str(choice), choice.reason))
    return found
