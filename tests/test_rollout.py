"""The native rollout against the reference over every case."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor

from rnndyn_fast.graph import compile_schedule
from rnndyn_fast.program import can_run_native, maps, release_memory, rollout
from rnndyn_fast.program.describe import plan_for
from rnndyn_fast.program.ir import Program, instr_lives

by_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
Result = tuple[list[Tensor], dict[str, Tensor | None]]


def run(case: RolloutCase, backend: str, dtype: torch.dtype = torch.float64, wanted: set[str] | None = None) -> Result:
    """Outputs, and gradients of everything in ``wanted`` (None: all) for one fixed random cotangent."""
    inputs = dict(zip((n.name for n in case.network.inputs), case.inputs(dtype), strict=True))
    parameters = case.parameters(dtype)
    leaves = {k: v for k, v in (inputs | parameters).items() if wanted is None or k in wanted}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = rollout(case.network, case.timesteps, list(inputs.values()), parameters, case.record, backend=backend)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def assert_same(ours: Result, theirs: Result, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        mine = ours[1][name]
        assert (mine is None) == (grad is None), f"{name}: one has a gradient, the other none"
        if grad is not None and mine is not None:
            scale = max(1.0, float(grad.abs().max()))
            torch.testing.assert_close(mine, grad, rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}")


@by_case
def test_native_equals_reference_in_float64(case: RolloutCase) -> None:
    assert_same(run(case, "native"), run(case, "reference"))


@by_case
@pytest.mark.parametrize("window", [1, 4096])
def test_windows_of_the_backward_pass_change_nothing(case: RolloutCase, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One time step in a window, and a few."""
    expected = run(case, "native")
    release_memory()  # (plans are made for a size of windows)
    monkeypatch.setattr(maps, "WINDOW_BYTES", window)
    try:
        assert_same(run(case, "native"), expected, 1e-11, 1e-11)
    finally:
        release_memory()


@by_case
def test_inference_equals_training(case: RolloutCase) -> None:
    inputs, parameters = case.inputs(), case.parameters()
    expected = rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="reference")
    outputs = rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="native")
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    assert not any(o.requires_grad for o in outputs)
    for p in parameters.values():
        p.requires_grad_()
    with torch.no_grad():
        silent = rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="native")
    torch.testing.assert_close(silent, expected, rtol=1e-10, atol=1e-10)


@by_case
def test_float32_is_as_good_as_plain_pytorch(case: RolloutCase) -> None:
    """Error in norm: at most twice that of the reference in float32, plus a floor of a few roundings per time step."""
    truth = run(case, "reference")
    errors = {}
    for backend in ("native", "reference"):
        outputs, grads = run(case, backend, torch.float32)
        named = {f"output {i}": (o, t) for i, (o, t) in enumerate(zip(outputs, truth[0], strict=True))}
        named |= {k: (g, truth[1][k]) for k, g in grads.items() if g is not None}
        errors[backend] = {k: float((o.double() - t).norm() / (1e-30 + t.norm())) for k, (o, t) in named.items()}
    for name, error in errors["native"].items():
        # A relu or a maximum that falls on the other side moves a gradient by far more than rounding, in either
        # backend; seen on these
        # cases: never beyond 1e-4 of the norm.
        floor = 1e-6 if name.startswith("output") else 2e-4
        assert error <= 2 * errors["reference"][name] + floor, f"{name}: {error:.3g}, plain {errors['reference'][name]:.3g}"


@pytest.mark.parametrize(
    "name", ["topdown_additive", "topdown_multiplicative", "skip_multiplicative", "biological_additive", "shared_norm"]
)
def test_every_requires_grad_subset_of_one(name: str) -> None:
    """One wanted gradient at a time (so that all else is frozen), against all of them at once."""
    case = CASES[name]
    everything = run(case, "reference")[1]
    for wanted, grad in everything.items():
        if grad is None:
            continue
        (mine,) = run(case, "native", wanted={wanted})[1].values()
        assert mine is not None, wanted
        torch.testing.assert_close(mine, grad, rtol=1e-10, atol=1e-10 * max(1.0, float(grad.abs().max())))


