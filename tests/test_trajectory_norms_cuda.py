"""The CUDA trajectory_norms, in the SIMT harness (or on a device), against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_rollouts import DEVICE, count_launches, in_harness, on_a_device, send_to_kernels
from test_trajectory_norms import strided

from rnndyn_fast.ops import cuda_module, sequence_launches
from rnndyn_fast.ops.trajectory_norms import can_run_trajectory_norms, trajectory_norms
from rnndyn_fast.reference.trajectory_norms import trajectory_norms as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, N and the rest: one of everything; rows that fill vectors, that do not, and that a block walks more than once.
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 2, 2048), (2, 2, 2051), (4, 3, 33, 7, 5), (2, 1, 1, 9, 1), (1, 2, 16, 20, 30), (2, 1, 40000)]


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names of the launches, as they come."""
    if DEVICE is None:
        send_to_kernels(monkeypatch, *DTYPES)
    return count_launches(monkeypatch, ("trajectory_norms",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, kernels: list[str]) -> None:
    values = torch.randn(shape).to(dtype)
    norm, change = trajectory_norms(values, backend="native")
    assert kernels == ["trajectory_norms"]
    torch.testing.assert_close((norm, change), reference(values.double()), rtol=2e-6, atol=0)
    assert norm.dtype == change.dtype == torch.float64
    assert change.shape == (shape[0] - 1, shape[1])


@pytest.mark.parametrize("name", strided())
def test_strides(name: str, kernels: list[str]) -> None:
    values = strided()[name]
    torch.testing.assert_close(trajectory_norms(values, backend="native"), reference(values), rtol=2e-6, atol=0)
    assert kernels == ["trajectory_norms"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_show(bad: float, kernels: list[str]) -> None:
    values = torch.ones(3, 4, 500)
    values[1, 2, 450] = bad
    norm, change = trajectory_norms(values, backend="native")
    assert (~torch.isfinite(norm)).nonzero().tolist() == [[1, 2]]
    assert (~torch.isfinite(change)).nonzero().tolist() == [[0, 2], [1, 2]]


@in_harness
def test_the_order_of_threads_changes_no_bit(simt: Any, kernels: list[str]) -> None:
    values, found = torch.randn(3, 2, 2051), []
    for seed, order in enumerate((simt.Order.FORWARD, simt.Order.REVERSED, simt.Order.RANDOM)):
        simt.set_order(order, seed)
        found.append(trajectory_norms(values, backend="native"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_it_does_not_take(kernels: list[str]) -> None:
    values, norm, change = torch.ones(2, 3, 4), torch.empty(2, 3, dtype=torch.float64), torch.empty(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"norm: expected a contiguous tensor \[2, 3\] of torch.float64"):
        sequence_launches.trajectory_norms.on_device(values=values, norm=norm.float(), change=change)
    with pytest.raises(ValueError, match=r"values: expected a contiguous tensor \[2, 3, 4\]"):
        sequence_launches.trajectory_norms.on_device(values=torch.ones(2, 3, 8)[..., ::2], norm=norm, change=change)
    with pytest.raises(ValueError, match=r"change: expected .* on meta"):
        sequence_launches.trajectory_norms.on_device(values=values, norm=norm, change=change.to("meta"))


@in_harness
def test_can_run_says_why_not(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "capability", lambda device: (7, 0))
    with pytest.raises(ValueError, match=r"backend=.native.: cpu has compute capability 7.0; the kernels need 8.0 or later"):
        can_run_trajectory_norms(torch.ones(2, 3, 4), raise_error=True)


@on_a_device
def test_long_rows(kernels: list[str]) -> None:
    """Longer than the harness walks in a minute."""
    values = torch.randn(5, 7, 1_000_003)
    torch.testing.assert_close(trajectory_norms(values, backend="native"), reference(values.double()), rtol=2e-6, atol=0)
