"""Rollouts in half precision, as on a GPU, with the fused convolution: every CUDA kernel in the SIMT harness."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import HALF, in_harness, rounded_case, send_to_kernels, wide_cases, widened
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from rnndyn_fast.graph import Activation, Pool
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.program import plan, rollout
from rnndyn_fast.program.ir import instr_lives

pytestmark = in_harness

NAMES = (
    "lateral_additive_bias", "lateral_multiplicative", "topdown_additive", "topdown_multiplicative", "topdown_multiplicative_bias",
    "biological_loop_multiplicative", "skip_additive", "several_inputs_multiplicative", "shared_multiplicative",
    "many_terms_additive", "many_terms_multiplicative", "feed_forward_frames", "no_norm_no_relu",
)  # fmt: skip
Gradients = dict[str, Tensor | None]


def step(
    case: RolloutCase, inputs: list[Tensor], parameters: dict[str, Tensor], backend: str, engine: str = "auto"
) -> tuple[list[Tensor], Gradients]:
    """Outputs, and gradients of everything for one fixed random cotangent."""
    leaves = dict(zip((n.name for n in case.network.inputs), inputs, strict=True)) | parameters
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    xs, ps = [leaves[n.name] for n in case.network.inputs], {name: leaves[name] for name in parameters}
    outputs = rollout(case.network, case.timesteps, xs, ps, case.record, backend=backend, engine=engine)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def errors(ours: tuple[list[Tensor], Gradients], truth: tuple[list[Tensor], Gradients]) -> dict[str, float]:
    """Relative errors in norm of outputs and gradients."""
    found = {f"output {i}": (o, t) for i, (o, t) in enumerate(zip(ours[0], truth[0], strict=True))}
    for name, grad in ours[1].items():
        other = truth[1][name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            found[name] = grad, other
    for name, (mine, _) in found.items():
        assert not mine.isnan().any(), f"{name}: NaN (or something left unwritten)"
    return {name: float((mine.double() - other).norm() / (1e-30 + other.norm())) for name, (mine, other) in found.items()}


def without_relu(case: RolloutCase) -> RolloutCase:
    """A case whose outputs are smooth in its inputs but for maxima: no relu that rounding could flip."""
    areas = tuple(dataclasses.replace(a, activation=Activation.IDENTITY) for a in case.network.areas)
    return dataclasses.replace(case, network=dataclasses.replace(case.network, areas=areas))


def without_maxima(case: RolloutCase) -> RolloutCase:
    """A case whose maps are read as they are instead of pooled (where the network allows that)."""
    connections = tuple(dataclasses.replace(c, pool=Pool.NONE) if c.pool is Pool.MAX else c for c in case.network.connections)
    return dataclasses.replace(case, network=dataclasses.replace(case.network, connections=connections))


def check_against_plain(case: RolloutCase, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    """Error in norm: at most twice that of the reference in the same dtype, plus a floor of roundings."""
    inputs, parameters = rounded_case(case, dtype)
    truth = step(case, inputs, parameters, "reference")
    half = [x.to(dtype) for x in inputs], {name: p.to(dtype) for name, p in parameters.items()}
    plain = errors(step(case, *half, "reference"), truth)
    launches = send_to_kernels(patch, *HALF)
    result = step(case, *half, "native", "fused")
    assert {"area_step_forward", "area_step_backward", "recurrent_conv", "recurrent_conv_weight_grad"} <= set(launches)
    assert {o.dtype for o in result[0]} == {dtype}
    assert {g.dtype for g in result[1].values() if g is not None} == {dtype}
    for name, error in errors(result, truth).items():
        assert error <= 2 * plain[name] + 4 * torch.finfo(dtype).eps, f"{name}: {error:.3g}, plain {plain[name]:.3g}"


@wide_cases(*NAMES)
def test_half_is_as_good_as_plain_pytorch(case: RolloutCase, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without relus: one that falls on the other side moves a gradient by far more than rounding, in either backend."""
    check_against_plain(without_relu(case), torch.float16, monkeypatch)


