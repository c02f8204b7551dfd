"""Connections' linear maps for the tape: a convolution by our engines, depthwise or grouped convolutions, and two in a row.

A map takes and gives maps [M, H, W, C], without the bias of its result. ``backward`` is one call for any number of samples and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph.spec import Connection, Network, Operator
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.amx_conv import AmxMap
from rnndyn_fast.ops.buffers import empty, sums_dtype
from rnndyn_fast.ops.convolution import Weight, convolve, convolve_backward
from rnndyn_fast.ops.depthwise_conv import (
    MAX_GROUP,
    MAX_KERNEL,
    depthwise_conv,
    depthwise_data_grad,
    depthwise_weight_grad,
    pack_depthwise,
    pack_pointwise,
    separable_conv,
    unpack_depthwise,
)
from rnndyn_fast.ops.device_engine import choose_device_engine
from rnndyn_fast.ops.engines import ASKED_FOR, EngineChoice, Geometry, choose_engine

Grads = list[tuple[str, Tensor]]  # of parameters, by name; those of one name add up
Sums = Callable[[str], Tensor | None]  # of a parameter's gradients so far, by name, where more may be added in place


def no_sums(_: str) -> Tensor | None:
    """Nothing is there yet."""
    return None


class LinearMap(Protocol):
    """A linear map of maps. ``postponed``: its weight's gradient is best taken once, over all steps."""

    postponed: bool

    @property
    def dense(self) -> Weight | None:
        """The weight that is packed, if any is."""

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The map's value, in ``out`` if that is given."""

    def backward(
        self, x: Tensor, grad: Tensor, *, need_x: bool, need_weight: bool, into: Tensor | None = None, sums: Sums = no_sums
    ) -> tuple[Tensor | None, Grads]:
        """Gradients of x and of the weights. ``into``: the map may be added to it, and is then returned as it; ``sums`` likewise."""


@dataclass
class DenseMap:
    """A convolution, transposed convolution or matrix product. ``border``: zeros added around the map before a convolution
    without padding (where an odd total of padding puts the larger half after the map)."""

    weight: Weight
    name: str
    channels: tuple[int, int] | None = None  # of the parameter's input channels, those that it uses
    total: int = 0
    border: tuple[int, int, int, int] | None = None  # left, right, top, bottom
    postponed = True

    @property
    def dense(self) -> Weight:
        return self.weight

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return convolve(self.weight, self.bordered(x), out)

    def bordered(self, x: Tensor) -> Tensor:
        """The map with its zeros, where the engines do not add them."""
        return x if self.border is None else functional.pad(x, (0, 0, *self.border))

    def backward(
        self, x: Tensor, grad: Tensor, *, need_x: bool, need_weight: bool, into: Tensor | None = None, sums: Sums = no_sums
    ) -> tuple[Tensor | None, Grads]:
        _, height, width, _ = x.shape
        if self.border is not None:
            x = self.bordered(x)
        into = into if self.border is None else None
        weight_into = sums(self.name) if need_weight and self.channels is None else None
        if weight_into is not None and (weight_into.dtype != grad.dtype or weight_into.shape != self.weight.weight.shape):
            weight_into = None
        grad_x, grad_weight = convolve_backward(
            self.weight, grad, x, need_x=need_x, need_weight=need_weight, into=into, weight_into=weight_into
        )
        if grad_x is not None and self.border is not None:
            left, _, top, _ = self.border
            grad_x = grad_x[:, top : top + height, left : left + width].contiguous()
        if grad_weight is None:
            return grad_x, []
        if self.channels is not None:
            first, last = self.channels
            whole = grad_weight.new_zeros((grad_weight.shape[0], self.total, *grad_weight.shape[2:]))
            whole[:, first:last] = grad_weight
            grad_weight = whole
        return grad_x, [(self.name, grad_weight)]


@dataclass
class DepthwiseMap:
    """Groups of one channel or few, by our own kernel."""

    packed: Tensor  # [KH, KW, I, C']
    name: str
    stride: int
    before: tuple[int, int]
    size: tuple[int, int]
    bias: Tensor | None = None
    postponed = False
    dense = None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = depthwise_conv(x, self.packed, self.bias, self.stride, self.before, self.size)
        return y if out is None else out.copy_(y)

    def backward(
        self, x: Tensor, grad: Tensor, *, need_x: bool, need_weight: bool, into: Tensor | None = None, sums: Sums = no_sums
    ) -> tuple[Tensor | None, Grads]:
        _, h, w, c = x.shape
        grad_x = depthwise_data_grad(grad, self.packed, self.stride, self.before, (h, w, c)) if need_x else None
        if not need_weight:
            return grad_x, []
        kernel = (self.packed.shape[0], self.packed.shape[1], self.packed.shape[2])
        return grad_x, [(self.name, unpack_depthwise(depthwise_weight_grad(x, grad, kernel, self.stride, self.before)))]


