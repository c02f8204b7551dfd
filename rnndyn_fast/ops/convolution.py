"""Linear maps of a rollout, by the engine that is chosen for each (:mod:`rnndyn_fast.ops.engines`).

On the CPU ``amx`` (matrix units, :mod:`rnndyn_fast.ops.amx_conv`) and ``winograd`` (:mod:`rnndyn_fast.ops.winograd_conv`), on CUDA devices
``fused`` (tensor cores, :mod:`rnndyn_fast.ops.fused_conv`), and on both ``direct`` (the vendor's convolution and matrix product, through
torch). Maps are channels-last and contiguous, [M, H, W, C], with M any number of samples and time steps.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.amx_conv import (
    AmxMap,
    PackedAmxWeight,
    amx_conv,
    amx_weight_grad,
    pack_amx_weight,
    reaches_all,
)
from rnndyn_fast.ops.buffers import empty, release_buffers
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.fused_conv import FusedWeight, fused_sum
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradMap, pack_weight, packed_bytes, winograd_conv, winograd_weight_grad

MAX_SUMMED = 8  # kMaxConvTerms of winograd_conv.h and cuda/recurrent_conv.h; the core checks it


class Weight:
    """A connection's weight, prepared once per rollout for the engine that computes it."""

    def __init__(self, geometry: Geometry, weight: Tensor, choice: EngineChoice, *, keep: bool = False) -> None:
        self.geometry = geometry
        self.weight = weight
        self.choice = choice
        self.keep = keep  # packed weights outlive the rollout (inference: they are the same next time)

    @cached_property
    def direct(self) -> Tensor:
        """As the vendor's kernels take it."""
        if self.geometry.operator is Operator.LINEAR:
            return self.weight.contiguous()
        return self.weight.contiguous(memory_format=torch.channels_last)

    @cached_property
    def fused(self) -> FusedWeight:
        """As the fused convolution takes it."""
        transposed = self.geometry.operator is Operator.CONV_TRANSPOSE
        weight = self.weight[:, :, None, None] if self.geometry.operator is Operator.LINEAR else self.weight
        return FusedWeight(weight, self.geometry.stride, self.geometry.padding, transposed)

    @cached_property
    def packed(self) -> Packed:
        """As our engines take it, for the forward convolution."""
        assert self.choice.map is not None
        late = isinstance(self.choice.map, AmxMap) and self.choice.map.packs_late
        return (kept_pack if self.keep and not late else _pack)(self.choice.map, self.weight)

    @cached_property
    def packed_backward(self) -> Packed:
        """As our engines take it, for the gradient of the data."""
        assert self.choice.map is not None
        return _pack(self.choice.map, self.weight, backward=True)

    @property
    def packed_bytes(self) -> int:
        """Memory of what is packed for one direction, nearly (channels in whole panels take a little more)."""
        m = self.choice.map
        if isinstance(m, AmxMap):
            return 0 if m.packs_late else 2 * m.parts * self.weight.numel()
        return 0 if m is None else packed_bytes(m, self.weight.shape)

    def drop_packed(self) -> None:
        """Give up what is packed; it is packed anew when it is wanted again."""
        for kind in ("packed", "packed_backward"):
            self.__dict__.pop(kind, None)

    def drop_packed_forward(self) -> None:
        """Give up what was packed for the forward convolution; it is packed anew when it is wanted again."""
        self.__dict__.pop("packed", None)

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.weight.shape[1 if self.geometry.operator is Operator.CONV_TRANSPOSE else 0]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Of the result for maps of that shape, [M, H, W, C]."""
        samples, height, width, _ = shape
        return samples, *self.geometry.output_size((height, width), self.weight.shape[2:]), self.channels


Packed = PackedWeight | PackedAmxWeight


def _pack(m: WinogradMap | AmxMap, weight: Tensor, *, backward: bool = False) -> Packed:
    if isinstance(m, AmxMap):
        return pack_amx_weight(m, weight, backward=backward)
    return pack_weight(m, weight, backward=backward)


_KEPT_BYTES = 512 * 1024 * 1024
_kept: OrderedDict[tuple[int, tuple[int, ...], WinogradMap | AmxMap], tuple[tuple[int, int], Packed]] = OrderedDict()
_kept_lock = threading.Lock()


def kept_pack(m: WinogradMap | AmxMap, weight: Tensor) -> Packed:
    """Packed weights of earlier rollouts. A weight is known by the fingerprint of its bytes: in-place changes can hide from version
    counters (``.data``)."""
    key = (weight.data.untyped_storage()._cdata, tuple(weight.shape), m)
    mark = _launch.fingerprint(weight.detach())
    with _kept_lock:
        entry = _kept.get(key)
        if entry is not None and entry[0] == mark:
            _kept.move_to_end(key)
            return entry[1]
        packed = _pack(m, weight)
        _kept[key] = mark, packed
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(p.nbytes for _, p in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
        return packed


def release_packed() -> int:
    """Give back to the system packed weights that are kept, and buffers that no tensor uses. Returns the bytes given back."""
    with _kept_lock:
        _kept.clear()  # (the packed forms lie in the buffers)
    return release_buffers()


def convolve(
    weight: Weight,
    x: Tensor,  # [M, H, W, C]
    out: Tensor | None = None,  # [M, H', W', C']
) -> Tensor:
    """The linear map, without bias. Returns [M, H', W', C'], contiguous; ``out``, if given, holds it then."""
    if weight.choice.map is not None or "forward" in weight.choice.fused:
        return _sum([weight], [x], out)
    samples, *size = weight.output_shape(x.shape)
    nbytes = math.prod(size) * x.element_size()
    if x.device.type != "cpu" or samples * nbytes <= _DIRECT_BYTES:
        y = _direct(weight, x)
        return y if out is None else out.copy_(y)
    if out is None:
        out = empty((samples, *size), x.dtype)
    some = max(1, _DIRECT_BYTES // nbytes)
    for first in range(0, samples, some):
        out[first : first + some].copy_(_direct(weight, x[first : first + some]))
    return out


# Of results that are PyTorch's own, at a time, before they are copied to where they are wanted: it takes memory for them in whose place no
# other buffer goes.
_DIRECT_BYTES = 8 << 20


def _direct(weight: Weight, x: Tensor) -> Tensor:
    geometry = weight.geometry
    if geometry.operator is Operator.LINEAR:
        return torch.mm(x.flatten(1), weight.direct.t()).reshape(x.shape[0], 1, 1, -1)
    y = torch.ops.aten.convolution(
        x.permute(0, 3, 1, 2),
        weight.direct,
        None,
        [geometry.stride] * 2,
        [geometry.padding] * 2,
        [1, 1],
        geometry.operator is Operator.CONV_TRANSPOSE,
        [geometry.output_padding] * 2,
        1,
    )
    return y.permute(0, 2, 3, 1).contiguous()


class Chosen(Protocol):
    """A linear map with its engine."""

    choice: EngineChoice


def can_sum(weights: Sequence[Chosen]) -> bool:
    """Whether one call can compute the sum of these maps: :func:`convolve_sum`."""
    maps = [w.choice.map for w in weights]
    if all("forward" in w.choice.fused for w in weights) or all(isinstance(m, AmxMap) for m in maps):
        return True
    winograd = [m for m in maps if isinstance(m, WinogradMap)]
    terms = sum(1 if m.transposed else len(m.shifts) for m in winograd)
    return len(winograd) == len(maps) and len({(m.form, m.transposed) for m in winograd}) == 1 and terms <= MAX_SUMMED


def convolve_sum(
    weights: Sequence[Weight],
    xs: Sequence[Tensor],  # each [M, H, W, C]
    out: Tensor | None = None,  # [M, H', W', C']
    epilogue: Epilogue | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """The sum of several maps, [M, H', W', C']: accumulated in the Winograd domain, in one fused launch, or one added to the other.

    Args:
        out: where it is written; a new map if None.
        epilogue: what becomes of it as it leaves (:func:`can_end` tells whether that can be).
        accumulate: add it to ``out``.
    """
    return _sum(weights, xs, out, epilogue, accumulate)


def can_end(weight: Chosen) -> bool:
    """Whether the engine of this map takes an :class:`Epilogue`."""
    m = weight.choice.map
    return isinstance(m, WinogradMap) or (isinstance(m, AmxMap) and reaches_all(m))


def can_wait(weight: Chosen) -> bool:
    """Whether this map is better computed with its area's step: :func:`can_end`, or by a GPU's fused convolution."""
    return can_end(weight) or "forward" in weight.choice.fused


def _sum(
    weights: Sequence[Weight],
    xs: Sequence[Tensor],
    out: Tensor | None = None,
    epilogue: Epilogue | None = None,
    accumulate: bool = False,
) -> Tensor:
    if out is None:
        out = empty(weights[0].output_shape(xs[0].shape), xs[0].dtype)
    if weights[0].choice.map is None:  # a GPU's fused convolution
        return fused_sum([w.fused for w in weights], xs, out)
    packed = [w.packed for w in weights]
    if all(isinstance(w, PackedWeight) for w in packed):
        return winograd_conv(xs, [w for w in packed if isinstance(w, PackedWeight)], out, epilogue, accumulate=accumulate)
    for k, (x, w) in enumerate(zip(xs, packed, strict=True)):
        assert isinstance(w, PackedAmxWeight)
        amx_conv(x, w, out, accumulate=accumulate or k > 0, epilogue=epilogue if k == len(xs) - 1 else None)
    return out


def convolve_backward(
    weight: Weight,
    grad: Tensor,  # [M, H', W', C']
    x: Tensor | torch.Size,  # [M, H, W, C]; its shape is enough where need_weight is False
    *,
    need_x: bool,
    need_weight: bool,
    into: Tensor | None = None,  # [M, H, W, C]
    weight_into: Tensor | None = None,  # as the parameter, contiguous
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`: of x, [M, H, W, C] contiguous, and of the weight in the parameter's shape; None where not needed.

    ``into``, ``weight_into``: to which the gradient of x, or of the weight, is added, and which is then returned for it.
    """
    geometry, m = weight.geometry, weight.choice.map
    if m is not None:
        grad_weight = _weight_grad(weight, x, grad, weight_into) if need_weight and isinstance(x, Tensor) else None
        return _data_grad(weight, grad, x.shape if isinstance(x, Tensor) else x, into) if need_x else None, grad_weight
    if into is not None or weight_into is not None:
        grad_x, grad_weight = convolve_backward(weight, grad, x, need_x=need_x, need_weight=need_weight)
        if grad_x is not None and into is not None:
            grad_x = into.add_(grad_x)
        if grad_weight is not None and weight_into is not None:
            grad_weight = weight_into.add_(grad_weight)
        return grad_x, grad_weight
    fused, shape = weight.choice.fused, x.shape if isinstance(x, Tensor) else x
    if (need_x and "data" in fused) or (need_weight and "weight" in fused):
        vendor_x, vendor_weight = need_x and "data" not in fused, need_weight and "weight" not in fused
        grad_x, grad_weight = None, None
        if vendor_x or vendor_weight:
            grad_x, grad_weight = convolve_backward(weight, grad, x, need_x=vendor_x, need_weight=vendor_weight)
        if need_x and "data" in fused:
            grad_x = weight.fused.data_grad(grad, shape)
        if need_weight and "weight" in fused and isinstance(x, Tensor):
            grad_weight = weight.fused.weight_grad(grad, x).reshape(weight.weight.shape)
        return grad_x, grad_weight
    if not isinstance(x, Tensor):
        x = grad.new_empty(x)  # nobody reads its values
    if geometry.operator is Operator.LINEAR:
        flat = grad.flatten(1)
        grad_x = torch.mm(flat, weight.direct).reshape(x.shape) if need_x else None
        return grad_x, torch.mm(flat.t(), x.flatten(1)) if need_weight else None
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight.direct,
        None,
        [geometry.stride] * 2,
        [geometry.padding] * 2,
        [1, 1],
        geometry.operator is Operator.CONV_TRANSPOSE,
        [geometry.output_padding] * 2,
        1,
        [need_x, need_weight, False],
    )
    return grad_x.permute(0, 2, 3, 1).contiguous() if need_x else None, grad_weight.contiguous() if need_weight else None


def _data_grad(weight: Weight, grad: Tensor, shape: torch.Size, into: Tensor | None) -> Tensor:
    packed = weight.packed_backward
    out = empty(shape, torch.float32) if into is None else into
    if isinstance(packed, PackedWeight):
        return winograd_conv([grad], [packed], out, accumulate=into is not None)
    return amx_conv(grad, packed, out, accumulate=into is not None)


MANY_WEIGHT_TILES = 32  # from which on Winograd's gradient of a weight is the faster one (docs/kernels.md)


def _weight_grad(weight: Weight, x: Tensor, grad: Tensor, into: Tensor | None) -> Tensor:
    m, own = weight.choice.grad_map, weight.choice.map
    assert m is not None
    if isinstance(own, WinogradMap) and x.shape[0] * own.tiles(*x.shape[1:3]) >= MANY_WEIGHT_TILES:
        m = own
    out = empty(weight.weight.shape, torch.float32) if into is None else into
    if isinstance(m, AmxMap):
        return amx_weight_grad(m, x, grad, out, accumulate=into is not None)
    return winograd_weight_grad(m, x, grad, out, accumulate=into is not None)
