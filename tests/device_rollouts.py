"""Rollouts as on a GPU: on the CPU, with every CUDA kernel in the SIMT harness, and the networks that all of them can run."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor

from rnndyn_fast.graph import Operator
from rnndyn_fast.ops import core, cuda_module, triton_conv
from rnndyn_fast.ops.launch import DeviceCall
from rnndyn_fast.program import plan

HALF = (torch.float16, torch.bfloat16)
LAUNCHES = ("area_step_forward", "area_step_backward", "recurrent_conv", "recurrent_conv_weight_grad")
DEVICE = os.environ.get("RNNDYN_TEST_DEVICE")
in_harness = pytest.mark.skipif(DEVICE is not None, reason="for the harness; tests of the device take its place")
on_a_device = pytest.mark.skipif(DEVICE is None, reason="RNNDYN_TEST_DEVICE is not set: tests in the harness take its place")


def count_launches(patch: pytest.MonkeyPatch, names: tuple[str, ...] = LAUNCHES) -> list[str]:
    """The names of these ops' launches on devices from now on, as they come."""
    launches: list[str] = []
    run = DeviceCall.run

    def counted(self: DeviceCall, op: str, values: dict[str, Any]) -> None:
        if op in names:
            launches.append(op)
        run(self, op, values)

    patch.setattr(DeviceCall, "run", counted)
    return launches


def send_to_kernels(
    patch: pytest.MonkeyPatch,
    *dtypes: torch.dtype,
    capability: tuple[int, int] = (9, 0),
    names: tuple[str, ...] = LAUNCHES,
    triton: bool = False,
) -> list[str]:
    """Tensors of these dtypes are as if on a device of that capability, with Triton or without it; others stay the CPU's. Returns the
    names of the launches."""
    # (An arena is bytes: as those of a device, its program runs on tensors. Plans of the CPU are not those of the kernels.)
    patch.setattr(core, "on_device", lambda tensor: tensor.dtype in (*dtypes, torch.uint8))
    patch.setattr(plan, "_plans", OrderedDict())
    patch.setattr(cuda_module, "capability", lambda device: capability)
    if not triton:
        patch.setattr(triton_conv, "unavailable", lambda: "the harness has no Triton")
    return count_launches(patch, names)


def widened(case: RolloutCase) -> RolloutCase:
    """The case with as many channels as the fused convolution takes: multiples of eight (but for images that only convolutions read)."""

    def eights(n: int) -> int:
        return -(-n // 8) * 8

    network = case.network
    passed_on = {c.source for c in network.connections if c.operator is Operator.IDENTITY}
    inputs = [dataclasses.replace(n, channels=eights(n.channels)) if n.name in passed_on else n for n in network.inputs]
    areas = [dataclasses.replace(a, channels=eights(a.channels)) for a in network.areas]
    wide = dataclasses.replace(network, inputs=tuple(inputs), areas=tuple(areas))
    return dataclasses.replace(case, network=wide)


def wide_cases(*names: str) -> pytest.MarkDecorator:
    """Parametrises ``case``."""
    return pytest.mark.parametrize("case", [widened(CASES[name]) for name in names], ids=lambda c: c.name)


def rounded_case(case: RolloutCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs and parameters of a case in float64, that this dtype holds exactly."""
    return [x.to(dtype).double() for x in case.inputs()], {name: p.to(dtype).double() for name, p in case.parameters().items()}
