"""The kinds of instructions: layouts, sums, and what PyTorch computes; convolutions (:mod:`rnndyn_fast.program.conv_kinds`) and areas
(:mod:`rnndyn_fast.program.area_kinds`) have files of their own.

A *launch* calls the native core and nothing else, so that on the CPU its arguments are worked out once and the call is repeated
(:mod:`rnndyn_fast.program.bind`). Others are PyTorch's. Maps are channels-last, [N, H, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.program import area_kinds, conv_kinds
from rnndyn_fast.program.kind_table import KINDS, Call, kind, launch_kind

__all__ = ["KINDS", "area_kinds", "conv_kinds", "kind"]

# ---------------------------------------------------------------- layout


launch_kind("channels_last", launches.channels_last)


@kind("x", "out", prepared=True)
def copy(x: Tensor, out: Tensor) -> Call:
    """Any layouts and dtypes."""
    return partial(out.copy_, x)


@kind("", "out", prepared=True)
def fill(out: Tensor, value: float) -> Call:
    """out = value."""
    return partial(out.fill_, value)


@kind("parts", "out", prepared=True)
def cat(parts: Sequence[Tensor], out: Tensor) -> Call:
    """One after another, along the first dimension."""
    return partial(torch.cat, list(parts), out=out)


@kind("x", "out", prepared=True)
def pad(x: Tensor, out: Tensor, border: tuple[int, int, int, int]) -> Call:
    """Zeros around maps: left, right, top, bottom."""
    left, _, top, _ = border
    inside = out.narrow(1, top, x.shape[1]).narrow(2, left, x.shape[2])

    def call() -> None:
        out.zero_()
        inside.copy_(x)

    return call


@kind("x", "out", prepared=True)
def resize(x: Tensor, out: Tensor) -> Call:
    """Bilinear, corners aligned; x and out [N, H, W, C]."""
    maps, size, to = x.permute(0, 3, 1, 2), list(out.shape[1:3]), out.permute(0, 3, 1, 2)
    return lambda: torch.ops.aten.upsample_bilinear2d.out(maps, size, True, out=to)


@kind("grad", "out", prepared=True)
def resize_backward(grad: Tensor, out: Tensor) -> Call:
    """The gradient of :func:`resize`."""
    n, h, w, c = out.shape
    maps, size, shape, to = grad.permute(0, 3, 1, 2), list(grad.shape[1:3]), [n, c, h, w], out.permute(0, 3, 1, 2)
    return lambda: to.copy_(torch.ops.aten.upsample_bilinear2d_backward(maps, size, shape, True))


# ---------------------------------------------------------------- sums


@kind("a b", "out", prepared=True)
def add(a: Tensor, b: Tensor, out: Tensor) -> Call:
    """out = a + b; out may be a."""
    return partial(torch.add, a, b, out=out)


@kind("terms", "out", prepared=True)
def total(terms: Sequence[Tensor], out: Tensor) -> Call:
    """The sum of several tensors."""
    parts = list(terms)
    return lambda: torch.sum(torch.stack(parts), 0, out=out)


@kind("x", "out", prepared=True)
def sum_rows(x: Tensor, out: Tensor) -> Call:
    """The sum over the first dimension."""
    return lambda: torch.sum(x, 0, out=out)


@kind("grad", "out", prepared=True)
def channel_sums(grad: Tensor, out: Tensor) -> Call:
    """grad [N, H, W, C] summed over samples and pixels, [C]."""
    flat, dtype = grad.flatten(0, 2), out.dtype
    return lambda: torch.sum(flat, 0, dtype=dtype, out=out)


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
