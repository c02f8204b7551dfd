"""``norm_step`` against the reference: values, gradients, accuracy, instruction sets, threads, buffers in place, awkward inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast import build_info
from rnndyn_fast.ops import launches
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.norm_step import NormKind, NormRule, NormStatistics, as_fixed, norm_numbers, norm_step, norm_step_backward
from rnndyn_fast.reference.cells import ACTIVATIONS

RULES = {
    "elu": NormRule(activation=Activation.ELU),
    "squashed": NormRule(rectify_drive=True),
    "squashed_group": NormRule(NormKind.GROUP, 1, rectify_drive=True),
    "groups_elu": NormRule(NormKind.GROUP, 3, 1e-3, Activation.ELU),
    "batch_relu": NormRule(NormKind.BATCH, eps=1e-3, activation=Activation.RELU),
    "batch_squashed_tanh": NormRule(NormKind.BATCH, activation=Activation.TANH, rectify_drive=True),
    "fixed_relu": NormRule(NormKind.FIXED, activation=Activation.RELU),
}
SHAPES = [(2, 1, 3, 3), (1, 5, 7, 33), (3, 4, 4, 48), (2, 30, 31, 6)]
by_rule = pytest.mark.parametrize("name", RULES)


def plain(rule: NormRule, drives: list[Tensor], modulators: list[Tensor], rows: dict[str, Tensor]) -> Tensor:
    """The equations in PyTorch's operations, [N, H, W, C]."""
    d = torch.stack(drives).sum(0) + rows["drive_bias"] if drives else torch.zeros_like(modulators[0])
    z = functional.relu(d) if rule.rectify_drive else d
    if modulators:
        z = z * (2 * torch.sigmoid(torch.stack(modulators).sum(0) + rows["modulator_bias"]))
    z = z.permute(0, 3, 1, 2)
    if rule.kind is NormKind.GROUP:
        z = functional.group_norm(z, rule.groups, rows["gamma"], rows["beta"], rule.eps)
    elif rule.kind is not NormKind.NONE:
        training = rule.kind is NormKind.BATCH
        running = (None, None) if training else (rows["running_mean"], rows["running_var"])
        z = functional.batch_norm(z, *running, rows["gamma"], rows["beta"], training, 0.0, rule.eps)
    return ACTIVATIONS[rule.activation](z).permute(0, 2, 3, 1)


def tensors(shape: tuple[int, ...], terms: tuple[int, int], dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)

    return [draw(*shape) for _ in range(terms[0])], [draw(*shape) for _ in range(terms[1])], [draw(*shape)]


