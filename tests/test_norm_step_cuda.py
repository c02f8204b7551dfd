"""The CUDA norm_step, in the SIMT harness (or on a device), against the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from device_rollouts import DEVICE, on_a_device, send_to_kernels
from test_norm_step import RULES, plain
from torch import Tensor

from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.norm_step import NormKind, NormRule, norm_step, norm_step_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Channels in vectors of four and not, more than a block takes; chunks that are full and partial, several of a sample.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 3), (1, 5, 7, 33), (3, 4, 4, 48), (2, 30, 31, 6), (2, 9, 9, 132), (5, 1, 1, 12)]
TERMS = [(1, 0), (2, 1), (5, 3), (1, 1), (2, 2), (3, 1), (1, 2)]
by_rule = pytest.mark.parametrize("name", RULES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = ("drive_bias", "modulator_bias", "gamma", "beta", "running_mean", "running_var")


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if DEVICE is None:
        send_to_kernels(monkeypatch, *DTYPES)
    return simt


@dataclasses.dataclass
class Case:
    """Maps that a dtype holds exactly, and rows of float32, all kept in float64."""

    drives: list[Tensor]
    modulators: list[Tensor]
    weight: Tensor
    rows: dict[str, Tensor]

    @classmethod
    def make(cls, shape: tuple[int, ...], terms: tuple[int, int], dtype: torch.dtype, offset: float = 0.0) -> Case:
        generator = torch.Generator().manual_seed(3)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())

        drives = [(draw(*shape) + offset).to(dtype).double() for _ in range(terms[0])]
        modulators = [draw(*shape).to(dtype).double() for _ in range(terms[1])]
        rows = {name: draw(shape[3]).float().double() for name in ROWS}
        rows["running_var"] = rows["running_var"].square() + 0.3
        return cls(drives, modulators, draw(*shape).to(dtype).double(), rows)

    def by_torch(self, rule: NormRule, dtype: torch.dtype) -> dict[str, Tensor]:
        """State, and gradients of its weighted sum, as PyTorch computes them in this dtype."""
        drives, modulators = ([t.to(dtype) for t in terms] for terms in (self.drives, self.modulators))
        rows = {name: row.to(dtype) for name, row in self.rows.items()}
        leaves = {"drive": drives[0], "modulator": modulators[0] if modulators else None, "gamma": rows["gamma"], "beta": rows["beta"]}
        wanted = {name: t.requires_grad_(True) for name, t in leaves.items() if t is not None}
        state = plain(rule, drives, modulators, rows)
        grads = torch.autograd.grad((state * self.weight.to(dtype)).sum(), list(wanted.values()), allow_unused=True)
        return {"state": state.detach(), **{name: g for name, g in zip(wanted, grads, strict=True) if g is not None}}

    def options(self, rule: NormRule) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Affine values, and running statistics."""
        rows = {name: row.float() for name, row in self.rows.items()}
        affine = {"gamma": rows["gamma"], "beta": rows["beta"]} if rule.kind is not NormKind.NONE else {}
        return affine, (rows["running_mean"], rows["running_var"]) if rule.kind is NormKind.FIXED else None

    def by_kernels(self, rule: NormRule, dtype: torch.dtype, *, in_place: bool = False) -> dict[str, Tensor]:
        """The same by ours; every buffer is NaN before, or, in place, that of a term."""
        drives, modulators = ([t.to(dtype) for t in terms] for terms in (self.drives, self.modulators))
        affine, fixed = self.options(rule)
        state = torch.full_like(drives[0], torch.nan)
        sums = [terms[0] if in_place else torch.full_like(terms[0], torch.nan) for terms in (drives, modulators) if terms]
        biases = [self.rows[name].float() if terms else None for name, terms in zip(ROWS, (drives, modulators), strict=False)]
        statistics = norm_step(
            rule, drives, modulators, state, drive_bias=biases[0], modulator_bias=biases[1], drive_sum=sums[0],
            modulator_sum=sums[1] if modulators else None, fixed=fixed, **affine,
        )  # fmt: skip
        if statistics.variance is not None:
            assert statistics.mean is not None
            assert torch.allclose(statistics.rstd, (statistics.variance + rule.eps).rsqrt(), rtol=1e-5, equal_nan=True)
        grads = sums if in_place else [torch.full_like(total, torch.nan) for total in sums]
        gamma, beta = norm_step_backward(
            rule, self.weight.to(dtype), sums[0], sums[1] if modulators else None, statistics, grad_drive=grads[0],
            grad_modulator=grads[1] if modulators else None, **affine,
        )  # fmt: skip
        found = {"state": state, "drive": grads[0], "modulator": grads[1] if modulators else None, "gamma": gamma, "beta": beta}
        return {name: value for name, value in found.items() if value is not None}


def check(rule: NormRule, case: Case, dtype: torch.dtype) -> None:
    """Error in norm against float64: at most twice that of plain PyTorch, plus a few roundings."""
    truth, plainly, ours = case.by_torch(rule, torch.float64), case.by_torch(rule, dtype), case.by_kernels(rule, dtype)
    assert ours.keys() == truth.keys()
    for key, expected in truth.items():
        assert not ours[key].isnan().any(), f"{key}: NaN (or something left unwritten)"
        scale = float(expected.norm()) + 1e-2
        error, reference = (float((r[key].double() - expected).norm()) / scale for r in (ours, plainly))
        assert error <= 2 * reference + 4 * torch.finfo(dtype).eps, (key, error, reference)


