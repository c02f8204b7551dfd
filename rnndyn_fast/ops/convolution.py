"""Linear maps of a rollout: one place decides how they are computed.

Two engines: ``winograd`` (our kernels, :mod:`rnndyn_fast.ops.winograd_conv`) and ``direct`` (the vendor's convolution and matrix product,
through torch). Maps are channels-last and contiguous, [M, H, W, C], with M any number of samples and time steps.
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
from rnndyn_fast.ops.buffers import release_buffers
from rnndyn_fast.ops.winograd_conv import PackedWeight, WinogradForm, WinogradMap, pack_weight, winograd_conv, winograd_weight_grad

ENGINES = ("auto", "direct", "winograd")
MAX_SUMMED = 8  # kMaxConvTerms of winograd_conv.h; the core checks it


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
    """An operator with its stride and padding, the same in both directions; the weight tells the rest."""

    operator: Operator
    stride: int = 1
    padding: int = 0
    output_padding: int = 0


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a connection and why; ``winograd`` is None for the direct one."""

    winograd: WinogradMap | None
    reason: str

    def __str__(self) -> str:
        return f"winograd {self.winograd.form}" if self.winograd else "direct"


def can_run_winograd(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the Winograd engine computes this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = _launch.unavailable
    if reason is None and geometry.operator is Operator.LINEAR:
        reason = "a matrix product"
    elif reason is None:
        kernel = weight_shape[-1]
        same = geometry.operator is Operator.CONV and geometry.stride == 1
        doubling = geometry.operator is Operator.CONV_TRANSPOSE and geometry.stride == 2 and geometry.output_padding == 1
        if dtype != torch.float32:
            reason = f"it computes in float32, not {dtype}"
        elif not (same or doubling) or kernel not in (3, 5) or 2 * geometry.padding != kernel - 1:
            reason = (
                "it computes 3 x 3 and 5 x 5 convolutions that keep the size, and transposed ones that double it, not "
                f"{geometry.operator.value} {kernel} of stride {geometry.stride} with padding {geometry.padding}"
            )
    if reason and raise_error:
        raise ValueError(f'engine="winograd": {reason}')
    return reason is None


def _best_map(geometry: Geometry, kernel: int, height: int, width: int) -> WinogradMap:
    """The form with the fewer products on a grid; the larger patch must save 10%, as its transforms cost more."""
    if geometry.operator is Operator.CONV_TRANSPOSE:
        return WinogradMap(WinogradForm(5, 2) if kernel == 3 else WinogradForm(6, 3), kernel, transposed=True)
    small, large = WinogradForm(6, kernel), WinogradForm(8, kernel)
    return WinogradMap(large if large.products(height, width) < 0.9 * small.products(height, width) else small, kernel)


@lru_cache(maxsize=1024)
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

    The rule of ``engine="auto"``, from the measurements in docs/kernels.md: Winograd wherever it can run, with at least 16 channels on
    both sides, where it saves a quarter of the products (tiles past the map's edge counted), and where there are at least 8 tiles: its
    weights are up to four times as large, and fewer tiles do not pay for reading them.

    Args:
        weight_shape: of the parameter.
        height, width: of the source map (after pooling).
        engine: "auto", "direct", or "winograd" (wherever it can run at all).
        samples: of a time step.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "direct":
        return EngineChoice(None, "asked for")
    try:
        can_run_winograd(geometry, weight_shape, dtype, raise_error=True)
    except ValueError as error:
        return EngineChoice(None, str(error).split(": ", 1)[1])
    kernel = weight_shape[-1]
    chosen = _best_map(geometry, kernel, height, width)
    products = chosen.form.products(height, width)
    saving = height * width * kernel**2 / (products * (4 if chosen.transposed else 1))
    if engine == "auto":
        tiles = samples * products // chosen.form.patch**2
        if min(weight_shape[:2]) < 16:
            return EngineChoice(None, f"only {min(weight_shape[:2])} channels: the transforms would cost more than they save")
        if saving < 4 / 3:
            return EngineChoice(None, f"on a {height} x {width} map {chosen.form} saves only {saving:.2g}x of the products")
        if tiles < 8:
            return EngineChoice(None, f"only {tiles} tiles: reading the larger transformed weights would cost more than is saved")
    return EngineChoice(chosen, f"{saving:.3g}x fewer products on a {height} x {width} map")


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
    def packed(self) -> PackedWeight:
        """In the Winograd domain, for the forward convolution."""
        assert self.choice.winograd is not None
        return (_kept_pack if self.keep else pack_weight)(self.choice.winograd, self.weight)

    @cached_property
    def packed_backward(self) -> PackedWeight:
        """In the Winograd domain, for the gradient of the data."""
        assert self.choice.winograd is not None
        return pack_weight(self.choice.winograd, self.weight, backward=True)


_KEPT_BYTES = 512 * 1024 * 1024
_kept: OrderedDict[tuple[int, tuple[int, ...], WinogradMap], tuple[Tensor, PackedWeight]] = OrderedDict()
_kept_lock = threading.Lock()


def _kept_pack(m: WinogradMap, weight: Tensor) -> PackedWeight:
    """Packed weights of earlier rollouts. A weight is compared with the copy it was packed from: in-place changes can hide from version
    counters (``.data``), and the comparison costs a quarter of packing."""
    key = (weight.data.untyped_storage()._cdata, tuple(weight.shape), m)
    with _kept_lock:
        entry = _kept.get(key)
        if entry is not None and torch.equal(entry[0], weight):
            _kept.move_to_end(key)
            return entry[1]
        packed = pack_weight(m, weight)
        _kept[key] = (weight.detach().clone(), packed)
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(w.nbytes + p.nbytes for w, p in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
        return packed


def release_memory() -> int:
    """Give back to the system what rollouts keep for the next one: packed weights, and buffers that no tensor uses.

    Returns: the bytes given back. The next rollout takes and makes them anew.
    """
    with _kept_lock:
        packed = sum(w.nbytes for w, _ in _kept.values())  # (the packed forms lie in the buffers)
        _kept.clear()
    return packed + release_buffers()


def convolve(
    weight: Weight,
    x: Tensor,  # [M, H, W, C]
) -> Tensor:
    """The linear map, without bias. Returns [M, H', W', C'], contiguous."""
    geometry = weight.geometry
    if weight.choice.winograd is not None:
        return winograd_conv([x], [weight.packed])
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
    return len({w.choice.winograd for w in weights}) == 1 and weights[0].choice.winograd is not None


def convolve_sum(
    weights: Sequence[Weight],
    xs: Sequence[Tensor],  # each [M, H, W, C]
) -> Tensor:
    """The sum of several maps, accumulated in the Winograd domain with one inverse transform: [M, H', W', C']."""
    return winograd_conv(xs, [w.packed for w in weights])


def convolve_backward(
    weight: Weight,
    grad: Tensor,  # [M, H', W', C']
    x: Tensor | torch.Size,  # [M, H, W, C]; its shape is enough where need_weight is False
    *,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`: of x, [M, H, W, C] contiguous, and of the weight in the parameter's shape; None where not needed."""
    geometry, m = weight.geometry, weight.choice.winograd
    if m is not None:
        grad_x = winograd_conv([grad], [weight.packed_backward]) if need_x else None
        return grad_x, winograd_weight_grad(m, weight.weight, x, grad) if need_weight and isinstance(x, Tensor) else None
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
