"""The Triton kernels of the recurrent convolution against PyTorch's convolutions in float64: in Triton's interpreter, on CPU tensors, in
the process that tests/test_triton_conv.py starts (the interpreter is chosen when Triton is imported); with RNNDYN_TEST_DEVICE=cuda
compiled, on that device.

The interpreter multiplies bfloat16 wrongly: there the same kernels in float16 stand for it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from device_rollouts import DEVICE, in_harness
from test_recurrent_conv_cuda import assert_rounded
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops import triton_conv
from rnndyn_fast.ops.fused_conv import ConvTerm

pytestmark = pytest.mark.skipif(triton_conv.unavailable() is not None, reason=str(triton_conv.unavailable()))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
assert INTERPRETED or DEVICE is not None, "TRITON_INTERPRET=1, or RNNDYN_TEST_DEVICE=cuda: see tests/test_triton_conv.py"
HALF, SINGLE = torch.float16, torch.float32
OTHERS = [SINGLE] if INTERPRETED else [torch.bfloat16, SINGLE]
by_dtype = pytest.mark.parametrize("dtype", [HALF, *OTHERS], ids=str)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Tensors are made there."""
    if DEVICE is not None:
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


@dataclass(frozen=True)
class Term:
    """A convolution, or a transposed one."""

    channels: int
    kernel: int = 3
    stride: int = 1
    transposed: bool = False
    padding: int | None = None  # (kernel - 1) // 2

    @property
    def pad(self) -> int:
        return (self.kernel - 1) // 2 if self.padding is None else self.padding

    def source_size(self, size: int) -> int:
        """Of the input, for an output of this size."""
        if self.transposed:
            return (size + 2 * self.pad - self.kernel) // self.stride + 1
        return (size - 1) * self.stride + self.kernel - 2 * self.pad

    def __call__(self, x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:  # [N, C', H', W'], [C, C', K, K]
        """In plain PyTorch; a transposed one keeps its weight as a convolution's."""
        if not self.transposed:
            return functional.conv2d(x, weight, None, self.stride, self.pad)
        extra = [n - ((m - 1) * self.stride + self.kernel - 2 * self.pad) for n, m in zip(size, x.shape[2:], strict=True)]
        return functional.conv_transpose2d(x, weight.transpose(0, 1), None, self.stride, self.pad, output_padding=extra)


@dataclass(frozen=True)
class Case:
    """Output N, C, H, W; the terms; what the epilogue does."""

    shape: tuple[int, int, int, int]
    terms: tuple[Term, ...]
    bias: bool = False
    added: int = 0
    multiply: bool = False

    @property
    def id(self) -> str:
        """Shown by pytest."""
        terms = "+".join(f"{'T' if t.transposed else ''}{t.channels}k{t.kernel}s{t.stride}p{t.pad}" for t in self.terms)
        what = "-bias" * self.bias + f"-{self.added}added" * (self.added > 0) + "-mul" * self.multiply
        return f"{'x'.join(map(str, self.shape))}-{terms}{what}"


# Tiles that are full and partial in each direction, tiles over several samples, several tiles of columns; channels of every alignment, more
# and fewer than a slab; all kernel sizes and strides, kernels smaller than the stride, transposed strides that differ; odd maps, one pixel.
CASES = [
    Case((1, 3, 1, 1), (Term(5, 1),), bias=True, multiply=True),
    Case((2, 16, 5, 7), (Term(3),), bias=True),
    Case((2, 24, 6, 4), (Term(16), Term(8, 3, 2, transposed=True)), added=1),
    Case((1, 33, 5, 3), (Term(33), Term(34, 5, 2, transposed=True)), bias=True, multiply=True),
    Case((3, 72, 3, 8), (Term(72, 1), Term(40, 3)), bias=True, added=2),
    Case((2, 8, 3, 5), (Term(24, 7), Term(16, 1)), multiply=True, added=1),
    Case((2, 16, 4, 3), (Term(12, 3, 2), Term(4, 4, 4, padding=1))),
    Case((1, 8, 7, 6), (Term(8, 1, 2, transposed=True), Term(20, 3, 2, transposed=True)), bias=True),
    Case((1, 5, 4, 5), (Term(6, 1, 3, transposed=True, padding=0), Term(9, 4, 2, transposed=True)), added=1),
    Case((2, 6, 4, 4), (Term(7, 3, 1, transposed=True), Term(8, 2, padding=0))),
]
SMALL = CASES[:4]  # (the interpreter takes milliseconds for each slab; what it cannot show is shown on devices)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


class Guarded:
    """Tensors that lie between NaN, beginning ``odd`` elements behind where the allocator would have put them: what is read beside them
    shows in results, and :meth:`check` finds what was written there."""

    MARGIN = 32

    def __init__(self, odd: int) -> None:
        self.first = self.MARGIN + odd
        self._all: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        room = torch.full((x.numel() + 2 * self.MARGIN + 8,), float("nan"), dtype=x.dtype)
        inside = room[self.first : self.first + x.numel()].view(x.shape)
        inside.copy_(x)
        self._all.append((room, inside))
        return inside

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """To be written."""
        found = self(torch.full(shape, float("nan"), dtype=dtype))
        assert found is not None
        return found

    def check(self) -> None:
        for room, inside in self._all:
            assert room[: self.first].isnan().all(), "written before a tensor"
            assert room[self.first + inside.numel() :].isnan().all(), "written behind a tensor"


def maps(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, C, H, W] as the kernels take it."""
    return x.permute(0, 2, 3, 1).to(dtype).contiguous()


def standard(x: Tensor) -> Tensor:
    """Back, in float64."""
    return x.permute(0, 3, 1, 2).double()


class Operands:
    """Random tensors of a case, rounded to the dtype under test, in float64."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        n, c, h, w = case.shape
        self.case, self.dtype = case, dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype).double()

        self.xs = [draw(n, t.channels, t.source_size(h), t.source_size(w)) for t in case.terms]
        self.weights = [draw(c, t.channels, t.kernel, t.kernel) for t in case.terms]
        self.bias = draw(c) if case.bias else None
        self.added = [draw(n, c, h, w) for _ in range(case.added)]
        self.drive = draw(n, c, h, w) if case.multiply else None

    def terms(self, guarded: Guarded) -> list[ConvTerm]:
        """As the kernel takes them."""
        found = []
        for t, x, weight in zip(self.case.terms, self.xs, self.weights, strict=True):
            given, packed = guarded(maps(x, self.dtype)), guarded(maps(weight, self.dtype))
            assert given is not None
            assert packed is not None
            found.append(ConvTerm(given, packed, t.stride, t.pad, t.transposed))
        return found

    def sum(self) -> tuple[Tensor, Tensor]:
        """The exact sum of the terms, and the sum of all magnitudes in it, of which roundings are a share."""
        size, given = self.case.shape[2:], list(zip(self.case.terms, self.xs, self.weights, strict=True))
        total = sum(t(x, w, size) for t, x, w in given) + sum(self.added) + (0 if self.bias is None else self.bias[:, None, None])
        return total, sum(t(x.abs(), w.abs(), size) for t, x, w in given) + sum(x.abs() for x in self.added)


