"""The kinds of instructions: for each the operands that it reads and writes, and the function that runs it on tensors.

A *launch* calls the native core and nothing else, so that on the CPU its arguments are worked out once and the call is repeated
(:mod:`rnndyn_fast.program.bind`). Others are PyTorch's. Maps are channels-last, [N, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops import _launch, _launch_cuda, _launch_steps
from rnndyn_fast.ops._launch_cuda import ConvTerm
from rnndyn_fast.ops.amx_conv import AmxMap, PackedAmxWeight, amx_conv, amx_weight_grad, pack_amx_weight
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.norm_step import NormRule, norm_scalars
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradMap, pack_weight, winograd_conv, winograd_weight_grad

Packed = PackedWeight | PackedAmxWeight


@dataclass(frozen=True)
class Kind:
    """One row of the table. An operand that is both read and written is in both lists."""

    run: Callable[..., None]
    reads: frozenset[str]
    writes: frozenset[str]
    launch: bool


KINDS: dict[str, Kind] = {}


def kind(reads: str, writes: str, *, launch: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a function under its name; operands are its keyword arguments."""

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        KINDS[function.__name__] = Kind(function, frozenset(reads.split()), frozenset(writes.split()), launch)
        return function

    return enter


# ---------------------------------------------------------------- layout


@kind("x", "out", launch=True)
def channels_last(x: Tensor, out: Tensor) -> None:
    """x [N, C, H, W] contiguous, out [N, H, W, C]."""
    _launch_steps.channels_last(x, out)


@kind("x", "out")
def copy(x: Tensor, out: Tensor) -> None:
    """Any layouts and dtypes."""
    out.copy_(x)


@kind("", "out")
def fill(out: Tensor, value: float) -> None:
    """out = value."""
    out.fill_(value)


@kind("parts", "out")
def cat(parts: Sequence[Tensor], out: Tensor) -> None:
    """One after another, along the first dimension."""
    torch.cat(list(parts), out=out)


@kind("x", "out")
def pad(x: Tensor, out: Tensor, border: tuple[int, int, int, int]) -> None:
    """Zeros around maps: left, right, top, bottom."""
    torch.ops.aten.constant_pad_nd.out(x, [0, 0, *border], 0.0, out=out)


@kind("x", "out")
def resize(x: Tensor, out: Tensor) -> None:
    """Bilinear, corners aligned; x and out [N, H, W, C]."""
    torch.ops.aten.upsample_bilinear2d.out(x.permute(0, 3, 1, 2), list(out.shape[1:3]), True, out=out.permute(0, 3, 1, 2))


@kind("grad", "out")
def resize_backward(grad: Tensor, out: Tensor) -> None:
    """The gradient of :func:`resize`."""
    n, h, w, c = out.shape
    found = torch.ops.aten.upsample_bilinear2d_backward(grad.permute(0, 3, 1, 2), list(grad.shape[1:3]), [n, c, h, w], True)
    out.copy_(found.permute(0, 2, 3, 1))


# ---------------------------------------------------------------- sums


