"""Launches of the CUDA kernels: arguments are checked and handed to the native module ``_cuda``. Addresses and streams come from
:mod:`rnndyn_fast.ops._launch`.

Maps are channels-last and contiguous, float32, float16 or bfloat16; parameters, statistics and sums over time are float32. Nothing here
synchronises, and nothing is allocated but scratch, from torch's allocator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import Use, device_address, device_queue, first_element

unavailable: str | None = None  # why there are no CUDA kernels, if there are none
_module: Any = None
try:
    from rnndyn_fast import _cuda as _module  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    unavailable = f"this build has no CUDA kernels ({error})"

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def build_info() -> dict[str, Any]:
    """What the CUDA kernels were built with and for; raises ``ImportError`` with the reason where there are none."""
    if unavailable:
        raise ImportError(unavailable)
    return {**_module.build_info(), "devices": _module.device_count()}


@cache
def device_error(index: int) -> str | None:
    """Why the kernels cannot run on a CUDA device of this machine; None if they can. Asked once, when the device is in use already."""
    error = _module.device_error(index)
    if not error:
        return None
    info = _module.build_info()
    driver = info["driver"]
    supported = f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is no driver"
    return f"the CUDA kernels cannot run on cuda:{index}: {error} (built by nvcc {info['nvcc']} for {info['architectures']}; {supported})"


def module() -> Any:
    """The native module ``_cuda``."""
    return _module


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def check_device(device: torch.device) -> None:
    """Raise ``ValueError`` for a CUDA device that is not there, with the reason where there is none at all."""
    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else f"none that torch can use ({why_no_device()})"
        raise ValueError(f"device: this machine's CUDA devices are {there}, got {device}")


def why_no_device() -> str:
    """Why torch sees no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old: torch says which
        return str(error).strip().splitlines()[0].split(". ")[0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "the driver shows none" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r} shows none"