def check_moments(moments: Tensor, groups: list[int], value: Tensor) -> None:
    """Mean and sum of squared deviations of what was stored, per pixel and column tile."""
    (n, h, w, c), (count, tiles, columns, last) = value.shape, groups
    assert count == h * w * tiles
    assert last == c - (tiles - 1) * columns
    found = moments.double().view(n, h * w, tiles, 2)
    for tile in range(tiles):
        part = value.double().view(n, h * w, c)[..., tile * columns : (tile + 1) * columns]
        scale = float(part.abs().max())
        torch.testing.assert_close(found[:, :, tile, 0], part.mean(2), rtol=1e-5, atol=1e-6 * scale)
        deviation = ((part - part.mean(2, keepdim=True)) ** 2).sum(2)
        torch.testing.assert_close(found[:, :, tile, 1], deviation, rtol=1e-4, atol=1e-5 * scale**2)


def check_forward(case: Case, dtype: torch.dtype, odd: int = 0) -> None:
    operands, guarded = Operands(case, dtype), Guarded(odd)
    n, c, h, w = case.shape
    groups = triton_conv.recurrent_conv_moment_groups(n, h, w, c)
    value, moments = guarded.empty(n, h, w, c, dtype=dtype), guarded.empty(n, groups[0], 2, dtype=SINGLE)
    modulator = guarded.empty(n, h, w, c, dtype=dtype) if case.multiply else None
    added = [guarded(maps(x, dtype)) for x in operands.added]
    triton_conv.recurrent_conv(
        operands.terms(guarded),
        guarded(None if operands.bias is None else operands.bias.float()),
        [x for x in added if x is not None],
        guarded(None if operands.drive is None else maps(operands.drive, dtype)),
        value,
        modulator,
        moments,
    )
    guarded.check()
    total, magnitude = operands.sum()
    if operands.drive is None:
        assert_rounded(standard(value).to(dtype), total, magnitude, "value")
    else:
        assert modulator is not None
        assert_rounded(standard(modulator).to(dtype), 1 + total, 1 + magnitude, "modulator_sum")
        kept = standard(modulator)
        assert_rounded(standard(value).to(dtype), operands.drive * kept, kept.abs() * 1e-2, "value")
    check_moments(moments, groups, value)


