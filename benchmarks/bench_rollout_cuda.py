"""The CUDA kernels and rollouts against PyTorch's own on the same device, in the same run, alternating.

    pytest benchmarks/bench_rollout_cuda.py

Training step and forward rollout of blt_net_64 in float32 (T = 10; lateral additive, and all connections multiplicative) against the
network written the published way, eager and channels_last; the fused convolution in float16 on the shapes of its areas against cuDNN's
convolution and a separate epilogue; the readout-zone pass over 25,000 trajectories against the reference. Times are medians by CUDA
events. Outputs are checked here too. Results go to benchmarks/results/*.json (RNNDYN_BENCH_RESULTS). RNNDYN_BENCH_QUICK=1 checks at a tiny
size that all of it runs. Without a device everything is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from measure import QUICK, summary, write_result
from published_blt_net import PublishedNet
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast import accelerate
from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import ConvTerm
from rnndyn_fast.reference.readout_zones import readout_distance
from rnndyn_fast.reference.readout_zones import readout_zones as reference_readout_zones

NO_DEVICE = _launch_cuda.unavailable or (None if torch.cuda.is_available() else "no CUDA device")
pytestmark = pytest.mark.skipif(NO_DEVICE is not None, reason=str(NO_DEVICE))

BATCH, STEPS, ROUNDS = (4, 3, 2) if QUICK else (256, 10, 10)
SIZES: dict[str, Any] = {"widths": (8, 8, 16, 32, 64), "num_classes": 10} if QUICK else {}
NETWORKS: dict[str, dict[str, Any]] = {
    "lateral_additive": {"topdown_connections": False, "LT_interaction": "additive"},
    "topdown_multiplicative": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}
# Output channels, map, input channels of the lateral term, and of a top-down one on half the map.
CONVOLUTIONS = [(128, 32, 128, 256), (256, 16, 256, 512), (512, 8, 512, 0), (128, 32, 128, 0)]


def alternate_on_device(contenders: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds on the device of each contender, one call of each per round."""
    for run in contenders.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names if i % 2 == 0 else reversed(names):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000)
    return times


def keep(name: str, times: dict[str, list[float]], **about: Any) -> None:
    """The result, with the device it is of."""
    device = {"device": torch.cuda.get_device_name(), "torch_cuda": torch.version.cuda, "kernels": _launch_cuda.build_info()}
    write_result(name, {"what": name, **about, **device, "contenders": summary(times, "rnndyn")})


def networks(name: str) -> dict[str, nn.Module]:
    """The same parameters in each."""
    made: dict[str, nn.Module] = {}
    for contender in ("eager", "channels_last", "rnndyn"):
        torch.manual_seed(0)
        net: nn.Module = PublishedNet(**NETWORKS[name], timesteps=STEPS, **SIZES)
        if contender == "rnndyn":
            net = accelerate(net)
        net = net.cuda()
        made[contender] = net.to(memory_format=torch.channels_last) if contender == "channels_last" else net
    return made


def last(outputs: list[Tensor] | Tensor) -> Tensor:
    return outputs[-1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("what", ["train", "forward"])
def test_rollout(name: str, what: str) -> None:
    nets = networks(name)
    x = torch.randn(BATCH, 3, 64, 64, device="cuda")
    labels = torch.randint(SIZES.get("num_classes", 100), (BATCH,), device="cuda")

    def forward(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return last(net(x))

    def train(net: nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        outputs = net(x)
        sum(functional.nll_loss(o, labels) for o in outputs).backward()

    torch.testing.assert_close(forward(nets["rnndyn"]), forward(nets["eager"]), rtol=1e-2, atol=1e-2)
    step = train if what == "train" else forward
    times = alternate_on_device({k: lambda net=net: step(net) for k, net in nets.items()})
    peaks = {}
    for k, net in nets.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(net)
        peaks[k] = torch.cuda.max_memory_allocated() - before
    keep(f"cuda_{what}_{name}", times, batch=BATCH, timesteps=STEPS, dtype="float32", peak_bytes=peaks)


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_recurrent_conv(shape: tuple[int, int, int, int]) -> None:
    channels, size, lateral, top_down = shape
    n = 2 if QUICK else 1024
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cuda").half()

    x, weight = draw(n, size, size, lateral), 0.02 * draw(channels, 3, 3, lateral)
    drive, value = draw(n, size, size, channels), torch.empty(n, size, size, channels, device="cuda", dtype=torch.half)
    terms = [ConvTerm(x, weight, 1, 1)]
    if top_down:
        terms.append(ConvTerm(draw(n, size // 2, size // 2, top_down), 0.02 * draw(channels, 3, 3, top_down), 2, 1, True))

    def vendor() -> Tensor:
        total = drive.permute(0, 3, 1, 2)
        for t in terms:
            source, kernel = t.x.permute(0, 3, 1, 2), t.weight.permute(0, 3, 1, 2)
            if t.transposed:
                total = total + functional.conv_transpose2d(source, kernel.transpose(0, 1), None, 2, 1, output_padding=1)
            else:
                total = total + functional.conv2d(source, kernel, None, 1, 1)
        return total

    def ours() -> None:
        _launch_cuda.recurrent_conv(terms, None, [drive], None, value)

    ours()
    torch.testing.assert_close(value.permute(0, 3, 1, 2), vendor(), rtol=2e-2, atol=5e-2)
    products = n * channels * (size**2 * 9 * lateral + (size // 2) ** 2 * 9 * top_down)
    times = alternate_on_device({"rnndyn": ours, "cudnn": vendor})
    keep("cuda_recurrent_conv_" + "_".join(map(str, shape)), times, samples=n, multiply_adds=products, dtype="float16")


def test_readout_zones() -> None:
    t, n, d, c = (3, 50, 64, 10) if QUICK else (10, 25000, 512, 100)
    r, weight, labels = torch.randn(t, n, d, device="cuda"), torch.randn(c, d, device="cuda"), torch.randint(c, (n,), device="cuda")
    distance = readout_distance(weight)
    inverse, norms = torch.where(distance > 0, 1 / distance, 0.0), torch.linalg.vector_norm(weight, dim=-1)
    tables = [torch.empty(t, n, device="cuda", dtype=torch.int64 if i == 0 else torch.float32) for i in range(7)]

    def ours() -> Tensor:
        cosine = r @ weight.T
        _launch_cuda.readout_zones(r, None, None, labels, None, norms, inverse, cosine, tables)
        return cosine

    truth = reference_readout_zones(r, weight, labels, distance=distance)
    torch.testing.assert_close(ours(), truth.cosine, rtol=1e-4, atol=1e-4)
    times = alternate_on_device({"rnndyn": ours, "torch": lambda: reference_readout_zones(r, weight, labels, distance=distance)})
    keep("cuda_readout_zones", times, timesteps=t, samples=n, dims=d, classes=c, bytes=4 * t * n * (d + 3 * c))
