"""ctrnn: the native op against the reference, golden runs, noise, autograd traps, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor
from torch.func import jacfwd, jvp

from rnndyn_fast import _core, build_info
from rnndyn_fast.nn import CTRNN
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.ctrnn import can_run_ctrnn, ctrnn
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn import ctrnn as reference_ctrnn
from rnndyn_fast.reference.philox import philox, unit_normals

DTYPES = [torch.float32, torch.float64]
EVERY = tuple(Activation)


@dataclass(frozen=True)
class Case:
    """M, N, T, I, H; activations go round."""

    models: int = 5
    trials: int = 16
    steps: int = 4
    inputs: int = 3
    units: int = 20
    noise: bool = True
    h0_per_trial: bool = True


CASES = {
    "one of everything": Case(1, 1, 1, 1, 1),
    "published sizes, two tiles": Case(5, 32, 6, 3, 100),
    "partial tile, odd units": Case(5, 17, 5, 2, 33),
    "more inputs than units": Case(3, 5, 3, 40, 7),
    "several groups of tiles": Case(2, 150, 3, 3, 26, noise=False),
    "units beyond a block": Case(1, 16, 3, 3, 131, h0_per_trial=False),
    "without noise": Case(5, 9, 4, 3, 25, noise=False, h0_per_trial=False),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture(params=_core.build_info()["isa_supported"])
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = build_info()["isa"]
    _core.select_isa(request.param)
    yield
    _core.select_isa(before)


def arguments(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    m, h = case.models, case.units

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "inputs": normal(m, case.trials, case.steps, case.inputs) * (torch.rand(m, case.trials, case.steps, case.inputs) < 0.3),
        "w_rec": normal(m, h, h) * (0.8 / h**0.5),
        "b_rec": normal(m, h) * 0.1,
        "w_in": normal(m, case.inputs, h),
        "h0": normal(m, case.trials, h) if case.h0_per_trial else normal(m, h),
        "alpha": torch.linspace(0.2, 1.0, m, dtype=dtype),
        "noise_std": torch.linspace(0.0, 0.4, m, dtype=dtype) + 0.1 * (m == 1),
        "activations": [EVERY[k % len(EVERY)] for k in range(m)],
        "noise_seeds": [2**40 + 977 * k for k in range(m)] if case.noise else None,
    }


DIFFERENTIABLE = ("inputs", "w_rec", "b_rec", "w_in", "h0")


def run(x: dict[str, Any], backend: str, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Rates, states and gradients of everything differentiable, for given gradients of rates and states."""
    x = {**x, **{name: x[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE}}
    rates, states = ctrnn(**x, stream=7, first_trial=3, backend=backend)
    assert states is not None
    total = (rates * grads[0]).sum() + (states * grads[1]).sum()
    return [rates.detach(), states.detach(), *torch.autograd.grad(total, [x[name] for name in DIFFERENTIABLE])]


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
@pytest.mark.usefixtures("_isa")
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
@pytest.mark.usefixtures("_isa")
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
        truth = reference_rates(x.double(), activation)
        finite = torch.isfinite(x)
        assert bool(torch.isnan(got[torch.isnan(x)]).all())
        infinite = torch.isinf(x)
        torch.testing.assert_close(got[infinite].double(), truth[infinite])
        # (subnormal results aside)
        error = (got.double() - truth)[finite].abs() / truth[finite].abs().clamp(min=torch.finfo(dtype).tiny / torch.finfo(dtype).eps)
        # Measured: tanh 1.5, sigmoid 2.0, softplus 0.9.
        assert float(error.max()) <= 3 * torch.finfo(dtype).eps, activation


def reference_rates(x: Tensor, activation: Activation) -> Tensor:
    from rnndyn_fast.reference.ctrnn import rates

    return rates(x[None], (activation,))[0]


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
    monkeypatch.setattr(_launch, "_workspace", poisoned)
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
@pytest.mark.usefixtures("_isa")
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


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("backend", ["native", "reference"])
@by_dtype
def test_published_network(backend: str, dtype: torch.dtype) -> None:
    data = golden("ctrnn_m3a")
    net = CTRNN.from_published(data, backend=backend).to(dtype)
    outputs, rates = net(torch.from_numpy(data["inputs"]).to(dtype))
    # As the golden page allows float32; measured: 3.4e-6 float32, 3.2e-6 float64 (the golden numbers' own rounding).
    np.testing.assert_allclose(outputs[0, :, :, 0].detach(), data["outputs"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(rates[0].detach(), data["rates"], rtol=0, atol=2e-5)
    _, states = net.states(torch.from_numpy(data["inputs"][:6]).to(dtype))
    np.testing.assert_allclose(states[0].detach(), data["hidden_first6"], rtol=1e-5, atol=5e-5)
    outputs, rates = net(torch.zeros(1, 200, 3, dtype=dtype))
    # 200 free-running steps on a limit cycle: phase drifts with rounding; measured 2e-5.
    np.testing.assert_allclose(outputs[0, 0, :, 0].detach(), data["null_outputs"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(rates[0, 0].detach(), data["null_rates"], rtol=0, atol=2e-4)
    last = net(torch.from_numpy(data["inputs"]).to(dtype))[0][0, :, -1, 0]
    said = (last > 0.5).int() - (last < -0.5).int()
    assert said.tolist() == data["labels"].astype(int).tolist()


def test_published_noise_convention() -> None:
    data = golden("ctrnn_m3a_train")
    net = CTRNN.from_published(data, "a05_tanh_init_", noise_std=float(data["noise_const"]))
    inputs = torch.from_numpy(data["a05_tanh_inputs"][:4]).float()[None]
    noise = torch.from_numpy(data["noise_unit_normal"])[None]
    with torch.no_grad():
        rates, _ = reference_ctrnn(inputs, net.w_rec, net.b_rec, net.w_in, net.h0, net.alpha, net.noise_std, net.activations, noise)
        outputs = net.read_out(rates)
    # Measured: 5e-7.
    np.testing.assert_allclose(rates[0], data["noise_rates"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(outputs[0, :, :, 0], data["noise_outputs"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("prefix", ["osc_", "att_"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_published_set_networks(prefix: str, backend: str) -> None:
    from rnndyn_fast.tasks import SetGame

    data = golden("set_v1_networks")
    net = CTRNN.from_published(data, prefix, backend=backend)
    trials = SetGame(data[f"{prefix}colour_vectors_GPR"]).trials_at(data[f"{prefix}sequences"], data[f"{prefix}pulse_index"])
    assert trials.labels.tolist() == data[f"{prefix}labels"].tolist()
    outputs, rates = net(trials.inputs)
    # Measured: 2e-5 (a hundred unit inputs drive the rates to saturation).
    np.testing.assert_allclose(outputs[0, :, :, 0].detach(), data[f"{prefix}outputs"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(rates[0, :, -1].detach(), data[f"{prefix}final_rates"], rtol=0, atol=2e-4)
    _, rates = net(torch.zeros(1, 200, 100))
    np.testing.assert_allclose(rates[0, 0].detach(), data[f"{prefix}null_rates"], rtol=0, atol=5e-4)


# ---------------------------------------------------------------- autograd


def op_arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    x = arguments(case, dtype)
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    seeds = torch.tensor(x["noise_seeds"])
    return (*tensors, x["alpha"], x["noise_std"], seeds, [a.value for a in x["activations"]], 1, 2, True)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.rnndyn.ctrnn.default, op_arguments(Case(2, 3, 3, 2, 5)))
    torch.library.opcheck(torch.ops.rnndyn.ctrnn.default, (*op_arguments(Case(2, 3, 3, 2, 5), torch.float32)[:-1], False))


def test_registered_op_and_function_agree() -> None:
    case = Case(2, 5, 3, 2, 6)
    x = arguments(case)
    grads = torch.randn(2, 5, 3, 6, dtype=torch.float64), torch.randn(2, 5, 3, 6, dtype=torch.float64)
    wanted = run(x, "native", grads)
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    h0 = tensors[-1]
    names = [a.value for a in x["activations"]]
    rates, states = torch.ops.rnndyn.ctrnn(*tensors[:-1], h0, x["alpha"], x["noise_std"], torch.tensor(x["noise_seeds"]), names, 7, 3, True)
    got = [rates, states, *torch.autograd.grad((rates * grads[0]).sum() + (states * grads[1]).sum(), tensors)]
    torch.testing.assert_close([g.detach() for g in got], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [("w_rec",), ("inputs",), ("h0", "b_rec"), ("w_in",)])
def test_gradients_of_some(wanted: tuple[str, ...]) -> None:
    x = arguments(Case(2, 5, 3, 2, 6))
    results = []
    for backend in ("native", "reference"):
        some = {**x, **{name: x[name].clone().requires_grad_() for name in wanted}}
        rates, _ = ctrnn(**some, backend=backend)
        results.append(torch.autograd.grad(rates.square().sum(), [some[name] for name in wanted]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    x = arguments(Case(3, 2, 3, 2, 3))
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    # (relu's corner is far from every state here: the seed is fixed)
    assert torch.autograd.gradcheck(lambda *t: ctrnn(**{**x, **dict(zip(DIFFERENTIABLE, t, strict=True))}, backend="native"), tensors)


def test_compiles_as_one_graph() -> None:
    x = arguments(Case(2, 4, 3, 2, 5), torch.float32)
    seeds = torch.tensor(x.pop("noise_seeds"))

    def loss(w_rec: Tensor) -> Tensor:
        rates, states = ctrnn(**{**x, "w_rec": w_rec}, noise_seeds=seeds, backend="native")
        assert states is not None
        return (rates * states).sum()

    w = x["w_rec"].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(w), w)[0] for f in (loss, compiled)]
    torch.testing.assert_close(results[1], results[0])


def test_forward_mode_is_the_references() -> None:
    x = arguments(Case(5, 2, 3, 2, 4))
    for name in DIFFERENTIABLE:
        tangent = torch.randn_like(x[name])
        values = [
            jvp(lambda v, b=backend, name=name: ctrnn(**{**x, name: v}, backend=b)[0], (x[name],), (tangent,))
            for backend in ("native", "reference")
        ]
        assert float(values[0][1].abs().max()) > 1e-3
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_jacobian_of_a_step() -> None:
    """By forward mode, against one step of the op and its equation."""
    net = CTRNN(1, 2, 6, alpha=0.4, seeds=[1]).double()
    h, u = torch.randn(6, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    jacobian = jacfwd(lambda v: net.step(v[None, None], u[None, None])[0, 0])(h)
    wanted = 0.6 * torch.eye(6, dtype=torch.float64) + 0.4 * net.w_rec[0].T * (1 - torch.tanh(h) ** 2)
    torch.testing.assert_close(jacobian, wanted)
    _, states = net.states(u.reshape(1, 1, 1, 2), h0=h.reshape(1, 1, 6))
    torch.testing.assert_close(net.step(h[None, None], u[None, None]), states[:, :, 0])


def test_double_backward_raises_and_names_the_reference() -> None:
    x = arguments(Case(2, 2, 2, 2, 3))
    w = x["w_rec"].clone().requires_grad_()
    for call in (
        lambda: ctrnn(**{**x, "w_rec": w}, backend="native")[0],
        lambda: torch.ops.rnndyn.ctrnn(
            x["inputs"], w, x["b_rec"], x["w_in"], x["h0"], x["alpha"], x["noise_std"], None, ["tanh"] * 2, 0, 0, False
        )[0],
    ):
        (first,) = torch.autograd.grad(call().square().sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match=r'cannot be differentiated twice; use backend="reference"'):
            torch.autograd.grad(first.square().sum(), w)
    (first,) = torch.autograd.grad(ctrnn(**{**x, "w_rec": w}, backend="reference")[0].square().sum(), w, create_graph=True)
    assert float(torch.autograd.grad(first.square().sum(), w)[0].abs().max()) > 1e-6


def test_gradient_of_alpha_is_refused_not_zero() -> None:
    x = arguments(Case(2, 2, 2, 2, 3))
    for name in ("alpha", "noise_std"):
        value = x[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient of alpha and noise_std"):
            ctrnn(**{**x, name: value}, backend="native")[0].sum().backward()
        assert torch.autograd.grad(ctrnn(**{**x, name: value}, backend="reference")[0].sum(), value)[0].shape == (2,)


# ---------------------------------------------------------------- module


def test_initialisation_is_the_published_one() -> None:
    net = CTRNN(3, 3, 100, 1, seeds=[1, 2, 1])
    torch.testing.assert_close(net.w_rec[0], net.w_rec[2], rtol=0, atol=0)
    assert not torch.equal(net.w_rec[0], net.w_rec[1])
    for weight, std in ((net.w_rec, 0.1), (net.w_in, 0.1393), (net.w_out, 0.1407)):
        cut = 2 * std / 0.87962566103423978
        assert float(weight.detach().abs().max()) <= cut * 1.0005
        assert float(weight.detach().abs().max()) > 0.95 * cut
    assert float(net.w_rec.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert float(net.b_rec.detach().abs().max()) == float(net.b_out.detach().abs().max()) == 0
    assert float(net.h0.min()) == float(net.h0.max()) == 1
    assert sum(p[0].numel() for p in net.parameters()) == 10501


def test_select_and_stack() -> None:
    net = CTRNN(3, 2, 5, 2, alpha=[0.1, 0.5, 1.0], noise_std=[0.0, 0.1, 0.2], activation=["tanh", "relu", "sigmoid"], seeds=[1, 2, 3])
    x = torch.randn(3, 4, 6, 2)
    outputs, rates = net(x, noise_seeds=[7, 8, 9])
    some = net.select([2, 0])
    torch.testing.assert_close(some(x[[2, 0]], noise_seeds=[9, 7]), (outputs[[2, 0]], rates[[2, 0]]), rtol=0, atol=0)
    again = CTRNN.stack([some, net.select([1])])
    torch.testing.assert_close(again(x[[2, 0, 1]], noise_seeds=[9, 7, 8])[0], outputs[[2, 0, 1]], rtol=0, atol=0)
    assert outputs.shape == (3, 4, 6, 2)
    shared = net(x[0])[0]
    torch.testing.assert_close(shared, net(x[:1].expand(3, 4, 6, 2))[0], rtol=0, atol=0)
    assert not torch.equal(net(x, noise_seeds=1)[0], net(x, noise_seeds=1, stream=1)[0])


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


def test_bad_options_of_the_module_are_named() -> None:
    for options, message in (
        ({"alpha": 1.5}, "alpha: expected values in"),
        ({"alpha": [0.5, 0.5, 0.5]}, r"alpha: expected one value, or \[M\]"),
        ({"noise_std": float("nan")}, "noise_std: expected finite"),
        ({"activation": "softmax"}, "activation: expected one of tanh"),
        ({"activation": ["tanh"]}, "activation: expected one, or 2"),
        ({"seeds": [1]}, "seeds: expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            CTRNN(2, 3, 4, **options)
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        CTRNN(2, 3, 0)
    with pytest.raises(ValueError, match=r"models: expected indices in \[0, 2\)"):
        CTRNN(2, 3, 4).select([2])
    with pytest.raises(ValueError, match=r"arrays: .*W_rec"):
        CTRNN.from_published({})
    with pytest.raises(ValueError, match=r"nets\[1\]: expected the sizes"):
        CTRNN.stack([CTRNN(1, 3, 4), CTRNN(1, 3, 5)])


def test_what_the_native_backend_does_not_take() -> None:
    half = {k: v.half() if isinstance(v, Tensor) else v for k, v in arguments(Case(1, 2, 2, 2, 3), torch.float32).items()}
    assert not can_run_ctrnn(half["inputs"])
    with pytest.raises(ValueError, match=r"backend='native': inputs have dtype torch\.float16"):
        ctrnn(**half, backend="native")
    with pytest.warns(UserWarning, match=r"running the slow plain PyTorch ctrnn: .*float16"):
        rates, _ = ctrnn(**half)
    assert rates.dtype == torch.float16
