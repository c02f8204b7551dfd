"""The readout_zones op: reference against a loop oracle, native against reference, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rnndyn_fast import _core
from rnndyn_fast.ops.readout_zones import can_run_readout_zones, readout_zones
from rnndyn_fast.reference.readout_zones import ReadoutZoneMeasures, readout_distance
from rnndyn_fast.reference.readout_zones import readout_zones as reference_readout_zones

# T, N, C, D: single steps and samples, one class, sizes that leave partial vectors.
SIZES = [
    (1, 1, 1, 1),
    (1, 1, 2, 1),
    (2, 1, 33, 17),
    (3, 5, 1, 17),
    (4, 7, 2, 1),
    (3, 6, 33, 17),
    (2, 9, 100, 64),
    (5, 3, 16, 8),
]
SUPPORTED_ISA = _core.build_info()["isa_supported"]


def make(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0, extras: bool = True) -> dict[str, Any]:
    t, n, c, d = size
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    out: dict[str, Any] = {
        "representations": randn(t, n, d),
        "readout_weight": randn(c, d),
        "labels": torch.randint(0, c, (n,), generator=generator),
    }
    if extras:
        out |= {"bias": randn(c), "log_probs": torch.log_softmax(randn(t, n, c), -1), "previous": randn(n, d)}
    return out


def loop_oracle(
    representations: Tensor,  # [T, N, D]
    readout_weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,
    log_probs: Tensor | None = None,
    previous: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The equations of the docstring, one number at a time, in Python floats."""
    r, w = representations.double().tolist(), readout_weight.double().tolist()
    b = [0.0] * len(w) if bias is None else bias.double().tolist()
    before: list[list[float]] | None = None if previous is None else previous.double().tolist()
    names = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")
    out = {name: np.zeros((len(r), len(r[0]))) for name in names}

    def dot(x: list[float], y: list[float]) -> float:
        return math.fsum(i * j for i, j in zip(x, y, strict=True))

    for t in range(len(r)):
        for n in range(len(r[0])):
            x = r[t][n]
            logits = [dot(x, wc) + bc for wc, bc in zip(w, b, strict=True)]
            scores = logits if log_probs is None else log_probs[t, n].tolist()
            p = scores.index(max(scores))
            norm = math.sqrt(dot(x, x))
            cosines = [dot(x, wc) / (norm * math.sqrt(dot(wc, wc))) for wc in w]
            others = [j for j in range(len(w)) if j != p]
            boundary = [(logits[p] - logits[j]) / math.dist(w[p], w[j]) for j in others if math.dist(w[p], w[j]) > 0]
            out["predicted"][t, n], out["norm"][t, n] = p, norm
            out["cos_predicted"][t, n], out["cos_label"][t, n] = cosines[p], cosines[int(labels[n])]
            out["margin"][t, n] = min([logits[p] - logits[j] for j in others], default=math.inf)
            out["boundary_distance"][t, n] = min(boundary, default=math.inf)
            out["change"][t, n] = math.nan if before is None else math.dist(x, before[n])
        before = r[t]
    return out


def assert_matches_oracle(got: ReadoutZoneMeasures, expected: dict[str, np.ndarray], rtol: float, atol: float) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(got, name).double().numpy(), values, rtol=rtol, atol=atol, err_msg=name)


