"""Training step and forward rollout of blt_net_64 against the network written the published way, in the same run,
alternating.

    pytest benchmarks/bench_rollout.py

Batch 16, T = 10, lateral connections with additive interaction and all connections with the multiplicative one;
peers: eager PyTorch, the same
with channels_last, torch.compile. Outputs and gradients are checked here too. Results go to
benchmarks/results/*.json (RNNDYN_BENCH_RESULTS).
RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. RNNDYN_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import QUICK, alternate, peak_memory, summary, write_result
from published_blt_net import PublishedNet
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast import accelerate

BATCH, STEPS, ROUNDS = (2, 3, 2) if QUICK else (16, 10, 7)
SIZES: dict[str, Any] = {"widths": (4, 8, 16, 32, 64), "num_classes": 10} if QUICK else {}
COMPILE = os.environ.get("RNNDYN_BENCH_COMPILE", "1") == "1" and not QUICK
NETWORKS: dict[str, dict[str, Any]] = {
    "lateral_additive": {"topdown_connections": False, "LT_interaction": "additive"},
    "topdown_multiplicative": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}
Outputs = list[Tensor] | Tensor
by_network = pytest.mark.parametrize("name", NETWORKS)


def published(name: str) -> PublishedNet:
    torch.manual_seed(0)
    return PublishedNet(**NETWORKS[name], timesteps=STEPS, **SIZES)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    classes = SIZES.get("num_classes", 100)
    return torch.randn(BATCH, 3, 64, 64, generator=generator), torch.randint(classes, (BATCH,), generator=generator)


def loss_of(outputs: Outputs, labels: Tensor) -> Tensor:
    return torch.stack([functional.nll_loss(out, labels) for out in outputs]).sum()


def training_step(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    net.zero_grad(set_to_none=True)
    loss = loss_of(net(x), labels)
    loss.backward()
    return float(loss.detach())


def forward(net: nn.Module, x: Tensor) -> Outputs:
    with torch.no_grad():
        return net(x)


def contenders(name: str, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each network, on the same weights, with its input in the layout it wants."""
    eager = published(name)
    channels_last = published(name).to(memory_format=torch.channels_last)
    result: dict[str, tuple[nn.Module, Tensor]] = {
        "rnndyn": (accelerate(published(name), backend="native"), x),
        "eager": (eager, x),
        "eager_channels_last": (channels_last, x.to(memory_format=torch.channels_last)),
    }
    if COMPILE:
        result["compiled"] = (torch.compile(published(name)), x)
    return result


def measure(benchmark: Any, name: str, kind: str, calls: dict[str, Callable[[], Any]]) -> None:
    result = summary(alternate(calls, ROUNDS), "rnndyn")
    # pytest-benchmark shows one contender; the alternating measurement of all of them is what counts.
    benchmark.pedantic(calls["rnndyn"], rounds=1, warmup_rounds=0)
    benchmark.extra_info.update(network=name, batch=BATCH, timesteps=STEPS, contenders=result)
    write_result(
        f"rollout_{kind}_{name}" + ("_quick" if QUICK else ""),
        {"what": f"{kind} of blt_net_64, {name}", "batch": BATCH, "timesteps": STEPS, "contenders": result},
    )
    print(f"\n{kind}, {name}: " + "; ".join(f"{k} {v['median_s']:.3f} s (x{v['ours_is_faster_by']:.2f})" for k, v in result.items()))


@by_network
def test_forward(benchmark: Any, name: str) -> None:
    x, _ = batch()
    nets = contenders(name, x)
    truth = torch.stack(list(forward(published(name).double(), x.double())))
    for label, (net, inputs) in nets.items():
        out = torch.stack(list(forward(net, inputs))).double()
        # Log-probabilities after 10 steps through relu and LayerNorm in float32; eager PyTorch itself differs by up
        # to 1e-4.
        torch.testing.assert_close(out, truth, rtol=1e-3, atol=1e-3, msg=lambda m, n=label: f"{n}: {m}")
    measure(benchmark, name, "forward", {k: lambda n=net, i=i: forward(n, i) for k, (net, i) in nets.items()})


@by_network
def test_training_step(benchmark: Any, name: str) -> None:
    x, labels = batch()
    nets = contenders(name, x)
    exact = published(name).double()
    truth = training_step(exact, x.double(), labels)
    grads = {k: p.grad for k, p in exact.named_parameters() if p.grad is not None}
    for label, (net, inputs) in nets.items():
        assert training_step(net, inputs, labels) == pytest.approx(truth, rel=1e-4), label
        for k, p in net.named_parameters():
            wanted = grads.get(k.removeprefix("_orig_mod."))
            assert (p.grad is None) == (wanted is None), k
            if wanted is not None and p.grad is not None:
                # Relus and maxima that fall on the other side in float32, in eager PyTorch as well: in norm up to
                # 3e-3 after 10 steps.
                error = float((p.grad.double() - wanted).norm() / wanted.norm())
                assert error < 1e-2, f"{label} {k}: {error:.3g}"
    measure(benchmark, name, "training", {k: lambda n=net, i=i: training_step(n, i, labels) for k, (net, i) in nets.items()})


_IMPORTS = "import torch, rnndyn_fast, published_blt_net, bench_rollout as b"
_STEP = "x, y = b.batch(); net = {net}; b.training_step(net, {x}, y)"
_FORWARD = "x, y = b.batch(); net = {net}; b.forward(net, {x})"


@by_network
@pytest.mark.parametrize("kind", ["training", "forward"])
def test_peak_memory(benchmark: Any, name: str, kind: str) -> None:
    """Peak resident size of one call (with weights, gradients and batch) in a fresh process, above that of its
    imports."""
    code = _STEP if kind == "training" else _FORWARD
    nets = {
        "rnndyn": code.format(net=f"b.accelerate(b.published('{name}'), backend='native')", x="x"),
        "eager": code.format(net=f"b.published('{name}')", x="x"),
        "eager_channels_last": code.format(
            net=f"b.published('{name}').to(memory_format=torch.channels_last)",
            x="x.to(memory_format=torch.channels_last)",
        ),
    }
    peaks = benchmark.pedantic(lambda: {k: peak_memory(v, baseline=_IMPORTS) for k, v in nets.items()}, rounds=1)
    benchmark.extra_info.update(network=name, batch=BATCH, timesteps=STEPS, peak_bytes=peaks)
    write_result(
        f"rollout_memory_{kind}_{name}" + ("_quick" if QUICK else ""),
        {"what": f"peak memory of {kind}, blt_net_64, {name}", "batch": BATCH, "timesteps": STEPS, "peak_bytes": peaks},
    )
    print(f"\nmemory of {kind}, {name}: " + "; ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in peaks.items()))
    assert all(v > 0 for v in peaks.values())
