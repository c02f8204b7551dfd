"""Launches of ``winograd_conv`` and ``amx_conv``; addresses come from :mod:`rnndyn_fast.ops._launch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.ops._launch import _addresses, address_of
from rnndyn_fast.ops.epilogue import Epilogue

if _launch.unavailable is None:
    from rnndyn_fast.ops._launch import _core


@dataclass(frozen=True)
class Grid:
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
    def strides(self) -> list[int]:
        """In elements, between samples, rows and columns."""
        _, h, w, c = self.tensor.shape
        return [h * w * c, self.step * w * c, self.step * c]

    def address(self, name: str) -> int:
        """Of the first pixel."""
        _, _, w, c = self.tensor.shape
        start = address_of(self.tensor, name, tuple(self.tensor.shape), torch.float32)
        return start + 4 * (self.first[0] * w + self.first[1]) * c


def _packed_address(packed: Tensor) -> int:
    return address_of(packed, "packed", tuple(packed.shape), packed.dtype)


def _epilogue(e: Epilogue | None, out: Tensor) -> tuple[object, ...] | None:
    """As the core takes it."""
    if e is None:
        return None
    shape, dtype = tuple(out.shape), torch.float32
    samples, _, _, channels = shape
    return (
        address_of(out, "out", shape, dtype),
        e.modulates,
        _addresses(e.drives, "drives", shape, dtype),
        address_of(e.drive_bias, "drive_bias", (channels,), dtype),
        _addresses(e.modulators, "modulators", shape, dtype),
        address_of(e.modulator_bias, "modulator_bias", (channels,), dtype),
        address_of(e.modulator_sum, "modulator_sum", shape, dtype),
        address_of(e.mean, "mean", (samples,), dtype),
        address_of(e.rstd, "rstd", (samples,), dtype),
        e.eps,
    )


def amx_pack_weight(
    taps: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    parts: int,
    weight: Tensor,  # contiguous
    packed: Tensor,  # of amx_packed_size elements, int16; starts at a multiple of 64
) -> None:
    """Split and pack a weight."""
    address = address_of(weight, "weight", tuple(weight.shape), torch.float32)
    _core.amx_pack_weight(taps, sizes, parts, torch.get_num_threads(), address, _packed_address(packed))


def amx_packed_size(taps: Sequence[tuple[int, int, int]], sizes: Sequence[int], parts: int) -> int:
    """Elements of a packed weight, int16."""
    return _core.amx_packed_size(taps, sizes, parts)


def amx_conv(
    x: Tensor,  # [M, H, W, C_in]
    phases: Sequence[tuple[Sequence[tuple[int, int, int]], Tensor, tuple[int, int]]],  # taps, packed weight, first pixel
    out: Tensor,  # [M, H', W', C_out]
    in_step: int,
    out_step: int,
    parts: int,
    accumulate: bool,
    epilogue: Epilogue | None = None,
    weight_strides: tuple[int, int] | None = None,  # of output and input channels, where the phases' weights are the parameter
) -> None:
    """Launch ``amx_conv``: the phases' pixels of ``out`` are written, or added to; with an epilogue they are all of its pixels."""
    h, w, c = out.shape[1:]
    address = address_of(out, "out", (x.shape[0], h, w, c), torch.float32)
    grids = [
        (taps, -(-(h - a) // out_step), -(-(w - b) // out_step), _packed_address(packed), address + 4 * (a * w + b) * c)
        for taps, packed, (a, b) in phases
    ]
    strides = [h * w * c, out_step * w * c, out_step * c]
    _core.amx_conv(
        list(x.shape),
        c,
        in_step,
        parts,
        accumulate,
        torch.get_num_threads(),
        address_of(x, "x", tuple(x.shape), torch.float32),
        grids,
        weight_strides or (0, 0),
        strides,
        _epilogue(epilogue, out),
        _launch.take_scratch,
    )
    _launch.release_scratch()


def amx_weight_grad(
    x: Tensor,  # [M, H, W, C_in], shifted by the taps
    grad: Tensor,  # [M, H', W', C_out]
    taps: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    in_step: int,
    parts: int,
    grad_weight: Tensor,  # as the parameter, contiguous
    accumulate: bool = False,
) -> None:
    """Launch ``amx_weight_grad``: grad_weight is written, or added to."""
    _core.amx_weight_grad(
        list(x.shape),
        list(grad.shape[1:3]),
        taps,
        sizes,
        in_step,
        parts,
        torch.get_num_threads(),
        address_of(x, "x", (grad.shape[0], *x.shape[1:]), torch.float32),
        address_of(grad, "grad", tuple(grad.shape), torch.float32),
        address_of(grad_weight, "grad_weight", tuple(grad_weight.shape), torch.float32),
        accumulate,
        _launch.take_scratch,
    )
    _launch.release_scratch()


def winograd_pack_weight(
    form: tuple[int, int],
    taps: Sequence[Sequence[int]],
    sizes: Sequence[int],
    weight: Tensor,  # contiguous, [.., .., K, K]
    packed: Tensor,  # of winograd_packed_size elements
    *,
    by_taps: bool,
) -> None:
    """Transform and pack a weight, or ``by_taps`` only put it in order; the layout belongs to the instruction set in use."""
    address = address_of(weight, "weight", tuple(weight.shape), torch.float32)
    _core.winograd_pack_weight(form, taps, sizes, by_taps, torch.get_num_threads(), address, _packed_address(packed))


def winograd_packed_size(form: tuple[int, int], taps: Sequence[Sequence[int]], sizes: Sequence[int], *, by_taps: bool) -> int:
    """Elements of a packed weight, float32."""
    return _core.winograd_packed_size(form, taps, sizes, by_taps)


def winograd_conv(
    form: tuple[int, int],
    pad: int,
    xs: Sequence[Grid],  # each [M, H, W, C_in]
    packed: Sequence[Tensor],
    x_vanishing: Sequence[tuple[int, int]],
    ys: Sequence[Grid],  # one per phase, [M, H, W, C_out]
    y_vanishing: Sequence[tuple[int, int]],
    accumulate: bool = False,
    epilogue: Epilogue | None = None,
    shifts: Sequence[tuple[int, int]] = (),  # one per term; none: all zero
    by_taps: Sequence[bool] = (),  # one per term, as it was packed; none: all False
) -> None:
    """Launch ``winograd_conv``: the grids ys, which are all of one map, are written, or added to."""
    shape = list(ys[0].shape)
    for name, grids in (("xs", xs), ("ys", ys)):
        for i, grid in enumerate(grids):
            if list(grid.shape[:3]) != shape[:3]:
                raise ValueError(f"{name}[{i}]: expected a grid {shape[:3]} [M, H, W], got {list(grid.shape[:3])}")
    terms = [
        (x.address(f"xs[{i}]"), x.strides, x.shape[3], _packed_address(p), v, shift, taps)
        for i, (x, p, v, shift, taps) in enumerate(
            zip(xs, packed, x_vanishing, shifts or [(0, 0)] * len(xs), by_taps or [False] * len(xs), strict=True)
        )
    ]
    phases = [(y.address(f"ys[{i}]"), v) for i, (y, v) in enumerate(zip(ys, y_vanishing, strict=True))]
    end = _epilogue(epilogue, ys[0].tensor)
    _core.winograd_conv(form, pad, shape, torch.get_num_threads(), terms, phases, ys[0].strides, accumulate, end, _launch.take_scratch)
    _launch.release_scratch()


def winograd_weight_grad(
    form: tuple[int, int],
    pad: int,
    taps: Sequence[Sequence[int]],
    sizes: Sequence[int],
    x: Grid,  # [M, H, W, C_in]
    grads: Sequence[Grid],  # one per phase, [M, H, W, C_out]
    vanishing: Sequence[tuple[int, int]],
    grad_weight: Tensor,  # as the parameter, contiguous
    shift: tuple[int, int] = (0, 0),
    accumulate: bool = False,
) -> None:
    """Launch ``winograd_weight_grad``: the elements of grad_weight that are taps are written, or added to."""
    for i, grid in enumerate(grads):
        if grid.shape[:3] != x.shape[:3]:
            raise ValueError(f"grads[{i}]: expected a grid {list(x.shape[:3])} [M, H, W], got {list(grid.shape[:3])}")
    sizes_of_call = (form, pad, taps, list(x.shape[:3]), sizes, torch.get_num_threads())
    phases = [(g.address(f"grads[{i}]"), v) for i, (g, v) in enumerate(zip(grads, vanishing, strict=True))]
    address = address_of(grad_weight, "grad_weight", tuple(grad_weight.shape), torch.float32)
    source = (x.address("x"), x.strides, shift)
    scratch = _launch.take_scratch, _launch.take_room
    _core.winograd_weight_grad(*sizes_of_call, *source, phases, grads[0].strides, address, accumulate, *scratch)
    _launch.release_scratch()
