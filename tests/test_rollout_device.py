"""Rollouts on a CUDA device: half precision, engines, mixed-precision training, CUDA graphs, errors.

Where there is none, the harness's tests (test_rollout_half.py, test_cuda_engine.py, test_cuda_graphs.py) take their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import DEVICE, count_launches, on_a_device, rounded_case, wide_cases, widened
from test_rollout_half import errors, without_maxima, without_relu
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import GraphedNetwork, GraphedTrainingStep, RecurrentNetwork
from rnndyn_fast.ops import engine_timing
from rnndyn_fast.program import rollout

pytestmark = on_a_device


@pytest.fixture(autouse=True)
def _own_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(case: RolloutCase, dtype: torch.dtype, backend: str, engine: str, device: str) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of all parameters for one fixed random cotangent, on the CPU."""
    inputs, parameters = rounded_case(case, torch.float16)
    ps = {name: p.to(device, dtype).requires_grad_() for name, p in parameters.items()}
    outputs = rollout(case.network, case.timesteps, [x.to(device, dtype) for x in inputs], ps, case.record, backend=backend, engine=engine)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(device, dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(ps.values()), cotangents, allow_unused=True)
    return [o.detach().cpu() for o in outputs], {n: None if g is None else g.cpu() for n, g in zip(ps, grads, strict=True)}


@wide_cases(
    "topdown_additive",
    "topdown_multiplicative",
    "lateral_multiplicative",
    "skip_additive",
    "many_terms_multiplicative",
    "operators_additive",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["fused", "triton", "direct", "auto"])
def test_half_is_as_good_as_plain_pytorch(case: RolloutCase, dtype: torch.dtype, engine: str) -> None:
    case = without_relu(case)
    if case.name.startswith("operators"):
        case = without_maxima(case)
    truth = step(case, torch.float64, "reference", "auto", "cpu")
    plain = errors(step(case, dtype, "reference", "auto", str(DEVICE)), truth)
    for name, error in errors(step(case, dtype, "native", engine, str(DEVICE)), truth).items():
        assert error <= 2 * plain[name] + 8 * torch.finfo(dtype).eps, f"{name}: {error:.3g}, plain {plain[name]:.3g}"


def test_no_rollout_waits_for_the_device(sync_is_an_error: None) -> None:
    case = widened(CASES["several_inputs_multiplicative"])
    inputs, parameters = rounded_case(case, torch.float16)
    xs = [x.to(DEVICE, torch.float16) for x in inputs]
    ps = {name: p.to(DEVICE, torch.float16).requires_grad_() for name, p in parameters.items()}
    for _ in range(2):  # the first one measures
        outputs = rollout(case.network, case.timesteps, xs, ps, case.record, backend="native")
        sum(o.float().sum() for o in outputs).backward()
        torch.cuda.set_sync_debug_mode("error")


def network(**options: Any) -> RecurrentNetwork:
    torch.manual_seed(3)
    sizes = {"timesteps": 4, "image_size": 32, "widths": (16, 16, 32, 64, 128), "num_classes": 10, "backend": "native"}
    net = blt_net_64(**{**sizes, **options}).cuda()
    assert isinstance(net, RecurrentNetwork)
    return net


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 32, 32, generator=generator).cuda(), (torch.arange(n) % 10).cuda()


def test_a_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(widths=(16, 16, 32, 64, 128), image_size=16)
    x = torch.rand(5, 3, 16, 16).cuda().half()
    net.half()(x)
    asked: list[str] = []
    monkeypatch.setattr(engine_timing, "measure", lambda case, device: asked.append(str(case)))
    net(x)
    assert asked == []
    assert engine_timing.cache_file().exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interaction", ["additive", "multiplicative"])
