"""ctrnn: the native op against the reference, noise, threads, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ctrnn_cases import DIFFERENTIABLE, EVERY, Case, arguments, by_case, by_dtype, run
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.ctrnn import can_run_ctrnn, ctrnn
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn import ctrnn as reference_ctrnn
from rnndyn_fast.reference.ctrnn import rates as reference_rates
from rnndyn_fast.reference.philox import philox, unit_normals


def test_reference_is_the_equation_unit_by_unit() -> None:
    x = arguments(Case(5, 2, 3, 2, 4))
    noise = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    positional = [x[name] for name in (*DIFFERENTIABLE, "alpha", "noise_std", "activations")]
    rates, states = reference_ctrnn(*positional, noise)
    functions: dict[Activation, Callable[[float], float]] = {
        Activation.TANH: np.tanh,
        Activation.RELU: lambda h: max(h, 0.0),
        Activation.SIGMOID: lambda h: 1 / (1 + np.exp(-h)),
        Activation.SOFTPLUS: lambda h: np.log(1 + np.exp(h)),
        Activation.IDENTITY: lambda h: h,
    }
    for m in range(5):
        f, alpha, sigma = functions[x["activations"][m]], float(x["alpha"][m]), float(x["noise_std"][m])
        for n in range(2):
            h = x["h0"][m, n].tolist()
            for t in range(3):
                z = []
                for i in range(4):
                    total = float(x["b_rec"][m, i]) + sigma * float(noise[m, n, t, i])
                    total += sum(f(h[j]) * float(x["w_rec"][m, j, i]) for j in range(4))
                    total += sum(float(x["inputs"][m, n, t, c] * x["w_in"][m, c, i]) for c in range(2))
                    z.append(total)
                h = [(1 - alpha) * h[i] + alpha * z[i] for i in range(4)]
                np.testing.assert_allclose(states[m, n, t], h, rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(rates[m, n, t], [f(v) for v in h], rtol=1e-12, atol=1e-14)


@by_case
@by_dtype
@pytest.mark.usefixtures("isa")
def test_native_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same dtype, plus a floor of some units in the last place."""
    x = arguments(case)
    size = (case.models, case.trials, case.steps, case.units)
    grads = torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)

    def cast(dtype: torch.dtype) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in x.items()}, (grads[0].to(dtype), grads[1].to(dtype))

    # (rounded to the dtype first: the inputs are the same for all three)
    rounded, rounded_grads = cast(dtype)
    exact = run(
        {k: v.double() if isinstance(v, Tensor) else v for k, v in rounded.items()},
        "reference",
        (rounded_grads[0].double(), rounded_grads[1].double()),
    )
    plain = run(rounded, "reference", rounded_grads)
    native = run(rounded, "native", rounded_grads)
    for name, truth, theirs, ours in zip(("rates", "states", *DIFFERENTIABLE), exact, plain, native, strict=True):
        scale = float(truth.abs().max()) or 1.0
        error, allowed = float((ours - truth).abs().max()) / scale, float((theirs - truth).abs().max()) / scale
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps, name


@by_dtype
@pytest.mark.usefixtures("isa")
def test_activations_over_all_of_their_range(dtype: torch.dtype) -> None:
    """Within a few units in the last place, from the smallest numbers to the largest, and at infinity and NaN. (One step from h = 0 with
    alpha 1 makes any input a state.)"""
    magnitudes = torch.cat([torch.logspace(-30, 2, 40000, dtype=torch.float64), torch.linspace(0, 12, 60000, dtype=torch.float64)])
    special = torch.tensor([0.0, 1e30, torch.inf, torch.nan], dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, special, -special]).to(dtype)
    m, n = len(EVERY), len(x)
    ones, zeros = torch.ones(m, dtype=dtype), torch.zeros(m, 1, dtype=dtype)
    rates, _ = ctrnn(
        x.reshape(1, n, 1, 1).expand(m, n, 1, 1), zeros[:, None], zeros, zeros[:, None] + 1, zeros, ones, 0 * ones, EVERY, backend="native"
    )
    for activation, got in zip(EVERY, rates[:, :, 0, 0], strict=True):
        truth = reference_rates(x.double()[None], (activation,))[0]
        finite = torch.isfinite(x)
        assert bool(torch.isnan(got[torch.isnan(x)]).all())
        infinite = torch.isinf(x)
        torch.testing.assert_close(got[infinite].double(), truth[infinite])
        # (subnormal results aside)
        error = (got.double() - truth)[finite].abs() / truth[finite].abs().clamp(min=torch.finfo(dtype).tiny / torch.finfo(dtype).eps)
        # Measured: tanh 1.5, sigmoid 2.0, softplus 0.9.
        assert float(error.max()) <= 3 * torch.finfo(dtype).eps, activation