@pytest.mark.parametrize("name", ["topdown_additive", "topdown_multiplicative", "lateral_multiplicative_bias"])
def test_frozen_lower_layers(name: str) -> None:
    full = CASES[name]
    case = RolloutCase(name, full.network, full.record[:1])
    wanted = {p for p in case.network.parameter_shapes if p.startswith(("v2", "c", "gap"))}
    assert 0 < len(wanted) < len(case.network.parameter_shapes)
    assert_same(run(case, "native", wanted=wanted), run(case, "reference", wanted=wanted))


def test_parameter_that_nothing_uses_gets_no_gradient() -> None:
    case = CASES["topdown_additive_one_step"]
    grads = run(case, "native")[1]
    unused = {name for name, grad in grads.items() if grad is None}
    assert unused == {"v1.lateral.weight", "v1.top_down.weight", "v2.lateral.weight", "gap.lateral.weight"}


def test_unread_areas_get_no_gradient() -> None:
    case = RolloutCase("part", CASES["topdown_additive"].network, ("retina",))
    ours, theirs = run(case, "native"), run(case, "reference")
    assert_same(ours, theirs)
    assert {k for k, v in ours[1].items() if v is not None} == {"image", "retina.weight", "retina.bias"}


@pytest.mark.parametrize("name", ["topdown_multiplicative", "several_inputs_additive", "operators_additive"])
def test_any_strides(name: str) -> None:
    """Sliced, permuted and channels-last inputs and parameters, and cotangents that are expanded."""
    case = CASES[name]
    results = []
    for strange in (False, True):
        inputs, parameters = case.inputs(), case.parameters()
        if strange:
            inputs = [torch.stack([x, -x], -1)[..., 0] for x in inputs]
            inputs = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if i % 2 else x for i, x in enumerate(inputs)]
            parameters = {
                k: p.to(memory_format=torch.channels_last) if p.dim() == 4 else torch.stack([p, p], -1)[..., 1]
                for k, p in parameters.items()
            }
            assert not all(t.is_contiguous() for t in (*inputs, *parameters.values()))
        leaves = [t.requires_grad_() for t in (*inputs, *parameters.values())]
        outputs = rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="native")
        results.append((outputs, torch.autograd.grad(sum(o.sum() for o in outputs), leaves, allow_unused=True)))
        with torch.no_grad():
            results[-1][0].extend(rollout(case.network, case.timesteps, inputs, parameters, case.record, backend="native"))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-9)