@kind("a b", "out")
def add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a + b; out may be a."""
    torch.add(a, b, out=out)


@kind("terms", "out")
def total(terms: Sequence[Tensor], out: Tensor) -> None:
    """The sum of several tensors."""
    torch.sum(torch.stack(list(terms)), 0, out=out)


@kind("grad", "out")
def channel_sums(grad: Tensor, out: Tensor) -> None:
    """grad [N, H, W, C] summed over samples and pixels, [C]."""
    torch.sum(grad.flatten(0, 2), 0, dtype=out.dtype, out=out)


# ---------------------------------------------------------------- convolutions


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


def direct(geometry: Geometry, weight: Tensor, x: Tensor, out: Tensor) -> None:
    """A linear map by the vendor: out [M, H', W', C'] from x [M, H, W, C]."""
    if geometry.operator is Operator.LINEAR:
        torch.mm(x.flatten(1), weight.t(), out=out.flatten(1))
        return
    transposed, extra = geometry.operator is Operator.CONV_TRANSPOSE, [geometry.output_padding] * 2
    maps, strides, padding = x.permute(0, 3, 1, 2), [geometry.stride] * 2, [geometry.padding] * 2
    torch.ops.aten.convolution.out(
        maps, weight, None, strides, padding, [1, 1], transposed, extra, 1, out=out.permute(0, 3, 1, 2)
    )  # fmt: skip


_DIRECT_BYTES = 8 << 20  # of results that PyTorch allocates at a time, before they are copied to where they are wanted


@kind("x weight", "out")
def direct_conv(x: Tensor, weight: Tensor, out: Tensor, geometry: Geometry) -> None:
    """A linear map by the vendor, some samples at a time on the CPU: what it allocates lies outside of the arena."""
    if out.nbytes <= _DIRECT_BYTES or x.device.type != "cpu":
        direct(geometry, weight, x, out)
        return
    some = max(1, _DIRECT_BYTES // out[0].nbytes)
    for first in range(0, len(x), some):
        direct(geometry, weight, x[first : first + some], out[first : first + some])


@kind("x grad weight grad_x grad_weight", "grad_x grad_weight")
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
) -> None:
    """The gradients of :func:`direct_conv`, written or added to what is there."""

    def put(found: Tensor | None, out: Tensor | None, more: bool) -> None:
        if out is not None and found is not None:
            out.add_(found.reshape(out.shape)) if more else out.copy_(found.reshape(out.shape))

    if geometry.operator is Operator.LINEAR:
        flat = grad.flatten(1)
        put(torch.mm(flat, weight).reshape(shape) if weight is not None else None, grad_x, add_x)
        put(torch.mm(flat.t(), x.flatten(1)) if x is not None and grad_weight is not None else None, grad_weight, add_weight)
        return
    seen = grad.new_empty(1).expand(shape) if x is None else x
    if weight is None:  # (of which only the shape counts)
        assert grad_weight is not None
        weight = torch.empty_like(grad_weight, memory_format=torch.channels_last)
    found_x, found_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), seen.permute(0, 3, 1, 2), weight, None, [geometry.stride] * 2, [geometry.padding] * 2, [1, 1],
        geometry.operator is Operator.CONV_TRANSPOSE, [geometry.output_padding] * 2, 1,
        [grad_x is not None, grad_weight is not None, False],
    )  # fmt: skip
    put(found_x.permute(0, 2, 3, 1) if grad_x is not None else None, grad_x, add_x)
    put(found_weight if grad_weight is not None else None, grad_weight, add_weight)


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
) -> None:
    """A GPU's fused convolution: the sum of several maps, and what is there already."""
    terms = [ConvTerm(x, w, *s) for x, w, s in zip(xs, weights, settings, strict=True)]
    _launch_cuda.recurrent_conv(terms, bias, list(added), factor, out, modulator_sum, moments)


@kind("rows gathered", "out", launch=True)
def fused_weight_grad(rows: Tensor, gathered: Tensor, out: Tensor, stride: int, padding: int) -> None:
    """The gradient of a weight by a GPU's fused convolution: [first, K, K, second], float32."""
    _launch_cuda.recurrent_conv_weight_grad(rows, gathered, out, stride, padding)


# ---------------------------------------------------------------- grouped convolutions


@kind("x weight bias", "out", launch=True)
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, step: int, dilation: int, before: tuple[int, int]) -> None:
    """Groups of few channels; weight [KH, KW, I, C']."""
    _launch_steps.depthwise_conv(x, weight, bias, out, step, dilation, before)


@kind("weight", "out")
def depthwise_turned(weight: Tensor, out: Tensor, groups: int) -> None:
    """The kernel of the gradient of a depthwise convolution's data: turned, channels exchanged within groups."""
    kh, kw, inputs, channels = weight.shape
    back = weight.flip(0, 1).view(kh, kw, inputs, groups, channels // groups).permute(0, 1, 4, 3, 2)
    out.copy_(back.reshape(out.shape))


@kind("x grad", "out", launch=True)
def depthwise_weight_grad(x: Tensor, grad: Tensor, out: Tensor, step: int, before: tuple[int, int]) -> None:
    """[KH, KW, I, C']."""
    _launch_steps.depthwise_weight_grad(x, grad, out, step, before)


@kind("x weight bias pointwise", "out", launch=True)
def separable_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, pointwise: Tensor, out: Tensor, step: int, before: tuple[int, int]
) -> None:
    """A grouped convolution and a 1 x 1 one."""
    _launch_steps.separable_conv(x, weight, bias, pointwise, out, step, before)


@kind("weight", "out")
def pack_pointwise(weight: Tensor, out: Tensor) -> None:
    """[C', C, 1, 1] as [C, C' rounded up to a multiple of 32], zero beyond C'."""
    out.zero_()
    out[:, : weight.shape[0]].copy_(weight.flatten(1).t())


@kind("x weight bias", "out")
def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, stride: int, padding: Sequence[int], groups: int) -> None:
    """Groups of many channels, by the vendor."""
    out.copy_(functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, 1, groups).permute(0, 2, 3, 1))


