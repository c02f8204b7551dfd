"""trajectory_norms: the native kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from rnndyn_fast.ops.trajectory_norms import can_run_trajectory_norms, trajectory_norms
from rnndyn_fast.reference.trajectory_norms import trajectory_norms as reference

# T, N and the rest; rows shorter and longer than the kernel's block of 4,096, and not a multiple of it or of a vector.
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 2, 4096), (3, 2, 4097), (2, 5, 8191), (4, 3, 33, 7, 5), (2, 1, 1, 9, 1), (1, 2, 16, 20, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_against_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    norm, change = trajectory_norms(values, backend="native")
    expected = reference(values)
    # Sums of up to 4,096 squares in float32 lanes: measured at most 3e-7; plain PyTorch's float32 norm is no nearer.
    rtol = 2e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close((norm, change), expected, rtol=rtol, atol=0)
    assert norm.dtype == change.dtype == torch.float64
    assert change.shape == (shape[0] - 1, shape[1])


def strided() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6, 8, 10, 12)
    return {
        "channels last": base.permute(0, 1, 4, 2, 3),
        "some samples": base[:, ::2],
        "some steps": base[1::2],
        "time within samples": base.transpose(0, 1),
        "gaps in a row": base[..., ::3],
        "backwards": base.flip(2),
        "same for all": base[:1].expand(4, 6, 8, 10, 12),
        "one unit broadcast": base[..., :1].expand(4, 6, 8, 10, 12),
    }


@pytest.mark.parametrize("name", strided())
def test_strides(name: str) -> None:
    values = strided()[name]
    torch.testing.assert_close(trajectory_norms(values, backend="native"), reference(values), rtol=2e-6, atol=0)


def test_nothing_is_copied_in_channels_last_memory() -> None:
    from rnndyn_fast.ops.trajectory_norms import _rows

    values = strided()["channels last"]
    assert _rows(values).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_show(bad: float) -> None:
    values = torch.ones(3, 4, 5000)
    values[1, 2, 4500] = bad
    norm, change = trajectory_norms(values)
    assert (~torch.isfinite(norm)).nonzero().tolist() == [[1, 2]]
    assert (~torch.isfinite(change)).nonzero().tolist() == [[0, 2], [1, 2]]


def test_outputs_are_written_whatever_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert all(torch.isfinite(values).all() for values in trajectory_norms(torch.randn(3, 4, 7)))


def test_threads_do_not_matter() -> None:
    values, before = torch.randn(3, 9, 5000), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(trajectory_norms(values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


def test_what_it_does_not_take() -> None:
    half = torch.ones(2, 3, 4, dtype=torch.float16)
    assert not can_run_trajectory_norms(half)
    with pytest.raises(ValueError, match=r"backend=.native.: values are torch.float16"):
        trajectory_norms(half, backend="native")
    assert trajectory_norms(half)[0].tolist() == [[2.0] * 3] * 2
    with pytest.raises(ValueError, match=r"values: expected \[T, N, ...\] with no empty dimension, got \[2, 0, 3\]"):
        trajectory_norms(torch.ones(2, 0, 3))
    with pytest.raises(TypeError, match="values: expected a floating-point dtype"):
        trajectory_norms(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend: expected"):
        trajectory_norms(torch.ones(2, 3, 4), backend="cuda")