def test_only_some_outputs_are_used() -> None:
    case = CASES["skip_additive_record_all"]
    grads = []
    for backend in ("native", "reference"):
        parameters = {k: v.requires_grad_() for k, v in case.parameters().items()}
        outputs = rollout(case.network, case.timesteps, case.inputs(), parameters, case.record, backend=backend)
        grads.append(torch.autograd.grad(outputs[2][1].sum(), list(parameters.values()), allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):  # (of an area that turned out unneeded: None, or zeros)
        known = [g for g in (ours, theirs) if g is not None]
        full = [torch.zeros_like(known[0]) if g is None else g for g in (ours, theirs) if known]
        torch.testing.assert_close(full[:1], full[1:], rtol=1e-9, atol=1e-9)


def test_backward_twice_and_accumulation() -> None:
    case = CASES["topdown_multiplicative"]
    parameters = {k: v.requires_grad_() for k, v in case.parameters().items()}
    outputs = rollout(case.network, case.timesteps, case.inputs(), parameters, case.record, backend="native")
    loss = sum(o.pow(2).sum() for o in outputs)
    loss.backward(retain_graph=True)
    once = {k: p.grad.clone() for k, p in parameters.items() if p.grad is not None}
    loss.backward()
    assert once
    for name, grad in once.items():
        torch.testing.assert_close(parameters[name].grad, 2 * grad, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_parameter_is_noticed_in_backward() -> None:
    case = CASES["lateral_additive"]
    parameters = {k: v.requires_grad_() for k, v in case.parameters().items()}
    out = rollout(case.network, case.timesteps, case.inputs(), parameters, case.record, backend="native")[0]
    with torch.no_grad():
        parameters["b.lateral.weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    case = CASES["topdown_multiplicative"]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(case, "native"))
    finally:
        torch.set_num_threads(before)
    # The areas are bitwise the same for any number of threads; the vendor's convolution is so only for a fixed one.
    assert_same(results[1], results[0], 1e-12, 1e-12)


# ---------------------------------------------------------------- memory


def planned(case: RolloutCase, timesteps: int, record: tuple[str, ...], samples: int, *, training: bool) -> Program:
    """The program of a case in float64."""
    schedule = compile_schedule(case.network, timesteps, record)
    return plan_for(schedule, "auto", torch.float64, samples, training=training).versions[0].executable.program


@pytest.mark.parametrize(
    "name",
    ["topdown_additive", "topdown_multiplicative", "skip_additive", "biological_additive", "many_terms_additive"],
)
def test_inference_holds_two_time_steps(name: str) -> None:
    case = CASES[name]
    record = case.record[:1]
    # (A biological unroll takes 5 to fill. Results are not in the arena.)
    peaks = {timesteps: planned(case, timesteps, record, case.samples, training=False).nbytes for timesteps in (8, 24)}
    # (the output's own storage is among the forms where a later area reads it, and grows with T)
    shape = case.network.shapes[record[0]]
    output = 8 * case.samples * math.prod(shape)
    assert 0 < peaks[24] <= peaks[8] + 16 * output
    one_step = sum(8 * case.samples * math.prod(case.network.shapes[a.name]) for a in case.network.areas)
    weights = sum(8 * math.prod(shape) for shape in case.network.parameter_shapes.values())  # (in other layouts)
    terms = len(case.network.connections)
    assert peaks[8] <= (2 + terms) * one_step + weights


@pytest.mark.parametrize("name", ["topdown_additive", "topdown_multiplicative"])
def test_backward_holds_windows_however_many_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the gradients of sums of areas with maps. (A weight's gradient waits for as many maps as it is large: those of vectors wait.)"""
    case = CASES[name]
    areas = [a.name for a in case.network.areas if case.network.shapes[a.name][1:] != (1, 1)]
    names = tuple(f"{area} grad {port}" for area in areas for port in ("drive", "modulator"))
    monkeypatch.setattr(maps, "WINDOW_BYTES", 1)
    peaks = {}
    for timesteps in (6, 18):
        program = planned(case, timesteps, case.record, 64, training=True)
        alive = [0] * len(program.instrs)
        for value, (first, last) in instr_lives(program.instrs).items():
            for k in range(first, last + 1) if value.name.endswith(names) else ():
                alive[k] += value.nbytes
        peaks[timesteps] = max(alive)
    assert peaks[6] == peaks[18] > 0


# ---------------------------------------------------------------- bad input

_CASE = CASES["several_inputs_additive"]


def _call(change: str) -> object:
    network, t = _CASE.network, _CASE.timesteps
    inputs, parameters = _CASE.inputs(), _CASE.parameters()
    record: object = _CASE.record
    backend: str | None = "native"
    if change == "rank":
        inputs[0] = inputs[0][0]
    elif change == "rank of frames":
        inputs[1] = inputs[1][0]
    elif change == "channels":
        inputs[0] = inputs[0][:, :2]
    elif change == "height":
        inputs[0] = inputs[0][:, :, :5]
    elif change == "int":
        inputs = [x.int() for x in inputs]
    elif change == "int one":
        inputs[1] = inputs[1].int()
    elif change == "half":
        inputs, parameters = [x.half() for x in inputs], {k: p.half() for k, p in parameters.items()}
    elif change == "mixed dtypes":
        inputs = [x.float() for x in inputs]
    elif change == "meta":
        inputs = [x.to("meta") for x in inputs]
    elif change == "all meta":
        inputs, parameters = [x.to("meta") for x in inputs], {k: p.to("meta") for k, p in parameters.items()}
    elif change == "array":
        inputs[0] = inputs[0].numpy()  # type: ignore[assignment]
    elif change == "empty":
        inputs = [x[:, :0] if n.frames else x[:0] for x, n in zip(inputs, network.inputs, strict=True)]
    elif change == "samples":
        inputs[0] = inputs[0][:1]
    elif change == "frames":
        inputs[1] = inputs[1][:2]
    elif change == "too few":
        inputs = inputs[:2]
    elif change == "zero":
        t = 0
    elif change == "float":
        t = 4.0  # type: ignore[assignment]
    elif change == "bool":
        t = True
    elif change == "missing":
        del parameters["vector_ln.bias"]
    elif change == "shape":
        parameters["a.lateral.weight"] = parameters["a.lateral.weight"][:, :1]
    elif change == "unknown":
        record = ("v9",)
    elif change == "input as record":
        record = ("image",)
    elif change == "string":
        record = "vector"
    elif change == "none to record":
        record = None
    elif change == "nothing to record":
        record = ()
    elif change == "twice":
        record = ("a", "vector", "a")
    elif change == "backend":
        backend = "cuda"
    return rollout(network, t, inputs, parameters, record, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("rank", ValueError, r"image: expected \[N, C, H, W\] with C, H, W = 3, 8, 8, got \[3, 8, 8\]"),
        ("rank of frames", ValueError, r"movie: expected \[T, N, C, H, W\].*got \[2, 2, 8, 8\]"),
        ("channels", ValueError, r"image: expected .*3, 8, 8, got \[2, 2, 8, 8\]"),
        ("height", ValueError, r"image: expected .*3, 8, 8, got \[2, 3, 5, 8\]"),
        ("int", TypeError, "image: expected a floating-point tensor, got torch.int32"),
        ("int one", TypeError, "movie: expected a floating-point tensor, got torch.int32"),
        ("half", ValueError, "image has dtype torch.float16.*float32 and float64.*reference"),
        ("mixed dtypes", TypeError, "image: expected torch.float64.*got torch.float32"),
        ("meta", TypeError, "image: expected .* on cpu.*got .* on meta"),
        ("all meta", ValueError, "image is on meta.*reference"),
        ("array", TypeError, "image: expected a torch.Tensor, got ndarray"),
        ("empty", ValueError, r"image: expected .*N >= 1, got an empty batch \[0, 3, 8, 8\]"),
        ("samples", ValueError, "movie: expected N = 1 like the first input, got 2"),
        ("frames", ValueError, r"movie: expected \[T, N, C, H, W\] with T = 4, got \[2, 2, 2, 8, 8\]"),
        ("too few", ValueError, "inputs: expected 3 .*, got 2"),
        ("zero", ValueError, "timesteps: expected at least 1, got 0"),
        ("float", TypeError, "timesteps: expected an int, got float"),
        ("bool", TypeError, "timesteps: expected an int, got bool"),
        ("missing", ValueError, r"parameters: 'vector_ln.bias' \[6\] is missing"),
        ("shape", ValueError, r"a.lateral.weight: expected \[4, 4, 3, 3\], got \[4, 1, 3, 3\]"),
        ("unknown", ValueError, r"unknown area 'v9'; areas are \['a', 'vector'\]"),
        ("input as record", ValueError, r"unknown area 'image'"),
        ("string", TypeError, "record: expected a sequence of area names, got the string 'vector'"),
        ("none to record", ValueError, "record: the network has no readout"),
        ("nothing to record", ValueError, "record: expected at least one area"),
        ("twice", ValueError, "record: expected every area once"),
        ("backend", ValueError, 'backend: expected "native", "reference" or None, got \'cuda\''),
    ],
)
def test_bad_input(change: str, error: type[Exception], message: str) -> None:
    _call("nothing")  # (a good call first: nothing that it caches may let a bad one through)
    compile_schedule(_CASE.network, 1, _CASE.record)
    with pytest.raises(error, match=message):
        _call(change)


def test_without_a_backend_the_reference_runs_with_a_warning_that_says_why() -> None:
    case = CASES["lateral_additive"]
    inputs, parameters = case.inputs(torch.bfloat16), case.parameters(torch.bfloat16)
    assert not can_run_native(case.network, inputs, parameters)
    with pytest.raises(ValueError, match="bfloat16"):
        can_run_native(case.network, inputs, parameters, raise_error=True)
    with pytest.warns(UserWarning, match=r"running the reference.*bfloat16"):
        out = rollout(case.network, case.timesteps, inputs, parameters, case.record)
    assert out[0].dtype == torch.bfloat16
    assert can_run_native(case.network, case.inputs(), case.parameters())
