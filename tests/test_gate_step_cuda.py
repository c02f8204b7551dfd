"""The CUDA gate_step, in the SIMT harness (or on a device), against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_rollouts import DEVICE, send_to_kernels
from test_gate_step import CELLS, results

from rnndyn_fast.ops import cuda_module, launches
from rnndyn_fast.ops.cells import GRUGates
from rnndyn_fast.ops.gate_step import can_run_gate_step, gate_scalars

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Channels in vectors of four and not; blocks that are full and partial.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (2, 8, 3, 5), (1, 260, 2, 3)]


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if DEVICE is None:
        send_to_kernels(monkeypatch, *DTYPES)
    return simt


def check(name: str, shape: tuple[int, ...], terms: int, dtype: torch.dtype) -> None:
    """Error in norm against float64, of values that the dtype holds: at most twice that of plain PyTorch, plus a few roundings."""
    cell = CELLS[name]
    ours, plain = results(cell, shape, terms, dtype, True), results(cell, shape, terms, dtype, False)
    truth = results(cell, shape, terms, torch.float64, False)
    for key, expected in truth.items():
        assert not ours[key].isnan().any(), f"{key}: NaN (or something left unwritten)"
        scale = float(expected.norm()) + 1e-3
        error, reference = (float((x[key].double() - expected).norm()) / scale for x in (ours, plain))
        # (the inputs themselves are rounded, in both)
        assert error <= 2 * reference + 4 * torch.finfo(dtype).eps, (key, error, reference)


@pytest.mark.parametrize("name", [n for n in CELLS if "norm" not in n])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_good_as_plain_pytorch(name: str, dtype: torch.dtype, kernels: Any) -> None:
    for shape, terms in zip(SHAPES, (1, 2, 3, 1), strict=True):
        check(name, shape, terms, dtype)


def test_norms_are_applied_before(kernels: Any) -> None:
    check("gru_gates_norm", SHAPES[2], 2, torch.float32)


def test_more_terms_than_a_port_takes(kernels: Any) -> None:
    check("lstm", SHAPES[2], 8, torch.float32)


def test_bad_arguments_are_refused(kernels: Any) -> None:
    x = torch.zeros(1, 2, 2, 8)
    scalars, states = gate_scalars(GRUGates()), [torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)]
    with pytest.raises(ValueError, match=r"ports\[1\]\[0\]: expected a contiguous tensor \[1, 2, 2, 4\] of torch.float32"):
        launches.gate_step(scalars, ports=[[x], [states[0].half()]], states=states)
    with pytest.raises(ValueError, match="ports: expected 1 to 6 terms"):
        launches.gate_step(scalars, ports=[[x] * 7, [states[0]]], sums=[x, None], states=states)


def test_sums_need_not_be_wanted(kernels: Any) -> None:
    x, h, total = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 4), torch.empty(1, 2, 2, 8)
    found = [[torch.empty_like(h), torch.empty_like(h)] for _ in range(2)]
    for sums, states in zip(([total, None], []), found, strict=True):
        launches.gate_step(gate_scalars(GRUGates()), ports=[[x, 2 * x], [h]], sums=sums, states=states)
    assert torch.equal(total, 3 * x)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(DEVICE is not None, reason="for the harness")
def test_can_run_says_why_not(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "capability", lambda device: (7, 0))
    with pytest.raises(ValueError, match=r"gate_step: cpu has compute capability 7.0; the kernels need 8.0 or later"):
        can_run_gate_step(GRUGates(), torch.zeros(1).half(), raise_error=True)