def test_threads_and_splits_change_nothing() -> None:
    """Bit for bit: threads, batches in pieces, models one at a time."""
    x = arguments(Case(3, 50, 4, 3, 30), torch.float32)
    grads = torch.randn(3, 50, 4, 30), torch.randn(3, 50, 4, 30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, "native", grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    whole = ctrnn(**x)[0]
    trials = [ctrnn(**{**x, "inputs": x["inputs"][:, s], "h0": x["h0"][:, s]}, first_trial=s.start)[0] for s in (slice(0, 7), slice(7, 50))]
    torch.testing.assert_close(torch.cat(trials, 1), whole, rtol=0, atol=0)
    models = [ctrnn(**{k: None if v is None else v[m : m + 1] for k, v in x.items()})[0] for m in range(3)]
    torch.testing.assert_close(torch.cat(models), whole, rtol=0, atol=0)


def test_outputs_and_scratch_are_written_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned with NaN."""

    def poisoned(floats: int) -> tuple[Tensor, int]:
        scratch = torch.full((floats + 16,), torch.nan)
        return scratch, -(-scratch.data_ptr() // 64) * 64

    case = Case(2, 17, 3, 2, 13)
    x = arguments(case, torch.float32)
    grads = torch.randn(2, 17, 3, 13), torch.randn(2, 17, 3, 13)
    clean = run(x, "native", grads)
    monkeypatch.setattr(core, "workspace_of", poisoned)
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: torch.full(shape[0] if len(shape) == 1 else shape, torch.nan))
    torch.testing.assert_close(run(x, "native", grads), clean, rtol=0, atol=0)


def test_inputs_shared_by_all_models_are_read_once() -> None:
    x = arguments(Case(4, 6, 3, 2, 9), torch.float32)
    shared = x["inputs"][:1]
    alone = run({**x, "inputs": shared.expand(4, 6, 3, 2)}, "native", (torch.ones(4, 6, 3, 9), torch.ones(4, 6, 3, 9)))
    copied = run({**x, "inputs": shared.repeat(4, 1, 1, 1)}, "native", (torch.ones(4, 6, 3, 9), torch.ones(4, 6, 3, 9)))
    torch.testing.assert_close(alone, copied, rtol=0, atol=0)
    assert ctrnn(**{**x, "inputs": shared.expand(4, 6, 3, 2)}, with_states=False)[1] is None
    sliced = torch.randn(4, 12, 3, 4)[:, ::2, :, 1:3]
    torch.testing.assert_close(ctrnn(**{**x, "inputs": sliced}), ctrnn(**{**x, "inputs": sliced.contiguous()}), rtol=0, atol=0)


# ---------------------------------------------------------------- noise


def test_philox_known_answers() -> None:
    """Of Random123's kat_vectors, philox4x32 with 10 rounds."""
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in cases:
        words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(w) for w in words] == answer


@by_dtype
@pytest.mark.usefixtures("isa")
def test_the_kernel_draws_the_numbers_of_the_reference(dtype: torch.dtype) -> None:
    """Alone: no weights, alpha 1, so that states are the noise."""
    m, n, t, h = 2, 21, 3, 7
    zeros = torch.zeros(m, h, dtype=dtype)
    one = torch.ones(m, dtype=dtype)
    seeds = torch.tensor([5, -(2**62) - 3])
    _, states = ctrnn(
        torch.zeros(m, n, t, 1, dtype=dtype),
        torch.zeros(m, h, h, dtype=dtype),
        zeros,
        zeros[:, None],
        zeros,
        one,
        one,
        [Activation.IDENTITY] * m,
        seeds,
        stream=2**32 - 1,
        first_trial=2**32 - n,
        backend="native",
    )
    wanted = unit_normals(seeds, n, t, h, stream=2**32 - 1, first_trial=2**32 - n, dtype=torch.float64)
    # Measured: 6e-7 (float32), 2e-15.
    torch.testing.assert_close(states.double(), wanted, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)


