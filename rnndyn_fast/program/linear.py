"""Linear maps of connections as instructions: a convolution by our engines or the vendor's, grouped convolutions, and two in a row.

A map takes and gives maps [M, H, W, C], without the bias of its result. ``backward`` is one call for any number of samples and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from rnndyn_fast.graph.linear import Chooser, dense_form, has_own_kernel, is_dense, is_one_kernel
from rnndyn_fast.graph.spec.network import Connection, Operator
from rnndyn_fast.ops.amx_conv import AmxMap, amx_packed_sizes, late_strides, reaches_all
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.ops.engines import MANY_WEIGHT_TILES, EngineChoice, Geometry, kernels_of_sum
from rnndyn_fast.ops.winograd_conv import WinogradMap, packed_bytes, packed_sizes, packs_taps
from rnndyn_fast.program.conv_kinds import PackedView
from rnndyn_fast.program.ir import Role, Shape, View

if TYPE_CHECKING:
    from rnndyn_fast.program.maps import Maps

LARGE_LAYOUT = 1 << 20  # bytes of a weight in the vendor's order, from which on each pass makes it for itself

Grads = list[tuple[str, View]]  # of parameters, by name; those of one name add up


class WeightGrads(Protocol):
    """What a backward pass has of the gradients of parameters (:class:`rnndyn_fast.program.parameter_grads.ParameterGrads`)."""

    def sum_so_far(self, name: str) -> View | None:
        """To be added to."""

    def part_so_far(self, name: str, channels: tuple[int, int]) -> View | None:
        """The same of some input channels."""

    def room(self, name: str, shape: Shape) -> View | None:
        """Where a whole gradient goes."""

    def add_part(self, name: str, channels: tuple[int, int], grad: View) -> None:
        """A summand of some input channels' gradient."""

    def row(self, names: Sequence[str], shape: Shape, dtype: torch.dtype, order: tuple[int, ...] | None = None) -> View | None:
        """Where a small summand goes; None: it is not wanted."""


@dataclass
class Into:
    """Where gradients go: those of parameters, and the sum so far of the data's, to which more may be added."""

    grads: WeightGrads
    x: View | None = None


class Linear(Protocol):
    """A linear map. ``postponed``: its weight's gradient is best taken once, over all steps."""

    postponed: bool

    @property
    def dense(self) -> Dense | None:
        """The convolution whose weight is packed, if any is."""

    def forward(self, x: View, out: View | None = None) -> View:
        """The map's value, in ``out`` if that is given."""

    def backward(self, x: View, grad: View, into: Into, *, need_x: bool, need_weight: bool) -> tuple[View | None, Grads]:
        """Gradients of x and of the weights."""


