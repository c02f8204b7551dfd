"""Launches of the native core, to which addresses of tensors are handed (:mod:`rnndyn_fast.ops.addresses`).

Callers hold every tensor in their own frame for the length of the call, so that no address outlives its storage.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import first_element
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.core_calls import Core

unavailable: str | None = None  # why there is no native core, if there is none
try:
    from rnndyn_fast import _core as _module

    _module.build_info()  # raises for an RNNDYN_ISA that cannot run
    if TYPE_CHECKING:
        _core = _module
    else:
        _core = Core(_module)
except (ImportError, ValueError) as error:
    _folder = Path(__file__).resolve().parents[1]
    _source = isinstance(error, ImportError) and not any(_folder.glob("_core*")) and (_folder.parent / "csrc").is_dir()
    _why = f"{_folder} is the source, where nothing is built: run Python elsewhere, or install with pip install -e" if _source else error
    unavailable = f"the native core cannot be used ({_why})"

MAX_TERMS = 6  # kMaxTerms of area_step.h; the core checks it
_ZONE_PADDING = 16  # kZonePadding of readout_zones.h


def build_info() -> dict[str, Any]:
    """What the native core was built from and runs with; raises ``ImportError`` with the reason where there is none."""
    if unavailable:
        raise ImportError(unavailable)
    return _core.build_info()


def isa() -> str:
    """The instruction set in use: "isa" of :func:`build_info`, at no cost."""
    return _core.isa()


def address_of(tensor: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if tensor is None:
        return 0
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous CPU tensor {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype} "
            f"on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return first_element(tensor)


def _addresses(tensors: Sequence[Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[int]:
    return [address_of(t, f"{name}[{i}]", shape, dtype) for i, t in enumerate(tensors)]


def num_chunks(height: int, width: int, channels: int) -> int:
    """Chunks of rows in which a map is reduced (area_step.h)."""
    return _core.num_chunks(height, width, channels)


def area_step_forward(
    drives: Sequence[Tensor],  # each [N, H, W, C]
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    modulator_complete: bool,
    gamma: Tensor | None,  # [H, W, C]
    beta: Tensor | None,  # [H, W, C]
    eps: float,
    rectify: bool,
    complete: bool,
    value: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    state: Tensor | None,  # [N, H, W, C]
    max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    mean_pooled: Tensor | None,  # [N, 1, 1, C]
    mean: Tensor | None,  # [N]
    rstd: Tensor | None,  # [N]
) -> None:
    """Launch ``area_step`` forward; every output is written into the tensor given for it.

    ``complete``: with a norm; mean and rstd are there already, and the one drive is the value itself, or value is None, and made again (not
    on devices).
    """
    if on_device(drives[0]):
        from rnndyn_fast.ops import _launch_cuda

        return _launch_cuda.area_step_forward(
            drives, modulators, drive_bias, modulator_bias, modulator_complete, gamma, beta, eps, rectify,
            value, modulator_sum, state, max_pooled, argmax, mean_pooled, mean, rstd,
        )  # fmt: skip
    n, h, w, c = full = tuple(drives[0].shape)
    dtype = drives[0].dtype
    pooled = (n, h // 2, w // 2, c)
    launch = _core.area_step_forward_float32 if dtype == torch.float32 else _core.area_step_forward_float64
    launch(
        [n, h, w, c],
        torch.get_num_threads(),
        _addresses(drives, "drives", full, dtype),
        address_of(drive_bias, "drive_bias", (c,), dtype),
        _addresses(modulators, "modulators", full, dtype),
        address_of(modulator_bias, "modulator_bias", (c,), dtype),
        modulator_complete,
        address_of(gamma, "gamma", (h, w, c), dtype),
        address_of(beta, "beta", (h, w, c), dtype),
        eps,
        rectify,
        complete,
        address_of(value, "value", full, dtype),
        address_of(modulator_sum, "modulator_sum", full, dtype),
        address_of(state, "state", full, dtype),
        address_of(max_pooled, "max_pooled", pooled, dtype),
        address_of(argmax, "argmax", pooled, torch.uint8),
        address_of(mean_pooled, "mean_pooled", (n, 1, 1, c), dtype),
        address_of(mean, "mean", (n,), dtype),
        address_of(rstd, "rstd", (n,), dtype),
    )


def gate_step(
    scalars: tuple[int, float, list[float], list[float], int],  # rule, forget bias, gains (constant, factor, slope), activation
    ports: Sequence[Sequence[Tensor]],  # terms of each port, [N, H, W, m * D]
    biases: Sequence[Tensor | None],  # [m * D] of each port, or none at all
    sums: Sequence[Tensor | None],  # [N, H, W, m * D], or None where it is not wanted, or is the port's only term
    states: Sequence[Tensor],  # [N, H, W, D] each: outputs, or in the backward pass their gradients
    grad_ports: Sequence[Tensor],  # [N, H, W, m * D] each: outputs of the backward pass
    more: Sequence[Tensor | None] = (),  # [N, H, W, D] each: second summands of the states' gradients
    grad_biases: Sequence[Tensor | None] = (),  # [m * D] each, written: sums of grad_ports over pixels; not on devices
    *,
    backward: bool,
    workspace: Tensor | None = None,  # float32, of gate_workspace_size, where grad_biases are wanted
) -> None:
    """Launch ``gate_step``; the order of ports and states is that of the cell."""
    if on_device(states[0]):
        from rnndyn_fast.ops import _launch_cells_cuda

        states = [s if m is None else s + m for s, m in zip(states, more, strict=True)] if more else states
        return _launch_cells_cuda.gate_step(scalars, ports, biases, sums, states, grad_ports, backward=backward)
    n, h, w, channels = shape = tuple(states[0].shape)
    dtype = states[0].dtype
    rule, forget_bias, tau, gate, activation = scalars
    sizes = [(n, h, w, terms[0].shape[3]) for terms in ports]
    launch = _core.gate_step_float32 if dtype == torch.float32 else _core.gate_step_float64
    wanted = any(row is not None for row in grad_biases)
    held, scratch = scratch_of(workspace, gate_workspace_size(n * h * w, sum(size[3] for size in sizes))) if wanted else (None, 0)
    launch(
        rule, n * h * w, channels, torch.get_num_threads(), forget_bias, tau, gate, activation,
        [_addresses(terms, f"ports[{k}]", size, dtype) for k, (terms, size) in enumerate(zip(ports, sizes, strict=True))],
        [address_of(bias, f"biases[{k}]", sizes[k][3:], dtype) for k, bias in enumerate(biases)],
        [address_of(total, f"sums[{k}]", sizes[k], dtype) for k, total in enumerate(sums)],
        _addresses(states, "states", shape, dtype),
        [address_of(grad, f"grad_ports[{k}]", sizes[k], dtype) for k, grad in enumerate(grad_ports)],
        [address_of(grad, f"more[{k}]", shape, dtype) for k, grad in enumerate(more)],
        [address_of(row, f"grad_biases[{k}]", sizes[k][3:], dtype) for k, row in enumerate(grad_biases)],
        scratch,
        backward,
    )  # fmt: skip
    del held


def area_step_backward(
    shape: tuple[int, int, int, int],  # N, H, W, C
    dtype: torch.dtype,
    grad_states: Sequence[Tensor],  # each [N, H, W, C]
    grad_max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    grad_mean_pooled: Tensor | None,  # [N, 1, 1, C]
    multiplicative: bool,
    value: Tensor | None,  # [N, H, W, C]
    drives: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    mean: Tensor | None,  # [N]
    rstd: Tensor | None,  # [N]
    gamma: Tensor | None,  # [H, W, C]
    beta: Tensor | None,  # [H, W, C]
    rectify: bool,
    grad_drive: Tensor | None,  # [N, H, W, C]
    grad_drive_sum: Tensor | None,  # [N, H, W, C]
    grad_modulator: Tensor | None,  # [N, H, W, C]
    grad_gamma: Tensor | None,  # [H, W, C]
    grad_beta: Tensor | None,  # [H, W, C]
    partial: Tensor | None = None,  # [N, num_chunks(H, W, C), 2] float64, scratch with a norm; not on devices
) -> None:
    """Launch ``area_step`` backward; grad_drive and grad_modulator are written, the other gradients are added to."""
    given = [t for t in (*grad_states, grad_max_pooled, grad_mean_pooled, value, *drives) if t is not None]
    if given and on_device(given[0]):
        from rnndyn_fast.ops import _launch_cuda

        return _launch_cuda.area_step_backward(
            shape, grad_states, grad_max_pooled, argmax, grad_mean_pooled, multiplicative, value, drives, drive_bias,
            modulator_sum, mean, rstd, gamma, beta, rectify, grad_drive, grad_drive_sum, grad_modulator, grad_gamma, grad_beta,
        )  # fmt: skip
    n, h, w, c = shape
    pooled = (n, h // 2, w // 2, c)
    if partial is None and gamma is not None:
        partial = empty((n, num_chunks(h, w, c), 2), torch.float64)
    launch = _core.area_step_backward_float32 if dtype == torch.float32 else _core.area_step_backward_float64
    launch(
        list(shape),
        torch.get_num_threads(),
        _addresses(grad_states, "grad_states", shape, dtype),
        address_of(grad_max_pooled, "grad_max_pooled", pooled, dtype),
        address_of(argmax, "argmax", pooled, torch.uint8),
        address_of(grad_mean_pooled, "grad_mean_pooled", (n, 1, 1, c), dtype),
        multiplicative,
        address_of(value, "value", shape, dtype),
        _addresses(drives, "drives", shape, dtype),
        address_of(drive_bias, "drive_bias", (c,), dtype),
        address_of(modulator_sum, "modulator_sum", shape, dtype),
        address_of(mean, "mean", (n,), dtype),
        address_of(rstd, "rstd", (n,), dtype),
        address_of(gamma, "gamma", (h, w, c), dtype),
        address_of(beta, "beta", (h, w, c), dtype),
        rectify,
        address_of(grad_drive, "grad_drive", shape, dtype),
        address_of(grad_drive_sum, "grad_drive_sum", shape, dtype),
        address_of(grad_modulator, "grad_modulator", shape, dtype),
        address_of(grad_gamma, "grad_gamma", (h, w, c), dtype),
        address_of(grad_beta, "grad_beta", (h, w, c), dtype),
        address_of(partial, "partial", (n, num_chunks(h, w, c), 2), torch.float64),
    )


def _row_address(tensor: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, list[int]]:
    """Address, and strides of all dimensions but the last, of an array whose rows are contiguous, but may lie apart."""
    if tensor is None:
        return 0, [0] * (len(shape) - 1)
    contiguous = tensor.dim() == len(shape) and (tensor.shape[-1] == 1 or tensor.stride(-1) == 1)
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu" or not contiguous:
        raise ValueError(
            f"{name}: expected a CPU tensor {list(shape)} of {dtype} with contiguous rows, got {list(tensor.shape)} of "
            f"{tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"
        )
    return first_element(tensor), list(tensor.stride()[:-1])


def readout_zones(
    representations: Tensor,  # [T, N, D]
    previous: Tensor | None,  # [N, D]
    log_probs: Tensor | None,  # [T, N, C]
    labels: Tensor,  # [N] int64
    bias: Tensor | None,  # [C]
    weight_norm: Tensor,  # [C]
    inverse_distance: Tensor,  # [C, C]
    weight: Tensor | None,  # [C, D] float32
    cosine: Tensor,  # [T, N, C]
    tables: Sequence[Tensor],  # [T, N] each: predicted int64, norm, cos_predicted, cos_label, margin, boundary, change
) -> None:
    """Launch ``readout_zones``; cosine and every table are written. Labels must lie in [0, C). Without ``weight``,
    cosine holds the products r . w_c on entry."""
    (t, n, d), c, dtype = representations.shape, cosine.shape[2], representations.dtype
    names = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")
    launch = _core.readout_zones_float32 if dtype == torch.float32 else _core.readout_zones_float64
    packed = None if weight is None else empty((-(-c // _ZONE_PADDING) * _ZONE_PADDING * d,), torch.float32)
    before, (before_stride,) = _row_address(previous, "previous", (n, d), dtype)
    launch(
        [t, n, d, c],
        torch.get_num_threads(),
        *_row_address(representations, "representations", (t, n, d), dtype),
        before,
        before_stride,
        *_row_address(log_probs, "log_probs", (t, n, c), dtype),
        address_of(labels, "labels", (n,), torch.int64),
        address_of(bias, "bias", (c,), dtype),
        address_of(weight_norm, "weight_norm", (c,), dtype),
        address_of(inverse_distance, "inverse_distance", (c, c), dtype),
        address_of(weight, "weight", (c, d), torch.float32),
        0 if packed is None else first_element(packed),
        address_of(cosine, "cosine", (t, n, c), dtype),
        *(
            address_of(table, name, (t, n), torch.int64 if name == "predicted" else dtype)
            for table, name in zip(tables, names, strict=True)
        ),
    )


def trajectory_norms(
    values: Tensor,  # [T, N, D], last dimension contiguous
    norm: Tensor,  # [T, N] float64
    change: Tensor,  # [T - 1, N] float64
) -> None:
    """Launch ``trajectory_norms``; norm and change are written."""
    if on_device(values):
        from rnndyn_fast.ops import _launch_cuda

        return _launch_cuda.trajectory_norms(values, norm, change)
    t, n, d = values.shape
    if values.device.type != "cpu" or (values.stride(2) != 1 and d > 1):
        raise ValueError(f"values: expected a CPU tensor with contiguous rows, got strides {values.stride()} on {values.device}")
    launch = _core.trajectory_norms_float32 if values.dtype == torch.float32 else _core.trajectory_norms_float64
    outputs = (address_of(norm, "norm", (t, n), torch.float64), address_of(change, "change", (t - 1, n), torch.float64))
    launch([t, n, d], torch.get_num_threads(), first_element(values), values.stride(0), values.stride(1), *outputs)


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """128 bits that any change of a tensor's bytes changes, but for one in 2^64 (csrc/fingerprint.h); the tensor is on the CPU."""
    contiguous = tensor.contiguous()
    return fingerprint_at(address_of(contiguous, "tensor", tuple(contiguous.shape), contiguous.dtype), contiguous.nbytes)


