"""Linear maps of a rollout: one place decides how they are computed.

On the CPU ``amx`` (matrix units, :mod:`rnndyn_fast.ops.amx_conv`) and ``winograd`` (:mod:`rnndyn_fast.ops.winograd_conv`), on CUDA devices
``fused`` (tensor cores, :mod:`rnndyn_fast.ops.fused_conv`), and on both ``direct`` (the vendor's convolution and matrix product, through
torch). Maps are channels-last and contiguous, [M, H, W, C], with M any number of samples and time steps.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.amx_conv import (
    MAX_PHASES,
    MAX_TAPS,
    AmxMap,
    PackedAmxWeight,
    amx_conv,
    amx_weight_grad,
    pack_amx_weight,
    reaches_all,
)
from rnndyn_fast.ops.buffers import empty, release_buffers
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.fused_conv import PASSES, FusedWeight, fused_sum
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradForm, WinogradMap, pack_weight, winograd_conv, winograd_weight_grad

ENGINES = ("auto", "direct", "winograd", "amx", "fused")
ASKED_FOR = "asked for"  # why, where the user chose an engine
DEVICE_ENGINES = ("auto", "direct", "fused")
# torch.set_float32_matmul_precision: bfloat16 parts of a float32 value. Three carry all its bits.
_PARTS = {"highest": 3, "high": 2, "medium": 1}
MAX_SUMMED = 8  # kMaxConvTerms of winograd_conv.h and cuda/recurrent_conv.h; the core checks it


class Operator(enum.Enum):
    """The linear map of a connection.

    CONV: cross-correlation, weight [C_target, C_source, K, K]; CONV_TRANSPOSE: its transpose, weight [C_source, C_target, K, K]; LINEAR: a
    dense map between 1 x 1 maps, weight [C_target, C_source]; IDENTITY: no parameters.
    """

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    IDENTITY = "identity"


@dataclass(frozen=True)
class Geometry:
    """An operator with its stride and padding, the same in both directions; the weight tells the rest.

    ``output_padding``: transposed, as torch takes it; of a convolution zeros below and right of the map, beyond the padding, which only
    the engine of matrix units reads.
    """

    operator: Operator
    stride: int = 1
    padding: int = 0
    output_padding: int = 0


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a connection and why; a map is None for the direct one.

    ``map`` computes the connection and the gradient of its source, ``grad_map`` the gradient of its weight; but over many tiles
    (all time steps of a rollout) Winograd's ``map`` does, as what it reads and writes once is then shared by many. On a GPU there are no
    maps: ``fused`` names the passes (of :data:`rnndyn_fast.ops.fused_conv.PASSES`) that the fused convolution computes.
    """

    map: WinogradMap | AmxMap | None
    reason: str
    grad_map: WinogradMap | AmxMap | None = None
    fused: tuple[str, ...] = ()

    @classmethod
    def of(cls, m: WinogradMap | AmxMap | None, reason: str) -> EngineChoice:
        """The same for both."""
        return cls(m, reason, m)

    def __str__(self) -> str:
        if self.fused:
            return "fused" if len(self.fused) == len(PASSES) else f"fused {'+'.join(self.fused)}"
        if isinstance(self.map, WinogradMap):
            return f"winograd {self.map.form}"
        return f"amx {self.map}" if self.map else "direct"


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question; it guards on autocast and on precision itself
def with_precision(engine: str) -> str:
    """The engine with the precision that is asked for now, as :func:`choose_engine` takes it: "auto", "auto:2", ...

    CPU autocast to bfloat16 asks for one part of a value, ``torch.set_float32_matmul_precision`` for three, two or one.
    """
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    parts = 1 if autocast else _PARTS[torch.get_float32_matmul_precision()]
    return engine if parts == 3 else f"{engine}:{parts}"


def has_matrix_units() -> bool:
    """Whether the native core runs on matrix units here (elsewhere their engine is emulated, for tests)."""
    return _launch.unavailable is None and _launch.isa() == "amx"