@dataclass(eq=False)
class Dense:
    """A convolution, transposed convolution or matrix product. ``border``: zeros added around the map before a convolution
    without padding (where an odd total of padding puts the larger half after the map)."""

    maps: Maps
    name: str
    geometry: Geometry
    choice: EngineChoice
    channels: tuple[int, int] | None = None  # of the parameter's input channels, those that it uses
    border: tuple[int, int, int, int] | None = None  # left, right, top, bottom
    keep: bool = False  # packed weights outlive the rollout
    postponed = True
    _views: dict[str, View | list[View] | None] = field(default_factory=dict)

    @property
    def dense(self) -> Dense:
        return self

    # ---------------------------------------------------------------- the weight

    @property
    def weight(self) -> View:
        """As the parameter, contiguous; of some of its input channels."""
        if "weight" not in self._views:
            weight = self.maps.parameter(self.name)
            if self.channels is not None:
                weight = weight.narrow(1, *self.channels)
            self._views["weight"] = self.maps.b.contiguous(weight, f"{self.name} contiguous")
        found = self._views["weight"]
        assert isinstance(found, View)
        return found

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        shape = self.maps.parameters[self.name].shape
        return shape if self.channels is None else (shape[0], self.channels[1] - self.channels[0], *shape[2:])

    def output_shape(self, shape: Shape) -> Shape:
        """Of the result for maps of that shape, [M, H, W, C]."""
        channels = self.shape[1 if self.geometry.operator is Operator.CONV_TRANSPOSE else 0]
        return shape[0], *self.geometry.output_size((shape[1], shape[2]), self.shape[2:]), channels

    @property
    def packed_bytes(self) -> int:
        """Memory of what is packed for one direction, nearly."""
        m = self.choice.map
        if isinstance(m, AmxMap):
            return 0 if m.packs_late else 2 * m.parts * _numel(self.shape)
        return 0 if m is None else packed_bytes(m, self.shape)

    def drop_packed(self, *, forward_only: bool = False) -> None:
        """Later uses pack the weight anew."""
        for kind in ("forward",) if forward_only else ("forward", "backward"):
            self._views.pop(kind, None)

    def drop_layout(self) -> None:
        """Later uses put a large weight in the vendor's order anew: a copy costs less than its memory from one pass to the other."""
        found = self._views.get("direct")
        if isinstance(found, View) and found.value.role is Role.ARENA and found.nbytes >= LARGE_LAYOUT:
            del self._views["direct"]

    def packed(self, *, backward: bool) -> tuple[list[View], PackedView]:
        """As our engines take the weight, for the convolution or for the gradient of its data."""
        m, b, key = self.choice.map, self.maps.b, "backward" if backward else "forward"
        assert m is not None
        if isinstance(m, AmxMap):
            form = PackedView(m, backward, late_strides(m, self.shape, backward=backward))
            sizes, dtype = amx_packed_sizes(m, self.shape, backward=backward), torch.int16
        else:
            form = PackedView(m, backward, packs_taps(m, self.shape[0] * self.shape[1]))
            sizes, dtype = packed_sizes(m, self.shape, backward=backward), torch.float32
        if form.detail and isinstance(m, AmxMap):
            return [self.weight], form
        if key not in self._views:
            if self.keep and not backward and self.channels is None and self.maps.parameters[self.name].is_contiguous:
                views = [
                    b.external(Role.PACKED, f"{self.name} packed", (size,), dtype, source=(self.name, m, k)) for k, size in enumerate(sizes)
                ]
            else:
                views = [b.new((size,), dtype, f"{self.name} packed") for size in sizes]
                b.emit("pack", weight=self.weight, outs=views, map=m, backward=backward)
            self._views[key] = views
        found = self._views[key]
        assert isinstance(found, list)
        return found, form

    @property
    def direct(self) -> View:
        """As the vendor takes the weight."""
        if self.geometry.operator is Operator.LINEAR:
            return self.weight
        if "direct" not in self._views:
            self._views["direct"] = self.maps.vendor_layout(self.weight, self.name)
        found = self._views["direct"]
        assert isinstance(found, View)
        return found

    def fused(self, *, columns_first: bool) -> View:
        """As the fused convolution of GPUs takes the weight: [C_out, K, K, C_in], or [C_in, K, K, C_out]."""
        key = f"fused {columns_first}"
        if key not in self._views:
            weight = self.weight if len(self.weight.shape) == 4 else self.weight.reshape(*self.weight.shape, 1, 1)
            order = (1, 2, 3, 0) if columns_first else (0, 2, 3, 1)
            self._views[key] = self.maps.b.contiguous(weight.permute(*order), f"{self.name} rearranged")
        found = self._views[key]
        assert isinstance(found, View)
        return found

    # ---------------------------------------------------------------- passes

    @property
    def transposed(self) -> bool:
        return self.geometry.operator is Operator.CONV_TRANSPOSE

    def bordered(self, x: View) -> View:
        """The map with its zeros, where the engines do not add them."""
        if self.border is None:
            return x
        left, right, top, bottom = self.border
        n, h, w, c = x.shape
        out = self.maps.b.new((n, h + top + bottom, w + left + right, c), x.dtype, f"{self.name} padded")
        self.maps.b.emit("pad", x=x, out=out, border=self.border)
        return out

    def forward(self, x: View, out: View | None = None) -> View:
        return convolve_sum([self], [self.bordered(x)], out)

    def backward(self, x: View, grad: View, into: Into, *, need_x: bool, need_weight: bool) -> tuple[View | None, Grads]:
        b, (_, height, width, _) = self.maps.b, x.shape
        if self.border is not None:
            if need_weight:
                x = self.bordered(x)
            else:
                left, right, top, bottom = self.border
                x = View(x.value, (x.shape[0], height + top + bottom, width + left + right, x.shape[3]), x.strides, x.offset)
        grad_x = self._data_grad(grad, x.shape, into.x if self.border is None else None) if need_x else None
        found = self._weight_grad(x, grad, into) if need_weight else None
        if self.choice.map is None and (need_x or need_weight):
            grad_x, found = self._vendor_grads(x, grad, into, grad_x, found, need_x=need_x, need_weight=need_weight)
        if grad_x is not None and self.border is not None:
            left, _, top, _ = self.border
            grad_x = b.contiguous(grad_x.narrow(1, top, top + height).narrow(2, left, left + width), f"{self.name} grad cropped")
        if found is None:
            return grad_x, []
        if self.channels is not None:
            into.grads.add_part(self.name, self.channels, found)
            return grad_x, []
        return grad_x, [(self.name, found)]

    def _data_grad(self, grad: View, shape: Shape, into: View | None) -> View | None:
        b = self.maps.b
        if self.choice.map is not None:
            packed, form = self.packed(backward=True)
            out = b.new(shape, grad.dtype, f"{self.name} grad of data") if into is None else into
            if into is None and not reaches_all(self.choice.map, backward=True):
                b.emit("fill", out=out, value=0.0)
            b.emit("conv", xs=[grad], packed=[packed], out=out, forms=[form], accumulate=into is not None)
            return out
        engine = self.choice.kernels("data")
        if engine is None:
            return None
        out = b.new(shape, grad.dtype, f"{self.name} grad of data")
        settings = [(self.geometry.stride, self.geometry.padding, not self.transposed)]
        weights = [self.fused(columns_first=not self.transposed)]
        b.emit("fused_conv", xs=[grad], weights=weights, out=out, settings=settings, engine=engine)
        if into is not None:
            b.emit("add", a=into, b=out, out=into)
            return into
        return out

    def _grad_room(self, into: Into, dtype: torch.dtype) -> tuple[View, bool]:
        """Where a weight's gradient goes, and whether it is added to what is there."""
        there = into.grads.sum_so_far(self.name) if self.channels is None else into.grads.part_so_far(self.name, self.channels)
        if there is not None and there.dtype == dtype:
            return there, True
        if self.channels is None:
            room = into.grads.room(self.name, self.shape)
            if room is not None and room.dtype == dtype:
                return room, False
        return self.maps.b.new(self.shape, dtype, f"{self.name} grad"), False

    def _weight_grad(self, x: View, grad: View, into: Into) -> View | None:
        b, m, own = self.maps.b, self.choice.grad_map, self.choice.map
        if own is not None:
            assert m is not None
            if isinstance(own, WinogradMap) and x.shape[0] * own.tiles(*x.shape[1:3]) >= MANY_WEIGHT_TILES:
                m = own
            out, more = self._grad_room(into, torch.float32)
            b.emit("conv_weight_grad", x=x, grad=grad, out=out, map=m, accumulate=more)
            return out
        engine = self.choice.kernels("weight")
        if engine is None:
            return None
        rows, gathered = (x, grad) if self.transposed else (grad, x)
        first, second, *kernel = self.shape
        size = kernel[0] if kernel else 1
        out = b.new((first, size, size, second), torch.float32, f"{self.name} grad rearranged")
        settings = dict(stride=self.geometry.stride, padding=self.geometry.padding, engine=engine)
        b.emit("fused_weight_grad", rows=rows, gathered=gathered, out=out, **settings)
        return b.contiguous(out.permute(0, 3, 1, 2), f"{self.name} grad").reshape(*self.shape)

    def _vendor_grads(
        self, x: View, grad: View, into: Into, grad_x: View | None, found: View | None, *, need_x: bool, need_weight: bool
    ) -> tuple[View | None, View | None]:
        """What the fused convolution does not compute."""
        b, vendor_x, vendor_weight = self.maps.b, need_x and grad_x is None, need_weight and found is None
        if not vendor_x and not vendor_weight:
            return grad_x, found
        add_x, add_weight = False, False
        if vendor_x:
            add_x = into.x is not None and self.border is None
            grad_x = into.x if add_x else b.new(x.shape, grad.dtype, f"{self.name} grad of data")
        if vendor_weight:
            found, add_weight = self._grad_room(into, grad.dtype)
        b.emit(
            "direct_conv_backward", x=x if vendor_weight else None, grad=grad, weight=self.direct if vendor_x else None,
            grad_x=grad_x if vendor_x else None, grad_weight=found if vendor_weight else None, geometry=self.geometry, shape=x.shape,
            add_x=add_x, add_weight=add_weight,
        )  # fmt: skip
        return grad_x, found