def fingerprint_at(first: int, nbytes: int) -> tuple[int, int]:
    """:func:`fingerprint` of memory."""
    one, other = _core.fingerprint(first, nbytes, torch.get_num_threads())
    return one, other


_workspaces = threading.local()
_KEPT_FLOATS = 1 << 20


def workspace_of(floats: int) -> tuple[Tensor, int]:
    """Scratch of at least that many floats, kept from call to call if it is small, and its first address that is a multiple of 64."""
    kept: Tensor | None = getattr(_workspaces, "scratch", None)
    if floats > _KEPT_FLOATS:
        kept = empty((floats + 16,), torch.float32)
    elif kept is None or kept.numel() < floats + 16:
        _workspaces.scratch = kept = None  # free the old one before taking the new one
        _workspaces.scratch = kept = torch.empty(floats + 16)  # (not among the buffers: it stays, and would cut their memory in two)
    first = first_element(kept)
    return kept, first + -first % 64


def gate_workspace_size(pixels: int, channels: int) -> int:
    """Floats of scratch with which sums over pixels are taken."""
    return 2 * _core.gate_step_workspace(pixels, channels)


def norm_workspace_size(n: int, pixels: int, channels: int, groups: int) -> int:
    """Floats of scratch of ``norm_step``."""
    return 2 * _core.norm_step_workspace([n, pixels, channels, groups])