def test_mixed_precision_training_follows_float32(dtype: torch.dtype, interaction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, as in float32, without NaN and, at a sane scale, without a step that is skipped; an overflow skips one step only."""
    launches = count_launches(monkeypatch)
    losses: dict[str, list[float]] = {}
    overflows = dtype == torch.float16
    for mode in ("float32", "half"):
        net = network(LT_interaction=interaction, engine="fused" if mode == "half" else "auto")
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=10**6, enabled=mode == "half")
        x, labels = batch()
        losses[mode] = []
        for i in range(12):
            optimizer.zero_grad(set_to_none=True)
            if i == 8 and mode == "half" and overflows:
                before = [p.detach().clone() for p in net.parameters()]
                scaler.update(2.0**126)
            with torch.autocast("cuda", dtype, enabled=mode == "half"):
                loss = functional.nll_loss(net(x).flatten(0, 1), labels.repeat(4))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if i == 8 and mode == "half" and overflows:
                assert scaler.get_scale() == 2.0**125
                assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
                scaler.update(2.0**12)
                continue
            losses[mode].append(float(loss.detach()))
            assert all(p.isfinite().all() for p in net.parameters())
        if mode == "half":
            assert scaler.get_scale() == 2.0**12
    assert losses["half"][-1] < losses["half"][0]
    assert max(abs(a - b) for a, b in zip(losses["half"][:6], losses["float32"][:6], strict=True)) < 0.05 * losses["float32"][0]
    assert "recurrent_conv" in launches


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_a_graphed_network_gives_what_the_network_gives(half: bool) -> None:
    net = network()
    graphed = GraphedNetwork(net)
    for n in (3, 16, 3, 16, 3):
        x = torch.rand(n, 3, 32, 32).cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=half):
            expected = net(x, record=("v4",))
            for _ in range(2):
                ours = graphed(x, record=("v4",))
                torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(ours[1]["v4"], expected[1]["v4"], rtol=1e-2, atol=1e-2)
    assert len(graphed._cache) == 2


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("optimiser", ["adam", "adam_captured"])
def test_graphed_training_is_training(half: bool, optimiser: str) -> None:
    results = []
    for graphed in (False, True):
        net = network(timesteps=2)
        start = torch.cat([p.detach().flatten() for p in net.parameters()])
        options = {"capturable": True, "fused": True} if optimiser == "adam_captured" else {}
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0) if half else None

        def loss(x: Tensor, labels: Tensor, net: RecurrentNetwork = net) -> Tensor:
            return functional.nll_loss(net(x).flatten(0, 1), labels.repeat(2))

        step = GraphedTrainingStep(
            net, loss, optimizer, scaler=scaler, autocast=torch.float16 if half else None, calls_before=3 if graphed else 10**6
        )
        assert step.captures_optimizer == (optimiser == "adam_captured")
        losses = [float(step(*batch())) for _ in range(8)]
        assert len(step._cache) == int(graphed)
        results.append((losses, torch.cat([p.detach().flatten() for p in net.parameters()]) - start))
    assert max(abs(a - b) for a, b in zip(results[0][0], results[1][0], strict=True)) < 2e-2
    # Adam makes much of gradients that are nearly zero: compared as a whole.
    assert float((results[0][1] - results[1][1]).norm()) < 0.05 * float(results[0][1].norm())


def test_a_step_that_reads_a_value_cannot_be_captured() -> None:
    net = network(timesteps=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        value = functional.nll_loss(net(x)[-1], labels)
        return value * float(value.detach())

    step = GraphedTrainingStep(net, loss, optimizer, calls_before=1)
    step(*batch())
    with pytest.raises(RuntimeError, match="a CUDA graph could not be captured"):
        step(*batch())
    torch.cuda.synchronize()
    assert float(functional.nll_loss(net(batch()[0])[-1], batch()[1]).detach()) > 0  # the device goes on


# ---------------------------------------------------------------- bad input


def test_tensors_of_two_devices_are_refused() -> None:
    net = network()
    x, _ = batch(2)
    with pytest.raises(TypeError, match=r"expected torch.float32 on cuda:0 like parameter .*, got torch.float32 on cpu"):
        net(x.cpu())
    with pytest.raises(TypeError, match=r"expected torch.float32 on cpu like parameter .*, got torch.float32 on cuda:0"):
        net.cpu()(x)


def test_engines_of_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="engine='winograd': it runs on the CPU"):
        network(engine="winograd")(batch(2)[0])


def test_a_device_that_is_not_there() -> None:
    from rnndyn_fast.cli import commands

    with pytest.raises(ValueError, match=r"device: this machine's CUDA devices are cuda:0.*, got cuda:99"):
        commands.plan("blt_net_64", device="cuda:99", image_size=None, timesteps=2, engine="auto")


def test_out_of_memory_leaves_everything_as_it_was() -> None:
    net = network(timesteps=8)
    x = torch.rand(64, 3, 32, 32).cuda()
    before = [p.detach().clone() for p in net.parameters()]
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            net(x).sum().backward()
        assert any("in a native rollout of an input [64, 3, 32, 32]" in note for note in caught.value.__notes__)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())
    net(x).sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters() if p.grad is not None], expected, rtol=1e-3, atol=1e-3)
