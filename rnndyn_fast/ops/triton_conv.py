"""The fused recurrent convolution as Triton kernels: the launches of :mod:`rnndyn_fast.ops.triton_kernels`, which are compiled for the
device at hand (``wgmma`` on sm_90), with the arguments of :func:`rnndyn_fast.ops.fused_conv.recurrent_conv` and of its weight gradient.

float32, float16 and bfloat16; any channels, square kernels. Triton is imported at the first use, and compiles each kernel once
per machine (its cache: ``~/.triton``).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import Use, device_address
from rnndyn_fast.ops.fused_conv import MAX_ADDED, MAX_TERMS, ConvTerm
from rnndyn_fast.optional import install_hint, require

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_VERSION = (3, 4)  # from which on kernels take tuples
MOST_PIXELS = (1 << 31) - (1 << 10)  # counted in int32, the last tile's past the end too
MOST_PHASES = 16  # per direction
MANY_PROGRAMS = 132  # multiprocessors of the largest device
LEAST_SLABS = 16  # of a split of a weight gradient: its sums cost a write and a read of the whole gradient
MOST_SPLITS = 64


@cache
def unavailable() -> str | None:
    """Why there is no Triton here; None if there is."""
    try:
        require("triton")
        import triton

        version = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])
    except ImportError as error:
        return str(error)
    if version < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"triton {least} or later is needed, as PyTorch 2.8 brings it; {triton.__version__} is there: {install_hint('triton')}"
    return None


@cache
def build_id() -> str:
    """Which Triton, and which state of its kernels and of what launches them: a digest; "none" where there is none."""
    if unavailable() is not None:
        return "none"
    require("triton")
    import triton

    digest = hashlib.blake2b(digest_size=6)
    for name in ("triton_kernels.py", "triton_conv.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return f"{triton.__version__} {digest.hexdigest()}"


def why_not(kernel: tuple[int, ...], stride: int, dtype: torch.dtype) -> str | None:
    """Why the Triton convolution cannot compute a map (``kernel``: (height, width), or () of a matrix product); None if it can."""
    if dtype not in DTYPES:
        return f"the Triton convolution computes in float32, float16 and bfloat16, not {dtype}"
    if len(set(kernel)) > 1:
        return f"the Triton convolution takes square kernels, not {kernel[0]} x {kernel[1]}"
    if stride > MOST_PHASES or stride & (stride - 1):  # (so that no sum of maps has more phases)
        return f"the Triton convolution takes strides 1, 2, 4, 8 and {MOST_PHASES}, not {stride}"
    return unavailable()


# ---------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tile:
    """What a program computes: rows x columns, in slabs of ``depth``; and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """As a launch takes them."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def _power(n: int, least: int, most: int) -> int:
    """The next power of two, within limits."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def _columns(pixels: int, channels: int) -> int:
    """Of a tile: as many as leave the fewest of them empty, and few where large tiles would leave multiprocessors without work."""
    if channels <= 64:
        return _power(channels, 16, 64)
    many = -(-pixels // 128) * -(-channels // 128) >= MANY_PROGRAMS
    return 128 if many and -channels % 128 <= -channels % 64 else 64


def tile_of(rows: int, columns: int, depth: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]) -> Tile:
    """``depth``: the most that a slab has use for. Devices whose tensor cores read shared memory themselves (``wgmma``, ``tcgen05``) take
    slabs of 128 bytes, as wide as its swizzle; others, which hold operands in registers, slabs of half that, and one stage more."""
    whole = capability[0] in (9, 10) and precision != "ieee"
    most = (128 if whole else 64) // dtype.itemsize
    return Tile(rows, columns, _power(depth, 16, most), 8 if rows * columns > 4096 else 4, 3 if whole else 4)