def rows_of(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    names = ("drive_bias", "modulator_bias", "gamma", "beta", "running_mean", "running_var")
    rows = {name: torch.randn(channels, generator=generator, dtype=torch.float64) for name in names}
    rows["running_var"] = rows["running_var"].square() + 0.3
    return {name: row.to(dtype) for name, row in rows.items()}


def results(rule: NormRule, shape: tuple[int, ...], terms: tuple[int, int], dtype: torch.dtype, native: bool) -> dict[str, Tensor]:
    """State, statistics' effect, and gradients of a weighted sum of the state."""
    drives, modulators, (weight,) = tensors(shape, terms, dtype)
    rows = rows_of(shape[3], dtype)
    normed = rule.kind is not NormKind.NONE
    if not native:
        leaves = [t.requires_grad_(True) for t in (*drives[:1], *modulators[:1], rows["gamma"], rows["beta"])]
        state = plain(rule, drives, modulators, rows)
        grads = torch.autograd.grad((state * weight).sum(), leaves, allow_unused=True)
        found = dict(zip([*["drive"] * bool(drives), *["modulator"] * bool(modulators), "gamma", "beta"], grads, strict=True))
        return {"state": state.detach(), **{k: g for k, g in found.items() if g is not None}}
    affine = {"gamma": rows["gamma"], "beta": rows["beta"]} if normed else {}
    fixed = (rows["running_mean"], rows["running_var"]) if rule.kind is NormKind.FIXED else None
    state = torch.full(shape, torch.nan, dtype=dtype)
    sums = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    statistics = norm_step(
        rule, drives, modulators, state, drive_bias=rows["drive_bias"] if drives else None,
        modulator_bias=rows["modulator_bias"] if modulators else None, drive_sum=sums[0] if drives else None,
        modulator_sum=sums[1] if modulators else None, fixed=fixed, **affine,
    )  # fmt: skip
    drive, modulator = sums[0] if drives else None, sums[1] if drives and modulators else None
    if drive is not None:
        assert torch.equal(again(rule, drive, modulator, statistics, **affine), state)
    grads = [torch.full(shape, torch.nan, dtype=dtype) if total is not None else None for total in (drive, modulator)]
    gamma, beta = norm_step_backward(rule, weight, drive, modulator, statistics, grad_drive=grads[0], grad_modulator=grads[1], **affine)
    found = {"state": state, "drive": grads[0], "modulator": grads[1], "gamma": gamma, "beta": beta}
    return {name: value for name, value in found.items() if value is not None}


def again(rule: NormRule, drive: Tensor, modulator: Tensor | None, statistics: NormStatistics, **affine: Tensor) -> Tensor:
    """The state once more, from the sums, as a backward pass computes it."""
    mean, rstd, state = statistics.mean, statistics.rstd, torch.full_like(drive, torch.nan)
    if rule.kind is NormKind.BATCH:
        rule = as_fixed(rule)
    elif rule.kind is NormKind.GROUP:
        assert mean is not None
        mean, rstd = torch.empty_like(mean), torch.empty_like(mean)
    modulators = [] if modulator is None else [modulator]
    numbers = norm_numbers(rule, squash=bool(modulators))
    launches.norm_step_forward(**numbers, drives=[drive], modulators=modulators, state=state, mean=mean, rstd=rstd, **affine)
    return state


@by_rule
@pytest.mark.parametrize("terms", [(1, 0), (2, 1), (5, 3)])
def test_equals_the_reference_in_float64(name: str, terms: tuple[int, int], isa: str) -> None:
    for shape in SHAPES:
        if RULES[name].groups > 1 and shape[3] % RULES[name].groups:
            continue
        ours, theirs = (results(RULES[name], shape, terms, torch.float64, native) for native in (True, False))
        assert ours.keys() == theirs.keys()
        for key, expected in theirs.items():
            torch.testing.assert_close(ours[key], expected, rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@by_rule
def test_accuracy_in_float32(name: str, isa: str) -> None:
    """Error in norm against float64: at most twice that of plain PyTorch, plus a few roundings (more where the compiler, at -O1, does not
    sum in lanes)."""
    more = 5e-6 if build_info()["sanitized"] else 5e-7
    for shape in ((3, 4, 4, 48), (2, 30, 31, 6)):
        truth = results(RULES[name], shape, (2, 1), torch.float64, False)
        ours, theirs = (results(RULES[name], shape, (2, 1), torch.float32, native) for native in (True, False))
        for key, expected in truth.items():
            error, reference = ((x[key].double() - expected).norm() / expected.norm() for x in (ours, theirs))
            assert error <= 2 * reference + more, (key, error.item(), reference.item())


def test_missing_drive_gives_the_bias(isa: str) -> None:
    """Zero times whatever modulates it: the norm's bias everywhere, its gradient, and none of the norm's weight."""
    ours = results(RULES["squashed_group"], (2, 3, 4, 6), (0, 1), torch.float64, True)
    rows = rows_of(6, torch.float64)
    torch.testing.assert_close(ours["state"], rows["beta"].expand(2, 3, 4, 6))
    weight = tensors((2, 3, 4, 6), (0, 1), torch.float64)[2][0]
    torch.testing.assert_close(ours["beta"], weight.sum((0, 1, 2)))
    assert torch.equal(ours["gamma"], torch.zeros(6, dtype=torch.float64))


@by_rule
def test_buffers_in_place_and_threads(name: str) -> None:
    """Sums over the first terms' buffers, and gradients over the sums', change no bit; nor does the number of threads."""
    rule, shape = RULES[name], (3, 9, 8, 48)
    drives, modulators, (weight,) = tensors(shape, (2, 2), torch.float32)
    rows = rows_of(48, torch.float32)
    options = {"gamma": rows["gamma"], "beta": rows["beta"]} if rule.kind is not NormKind.NONE else {}
    fixed = (rows["running_mean"], rows["running_var"]) if rule.kind is NormKind.FIXED else None
    threads, found = torch.get_num_threads(), []
    try:
        for count, in_place in ((1, False), (1, True), (2, True), (5, False)):
            torch.set_num_threads(count)
            ds, ms = ([t.clone() for t in terms] for terms in (drives, modulators))
            d, m = (ds[0], ms[0]) if in_place else (torch.empty_like(ds[0]), torch.empty_like(ms[0]))
            state = torch.empty(shape)
            statistics = norm_step(rule, ds, ms, state, drive_sum=d, modulator_sum=m, fixed=fixed, **options)
            grads = (d, m) if in_place else (torch.empty_like(d), torch.empty_like(m))
            affine = norm_step_backward(rule, weight, d, m, statistics, grad_drive=grads[0], grad_modulator=grads[1], **options)
            found.append([state, *grads, *(a for a in affine if a is not None)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@by_rule
def test_gradients_of_biases_are_sums_of_those_of_drive_and_modulator(name: str, isa: str) -> None:
    """Also where the gradients themselves are not wanted, and with any number of threads."""
    rule, shape, threads = RULES[name], (3, 23, 17, 12), torch.get_num_threads()
    drives, modulators, (weight,) = tensors(shape, (1, 1), torch.float64)
    rows = rows_of(12, torch.float64)
    options = {"gamma": rows["gamma"], "beta": rows["beta"]} if rule.kind is not NormKind.NONE else {}
    fixed = (rows["running_mean"], rows["running_var"]) if rule.kind is NormKind.FIXED else None
    d, m, state = torch.empty_like(drives[0]), torch.empty_like(drives[0]), torch.empty_like(drives[0])
    statistics = norm_step(rule, drives, modulators, state, drive_sum=d, modulator_sum=m, fixed=fixed, **options)
    grads, found = [torch.full_like(d, torch.nan) for _ in range(2)], []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            for wanted in (grads, [None, None]):
                sums = [torch.full((12,), torch.nan, dtype=torch.float64) for _ in range(2)]
                more = {"grad_drive": wanted[0], "grad_modulator": wanted[1], "grad_drive_bias": sums[0], "grad_modulator_bias": sums[1]}
                norm_step_backward(rule, weight, d, m, statistics, **more, **options)
                found.append(sums)
    finally:
        torch.set_num_threads(threads)
    for sums in found:
        for ours, grad in zip(sums, grads, strict=True):
            torch.testing.assert_close(ours, grad.sum((0, 1, 2)), rtol=1e-9, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(sums, found[0], strict=True))


@by_rule
def test_nan_goes_through(name: str, isa: str) -> None:
    drives, modulators, _ = tensors((2, 3, 3, 6), (1, 1), torch.float32)
    rows = rows_of(6, torch.float32)
    drives[0][0, 0, 0, 0] = torch.nan
    state = torch.zeros(2, 3, 3, 6)
    rule = RULES[name]
    options = {"gamma": rows["gamma"], "beta": rows["beta"]} if rule.kind is not NormKind.NONE else {}
    fixed = (rows["running_mean"], rows["running_var"]) if rule.kind is NormKind.FIXED else None
    norm_step(rule, drives, modulators, state, fixed=fixed, **options)
    assert state[0, 0, 0, 0].isnan()
    assert state[1, ..., 1:].isfinite().all()


def test_sums_need_not_be_kept() -> None:
    terms, states = [torch.randn(2, 3, 5, 1040) for _ in range(4)], [torch.empty(2, 3, 5, 1040) for _ in range(2)]
    rule = NormRule(NormKind.GROUP, 4, 1e-5, Activation.IDENTITY, True)
    bias, options = torch.randn(1040), {"gamma": torch.randn(1040), "beta": torch.randn(1040)}
    for state, kept in zip(states, (False, True), strict=True):
        sums = [torch.empty_like(state) if kept else None for _ in range(2)]
        options |= {"drive_bias": bias, "modulator_bias": bias, "drive_sum": sums[0], "modulator_sum": sums[1]}
        norm_step(rule, terms[:2], terms[2:], state, **options)
    assert torch.equal(*states)


def test_the_core_refuses_what_it_cannot_do() -> None:
    x, state = [torch.randn(1, 2, 2, 4) for _ in range(7)], torch.empty(1, 2, 2, 4)
    with pytest.raises(ValueError, match="drives: expected at most 6, got 7"):
        norm_step(RULES["elu"], x, [], state, drive_sum=torch.empty_like(state))
    with pytest.raises(ValueError, match=r"drives\[0\]: expected a contiguous CPU tensor \[1, 2, 2, 4\]"):
        norm_step(RULES["elu"], [torch.randn(1, 2, 2, 5)], [], state)
    statistics = norm_step(RULES["elu"], x[:1], [], state)
    with pytest.raises(ValueError, match="a bias needs the drive or modulator"):
        norm_step_backward(RULES["elu"], state, x[0], None, statistics, grad_modulator_bias=torch.empty(4))
