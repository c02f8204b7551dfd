"""The native area_step against the reference: forward and backward, over shapes, terms, outputs, instruction sets
and threads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast import _core
from rnndyn_fast.ops import core
from rnndyn_fast.program.kinds import KINDS
from rnndyn_fast.reference.area_step import area_step

ISAS = _core.build_info()["isa_supported"]
EPS = 1e-5


@dataclass(frozen=True)
class Step:
    """One case: sizes, numbers of terms, and which of the optional parts there are."""

    shape: tuple[int, int, int, int]  # N, C, H, W
    drives: int = 1
    modulators: int = 0
    biases: tuple[bool, bool] = (False, False)
    norm: bool = True
    rectify: bool = True

    @property
    def id(self) -> str:
        """Shown by pytest."""
        n, c, h, w = self.shape
        parts = [f"n{n}c{c}h{h}w{w}", f"{self.drives}drives", f"{self.modulators}modulators"]
        parts += [name for name, on in zip(("drive_bias", "modulator_bias"), self.biases, strict=True) if on]
        return "-".join(parts + ["norm"] * self.norm + ["relu"] * self.rectify)


SHAPES = [(1, 1, 1, 1), (2, 3, 1, 1), (1, 33, 5, 7), (3, 4, 2, 9), (2, 5, 8, 6), (1, 3, 64, 64), (2, 130, 9, 40)]
STEPS = [
    *(Step(shape, 2, modulators, (True, modulators > 0)) for shape in SHAPES for modulators in (0, 2)),
    *(
        Step((2, 5, 6, 4), drives, modulators, (bias, modulators > 0 and modulator_bias), norm, rectify)
        for drives, modulators, bias, modulator_bias, norm, rectify in itertools.product(
            (1, 3), (0, 1), (False, True), (False, True), (False, True), (False, True)
        )
        if modulators or not modulator_bias
    ),
    Step((2, 3, 4, 5), 9, 0, (True, False)),
    Step((2, 3, 4, 5), 8, 7, (True, True)),
]
by_id = pytest.mark.parametrize("step", STEPS, ids=lambda s: s.id)


def maps(x: Tensor) -> Tensor:
    """[N, C, H, W] as the contiguous [N, H, W, C] of the kernels."""
    return x.permute(0, 2, 3, 1).contiguous()


def standard(x: Tensor) -> Tensor:
    """[N, H, W, C] as [N, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def at_most(terms: Sequence[Tensor]) -> list[Tensor]:
    """The terms as the kernel takes them: those past its limit summed into one."""
    limit = core.MAX_TERMS
    if len(terms) <= limit:
        return list(terms)
    rest = torch.empty_like(terms[0])
    KINDS["total"].run(terms[limit - 1 :], rest)
    return [*terms[: limit - 1], rest]


def area_step_forward(drives: Sequence[Tensor], modulators: Sequence[Tensor] = (), *, rectify: bool = True, **operands: Any) -> None:
    """The instruction ``area_step``, of any number of terms."""
    KINDS["area_step"].run(drives=at_most(drives), modulators=at_most(modulators), rectify=rectify, **operands)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A buffer in which nothing may be left unwritten."""
    return torch.full(shape, 255 if dtype == torch.uint8 else float("nan"), dtype=dtype)


class Operands:
    """Random terms and parameters of a case, in float64 and, rounded, in the dtype under test."""

    def __init__(self, step: Step, dtype: torch.dtype) -> None:
        n, c, h, w = step.shape
        self.step, self.dtype = step, dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(dtype).double()

        self.drives = [draw(n, c, h, w) for _ in range(step.drives)]
        self.modulators = [0.5 * draw(n, c, h, w) for _ in range(step.modulators)]
        self.drive_bias = draw(c) if step.biases[0] else None
        self.modulator_bias = draw(c) if step.biases[1] else None
        self.gamma = (1 + 0.3 * draw(c, h, w)).to(dtype).double() if step.norm else None
        self.beta = 0.3 * draw(c, h, w).to(dtype).double() if step.norm else None

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Everything differentiable, as leaves of a dtype: drives, modulators, then the other four where they are."""
        rest = [t for t in (self.drive_bias, self.modulator_bias, self.gamma, self.beta) if t is not None]
        return [t.to(dtype).requires_grad_() for t in (*self.drives, *self.modulators, *rest)]

    def reference(self, leaves: list[Tensor]) -> Tensor:
        """The state by the reference."""
        rest = list(leaves)
        drives = [rest.pop(0) for _ in self.drives]
        modulators = [rest.pop(0) for _ in self.modulators]
        if self.drive_bias is not None:
            drives.append(rest.pop(0)[None, :, None, None].expand_as(drives[0]))
        if self.modulator_bias is not None:
            modulators.append(rest.pop(0)[None, :, None, None].expand_as(drives[0]))
        gamma, beta = (rest.pop(0), rest.pop(0)) if self.gamma is not None else (None, None)
        return area_step(drives, modulators, gamma=gamma, beta=beta, eps=EPS, rectify=self.step.rectify)

    def forward(self) -> dict[str, Tensor]:
        """Every output of the native kernel, written over poison."""
        (n, c, h, w), dtype = self.step.shape, self.dtype

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        out = {
            "value": poisoned(n, h, w, c, dtype=dtype),
            "modulator_sum": poisoned(n, h, w, c, dtype=dtype),
            "state": poisoned(n, h, w, c, dtype=dtype),
            "max_pooled": poisoned(n, h // 2, w // 2, c, dtype=dtype),
            "argmax": poisoned(n, h // 2, w // 2, c, dtype=torch.uint8),
            "mean_pooled": poisoned(n, 1, 1, c, dtype=dtype),
            "mean": poisoned(n, dtype=dtype),
            "rstd": poisoned(n, dtype=dtype),
        }
        if not self.modulators:
            del out["modulator_sum"]
        area_step_forward(
            [maps(x.to(dtype)) for x in self.drives],
            [maps(x.to(dtype)) for x in self.modulators],
            drive_bias=cast(self.drive_bias),
            modulator_bias=cast(self.modulator_bias),
            gamma=None if self.gamma is None else self.gamma.to(dtype).permute(1, 2, 0).contiguous(),
            beta=None if self.beta is None else self.beta.to(dtype).permute(1, 2, 0).contiguous(),
            eps=EPS,
            rectify=self.step.rectify,
            **out,
        )
        if not self.step.norm:
            del out["mean"], out["rstd"]
        return out

    def backward(self, kept: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every gradient that the native kernel gives. ``grads``: of the state, its maximum and its mean, those that
        are."""
        (n, c, h, w), dtype = self.step.shape, self.dtype
        multiplicative = bool(self.modulators)
        out = {"grad_drive": poisoned(n, h, w, c, dtype=dtype), "grad_drive_sum": torch.ones(n, h, w, c, dtype=dtype)}
        if multiplicative:
            out["grad_modulator"] = poisoned(n, h, w, c, dtype=dtype)
        if self.step.norm:
            out |= {name: torch.ones(h, w, c, dtype=dtype) for name in ("grad_gamma", "grad_beta")}
        gamma = None if self.gamma is None else self.gamma.to(dtype).permute(1, 2, 0).contiguous()
        beta = None if self.beta is None else self.beta.to(dtype).permute(1, 2, 0).contiguous()
        KINDS["area_step_backward"].run(
            height=h,
            width=w,
            grad_states=[maps(grads["state"])] if "state" in grads else [],
            grad_max_pooled=maps(grads["max_pooled"]) if "max_pooled" in grads else None,
            argmax=kept["argmax"] if "max_pooled" in grads else None,
            grad_mean_pooled=maps(grads["mean_pooled"]) if "mean_pooled" in grads else None,
            multiplicative=multiplicative,
            value=None if multiplicative else kept["value"],
            drives=at_most([maps(x.to(dtype)) for x in self.drives]) if multiplicative else [],
            drive_bias=self.drive_bias.to(dtype) if multiplicative and self.drive_bias is not None else None,
            modulator_sum=kept.get("modulator_sum"),
            mean=kept.get("mean"),
            rstd=kept.get("rstd"),
            gamma=gamma,
            beta=beta,
            rectify=self.step.rectify,
            **out,
        )
        return out


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """Our error against float64 is at most twice plain PyTorch's, plus a floor of a few roundings of the largest
    value."""
    assert not ours.isnan().any(), f"{what}: NaN (or something left unwritten)"
    if not truth.numel():
        return
    ours, plain, truth = ours.detach(), plain.detach(), truth.detach()
    scale = float(truth.abs().max())
    # Summing order differs, so single entries may be off by more roundings than plain PyTorch's happen to be. In
    # float64 the truth itself
    # is rounded: through a norm over a single element (rstd = 316, the exact gradient is 0) it was seen 310
    # roundings off.
    floor = (16 if ours.dtype == torch.float32 else 1000) * torch.finfo(ours.dtype).eps * max(scale, 1.0)
    error, plain_error = float((ours.double() - truth).abs().max()), float((plain.double() - truth).abs().max())
    assert error <= 2 * plain_error + floor, f"{what}: error {error:.3g}, plain PyTorch {plain_error:.3g}, floor {floor:.3g}"


def test_as_good_can_fail() -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good(x + 1e-4, x, x.double(), "x")
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_good(x * float("nan"), x, x.double(), "x")


@by_id
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_matches_reference(step: Step, dtype: torch.dtype, isa: str) -> None:
    operands = Operands(step, dtype)
    out = operands.forward()
    _, _, h, w = step.shape
    with torch.no_grad():
        truth, plain = (operands.reference(operands.leaves(d)) for d in (torch.float64, dtype))
    assert_as_good(standard(out["state"]), plain, truth, "state")
    assert_as_good(standard(out["mean_pooled"]), plain.mean((2, 3), keepdim=True), truth.mean((2, 3), keepdim=True), "mean_pooled")
    if h > 1 and w > 1:
        pooled, index = functional.max_pool2d(standard(out["state"]), 2, 2, return_indices=True)
        torch.testing.assert_close(standard(out["max_pooled"]), pooled, rtol=0, atol=0)
        rows, columns = index // w % 2, index % w % 2
        torch.testing.assert_close(standard(out["argmax"]).long(), 2 * rows + columns, rtol=0, atol=0)


@by_id
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outputs", [("state",), ("max_pooled", "mean_pooled"), ("state", "max_pooled", "mean_pooled")], ids="+".join)
def test_backward_matches_autograd(step: Step, dtype: torch.dtype, outputs: tuple[str, ...], isa: str) -> None:
    n, c, h, w = step.shape
    if min(h, w) < 2:
        outputs = tuple(name for name in outputs if name != "max_pooled")
    operands = Operands(step, dtype)
    shapes = {"state": (n, c, h, w), "max_pooled": (n, c, h // 2, w // 2), "mean_pooled": (n, c, 1, 1)}
    grads = {name: torch.randn(shapes[name]).to(dtype) for name in outputs}
    ours = operands.backward(operands.forward(), grads)

    def autograd(of: torch.dtype) -> list[Tensor]:
        leaves = operands.leaves(of)
        state = operands.reference(leaves)
        forms = {"state": state, "mean_pooled": state.mean((2, 3), keepdim=True)}
        if "max_pooled" in outputs:
            forms["max_pooled"] = functional.max_pool2d(state, 2, 2)
        return list(torch.autograd.grad([forms[o] for o in outputs], leaves, [grads[o].to(of) for o in outputs]))

    truth, plain = autograd(torch.float64), autograd(dtype)
    k = step.drives
    assert_as_good(standard(ours["grad_drive"]), plain[0], truth[0], "grad_drive")
    assert_as_good(standard(ours["grad_drive_sum"]) - 1, plain[0], truth[0], "grad_drive_sum (added to)")
    if step.modulators:
        assert_as_good(standard(ours["grad_modulator"]), plain[k], truth[k], "grad_modulator")
    if step.norm:
        for name, p, t in zip(("grad_gamma", "grad_beta"), plain[-2:], truth[-2:], strict=True):
            assert_as_good(ours[name].permute(2, 0, 1) - 1, p, t, f"{name} (added to)")


# Of the last two, samples of 384 KiB, one goes through both passes of backward before the next where there are several threads.
THREADED = [s for s in STEPS if s.shape in ((1, 3, 64, 64), (2, 130, 9, 40), (3, 4, 2, 9))]
THREADED += [Step((3, 96, 16, 64)), Step((3, 96, 16, 64), 1, 1)]


@pytest.mark.parametrize("step", THREADED, ids=lambda s: s.id)
def test_result_is_the_same_for_any_number_of_threads(step: Step, isa: str) -> None:
    operands = Operands(step, torch.float32)
    n, c, h, w = step.shape
    grads = {"state": torch.randn(n, c, h, w), "max_pooled": torch.randn(n, c, h // 2, w // 2)}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = operands.forward()
            results.append(out | operands.backward(out, grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("drives", [1, 3])
def test_state_is_made_again_from_terms_and_statistics(drives: int, isa: str) -> None:
    operands = Operands(Step((2, 21, 6, 5), drives, 2, (drives > 1, True)), torch.float32)
    expected = operands.forward()
    assert operands.gamma is not None
    assert operands.beta is not None
    again = {name: poisoned(*expected[name].shape, dtype=torch.float32) for name in ("state", "max_pooled")}
    area_step_forward(
        [maps(x.float()) for x in operands.drives], [expected["modulator_sum"]], modulator_complete=True, complete=True,
        drive_bias=None if operands.drive_bias is None else operands.drive_bias.float(),
        gamma=operands.gamma.float().permute(1, 2, 0).contiguous(), beta=operands.beta.float().permute(1, 2, 0).contiguous(),
        mean=expected["mean"], rstd=expected["rstd"], **again,
    )  # fmt: skip
    assert all(torch.equal(again[name], expected[name]) for name in again)


def test_value_may_take_the_memory_of_the_first_drive() -> None:
    operands = Operands(Step((2, 5, 6, 4), 3, 1), torch.float64)
    expected = operands.forward()
    drives = [maps(x) for x in operands.drives]
    assert operands.gamma is not None
    assert operands.beta is not None
    state = poisoned(2, 6, 4, 5, dtype=torch.float64)
    area_step_forward(
        drives, [maps(x) for x in operands.modulators],
        gamma=operands.gamma.permute(1, 2, 0).contiguous(), beta=operands.beta.permute(1, 2, 0).contiguous(),
        value=drives[0], state=state, mean=torch.empty(2, dtype=torch.float64), rstd=torch.empty(2,
        dtype=torch.float64),
    )  # fmt: skip
    assert torch.equal(state, expected["state"])


@pytest.mark.parametrize("shape", [(1, 5, 6, 4), (3, 33, 7, 9)])
def test_state_may_take_the_memory_of_the_value(isa: str, shape: tuple[int, int, int, int]) -> None:
    step = Step(shape, 2, 1)
    operands, (n, c, h, w) = Operands(step, torch.float64), shape
    expected = operands.forward()
    assert operands.gamma is not None
    assert operands.beta is not None
    place, pooled = poisoned(n, h, w, c, dtype=torch.float64), poisoned(n, h // 2, w // 2, c, dtype=torch.float64)
    area_step_forward(
        [maps(x) for x in operands.drives], [maps(x) for x in operands.modulators],
        gamma=operands.gamma.permute(1, 2, 0).contiguous(), beta=operands.beta.permute(1, 2, 0).contiguous(),
        value=place, state=place, max_pooled=pooled, mean=torch.empty(n, dtype=torch.float64), rstd=torch.empty(n, dtype=torch.float64),
    )  # fmt: skip
    assert torch.equal(place, expected["state"])
    assert torch.equal(pooled, maps(functional.max_pool2d(standard(place), 2, 2)))


@pytest.mark.parametrize("kept", ["state", "no_state"])
def test_first_of_equal_maxima_wins_and_takes_the_gradient(isa: str, kept: str) -> None:
    x = torch.zeros(1, 6, 6, 5)
    x[0, 2:4, 2:4] = 1.0
    x[0, 5, 5] = 1.0
    pooled, argmax = poisoned(1, 3, 3, 5, dtype=torch.float32), poisoned(1, 3, 3, 5, dtype=torch.uint8)
    state = poisoned(1, 6, 6, 5, dtype=torch.float32) if kept == "state" else None
    area_step_forward([x], max_pooled=pooled, argmax=argmax, state=state)
    expected = torch.zeros(1, 3, 3, 5, dtype=torch.uint8)
    expected[0, 2, 2] = 3
    assert torch.equal(argmax, expected)
    assert torch.equal(standard(pooled), functional.max_pool2d(standard(x), 2, 2))


def test_nan_passes_through_relu_pool_and_norm(isa: str) -> None:
    nan = float("nan")
    x = torch.randn(2, 6, 6, 5)
    for i, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        x[0, row, column, i] = nan
    out = {
        "state": torch.zeros(2, 6, 6, 5),
        "max_pooled": torch.zeros(2, 3, 3, 5),
        "argmax": torch.zeros(2, 3, 3, 5, dtype=torch.uint8),
        "mean_pooled": torch.zeros(2, 1, 1, 5),
    }
    area_step_forward([x], **out)
    state = torch.relu(standard(x))
    torch.testing.assert_close(standard(out["state"]), state, rtol=0, atol=0, equal_nan=True)
    pooled, index = functional.max_pool2d(state, 2, 2, return_indices=True)
    torch.testing.assert_close(standard(out["max_pooled"]), pooled, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(standard(out["argmax"]).long(), 2 * (index // 6 % 2) + index % 6 % 2)
    assert torch.equal(out["mean_pooled"].isnan(), state.mean((2, 3)).isnan()[:, None, None])
    one = torch.ones(6, 6, 5)
    area_step_forward(
        [x],
        gamma=one,
        beta=one,
        value=torch.empty_like(x),
        mean=torch.empty(2),
        rstd=torch.empty(2),
        state=out["state"],
    )
    assert out["state"][0].isnan().all()
    assert not out["state"][1].isnan().any()


def test_variance_of_values_far_from_zero() -> None:
    """E[z^2] - E[z]^2 would lose every digit here."""
    z = 1e4 + torch.randn(2, 16, 16, 8)
    one, zero, state = torch.ones(16, 16, 8), torch.zeros(16, 16, 8), torch.empty(2, 16, 16, 8)
    area_step_forward(
        [z],
        gamma=one,
        beta=zero,
        rectify=False,
        value=torch.empty_like(z),
        mean=torch.empty(2),
        rstd=torch.empty(2),
        state=state,
    )
    truth = functional.layer_norm(z.double(), (16, 16, 8))
    plain = functional.layer_norm(z, (16, 16, 8))
    assert_as_good(state, plain, truth, "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.empty(2, 4, 4, 2)}, r"state: expected a contiguous CPU tensor \[2, 4, 4, 3\]"),
        ({"state": torch.empty(2, 4, 4, 3, dtype=torch.float64)}, "state: .* of torch.float64"),
        ({"state": torch.empty(2, 4, 4, 6)[..., ::2]}, "state: .*not contiguous"),
        ({"argmax": torch.empty(2, 2, 2, 3)}, "argmax: .*torch.uint8"),
        ({"gamma": torch.ones(4, 4, 3)}, "gamma: a norm needs"),
        ({"drive_bias": torch.ones(4)}, r"drive_bias: .*\[3\]"),
    ],
    ids=["shape", "dtype", "strides", "argmax", "norm", "bias"],
)
def test_launch_refuses_buffers_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        area_step_forward([torch.ones(2, 4, 4, 3)], **change)