def scratch_of(given: Tensor | None, floats: int) -> tuple[Tensor, int]:
    """Scratch that a caller gives, or that of :func:`workspace_of`."""
    return workspace_of(floats) if given is None else (given, address_of(given, "workspace", (floats,), torch.float32))


def drop_workspace() -> None:
    """Give up the scratch that this thread keeps from call to call; the next call that wants some takes it anew."""
    _workspaces.scratch = None


def take_scratch(nbytes: int) -> int:
    """Gives the core scratch of as many bytes as it asks for, which this thread holds until :func:`release_scratch`."""
    _workspaces.held = None
    _workspaces.held, first = workspace_of(-(-nbytes // 4))
    return first


def take_room(nbytes: int) -> int:
    """Like :func:`take_scratch`, in a buffer of its own: of a size that packed weights have too, whose memory it may take."""
    _workspaces.room = None
    _workspaces.room = empty((nbytes // 4,), torch.float32)
    return first_element(_workspaces.room)


def release_scratch() -> None:
    """What :func:`take_scratch` and :func:`take_room` hold is done with."""
    _workspaces.held = _workspaces.room = None


def packed_room(size: int) -> Tensor:
    """An uninitialised int16 vector that starts at a multiple of 64."""
    room = empty((size + 32,), torch.int16)
    return room[(-first_element(room) % 64) // 2 :][:size]


def on_device(tensor: Tensor) -> bool:
    """Whether the CUDA kernels are the ones for this tensor."""
    return tensor.is_cuda