def why_not(tensor: Tensor, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> str | None:
    """Why a CUDA tensor cannot be used, of these dtypes; None if it can."""
    if unavailable:
        return unavailable
    major, minor = capability(tensor.device)
    if major < 8:
        return f"{tensor.device} has compute capability {major}.{minor}; the kernels need 8.0 or later"
    if error := device_error(tensor.device.index or 0):
        return error
    if tensor.dtype not in dtypes:
        return f"it has {tensor.dtype} on {tensor.device}; expected {' or '.join(str(d) for d in dtypes)}"
    return None


class Launch:
    """Addresses of one launch's tensors, all of them on one device, and the device with its stream.

    Args:
        vectors_of: channels of a kernel whose loads and stores are of 16 bytes where the channels fill them, whatever the addresses are.
            Tensors that begin elsewhere (views of flattened parameters, say) are replaced by copies; :meth:`run` copies results back.
    """

    def __init__(self, like: Tensor, *, vectors_of: int = 0) -> None:
        self.device = like.device
        self.dtype = like.dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"expected float32, float16 or bfloat16, got {self.dtype}")
        self.queue = device_queue(self.device)
        vector = 16 // self.dtype.itemsize
        self._vector = vector if vectors_of and vectors_of % vector == 0 else 0
        self._copies: list[Tensor] = []  # held until the launch, after which the allocator gives their memory to later work of the stream
        self._results: list[tuple[Tensor, Tensor]] = []  # where the kernel writes, and where the caller wants it

    def _aligned(self, tensor: Tensor | None, use: Use) -> Tensor | None:
        """The tensor, or a copy where the kernel's loads or stores are wider than its address allows."""
        if tensor is None or not self._vector or not tensor.is_contiguous():
            return tensor
        if first_element(tensor) % (self._vector if tensor.dtype == torch.uint8 else 16) == 0:
            return tensor
        copy = torch.empty_like(tensor) if use is Use.WRITE else tensor.clone()
        if use is Use.READ:
            self._copies.append(copy)
        else:
            self._results.append((copy, tensor))
        return copy

    def _address(self, tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype, use: Use) -> int:
        return device_address(self._aligned(tensor, use), name, shape, dtype, self.device, use)

    def run(self, launch: Callable[..., None], *arguments: Any) -> None:
        """Launch, and bring results to where the caller wants them."""
        launch(*arguments)
        for written, wanted in self._results:
            wanted.copy_(written)

    def read(self, tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
        return self._address(tensor, name, shape, dtype or self.dtype, Use.READ)

    def rows(self, tensor: Tensor | None, name: str, shape: Sequence[int]) -> int:
        """Of rows that are contiguous, but may lie apart."""
        return device_address(tensor, name, shape, self.dtype, self.device, Use.READ, rows_apart=True)

    def per_sample(self, tensor: Tensor | None, name: str, samples: int, use: Use) -> int:
        """Of a float32 for each sample, which kernels read and write one by one."""
        return device_address(tensor, name, (samples,), torch.float32, self.device, use)

    def terms(self, tensors: Sequence[Tensor], name: str, shape: Sequence[int]) -> list[int]:
        return [self.read(t, f"{name}[{i}]", shape) for i, t in enumerate(tensors)]

    def write(self, tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
        return self._address(tensor, name, shape, dtype or self.dtype, Use.WRITE)

    def update(self, tensor: Tensor | None, name: str, shape: Sequence[int]) -> int:
        """A float32 sum that is added to."""
        return self._address(tensor, name, shape, torch.float32, Use.UPDATE)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def room_of_sum(self, total: Tensor | None, terms: Sequence[Tensor], bias: Tensor | None) -> Tensor | None:
        """Where the kernel sums terms and bias: where the caller wants it, else in scratch; None: one term is the sum."""
        if total is not None or (bias is None and len(terms) < 2):
            return total
        return self.scratch(*terms[0].shape, dtype=self.dtype) if terms else None


def area_step_forward(
    drives: Sequence[Tensor],  # each [N, H, W, C]; none where value is complete
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C] float32
    modulator_bias: Tensor | None,  # [C] float32
    modulator_complete: bool,
    gamma: Tensor | None,  # [H, W, C] float32
    beta: Tensor | None,  # [H, W, C] float32
    eps: float,
    rectify: bool,
    value: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    state: Tensor | None,  # [N, H, W, C]
    max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    mean_pooled: Tensor | None,  # [N, 1, 1, C]
    mean: Tensor | None,  # [N] float32
    rstd: Tensor | None,  # [N] float32
    moments: Tensor | None = None,  # [N, groups, 2] float32, left with value by a fused convolution: then value is complete
    moment_groups: Sequence[int] | None = None,
) -> None:
    """Launch ``area_step`` forward; every output is written into the tensor given for it."""
    complete = moments is not None
    like = value if complete else drives[0]
    assert like is not None
    n, h, w, c = full = tuple(like.shape)
    launch, pooled, single = Launch(like, vectors_of=c), (n, h // 2, w // 2, c), torch.float32
    dtype = DTYPES[launch.dtype]
    groups = list(moment_groups) if moment_groups is not None else _module.area_step_moment_groups(dtype, h, w, c)
    if moments is None and gamma is not None:
        moments = launch.scratch(n, groups[0], 2)
    launch.run(
        _module.area_step_forward,
        dtype,
        launch.queue,
        [n, h, w, c],
        launch.terms(drives, "drives", full),
        launch.read(drive_bias, "drive_bias", (c,), single),
        launch.terms(modulators, "modulators", full),
        launch.read(modulator_bias, "modulator_bias", (c,), single),
        modulator_complete,
        complete,
        launch.read(gamma, "gamma", (h, w, c), single),
        launch.read(beta, "beta", (h, w, c), single),
        eps,
        rectify,
        (launch.read if complete else launch.write)(value, "value", full),
        launch.write(modulator_sum, "modulator_sum", full),
        launch.write(state, "state", full),
        launch.write(max_pooled, "max_pooled", pooled),
        launch.write(argmax, "argmax", pooled, torch.uint8),
        launch.write(mean_pooled, "mean_pooled", (n, 1, 1, c)),
        launch.per_sample(mean, "mean", n, Use.WRITE),
        launch.per_sample(rstd, "rstd", n, Use.WRITE),
        (launch.read if complete else launch.write)(moments, "moments", (n, groups[0], 2), single),
        groups,
    )


def area_step_backward(
    shape: tuple[int, int, int, int],  # N, H, W, C
    grad_states: Sequence[Tensor],  # each [N, H, W, C]
    grad_max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    grad_mean_pooled: Tensor | None,  # [N, 1, 1, C]
    multiplicative: bool,
    value: Tensor | None,  # [N, H, W, C]
    drives: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C] float32
    modulator_sum: Tensor | None,  # [N, H, W, C]
    mean: Tensor | None,  # [N] float32
    rstd: Tensor | None,  # [N] float32
    gamma: Tensor | None,  # [H, W, C] float32
    beta: Tensor | None,  # [H, W, C] float32
    rectify: bool,
    grad_drive: Tensor | None,  # [N, H, W, C]
    grad_drive_sum: Tensor | None,  # [N, H, W, C] float32
    grad_modulator: Tensor | None,  # [N, H, W, C]
    grad_gamma: Tensor | None,  # [H, W, C] float32
    grad_beta: Tensor | None,  # [H, W, C] float32
) -> None:
    """Launch ``area_step`` backward; grad_drive and grad_modulator are written, the other gradients are added to."""
    n, h, w, c = shape
    given = [t for t in (*grad_states, grad_max_pooled, grad_mean_pooled, value, *drives, grad_drive) if t is not None]
    launch, pooled, single = Launch(given[0], vectors_of=c), (n, h // 2, w // 2, c), torch.float32
    dtype = DTYPES[launch.dtype]
    slots, splits = _module.area_step_backward_scratch(dtype, n, h, w, c)
    sums = launch.scratch(n, slots, 2) if gamma is not None else None
    affine = launch.scratch(splits, 2, h, w, c) if gamma is not None else None
    launch.run(
        _module.area_step_backward,
        dtype,
        launch.queue,
        list(shape),
        launch.terms(grad_states, "grad_states", shape),
        launch.read(grad_max_pooled, "grad_max_pooled", pooled),
        launch.read(argmax, "argmax", pooled, torch.uint8),
        launch.read(grad_mean_pooled, "grad_mean_pooled", (n, 1, 1, c)),
        multiplicative,
        launch.read(value, "value", shape),
        launch.terms(drives, "drives", shape),
        launch.read(drive_bias, "drive_bias", (c,), single),
        launch.read(modulator_sum, "modulator_sum", shape),
        launch.per_sample(mean, "mean", n, Use.READ),
        launch.per_sample(rstd, "rstd", n, Use.READ),
        launch.read(gamma, "gamma", (h, w, c), single),
        launch.read(beta, "beta", (h, w, c), single),
        rectify,
        launch.write(grad_drive, "grad_drive", shape),
        launch.update(grad_drive_sum, "grad_drive_sum", shape),
        launch.write(grad_modulator, "grad_modulator", shape),
        launch.update(grad_gamma, "grad_gamma", (h, w, c)),
        launch.update(grad_beta, "grad_beta", (h, w, c)),
        launch.write(sums, "sums", (n, slots, 2), single),
        launch.write(affine, "affine", (splits, 2, h, w, c), single),
    )


def readout_zones(
    representations: Tensor,  # [T, N, D]
    previous: Tensor | None,  # [N, D]
    log_probs: Tensor | None,  # [T, N, C] float32
    labels: Tensor,  # [N] int64
    bias: Tensor | None,  # [C] float32
    weight_norm: Tensor,  # [C] float32
    inverse_distance: Tensor,  # [C, C] float32
    cosine: Tensor,  # [T, N, C] float32, products r . w_c on entry
    tables: Sequence[Tensor],  # [T, N] each: predicted int64, norm, cos_predicted, cos_label, margin, boundary, change float32
) -> None:
    """Launch ``readout_zones`` for all time steps; cosine and every table are written. Labels must lie in [0, C)."""
    (t, n, d), c, single = representations.shape, cosine.shape[2], torch.float32
    launch = Launch(representations)
    names = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")
    _module.readout_zones(
        DTYPES[launch.dtype],
        launch.queue,
        [t, n, d, c],
        launch.rows(representations, "representations", (t, n, d)),
        launch.rows(previous, "previous", (n, d)),
        [*representations.stride()[:2], 0 if previous is None else previous.stride(0)],
        launch.read(log_probs, "log_probs", (t, n, c), single),
        launch.read(labels, "labels", (n,), torch.int64),
        launch.read(bias, "bias", (c,), single),
        launch.read(weight_norm, "weight_norm", (c,), single),
        launch.read(inverse_distance, "inverse_distance", (c, c), single),
        launch.update(cosine, "cosine", (t, n, c)),
        [launch.write(x, name, (t, n), x.dtype) for x, name in zip(tables, names, strict=True)],
    )


def trajectory_norms(
    values: Tensor,  # [T, N, D]
    norm: Tensor,  # [T, N] float64
    change: Tensor,  # [T - 1, N] float64
) -> None:
    """Launch ``trajectory_norms``; norm and change are written."""
    (t, n, d), launch, double = values.shape, Launch(values), torch.float64
    _module.trajectory_norms(
        DTYPES[launch.dtype],
        launch.queue,
        [t, n, d],
        launch.rows(values, "values", (t, n, d)),
        *values.stride()[:2],
        launch.write(norm, "norm", (t, n), double),
        launch.write(change, "change", (t - 1, n), double),
    )


@dataclass(frozen=True)
class ConvTerm:
    """A linear map of one tensor: with output pixel h and tap i, it reads row h * stride + i - padding, or, transposed, the row that a
    convolution of that stride would have sent there, (h + padding - i) / stride."""

    x: Tensor  # [N, H', W', C']
    weight: Tensor  # [C, K, K, C']
    stride: int = 1
    padding: int = 0
    transposed: bool = False


def recurrent_conv_moment_groups(samples: int, height: int, width: int, channels: int) -> list[int]:
    """How :func:`recurrent_conv` leaves moments: [N, groups, 2], and what ``area_step_forward`` must know of them."""
    return list(_module.recurrent_conv_tiles(samples, height, width, channels)[2])


def recurrent_conv(
    terms: Sequence[ConvTerm],
    bias: Tensor | None,  # [C] float32
    added: Sequence[Tensor],  # each [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C]
    value: Tensor,  # [N, H, W, C]
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    moments: Tensor | None = None,  # [N, groups, 2] float32
) -> None:
    """Launch ``recurrent_conv``: value = s, or drive * (1 + s), with s the sum of the terms, the bias and what is added.

    Value, modulator_sum (1 + s) and moments are written.
    """
    n, h, w, c = full = tuple(value.shape)
    launch = Launch(value, vectors_of=c)
    groups = recurrent_conv_moment_groups(n, h, w, c)[0]
    given = []
    for k, term in enumerate(terms):
        _, height, width, channels = term.x.shape
        kernel = term.weight.shape[1]
        x = launch.read(term.x, f"terms[{k}].x", (n, height, width, channels))
        weight = launch.read(term.weight, f"terms[{k}].weight", (c, kernel, kernel, channels))
        given.append((x, weight, [height, width, channels, kernel, term.stride, term.padding], term.transposed))
    launch.run(
        _module.recurrent_conv,
        DTYPES[launch.dtype],
        launch.queue,
        list(full),
        given,
        launch.read(bias, "bias", (c,), torch.float32),
        launch.terms(added, "added", full),
        launch.read(drive, "drive", full),
        launch.write(value, "value", full),
        launch.write(modulator_sum, "modulator_sum", full),
        launch.write(moments, "moments", (n, groups, 2), torch.float32),
    )


def recurrent_conv_weight_grad(
    rows: Tensor,  # [N, H, W, A]
    gathered: Tensor,  # [N, H', W', B]
    grad_weight: Tensor,  # [A, K, K, B] float32
    stride: int,
    padding: int,
) -> None:
    """Launch ``recurrent_conv_weight_grad``: grad_weight is written. Of a convolution, rows are the output's gradient and gathered is its
    input; of a transposed one, the other way round."""
    (n, h, w, a), (_, height, width, b), kernel = rows.shape, gathered.shape, grad_weight.shape[1]
    launch = Launch(rows, vectors_of=a)
    splits = _module.recurrent_conv_weight_grad_splits(DTYPES[launch.dtype], launch.queue[0], n, h, w, a, b, kernel)
    partial = launch.scratch(splits, a, kernel, kernel, b) if splits > 1 else None
    launch.run(
        _module.recurrent_conv_weight_grad,
        DTYPES[launch.dtype],
        launch.queue,
        n,
        (launch.read(rows, "rows", (n, h, w, a)), [h, w, a]),
        (launch.read(gathered, "gathered", (n, height, width, b)), [height, width, b]),
        [kernel, stride, padding],
        splits,
        launch.write(partial, "partial", (splits, a, kernel, kernel, b), torch.float32),
        launch.write(grad_weight, "grad_weight", (a, kernel, kernel, b), torch.float32),
    )
