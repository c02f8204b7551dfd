"""Every CUDA op on inputs and outputs that begin at an odd element of a larger tensor, as views of flattened parameters and slices of a
batch do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_area_step_cuda as area_step
import test_ctrnn_cuda as ctrnn
import test_depthwise_conv_cuda as depthwise
import test_gate_step_cuda as gate_step
import test_norm_step_cuda as norm_step
import test_readout_zones_cuda as readout_zones
import test_recurrent_conv_cuda as recurrent_conv
import test_trajectory_norms_cuda as trajectory_norms
import torch
from device_rollouts import DEVICE, send_to_kernels
from test_area_step import Step
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.addresses import Use
from rnndyn_fast.ops.launch import DeviceCall

HALF, SINGLE = torch.float16, torch.float32
WIDE = Step((2, 8, 5, 6), 2, 2, (True, True))
CONV = recurrent_conv.Case((2, 16, 4, 6), (recurrent_conv.Term(8), recurrent_conv.Term(8, transposed=True)), bias=True, added=1)


def norms_of_trajectories() -> None:
    values = torch.randn(3, 2, 2048).half()
    found = trajectory_norms.trajectory_norms(values, backend="native")
    torch.testing.assert_close(found, trajectory_norms.reference(values.double()), rtol=2e-6, atol=0)


# The test of each op whose channels fill vectors, with what it must find.
OPS: dict[str, Callable[[Any], None]] = {
    "area_step forward": lambda simt: area_step.test_forward_matches_reference(simt, WIDE, HALF),
    "area_step forward, float32": lambda simt: area_step.test_forward_matches_reference(simt, WIDE, SINGLE),
    "area_step backward": lambda simt: area_step.test_backward_matches_autograd(simt, WIDE, HALF, ("state", "max_pooled", "mean_pooled")),
    "recurrent_conv": lambda simt: recurrent_conv.test_forward(simt, CONV, HALF),
    "recurrent_conv gradients": lambda simt: recurrent_conv.test_gradients_of_data_and_weight(simt, CONV, HALF),
    "gate_step": lambda simt: gate_step.check("lstm", (2, 8, 3, 5), 2, HALF),
    "norm_step": lambda simt: norm_step.test_is_as_good_as_plain_pytorch("groups_elu", HALF, simt),
    "depthwise_conv": lambda simt: depthwise.test_is_as_good_as_plain_pytorch(depthwise.CASES[2], HALF, simt),
    "ctrnn": lambda simt: ctrnn.test_is_as_good_as_plain_pytorch(ctrnn.CASES["partial tiles"], simt),
    "readout_zones": lambda simt: readout_zones.test_matches_reference(simt, (2, 9, 48, 40), HALF, ("bias", "previous")),
    "trajectory_norms": lambda simt: norms_of_trajectories(),
}


def shifted(tensor: Tensor) -> Tensor:
    """The same, one element behind where the allocator would have put it."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    room = torch.empty(max(extent, 0) + 1, dtype=tensor.dtype, device=tensor.device)
    return room.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor) if tensor.numel() else tensor


@pytest.fixture
def odd(simt: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every input of a launch is shifted; their names."""
    names: list[str] = []
    if DEVICE is None:
        send_to_kernels(monkeypatch, HALF, SINGLE)
    address = DeviceCall.address

    def read(self: DeviceCall, tensor: Tensor, name: str, shape: Any, dtype: Any, use: Use, buffer: Any) -> int:
        # (argmax is the ops' own: it begins where a slot of a larger one does, see below. One number for each sample is read alone.)
        if use is Use.READ and buffer.wide and name not in ("argmax", "activations"):
            names.append(name)
            tensor = shifted(tensor)
            assert tensor.data_ptr() % 16
        return address(self, tensor, name, shape, dtype, use, buffer)

    monkeypatch.setattr(DeviceCall, "address", read)
    return names


@pytest.mark.parametrize("op", OPS)
def test_inputs_may_begin_anywhere(op: str, simt: Any, odd: list[str]) -> None:
    OPS[op](simt)
    assert odd


SCRATCH = ("moments", "d", "rates0")  # the ops' own, of the allocator's alignment


@pytest.fixture
def odd_results(simt: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every output of a launch is shifted, and copied back after it; their names."""
    names: list[str] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    address, run = DeviceCall.address, DeviceCall.run

    def write(self: DeviceCall, tensor: Tensor, name: str, shape: Any, dtype: Any, use: Use, buffer: Any) -> int:
        if use is not Use.READ and buffer.wide and tensor.numel() and name not in SCRATCH:
            names.append(name)
            pairs.append((shifted(tensor), tensor))
            tensor = pairs[-1][0]
            assert tensor.data_ptr() % 16
        return address(self, tensor, name, shape, dtype, use, buffer)

    def run_and_copy(self: DeviceCall, op: str, values: dict[str, Any]) -> None:
        run(self, op, values)
        for written, wanted in pairs:
            wanted.copy_(written)
        pairs.clear()

    monkeypatch.setattr(DeviceCall, "address", write)
    monkeypatch.setattr(DeviceCall, "run", run_and_copy)
    if DEVICE is None:
        send_to_kernels(monkeypatch, HALF, SINGLE)
    return names


@pytest.mark.parametrize("op", OPS)
def test_outputs_may_begin_anywhere(op: str, simt: Any, odd_results: list[str]) -> None:
    OPS[op](simt)
    assert odd_results


@pytest.mark.parametrize(("dtype", "channels"), [(HALF, 8), (torch.bfloat16, 24), (SINGLE, 4), (SINGLE, 12)], ids=str)
def test_slots_of_a_pooled_map_may_begin_anywhere(dtype: torch.dtype, channels: int, simt: Any) -> None:
    """The maxima's places are bytes: with an odd number of pooled pixels, a slot begins at a multiple of the channels only."""
    slots, n, h, w = 3, 1, 6, 6
    x = torch.randn(slots, n, h, w, channels).to(dtype)
    pooled = torch.empty(slots, n, h // 2, w // 2, channels, dtype=dtype)
    argmax = torch.full(pooled.shape, 9, dtype=torch.uint8)
    grad = torch.randn(pooled.shape).to(dtype)
    for slot in range(slots):
        launches.area_step_forward.on_device(drives=[x[slot]], eps=1e-5, rectify=True, max_pooled=pooled[slot], argmax=argmax[slot])
    assert any(argmax[slot].data_ptr() % 16 for slot in range(slots))
    truth, index = torch.nn.functional.max_pool2d(torch.relu(x.flatten(0, 1).permute(0, 3, 1, 2)), 2, return_indices=True)
    assert torch.equal(pooled.flatten(0, 1).permute(0, 3, 1, 2), truth)
    for slot in range(slots):
        grad_drive = torch.full(x.shape[1:], float("nan"), dtype=dtype)
        launches.area_step_backward.on_device(
            height=h, width=w, grad_max_pooled=grad[slot], argmax=argmax[slot], value=x[slot], rectify=True, grad_drive=grad_drive
        )
        expected = torch.zeros(n, channels, h * w, dtype=dtype)
        expected.scatter_(2, index[slot * n : (slot + 1) * n].flatten(2), grad[slot].permute(0, 3, 1, 2).flatten(2))
        expected = expected.view(n, channels, h, w).permute(0, 2, 3, 1) * (x[slot] > 0)
        assert torch.equal(grad_drive, expected)
