"""The kinds of instructions that are linear maps: convolutions by our engines, by a GPU's fused convolution and by the vendor, grouped and
separable ones, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.amx_conv import AmxMap, PackedAmxWeight, amx_conv, amx_weight_grad, pack_amx_weight
from rnndyn_fast.ops.device_kernels import kernels_of
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.fused_conv import ConvTerm
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradMap, pack_weight, winograd_conv, winograd_weight_grad
from rnndyn_fast.program.kind_table import Call, kind, launch_kind

Packed = PackedWeight | PackedAmxWeight


@kind("weight", "outs", launch=True)
def pack(weight: Tensor, outs: Sequence[Tensor], map: WinogradMap | AmxMap, backward: bool) -> None:
    """A weight as our engines take it, for the convolution or for the gradient of its data."""
    pack_one = pack_weight if isinstance(map, WinogradMap) else pack_amx_weight
    pack_one(map, weight, backward=backward, outs=outs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackedView:
    """How packed tensors are read: :class:`PackedWeight` or :class:`PackedAmxWeight` without the tensors."""

    map: WinogradMap | AmxMap
    backward: bool
    detail: Any  # by_taps, or strides

    def of(self, data: Sequence[Tensor]) -> Packed:
        """With the tensors."""
        if isinstance(self.map, WinogradMap):
            return PackedWeight(self.map, self.backward, tuple(data), self.detail)
        return PackedAmxWeight(self.map, self.backward, tuple(data), self.detail)


@kind("xs packed out drives modulators drive_bias modulator_bias", "out modulator_sum mean rstd", launch=True)
def conv(
    xs: Sequence[Tensor],  # each [M, H, W, C_in]
    packed: Sequence[Sequence[Tensor]],
    out: Tensor,  # [M, H', W', C_out]
    forms: Sequence[PackedView],
    accumulate: bool = False,
    ends: bool = False,
    drives: Sequence[Tensor] = (),  # each [M, H', W', C_out]; with ``ends``
    modulators: Sequence[Tensor] = (),
    modulates: bool = False,
    drive_bias: Tensor | None = None,
    modulator_bias: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """The sum of linear maps, or of gradients of their data, by our engines: written into ``out``, or added to it. ``ends``: with an
    epilogue."""
    weights = [form.of(data) for form, data in zip(forms, packed, strict=True)]
    epilogue = None
    if ends:
        epilogue = Epilogue(drives, modulators, modulates, drive_bias, modulator_bias, modulator_sum, mean, rstd, eps)
    if isinstance(weights[0], PackedWeight):
        winograd_conv(xs, weights, out, epilogue, accumulate=accumulate)  # type: ignore[arg-type]
        return
    for k, (x, w) in enumerate(zip(xs, weights, strict=True)):
        assert isinstance(w, PackedAmxWeight)
        amx_conv(x, w, out, accumulate=accumulate or k > 0, epilogue=epilogue if k == len(xs) - 1 else None)


@kind("x grad out", "out", launch=True)
def conv_weight_grad(
    x: Tensor,  # [M, H, W, C_in]
    grad: Tensor,  # [M, H', W', C_out]
    out: Tensor,  # as the parameter
    map: WinogradMap | AmxMap,
    accumulate: bool,
) -> None:
    """The gradient of a weight by our engines, written into ``out``, or added to it."""
    if isinstance(map, AmxMap):
        amx_weight_grad(map, x, grad, out, accumulate=accumulate)
    else:
        winograd_weight_grad(map, x, grad, out, accumulate=accumulate)


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _is_product(geometry: Geometry, weight: Tensor) -> bool:
    """Whether a map is one matrix product over pixels: then nothing is allocated, and no layout made. (On GPUs convolutions and products
    are not of the same precision.)"""
    if geometry.operator is Operator.LINEAR:
        return True
    pointwise = geometry == Geometry(Operator.CONV) and weight.shape[2:] == (1, 1)
    return pointwise and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def _matrix(weight: Tensor) -> Tensor:
    """A weight [C', C, 1, 1] or [C', C] as a matrix; single pixels have any strides."""
    return weight.as_strided(weight.shape[:2], weight.stride()[:2]) if weight.dim() == 4 else weight


def direct(geometry: Geometry, weight: Tensor, x: Tensor, out: Tensor) -> Call:
    """A linear map by the vendor: out [M, H', W', C'] from x [M, H, W, C]."""
    if _is_product(geometry, weight):
        rows, turned, to = x.reshape(-1, weight.shape[1]), _matrix(weight).t(), out.view(-1, weight.shape[0])
        return lambda: torch.mm(rows, turned, out=to)
    maps, to = x.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2)
    transposed, extra = geometry.operator is Operator.CONV_TRANSPOSE, [geometry.output_padding] * 2
    strides, padding = [geometry.stride] * 2, [geometry.padding] * 2
    # (PyTorch's own variant with a result given would allocate one too, and take longer to be found.)
    return lambda: to.copy_(torch.convolution(maps, weight, None, strides, padding, [1, 1], transposed, extra, 1))


