"""``amx_conv``: any convolution, transposed convolution or dense map as matrix products of bfloat16 parts, float32, on the CPU.

Equations, precision and traffic: ``csrc/cpu/amx_conv_kernel.h``. Maps are channels-last and contiguous, [M, H, W, C].

A convolution of stride s reads, for output pixel i and tap k, input pixel s i + k - p. A transposed one is s^2 convolutions of
stride 1, one for each residue a of the output modulo s: output s i + a reads input i + (a + p - k) / s for the taps k where that is
whole. Each is the gradient of the other's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.epilogue import Epilogue, end_fields
from rnndyn_fast.ops.launch import CpuCall

Tap = tuple[int, int, int]  # row, column, element of the kernel
MAX_TAPS = 128  # kAmxMaxTaps of amx_conv.h; the core checks it
MAX_PHASES = 16  # kAmxMaxPhases


@dataclass(frozen=True)
class AmxMap:
    """A linear map of maps: kernel, stride and padding, which way the data go, and the number of bfloat16 parts of a value."""

    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    parts: int = 2
    packs_late: bool = False  # its weights, in every call

    def __str__(self) -> str:
        return {1: "bfloat16", 2: "bfloat16 x 3", 3: "bfloat16 x 6"}[self.parts]


def _taps(m: AmxMap) -> tuple[Tap, ...]:
    """Of the convolution that ``m`` is, or is the transpose of: what it reads from the larger map."""
    kh, kw = m.kernel
    return tuple((r - m.padding, c - m.padding, r * kw + c) for r in range(kh) for c in range(kw))


@lru_cache(maxsize=128)
def _phases(m: AmxMap, scatter: bool) -> tuple[tuple[tuple[int, int], tuple[Tap, ...]], ...]:
    """Residue of the output and taps of each phase; with ``scatter`` the outputs are the larger map's pixels."""
    if not scatter:
        return (((0, 0), _taps(m)),)
    s = m.stride
    return tuple(
        ((a, b), tuple(((a - row) // s, (b - column) // s, k) for row, column, k in _taps(m) if (a - row) % s == 0 == (b - column) % s))
        for a in range(s)
        for b in range(s)
    )


@dataclass(frozen=True)
class PackedAmxWeight:
    """A weight as the tiles of one direction: one tensor per phase, in the layout of the instruction set in use; or the parameter, of which
    each call packs a piece at a time."""

    map: AmxMap
    backward: bool
    data: tuple[Tensor, ...]
    strides: tuple[int, int] | None = None  # of the result's and the source's channels in the parameter, where it is that

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return 0 if self.strides is not None else sum(t.nbytes for t in self.data)


def _sizes(m: AmxMap, weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Channels of target and source, and their strides in the parameter: [C_target, C_source, ...], or transposed the other way round."""
    first, second = weight_shape[:2]
    area = m.kernel[0] * m.kernel[1]
    return (second, first, area, second * area) if m.transposed else (first, second, second * area, area)


def amx_packed_sizes(m: AmxMap, weight_shape: Sequence[int], *, backward: bool = False) -> list[int]:
    """Elements of each tensor that a weight is packed into, int16; none where each call packs the parameter (``packs_late``)."""
    if m.packs_late:
        return []
    target, source, *_ = _sizes(m, weight_shape)
    area = m.kernel[0] * m.kernel[1]
    sizes = (source, target, area, area) if backward else (target, source, area, area)
    return [core.packed_size("amx", {"taps": taps, "sizes": sizes, "parts": m.parts}) for taps in _packed_taps(m, backward)]


def _packed_taps(m: AmxMap, backward: bool) -> list[tuple[Tap, ...]]:
    return [taps for _, taps in _phases(m, m.transposed != backward) if taps]


def late_strides(m: AmxMap, weight_shape: Sequence[int], *, backward: bool = False) -> tuple[int, int] | None:
    """Strides of the result's and the source's channels in a parameter that each call packs; None where it is packed ahead."""
    *_, target_stride, source_stride = _sizes(m, weight_shape)
    if not m.packs_late:
        return None
    return (source_stride, target_stride) if backward else (target_stride, source_stride)


def pack_amx_weight(m: AmxMap, weight: Tensor, *, backward: bool = False, outs: Sequence[Tensor] | None = None) -> PackedAmxWeight:
    """Split and pack a parameter's weight, perhaps into the tensors ``outs``; ``backward``: for the gradient of the data (from target to
    source channels)."""
    weight = weight.contiguous()
    if m.packs_late:
        return PackedAmxWeight(m, backward, (weight,), late_strides(m, weight.shape, backward=backward))
    target, source, target_stride, source_stride = _sizes(m, weight.shape)
    sizes = (source, target, source_stride, target_stride) if backward else (target, source, target_stride, source_stride)
    if outs is None:
        outs = [core.packed_room(size) for size in amx_packed_sizes(m, weight.shape, backward=backward)]
    for taps, out in zip(_packed_taps(m, backward), outs, strict=True):
        call = CpuCall()
        addresses = {"weight": call.whole(weight, "weight"), "packed": call.whole(out, "packed")}
        call.run("amx_pack_weight", torch.float32, {"taps": taps, "sizes": sizes, "parts": m.parts, **addresses})
    return PackedAmxWeight(m, backward, tuple(outs))


def amx_conv(
    x: Tensor,  # [M, H, W, C_in]
    weight: PackedAmxWeight,
    out: Tensor,  # [M, H', W', C_out]
    *,
    accumulate: bool = False,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The linear map, written into ``out``, or added to it, and perhaps its epilogue; with a weight packed for the gradient of the data,
    that gradient. Pixels that the map does not reach (:func:`reaches_all`) are left as they are.

    Raises: ValueError, for an epilogue where the map does not reach every pixel (:func:`reaches_all`).
    """
    m = weight.map
    scatter = m.transposed != weight.backward
    step = m.stride if scatter else 1
    phases = [(first, taps) for first, taps in _phases(m, scatter) if taps and first[0] < out.shape[1] and first[1] < out.shape[2]]
    if epilogue is not None and not reaches_all(m):
        raise ValueError(f"epilogue: a stride of {m.stride} beyond the kernel {list(m.kernel)} leaves pixels that nothing reaches")
    if not phases:
        return out
    own = [first for first, taps in _phases(m, scatter) if taps]
    packed = dict(zip(own, weight.data if weight.strides is None else weight.data * len(own), strict=True))
    call, (samples, in_height, in_width, in_channels), (_, h, w, c) = CpuCall(), x.shape, out.shape
    if out.shape[0] != samples:
        raise ValueError(f"out: expected {samples} maps, got {out.shape[0]}")
    grids = [
        (taps, -(-(h - a) // step), -(-(w - b) // step), call.whole(packed[a, b], "packed"), call.whole(out, "out", 4 * (a * w + b) * c))
        for (a, b), taps in phases
    ]
    values = {
        "samples": samples, "in_height": in_height, "in_width": in_width, "in_channels": in_channels, "out_channels": c,
        "in_step": 1 if scatter else m.stride, "parts": m.parts, "accumulate": accumulate, "x": call.whole(x, "x"), "phases": grids,
        "weight_strides": weight.strides, "y_strides": (h * w * c, step * w * c, step * c),
    }  # fmt: skip
    call.run("amx_conv", torch.float32, values | end_fields(epilogue, out, call))
    return out


def reaches_all(m: object, *, backward: bool = False) -> bool:
    """Whether every pixel of the result has a tap, as an epilogue needs; ``backward``: of the gradient of the data. A stride beyond the
    kernel leaves some out."""
    return not isinstance(m, AmxMap) or m.transposed == backward or m.stride <= min(m.kernel)


def amx_weight_grad(
    m: AmxMap,
    x: Tensor,  # [M, H, W, C_source]
    grad: Tensor,  # [M, H', W', C_target]
    out: Tensor,  # as the parameter, contiguous
    *,
    accumulate: bool = False,
) -> Tensor:
    """Gradient of the weight over all samples, in the parameter's shape; written into ``out``, or added to it."""
    target, source, target_stride, source_stride = _sizes(m, out.shape)
    # The larger map is the one that taps shift.
    shifted, still, channels, strides = x, grad, target, (target_stride, source_stride)
    if m.transposed:
        shifted, still, channels, strides = grad, x, source, (source_stride, target_stride)
    (samples, in_height, in_width, in_channels), (_, height, width, _) = shifted.shape, still.shape
    if still.shape[0] != samples:
        raise ValueError(f"grad: expected {x.shape[0]} maps, got {grad.shape[0]}")
    call = CpuCall()
    values = {
        "samples": samples, "in_height": in_height, "in_width": in_width, "in_channels": in_channels, "height": height, "width": width,
        "out_channels": channels, "out_stride": strides[0], "in_stride": strides[1], "taps": _taps(m), "in_step": m.stride,
        "parts": m.parts, "accumulate": accumulate, "x": call.whole(shifted, "x"), "grad": call.whole(still, "grad"),
        "grad_weight": call.whole(out, "grad_weight"),
    }  # fmt: skip
    call.run("amx_weight_grad", torch.float32, values)
    return out