@by_rule
@by_dtype
def test_is_as_good_as_plain_pytorch(name: str, dtype: torch.dtype, kernels: Any) -> None:
    rule = RULES[name]
    if dtype != torch.float32 and rule.activation is Activation.RELU:  # (its slope flips where a rounded sum makes y cross zero)
        rule = dataclasses.replace(rule, activation=Activation.ELU)
    statistics = rule.kind in (NormKind.GROUP, NormKind.BATCH)
    for shape, terms in zip(SHAPES, TERMS, strict=True):
        if shape[3] % rule.groups == 0 and not (statistics and shape == (1, 1, 1, 1)):  # (one value, normalised, is rounding alone)
            check(rule, Case.make(shape, terms, dtype), dtype)


@pytest.mark.parametrize("name", ["groups_elu", "batch_relu"])
def test_far_from_zero(name: str, kernels: Any) -> None:
    """Maps whose mean is a thousand deviations: E[z^2] - E[z]^2 would leave no digit of the variance."""
    case = Case.make((2, 9, 9, 12), (1, 0), torch.float32, offset=1000.0)
    case.rows["drive_bias"].zero_()
    truth, ours = case.by_torch(RULES[name], torch.float64), case.by_kernels(RULES[name], torch.float32)
    assert float((ours["state"].double() - truth["state"]).norm() / truth["state"].norm()) < 1e-4


@by_rule
def test_buffers_in_place(name: str, kernels: Any) -> None:
    """Sums over the first terms' buffers, and gradients over the sums', change no bit."""
    case = Case.make((3, 9, 8, 12), (2, 2), torch.float32)
    apart, together = (case.by_kernels(RULES[name], torch.float32, in_place=in_place) for in_place in (False, True))
    assert all(torch.equal(apart[key], together[key]) for key in apart)


@by_rule
def test_the_order_of_threads_changes_no_bit(name: str, kernels: Any) -> None:
    found = []
    for seed, order in enumerate((kernels.Order.FORWARD, kernels.Order.REVERSED, kernels.Order.RANDOM)):
        kernels.set_order(order, seed)
        found.append(Case.make((2, 9, 9, 12), (2, 1), torch.float16).by_kernels(RULES[name], torch.float16))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


def test_missing_drive_gives_the_bias(kernels: Any) -> None:
    """Zero times whatever modulates it: the norm's bias everywhere, its gradient, and none of the norm's weight."""
    case, rule, state = Case.make((2, 3, 4, 6), (0, 1), torch.float32), RULES["squashed_group"], torch.full((2, 3, 4, 6), torch.nan)
    affine, _ = case.options(rule)
    statistics = norm_step(rule, [], [case.modulators[0].float()], state, **affine)
    torch.testing.assert_close(state, affine["beta"].expand(2, 3, 4, 6))
    gamma, beta = norm_step_backward(rule, case.weight.float(), None, None, statistics, **affine)
    torch.testing.assert_close(beta, case.weight.sum((0, 1, 2)).float())
    assert torch.equal(gamma, torch.zeros(6))


@by_rule
def test_nan_goes_through(name: str, kernels: Any) -> None:
    case = Case.make((2, 3, 3, 6), (1, 1), torch.float16)
    case.drives[0][0, 0, 0, 0] = torch.nan
    state = case.by_kernels(RULES[name], torch.float16)["state"]
    assert state[0, 0, 0, 0].isnan()
    assert state[1, ..., 1:].isfinite().all()


def test_bad_arguments_are_refused(kernels: Any) -> None:
    x, state = [torch.randn(1, 2, 2, 4) for _ in range(7)], torch.empty(1, 2, 2, 4)
    row = torch.randn(4)
    with pytest.raises(ValueError, match="drives: expected at most 6, got 7"):
        norm_step(RULES["elu"], x, [], state, drive_sum=torch.empty_like(state))
    with pytest.raises(ValueError, match=r"drives\[0\]: expected a contiguous tensor \[1, 2, 2, 4\] of torch.float32"):
        norm_step(RULES["elu"], [torch.randn(1, 2, 2, 5)], [], state)
    with pytest.raises(ValueError, match=r"gamma: expected a contiguous tensor \[4\] of torch.float32"):
        norm_step(RULES["batch_relu"], [x[0].half()], [], state.half(), gamma=row.half(), beta=row)
    with pytest.raises(ValueError, match=rf"drives\[1\]: expected .* on {state.device}, got .* on meta"):
        norm_step(RULES["elu"], [x[0], x[1].to("meta")], [], state, drive_sum=torch.empty_like(state))
    with pytest.raises(ValueError, match="norm_step: expected groups that divide the channels"):
        norm_step(RULES["groups_elu"], x[:1], [], state, gamma=row, beta=row)


def test_sums_need_not_be_wanted(kernels: Any) -> None:
    x, total, states = torch.randn(2, 1, 2, 2, 4), torch.empty(1, 2, 2, 4), [torch.empty(1, 2, 2, 4) for _ in range(2)]
    for wanted, state in zip((total, None), states, strict=True):
        norm_step(RULES["elu"], list(x), [], state, drive_sum=wanted)
    assert torch.equal(total, x[0] + x[1])
    assert torch.equal(*states)


@on_a_device
@pytest.mark.parametrize("name", ["squashed_group", "batch_relu"])
def test_many_pixels(name: str, kernels: Any) -> None:
    """So many that chunks grow: more than the harness walks in a minute."""
    check(RULES[name], Case.make((40, 64, 64, 128), (2, 1), torch.float16), torch.float16)
