"""What benchmarks on a CUDA device share: times by CUDA events, peak memory, and the device's own ceilings.

``RNNDYN_BENCH_DEVICE=harness`` runs them on the CPU with the CUDA kernels in the tests' SIMT harness: their times mean nothing, but all of
their code runs (``scripts/gpu_check.sh --dry-run``).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import QUICK, summary, write_result

from rnndyn_fast.ops import cuda_module

DRY = os.environ.get("RNNDYN_BENCH_DEVICE") == "harness"
DEVICE = torch.device("cpu" if DRY else "cuda")
NO_DEVICE = None if DRY else cuda_module.unavailable or (None if torch.cuda.is_available() else "no CUDA device")
ROUNDS = 1 if DRY else 2 if QUICK else 7


def use_harness(patch: pytest.MonkeyPatch) -> None:
    """Send tensors on the CPU to the kernels in the harness."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import device_rollouts
    import simt_harness

    simt_harness.install(patch)
    device_rollouts.send_to_kernels(patch, torch.float32, torch.float16)
    patch.setattr(cuda_module, "build_info", lambda: {"nvcc": "none: the harness"})


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Autocast to float16, as published."""
    if not DRY:
        with torch.autocast("cuda", torch.float16):
            yield
        return
    torch.set_autocast_dtype("cuda", torch.float16)  # (the context would see that there is no device)
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.float16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call, on the device."""
    if DRY:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def alternate_on_device(contenders: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds on the device of each contender, one call of each per round."""
    for run in contenders.values():
        for _ in range(0 if DRY else 3):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names if i % 2 == 0 else reversed(names):
            times[name].append(seconds_of(contenders[name]))
    return times


def peak_bytes(run: Callable[[], Any]) -> int:
    """What a call takes of the device's memory above what is there before it."""
    if DRY:
        run()
        return 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matrix_peak() -> float:
    """Floating-point operations per second of a large product of float16 matrices: the measured peak."""
    n = 64 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE).half() for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / statistics.median(seconds_of(lambda: a @ b) for _ in range(3 if DRY else 10))


def copy_bandwidth() -> float:
    """Bytes per second of a large copy within the device, read and written."""
    x = torch.randn((1 if DRY else 1024) * 2**18, device=DEVICE)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.nbytes / statistics.median(seconds_of(lambda: y.copy_(x)) for _ in range(3 if DRY else 10))


def rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def about_device() -> dict[str, Any]:
    """Whose results these are."""
    name = "the SIMT harness" if DRY else torch.cuda.get_device_name()
    return {"device": name, "torch_cuda": torch.version.cuda, "kernels": cuda_module.build_info()}


def keep(name: str, times: dict[str, list[float]], **about: Any) -> None:
    """The result of a comparison, with the device it is of."""
    write_result(name, {"what": name, **about, **about_device(), "contenders": summary(times, "rnndyn")})


def keep_peaks(name: str, peaks: dict[str, int], **about: Any) -> None:
    """Peak memory of each contender."""
    write_result(name, {"what": name, **about, **about_device(), "peak_bytes": peaks})