def assert_error_no_larger_than_plain(native: Tensor, plain: Tensor, truth: Tensor, name: str) -> None:
    """Native error against float64 at most twice plain PyTorch's, plus a floor of eight units in the last place."""
    same = torch.isnan(truth) | torch.isinf(truth)
    torch.testing.assert_close(native[same].double(), truth[same], equal_nan=True)
    error = (native.double() - truth)[~same].abs()
    allowed = 2 * (plain.double() - truth)[~same].abs().max() if error.numel() else torch.tensor(0.0)
    floor = 8 * torch.finfo(native.dtype).eps * truth[~same].abs().max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= allowed + floor).all()), (name, error.max().item(), allowed.item(), floor.item())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_against_loop_oracle(size: tuple[int, int, int, int], extras: bool, backend: str) -> None:
    inputs = make(size, extras=extras)
    assert_matches_oracle(readout_zones(**inputs, backend=backend), loop_oracle(**inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("isa", SUPPORTED_ISA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_native_against_reference(size: tuple[int, int, int, int], dtype: torch.dtype, isa: str) -> None:
    inputs = make(size, dtype)
    inputs["log_probs"] = None
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    truth, plain = reference_readout_zones(**exact), reference_readout_zones(**inputs)
    before = _core.build_info()["isa"]
    _core.select_isa(isa)
    try:
        native = readout_zones(**inputs, backend="native")
    finally:
        _core.select_isa(before)
    assert torch.equal(native.predicted, truth.predicted)
    for name in ReadoutZoneMeasures._fields[1:]:
        assert getattr(native, name).dtype == dtype
        assert_error_no_larger_than_plain(getattr(native, name), getattr(plain, name), getattr(truth, name), name)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_strided_inputs(backend: str) -> None:
    inputs = make((4, 6, 5, 7))
    expected = readout_zones(**inputs, backend=backend)
    sliced = dict(inputs)
    sliced["representations"] = torch.stack([inputs["representations"]] * 2, 2).flatten(1, 2)[:, ::2]  # rows apart
    sliced["log_probs"] = inputs["log_probs"].permute(2, 0, 1).contiguous().permute(1, 2, 0)  # classes apart
    sliced["previous"] = inputs["previous"].t().contiguous().t()
    sliced["readout_weight"] = inputs["readout_weight"].t().contiguous().t()
    sliced["bias"] = torch.stack([inputs["bias"]] * 3, 1)[:, 1]
    sliced["labels"] = torch.stack([inputs["labels"]] * 2, 1)[:, 0]
    kept = {k: v.clone() for k, v in sliced.items()}
    got = readout_zones(**sliced, backend=backend)
    for name, a, b in zip(ReadoutZoneMeasures._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True, msg=name)
    for name, value in kept.items():
        assert torch.equal(value, sliced[name]), f"{name} was written to"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_first_class_wins_a_tie(backend: str) -> None:
    weight = torch.eye(40, dtype=torch.float64)
    r = torch.zeros(1, 2, 40, dtype=torch.float64)
    r[0, 0, [3, 17, 39]] = 2.0  # three equal logits; the second sample has 40 equal ones
    got = readout_zones(r, weight, torch.tensor([17, 5]), backend=backend)
    assert got.predicted.tolist() == [[3, 0]]
    assert got.margin.tolist() == [[0.0, 0.0]]
    assert got.boundary_distance.tolist() == [[0.0, 0.0]]
    assert got.norm[0, 1] == 0
    assert got.cosine[0, 1].tolist() == [0.0] * 40  # a zero vector, not NaN
    by_log_probs = readout_zones(r, weight, torch.tensor([17, 5]), log_probs=torch.zeros(1, 2, 40), backend=backend)
    assert by_log_probs.predicted.tolist() == [[0, 0]]
    assert by_log_probs.margin[0, 0] == -2.0  # outside the zone of the class that the log-probabilities name


def test_float64_log_probs_decide_for_float32_representations() -> None:
    inputs = make((1, 1, 3, 4), torch.float32, extras=False)
    log_probs = torch.tensor([[[-1.0, -1.0 + 1e-12, -2.0]]], dtype=torch.float64)  # a tie in float32
    for backend in ("native", "reference"):
        assert readout_zones(**inputs, log_probs=log_probs, backend=backend).predicted.item() == 1


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_equal_readout_vectors_have_no_boundary(backend: str) -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    r = torch.tensor([[[3.0, 1.0]]])
    got = readout_zones(r, weight, torch.tensor([0]), backend=backend)
    assert got.margin.item() == 0.0
    assert got.boundary_distance.item() == pytest.approx(3.0)
    alone = readout_zones(r, weight[:2], torch.tensor([0]), backend=backend)
    assert alone.boundary_distance.item() == math.inf


def test_result_does_not_depend_on_threads() -> None:
    inputs = make((3, 50, 33, 65), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = readout_zones(**inputs, backend="native")
        torch.set_num_threads(2)
        two = readout_zones(**inputs, backend="native")
    finally:
        torch.set_num_threads(threads)
    for name in ("norm", "change"):  # what does not pass through PyTorch's matrix product
        assert torch.equal(getattr(one, name).nan_to_num(), getattr(two, name).nan_to_num())
    torch.testing.assert_close(one.cosine, two.cosine, rtol=1e-5, atol=1e-6)


def test_given_distance_is_used() -> None:
    inputs = make((2, 3, 4, 5))
    distance = readout_distance(inputs["readout_weight"])
    for backend in ("native", "reference"):
        halved = readout_zones(**inputs, distance=distance * 2, backend=backend).boundary_distance
        torch.testing.assert_close(halved, readout_zones(**inputs, backend=backend).boundary_distance / 2)


def test_gradients_are_refused_not_zero() -> None:
    inputs = make((2, 3, 4, 5), extras=False)
    for name in ("representations", "readout_weight"):
        leaf = inputs[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=rf"{name}: requires a gradient.*reference.readout_zones"):
            readout_zones(**(inputs | {name: leaf}))
        with torch.no_grad():
            assert not readout_zones(**(inputs | {name: leaf})).norm.requires_grad
    leaf = inputs["representations"].clone().requires_grad_()
    arguments = (leaf, inputs["readout_weight"], readout_distance(inputs["readout_weight"]), inputs["labels"])
    outputs = torch.ops.rnndyn.readout_zones(*arguments, None, None, None)
    with pytest.raises(RuntimeError, match=r"reference\.readout_zones"):
        outputs[1].sum().backward()


def test_forward_mode_is_refused_not_zero() -> None:
    inputs = make((2, 3, 4, 5), extras=False)
    rest = (inputs["readout_weight"], inputs["labels"])
    r, tangent = inputs["representations"], torch.ones_like(inputs["representations"])
    with pytest.raises(ValueError, match=r"representations: .*tangent.*reference.readout_zones"):
        torch.func.jvp(lambda x: readout_zones(x, *rest).norm, (r,), (tangent,))
    _, derivative = torch.func.jvp(lambda x: reference_readout_zones(x, *rest).norm, (r,), (tangent,))
    torch.testing.assert_close(derivative, r.sum(-1) / r.norm(dim=-1))


def test_reference_gradient() -> None:
    inputs = make((2, 2, 3, 4))
    leaf = inputs.pop("representations").requires_grad_()
    weight = inputs.pop("readout_weight").requires_grad_()

    def smooth(r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference_readout_zones(r, w, **inputs))[1:]

    assert torch.autograd.gradcheck(smooth, (leaf, weight))


def test_opcheck() -> None:
    for extras in (False, True):
        inputs = make((3, 4, 5, 6), extras=extras)
        arguments = (
            inputs["representations"],
            inputs["readout_weight"],
            readout_distance(inputs["readout_weight"]),
            inputs["labels"],
            inputs.get("bias"),
            inputs.get("log_probs"),
            inputs.get("previous", inputs["representations"][0]),  # without it `change` has NaN, which opcheck holds unequal
        )
        torch.library.opcheck(torch.ops.rnndyn.readout_zones.default, arguments)


def test_can_run_says_why_not() -> None:
    half = torch.zeros(1, 1, 1, dtype=torch.float16)
    assert can_run_readout_zones(half.float())
    assert not can_run_readout_zones(half)
    with pytest.raises(ValueError, match=r"backend='native': .*float16.*float32 and float64"):
        can_run_readout_zones(half, raise_error=True)
    meta = torch.zeros(1, 1, 1, device="meta")
    with pytest.raises(ValueError, match="backend='native': representations are on meta"):
        can_run_readout_zones(meta, raise_error=True)
    with pytest.raises(ValueError, match="backend='native'"):
        readout_zones(half, half[0], torch.zeros(1, dtype=torch.int64), backend="native")
    assert readout_zones(half + 1, half[0] + 1, torch.zeros(1, dtype=torch.int64)).norm.item() == 1.0  # the reference


BAD = {
    "rank": ({"representations": torch.zeros(3, 4)}, ValueError, r"representations: expected shape \[T, N, D\]"),
    "empty": (
        {"representations": torch.zeros(2, 0, 4)},
        ValueError,
        r"representations: expected T, N and D of at least 1",
    ),
    "integers": (
        {"representations": torch.zeros(2, 3, 4).long()},
        TypeError,
        "representations: expected a floating-point",
    ),
    "dims": (
        {"readout_weight": torch.zeros(5, 3)},
        ValueError,
        r"readout_weight: expected shape \[C, D\] = \[any, 4\]",
    ),
    "no class": ({"readout_weight": torch.zeros(0, 4)}, ValueError, "readout_weight: expected at least one class"),
    "dtype": (
        {"readout_weight": torch.zeros(5, 4).double()},
        TypeError,
        "readout_weight: expected dtype torch.float32",
    ),
    "labels": ({"labels": torch.zeros(2).long()}, ValueError, r"labels: expected shape \[N\] = \[3\], got \[2\]"),
    "label dtype": ({"labels": torch.zeros(3)}, TypeError, "labels: expected dtype torch.int64"),
    "label high": ({"labels": torch.tensor([0, 5, 1])}, ValueError, r"labels: expected \[N\] in \[0, C\) = \[0, 5\)"),
    "label low": ({"labels": torch.tensor([0, -1, 1])}, ValueError, r"labels: expected .* got values in \[-1, 1\]"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[C\] = \[5\]"),
    "log_probs": (
        {"log_probs": torch.zeros(2, 3, 4)},
        ValueError,
        r"log_probs: expected shape \[T, N, C\] = \[2, 3, 5\]",
    ),
    "log_probs dtype": ({"log_probs": torch.zeros(2, 3, 5).long()}, TypeError, "log_probs: expected a floating-point"),
    "previous": ({"previous": torch.zeros(2, 4)}, ValueError, r"previous: expected shape \[N, D\] = \[3, 4\]"),
    "distance": ({"distance": torch.zeros(5, 4)}, ValueError, r"distance: expected shape \[C, C\]"),
    "no tensor": ({"bias": np.zeros(5)}, TypeError, r"bias: expected a tensor \[C\], got ndarray"),
    "device": (
        {"bias": torch.zeros(5, device="meta")},
        ValueError,
        "bias: expected device cpu as representations, got meta",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected 'native', 'reference' or None, got 'gpu'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    good = {
        "representations": torch.zeros(2, 3, 4),
        "readout_weight": torch.zeros(5, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "backend": backend,
    }
    readout_zones(**good)
    with pytest.raises(error, match=message):
        readout_zones(**(good | change))
