"""The model of a training step: its launches are those that the engine makes, its operations those of the schedule."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from device_rollouts import HALF, LAUNCHES, in_harness, send_to_kernels

from rnndyn_fast.graph import Operator
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.program import rollout

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import step_model  # noqa: E402

sys.path.pop(0)

pytestmark = in_harness
SIZES: dict[str, Any] = {"timesteps": 3, "image_size": 16, "widths": (8, 8, 16, 32, 64), "num_classes": 4}


@pytest.mark.parametrize("name", step_model.NETWORKS)
def test_launches_are_those_of_the_engine(name: str, simt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = blt_net_64(**SIZES, **step_model.NETWORKS[name], backend="native", engine="fused")
    model = step_model.training_step(net, 2, size=16)
    launches = send_to_kernels(monkeypatch, *HALF)
    parameters = {n: p for n, p in net.named_parameters() if n in net.network.parameter_shapes}
    outputs = rollout(net.network, 3, [torch.rand(2, 3, 16, 16).half()], parameters, backend="native", engine="fused")
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert Counter(launches) == {kind: len(model[kind].calls) for kind in LAUNCHES if kind in model}


def test_operations_are_those_of_the_schedule(simt: Any) -> None:
    """Of every map and both its gradients, but that of the images (nobody asks for it)."""
    net = blt_net_64(timesteps=3, topdown_connections=True)
    kernels = step_model.training_step(net, 8)
    schedule = net.schedule()
    expected = sum(
        2 * 8 * schedule.network.multiply_adds(d.connection) * len(d.slots) * (2 if d.source == "image" else 3)
        for d in schedule.drives
        if d.connection.operator is not Operator.IDENTITY
    )
    found = sum(kernel.operations for kernel in kernels.values())
    assert found == pytest.approx(expected, rel=0.02)


def test_time_is_the_longer_of_bytes_and_operations() -> None:
    kernel = step_model.Kernel([(4_800_000, 0, 1), (0, 989_000_000, 2)])
    assert kernel.seconds("H200") == pytest.approx(2e-6)
    assert (kernel.launches, kernel.bytes, kernel.operations) == (3, 4_800_000, 989_000_000)


def test_the_page_has_the_model_of_this_engine(simt: Any) -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    found = page[page.index(step_model.START) : page.index(step_model.END)].removeprefix(step_model.START).strip()
    assert found == step_model.page(1024), "python scripts/step_model.py --update docs/gpu.md"
