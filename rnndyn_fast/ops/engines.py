"""Which engine computes a linear map of a rollout on the CPU, and why (on CUDA devices: :mod:`rnndyn_fast.ops.cuda_engine`).

``amx`` (matrix units, :mod:`rnndyn_fast.ops.amx_conv`), ``winograd`` (:mod:`rnndyn_fast.ops.winograd_conv`), or ``direct`` (the vendor's,
through torch).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from rnndyn_fast.ops import core
from rnndyn_fast.ops.amx_conv import MAX_PHASES, MAX_TAPS, AmxMap, reaches_all
from rnndyn_fast.ops.fused_conv import KERNELS, PASSES
from rnndyn_fast.ops.winograd_conv import EXPOSED, FEW_READS, WinogradForm, WinogradMap
from rnndyn_fast.torch_internals import constant_when_compiled

ENGINES = ("auto", "direct", "winograd", "amx", "fused", "triton")
ASKED_FOR = "asked for"  # why, where the user chose an engine
DEVICE_ENGINES = ("auto", "direct", *KERNELS)
# torch.set_float32_matmul_precision: bfloat16 parts of a float32 value. Three carry all its bits.
_PARTS = {"highest": 3, "high": 2, "medium": 1}


class Operator(enum.Enum):
    """The linear map of a connection.

    CONV: cross-correlation, weight [C_target, C_source, K, K]; CONV_TRANSPOSE: its transpose, weight [C_source, C_target, K, K]; LINEAR: a
    dense map between 1 x 1 maps, weight [C_target, C_source]; IDENTITY: no parameters.
    """

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    IDENTITY = "identity"


def output_length(operator: Operator, length: int, kernel: int, stride: int, padding: int) -> int:
    """Of a convolution's result, or a transposed one's, along one axis. ``padding``: at both ends together, without what a transposed one's
    output padding gives back."""
    if operator is Operator.CONV_TRANSPOSE:
        return (length - 1) * stride + kernel - padding
    return (length + padding - kernel) // stride + 1


@dataclass(frozen=True)
class Geometry:
    """An operator with its stride and padding, the same in both directions; the weight tells the rest.

    ``output_padding``: transposed, as torch takes it; of a convolution zeros below and right of the map, beyond the padding, which the
    engines of matrix units and, with 2 x 2 kernels, Winograd read.
    """

    operator: Operator
    stride: int = 1
    padding: int = 0
    output_padding: int = 0

    def output_size(self, size: tuple[int, int], kernel: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of what it makes of a map of that height and width."""
        if self.operator is Operator.LINEAR:
            return 1, 1
        extra = -self.output_padding if self.operator is Operator.CONV_TRANSPOSE else self.output_padding
        height, width = (
            output_length(self.operator, n, k, self.stride, 2 * self.padding + extra) for n, k in zip(size, kernel, strict=True)
        )
        return height, width


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a connection and why; a map is None for the direct one.

    ``map`` computes the connection and the gradient of its source, ``grad_map`` the gradient of its weight; but over many tiles
    (all time steps of a rollout) Winograd's ``map`` does, as what it reads and writes once is then shared by many. On a GPU there are no
    maps: ``fused`` names the passes (of :data:`rnndyn_fast.ops.fused_conv.PASSES`) that the fused convolution of the CUDA kernels computes,
    ``triton`` those of the Triton kernels.
    """

    map: WinogradMap | AmxMap | None
    reason: str
    grad_map: WinogradMap | AmxMap | None = None
    fused: tuple[str, ...] = ()
    triton: tuple[str, ...] = ()

    def kernels(self, name: str) -> str | None:
        """Whose kernels compute a pass on a GPU: "fused" or "triton"; None: the vendor's."""
        return next((engine for engine in KERNELS if name in getattr(self, engine)), None)

    @classmethod
    def of(cls, m: WinogradMap | AmxMap | None, reason: str) -> EngineChoice:
        """The same for both."""
        return cls(m, reason, m)

    def __str__(self) -> str:
        given = {name: passes for name in KERNELS if (passes := getattr(self, name))}
        if given:
            return ", ".join(name if len(p) == len(PASSES) else f"{name} {'+'.join(p)}" for name, p in given.items())
        if isinstance(self.map, WinogradMap):
            return f"winograd {self.map.form}"
        return f"amx {self.map}" if self.map else "direct"