def conv_tile(
    samples: int, height: int, width: int, channels: int, depth: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]
) -> Tile:
    """Of :func:`recurrent_conv`. ``depth``: the most channels of a term."""
    pixels = samples * height * width
    columns = _columns(pixels, channels)
    # (In full float32, without tensor cores, a thread's registers hold no larger tile.)
    large = -(-pixels // 128) * -(-channels // columns) >= MANY_PROGRAMS and not (precision == "ieee" and columns == 128)
    return tile_of(128 if large else 64, columns, depth, dtype, precision, capability)


def weight_grad_tile(rows: int, columns: int, dtype: torch.dtype, precision: str, capability: tuple[int, int]) -> Tile:
    """Of :func:`recurrent_conv_weight_grad`, for those numbers of channels."""
    size = 128 if min(rows, columns) > 64 and precision != "ieee" else 64
    return tile_of(size if rows > 16 else 16, _power(columns, 16, size), 64, dtype, precision, capability)


def recurrent_conv_moment_groups(samples: int, height: int, width: int, channels: int) -> list[int]:
    """How :func:`recurrent_conv` leaves moments: [N, groups, 2], and what ``area_step_forward`` must know of them."""
    columns = _columns(samples * height * width, channels)
    tiles = -(-channels // columns)
    return [height * width * tiles, tiles, columns, channels - (tiles - 1) * columns]


# ---------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Launch:
    """A kernel of :mod:`rnndyn_fast.ops.triton_kernels` by name, with what it is launched with."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """On the device's current stream.

        Raises:
            RuntimeError: the kernel cannot be compiled, loaded or launched; the message names it.
        """
        from rnndyn_fast.ops import triton_kernels

        # (Triton launches on the current device.)
        where: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with where:
                getattr(triton_kernels, self.kernel)[self.grid](*self.arguments, **self.options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's errors have no base class of their own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = f": {lines[-1]}" if lines else ""
            raise RuntimeError(f"{self.kernel} of the Triton convolution: {type(error).__name__}{said}") from error


def _vector(channels: int) -> int:
    """The largest power of two, up to 16, that divides them."""
    return math.gcd(channels, 16)


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether elements are counted in int64."""
    return any(t is not None and t.numel() >= MOST_PIXELS for t in tensors)


def precision_of(dtype: torch.dtype, *, product: bool) -> str:
    """Of products of float32 maps, "tf32" or "ieee", as the vendor's would be: convolutions follow ``torch.backends.cudnn.allow_tf32``,
    matrix products ``torch.set_float32_matmul_precision``. (Those of half precision have one.)"""
    if dtype != torch.float32:
        return "tf32"
    allowed = torch.get_float32_matmul_precision() != "highest" if product else torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "ieee"


def _precision(terms: Sequence[ConvTerm], value: Tensor) -> str:
    """Of a sum: the best that one of its terms asks for."""
    kinds = [value.shape[1:3] == t.x.shape[1:3] == t.weight.shape[1:3] == (1, 1) for t in terms]
    return min(precision_of(value.dtype, product=product) for product in kinds)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


class _Checked:
    """Tensors of one launch, all on one device; each is returned as it came, or ``ValueError`` says what was expected."""

    def __init__(self, like: Tensor) -> None:
        self.device, self.dtype = like.device, like.dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"expected float32, float16 or bfloat16, got {self.dtype}")

    def __call__(self, tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor | None:
        device_address(tensor, name, shape, dtype or self.dtype, self.device, Use.READ)
        return tensor

    @staticmethod
    def pixels(name: str, *tensors: Tensor) -> None:
        for t in tensors:
            if t.shape[0] * t.shape[1] * t.shape[2] > MOST_PIXELS:
                raise ValueError(f"{name}: expected maps of at most {MOST_PIXELS} pixels in all, got {list(t.shape)}")


def conv_launch(
    terms: Sequence[ConvTerm],
    bias: Tensor | None,
    added: Sequence[Tensor],
    drive: Tensor | None,
    value: Tensor,
    modulator_sum: Tensor | None,
    moments: Tensor | None,
    capability: tuple[int, int],
) -> Launch:
    """:func:`recurrent_conv` as it is launched on a device of that compute capability."""
    n, h, w, c = full = tuple(value.shape)
    checked = _Checked(value)
    for what, given, most in (("terms", len(terms), MAX_TERMS), ("added", len(added), MAX_ADDED)):
        if given > most or given < (what == "terms"):
            raise ValueError(f"{what}: expected {int(what == 'terms')} to {most}, got {given}")
    if modulator_sum is not None and drive is None:
        raise ValueError("modulator_sum: expected with a drive only")
    geometry, phases = [], 1
    for k, term in enumerate(terms):
        _, height, width, channels = term.x.shape
        kernel = term.weight.shape[1]
        checked(term.x, f"terms[{k}].x", (n, height, width, channels))
        checked(term.weight, f"terms[{k}].weight", (c, kernel, kernel, channels))
        if term.stride < 1:
            raise ValueError(f"terms[{k}].stride: expected at least 1, got {term.stride}")
        if term.transposed:
            phases = math.lcm(phases, term.stride)
        sizes = (height, width, channels // _vector(channels), kernel, term.stride, term.padding)
        geometry.append(tuple(2 * size + 3 for size in sizes))  # as the kernel takes them
    if phases > MOST_PHASES:
        raise ValueError(f"terms: expected transposed strides whose least common multiple is at most {MOST_PHASES}, got {phases}")
    checked(bias, "bias", (c,), torch.float32)
    for k, one in enumerate(added):
        checked(one, f"added[{k}]", full)
    checked(drive, "drive", full)
    checked(modulator_sum, "modulator_sum", full)
    checked(moments, "moments", (n, recurrent_conv_moment_groups(*full)[0], 2), torch.float32)
    checked.pixels("terms", value, *(t.x for t in terms))

    precision = _precision(terms, value)
    tile = conv_tile(n, h, w, c, max(t.x.shape[3] for t in terms), value.dtype, precision, capability)
    tiles = -(-n * -(-h // phases) * -(-w // phases) // tile.rows)  # of the first phase, which has the most pixels
    options: dict[str, Any] = dict(
        TRANSPOSED=tuple(t.transposed for t in terms), VECTORS=tuple(_vector(t.x.shape[3]) for t in terms), VECTOR=_vector(c),
        PHASES=phases, WIDE=_is_wide(value, *(t.x for t in terms), *(t.weight for t in terms)), PRECISION=precision,
    )  # fmt: skip
    arguments = (
        tuple(t.x for t in terms), tuple(t.weight for t in terms), tuple(geometry), bias, tuple(added), drive, value, modulator_sum,
        moments, n, h, w, c // _vector(c),
    )  # fmt: skip
    return Launch("recurrent_conv_kernel", (tiles * -(-c // tile.columns), phases**2), arguments, {**options, **tile.options})


def recurrent_conv(
    terms: Sequence[ConvTerm],
    bias: Tensor | None,  # [C] float32
    added: Sequence[Tensor],  # each [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C]
    value: Tensor,  # [N, H, W, C]
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    moments: Tensor | None = None,  # [N, groups, 2] float32
) -> None:
    """value = s, or drive * (1 + s), with s the sum of the terms, the bias and what is added.

    Value, modulator_sum (1 + s) and moments (of :func:`recurrent_conv_moment_groups`) are written. No output may overlap an input, except
    that ``value`` may be an ``added`` or ``drive``.
    """
    if value.numel():
        conv_launch(terms, bias, added, drive, value, modulator_sum, moments, _capability(value.device)).run(value.device)


def divisor(d: int) -> tuple[int, int]:
    """Factor and shift with which n // d = n * factor >> shift, for 0 <= n < 2^31 and 0 < d < 2^31: 2^shift / d rounded up, whose relative
    error is below 2^-31."""
    shift = 31 + (d - 1).bit_length()
    return -(-(1 << shift) // d), shift


def weight_grad_launch(rows: Tensor, gathered: Tensor, out: Tensor, stride: int, padding: int, tile: Tile, precision: str) -> Launch:
    """:func:`recurrent_conv_weight_grad` as it is launched; ``out``: [splits, A, K, K, B]."""
    (n, h, w, a), (_, height, width, b), (splits, _, kernel) = rows.shape, gathered.shape, out.shape[:3]
    slabs = -(-n * h * w // tile.depth)
    arguments = (
        rows, gathered, out, n * h * w, h, w, a // _vector(a), height, width, b // _vector(b), kernel, stride, padding, -(-slabs // splits),
        *divisor(h * w), *divisor(w),
    )  # fmt: skip
    options = dict(ROW_VECTOR=_vector(a), GATHERED_VECTOR=_vector(b), WIDE=_is_wide(rows, gathered, out), PRECISION=precision)
    grid = (-(-a // tile.rows) * -(-b // tile.columns), kernel**2, splits)
    return Launch("recurrent_conv_weight_grad_kernel", grid, arguments, {**options, **tile.options})


def weight_grad_splits(pixels: int, rows: int, columns: int, kernel: int, tile: Tile, multiprocessors: int) -> int:
    """Into how many parts the pixels go, so that all programs run at once: two small tiles fit on a multiprocessor, or one large one."""
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns) * kernel**2
    at_once = multiprocessors * (2 if tile.warps == 4 else 1)
    return max(1, min(at_once // tiles, -(-pixels // tile.depth) // LEAST_SLABS, MOST_SPLITS))


def recurrent_conv_weight_grad(
    rows: Tensor,  # [N, H, W, A]
    gathered: Tensor,  # [N, H', W', B]
    grad_weight: Tensor,  # [A, K, K, B] float32
    stride: int,
    padding: int,
) -> None:
    """grad_weight is written. Of a convolution, rows are the output's gradient and gathered is its input; of a transposed one, the other
    way round. Deterministic on one kind of device: splits, of which there are as many as it runs at once, are summed in order."""
    (n, h, w, a), (_, height, width, b), kernel = rows.shape, gathered.shape, grad_weight.shape[1]
    checked = _Checked(rows)
    checked(rows, "rows", (n, h, w, a))
    checked(gathered, "gathered", (n, height, width, b))
    checked(grad_weight, "grad_weight", (a, kernel, kernel, b), torch.float32)
    checked.pixels("rows, gathered", rows, gathered)
    if not rows.numel() or not gathered.numel():
        grad_weight.zero_()
        return
    precision = precision_of(rows.dtype, product=h == w == height == width == kernel == 1)
    tile = weight_grad_tile(a, b, rows.dtype, precision, _capability(rows.device))
    splits = weight_grad_splits(n * h * w, a, b, kernel, tile, _multiprocessors(rows.device))
    out = grad_weight[None] if splits == 1 else torch.empty((splits, *grad_weight.shape), dtype=torch.float32, device=rows.device)
    weight_grad_launch(rows, gathered, out, stride, padding, tile, precision).run(rows.device)
    if splits > 1:
        torch.sum(out, 0, out=grad_weight)