@kind("x grad weight", "grad_x grad_weight")
def grouped_conv_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    stride: int,
    padding: Sequence[int],
    groups: int,
) -> None:
    """The gradients of :func:`grouped_conv`."""
    found_x, found_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, list(padding), [1, 1], False, [0, 0], groups,
        [grad_x is not None, grad_weight is not None, False],
    )  # fmt: skip
    if grad_x is not None:
        grad_x.copy_(found_x.permute(0, 2, 3, 1))
    if grad_weight is not None:
        grad_weight.copy_(found_weight)


# ---------------------------------------------------------------- areas

_STEP_READS = "drives modulators drive_bias modulator_bias gamma beta"


@kind(f"{_STEP_READS} value mean rstd", "value modulator_sum state max_pooled argmax mean_pooled mean rstd", launch=True)
def area_step(
    drives: Sequence[Tensor],
    modulators: Sequence[Tensor] = (),
    drive_bias: Tensor | None = None,
    modulator_bias: Tensor | None = None,
    modulator_complete: bool = False,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    rectify: bool = False,
    complete: bool = False,
    value: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    state: Tensor | None = None,
    max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    mean_pooled: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch.area_step_forward`."""
    _launch.area_step_forward(
        drives, modulators, drive_bias, modulator_bias, modulator_complete, gamma, beta, eps, rectify, complete,
        value, modulator_sum, state, max_pooled, argmax, mean_pooled, mean, rstd,
    )  # fmt: skip


@kind("value gamma beta moments", "value state max_pooled argmax mean_pooled mean rstd", launch=True)
def finish_area_step(
    value: Tensor,
    moments: Tensor,
    groups: tuple[int, int],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    rectify: bool,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor | None = None,
    max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    mean_pooled: Tensor | None = None,
) -> None:
    """On devices: norm, activation and pooling of a value whose moments the fused convolution left."""
    forms = (state, max_pooled, argmax, mean_pooled, mean, rstd)
    _launch_cuda.area_step_forward([], [], None, None, False, gamma, beta, eps, rectify, value, None, *forms, moments, groups)


@kind(
    "grad_states grad_max_pooled argmax grad_mean_pooled value drives drive_bias modulator_sum mean rstd gamma beta grad_drive_sum "
    "grad_gamma grad_beta",
    "grad_drive grad_drive_sum grad_modulator grad_gamma grad_beta partial",
    launch=True,
)
def area_step_backward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    grad_states: Sequence[Tensor] = (),
    grad_max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    grad_mean_pooled: Tensor | None = None,
    multiplicative: bool = False,
    value: Tensor | None = None,
    drives: Sequence[Tensor] = (),
    drive_bias: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    rectify: bool = False,
    grad_drive: Tensor | None = None,
    grad_drive_sum: Tensor | None = None,
    grad_modulator: Tensor | None = None,
    grad_gamma: Tensor | None = None,
    grad_beta: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch.area_step_backward`."""
    _launch.area_step_backward(
        shape, dtype, grad_states, grad_max_pooled, argmax, grad_mean_pooled, multiplicative, value, drives, drive_bias, modulator_sum,
        mean, rstd, gamma, beta, rectify, grad_drive, grad_drive_sum, grad_modulator, grad_gamma, grad_beta, partial,
    )  # fmt: skip


GateScalars = tuple[int, float, list[float], list[float], int]


@kind("ports biases", "sums states", launch=True)
def gate_step(
    scalars: GateScalars,
    ports: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    sums: Sequence[Tensor | None],
    states: Sequence[Tensor],
) -> None:
    """As :func:`rnndyn_fast.ops._launch.gate_step`."""
    _launch.gate_step(scalars, ports, biases, sums, states, [], backward=False)


@kind("ports grads more", "grad_ports grad_biases workspace", launch=True)
def gate_step_backward(
    scalars: GateScalars,
    ports: Sequence[Tensor],
    grads: Sequence[Tensor],
    more: Sequence[Tensor | None],
    grad_ports: Sequence[Tensor],
    grad_biases: Sequence[Tensor | None],
    workspace: Tensor | None,
) -> None:
    """The gradients of a cell's ports, from the sums of the ports and the gradients of its states."""
    _launch.gate_step(scalars, [[p] for p in ports], [], [], grads, grad_ports, more, grad_biases, backward=True, workspace=workspace)


@kind(
    "drives modulators drive_bias modulator_bias gamma beta mean rstd",
    "drive_sum modulator_sum state mean rstd variance workspace",
    launch=True,
)
def norm_step(
    rule: NormRule,
    squash: bool,
    drives: Sequence[Tensor],
    modulators: Sequence[Tensor],
    drive_bias: Tensor | None,
    modulator_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    drive_sum: Tensor | None,
    modulator_sum: Tensor | None,
    state: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    variance: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.norm_step_forward`."""
    _launch_steps.norm_step_forward(
        norm_scalars(rule, squash), drives, modulators, drive_bias, modulator_bias, gamma, beta, drive_sum, modulator_sum, state, mean,
        rstd, variance, workspace,
    )  # fmt: skip


@kind(
    "grad_state drive modulator gamma beta mean rstd",
    "grad_drive grad_modulator grad_gamma grad_beta grad_drive_bias grad_modulator_bias workspace",
    launch=True,
)
def norm_step_backward(
    rule: NormRule,
    squash: bool,
    grad_state: Tensor,
    drive: Tensor | None,
    modulator: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    grad_drive: Tensor | None,
    grad_modulator: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    grad_drive_bias: Tensor | None,
    grad_modulator_bias: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.norm_step_backward`."""
    _launch_steps.norm_step_backward(
        norm_scalars(rule, squash), grad_state, drive, modulator, gamma, beta, mean, rstd, grad_drive, grad_modulator, grad_gamma,
        grad_beta, grad_drive_bias, grad_modulator_bias, workspace,
    )  # fmt: skip


@kind("variance", "rstd")
def reciprocal_deviation(variance: Tensor, rstd: Tensor, eps: float) -> None:
    """rstd = 1 / sqrt(variance + eps)."""
    torch.add(variance, eps, out=rstd).rsqrt_()


@kind("x", "out")
def scale(x: Tensor, out: Tensor, factor: float) -> None:
    """out = x * factor."""
    torch.mul(x, factor, out=out)


@kind("grad more state", "grad_drive grad_bias workspace", launch=True)
def activation_backward(
    activation: int,
    grad: Tensor,
    more: Tensor | None,
    state: Tensor,
    grad_drive: Tensor,
    grad_bias: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.activation_backward`."""
    _launch_steps.activation_backward(activation, grad, more, state, grad_drive, grad_bias, workspace)


# (On devices: the gradient of the argument from that of the value, and the value.)
_SLOPES: dict[int, Callable[[Tensor, Tensor, Tensor], Any]] = {
    1: lambda grad, y, out: torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
    2: lambda grad, y, out: torch.ops.aten.elu_backward.grad_input(grad, 1, 1, 1, True, y, grad_input=out),
    3: lambda grad, y, out: torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out),
}


@kind("grad state", "grad_drive")
def activation_slope(activation: int, grad: Tensor, state: Tensor, grad_drive: Tensor) -> None:
    """:func:`activation_backward` on devices, by PyTorch."""
    _SLOPES[activation](grad, state, grad_drive)


# ---------------------------------------------------------------- what no kernel computes

Function = Callable[[list[Tensor], Mapping[str, Tensor]], Sequence[Tensor]]


def _exactly(function: Function, xs: Sequence[Tensor], parameters: Mapping[str, Tensor], inner: torch.dtype) -> list[Tensor]:
    return list(function([x.to(inner) for x in xs], {name: p.to(inner) for name, p in parameters.items()}))


@kind("xs parameters", "outs")
def by_torch(
    function: Function, xs: Sequence[Tensor], parameters: Mapping[str, Tensor], outs: Sequence[Tensor], inner: torch.dtype
) -> None:
    """A function of maps and parameters in PyTorch's operations, computed in the dtype ``inner``."""
    with torch.no_grad():
        for out, y in zip(outs, _exactly(function, xs, parameters, inner), strict=True):
            out.copy_(y.reshape(out.shape))


@kind("xs parameters grads", "grad_xs grad_parameters")
def by_torch_backward(
    function: Function,
    xs: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    grads: Sequence[Tensor | None],
    grad_xs: Sequence[Tensor | None],
    grad_parameters: Mapping[str, Tensor],
    inner: torch.dtype,
) -> None:
    """The gradients of :func:`by_torch`, which is computed again for them."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_(True) if x.is_inference() else x.detach().requires_grad_(True) for x in xs]
        own = {name: p.detach().requires_grad_(name in grad_parameters) for name, p in parameters.items()}
        ys = _exactly(function, leaves, own, inner)
        pairs = [(y, g.to(y.dtype).reshape(y.shape)) for y, g in zip(ys, grads, strict=False) if g is not None and y.requires_grad]
        # (Of all maps: the gradient of PyTorch's group norm crashes where that of its argument is not asked for, channels last.)
        every = [*leaves, *(own[name] for name in grad_parameters)]
        found: Sequence[Tensor | None] = [None] * len(every)
        if pairs:
            found = torch.autograd.grad([y for y, _ in pairs], every, [g for _, g in pairs], allow_unused=True)
    for out, grad in zip((*grad_xs, *grad_parameters.values()), found, strict=True):
        if out is not None:
            out.zero_() if grad is None else out.copy_(grad.reshape(out.shape))