def _numel(shape: Shape) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def convolve_sum(linear: list[Dense], xs: list[View], out: View | None = None) -> View:
    """The sum of several maps, of which one call can compute the sum (:func:`rnndyn_fast.ops.engines.can_sum`)."""
    b, first = linear[0].maps.b, linear[0]
    if out is None:
        out = b.new(first.output_shape(xs[0].shape), xs[0].dtype, " + ".join(m.name for m in linear))
    if first.choice.map is not None:
        packed = [m.packed(backward=False) for m in linear]
        if not reaches_all(first.choice.map, backward=False):
            b.emit("fill", out=out, value=0.0)
        b.emit("conv", xs=list(xs), packed=[views for views, _ in packed], out=out, forms=[form for _, form in packed])
    elif first.choice.kernels("forward"):
        settings = [(m.geometry.stride, m.geometry.padding, m.transposed) for m in linear]
        weights = [m.fused(columns_first=m.transposed) for m in linear]
        b.emit("fused_conv", xs=list(xs), weights=weights, out=out, settings=settings, engine=kernels_of_sum(linear))
    else:
        b.emit("direct_conv", x=xs[0], weight=first.direct, out=out, geometry=first.geometry)
    return out


@dataclass(eq=False)
class Depthwise:
    """Groups of one channel or few, by our own kernel."""

    maps: Maps
    name: str
    stride: int
    before: tuple[int, int]
    size: tuple[int, int]
    bias: View | None = None
    postponed = False
    dense = None
    _packed: View | None = None
    _turned: View | None = None

    @property
    def packed(self) -> View:
        """[KH, KW, I, C']."""
        if self._packed is None:
            weight = self.maps.parameter(self.name)
            self._packed = self.maps.b.contiguous(weight.permute(2, 3, 1, 0), f"{self.name} rearranged")
        return self._packed

    def forward(self, x: View, out: View | None = None) -> View:
        if out is None:
            out = self.maps.b.new((x.shape[0], *self.size, self.packed.shape[3]), x.dtype, self.name)
        operands = dict(weight=self.packed, bias=self.bias, step=self.stride, dilation=1, before=self.before)
        self.maps.b.emit("depthwise_conv", x=x, out=out, **operands)
        return out

    def backward(self, x: View, grad: View, into: Into, *, need_x: bool, need_weight: bool) -> tuple[View | None, Grads]:
        b, grad_x = self.maps.b, None
        kh, kw, inputs, channels = self.packed.shape
        if need_x:
            groups = x.shape[3] // inputs
            if self._turned is None:
                self._turned = b.new((kh, kw, channels // groups, x.shape[3]), self.packed.dtype, f"{self.name} turned")
                b.emit("depthwise_turned", weight=self.packed, out=self._turned, groups=groups)
            grad_x = b.new(x.shape, grad.dtype, f"{self.name} grad of data")
            before = (kh - 1 - self.before[0], kw - 1 - self.before[1])
            b.emit("depthwise_conv", x=grad, weight=self._turned, bias=None, out=grad_x, step=1, dilation=self.stride, before=before)
        if not need_weight:
            return grad_x, []
        packed = into.grads.row([self.name], self.packed.shape, sums_dtype(x.dtype), order=(3, 2, 0, 1))
        if packed is not None:
            b.emit("depthwise_weight_grad", x=x, grad=grad, out=packed, step=self.stride, before=self.before)
        return grad_x, []


@dataclass(eq=False)
class Grouped:
    """Groups of many channels, by the vendor."""

    maps: Maps
    name: str
    stride: int
    size: tuple[int, int]
    border: tuple[int, int, int, int]
    groups: int
    bias: View | None = None
    postponed = False
    dense = None
    _layout: View | None = None

    @property
    def weight(self) -> View:
        """As the vendor takes it."""
        if self._layout is None:
            self._layout = self.maps.vendor_layout(self.maps.parameter(self.name), self.name)
        return self._layout

    def _bordered(self, x: View) -> tuple[View, list[int]]:
        left, right, top, bottom = self.border
        if left == right and top == bottom:
            return x, [top, left]
        n, h, w, c = x.shape
        out = self.maps.b.new((n, h + top + bottom, w + left + right, c), x.dtype, f"{self.name} padded")
        self.maps.b.emit("pad", x=x, out=out, border=self.border)
        return out, [0, 0]

    def forward(self, x: View, out: View | None = None) -> View:
        seen, padding = self._bordered(x)
        if out is None:
            out = self.maps.b.new((x.shape[0], *self.size, self.weight.shape[0]), x.dtype, self.name)
        operands = dict(weight=self.weight, bias=self.bias, stride=self.stride, padding=padding, groups=self.groups)
        self.maps.b.emit("grouped_conv", x=seen, out=out, **operands)
        return out

    def backward(self, x: View, grad: View, into: Into, *, need_x: bool, need_weight: bool) -> tuple[View | None, Grads]:
        b = self.maps.b
        seen, padding = self._bordered(x)
        grad_x = b.new(seen.shape, grad.dtype, f"{self.name} grad of data") if need_x else None
        found = b.new(self.weight.shape, grad.dtype, f"{self.name} grad") if need_weight else None
        b.emit(
            "grouped_conv_backward", x=seen, grad=grad, weight=self.weight, grad_x=grad_x, grad_weight=found, stride=self.stride,
            padding=padding, groups=self.groups,
        )  # fmt: skip
        if grad_x is not None and seen is not x:
            left, _, top, _ = self.border
            cropped = grad_x.narrow(1, top, top + x.shape[1]).narrow(2, left, left + x.shape[2])
            grad_x = b.contiguous(cropped, f"{self.name} grad cropped")
        return grad_x, [] if found is None else [(self.name, found)]


@dataclass(eq=False)
class Separable:
    """A grouped convolution and a 1 x 1 one. What lies between is computed again backward: that costs less than keeping it."""

    first: Depthwise | Grouped
    bias: str | None  # name of the bias in between
    second: Dense
    one_kernel: bool  # whether one kernel computes both
    postponed = False
    _pointwise: View | None = None

    @property
    def dense(self) -> Dense:
        return self.second

    def forward(self, x: View, out: View | None = None) -> View:
        if not self.one_kernel or not isinstance(self.first, Depthwise):
            return self.second.forward(self.first.forward(x), out)
        b, first, outputs, inputs = self.second.maps.b, self.first, *self.second.shape[:2]
        if self._pointwise is None:
            self._pointwise = b.new((inputs, outputs + -outputs % 32), x.dtype, f"{self.second.name} padded")
            b.emit("pack_pointwise", weight=self.second.weight, out=self._pointwise)
        if out is None:
            out = b.new((x.shape[0], *first.size, outputs), x.dtype, self.second.name)
        operands = dict(weight=first.packed, bias=first.bias, pointwise=self._pointwise, step=first.stride, before=first.before)
        b.emit("separable_conv", x=x, out=out, **operands)
        return out

    def backward(self, x: View, grad: View, into: Into, *, need_x: bool, need_weight: bool) -> tuple[View | None, Grads]:
        b, shape = self.second.maps.b, (*grad.shape[:3], self.second.shape[1])
        middle = self.first.forward(x) if need_weight else b.new(shape, grad.dtype, "only a shape")
        inner = Into(into.grads)
        grad_middle, grads = self.second.backward(middle, grad, inner, need_x=True, need_weight=need_weight)
        assert grad_middle is not None
        if need_weight and self.bias is not None:
            row = into.grads.row([self.bias], shape[3:], sums_dtype(grad.dtype))
            if row is not None:
                b.emit("channel_sums", grad=grad_middle, out=row)
        grad_x, own = self.first.backward(x, grad_middle, into, need_x=need_x, need_weight=need_weight)
        return grad_x, grads + own


def linear_map(maps: Maps, c: Connection, choose: Chooser, *, keep: bool) -> Linear | None:
    """The map of a connection (not the identity), or None where it has none of these forms.

    Args:
        choose: the engine of a convolution.
        keep: packed weights outlive the rollout.
    """
    network, dtype = maps.network, maps.dtype
    if is_dense(c):
        form = dense_form(network, c, choose)
        return None if form is None else Dense(maps, c.weights[0], form.geometry, form.choice, form.channels, form.border, keep)
    window, (_, height, width), name = network.window(c), network.term_shape(c), c.weights[0]
    bias = c.biases[0] if c.middle_bias else None
    value = None if bias is None else maps.parameter(bias)
    first: Depthwise | Grouped
    if has_own_kernel(network, c, maps.b.on_device):
        first = Depthwise(maps, name, c.stride, window.before, (height, width), value)
    else:
        border = (window.before[1], window.after[1], window.before[0], window.after[0])
        if value is not None and value.dtype != dtype:
            value = maps.b.converted(value, dtype, f"{bias} as maps are")
        first = Grouped(maps, name, c.stride, (height, width), border, c.groups, value)
    if c.middle_channels is None:
        return first
    geometry, pointwise = Geometry(Operator.CONV), maps.parameters[c.weights[1]]
    choice = choose(geometry, pointwise.shape, height, width)
    together = is_one_kernel(network, c, choice, dtype, on_device=maps.b.on_device)
    return Separable(first, bias, Dense(maps, c.weights[1], geometry, choice, keep=keep), together)
