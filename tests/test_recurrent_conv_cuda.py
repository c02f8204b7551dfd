"""The fused recurrent convolution on CUDA, in the SIMT harness, against PyTorch's convolutions in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import simt_harness
import torch
from device_rollouts import in_harness
from test_area_step import EPS, maps, poisoned, standard
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops import cuda_module, launches

DTYPES = [torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Term:
    """A convolution (``same`` padding, or with a stride), or a transposed one that doubles the map."""

    channels: int
    kernel: int = 3
    stride: int = 1
    transposed: bool = False

    @property
    def padding(self) -> int:
        """On each side."""
        return (self.kernel - 1) // 2

    def source_size(self, size: int) -> int:
        """Of the input, for an output of this size."""
        return size // 2 if self.transposed else size * self.stride - (self.stride - 1)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:  # [N, C', H', W'], [C, C', K, K]
        """In plain PyTorch. A transposed one keeps its weight as a convolution's, [C, C', K, K]."""
        if self.transposed:
            return functional.conv_transpose2d(x, weight.transpose(0, 1), None, 2, self.padding, output_padding=1)
        return functional.conv2d(x, weight, None, self.stride, self.padding)


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
        terms = "+".join(f"{'T' if t.transposed else ''}{t.channels}k{t.kernel}s{t.stride}" for t in self.terms)
        return (
            f"{'x'.join(map(str, self.shape))}-{terms}"
            + "-bias" * self.bias
            + f"-{self.added}added" * (self.added > 0)
            + "-mul" * self.multiply
        )


# Tiles that are full and partial in each direction, tiles over several samples, channels that are no multiple of a slab, all kernel
# sizes, odd maps, one pixel, every phase.
CASES = [
    Case((1, 8, 1, 1), (Term(8, 1),)),
    Case((2, 16, 5, 7), (Term(8),), bias=True),
    Case((3, 72, 4, 6), (Term(40, 5), Term(72)), bias=True, added=2),
    Case((2, 24, 6, 4), (Term(16), Term(8, transposed=True)), added=1),
    Case((1, 64, 8, 8), (Term(64), Term(40, 5, transposed=True)), bias=True, multiply=True),
    Case((2, 8, 3, 5), (Term(24, 7), Term(16, 1)), multiply=True, added=1),
    Case((2, 16, 5, 4), (Term(8, 3, 2),)),
    Case((1, 8, 6, 6), (Term(8, 1, transposed=True), Term(16, 3, transposed=True))),
]
# More pixels than 132 tiles of 128 x 128 have: the large tiles.
LARGE = [Case((18, 8, 31, 31), (Term(8, 1),), bias=True), Case((18, 72, 32, 32), (Term(8, 1, transposed=True),), multiply=True)]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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

    def terms(self) -> dict[str, Any]:
        """As the kernel takes them."""
        return {
            "xs": [maps(x.to(self.dtype)) for x in self.xs],
            "weights": [maps(weight.to(self.dtype)) for weight in self.weights],
            "settings": [(2 if t.transposed else t.stride, t.padding, t.transposed) for t in self.case.terms],
        }

    def sum(self) -> tuple[Tensor, Tensor]:
        """The exact sum of the terms, and the sum of all magnitudes in it, of which roundings are a share."""
        parts = [t(x, w) for t, x, w in zip(self.case.terms, self.xs, self.weights, strict=True)]
        sizes = [t(x.abs(), w.abs()) for t, x, w in zip(self.case.terms, self.xs, self.weights, strict=True)]
        total = sum(parts) + sum(self.added) + (0 if self.bias is None else self.bias[:, None, None])
        return total, sum(sizes) + sum(x.abs() for x in self.added)


def assert_rounded(ours: Tensor, truth: Tensor, magnitude: Tensor, what: str, roundings: float = 0.51) -> None:
    """Each element is the exact one rounded (``roundings`` of its dtype), but for float32 roundings of the magnitudes that were summed."""
    assert not ours.isnan().any(), f"{what}: NaN (or something left unwritten)"
    allowed = roundings * torch.finfo(ours.dtype).eps * truth.abs() + 1e-5 * magnitude + 1e-7
    error = (ours.double() - truth).abs()
    assert (error <= allowed).all(), f"{what}: error up to {float((error / allowed).max()):.3g} times what is allowed"


def check_forward(case: Case, dtype: torch.dtype) -> None:
    operands = Operands(case, dtype)
    n, c, h, w = case.shape
    value, moments_shape = poisoned(n, h, w, c, dtype=dtype), cuda_module.moment_groups(n, h, w, c)
    modulator = poisoned(n, h, w, c, dtype=dtype) if case.multiply else None
    moments = poisoned(n, moments_shape[0], 2, dtype=torch.float32)
    launches.recurrent_conv.on_device(
        **operands.terms(),
        bias=None if operands.bias is None else operands.bias.float(),
        added=[maps(x.to(dtype)) for x in operands.added],
        drive=None if operands.drive is None else maps(operands.drive.to(dtype)),
        value=value,
        modulator_sum=modulator,
        moments=moments,
    )
    total, magnitude = operands.sum()
    if operands.drive is None:
        assert_rounded(standard(value), total, magnitude, "value")
    else:
        assert modulator is not None
        assert_rounded(standard(modulator), 1 + total, 1 + magnitude, "modulator_sum")
        kept = standard(modulator).double()
        assert_rounded(standard(value), operands.drive * kept, kept.abs() * 1e-2, "value")
    # The moments are those of what was stored, and area_step takes them.
    mean, rstd, state = poisoned(n, dtype=torch.float32), poisoned(n, dtype=torch.float32), poisoned(n, h, w, c, dtype=dtype)
    gamma, beta = torch.rand(h, w, c) + 0.5, torch.randn(h, w, c)
    launches.area_step_forward.on_device(
        gamma=gamma, beta=beta, eps=EPS, rectify=True, value=value, state=state, mean=mean, rstd=rstd, moments=moments,
        moment_groups=moments_shape,
    )  # fmt: skip
    stored = value.double()
    flat = stored.flatten(1)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-5, atol=1e-5 * float(flat.abs().max()))
    torch.testing.assert_close(rstd.double(), (flat.var(1, unbiased=False) + EPS).rsqrt(), rtol=1e-5, atol=0)
    truth = torch.relu(functional.layer_norm(stored, (h, w, c), gamma.double(), beta.double(), EPS))
    assert_rounded(state, truth, torch.full_like(truth, 10.0), "state")


@by_case
@by_dtype
def test_forward(simt: Any, case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype)


@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_forward_in_large_tiles(simt: Any, case: Case) -> None:
    n, c, h, w = case.shape
    assert simt.recurrent_conv_tiles(n, h, w, c)[:2] == (128, 64 if c <= 64 else 128)
    check_forward(case, torch.float16)


@pytest.mark.parametrize("case", [c for c in CASES if not c.multiply], ids=lambda c: c.id)
@by_dtype
def test_gradients_of_data_and_weight(simt: Any, case: Case, dtype: torch.dtype) -> None:
    """The gradient of the data is the same kernel, on the transposed term."""
    operands = Operands(case, dtype)
    n, c, h, w = case.shape
    grad = torch.randn(n, c, h, w).to(dtype)
    for t, x, weight in zip(case.terms, operands.xs, operands.weights, strict=True):
        leaves, magnitudes = ([f(x).requires_grad_(), f(weight).requires_grad_()] for f in (torch.clone, torch.abs))
        truth = torch.autograd.grad(t(*leaves), leaves, grad.double())
        magnitude = torch.autograd.grad(t(*magnitudes), magnitudes, grad.double().abs())
        stride = 2 if t.transposed else t.stride
        _, channels, height, width = x.shape
        source = maps(x.to(dtype))

        grad_x = poisoned(n, height, width, channels, dtype=dtype)
        back = maps(weight.transpose(0, 1).to(dtype))
        settings = [(stride, t.padding, not t.transposed)]
        launches.recurrent_conv.on_device(xs=[maps(grad)], weights=[back], settings=settings, value=grad_x)
        assert_rounded(standard(grad_x), truth[0], magnitude[0], "grad_x")

        rows, gathered = (source, maps(grad)) if t.transposed else (maps(grad), source)
        grad_weight = poisoned(rows.shape[-1], t.kernel, t.kernel, gathered.shape[-1], dtype=torch.float32)
        launches.recurrent_conv_weight_grad.on_device(
            rows=rows, gathered=gathered, grad_weight=grad_weight, stride=stride, padding=t.padding
        )
        ours = grad_weight.permute(0, 3, 1, 2)
        assert_rounded(ours.transpose(0, 1) if t.transposed else ours, truth[1], magnitude[1], "grad_weight")


def weight_grad_splits(module: Any, n: int, h: int, w: int, a: int, b: int, kernel: int) -> int:
    """Into how many parts, summed afterwards, the kernel cuts the pixels: from the scratch that it asks for."""
    sizes = {"samples": n, "height": h, "width": w, "row_channels": a, "gathered_height": h, "gathered_width": w, "gathered_channels": b}
    launch = module.launch("recurrent_conv_weight_grad", "float16", {**sizes, "kernel": kernel, "stride": 1, "padding": kernel // 2}, 0)
    return max(1, launch.scratch_bytes // (4 * a * b * kernel**2))


@pytest.mark.parametrize("channels", [(8, 16), (136, 72), (72, 136)], ids=str)
def test_weight_gradient_splits_its_depth(simt: Any, channels: tuple[int, int]) -> None:
    """Small and large tiles; more than one split, the last of them with fewer slabs."""
    a, b = channels
    n, h, w = 5, 23, 17
    assert weight_grad_splits(simt, n, h, w, a, b, 1) > 1
    rows, gathered = torch.randn(n, h, w, a).half(), torch.randn(n, h, w, b).half()
    grad = poisoned(a, 1, 1, b, dtype=torch.float32)
    launches.recurrent_conv_weight_grad.on_device(rows=rows, gathered=gathered, grad_weight=grad, stride=1, padding=0)
    truth = torch.einsum("nhwa,nhwb->ab", rows.double(), gathered.double())
    magnitude = torch.einsum("nhwa,nhwb->ab", rows.double().abs(), gathered.double().abs())
    assert_rounded(grad[:, 0, 0], truth, magnitude, "grad_weight")


@in_harness
@pytest.mark.parametrize(("multiprocessors", "shared_kib"), [(108, 163), (132, 227), (82, 99), (7, 99)], ids=str)
def test_weight_gradients_are_one_wave(multiprocessors: int, shared_kib: int, simt: Any) -> None:
    """As many blocks as the device holds at once, or as many as there are tiles: a few more would take as long again."""
    registers = simt_harness.registers()
    simt.set_limits(shared_kib * 1024, registers, multiprocessors)
    for a, b, kernel, (size, per_block) in (
        (128, 128, 3, (128, 64)),
        (256, 136, 3, (128, 64)),
        (64, 64, 5, (64, 32)),
        (512, 256, 3, (128, 64)),
    ):
        taken = -(-registers["recurrent_conv_weight_grad_kernel"] // 8) * 8 * 256
        held = multiprocessors * min(65536 // taken, (shared_kib + 1) // (per_block + 1))
        tiles = -(-a // size) * -(-b // size) * kernel**2
        splits = weight_grad_splits(simt, 1024, 16, 16, a, b, kernel)
        assert splits == max(1, min(64, held // tiles)), (a, b, kernel)
    sizes = {"samples": 64, "channels": 128, "in_height": 32, "in_width": 32, "out_height": 32, "out_width": 32}
    rest = {"kernel_height": 3, "kernel_width": 3, "step": 1, "dilation": 1, "top": 1, "left": 1, "group_in": 1, "group_out": 1}
    launch = simt.launch("depthwise_weight_grad", "float16", {**sizes, **rest}, 0)
    assert 3 * launch.scratch_bytes // (4 * 9 * 128) <= multiprocessors * 8


def test_the_order_of_threads_changes_nothing(simt: Any) -> None:
    operands, results = Operands(CASES[3], torch.bfloat16), []
    for order in (simt.Order.FORWARD, simt.Order.REVERSED, simt.Order.RANDOM):
        simt.set_order(order, 5)
        value = poisoned(2, 6, 4, 24, dtype=torch.bfloat16)
        launches.recurrent_conv.on_device(**operands.terms(), added=[maps(operands.added[0].bfloat16())], value=value)
        results.append(value)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bad_arguments_are_refused(simt: Any) -> None:
    x, weight, value = torch.zeros(2, 4, 4, 8).half(), torch.zeros(8, 3, 3, 8).half(), torch.zeros(2, 4, 4, 8).half()

    def launch(x: Tensor, weight: Tensor, value: Tensor, stride: int = 1, padding: int = 0) -> None:
        launches.recurrent_conv.on_device(xs=[x], weights=[weight], settings=[(stride, padding, False)], value=value)

    with pytest.raises(ValueError, match=r"weights\[0\]: expected a contiguous tensor \[8, 3, 3, 8\] of torch.float16"):
        launch(x, weight.float(), value)
    with pytest.raises(ValueError, match="terms: expected 1 to 8"):
        launches.recurrent_conv.on_device(xs=[], weights=[], settings=[], value=value)
    with pytest.raises(ValueError, match="multiples of 8"):
        launch(x[..., :4].contiguous(), weight[..., :4].contiguous(), value)
    with pytest.raises(ValueError, match="stride of 1 or 2"):
        launch(x, weight, value, 3, 1)
    with pytest.raises(ValueError, match="recurrent_conv: there is no kernel for float32"):
        launch(x.float(), weight.float(), value.float())