@dataclass
class GroupedMap:
    """Groups of many channels, by PyTorch."""

    weight: Tensor
    name: str
    stride: int
    border: tuple[int, int, int, int]
    groups: int
    bias: Tensor | None = None
    postponed = False
    dense = None

    def _bordered(self, x: Tensor) -> tuple[Tensor, list[int]]:
        left, right, top, bottom = self.border
        if left == right and top == bottom:
            return x.permute(0, 3, 1, 2), [top, left]
        return functional.pad(x, (0, 0, *self.border)).permute(0, 3, 1, 2), [0, 0]

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        seen, padding = self._bordered(x)
        y = functional.conv2d(seen, self.weight, self.bias, self.stride, padding, 1, self.groups).permute(0, 2, 3, 1)
        return y.contiguous() if out is None else out.copy_(y)

    def backward(
        self, x: Tensor, grad: Tensor, *, need_x: bool, need_weight: bool, into: Tensor | None = None, sums: Sums = no_sums
    ) -> tuple[Tensor | None, Grads]:
        seen, padding = self._bordered(x)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), seen, self.weight, None, [self.stride] * 2, padding, [1, 1], False, [0, 0], self.groups,
            [need_x, need_weight, False],
        )  # fmt: skip
        if grad_x is not None:
            grad_x = grad_x.permute(0, 2, 3, 1)
            if padding == [0, 0]:
                left, _, top, _ = self.border
                grad_x = grad_x[:, top : top + x.shape[1], left : left + x.shape[2]]
            grad_x = grad_x.contiguous()
        return grad_x, [(self.name, grad_weight.contiguous())] if need_weight else []


@dataclass
class SeparableMap:
    """A grouped convolution and a 1 x 1 one. What lies between is computed again backward: that costs less than keeping it."""

    first: DepthwiseMap | GroupedMap
    bias: str | None  # name of the bias in between
    second: DenseMap
    pointwise: Tensor | None = None  # the second weight where one kernel computes both: see pack_pointwise
    postponed = False

    @property
    def dense(self) -> Weight:
        return self.second.weight

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.pointwise is None or not isinstance(self.first, DepthwiseMap):
            return self.second.forward(self.first.forward(x), out)
        first, channels = self.first, self.second.weight.channels
        return separable_conv(x, first.packed, first.bias, self.pointwise, channels, first.stride, first.before, first.size, out)

    def backward(
        self, x: Tensor, grad: Tensor, *, need_x: bool, need_weight: bool, into: Tensor | None = None, sums: Sums = no_sums
    ) -> tuple[Tensor | None, Grads]:
        shape = (*grad.shape[:3], self.second.weight.weight.shape[1])
        middle = self.first.forward(x) if need_weight else empty(shape, grad.dtype)  # (of which only the shape is used)
        grad_middle, grads = self.second.backward(middle, grad, need_x=True, need_weight=need_weight, sums=sums)
        assert grad_middle is not None
        if need_weight and self.bias is not None:
            grads.append((self.bias, grad_middle.flatten(0, 2).sum(0, dtype=sums_dtype(grad.dtype))))
        grad_x, own = self.first.backward(x, grad_middle, need_x=need_x, need_weight=need_weight)
        return grad_x, grads + own


Chooser = Callable[[Geometry, tuple[int, ...], int, int], EngineChoice]  # of a weight's shape and a map's height and width


def _chooser(engine: str, samples: int, reads: int, like: Tensor) -> Chooser:
    """The engine, where the parameters are."""
    if _launch.on_device(like):
        return lambda geometry, shape, height, width: choose_device_engine(
            geometry, shape, height, width, like.dtype, engine, samples, like.device
        )
    return lambda geometry, shape, height, width: choose_engine(geometry, shape, height, width, like.dtype, engine, samples, reads)


@dataclass(frozen=True)
class _Dense:
    """How a connection's map is one convolution or product. ``channels``, ``total``, ``border``: see :class:`DenseMap`."""

    geometry: Geometry
    choice: EngineChoice
    channels: tuple[int, int] | None
    border: tuple[int, int, int, int] | None


def _dense(network: Network, c: Connection, choose: Chooser) -> _Dense | None:
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
    return _Dense(geometry, choose(geometry, shape, height, width), channels, border)


