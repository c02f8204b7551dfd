"""Readout zones of representations: one fused pass per sample and time step over raw memory.

``readout_zones`` checks its arguments and picks a backend; ``torch.ops.rnndyn.readout_zones`` is the native op itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnndyn_fast.ops import core, cuda_module, sequence_launches
from rnndyn_fast.reference.readout_zones import ReadoutZoneMeasures, first_argmax, readout_distance
from rnndyn_fast.reference.readout_zones import readout_zones as reference_readout_zones

_NATIVE_DTYPES = (torch.float32, torch.float64)
TABLES = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")  # as the kernels name them

_library = torch.library.Library("rnndyn", "FRAGMENT")
_library.define(
    "readout_zones(Tensor representations, Tensor readout_weight, Tensor distance, Tensor labels, Tensor? bias, "
    "Tensor? log_probs, Tensor? previous) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def can_run_readout_zones(representations: Tensor, raise_error: bool = False) -> bool:  # [T, N, D]
    """Whether the native backend takes these representations: float32 or float64 on the CPU; float32, float16 or bfloat16 on a CUDA device.

    Raises:
        ValueError: it does not, and ``raise_error``; the message is the reason.
    """
    reason = core.unavailable
    if reason is not None:
        pass
    elif representations.device.type == "cuda":
        reason = cuda_module.why_not(representations, tuple(cuda_module.DTYPES))
    elif representations.device.type != "cpu":
        reason = f"representations are on {representations.device}, and the native backend runs on the CPU and on CUDA devices"
    elif representations.dtype not in _NATIVE_DTYPES:
        reason = f"representations have dtype {representations.dtype}, and the native backend takes float32 and float64"
    if reason is not None and raise_error:
        raise ValueError(f"backend='native': {reason}; backend='reference' takes them")
    return reason is None


def _check_tensor(name: str, value: Tensor, shape: str, sizes: tuple[int | None, ...], like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    fits = value.dim() == len(sizes) and all(s is None or s == v for s, v in zip(sizes, value.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{name}: expected shape {shape} = [{wanted}], got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as representations, got {value.device}")


def _check(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    log_probs: Tensor | None,  # [T, N, C]
    previous: Tensor | None,  # [N, D]
    distance: Tensor | None,  # [C, C]
) -> None:
    _check_tensor("representations", representations, "[T, N, D]", (None, None, None), representations)
    if not representations.is_floating_point():
        raise TypeError(f"representations: expected a floating-point dtype, got {representations.dtype}")
    timesteps, samples, dims = representations.shape
    if 0 in representations.shape:
        raise ValueError(f"representations: expected T, N and D of at least 1, got [T, N, D] = {[timesteps, samples, dims]}")
    _check_tensor("readout_weight", readout_weight, "[C, D]", (None, dims), representations)
    classes = readout_weight.shape[0]
    if classes == 0:
        raise ValueError("readout_weight: expected at least one class, got [C, D] with C = 0")
    _check_tensor("labels", labels, "[N]", (samples,), representations)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    optional: list[tuple[str, Tensor | None, str, tuple[int | None, ...]]] = [
        ("bias", bias, "[C]", (classes,)),
        ("log_probs", log_probs, "[T, N, C]", (timesteps, samples, classes)),
        ("previous", previous, "[N, D]", (samples, dims)),
        ("distance", distance, "[C, C]", (classes, classes)),
    ]
    for name, value, shape, sizes in optional:
        if value is not None:
            _check_tensor(name, value, shape, sizes, representations)
    same_dtype = (("readout_weight", readout_weight), ("bias", bias), ("previous", previous), ("distance", distance))
    for name, value in same_dtype:
        if value is not None and value.dtype != representations.dtype:
            raise TypeError(f"{name}: expected dtype {representations.dtype} as representations, got {value.dtype}")
    if log_probs is not None and not log_probs.is_floating_point():
        raise TypeError(f"log_probs: expected a floating-point dtype, got {log_probs.dtype}")


def _check_not_differentiated(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is None or not value.is_floating_point():
            continue
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, and ops.readout_zones is not differentiable; detach it, call under "
                "torch.no_grad(), or use reference.readout_zones"
            )
        if forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(
                f"{name}: carries a forward-mode tangent, and ops.readout_zones is not differentiable; use reference.readout_zones"
            )


def readout_zones(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [C]
    log_probs: Tensor | None = None,  # [T, N, C]
    previous: Tensor | None = None,  # [N, D]
    distance: Tensor | None = None,  # [C, C]
    backend: str | None = None,
) -> ReadoutZoneMeasures:
    r"""Where representations lie among the zones of a linear readout; the equations are in ``reference.readout_zones``.

    Args:
        representations: [T, N, D], floating point; native: float32 or float64, read without a copy where D is
            contiguous.
        readout_weight: [C, D], same dtype and device as representations.
        labels: [N], int64, in [0, C).
        bias: [C], same dtype, or None for zero.
        log_probs: [T, N, C], floating point, or None: predictions are then those of the logits.
        previous: [N, D], the representations at the step before the first one here, or None at the start.
        distance: [C, C], ``readout_distance(readout_weight)`` where the caller keeps it, or None.
        backend: "native", "reference" (plain PyTorch), or None: native where ``can_run_readout_zones`` says so.

    Returns:
        ReadoutZoneMeasures of tables [T, N] (``predicted`` int64, ``change`` NaN where there is no previous step,
        margin and boundary distance +inf where there is no other class or no boundary) and ``cosine`` [T, N, C].

    Raises:
        ValueError: a shape, device, label or backend is wrong, or an input is to be differentiated.
        TypeError: a dtype is wrong.

    Differentiable: no; inputs that require a gradient are refused (``reference.readout_zones`` takes them).
    Forward-mode: no; inputs with a tangent are refused.
    Double backward: no.
    Deterministic: yes, for any number of threads (on the CPU; the matrix product is PyTorch's).
    Memory: the cosines [T, N, C] and seven tables [T, N].

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435.

    >>> import torch
    >>> m = readout_zones(torch.tensor([[[3.0, 4.0]]]), torch.eye(2), torch.tensor([0]))
    >>> m.predicted.item(), m.norm.item(), round(m.boundary_distance.item(), 4)
    (1, 5.0, 0.7071)
    """
    if backend not in (None, "native", "reference"):
        raise ValueError(f"backend: expected 'native', 'reference' or None, got {backend!r}")
    _check(representations, readout_weight, labels, bias, log_probs, previous, distance)
    _check_not_differentiated(
        representations=representations,
        readout_weight=readout_weight,
        bias=bias,
        log_probs=log_probs,
        previous=previous,
    )
    if distance is None:
        distance = readout_distance(readout_weight)
    if can_run_readout_zones(representations, raise_error=backend == "native") and backend != "reference":
        arguments = (representations, readout_weight, distance, labels, bias, log_probs, previous)
        return ReadoutZoneMeasures(*torch.ops.rnndyn.readout_zones(*arguments))
    _check_labels(labels, readout_weight.shape[0])
    return reference_readout_zones(representations, readout_weight, labels, bias, log_probs, previous, distance)


def _check_labels(labels: Tensor, classes: int) -> None:  # [N]
    low, high = torch.aminmax(labels)
    if low < 0 or high >= classes:
        raise ValueError(f"labels: expected [N] in [0, C) = [0, {classes}), got values in [{int(low)}, {int(high)}]")


def _rows(value: Tensor) -> Tensor:  # [..., M]
    """The value itself where its last dimension is contiguous, else a contiguous copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _allocate(representations: Tensor, classes: int) -> tuple[Tensor, ...]:  # [T, N, D]
    timesteps, samples, _ = representations.shape
    tables = [representations.new_empty(timesteps, samples) for _ in range(6)]
    predicted = representations.new_empty(timesteps, samples, dtype=torch.int64)
    return (predicted, *tables, representations.new_empty(timesteps, samples, classes))


def _native(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    distance: Tensor,  # [C, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    log_probs: Tensor | None,  # [T, N, C]
    previous: Tensor | None,  # [N, D]
) -> tuple[Tensor, ...]:
    _check_labels(labels, readout_weight.shape[0])
    representations = _rows(representations)
    if log_probs is not None:
        if torch.promote_types(log_probs.dtype, representations.dtype) != representations.dtype:
            # Rounding could make a tie of a difference: only the winner goes to the kernel.
            log_probs = torch.nn.functional.one_hot(first_argmax(log_probs), readout_weight.shape[0])
        log_probs = _rows(log_probs.to(representations.dtype))
    labels = labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight_norm = torch.linalg.vector_norm(readout_weight, dim=-1)
    inverse = torch.where(distance > 0, 1.0 / torch.where(distance > 0, distance, 1.0), 0.0).contiguous()
    outputs = _allocate(representations, readout_weight.shape[0])
    *tables, cosine = outputs
    # PyTorch's float32 product reaches half of what ours does here, and reads the representations once more.
    weight = readout_weight.contiguous() if representations.dtype == torch.float32 else None
    if weight is None:
        torch.matmul(representations, readout_weight.T, out=cosine)
    before = None if previous is None else _rows(previous)
    sequence_launches.readout_zones(
        representations=representations, previous=before, log_probs=log_probs, labels=labels, bias=bias, weight_norm=weight_norm,
        inverse_distance=inverse, weight=weight, cosine=cosine, **dict(zip(TABLES, tables, strict=True)),
    )  # fmt: skip
    return outputs


def _native_cuda(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    distance: Tensor,  # [C, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    log_probs: Tensor | None,  # [T, N, C]
    previous: Tensor | None,  # [N, D]
) -> tuple[Tensor, ...]:
    """All time steps in one launch; everything but the representations is computed in float32."""
    _check_labels(labels, readout_weight.shape[0])
    dtype, representations = representations.dtype, _rows(representations)
    weight, distance = readout_weight.float(), distance.float()
    if log_probs is not None:
        if log_probs.dtype == torch.float64:  # as above
            log_probs = torch.nn.functional.one_hot(first_argmax(log_probs), weight.shape[0])
        log_probs = log_probs.float().contiguous()
    wide = representations.float()
    predicted, *tables, cosine = _allocate(wide, weight.shape[0])
    torch.matmul(wide, weight.T, out=cosine)
    inverse = torch.where(distance > 0, 1.0 / torch.where(distance > 0, distance, 1.0), 0.0).contiguous()
    sequence_launches.readout_zones.on_device(
        representations=representations,
        previous=None if previous is None else _rows(previous),
        log_probs=log_probs,
        labels=labels.contiguous(),
        bias=None if bias is None else bias.float().contiguous(),
        weight_norm=torch.linalg.vector_norm(weight, dim=-1),
        inverse_distance=inverse,
        cosine=cosine,
        **dict(zip(TABLES, (predicted, *tables), strict=True)),
    )
    return (predicted, *(t.to(dtype) for t in (*tables, cosine)))


def _fake(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    distance: Tensor,  # [C, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    log_probs: Tensor | None,  # [T, N, C]
    previous: Tensor | None,  # [N, D]
) -> tuple[Tensor, ...]:
    return _allocate(representations, readout_weight.shape[0])


def _refuse_backward(*_: object) -> None:
    raise RuntimeError("readout_zones is not differentiable; use reference.readout_zones")


_library.impl("readout_zones", _native, "CPU")
_library.impl("readout_zones", _native_cuda, "CUDA")
torch.library.register_fake("rnndyn::readout_zones", _fake, lib=_library)
torch.library.register_autograd("rnndyn::readout_zones", _refuse_backward, lib=_library)