@constant_when_compiled  # torch.compile cannot trace the question; it guards on autocast and on precision itself
def with_precision(engine: str) -> str:
    """The engine with the precision that is asked for now, as :func:`choose_engine` takes it: "auto", "auto:2", ...

    CPU autocast to bfloat16 asks for one part of a value, ``torch.set_float32_matmul_precision`` for three, two or one.
    """
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    parts = 1 if autocast else _PARTS[torch.get_float32_matmul_precision()]
    return engine if parts == 3 else f"{engine}:{parts}"


def has_matrix_units() -> bool:
    """Whether the native core runs on matrix units here (elsewhere their engine is emulated, for tests)."""
    return core.unavailable is None and core.isa() == "amx"


def can_run_amx(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the engine of matrix units computes this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = core.unavailable
    if reason is None and dtype != torch.float32:
        reason = f"it computes in float32, not {dtype}"
    elif reason is None and geometry.operator is Operator.IDENTITY:
        reason = "nothing to compute"
    elif reason is None and geometry.operator is not Operator.LINEAR:
        kernel = weight_shape[2] * weight_shape[3]
        if kernel > MAX_TAPS or geometry.stride**2 > MAX_PHASES:
            reason = f"it computes kernels of at most {MAX_TAPS} elements and strides up to 4, not {kernel} and {geometry.stride}"
    if reason and raise_error:
        raise ValueError(f'engine="amx": {reason}')
    return reason is None


_LATE_BYTES, _LATE_PIXELS = 16 << 20, 128  # of packed weights; of the source, all samples of a time step
_LATE_BYTES_FEW, _LATE_PIXELS_FEW = 2 << 20, 256  # the same where few time steps read the weights


def _packs_late(weight_shape: tuple[int, ...], pixels: int, parts: int, reads: int) -> bool:
    """Whether weights are packed in every call, a piece at a time, rather than ahead: where they would be very large, and are read for few
    pixels. They come from memory in every call anyway, and as the parameter they are two thirds as large; splitting them takes as long as
    the products of 64 pixels, but in pieces that stay in L2 a third of the time of packing ahead."""
    few = reads <= FEW_READS
    least, most = (_LATE_BYTES_FEW, _LATE_PIXELS_FEW) if few else (_LATE_BYTES, _LATE_PIXELS)
    return 2 * parts * math.prod(weight_shape) > least and pixels <= most


def _amx_map(geometry: Geometry, weight_shape: tuple[int, ...], parts: int) -> AmxMap:
    if geometry.operator is Operator.LINEAR:
        return AmxMap((1, 1), parts=parts)
    kernel = (weight_shape[2], weight_shape[3])
    transposed = geometry.operator is Operator.CONV_TRANSPOSE
    return AmxMap(kernel, geometry.stride, geometry.padding, transposed, parts)


def can_run_winograd(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the Winograd engine computes this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = core.unavailable
    if reason is None and geometry.operator is Operator.LINEAR:
        reason = "a matrix product"
    elif reason is None:
        kernel = weight_shape[-1]
        same = geometry.stride == 1 and geometry.output_padding == 0 and kernel in (3, 5, 7) and 2 * geometry.padding == kernel - 1
        two = geometry == Geometry(Operator.CONV, 1, 0, 1) and kernel == 2  # a row and a column of zeros after the map
        doubling = geometry.operator is Operator.CONV_TRANSPOSE and geometry.stride == 2 and geometry.output_padding == 1
        if dtype != torch.float32:
            reason = f"it computes in float32, not {dtype}"
        elif not (same or two or (doubling and kernel in (3, 5) and 2 * geometry.padding == kernel - 1)):
            reason = (
                "it computes 2 x 2, 3 x 3, 5 x 5 and 7 x 7 convolutions that keep the size, and 3 x 3 and 5 x 5 transposed ones that "
                "double it, "
                f"not {geometry.operator.value} {kernel} of stride {geometry.stride} with padding {geometry.padding}"
            )
    if reason and raise_error:
        raise ValueError(f'engine="winograd": {reason}')
    return reason is None


def _best_map(geometry: Geometry, kernel: int, height: int, width: int) -> WinogradMap:
    """The form with the fewer products on a grid; the larger patch must save 10%, as its transforms cost more."""
    turned = geometry.operator is Operator.CONV_TRANSPOSE and geometry.stride == 1
    if geometry.operator is Operator.CONV_TRANSPOSE and not turned:
        return WinogradMap(WinogradForm(5, 2) if kernel == 3 else WinogradForm(6, 3), kernel, transposed=True)
    if kernel == 2:
        return WinogradMap(WinogradForm(5, 2), kernel)
    if kernel == 7:
        return WinogradMap(WinogradForm(8, 4), kernel, turned=turned)
    small, large = WinogradForm(6, kernel), WinogradForm(8, kernel)
    form = large if large.products(height, width) < 0.9 * small.products(height, width) else small
    return WinogradMap(form, kernel, turned=turned)


def choose_engine(
    geometry: Geometry,
    weight_shape: tuple[int, ...],
    height: int,
    width: int,
    dtype: torch.dtype,
    engine: str = "auto",
    samples: int = 16,
    reads: int = 10,
) -> EngineChoice:
    """Choose how a linear map is computed.

    The rule of ``engine="auto"``, from the measurements in docs/kernels.md. With at least 16 channels on both sides, on a processor with
    matrix units:

    - where torch asks for less than full precision of float32 products (``torch.set_float32_matmul_precision("high")`` or "medium", or CPU
      autocast to bfloat16): matrix units, with two parts of each value or one;
    - else Winograd for convolutions that keep the size, and matrix units with three parts for other maps and for
      gradients of weights over few tiles.

    Elsewhere Winograd wherever it can run. Winograd must save a quarter of the products (tiles past the map's edge counted; half of them
    with 2 x 2 kernels) and have at least 8 tiles: its weights are up to four times as large, and fewer tiles do not pay for reading them.

    Args:
        weight_shape: of the parameter.
        height, width: of the source map (after pooling).
        engine: "auto", "direct", "winograd" or "amx" (wherever they can run at all), perhaps :func:`with_precision`.
        samples: of a time step.
        reads: time steps of a rollout that read the weight.
    """
    return _choose(geometry, weight_shape, height, width, dtype, engine, samples, reads, has_matrix_units())


def check_runs_on_cpu(engine: str) -> None:
    """Raise ``ValueError`` for an engine that needs a GPU."""
    if engine in KERNELS:
        raise ValueError(f'engine="{engine}": it runs on CUDA devices; "auto", "direct", "winograd" and "amx" run on the CPU')


@lru_cache(maxsize=1024)
def _choose(
    geometry: Geometry,
    weight_shape: tuple[int, ...],
    height: int,
    width: int,
    dtype: torch.dtype,
    engine: str,
    samples: int,
    reads: int,
    matrix_units: bool,
) -> EngineChoice:
    engine, _, precision = engine.partition(":")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    check_runs_on_cpu(engine)
    if engine == "direct":
        return EngineChoice(None, ASKED_FOR)
    parts = int(precision or 3)
    units = None
    if engine == "amx" or (engine == "auto" and matrix_units and min(weight_shape[:2]) >= 16):
        try:
            can_run_amx(geometry, weight_shape, dtype, raise_error=True)
            units = replace(
                _amx_map(geometry, weight_shape, parts), packs_late=_packs_late(weight_shape, samples * height * width, parts, reads)
            )
        except ValueError as error:
            if engine == "amx":
                return EngineChoice(None, str(error).split(": ", 1)[1])
    if units and (engine == "amx" or parts < 3):
        return EngineChoice.of(units, ASKED_FOR if engine == "amx" else "matrix units, and torch is asked for less precision")
    choice = _choose_winograd(geometry, weight_shape, height, width, dtype, engine, samples, reads)
    if units is None:
        return choice
    if not isinstance(choice.map, WinogradMap) or choice.map.transposed:
        return EngineChoice.of(units, "this processor has matrix units")
    return EngineChoice(choice.map, f"{choice.reason}; gradients of the weight over few tiles on matrix units", units)


def _choose_winograd(
    geometry: Geometry, weight_shape: tuple[int, ...], height: int, width: int, dtype: torch.dtype, engine: str, samples: int, reads: int
) -> EngineChoice:
    if engine == "auto" and min(weight_shape[:2]) < 16:
        return EngineChoice(None, f"only {min(weight_shape[:2])} channels: packing and transforms would cost more than they save")
    try:
        can_run_winograd(geometry, weight_shape, dtype, raise_error=True)
    except ValueError as error:
        return EngineChoice(None, str(error).split(": ", 1)[1])
    kernel = weight_shape[-1]
    chosen = _best_map(geometry, kernel, height, width)
    saving = height * width * kernel**2 / chosen.products(height, width)
    tiles = samples * chosen.tiles(height, width)
    few = reads <= FEW_READS
    chosen = replace(chosen, hides_transform=tiles not in EXPOSED or few, few_reads=few)
    if engine == "auto":
        if saving < (2 if kernel == 2 else 4 / 3):  # (2 x 2 on 14 x 14, 1.96 times fewer: no faster than matrix units)
            return EngineChoice(None, f"on a {height} x {width} map {chosen.form} saves only {saving:.2g}x of the products")
        if tiles < 8:
            return EngineChoice(None, f"only {tiles} tiles: reading the larger transformed weights would cost more than is saved")
    return EngineChoice.of(chosen, f"{saving:.3g}x fewer products on a {height} x {width} map")


class Chosen(Protocol):
    """A linear map with its engine."""

    choice: EngineChoice


MAX_SUMMED = 8  # kMaxConvTerms of winograd_conv.h and cuda/recurrent_conv.h; the core checks it
MANY_WEIGHT_TILES = 32  # from which on Winograd's gradient of a weight is the faster one (docs/kernels.md)


def can_sum(weights: Sequence[Chosen]) -> bool:
    """Whether one call can compute the sum of these maps."""
    maps = [w.choice.map for w in weights]
    if all(w.choice.kernels("forward") for w in weights) or all(isinstance(m, AmxMap) for m in maps):
        return True
    winograd = [m for m in maps if isinstance(m, WinogradMap)]
    terms = sum(1 if m.transposed else len(m.shifts) for m in winograd)
    return len(winograd) == len(maps) and len({(m.form, m.transposed) for m in winograd}) == 1 and terms <= MAX_SUMMED


def can_end(weight: Chosen) -> bool:
    """Whether the engine of this map takes an :class:`rnndyn_fast.ops.epilogue.Epilogue`."""
    m = weight.choice.map
    return isinstance(m, WinogradMap) or (isinstance(m, AmxMap) and reaches_all(m))


def can_wait(weight: Chosen) -> bool:
    """Whether this map is better computed with its area's step: :func:`can_end`, or by a GPU's fused convolution."""
    return can_end(weight) or weight.choice.kernels("forward") is not None


def kernels_of_sum(weights: Sequence[Chosen]) -> str:
    """Whose kernels compute a sum of maps in one launch on a GPU: where the choices differ Triton's, which take all that either takes."""
    return "fused" if all(w.choice.kernels("forward") == "fused" for w in weights) else "triton"
