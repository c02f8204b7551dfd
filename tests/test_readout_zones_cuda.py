"""The CUDA readout_zones, in the SIMT harness, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_area_step import poisoned
from torch import Tensor

from rnndyn_fast.ops import sequence_launches
from rnndyn_fast.ops.readout_zones import _native_cuda
from rnndyn_fast.reference.readout_zones import ReadoutZoneMeasures, readout_distance
from rnndyn_fast.reference.readout_zones import readout_zones as reference_readout_zones

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, N, D, C: one of everything; classes over more than a warp; dimensions that fill vectors, and that do not.
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 9, 48, 40), (3, 4, 264, 10), (1, 3, 33, 70)]
TABLES = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")


def run(
    r: Tensor,  # [T, N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [C]
    log_probs: Tensor | None = None,  # [T, N, C]
    previous: Tensor | None = None,  # [N, D]
) -> ReadoutZoneMeasures:
    """The kernel with its products, as the op will call it."""
    t, n, _ = r.shape
    weight = weight.float()
    distance = readout_distance(weight)
    cosine = (r.double() @ weight.double().T).float()
    tables = [poisoned(t, n, dtype=torch.float32) for _ in TABLES]
    tables[0] = torch.full((t, n), -1)
    inverse = torch.where(distance > 0, 1 / distance, 0.0)
    sequence_launches.readout_zones.on_device(
        representations=r, previous=previous, log_probs=log_probs, labels=labels, bias=bias, inverse_distance=inverse, cosine=cosine,
        weight_norm=torch.linalg.vector_norm(weight, dim=-1), **dict(zip(TABLES, tables, strict=True)),
    )  # fmt: skip
    return ReadoutZoneMeasures(*tables, cosine)


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    t, n, d, c = shape
    return torch.randn(t, n, d).to(dtype), torch.randn(c, d), torch.randint(c, (n,))


def check(ours: ReadoutZoneMeasures, truth: ReadoutZoneMeasures) -> None:
    for name, value, exact in zip(truth._fields, ours, truth, strict=True):
        if name == "predicted":
            assert torch.equal(value, exact), name
        else:
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("options", [(), ("bias",), ("log_probs", "previous"), ("bias", "previous")], ids="+".join)
def test_matches_reference(simt: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, options: tuple[str, ...]) -> None:
    r, weight, labels = draw(shape, dtype)
    t, n, d, c = shape
    extra = {"bias": torch.randn(c), "log_probs": torch.randn(t, n, c), "previous": torch.randn(n, d).to(dtype)}
    chosen = {name: extra[name] for name in options}
    truth = reference_readout_zones(r.double(), weight.double(), labels, **{name: x.double() for name, x in chosen.items()})
    check(run(r, weight, labels, **chosen), truth)


def test_rows_may_lie_apart(simt: Any) -> None:
    r, weight, labels = draw((3, 4, 16, 5), torch.float16)
    truth = run(r, weight, labels)
    wide = torch.full((4, 3, 24), float("nan"), dtype=torch.float16)
    wide[:, :, 8:] = r.transpose(0, 1)
    for ours in (run(wide[:, :, 8:].transpose(0, 1), weight, labels), run(r[1:], weight, labels, previous=wide[:, 0, 8:])):
        for name, value in ours._asdict().items():
            assert torch.equal(value, getattr(truth, name)[-len(value) :]) or name == "change"
        assert torch.equal(ours.change[-2:], truth.change[-2:])


def test_ties_zeros_and_nan(simt: Any) -> None:
    """The first class wins a tie; a zero vector has cosine 0; equal readout vectors have no boundary; NaN gets class 0."""
    weight = torch.eye(3).repeat(13, 1)[:37]  # more classes than lanes, each vector many times
    r = torch.tensor([[[0.0, 2.0, 2.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 0.0]]])
    ours = run(r, weight, torch.tensor([36, 1, 2]))
    assert ours.predicted.tolist() == [[1, 0, 0]]
    assert ours.cosine[0, 1].tolist() == [0.0] * 37
    assert ours.margin[0, :2].tolist() == [0.0, 0.0]
    truth = reference_readout_zones(r[:, :2], weight, torch.tensor([36, 1]))
    torch.testing.assert_close(ours.boundary_distance[:, :2], truth.boundary_distance)
    assert ours.norm[0, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_on_a_device(simt: Any, dtype: torch.dtype) -> None:
    """The implementation that the op has for CUDA tensors."""
    r, weight, labels = draw((3, 6, 40, 7), dtype)
    weight, bias, log_probs, previous = (
        weight.to(dtype),
        torch.randn(7).to(dtype),
        torch.randn(3, 6, 7).double(),
        torch.randn(6, 40).to(dtype),
    )
    arguments = (r, weight, readout_distance(weight), labels, bias, log_probs, previous)
    ours = ReadoutZoneMeasures(*_native_cuda(*arguments))
    exact = [x.double() if x.is_floating_point() else x for x in arguments]
    truth = reference_readout_zones(exact[0], exact[1], labels, exact[4], log_probs, exact[6], exact[2])
    for name, value, expected in zip(truth._fields, ours, truth, strict=True):
        assert value.dtype == (torch.int64 if name == "predicted" else dtype), name
        scale = max(float(expected.double().abs().nan_to_num(posinf=0).max()), 1.0)
        torch.testing.assert_close(
            value.double(), expected.double(), rtol=0, atol=4 * torch.finfo(dtype).eps * scale + 1e-5, equal_nan=True
        )