_DIRECT_BYTES = 8 << 20  # of results that PyTorch allocates at a time, before they are copied to where they are wanted


@kind("x weight", "out", prepared=True)
def direct_conv(x: Tensor, weight: Tensor, out: Tensor, geometry: Geometry) -> Call:
    """A linear map by the vendor, some samples at a time on the CPU: what it allocates lies outside of the arena."""
    if out.nbytes <= _DIRECT_BYTES or x.device.type != "cpu":
        return direct(geometry, weight, x, out)
    some = max(1, _DIRECT_BYTES // out[0].nbytes)
    calls = [direct(geometry, weight, x[first : first + some], out[first : first + some]) for first in range(0, len(x), some)]
    return partial(_each, calls)


@kind("x grad weight grad_x grad_weight", "grad_x grad_weight", prepared=True)
def direct_conv_backward(
    x: Tensor | None,  # [M, H, W, C]; None: no gradient of the weight
    grad: Tensor,  # [M, H', W', C']
    weight: Tensor | None,  # None: no gradient of x
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    geometry: Geometry,
    shape: tuple[int, ...],  # of x
    add_x: bool = False,
    add_weight: bool = False,
) -> Call:
    """The gradients of :func:`direct_conv`, written or added to what is there."""
    like = weight if weight is not None else grad_weight
    assert like is not None
    if _is_product(geometry, like):
        return _products_backward(x, grad, weight, grad_x, grad_weight, add_x=add_x, add_weight=add_weight)
    seen = (grad.new_empty(1).expand(shape) if x is None else x).permute(0, 3, 1, 2)
    if weight is None:  # (of which only the shape counts)
        weight = torch.empty_like(like, memory_format=torch.channels_last)
    maps, kernel = grad.permute(0, 3, 1, 2), weight
    strides, padding, extra = [geometry.stride] * 2, [geometry.padding] * 2, [geometry.output_padding] * 2
    transposed, wanted = geometry.operator is Operator.CONV_TRANSPOSE, [grad_x is not None, grad_weight is not None, False]
    to_x = None if grad_x is None else grad_x.permute(0, 3, 1, 2)

    def call() -> None:
        found = torch.ops.aten.convolution_backward(maps, seen, kernel, None, strides, padding, [1, 1], transposed, extra, 1, wanted)
        for out, one, more in zip((to_x, grad_weight), found, (add_x, add_weight), strict=False):
            if out is not None:
                out.add_(one) if more else out.copy_(one)

    return call


def _products_backward(
    x: Tensor | None, grad: Tensor, weight: Tensor | None, grad_x: Tensor | None, grad_weight: Tensor | None, *,
    add_x: bool, add_weight: bool,
) -> Call:  # fmt: skip
    calls: list[Call] = []
    rows = grad.reshape(-1, grad.shape[3])
    if grad_x is not None and weight is not None:
        to, matrix = grad_x.view(-1, weight.shape[1]), _matrix(weight)
        calls.append(partial(torch.addmm, to, rows, matrix, out=to) if add_x else partial(torch.mm, rows, matrix, out=to))
    if grad_weight is not None and x is not None:
        to, seen = _matrix(grad_weight), x.reshape(-1, grad_weight.shape[1])
        calls.append(partial(torch.addmm, to, rows.t(), seen, out=to) if add_weight else partial(torch.mm, rows.t(), seen, out=to))
    return calls[0] if len(calls) == 1 else partial(_each, calls)


@kind("xs weights bias added factor", "out value modulator_sum moments", launch=True)
def fused_conv(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],  # [C_out, K, K, C_in] each
    out: Tensor,
    settings: Sequence[tuple[int, int, bool]],  # stride, padding, transposed of each
    bias: Tensor | None = None,
    added: Sequence[Tensor] = (),
    factor: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    moments: Tensor | None = None,
    engine: str = "fused",
) -> None:
    """A GPU's fused convolution: the sum of several maps, and what is there already."""
    terms = [ConvTerm(x, w, *s) for x, w, s in zip(xs, weights, settings, strict=True)]
    kernels_of(engine).recurrent_conv(terms, bias, list(added), factor, out, modulator_sum, moments)


