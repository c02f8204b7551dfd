"""Single looks at a CUDA device, for scripts/gpu_check.sh.

    python benchmarks/device_step.py smoke     a forward and a backward pass of each network in each precision
    python benchmarks/device_step.py engines   the engine of each convolution, as timed there, with the times
    python benchmarks/device_step.py profile   times of the kernels of a training step of blt_net_64

Results go to the folder RNNDYN_BENCH_RESULTS. With RNNDYN_BENCH_DEVICE=harness small ones are computed on the CPU.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from measure import write_result
from on_device import DEVICE, DRY, about_device, rounded, seconds_of
from torch import Tensor, nn

from rnndyn_fast.models import blt_net_64, blt_vs, convrnn, rcnn_sat
from rnndyn_fast.ops import cuda_module, engine_timing

torch.set_num_threads(1 if DRY else torch.get_num_threads())
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BLT: dict[str, Any] = {"timesteps": 2, "image_size": 16, "widths": (8, 8, 16, 32, 64)} if DRY else {"timesteps": 4}
NETWORKS: dict[str, tuple[Callable[[], Any], int]] = {
    "blt_net_64 lateral": (lambda: blt_net_64(**BLT, topdown_connections=False), 16 if DRY else 64),
    "blt_net_64 top-down": (lambda: blt_net_64(**BLT, LT_interaction="multiplicative"), 16 if DRY else 64),
}
if not DRY:
    NETWORKS |= {
        "blt_vs": (lambda: blt_vs(4, 565, bio_unroll=False), 224),
        "rcnn_sat": (lambda: rcnn_sat("bl", 565, timesteps=3), 128),
        "convrnn": (lambda: convrnn("rgc_shallow"), 224),
    }


def scalar(outputs: Any) -> Tensor:
    """One number of whatever a network returns."""
    if isinstance(outputs, Tensor):
        return outputs.float().mean()
    return torch.stack([scalar(o) for o in (outputs.values() if isinstance(outputs, dict) else outputs)]).sum()


def smoke() -> int:
    """Returns the number of failures; each is a line with the error, and the others go on."""
    failures = 0
    for name, (make, size) in NETWORKS.items():
        for precision, dtype in PRECISIONS.items():
            try:
                torch.manual_seed(0)
                net = make().to(DEVICE)
                x = torch.rand(4, 3, size, size, device=DEVICE)
                with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                    loss = scalar(net(x))
                (1024 * loss).backward()
                bad = [n for n, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
                said = "runs" if loss.isfinite() and not bad else f"not finite: loss {float(loss)}, gradients of {bad[:5]}"
            except Exception as error:
                traceback.print_exc()
                said = f"{type(error).__name__}: {error}"
            failures += said != "runs"
            print(f"{name}, {precision}: {said}", flush=True)
    return failures


def engines() -> int:
    """Times every convolution of blt_net_64, and prints the plan that follows."""
    from bench_rollout_cuda import convolution_cases

    rows = {}
    for case in convolution_cases()[: 0 if DRY else None]:
        times, why = engine_timing.times_of(case, torch.device("cuda", torch.cuda.current_device()))
        rows[str(case)] = why if times is None else {name: str(t) for name, t in times.items()}
        print(case, rows[str(case)], flush=True)
        write_result("engines", {"what": "ms by engine; direct: the vendor's", **about_device(), "passes": rows})
    if DRY:
        write_result("engines", {"what": "nothing can be timed here", "passes": {}})
    return 0


def profile() -> int:
    """A training step as the benchmarks have it: seconds and launches by kernel."""
    net: nn.Module = blt_net_64(**(BLT | {} if DRY else {"timesteps": 10}), topdown_connections=False).to(DEVICE)
    n, size = (2, 16) if DRY else (512, 64)
    x = torch.rand(n, 3, size, size, device=DEVICE)
    optimizer = torch.optim.Adam(net.parameters(), fused=not DRY)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.float16, enabled=not DRY):
            loss = scalar(net(x))
        loss.backward()
        optimizer.step()

    for _ in range(1 if DRY else 5):
        step()
    whole = seconds_of(step)
    activity = torch.profiler.ProfilerActivity.CPU if DRY else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as found:
        step()
        if not DRY:
            torch.cuda.synchronize()
    rows = []
    for event in found.key_averages():
        microseconds = event.self_cpu_time_total if DRY else event.self_device_time_total
        if microseconds > 0:
            rows.append({"kernel": event.key[:200], "launches": event.count, "microseconds": rounded(microseconds)})
    rows.sort(key=lambda row: -float(row["microseconds"]))
    about = {"batch": n, "seconds": rounded(whole), "no kernels of ours": None if DRY else cuda_module.unavailable}
    write_result("profile", {"what": "training step of blt_net_64, lateral additive", **about, "kernels": rows})
    for row in rows[:15]:
        print(row["microseconds"], row["launches"], row["kernel"])
    return 0


if __name__ == "__main__":
    sys.exit(min(1, {"smoke": smoke, "engines": engines, "profile": profile}[sys.argv[1]]()))