def test_other_kernels_and_strides_are_as_good(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_plain(without_maxima(without_relu(widened(CASES["operators_multiplicative"]))), torch.float16, monkeypatch)


@pytest.mark.parametrize("name", ["topdown_additive", "topdown_multiplicative"])
def test_bfloat16_is_as_good_as_plain_pytorch(name: str, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_plain(without_relu(widened(CASES[name])), torch.bfloat16, monkeypatch)


def test_half_with_relus(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this case none flips."""
    check_against_plain(widened(CASES["topdown_multiplicative"]), torch.float16, monkeypatch)


# Four steps; the image has three channels. Launches: one of v1's drive, four of v2's, and one for all modulators of each of v1, v2 and gap
# at each of the later three steps; and one of b's drive, b's lateral ones at three steps, all of c's at each of four.
@pytest.mark.parametrize(("name", "convolutions"), [("topdown_multiplicative", 1 + 4 + 3 * 3), ("lateral_additive", 1 + 3 + 4)])
def test_an_update_of_a_recurrent_area_is_one_convolution(
    name: str, convolutions: int, simt: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms of one kind, the interaction and the moments are one launch; inference gives what training does."""
    case = widened(CASES[name])
    inputs, parameters = rounded_case(case, torch.float16)
    xs, ps = [x.half() for x in inputs], {k: p.half() for k, p in parameters.items()}
    launches = send_to_kernels(monkeypatch, *HALF)
    arguments = (case.network, case.timesteps, xs)
    with torch.no_grad():
        silent = rollout(*arguments, ps, case.record, backend="native", engine="fused")
    assert launches.count("recurrent_conv") == convolutions
    for p in ps.values():
        p.requires_grad_()
    loud = rollout(*arguments, ps, case.record, backend="native", engine="fused")
    for a, b in zip(loud, silent, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["topdown_multiplicative", "lateral_additive"])
def test_what_is_saved_is_half_but_for_statistics(name: str, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES[name])
    send_to_kernels(monkeypatch, *HALF)
    inputs, parameters = rounded_case(case, torch.float16)
    xs, ps = [x.half() for x in inputs], {name: p.float().requires_grad_() for name, p in parameters.items()}
    needs = [False] * len(xs) + [True] * len(ps)
    arguments = (xs, list(ps.values()), case.network.to_json(), case.timesteps, list(case.record), needs, False, "fused")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rollout(case.network, case.timesteps, xs, ps, case.record, backend="native", engine="fused")
    (made,) = plan._plans.values()
    program = made.versions[0].executable.program
    assert any(t.dtype == torch.uint8 and program.nbytes <= t.numel() < program.nbytes + (1 << 16) for t in saved)
    kept = [v for v, (first, last) in instr_lives(program.instrs).items() if first < program.split <= last]
    area_maps = [v for v in kept if len(v.shape) >= 4 and v.dtype != torch.uint8 and "channels last" not in v.name]
    assert area_maps
    assert {v.dtype for v in area_maps} == {torch.float16}
    assert {v.dtype for v in kept if v.name.endswith((" mean", " rstd"))} == {torch.float32}
    assert {v.dtype for v in kept if v.name.endswith(" argmax")} <= {torch.uint8}
    torch.library.opcheck(torch.ops.rnndyn.rollout, arguments, test_utils=("test_schema", "test_faketensor"))


class NoHostSync(TorchDispatchMode):
    """Refuses what waits for a device, or copies to it from memory that it cannot read by itself."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "index.Tensor", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(func._overloadpacket.__name__ == name.partition(".")[0] for name in self.REFUSED), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@wide_cases("topdown_multiplicative", "several_inputs_multiplicative", "shared_multiplicative", "delays")
def test_no_rollout_waits_for_the_device(case: RolloutCase, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    send_to_kernels(monkeypatch, *HALF)
    inputs, parameters = rounded_case(case, torch.float16)
    xs, ps = [x.half().requires_grad_() for x in inputs], {name: p.half().requires_grad_() for name, p in parameters.items()}
    arguments = (case.network, case.timesteps, xs, ps, case.record)
    with NoHostSync():
        outputs = rollout(*arguments, backend="native", engine="fused")
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        with torch.no_grad():
            rollout(*arguments, backend="native", engine="fused")
    assert all(leaf.grad is not None for leaf in xs)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        torch.ones(2).sum().item()


# ---------------------------------------------------------------- mixed precision


@pytest.fixture
def autocast(simt: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As under ``torch.autocast("cuda", float16)`` (which, itself, would see that there is no device). Returns launches."""
    launches = send_to_kernels(monkeypatch, torch.float32, *HALF)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield launches
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def small_network() -> RecurrentNetwork:
    torch.manual_seed(3)
    net = blt_net_64(timesteps=2, image_size=16, widths=(8, 8, 16, 32, 64), num_classes=4, backend="native", engine="fused")
    assert isinstance(net, RecurrentNetwork)
    return net


def test_autocast_computes_in_half_with_parameters_of_float32(autocast: list[str]) -> None:
    net = small_network()
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    (it,) = net.states([x], ["it"])
    assert it.dtype == torch.float16
    assert "recurrent_conv" in autocast
    it.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    torch.set_autocast_enabled("cuda", False)
    (full,) = net.states([x], ["it"])
    assert full.dtype == torch.float32
    torch.testing.assert_close(it.float(), full, rtol=2e-2, atol=2e-2)


def test_training_with_a_gradient_scaler(autocast: list[str]) -> None:
    """The loss falls; a scale that overflows skips the step, and only that; nothing is NaN afterwards."""
    net = small_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    x, labels = torch.rand(4, 3, 16, 16), torch.arange(4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.nll_loss(net(x)[-1], labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    before = [p.detach().clone() for p in net.parameters()]
    scaler.update(2.0**120)
    step()
    assert scaler.get_scale() == 2.0**119  # it was seen
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    scaler.update(2.0**10)
    assert step() < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
