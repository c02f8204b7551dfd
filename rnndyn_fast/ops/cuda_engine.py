"""Which engine computes a linear map of a rollout on a CUDA device: one of our own or the vendor's, as measured there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rnndyn_fast.ops import engine_timing
from rnndyn_fast.ops.device_kernels import why_not
from rnndyn_fast.ops.engines import ASKED_FOR, DEVICE_ENGINES, EngineChoice, Geometry, Operator
from rnndyn_fast.ops.fused_conv import KERNELS, PASSES
from rnndyn_fast.ops.triton_conv import precision_of


def why_not_timed(engine: str, geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why ``engine="auto"`` does not consider one of our engines for this map; None if it does."""
    reason = why_not(engine, geometry, weight_shape, dtype)
    if reason is None and engine == "triton" and precision_of(dtype, product=geometry.operator is Operator.LINEAR) == "ieee":
        return "in full float32 the Triton convolution has no use for tensor cores"
    return reason


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

    The rule of ``engine="auto"``: for each pass (the map, the gradient of its source, the gradient of its weight) the fastest of the
    vendor's convolution, the fused one of the CUDA kernels and that of the Triton kernels, where they can run; a later one of these takes
    the place of an earlier one only if it is faster by more than 3%. All are timed once per machine, the first time that a map of that
    shape is met (:mod:`rnndyn_fast.ops.engine_timing`). Where they cannot be timed (while a CUDA graph is captured), and where our own
    fail, the vendor's computes. From compute capability 9.0 on it computes unless they have been timed (``RNNDYN_MEASURE=1``). Full
    float32 (without TF32) is the vendor's.

    Args:
        weight_shape: of the parameter.
        height, width: of the source map (after pooling).
        dtype: of the maps.
        engine: "auto", "direct" (the vendor's), "fused" or "triton" (wherever they can run at all), perhaps with a precision after a colon,
            which only engines of the CPU take.
        samples: of a time step.
        device: None: none at hand; says what would be done.
    """
    engine = engine.partition(":")[0]
    if engine not in DEVICE_ENGINES:
        raise ValueError(f"engine={engine!r}: it runs on the CPU; on CUDA devices expected one of {', '.join(DEVICE_ENGINES)}")
    if engine == "direct":
        return EngineChoice(None, ASKED_FOR)
    if engine in KERNELS:
        reason = why_not(engine, geometry, weight_shape, dtype)
        return EngineChoice(None, reason) if reason else _choice(ASKED_FOR, {engine: PASSES})
    reasons = {name: why_not_timed(name, geometry, weight_shape, dtype) for name in KERNELS}
    candidates = tuple(name for name in KERNELS if reasons[name] is None)
    if not candidates:
        return EngineChoice(None, "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason)))
    if device is None:
        others = " or ".join(candidates)
        return EngineChoice(None, f"or {others}: whichever is the fastest, as measured at the first rollout on the device (before sm_90)")
    case = engine_timing.Case(geometry, weight_shape, height, width, dtype, samples, candidates)
    times, why = engine_timing.times_of(case, device, engine_timing.why_not_now(device))
    if times is None:
        return EngineChoice(None, f"not measured: {why}")
    passes = {name: tuple(p for p in PASSES if times[p].best == name) for name in candidates}
    said = "; ".join(f"{p} {times[p]}" for p in PASSES)
    return _choice(f"measured on {why}, ms: {said}", passes)


def _choice(reason: str, passes: Mapping[str, tuple[str, ...]]) -> EngineChoice:
    return EngineChoice(None, reason, fused=passes.get("fused", ()), triton=passes.get("triton", ()))