def _dense_map(c: Connection, form: _Dense, parameters: Mapping[str, Tensor], keep: bool) -> DenseMap:
    name = c.weights[0]
    weight = parameters[name]
    total = weight.shape[1] if weight.dim() > 1 else 0
    if form.channels is not None:
        weight = weight[:, slice(*form.channels)].contiguous()
    keep = keep and weight is parameters[name]  # (others are made anew in every rollout)
    return DenseMap(Weight(form.geometry, weight, form.choice, keep=keep), name, form.channels, total, form.border)


def _is_dense(c: Connection) -> bool:
    return c.operator is not Operator.CONV or (c.groups == 1 and c.middle_channels is None)


def _own_groups(network: Network, c: Connection, on_device: bool) -> bool:
    """Whether the groups of a connection are few channels, which our own kernel takes."""
    outputs, inputs, *kernel = network.weight_shape(c)
    most = 1 if on_device else MAX_GROUP
    return max(inputs, outputs // c.groups) <= most and max(kernel) <= MAX_KERNEL


_FEW_CHANNELS = 128  # of a separable convolution, up to which one kernel of vector units is faster than two of which one has matrix units


def _one_kernel(network: Network, c: Connection, choice: EngineChoice, dtype: torch.dtype, *, on_device: bool) -> bool:
    """Whether both maps of a separable convolution are one kernel: in float32, and where no engine or lower precision is asked for."""
    free = choice.reason != ASKED_FOR and (choice.map is None or (isinstance(choice.map, AmxMap) and choice.map.parts == 3))
    few = max(network.weight_shape(c)[0], network.term_shape(c)[0]) <= _FEW_CHANNELS
    return free and few and dtype == torch.float32 and not on_device and _launch.unavailable is None and _own_groups(network, c, on_device)


def engines(network: Network, c: Connection, choose: Chooser, dtype: torch.dtype, *, on_device: bool) -> list[tuple[str, str]]:
    """The engine of each linear map of a connection (not the identity), and why.

    Args:
        choose: the engine of a convolution, for the device, dtype and batch that are meant.
        dtype: of the maps.
    """
    if _is_dense(c):
        form = _dense(network, c, choose)
        return [("torch", "kernel or padding without symmetry")] if form is None else [(str(form.choice), form.choice.reason)]
    own = _own_groups(network, c, on_device)
    found = [("depthwise_conv", "groups of few channels") if own else ("torch", "groups of many channels")]
    if c.middle_channels is not None:
        choice = choose(Geometry(Operator.CONV), network.weight_shapes(c)[c.weights[1]], *network.term_shape(c)[1:])
        if _one_kernel(network, c, choice, dtype, on_device=on_device):
            return [("separable_conv", "groups of few channels and a 1 x 1 convolution of few channels")]
        found.append((str(choice), choice.reason))
    return found


def linear_map(
    network: Network,
    c: Connection,
    parameters: Mapping[str, Tensor],
    engine: str,
    samples: int,
    reads: int,
    *,
    keep: bool,
) -> LinearMap | None:
    """The map of a connection (not the identity), or None where it has none of these forms.

    Args:
        engine, samples, reads: as :func:`choose_engine` takes them.
        keep: packed weights outlive the rollout.
    """
    choose = _chooser(engine, samples, reads, parameters[c.weights[0]])
    if _is_dense(c):
        form = _dense(network, c, choose)
        return None if form is None else _dense_map(c, form, parameters, keep)
    window, (_, height, width) = network.window(c), network.term_shape(c)
    weight, name = parameters[c.weights[0]], c.weights[0]
    bias = c.biases[0] if c.middle_bias else None
    value = parameters[bias] if bias is not None else None
    border = (window.before[1], window.after[1], window.before[0], window.after[0])
    first: DepthwiseMap | GroupedMap
    if _own_groups(network, c, _launch.on_device(weight)):
        first = DepthwiseMap(pack_depthwise(weight), name, c.stride, window.before, (height, width), value)
    else:
        layout = weight.contiguous(memory_format=torch.channels_last)
        first = GroupedMap(layout, name, c.stride, border, c.groups, None if value is None else value.to(weight.dtype))
    if c.middle_channels is None:
        return first
    pointwise = parameters[c.weights[1]]
    geometry = Geometry(Operator.CONV)
    choice = choose(geometry, tuple(pointwise.shape), height, width)
    together = _one_kernel(network, c, choice, pointwise.dtype, on_device=_launch.on_device(weight))
    packed = pack_pointwise(pointwise) if together else None
    return SeparableMap(first, bias, DenseMap(Weight(geometry, pointwise, choice, keep=keep), c.weights[1]), packed)