@by_case
def test_forward(case: Case) -> None:
    check_forward(case, HALF)


@pytest.mark.parametrize("case", SMALL if INTERPRETED else CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_forward_in_other_precisions(case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype)


@pytest.mark.parametrize("odd", [1] if INTERPRETED else [1, 2, 3, 4])
def test_tensors_may_begin_anywhere(odd: int) -> None:
    for dtype in (HALF, *OTHERS):
        check_forward(CASES[1] if INTERPRETED else CASES[2], dtype, odd)


def test_elements_counted_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "_is_wide", lambda *tensors: True)
    check_forward(CASES[2], HALF)
    check_gradients(CASES[1], HALF)


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of maps with many pixels."""
    monkeypatch.setattr(triton_conv, "MANY_PROGRAMS", 1)
    case = Case((2, 130, 9, 8), (Term(20, 1), Term(8, 1, 2, transposed=True)), bias=True)
    assert triton_conv.recurrent_conv_moment_groups(2, 9, 8, 130)[1:] == [3, 64, 2]
    check_forward(case, HALF)
    case = Case((2, 120, 9, 8), (Term(20, 1),), multiply=True)
    assert triton_conv.recurrent_conv_moment_groups(2, 9, 8, 120)[1:] == [1, 128, 120]
    check_forward(case, HALF)


def check_gradients(case: Case, dtype: torch.dtype) -> None:
    """The gradient of the data is the same kernel, on the transposed term."""
    operands, guarded = Operands(case, dtype), Guarded(0)
    n, c, h, w = case.shape
    grad = torch.randn(n, c, h, w).to(dtype)
    given = guarded(maps(grad, dtype))
    assert given is not None
    for t, x, weight, term in zip(case.terms, operands.xs, operands.weights, operands.terms(guarded), strict=True):
        leaves, magnitudes = ([f(x).requires_grad_(), f(weight).requires_grad_()] for f in (torch.clone, torch.abs))
        truth = torch.autograd.grad(t(*leaves, (h, w)), leaves, grad.double())
        magnitude = torch.autograd.grad(t(*magnitudes, (h, w)), magnitudes, grad.double().abs())
        grad_x = guarded.empty(*term.x.shape, dtype=dtype)
        back = guarded(maps(weight.transpose(0, 1), dtype))
        assert back is not None
        triton_conv.recurrent_conv([ConvTerm(given, back, t.stride, t.pad, not t.transposed)], None, [], None, grad_x)
        assert_rounded(standard(grad_x).to(dtype), truth[0], magnitude[0], "grad_x")

        rows, gathered = (term.x, given) if t.transposed else (given, term.x)
        grad_weight = guarded.empty(rows.shape[3], t.kernel, t.kernel, gathered.shape[3], dtype=SINGLE)
        triton_conv.recurrent_conv_weight_grad(rows, gathered, grad_weight, t.stride, t.pad)
        ours = grad_weight.permute(0, 3, 1, 2)
        assert_rounded(ours.transpose(0, 1) if t.transposed else ours, truth[1], magnitude[1], "grad_weight")
    guarded.check()


@pytest.mark.parametrize("case", [c for c in CASES if not c.multiply], ids=lambda c: c.id)
def test_gradients_of_data_and_weight(case: Case) -> None:
    check_gradients(case, HALF)


@pytest.mark.parametrize("case", [c for c in (SMALL if INTERPRETED else CASES) if not c.multiply], ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_gradients_in_other_precisions(case: Case, dtype: torch.dtype) -> None:
    check_gradients(case, dtype)


@by_dtype
def test_data_gradients_of_several_maps_are_one_launch(dtype: torch.dtype) -> None:
    """One map read by three: a convolution, one of stride 2, and a transposed one."""
    x = torch.randn(2, 6, 4, 4).to(dtype).double().requires_grad_()
    terms, total, magnitude = [], torch.zeros_like(x), torch.zeros_like(x)
    for stride, transposed in ((1, False), (2, False), (2, True)):
        weight = torch.randn(10, 6, 3, 3).to(dtype).double()

        def read(x: Tensor, weight: Tensor, stride: int = stride, transposed: bool = transposed) -> Tensor:
            if transposed:
                return functional.conv_transpose2d(x, weight.transpose(0, 1), None, stride, 1, output_padding=1)
            return functional.conv2d(x, weight, None, stride, 1)

        grad = torch.randn(read(x, weight).shape).to(dtype).double()
        total += torch.autograd.grad(read(x, weight), x, grad)[0]
        magnitude += torch.autograd.grad(read(x, weight.abs()), x, grad.abs())[0]
        terms.append(ConvTerm(maps(grad, dtype), maps(weight.transpose(0, 1), dtype), stride, 1, not transposed))
    grad_x = torch.full((2, 4, 4, 6), float("nan"), dtype=dtype)
    triton_conv.recurrent_conv(terms, None, [], None, grad_x)
    assert_rounded(standard(grad_x).to(dtype), total, magnitude, "grad_x")


@pytest.mark.parametrize(("a", "b"), [(8, 20), (70, 70), (3, 130)] if not INTERPRETED else [(70, 8)])
def test_weight_gradients_are_split_over_pixels(a: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last split has fewer slabs; the sum is the same every time."""
    if INTERPRETED:
        monkeypatch.setattr(triton_conv, "LEAST_SLABS", 2)
    n, h, w = 5, 13, 9
    taken: list[int] = []
    launch = triton_conv.weight_grad_launch
    monkeypatch.setattr(triton_conv, "weight_grad_launch", lambda *args: taken.append(len(args[2])) or launch(*args))
    rows, gathered = torch.randn(n, h, w, a).half(), torch.randn(n, h, w, b).half()
    grads = [torch.full((a, 1, 1, b), float("nan")) for _ in range(2)]
    for grad in grads:
        triton_conv.recurrent_conv_weight_grad(rows, gathered, grad, 1, 0)
    assert min(taken) > 1
    assert torch.equal(*grads)
    truth = torch.einsum("nhwa,nhwb->ab", rows.double(), gathered.double())
    magnitude = torch.einsum("nhwa,nhwb->ab", rows.double().abs(), gathered.double().abs())
    assert_rounded(grads[0][:, 0, 0], truth, magnitude, "grad_weight")


