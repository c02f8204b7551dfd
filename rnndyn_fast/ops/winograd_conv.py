"""``winograd_conv``: convolutions of stride 1 and transposed convolutions of stride 2 in the Winograd domain, float32, on the CPU.

Equations, precision and traffic: ``csrc/cpu/winograd_conv_kernel.h``. Maps are channels-last and contiguous, [M, H, W, C].

A transposed convolution of stride 2 is four convolutions on its source's grid, one for each parity of the output's row and column. With
K = 3 the even parity has one tap and the odd one two: kernels of 2, F(4x4,2x2). With K = 5 they have three and two: kernels of 3,
F(4x4,3x3). Its gradient of the data sums the four parities' grids as four terms of one convolution. A transposed convolution of stride 1 is
the convolution with the turned kernel, source and target channels of the parameter exchanged. A kernel of 7 is cut into four of 4 or 3,
each shifted by where it stands, F(5x5,4x4): four terms of one convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.epilogue import Epilogue, end_fields
from rnndyn_fast.ops.launch import CpuCall

Taps = tuple[tuple[int, ...], ...]
_PARITIES = ((0, 0), (0, 1), (1, 0), (1, 1))
_NONE = (-1, -1)  # a kernel that vanishes at no frequency


@dataclass(frozen=True)
class WinogradForm:
    """F(m x m, r x r) by its patch a = m + r - 1 and its kernel r; (5, 2), (6, 3), (8, 3), (8, 4), (6, 5) and (8, 5) exist."""

    patch: int
    kernel: int

    @property
    def outputs(self) -> int:
        """m, outputs per tile and direction."""
        return self.patch - self.kernel + 1

    @property
    def key(self) -> tuple[int, int]:
        """As the native core takes it."""
        return self.patch, self.kernel

    def __str__(self) -> str:
        return f"F({self.outputs}x{self.outputs},{self.kernel}x{self.kernel})"

    def products(self, height: int, width: int) -> int:
        """Products per pair of channels and phase on a grid, tiles past the edge included."""
        tiles = -(-height // self.outputs) * -(-width // self.outputs)
        return tiles * self.patch**2


@dataclass(frozen=True)
class WinogradMap:
    """A linear map of connections in the Winograd domain: a 'same' convolution, as such or given as a transposed one of stride 1
    (``turned``), or a doubling transposed one (``transposed``). A kernel larger than the form's is cut."""

    form: WinogradForm
    kernel_size: int
    transposed: bool = False
    turned: bool = False
    hides_transform: bool = False  # of weights, where it is done in every call: it costs little (packs_taps)
    few_reads: bool = False  # of a weight, in a rollout

    @property
    def span(self) -> int:
        """Of the kernel on a grid."""
        return self.form.kernel if self.transposed else self.kernel_size

    @property
    def pad(self) -> int:
        """Zero pixels above and left of the source's grid."""
        return (self.span - 1) // 2

    @property
    def backward_pad(self) -> int:
        """The same for the gradient of the data."""
        return self.span - 1 - self.pad

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Where the pieces of a kernel stand; (0, 0) of one that is not cut."""
        starts = range(0, self.span, self.form.kernel)
        return tuple((row, column) for row in starts for column in starts)

    def products(self, height: int, width: int) -> int:
        """Products per pair of channels on a source of that size, without those with zeros of short pieces."""
        per_row = sum(self.form.patch - (self.span - start < self.form.kernel) for start in range(0, self.span, self.form.kernel))
        count = self.form.products(height, width) // self.form.patch**2 * per_row**2
        return count * (4 if self.transposed else 1)

    def tiles(self, height: int, width: int) -> int:
        """Of a source of that size."""
        return self.form.products(height, width) // self.form.patch**2


@lru_cache(maxsize=64)
def taps(m: WinogradMap) -> Taps:
    """Which element kh * K + kw of the parameter's kernel stands at tap (u, v) of each phase; -1 where none does.

    Transposed, K = 2 q + 1, padding q, output row 2 i - q + kh: parity a at grid row m gets kernel row kh from source row m + (a + q -
    kh) / 2, so tap u, which reads source row m - pad + u, is kh = a + q + 2 pad - 2 u.
    """
    k, r, pad = m.kernel_size, m.form.kernel, m.pad
    if not m.transposed:
        return _pieces(m, m.turned)

    def rows(parity: int) -> list[int]:
        wanted = [parity + (k - 1) // 2 + 2 * pad - 2 * u for u in range(r)]
        return [kh if 0 <= kh < k else -1 for kh in wanted]

    return tuple(tuple(kh * k + kw if kh >= 0 and kw >= 0 else -1 for kh in rows(a) for kw in rows(b)) for a, b in _PARITIES)


def _pieces(m: WinogradMap, turned: bool) -> Taps:
    """The taps of each piece of a kernel, perhaps turned by 180 degrees."""
    k, r = m.kernel_size, m.form.kernel
    kernel = tuple(range(k * k))[:: -1 if turned else 1]

    def tap(row: int, column: int) -> int:
        return kernel[row * k + column] if row < k and column < k else -1

    return tuple(tuple(tap(row + u, column + v) for u in range(r) for v in range(r)) for row, column in m.shifts)


@lru_cache(maxsize=64)
def _backward_taps(m: WinogradMap) -> Taps:
    """Of the terms of the gradient of the data."""
    return tuple(phase[::-1] for phase in taps(m)) if m.transposed else _pieces(m, not m.turned)


@lru_cache(maxsize=64)
def _vanishing(m: WinogradMap) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Per phase or piece, the row and column of frequencies at which its transformed kernel is zero; the same for the gradient of the data.

    Only the first tap reaches the point 0 and only the last one infinity, so a kernel without that tap is zero there.
    """
    r, last = m.form.kernel, m.form.patch - 1

    def missing(present: Sequence[bool]) -> int:
        return 0 if not present[0] else last if not present[-1] else -1

    def phase(flat: tuple[int, ...]) -> tuple[int, int]:
        rows = [any(t >= 0 for t in flat[u * r : (u + 1) * r]) for u in range(r)]
        columns = [any(t >= 0 for t in flat[v::r]) for v in range(r)]
        return missing(rows), missing(columns)

    return tuple(phase(flat) for flat in taps(m)), tuple(phase(flat) for flat in _backward_taps(m))


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the Winograd domain, for one direction: one tensor per term, in the layout of the instruction set in use."""

    map: WinogradMap
    backward: bool
    data: tuple[Tensor, ...]
    by_taps: bool  # only in order, and transformed as it is read

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for t in self.data)


_NOT_SMALL, _LARGE, _HUGE = 4 << 20, 10 << 20, 48 << 20  # bytes of transformed weights
EXPOSED = range(48, 128)  # tiles of a time step with which transforming weights in every call costs most
FEW_READS = 4  # time steps that read a weight, for which transforming it ahead saves nothing


def packs_taps(m: WinogradMap, pairs: int) -> bool:
    """Whether a weight of so many pairs of channels is packed as its taps, to be transformed as it is read, rather than transformed.

    So are kernels of 3 of which more than 10 MiB would be transformed weights, but more than 48 MiB where more than 4 time steps read them
    and each has 48 to 127 tiles, and more than 4 MiB where at most 4 time steps read them: many times the size of the parameter, they take
    memory and time to pack, and come from L3 or memory in every call. Transforming them in every call makes it 14 to 20% longer with 64
    tiles, less with more, and no longer with 16, which wait for memory (docs/kernels.md).
    """
    most = _NOT_SMALL if m.few_reads else _LARGE if m.hides_transform else _HUGE
    return m.form.kernel == 3 and 4 * pairs * m.form.patch**2 > most


def packed_bytes(m: WinogradMap, weight_shape: Sequence[int]) -> int:
    """Memory of a weight that is packed for one direction, without what fills its panels."""
    pairs = weight_shape[0] * weight_shape[1]
    each = m.form.kernel if packs_taps(m, pairs) else m.form.patch
    return 4 * pairs * each**2 * len(taps(m))


def _sizes(m: WinogradMap, weight: Tensor) -> tuple[int, int, int, int]:
    """Channels of target and source, and their strides in the parameter."""
    first, second, k, _ = weight.shape
    area = k * k
    # CONV: [C_target, C_source, K, K]; CONV_TRANSPOSE: [C_source, C_target, K, K].
    return (second, first, area, second * area) if m.transposed or m.turned else (first, second, second * area, area)


def packed_sizes(m: WinogradMap, weight_shape: Sequence[int], *, backward: bool = False) -> list[int]:
    """Elements of each tensor that a weight is packed into, float32."""
    first, second = weight_shape[:2]
    target, source = (second, first) if m.transposed or m.turned else (first, second)
    sizes = (source, target, 1, 1) if backward else (target, source, 1, 1)
    by_taps = packs_taps(m, target * source)
    fields = {"form": m.form.key, "sizes": sizes, "by_taps": by_taps}
    return [core.packed_size("winograd", {**fields, "taps": phases}) for phases in _packed_phases(m, backward)]


def _packed_phases(m: WinogradMap, backward: bool) -> list[Taps]:
    """The taps in each packed tensor: all phases of one term, or one of each term."""
    if not backward and m.transposed:
        return [taps(m)]
    return [(term,) for term in (_backward_taps(m) if backward else taps(m))]


def pack_weight(m: WinogradMap, weight: Tensor, *, backward: bool = False, outs: Sequence[Tensor] | None = None) -> PackedWeight:
    """Transform a parameter's weight, perhaps into the tensors ``outs``; ``backward``: for the gradient of the data (from target to source
    channels)."""
    weight = weight.contiguous()
    target, source, target_stride, source_stride = _sizes(m, weight)
    sizes = (source, target, source_stride, target_stride) if backward else (target, source, target_stride, source_stride)
    by_taps = packs_taps(m, target * source)
    if outs is None:
        outs = [empty((size,), torch.float32) for size in packed_sizes(m, weight.shape, backward=backward)]
    for phases, out in zip(_packed_phases(m, backward), outs, strict=True):
        call = CpuCall()
        fields = {"form": m.form.key, "taps": phases, "sizes": sizes, "by_taps": by_taps}
        addresses = {"weight": call.whole(weight, "weight"), "packed": call.whole(out, "packed")}
        call.run("winograd_pack_weight", torch.float32, {**fields, **addresses})
    return PackedWeight(m, backward, tuple(outs), by_taps)


@dataclass(frozen=True)
class _Grid:
    """Pixels [M, H, W] of a map with adjacent channels: all of them, or every second one, from ``first``."""

    tensor: Tensor  # [M, H', W', C], contiguous
    step: int = 1
    first: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Samples, height and width of the grid, and channels."""
        m, h, w, c = self.tensor.shape
        return m, -(-(h - self.first[0]) // self.step), -(-(w - self.first[1]) // self.step), c

    @property
    def strides(self) -> tuple[int, int, int]:
        """In elements, between samples, rows and columns."""
        _, h, w, c = self.tensor.shape
        return h * w * c, self.step * w * c, self.step * c

    def address(self, call: CpuCall, name: str) -> Any:
        """Of the first pixel."""
        _, _, w, c = self.tensor.shape
        return call.whole(self.tensor, name, offset=4 * (self.first[0] * w + self.first[1]) * c)


def _phases(m: WinogradMap, maps: Tensor) -> list[_Grid]:
    """The grids of a target's map: itself, or its four parities."""
    return [_Grid(maps, 2, parity) for parity in _PARITIES] if m.transposed else [_Grid(maps)]


def _check_grids(**grids: Sequence[_Grid]) -> tuple[int, int, int]:
    """Samples, height and width, which all have."""
    (shape, *_) = {grid.shape[:3] for of_one in grids.values() for grid in of_one[:1]}
    for name, of_one in grids.items():
        for i, grid in enumerate(of_one):
            if grid.shape[:3] != shape:
                raise ValueError(f"{name}[{i}]: expected a grid {list(shape)} [M, H, W], got {list(grid.shape[:3])}")
    return shape


def winograd_conv(
    xs: Sequence[Tensor],  # each [M, H, W, C_in]
    weights: Sequence[PackedWeight],
    out: Tensor,  # [M, H', W', C_out], contiguous
    epilogue: Epilogue | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """The sum of the linear maps of several sources, with one inverse transform and perhaps an epilogue; written into ``out``, or added to
    it.

    With weights packed for the gradient of the data, that gradient.
    """
    m, backward = weights[0].map, weights[0].backward
    packed = [(t, w.by_taps) for w in weights for t in w.data]
    if m.transposed and not backward:
        grids, shifts, pad = [_Grid(x) for x in xs], [(0, 0)] * len(xs), m.pad
        vanishing, ys, y_vanishing = [_NONE] * len(xs), _phases(m, out), _vanishing(m)[0]
    else:
        grids = [grid for x in xs for grid in (_phases(m, x) if m.transposed else [_Grid(x)] * len(m.shifts))]
        shifts = [(0, 0)] * len(grids) if m.transposed else list(m.shifts * len(xs))
        pad, of_one = (m.backward_pad, _vanishing(m)[1]) if backward else (m.pad, _vanishing(m)[0])
        vanishing, ys, y_vanishing = list(of_one * len(xs)), [_Grid(out)], (_NONE,)
    samples, height, width = _check_grids(ys=ys, xs=grids)
    call = CpuCall()
    terms = [
        (x.address(call, f"xs[{i}]"), x.strides, x.shape[3], call.whole(p, "packed"), v, shift, by_taps)
        for i, (x, (p, by_taps), v, shift) in enumerate(zip(grids, packed, vanishing, shifts, strict=True))
    ]
    values: dict[str, Any] = {
        "form": m.form.key, "pad": pad, "samples": samples, "height": height, "width": width, "out_channels": out.shape[3],
        "accumulate": accumulate, "terms": terms, "y_strides": ys[0].strides,
        "phases": [(y.address(call, f"ys[{i}]"), v) for i, (y, v) in enumerate(zip(ys, y_vanishing, strict=True))],
    }  # fmt: skip
    call.run("winograd_conv", torch.float32, values | end_fields(epilogue, out, call))
    return out


def winograd_weight_grad(
    m: WinogradMap,
    x: Tensor,  # [M, H, W, C_in]
    grad: Tensor,  # [M, H', W', C_out]
    out: Tensor,  # as the parameter, contiguous
    *,
    accumulate: bool = False,
) -> Tensor:
    """Gradient of the weight over all samples, in the parameter's shape; written into ``out``, or added to it."""
    if m.transposed:
        pieces = [(taps(m), _vanishing(m)[0], (0, 0))]
    else:
        pieces = [((piece,), (zero,), shift) for piece, zero, shift in zip(taps(m), _vanishing(m)[0], m.shifts, strict=True)]
    source, grads = _Grid(x), _phases(m, grad)
    samples, height, width = _check_grids(x=[source], grads=grads)
    for phases, vanishing, shift in pieces:
        call = CpuCall()
        values: dict[str, Any] = {
            "form": m.form.key, "pad": m.pad, "taps": phases, "sizes": _sizes(m, out), "samples": samples, "height": height, "width": width,
            "x": source.address(call, "x"), "x_strides": source.strides, "shift": shift, "grad_strides": grads[0].strides,
            "phases": [(g.address(call, f"grads[{i}]"), v) for i, (g, v) in enumerate(zip(grads, vanishing, strict=True))],
            "grad_weight": call.whole(out, "grad_weight"), "accumulate": accumulate,
        }  # fmt: skip
        call.run("winograd_weight_grad", torch.float32, values)
    return out
