"""Rollouts as on a GPU, in float32: the CUDA kernels in the SIMT harness, with PyTorch's convolutions between them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import send_to_kernels
from test_rollout import run, test_float32_is_as_good_as_plain_pytorch
from torch import Tensor

from rnndyn_fast.ops.addresses import device_queue
from rnndyn_fast.program import rollout

# (Imported for its body; it is collected where it is written.)
float32_is_as_good_as_plain_pytorch = test_float32_is_as_good_as_plain_pytorch
del test_float32_is_as_good_as_plain_pytorch

# All of the CPU's cases pass; these take each path of the schedule once.
NAMES = (
    "lateral_additive_bias", "topdown_additive", "topdown_multiplicative", "topdown_multiplicative_bias",
    "biological_loop_multiplicative",
    "skip_additive",
    "several_inputs_multiplicative", "operators_additive", "shared_norm", "feed_forward_frames", "delays", "no_norm_no_relu",
)  # fmt: skip
ON_DEVICE = "RNNDYN_TEST_DEVICE" in os.environ
by_case = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=lambda c: c.name)


@pytest.fixture
def as_on_device(simt: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """float32 tensors go to the CUDA kernels. Returns the names of the launches, as they come."""
    return send_to_kernels(monkeypatch, torch.float32)


@by_case
@pytest.mark.skipif(ON_DEVICE, reason="below, on the device")
def test_float32_on_the_cuda_kernels(case: RolloutCase, as_on_device: list[str]) -> None:
    float32_is_as_good_as_plain_pytorch(case)
    assert {"area_step_forward", "area_step_backward"} <= set(as_on_device)


@pytest.mark.skipif(ON_DEVICE, reason="below, on the device")
def test_inference_on_the_cuda_kernels(as_on_device: list[str]) -> None:
    case = CASES["topdown_multiplicative"]
    with torch.no_grad():
        outputs = rollout(
            case.network, case.timesteps, case.inputs(torch.float32), case.parameters(torch.float32), case.record, backend="native"
        )
    assert set(as_on_device) == {"area_step_forward"}
    torch.testing.assert_close(outputs, run(case, "reference", torch.float32)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(ON_DEVICE, reason="below, on the device")
def test_winograd_is_refused_on_a_device(as_on_device: list[str]) -> None:
    case = CASES["topdown_additive"]
    arguments = (case.network, 2, case.inputs(torch.float32), case.parameters(torch.float32), case.record)
    with pytest.raises(ValueError, match="engine='winograd': it runs on the CPU"):
        rollout(*arguments, engine="winograd")


@by_case
@pytest.mark.skipif(not ON_DEVICE, reason="RNNDYN_TEST_DEVICE is not set: the tests above take its place")
@pytest.mark.parametrize("captured", [False, True], ids=["", "cuda_graph"])
def test_on_a_device(case: RolloutCase, captured: bool) -> None:
    """Against the reference in float64 on the CPU; and again, replayed as a CUDA graph."""
    device = os.environ["RNNDYN_TEST_DEVICE"]
    inputs = [x.to(device) for x in case.inputs(torch.float32)]
    parameters = {name: x.to(device).requires_grad_() for name, x in case.parameters(torch.float32).items()}
    truth = run(case, "reference", wanted=set(parameters))
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(device, torch.float32) for o in truth[0]]

    def step() -> tuple[list[Tensor], list[Tensor | None]]:
        outputs = rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="native")
        return outputs, list(torch.autograd.grad(outputs, list(parameters.values()), cotangents, allow_unused=True))

    if captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, grads = step()
        graph.replay()
    else:
        outputs, grads = step()
    torch.cuda.synchronize()
    for ours, theirs in zip([*outputs, *grads], [*truth[0], *truth[1].values()], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert float((ours.cpu().double() - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_tensors_of_another_kind_are_refused() -> None:
    x: Tensor = torch.zeros(2, 4, 4, 8)
    with pytest.raises(ValueError, match="expected tensors on a CUDA device, got cpu"):
        device_queue(x.device)