@pytest.mark.parametrize("which", ["added", "drive"])
def test_the_value_may_be_written_over_an_operand(which: str) -> None:
    case = CASES[2] if which == "added" else CASES[0]
    operands, guarded = Operands(case, HALF), Guarded(0)
    source = operands.added[0] if which == "added" else operands.drive
    assert source is not None
    value, bias = maps(source, HALF), None if operands.bias is None else operands.bias.float()
    terms, added = operands.terms(guarded), [value] if which == "added" else []
    triton_conv.recurrent_conv(terms, bias, added, None if which == "added" else value, value)
    total, magnitude = operands.sum()
    if which == "drive":
        total, magnitude = source * (1 + total).half().double(), source.abs() * (1 + magnitude) * 100
    assert_rounded(standard(value).half(), total, magnitude, "value", roundings=1.1)


def test_maps_of_more_than_2_to_the_31_elements() -> None:
    """The pages of which a few are read: two output pixels that lie far apart."""
    height, width, channels = 40_000, 1024, 64
    assert height * width * channels > 1 << 31
    x = torch.empty(1, height, width, channels, dtype=HALF)
    for row in (0, height - 1):
        x[0, row, 0] = torch.randn(channels).half()
    weight, value = torch.randn(16, 1, 1, channels).half(), torch.empty(1, 2, 1, 16, dtype=HALF)
    triton_conv.recurrent_conv([ConvTerm(x, weight, height - 1, 0)], None, [], None, value)
    read = x[0, :: height - 1, 0].double()
    assert_rounded(value[0, :, 0], read @ weight[:, 0, 0].double().T, read.abs() @ weight[:, 0, 0].double().abs().T, "value")
    grad = torch.empty(16, 1, 1, channels)
    triton_conv.recurrent_conv_weight_grad(value, x, grad, height - 1, 0)
    rows = value[0, :, 0].double()
    assert_rounded(grad[:, 0, 0], rows.T @ read, rows.abs().T @ read.abs(), "grad_weight")


