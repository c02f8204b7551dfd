"""The CUDA kernels and rollouts against PyTorch's own on the same device, in the same run, alternating.

    pytest benchmarks/bench_rollout_cuda.py

- training step and forward rollout of blt_net_64 as published (T = 10, batch 1024, float16 by autocast; lateral additive, and all
  connections multiplicative; forward at batch 32 too) against the network written the published way, eager and channels_last, and, with
  RNNDYN_BENCH_COMPILE=1 (minutes of compilation), by torch.compile(mode="max-autotune-no-cudagraphs"); ours also as CUDA graphs. Peak
  memory, and the share of the measured peak of matrix products;
- each convolution of these networks, each pass: the fused convolution against cuDNN's and a separate epilogue;
- the readout-zone pass over 25,000 trajectories against torch's operations, and the share of the measured bandwidth.

Times are medians by CUDA events. Outputs are checked here too. Results go to benchmarks/results/*.json (RNNDYN_BENCH_RESULTS).
RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. Without a device everything is skipped.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from measure import QUICK
from on_device import (
    DEVICE,
    DRY,
    NO_DEVICE,
    alternate_on_device,
    copy_bandwidth,
    keep,
    keep_peaks,
    matrix_peak,
    mixed_precision,
    peak_bytes,
    rounded,
    use_harness,
)
from published_blt_net import PublishedNet
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast import accelerate
from rnndyn_fast.graph import Operator
from rnndyn_fast.graph.schedule import Schedule
from rnndyn_fast.graph.spec.network import pooled_shape
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import GraphedNetwork, GraphedTrainingStep
from rnndyn_fast.ops import engine_timing, sequence_launches
from rnndyn_fast.ops.cuda_engine import why_not_timed
from rnndyn_fast.ops.fused_conv import KERNELS
from rnndyn_fast.ops.readout_zones import TABLES
from rnndyn_fast.reference.readout_zones import readout_distance
from rnndyn_fast.reference.readout_zones import readout_zones as reference_readout_zones

pytestmark = pytest.mark.skipif(NO_DEVICE is not None, reason=str(NO_DEVICE))

SMALL = QUICK or DRY
STEPS, SIZE, CLASSES = (2, 16, 4) if SMALL else (10, 64, 100)
SIZES: dict[str, Any] = {"image_size": SIZE, "num_classes": CLASSES} | ({"widths": (8, 8, 16, 32, 64)} if SMALL else {})
TRAIN_BATCHES = (2,) if SMALL else (1024, 512, 256)  # the first that every contender has memory for
FORWARD_BATCHES = (2,) if SMALL else (1024, 32)
COMPILE = os.environ.get("RNNDYN_BENCH_COMPILE") == "1"
NETWORKS: dict[str, dict[str, Any]] = {
    "lateral_additive": {"topdown_connections": False, "LT_interaction": "additive"},
    "topdown_multiplicative": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        use_harness(monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    if not DRY:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def networks(name: str) -> dict[str, nn.Module]:
    """The same parameters in each."""
    made: dict[str, nn.Module] = {}
    for contender in ("rnndyn", "eager", "channels_last", *(["compiled"] if COMPILE else [])):
        torch.manual_seed(0)
        net: Any = PublishedNet(**NETWORKS[name], timesteps=STEPS, **SIZES)
        if contender == "rnndyn":
            net = accelerate(net)
            if DRY:
                net.engine = "fused"  # nothing can be timed
        net = net.to(DEVICE)
        if contender in ("channels_last", "compiled"):
            net = net.to(memory_format=torch.channels_last)
        made[contender] = torch.compile(net, mode="max-autotune-no-cudagraphs") if contender == "compiled" else net
    return made


def images(n: int, channels_last: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def total_loss(outputs: Any, labels: Tensor) -> Tensor:
    return torch.stack([functional.nll_loss(o.float(), labels) for o in outputs]).sum()


def products(schedule: Schedule, samples: int) -> int:
    """Multiplications and additions of our training step: each map, the gradients of its weight and, but for images, of its source."""
    inputs = {node.name for node in schedule.network.inputs}
    return sum(
        2 * samples * schedule.network.multiply_adds(d.connection) * len(d.slots) * (2 if d.source in inputs else 3)
        for d in schedule.drives
        if d.connection.operator is not Operator.IDENTITY
    )


def training_steps(name: str, n: int) -> tuple[dict[str, Callable[[], Any]], dict[str, nn.Module]]:
    """A step of each contender: autocast, loss over time, scaled gradients, Adam."""
    nets, labels = networks(name), torch.arange(n, device=DEVICE) % CLASSES
    steps: dict[str, Callable[[], Any]] = {}
    for contender, net in nets.items():
        x = images(n, contender in ("channels_last", "compiled"))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=not DRY)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)

        def step(net: nn.Module = net, x: Tensor = x, optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            optimizer.zero_grad(set_to_none=True)
            with mixed_precision():
                loss = total_loss(net(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        steps[contender] = step
    if not DRY:
        net, x = nets["rnndyn"], images(n, False)
        captured = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True, capturable=True)
        graphed = GraphedTrainingStep(
            net, lambda x, labels: total_loss(net(x), labels), captured,
            scaler=torch.amp.GradScaler("cuda", init_scale=1024.0), autocast=torch.float16,
        )  # fmt: skip
        steps["rnndyn_graph"] = lambda: graphed(x, labels)
    return steps, nets


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name: str) -> None:
    steps: dict[str, Callable[[], Any]] = {}
    nets: dict[str, nn.Module] = {}
    for n in TRAIN_BATCHES:
        try:
            steps, nets = training_steps(name, n)
            peaks = {}
            for contender, step in steps.items():
                for _ in range(1 if DRY else 5):  # (past the capture of graphs)
                    step()
                if contender != "rnndyn_graph":  # its memory stays
                    peaks[contender] = peak_bytes(step)
            times = alternate_on_device(steps)
        except torch.OutOfMemoryError:
            if n == TRAIN_BATCHES[-1]:
                raise
            steps, nets = {}, {}
            torch.cuda.empty_cache()
            continue
        break
    work, peak = products(nets["rnndyn"].schedule(), n), matrix_peak()
    about = {"batch": n, "timesteps": STEPS, "tflop": rounded(work / 1e12), "matrix_peak_tflops": rounded(peak / 1e12)}
    share = work / statistics.median(times["rnndyn_graph" if "rnndyn_graph" in times else "rnndyn"]) / peak
    suffix = "_compiled" if COMPILE else ""
    keep(f"cuda_train_{name}{suffix}", times, **about, share_of_matrix_peak=rounded(share), dtype="float16 autocast")
    keep_peaks(f"cuda_train_memory_{name}{suffix}", peaks, batch=n, timesteps=STEPS, dtype="float16 autocast")


@pytest.mark.parametrize("n", FORWARD_BATCHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_forward(name: str, n: int) -> None:
    nets = networks(name)
    contenders: dict[str, Callable[[], Any]] = {}
    for contender, net in nets.items():
        x = images(n, contender in ("channels_last", "compiled"))

        def run(net: nn.Module = net, x: Tensor = x) -> Tensor:
            with torch.no_grad(), mixed_precision():
                return net(x)[-1]

        contenders[contender] = run
    if not DRY:
        graphed, given = GraphedNetwork(nets["rnndyn"], copy=False), images(n, False)

        def replay() -> Tensor:
            with mixed_precision():
                return graphed(given)[-1]

        contenders["rnndyn_graph"] = replay
    expected = contenders["eager"]().float()
    for contender, run in contenders.items():
        for _ in range(1 if DRY else 3):
            got = run().float()
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2, msg=lambda m, c=contender: f"{c}: {m}")
    times = alternate_on_device(contenders)
    keep(f"cuda_forward_{name}_{n}{'_compiled' if COMPILE else ''}", times, batch=n, timesteps=STEPS, dtype="float16 autocast")


def convolution_cases() -> list[engine_timing.Case]:
    """Every convolution of the two networks that one of our own engines can compute."""
    found: dict[str, engine_timing.Case] = {}
    for options in NETWORKS.values():
        schedule = blt_net_64(**options, timesteps=STEPS, **SIZES).schedule()
        for drive in schedule.drives:
            c, shape = (
                drive.connection,
                schedule.network.weight_shape(drive.connection) if drive.connection.operator is not Operator.IDENTITY else (),
            )
            engines = tuple(e for e in KERNELS if shape and why_not_timed(e, c.geometry, shape, torch.float16) is None)
            if not engines:
                continue
            _, height, width = pooled_shape(schedule.network.shapes[drive.source], c.pool)
            case = engine_timing.Case(c.geometry, shape, height, width, torch.float16, 2 if SMALL else engine_timing.MOST_SAMPLES, engines)
            found.setdefault(str(case), case)
    return list(found.values())


@pytest.mark.skipif(COMPILE, reason="measured in the other run")
@pytest.mark.parametrize("case", convolution_cases()[: 1 if DRY else None], ids=str)
def test_convolution(case: engine_timing.Case) -> None:
    passes = engine_timing.passes(case, DEVICE)
    for name, contenders in passes.items():
        names = {"fused": "rnndyn", "direct": "cudnn"}
        times = alternate_on_device({names.get(engine, engine): run for engine, run in contenders.items()})
        slug = "_".join(map(str, (*case.weight_shape, case.height, case.geometry.operator.value)))
        keep(f"cuda_conv_{slug}_{name}", times, samples=case.measured_samples, dtype="float16")


@pytest.mark.skipif(COMPILE, reason="measured in the other run")
def test_readout_zones() -> None:
    t, n, d, c = (3, 50, 64, 10) if SMALL else (10, 25000, 512, 100)
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(t, n, d, generator=generator).to(DEVICE)
    weight, labels = torch.randn(c, d, generator=generator).to(DEVICE), (torch.arange(n) % c).to(DEVICE)
    distance = readout_distance(weight)
    inverse, norms = torch.where(distance > 0, 1 / distance, 0.0), torch.linalg.vector_norm(weight, dim=-1)
    dtypes = {name: torch.int64 if name == "predicted" else torch.float32 for name in TABLES}
    tables = {name: torch.empty(t, n, device=DEVICE, dtype=dtype) for name, dtype in dtypes.items()}

    def ours() -> Tensor:
        cosine = r @ weight.T
        sequence_launches.readout_zones.on_device(
            representations=r, labels=labels, weight_norm=norms, inverse_distance=inverse, cosine=cosine, **tables
        )
        return cosine

    def theirs() -> Any:
        return reference_readout_zones(r, weight, labels, distance=distance)

    torch.testing.assert_close(ours(), theirs().cosine, rtol=1e-3, atol=1e-3)
    times = alternate_on_device({"rnndyn": ours, "torch": theirs})
    moved, bandwidth = r.nbytes + 4 * t * n * 3 * c, copy_bandwidth()
    share = moved / statistics.median(times["rnndyn"]) / bandwidth
    about = {"timesteps": t, "samples": n, "dims": d, "classes": c, "bandwidth_gb_per_s": rounded(bandwidth / 1e9)}
    keep("cuda_readout_zones", times, **about, share_of_bandwidth=rounded(share))