@kind("rows gathered", "out", launch=True)
def fused_weight_grad(rows: Tensor, gathered: Tensor, out: Tensor, stride: int, padding: int, engine: str = "fused") -> None:
    """The gradient of a weight by a GPU's fused convolution: [first, K, K, second], float32."""
    kernels_of(engine).recurrent_conv_weight_grad(rows, gathered, out, stride, padding)


# ---------------------------------------------------------------- grouped convolutions


launch_kind("depthwise_conv", launches.depthwise_conv)
launch_kind("depthwise_weight_grad", launches.depthwise_weight_grad, renamed={"grad_weight": "out"})
launch_kind("separable_conv", launches.separable_conv)


@kind("weight", "out", prepared=True)
def depthwise_turned(weight: Tensor, out: Tensor, groups: int) -> Call:
    """The kernel of the gradient of a depthwise convolution's data: turned, channels exchanged within groups."""
    kh, kw, inputs, channels = weight.shape
    to = out.view(kh, kw, channels // groups, groups, inputs)

    def call() -> None:
        to.copy_(weight.flip(0, 1).view(kh, kw, inputs, groups, channels // groups).permute(0, 1, 4, 3, 2))

    return call


@kind("weight", "out", prepared=True)
def pack_pointwise(weight: Tensor, out: Tensor) -> Call:
    """[C', C, 1, 1] as [C, C' rounded up to a multiple of 32], zero beyond C'."""
    turned, to, rest = weight.flatten(1).t(), out[:, : weight.shape[0]], out[:, weight.shape[0] :]

    def call() -> None:
        rest.zero_()
        to.copy_(turned)

    return call


@kind("x weight bias", "out", prepared=True)
def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, stride: int, padding: Sequence[int], groups: int) -> Call:
    """Groups of many channels, by the vendor."""
    maps, to, strides, around = x.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2), [stride] * 2, list(padding)
    return lambda: to.copy_(torch.convolution(maps, weight, bias, strides, around, [1, 1], False, [0, 0], groups))


@kind("x grad weight", "grad_x grad_weight", prepared=True)
def grouped_conv_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    stride: int,
    padding: Sequence[int],
    groups: int,
) -> Call:
    """The gradients of :func:`grouped_conv`."""
    maps, seen = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    options = [stride] * 2, list(padding), [1, 1], False, [0, 0], groups, [grad_x is not None, grad_weight is not None, False]
    to_x = None if grad_x is None else grad_x.permute(0, 3, 1, 2)

    def call() -> None:
        found_x, found_weight, _ = torch.ops.aten.convolution_backward(maps, seen, weight, None, *options)
        if to_x is not None:
            to_x.copy_(found_x)
        if grad_weight is not None:
            grad_weight.copy_(found_weight)

    return call
