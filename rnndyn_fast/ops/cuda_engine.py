"""Which engine computes a linear map of a rollout on a CUDA device: the fused convolution or the vendor's, as measured there."""

from __future__ import annotations

import torch

from rnndyn_fast.ops import engine_timing, fused_conv
from rnndyn_fast.ops.engines import DEVICE_ENGINES, EngineChoice, Geometry, Operator


def why_not_fused(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why the fused convolution cannot compute this map; None if it can."""
    if geometry.operator is Operator.IDENTITY:
        return "nothing to compute"
    return fused_conv.why_not(weight_shape[2:], (weight_shape[0], weight_shape[1]), geometry.stride, dtype)


def choose_device_engine(
    geometry: Geometry,
    weight_shape: tuple[int, ...],
    height: int,
    width: int,
    dtype: torch.dtype,
    engine: str = "auto",
    samples: int = 16,
    device: torch.device | None = None,
) -> EngineChoice:
    """Choose how a linear map is computed on a CUDA device.

    The rule of ``engine="auto"``: for each pass (the map, the gradient of its source, the gradient of its weight) the fused convolution
    where it can run and is faster by more than 3%, else the vendor's. Both are timed once per machine, the first time that a map of that
    shape is met (:mod:`rnndyn_fast.ops.engine_timing`). Where they cannot be timed (while a CUDA graph is captured), and where the fused
    convolution fails, the vendor's computes. From compute capability 9.0 on it computes unless they have been timed (``RNNDYN_MEASURE=1``).

    Args:
        weight_shape: of the parameter.
        height, width: of the source map (after pooling).
        dtype: of the maps.
        engine: "auto", "direct" (the vendor's) or "fused" (wherever it can run at all), perhaps with a precision after a colon, which only
            engines of the CPU take.
        samples: of a time step.
        device: None: none at hand; says what would be done.
    """
    engine = engine.partition(":")[0]
    if engine not in DEVICE_ENGINES:
        raise ValueError(f"engine={engine!r}: it runs on the CPU; on CUDA devices expected one of {', '.join(DEVICE_ENGINES)}")
    if engine == "direct":
        return EngineChoice(None, "asked for")
    reason = why_not_fused(geometry, weight_shape, dtype)
    if reason:
        return EngineChoice(None, reason)
    if engine == "fused":
        return EngineChoice(None, "asked for", fused=fused_conv.PASSES)
    if device is None:
        return EngineChoice(None, "or fused: whichever is the faster, as measured at the first rollout on the device (before sm_90)")
    case = engine_timing.Case(geometry, weight_shape, height, width, dtype, samples)
    times, why = engine_timing.times_of(case, device, engine_timing.why_not_now(device))
    if times is None:
        return EngineChoice(None, f"not measured: {why}")
    passes = tuple(p for p in fused_conv.PASSES if times[p].prefers_fused)
    said = ", ".join(f"{p} {times[p]}" for p in fused_conv.PASSES)
    return EngineChoice(None, f"measured on {why}, ms, fused against the vendor's: {said}", fused=passes)
