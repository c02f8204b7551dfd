"""The CUDA area_step, in the SIMT harness, against the reference: forward and backward, over shapes, terms, outputs and storage types."""

from __future__ import annotations

from typing import Any

import pytest
import simt_harness
import torch
from device_rollouts import in_harness
from test_area_step import EPS, SHAPES, Operands, Step, maps, poisoned, standard
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops import launches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Channels that fill vectors of 16 bytes, and channels that do not; one chunk of a map, several, and a last one that is not full.
STEPS = [
    *(Step(shape, 2, modulators, (True, modulators > 0)) for shape in SHAPES[:5] for modulators in (0, 2)),
    *(Step((2, 8, 5, 3), drives, modulators, (drives > 1, False), norm, rectify)
      for drives, modulators, norm, rectify in ((1, 0, True, False), (3, 1, True, True), (1, 1, False, True), (2, 0, False, False),
                                                (1, 0, False, True), (6, 6, True, True))),
    Step((3, 16, 13, 41), 1, 1, (True, True)),
    Step((2, 72, 9, 14), 2),
    Step((5, 264, 1, 1), 2),
]  # fmt: skip
by_case = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_id = pytest.mark.parametrize("step", STEPS, ids=lambda s: s.id)


class CudaOperands(Operands):
    """Those of the CPU's tests, on the CUDA kernels: parameters, statistics and sums over time are float32."""

    def __init__(self, step: Step, dtype: torch.dtype) -> None:
        super().__init__(step, dtype)

        def float32(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.float()

        self.gamma_map, self.beta_map = (None if t is None else t.float().permute(1, 2, 0).contiguous() for t in (self.gamma, self.beta))
        self.biases = float32(self.drive_bias), float32(self.modulator_bias)

    def run_forward(self, **wanted: Tensor) -> None:
        """One launch that writes the outputs given."""
        launches.area_step_forward.on_device(
            drives=[maps(x.to(self.dtype)) for x in self.drives],
            modulators=[maps(x.to(self.dtype)) for x in self.modulators],
            drive_bias=self.biases[0],
            modulator_bias=self.biases[1],
            gamma=self.gamma_map,
            beta=self.beta_map,
            eps=EPS,
            rectify=self.step.rectify,
            **wanted,
        )

    def outputs(self) -> dict[str, Tensor]:
        """Poisoned buffers for every output of the case."""
        (n, c, h, w), dtype = self.step.shape, self.dtype
        out = {
            "value": poisoned(n, h, w, c, dtype=dtype),
            "modulator_sum": poisoned(n, h, w, c, dtype=dtype),
            "state": poisoned(n, h, w, c, dtype=dtype),
            "max_pooled": poisoned(n, h // 2, w // 2, c, dtype=dtype),
            "argmax": poisoned(n, h // 2, w // 2, c, dtype=torch.uint8),
            "mean_pooled": poisoned(n, 1, 1, c, dtype=dtype),
            "mean": poisoned(n, dtype=torch.float32),
            "rstd": poisoned(n, dtype=torch.float32),
        }
        if not self.modulators:
            del out["modulator_sum"]
        if not self.step.norm:
            del out["mean"], out["rstd"]
        return out

    def run_backward(self, kept: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        (n, c, h, w), dtype = self.step.shape, self.dtype
        multiplicative = bool(self.modulators)
        out = {"grad_drive": poisoned(n, h, w, c, dtype=dtype), "grad_drive_sum": torch.ones(n, h, w, c)}
        if multiplicative:
            out["grad_modulator"] = poisoned(n, h, w, c, dtype=dtype)
        if self.step.norm:
            out |= {name: torch.ones(h, w, c) for name in ("grad_gamma", "grad_beta")}
        launches.area_step_backward.on_device(
            height=h,
            width=w,
            grad_states=[maps(grads["state"])] if "state" in grads else [],
            grad_max_pooled=maps(grads["max_pooled"]) if "max_pooled" in grads else None,
            argmax=kept["argmax"] if "max_pooled" in grads else None,
            grad_mean_pooled=maps(grads["mean_pooled"]) if "mean_pooled" in grads else None,
            multiplicative=multiplicative,
            value=None if multiplicative else kept["value"],
            drives=[maps(x.to(dtype)) for x in self.drives] if multiplicative else [],
            drive_bias=self.biases[0] if multiplicative else None,
            modulator_sum=kept.get("modulator_sum"),
            mean=kept.get("mean"),
            rstd=kept.get("rstd"),
            gamma=self.gamma_map,
            beta=self.beta_map,
            rectify=self.step.rectify,
            **out,
        )
        return out


def assert_close(ours: Tensor, truth: Tensor, what: str, roundings: float, plain: Tensor | None = None) -> None:
    """Error against float64 at most twice that of plain PyTorch, where it is given, plus some roundings of the largest value."""
    assert not ours.isnan().any(), f"{what}: NaN (or something left unwritten)"
    if not truth.numel():
        return
    floor = roundings * torch.finfo(ours.dtype).eps * max(float(truth.abs().max()), 1.0)
    error = float((ours.detach().double() - truth.detach()).abs().max())
    allowed = floor + (0.0 if plain is None else 2 * float((plain.detach().double() - truth.detach()).abs().max()))
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@by_id
@by_case
def test_forward_matches_reference(simt: Any, step: Step, dtype: torch.dtype) -> None:
    operands = CudaOperands(step, dtype)
    out = operands.outputs()
    operands.run_forward(**out)
    _, _, h, w = step.shape
    with torch.no_grad():
        truth, plain = (operands.reference(operands.leaves(d)) for d in (torch.float64, dtype))
    # (rstd of a map of one element is 316: roundings of a difference that is exactly 0 are that much larger.)
    assert_close(standard(out["state"]), truth, "state", 16 if dtype == torch.float32 else 2, plain)
    mean = standard(out["state"].double()).mean((2, 3), keepdim=True)
    assert_close(standard(out["mean_pooled"]), mean, "mean_pooled", 2)
    if h > 1 and w > 1:
        pooled, index = functional.max_pool2d(standard(out["state"]).float(), 2, 2, return_indices=True)
        assert torch.equal(standard(out["max_pooled"]).float(), pooled)
        rows, columns = index // w % 2, index % w % 2
        assert torch.equal(standard(out["argmax"]).long(), 2 * rows + columns)
    if step.norm:
        value = out["value"].double().flatten(1)
        assert_close(out["mean"], value.mean(1), "mean", 4)
        assert_close(out["rstd"], (value.var(1, unbiased=False) + EPS).rsqrt(), "rstd", 8)


@by_id
@by_case
@pytest.mark.parametrize("outputs", [("state",), ("state", "max_pooled", "mean_pooled")], ids="+".join)
def test_backward_matches_autograd(simt: Any, step: Step, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
    """From the value that forward stored: its rounding must not be counted, which flips signs at zero."""
    n, c, h, w = step.shape
    if min(h, w) < 2:
        outputs = tuple(name for name in outputs if name != "max_pooled")
    operands = CudaOperands(step, dtype)
    kept = operands.outputs()
    operands.run_forward(**kept)
    shapes = {"state": (n, c, h, w), "max_pooled": (n, c, h // 2, w // 2), "mean_pooled": (n, c, 1, 1)}
    grads = {name: torch.randn(shapes[name]).to(dtype) for name in outputs}
    ours = operands.run_backward(kept, grads)

    z = standard(kept["value"]).double().requires_grad_()
    affine = [t.requires_grad_() for t in (operands.gamma, operands.beta) if t is not None]
    y = functional.layer_norm(z, z.shape[1:], *affine, EPS) if step.norm else z
    state = torch.relu(y) if step.rectify else y
    forms = {"state": state, "mean_pooled": state.mean((2, 3), keepdim=True)}
    if "max_pooled" in outputs:
        # Where forward found the maximum: among equal (rounded) states the first.
        argmax = standard(kept["argmax"]).long()
        rows, columns = torch.arange(h // 2)[:, None] * 2 + argmax // 2, torch.arange(w // 2) * 2 + argmax % 2
        forms["max_pooled"] = state.flatten(2).gather(2, (rows * w + columns).flatten(2)).view(shapes["max_pooled"])
    dz, *affine_grads = torch.autograd.grad([forms[o] for o in outputs], [z, *affine], [grads[o].double() for o in outputs])
    roundings = 32 if dtype == torch.float32 else 1
    modulator = standard(kept["modulator_sum"]).double() if step.modulators else 1.0
    assert_close(standard(ours["grad_drive"]), dz * modulator, "grad_drive", roundings)
    assert_close(standard(ours["grad_drive_sum"]) - 1, dz * modulator, "grad_drive_sum (added to)", 64)
    if step.modulators:
        drive = sum(operands.drives) + (0 if operands.drive_bias is None else operands.drive_bias[None, :, None, None])
        assert_close(standard(ours["grad_modulator"]), dz * drive, "grad_modulator", roundings)
    for name, truth in zip(("grad_gamma", "grad_beta"), affine_grads, strict=False):
        assert_close(ours[name].permute(2, 0, 1) - 1, truth, f"{name} (added to)", 64)


@in_harness
def test_gamma_and_beta_are_read_once_per_share_of_the_samples(simt: Any) -> None:
    """However many samples there are; and how they are shared changes no bit."""
    finish = ("area_step_finish_kernel", "area_step_backward_finish_kernel")
    step, results = Step((7, 16, 6, 5), 2), []
    operands = CudaOperands(step, torch.float16)
    grads = {"state": torch.randn(step.shape).half(), "max_pooled": torch.randn(7, 16, 3, 2).half()}
    for multiprocessors in (132, 1):
        simt.set_limits(simt_harness.LEAST_SHARED_BYTES, dict.fromkeys(finish, 128), multiprocessors)
        kept = operands.outputs()
        simt.traffic()
        operands.run_forward(**{name: t for name, t in kept.items() if name != "mean_pooled"})
        forward = simt.traffic()
        ours = operands.run_backward(kept, grads)
        results.append({**kept, **ours})
        backward, size = simt.traffic(), 16 * 6 * 5 * 4
        shares = 7 if multiprocessors == 132 else 2  # (two blocks at once, and a block takes the whole map)
        for name in ("gamma", "beta"):
            assert forward[name] == (shares * size, 0)
            assert backward[name][0] == (7 + shares) * size  # (of the sums there are as many shares as samples)
    for name, tensor in results[0].items():
        if name not in ("mean_pooled", "grad_gamma", "grad_beta"):
            assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("wanted", [("state",), ("max_pooled",), ("mean_pooled",), ("max_pooled", "argmax", "mean_pooled")], ids="+".join)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
def test_only_what_is_wanted_is_written(simt: Any, wanted: tuple[str, ...], norm: bool) -> None:
    operands = CudaOperands(Step((2, 8, 5, 6), 2, 1, norm=norm), torch.float16)
    everything, some = operands.outputs(), operands.outputs()
    operands.run_forward(**everything)
    needed = {"value", "mean", "rstd"} if norm else set()
    operands.run_forward(**{name: t for name, t in some.items() if name in {*wanted, *needed}})
    for name in wanted:
        # Without a norm nothing need be rounded before the relu.
        torch.testing.assert_close(some[name], everything[name], rtol=0, atol=0 if norm else 4e-3)


def test_value_may_take_the_memory_of_the_first_drive(simt: Any) -> None:
    operands = CudaOperands(Step((2, 5, 6, 4), 3, 1), torch.float32)
    expected = operands.outputs()
    operands.run_forward(**expected)
    drives = [maps(x.float()) for x in operands.drives]
    out = operands.outputs() | {"value": drives[0]}
    launches.area_step_forward.on_device(
        drives=drives, modulators=[maps(x.float()) for x in operands.modulators], gamma=operands.gamma_map, beta=operands.beta_map,
        eps=EPS, rectify=True, **out,
    )  # fmt: skip
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor), name


def test_nan_passes_through(simt: Any) -> None:
    x = torch.randn(2, 6, 6, 8).half()
    for i, (row, column) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        x[0, row, column, i] = float("nan")
    out = {"state": torch.zeros_like(x), "max_pooled": torch.zeros(2, 3, 3, 8).half(), "mean_pooled": torch.zeros(2, 1, 1, 8).half()}
    argmax = torch.zeros(2, 3, 3, 8, dtype=torch.uint8)
    launches.area_step_forward.on_device(drives=[x], eps=EPS, rectify=True, argmax=argmax, **out)
    state = torch.relu(standard(x).float())
    pooled, index = functional.max_pool2d(state, 2, 2, return_indices=True)
    torch.testing.assert_close(standard(out["state"]).float(), state, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(standard(out["max_pooled"]).float(), pooled, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(standard(argmax).long(), 2 * (index // 6 % 2) + index % 6 % 2)
    assert torch.equal(out["mean_pooled"].isnan(), state.mean((2, 3)).isnan()[:, None, None])


def test_the_order_of_threads_changes_nothing(simt: Any) -> None:
    operands = CudaOperands(Step((3, 72, 7, 9), 2, 1), torch.bfloat16)
    grads = {"state": torch.randn(3, 72, 7, 9).bfloat16(), "max_pooled": torch.randn(3, 72, 3, 4).bfloat16()}
    results = []
    for order in (simt.Order.FORWARD, simt.Order.REVERSED, simt.Order.RANDOM):
        simt.set_order(order, 7)
        kept = operands.outputs()
        operands.run_forward(**kept)
        results.append(kept | operands.run_backward(kept, grads))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_bad_arguments_are_refused(simt: Any) -> None:
    x, state = torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 4, 8)

    def forward(drives: list[Tensor], *, gamma: Tensor | None = None) -> None:
        launches.area_step_forward.on_device(drives=drives, gamma=gamma, beta=gamma, eps=EPS, rectify=True, state=state)

    with pytest.raises(
        ValueError, match=r"drives\[1\]: expected a contiguous tensor \[2, 4, 4, 8\] of torch.float32 on (cpu|cuda:0), got .*float16"
    ):
        forward([x, x.half()])
    with pytest.raises(ValueError, match="drives: expected at most 6, got 7"):
        forward([x] * 7)
    with pytest.raises(ValueError, match="gamma: a norm needs beta, value, mean and rstd"):
        forward([x], gamma=torch.ones(4, 4, 8))
    with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch\.float64"):
        forward([x.double()])
    assert (state == 0).all()