def can_run_amx(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the engine of matrix units computes this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = _launch.unavailable
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


def _amx_map(geometry: Geometry, weight_shape: tuple[int, ...], parts: int) -> AmxMap:
    if geometry.operator is Operator.LINEAR:
        return AmxMap((1, 1), parts=parts)
    kernel = (weight_shape[2], weight_shape[3])
    transposed = geometry.operator is Operator.CONV_TRANSPOSE
    return AmxMap(kernel, geometry.stride, geometry.padding, geometry.output_padding, transposed, parts)


def can_run_winograd(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the Winograd engine computes this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = _launch.unavailable
    if reason is None and geometry.operator is Operator.LINEAR:
        reason = "a matrix product"
    elif reason is None:
        kernel = weight_shape[-1]
        same = geometry.stride == 1 and geometry.output_padding == 0
        doubling = geometry.operator is Operator.CONV_TRANSPOSE and geometry.stride == 2 and geometry.output_padding == 1
        if dtype != torch.float32:
            reason = f"it computes in float32, not {dtype}"
        elif not (same or doubling) or kernel not in ((3, 5, 7) if same else (3, 5)) or 2 * geometry.padding != kernel - 1:
            reason = (
                "it computes 3 x 3, 5 x 5 and 7 x 7 convolutions that keep the size, and 3 x 3 and 5 x 5 transposed ones that double it, "
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
) -> EngineChoice:
    """Choose how a linear map is computed.

    The rule of ``engine="auto"``, from the measurements in docs/kernels.md. With at least 16 channels on both sides, on a processor with
    matrix units:

    - where torch asks for less than full precision of float32 products (``torch.set_float32_matmul_precision("high")`` or "medium", or CPU
      autocast to bfloat16): matrix units, with two parts of each value or one;
    - else Winograd for convolutions that keep the size, and matrix units with three parts for other maps and for
      gradients of weights over few tiles.

    Elsewhere Winograd wherever it can run. Winograd must save a quarter of the products (tiles past the map's edge counted) and have at
    least 8 tiles: its weights are up to four times as large, and fewer tiles do not pay for reading them.

    Args:
        weight_shape: of the parameter.
        height, width: of the source map (after pooling).
        engine: "auto", "direct", "winograd" or "amx" (wherever they can run at all), perhaps :func:`with_precision`.
        samples: of a time step.
    """
    return _choose(geometry, weight_shape, height, width, dtype, engine, samples, has_matrix_units())


@lru_cache(maxsize=1024)
def _choose(
    geometry: Geometry,
    weight_shape: tuple[int, ...],
    height: int,
    width: int,
    dtype: torch.dtype,
    engine: str,
    samples: int,
    matrix_units: bool,
) -> EngineChoice:
    engine, _, precision = engine.partition(":")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "fused":
        raise ValueError('engine="fused": it runs on CUDA devices; "auto", "direct", "winograd" and "amx" run on the CPU')
    if engine == "direct":
        return EngineChoice(None, ASKED_FOR)
    parts = int(precision or 3)
    units = None
    if engine == "amx" or (engine == "auto" and matrix_units and min(weight_shape[:2]) >= 16):
        try:
            can_run_amx(geometry, weight_shape, dtype, raise_error=True)
            units = _amx_map(geometry, weight_shape, parts)
        except ValueError as error:
            if engine == "amx":
                return EngineChoice(None, str(error).split(": ", 1)[1])
    if units and (engine == "amx" or parts < 3):
        return EngineChoice.of(units, ASKED_FOR if engine == "amx" else "matrix units, and torch is asked for less precision")
    choice = _choose_winograd(geometry, weight_shape, height, width, dtype, engine, samples)
    if units is None:
        return choice
    if not isinstance(choice.map, WinogradMap) or choice.map.transposed:
        return EngineChoice.of(units, "this processor has matrix units")
    return EngineChoice(choice.map, f"{choice.reason}; gradients of the weight over few tiles on matrix units", units)


def _choose_winograd(
    geometry: Geometry, weight_shape: tuple[int, ...], height: int, width: int, dtype: torch.dtype, engine: str, samples: int
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
    if engine == "auto":
        tiles = samples * chosen.tiles(height, width)
        if saving < 4 / 3:
            return EngineChoice(None, f"on a {height} x {width} map {chosen.form} saves only {saving:.2g}x of the products")
        if tiles < 8:
            return EngineChoice(None, f"only {tiles} tiles: reading the larger transformed weights would cost more than is saved")
    return EngineChoice.of(chosen, f"{saving:.3g}x fewer products on a {height} x {width} map")


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
        return FusedWeight(weight, self.geometry.stride, self.geometry.padding, self.geometry.output_padding, transposed)

    @cached_property
    def packed(self) -> Packed:
        """As our engines take it, for the forward convolution."""
        assert self.choice.map is not None
        return (_kept_pack if self.keep else _pack)(self.choice.map, self.weight)

    @cached_property
    def packed_backward(self) -> Packed:
        """As our engines take it, for the gradient of the data."""
        assert self.choice.map is not None
        return _pack(self.choice.map, self.weight, backward=True)

    def drop_packed(self) -> None:
        """Give up what is packed; it is packed anew when it is wanted again."""
        for kind in ("packed", "packed_backward"):
            self.__dict__.pop(kind, None)

    def drop_packed_forward(self) -> None:
        """Give up what was packed for the forward convolution; it is packed anew when it is wanted again."""
        self.__dict__.pop("packed", None)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of a map of that size."""
        m = self.choice.map
        if isinstance(m, AmxMap):
            return m.output_size(height, width)
        return (2 * height, 2 * width) if m is not None and m.transposed else (height, width)


Packed = PackedWeight | PackedAmxWeight


def _pack(m: WinogradMap | AmxMap, weight: Tensor, *, backward: bool = False) -> Packed:
    if isinstance(m, AmxMap):
        return pack_amx_weight(m, weight, backward=backward)
    return pack_weight(m, weight, backward=backward)


_KEPT_BYTES = 512 * 1024 * 1024
_kept: OrderedDict[tuple[int, tuple[int, ...], WinogradMap | AmxMap], tuple[tuple[int, int], Packed]] = OrderedDict()
_kept_lock = threading.Lock()


def _kept_pack(m: WinogradMap | AmxMap, weight: Tensor) -> Packed:
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


def release_memory() -> int:
    """Give back to the system what rollouts keep for the next one: packed weights, and buffers that no tensor uses.

    Returns: the bytes given back. The next rollout takes and makes them anew.
    """
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
    y = _direct(weight, x)
    return y if out is None else out.copy_(y)


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


def can_sum(weights: Sequence[Weight]) -> bool:
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


def can_end(weight: Weight) -> bool:
    """Whether the engine of this map takes an :class:`Epilogue`."""
    m = weight.choice.map
    return isinstance(m, WinogradMap) or (isinstance(m, AmxMap) and reaches_all(m))


def can_wait(weight: Weight) -> bool:
    """Whether this map is better computed with its area's step: :func:`can_end`, or by a GPU's fused convolution."""
    return can_end(weight) or "forward" in weight.choice.fused


def _sum(
    weights: Sequence[Weight],
    xs: Sequence[Tensor],
    out: Tensor | None = None,
    epilogue: Epilogue | None = None,
    accumulate: bool = False,
) -> Tensor:
    if weights[0].choice.map is None:  # a GPU's fused convolution
        return fused_sum([w.fused for w in weights], xs, out)
    packed = [w.packed for w in weights]
    if all(isinstance(w, PackedWeight) for w in packed):
        return winograd_conv(xs, [w for w in packed if isinstance(w, PackedWeight)], out, epilogue, accumulate=accumulate)
    if out is None:
        samples, height, width, _ = xs[0].shape
        out = empty((samples, *weights[0].output_size(height, width), packed[0].channels), torch.float32)
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
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`: of x, [M, H, W, C] contiguous, and of the weight in the parameter's shape; None where not needed.

    ``into``: to which the gradient of x is added, and which is then returned for it.
    """
    geometry, m = weight.geometry, weight.choice.map
    if m is not None:
        grad_weight = _weight_grad(weight, x, grad) if need_weight and isinstance(x, Tensor) else None
        return _data_grad(weight, grad, x.shape if isinstance(x, Tensor) else x, into) if need_x else None, grad_weight
    if into is not None:
        grad_x, grad_weight = convolve_backward(weight, grad, x, need_x=need_x, need_weight=need_weight)
        return None if grad_x is None else into.add_(grad_x), grad_weight
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
    if isinstance(packed, PackedWeight):
        return winograd_conv([grad], [packed], into, accumulate=into is not None)
    return amx_conv(grad, packed, empty(shape, torch.float32) if into is None else into, accumulate=into is not None)


_MANY_TILES = 96  # from which on Winograd's gradient of a weight is the faster one (docs/kernels.md)


def _weight_grad(weight: Weight, x: Tensor, grad: Tensor) -> Tensor:
    m, own = weight.choice.grad_map, weight.choice.map
    assert m is not None
    if isinstance(own, WinogradMap) and x.shape[0] * own.tiles(*x.shape[1:3]) >= _MANY_TILES:
        m = own
    if isinstance(m, AmxMap):
        return amx_weight_grad(m, weight.weight, x, grad)
    return winograd_weight_grad(m, weight.weight, x, grad)