def test_unit_normals_are_normal_and_independent() -> None:
    draws = unit_normals(torch.tensor([1, 2]), 40, 50, 100, dtype=torch.float64)
    flat = draws.flatten()
    count = flat.numel()
    # Five standard errors each: of the mean, variance, skewness and kurtosis of normals, and of correlations.
    assert abs(float(flat.mean())) < 5 / count**0.5
    assert abs(float(flat.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((flat**3).mean())) < 5 * (15 / count) ** 0.5
    assert abs(float((flat**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    for first, second in ((draws[0], draws[1]), (draws[:, :-1], draws[:, 1:]), (draws[:, :, :-1], draws[:, :, 1:])):
        assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5
    pairs = draws[..., :-1] * draws[..., 1:]
    assert abs(float(pairs.mean())) < 5 / pairs.numel() ** 0.5
    other = unit_normals(torch.tensor([1, 2]), 40, 50, 100, stream=1, dtype=torch.float64)
    assert abs(float((draws * other).mean())) < 5 / count**0.5


BAD = {
    "mismatched model axis": ({"w_rec": torch.zeros(3, 4, 4)}, ValueError, r"w_rec: expected \[M, H, H\] = \[2, 4, 4\], got \[3, 4, 4\]"),
    "mismatched inputs": ({"w_in": torch.zeros(2, 5, 4)}, ValueError, r"w_in: expected \[M, I, H\]"),
    "alpha 0": ({"alpha": torch.tensor([0.0, 1.0])}, ValueError, r"alpha: expected values in \(0, 1\]"),
    "alpha above 1": ({"alpha": torch.tensor([0.5, 1.5])}, ValueError, r"alpha: expected values in \(0, 1\]"),
    "alpha NaN": ({"alpha": torch.tensor([0.5, torch.nan])}, ValueError, r"alpha: expected values in \(0, 1\]"),
    "infinite noise": ({"noise_std": torch.tensor([0.0, torch.inf])}, ValueError, "noise_std: expected finite"),
    "NaN noise": ({"noise_std": torch.tensor([0.0, torch.nan])}, ValueError, "noise_std: expected finite"),
    "negative noise": ({"noise_std": torch.tensor([0.0, -1.0])}, ValueError, "noise_std: expected finite values of at least 0"),
    "one activation": ({"activations": [Activation.TANH]}, ValueError, "activations: expected 2"),
    "integers": ({"inputs": torch.zeros(2, 3, 2, 3, dtype=torch.int64)}, TypeError, "inputs: expected a floating-point tensor"),
    "other dtype": ({"b_rec": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "b_rec: expected torch.float32"),
    "no trials": ({"inputs": torch.zeros(2, 0, 2, 3)}, ValueError, "inputs: expected .* at least 1"),
    "h0": ({"h0": torch.zeros(2, 7, 4)}, ValueError, r"h0: expected \[M, N, H\] = \[2, 3, 4\]"),
    "seeds": ({"noise_seeds": [1]}, ValueError, r"noise_seeds: expected \[M\] = \[2\]"),
    "stream": ({"stream": -1}, ValueError, "stream: expected numbers in"),
    "trials past the counter": ({"first_trial": 2**32 - 1}, ValueError, "first_trial: expected numbers in"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected"),
    "list": ({"w_rec": [1.0]}, TypeError, "w_rec: expected a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    changes, kind, message = BAD[name]
    x = arguments(Case(2, 3, 2, 3, 4, h0_per_trial=False), torch.float32)
    with pytest.raises(kind, match=message):
        ctrnn(**{**x, **changes})


def test_what_the_native_backend_does_not_take() -> None:
    half = {k: v.half() if isinstance(v, Tensor) else v for k, v in arguments(Case(1, 2, 2, 2, 3), torch.float32).items()}
    assert not can_run_ctrnn(half["inputs"])
    with pytest.raises(ValueError, match=r"backend='native': inputs have dtype torch\.float16"):
        ctrnn(**half, backend="native")
    with pytest.warns(UserWarning, match=r"running the slow plain PyTorch ctrnn: .*float16"):
        rates, _ = ctrnn(**half)
    assert rates.dtype == torch.float16