def test_bad_arguments_are_refused() -> None:
    x, weight, value = torch.zeros(2, 4, 4, 8).half(), torch.zeros(8, 3, 3, 8).half(), torch.zeros(2, 4, 4, 8).half()

    def call(*terms: ConvTerm, added: Any = (), drive: Any = None, out: Tensor = value, **outputs: Any) -> None:
        triton_conv.recurrent_conv(list(terms), None, added, drive, out, **outputs)

    good = ConvTerm(x, weight, 1, 1)
    with pytest.raises(ValueError, match=r"terms\[0\].weight: expected a contiguous tensor \[8, 3, 3, 8\] of torch.float16"):
        call(ConvTerm(x, weight.float()))
    with pytest.raises(ValueError, match="terms: expected 1 to 8, got 0"):
        call()
    with pytest.raises(ValueError, match="terms: expected 1 to 8, got 9"):
        call(*[good] * 9)
    with pytest.raises(ValueError, match="added: expected 0 to 6, got 7"):
        call(good, added=[value] * 7)
    with pytest.raises(ValueError, match=r"added\[1\]: expected a contiguous tensor"):
        call(good, added=[value, value[:1]])
    with pytest.raises(ValueError, match=r"terms\[0\].stride: expected at least 1, got 0"):
        call(ConvTerm(x, weight, 0, 1))
    with pytest.raises(ValueError, match="least common multiple is at most 16, got 21"):
        call(ConvTerm(x, weight, 3, 1, True), ConvTerm(x, weight, 7, 1, True))
    with pytest.raises(ValueError, match="modulator_sum: expected with a drive only"):
        call(good, modulator_sum=value)
    with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch\.float64"):
        call(ConvTerm(x.double(), weight.double()), out=value.double())
    with pytest.raises(ValueError, match="grad_weight: expected a contiguous tensor"):
        triton_conv.recurrent_conv_weight_grad(x, x, torch.zeros(8, 3, 3, 8).half(), 1, 1)


def test_empty_maps_are_nothing_to_do() -> None:
    weight = torch.randn(8, 3, 3, 8).half()
    x = torch.empty(0, 4, 4, 8).half()
    triton_conv.recurrent_conv([ConvTerm(x, weight, 1, 1)], None, [], None, torch.empty_like(x))
    grad = torch.full((8, 3, 3, 8), float("nan"))
    triton_conv.recurrent_conv_weight_grad(x, x, grad, 1, 1)
    assert not grad.any()


# ---------------------------------------------------------------- rollouts

ROLLOUTS = (
    [("topdown_multiplicative", HALF), ("lateral_additive_bias", HALF), ("operators_additive", HALF), ("topdown_additive", SINGLE)]
    if INTERPRETED
    else []
)


@in_harness
@pytest.mark.parametrize(("name", "dtype"), ROLLOUTS, ids=str)
def test_rollouts_are_as_good_as_plain_pytorch(name: str, dtype: torch.dtype, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks, forward and backward: every convolution in Triton's interpreter, everything else in the SIMT harness."""
    from cases import CASES as NETWORKS
    from device_rollouts import rounded_case, send_to_kernels
    from test_rollout_half import errors, step, without_maxima, without_relu

    case = dataclasses.replace(without_relu(NETWORKS[name]), timesteps=2, samples=1)
    if name.startswith("operators"):
        case = without_maxima(case)
    inputs, parameters = rounded_case(case, dtype)
    truth = step(case, inputs, parameters, "reference")
    given = [x.to(dtype) for x in inputs], {name: p.to(dtype) for name, p in parameters.items()}
    plain = errors(step(case, *given, "reference"), truth)
    launches = send_to_kernels(monkeypatch, dtype, triton=True)
    ours: list[str] = []
    for op in ("recurrent_conv", "recurrent_conv_weight_grad"):
        launch = getattr(triton_conv, op)
        monkeypatch.setattr(triton_conv, op, lambda *args, launch=launch, op=op: (ours.append(op), launch(*args))[1])
    result = step(case, *given, "native", "triton")
    assert {"recurrent_conv", "recurrent_conv_weight_grad"} == set(ours)
    assert {"area_step_forward", "area_step_backward"} <= set(launches)
    assert not {"recurrent_conv", "recurrent_conv_weight_grad"} & set(launches), "those of the CUDA kernels"
    for what, error in errors(result, truth).items():
        assert error <= 2 * plain[what] + 4 * torch.finfo(dtype).eps, f"{what}: {error:.3g}, plain {plain[what]:.3g}"
