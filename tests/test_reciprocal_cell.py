"""The reciprocal gated cell with all its options against an independent NumPy implementation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from cell_oracle import Reciprocal, Variables
from test_conv_cell import maps
from torch import Tensor

from rnndyn_fast.graph.schedule import Schedule
from rnndyn_fast.models.checkpoint_names import load_mapped
from rnndyn_fast.models.convrnn_checkpoint import entries_of
from rnndyn_fast.nn import ConvCell
from rnndyn_fast.program.describe import plan_for

SIZES = {"tau_filter_size": [3, 3], "gate_filter_size": 3.0, "ff_filter_size": 3}
SHALLOW = {"out_depth": 4, "cell_depth": 4, "input_to_cell": True, "tau_nonlinearity": "sigmoid", "gate_nonlinearity": "sigmoid", **SIZES}
MEDIAN = {"out_depth": 4, "cell_depth": 3, "input_to_cell": True, "input_to_out": True, "input_activation": "elu", **SIZES}
# Name: form, configuration, channels of the residual, channels of the feedback, the map.
CASES: dict[str, tuple[str, dict[str, Any], int, int, tuple[int, int]]] = {
    "shallow_feedback_input": ("shallow", {**SHALLOW, "feedback_entry": "input", "feedback_activation": "tanh"}, 0, 3, (5, 4)),
    "shallow_feedback_cell": (
        "shallow", {**SHALLOW, "feedback_entry": "cell", "feedback_activation": "elu", "feedback_filter_size": 2}, 0, 4, (5, 5)
    ),
    "shallow_residuals": (
        "shallow", {**SHALLOW, "cell_residual": True, "out_residual": True, "residual_to_out_gate": True, "cell_depth": 2}, 3, 0, (4, 5)
    ),
    "shallow_residual_only": ("shallow", {**SHALLOW, "input_to_cell": False, "cell_residual": True, "out_residual": True}, 4, 0, (4, 4)),
    "shallow_separable": (
        "shallow",
        {**SHALLOW, "cell_depth": 3, "tau_depth_separable": True, "gate_depth_separable": True, "ff_depth_separable": True,
         "residual_to_out_gate": True, "in_out_depth_separable": True, "input_to_out": True, "in_out_filter_size": [2, 2]},
        2, 0, (5, 4),
    ),
    "shallow_repeat": (
        "shallow",
        {**SHALLOW, "ds_repeat": True, "gate_depth_separable": True, "feedback_depth_separable": True, "tau_filter_size": 2,
         "feedback_filter_size": 5, "residual_to_out_gate": True},
        4, 2, (4, 5),
    ),
    "shallow_cut": (
        "shallow",
        {**SHALLOW, "tau_filter_size": 5, "gate_filter_size": [7, 7], "ff_filter_size": 5, "input_to_out": True, "in_out_filter_size": 5,
         "feedback_filter_size": 7},
        0, 3, (4, 3),
    ),
    "shallow_cell_to_out": ("shallow", {**SHALLOW, "cell_to_out": True, "residual_to_out_gate": True, "cell_depth": 3}, 3, 0, (5, 4)),
    "shallow_layer_norm": ("shallow", {**SHALLOW, "layer_norm": True, "tau_multiplier": 0.7, "gate_offset": 0.2}, 0, 0, (4, 4)),
    "shallow_no_cell": ("shallow", {**SHALLOW, "gate_filter_size": 0, "out_residual": True}, 4, 0, (5, 4)),
    "median_dense": (
        "median", {**MEDIAN, "tau_bias": 0.7, "gate_bias": -0.4, "tau_filter_size": 5, "cell_tau_filter_size": [2, 2]}, 0, 0, (5, 4)
    ),
    "median_not_cut": (
        "median", {**MEDIAN, "ff_filter_size": 4, "in_out_filter_size": [3, 3], "tau_filter_size": 5, "gate_bias": 1.1}, 0, 0, (3, 2)
    ),
    "median_everything_to_gates": (
        "median",
        {**MEDIAN, "input_to_tau": True, "input_to_gate": True, "residual_to_cell_tau": True, "residual_to_cell_gate": True,
         "residual_to_out_tau": True, "residual_to_out_gate": True, "out_residual": True, "cell_residual": True, "tau_bias": 0.3},
        3, 0, (4, 5),
    ),
    "median_separable_gates": (
        "median",
        {**MEDIAN, "gate_depth_separable": True, "tau_depth_separable": True, "residual_to_out_gate": True, "input_to_gate": True,
         "tau_bias": 3.0, "gate_bias": 2.0, "residual_to_cell_gate": True, "gate_filter_size": 5},
        2, 0, (4, 4),
    ),
    "median_feedback_input": (
        "median",
        {**MEDIAN, "feedback_entry": "input", "feedback_activation": "elu", "feedback_depth_separable": True, "feedback_filter_size": 8.0},
        0, 3, (5, 5),
    ),
    "median_feedback_cell": (
        "median",
        {**MEDIAN, "feedback_entry": "cell", "feedback_activation": "sigmoid", "ff_depth_separable": True, "cell_residual": True,
         "in_out_depth_separable": True},
        3, 2, (4, 4),
    ),
    "median_cell_to_out": ("median", {**MEDIAN, "cell_to_out": True, "gate_bias": 0.6, "residual_to_out_gate": True}, 4, 0, (4, 5)),
    "median_cell_to_out_separable": (
        "median", {**MEDIAN, "cell_to_out": True, "gate_depth_separable": True, "gate_bias": 0.6}, 0, 0, (4, 5)
    ),
    "median_layer_norm": (
        "median",
        {**MEDIAN, "layer_norm": True, "feedback_entry": "out", "feedback_activation": "tanh", "cell_activation": "tanh", "gate_bias": 0.5,
         "out_activation": "identity"},
        0, 3, (4, 4),
    ),
    "median_functions": (
        "median",
        {**MEDIAN, "tau_nonlinearity": "identity", "gate_nonlinearity": "elu", "cell_activation": "sigmoid", "input_activation": "tanh",
         "tau_multiplier": 0.3, "tau_offset": 0.1, "tau_bias": 0.2},
        0, 0, (4, 4),
    ),
    "median_no_cell": ("median", {**MEDIAN, "gate_filter_size": [0, 0], "input_to_tau": True, "residual_to_out_tau": True}, 3, 2, (4, 4)),
    "median_wide_kernels": (
        "median", {**MEDIAN, "tau_filter_size": [1, 3], "gate_filter_size": [5, 2], "ff_filter_size": [3, 1]}, 0, 0, (5, 4)
    ),
}  # fmt: skip


def arrays_of(case: str, steps: int = 3, samples: int = 2) -> tuple[Variables, dict[str, np.ndarray]]:
    """Inputs and variables of a case in published layouts."""
    _, config, residual, feedback, size = CASES[case]
    rng = np.random.default_rng(len(case))
    given: dict[str, np.ndarray] = {"x": rng.normal(size=(steps, samples, *size, config["out_depth"]))}
    for name, channels in (("residual", residual), ("feedback", feedback)):
        if channels:
            given[name] = rng.normal(size=(steps, samples, *size, channels))
    depth = config["out_depth"] + (config["cell_depth"] if config["gate_filter_size"] not in (0, [0, 0]) else 0)
    given["state"] = rng.normal(size=(samples, *size, depth))
    variables = Variables(sum(map(ord, case)))
    run(case, variables, given)
    return variables, given


def run(case: str, variables: Variables, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    form, config, *_ = CASES[case]
    cell, state, outputs, states = Reciprocal(config, form, variables), given["state"], [], []
    for t in range(len(given["x"])):
        y, state = cell.step(given["x"][t], state, *(given[k][t] if k in given else None for k in ("residual", "feedback")))
        outputs.append(y)
        states.append(state)
    return np.stack(outputs), np.stack(states)


def cell_of(case: str, variables: Variables, backend: str, dtype: torch.dtype = torch.float64) -> ConvCell:
    form, config, residual, feedback, size = CASES[case]
    cell = ConvCell.from_published(
        config, config["out_depth"], size, form=form, residual_channels=residual, feedback_channels=feedback, backend=backend
    )
    values = {f"ReciprocalGateCell/{name}": value for name, value in variables.values.items()}
    load_mapped(cell.double(), values, entries_of([n for n, _ in cell.named_parameters()], cell.kind), {})
    return cell.to(dtype)


def tensors(given: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: maps(value, dtype).contiguous().requires_grad_(True) for name, value in given.items()}


def sequence(cell: ConvCell, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return cell.sequence(inputs["x"], inputs["state"], inputs.get("residual"), inputs.get("feedback"))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case: str, backend: str) -> None:
    """Outputs and states; and the derivative along a random direction of all inputs and variables, by a complex step."""
    variables, given = arrays_of(case)
    cell, inputs = cell_of(case, variables, backend), tensors(given)
    outputs, states = sequence(cell, inputs)
    expected, expected_states = run(case, variables, given)
    torch.testing.assert_close(outputs, maps(expected, torch.float64), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(states, maps(expected_states, torch.float64), rtol=1e-10, atol=1e-11)

    rng = np.random.default_rng(7)
    weights = [rng.normal(size=a.shape) for a in (expected, expected_states)]
    (sum((a * maps(w, torch.float64)).sum() for a, w in zip((outputs, states), weights, strict=True))).backward()
    for _ in range(2):
        directions = {name: rng.normal(size=v.shape) for name, v in variables.values.items()}
        moves = {name: rng.normal(size=v.shape) for name, v in given.items()}
        step = 1e-30
        moved = Variables(0, {name: v + 1j * step * directions[name] for name, v in variables.values.items()})
        shifted = {name: v + 1j * step * moves[name] for name, v in given.items()}
        slope = sum((a.imag / step * w).sum() for a, w in zip(run(case, moved, shifted), weights, strict=True))
        got = sum(_along(inputs[name].grad, maps(move, torch.float64)) for name, move in moves.items())
        parameters = dict(cell.named_parameters())
        for entry in entries_of(list(parameters), cell.kind):
            direction = entry.convert(*(directions[n.removeprefix("ReciprocalGateCell/")] for n in entry.theirs))
            got += _along(parameters[entry.ours].grad, torch.from_numpy(np.ascontiguousarray(direction)))
        assert got == pytest.approx(slope, rel=1e-9, abs=1e-9)


def _along(grad: Tensor | None, direction: Tensor) -> float:
    return 0.0 if grad is None else float((grad * direction).sum())


@pytest.mark.parametrize("case", ["shallow_repeat", "median_dense", "median_layer_norm", "median_feedback_input", "median_cell_to_out"])
def test_float32_without_gradients(case: str) -> None:
    variables, given = arrays_of(case)
    expected, _ = run(case, variables, given)
    with torch.no_grad():
        outputs, _ = sequence(cell_of(case, variables, "native", torch.float32), tensors(given, torch.float32))
    torch.testing.assert_close(outputs, maps(expected, torch.float32), rtol=1e-4, atol=1e-5)


def instructions(cell: ConvCell, *, training: bool = False) -> list[str]:
    """Kinds of the program's instructions."""
    schedule = Schedule(cell.network, 3, cell.recorded)
    program = plan_for(schedule, "auto", torch.float64, 2, training=training).versions[0].executable.program
    return [instr.kind for instr in program.instrs]


@pytest.mark.parametrize("case", CASES)
def test_gates_are_one_kernel(case: str) -> None:
    """The form is data: every half is one fused kernel per step, and PyTorch computes only functions that no kernel has."""
    kinds = instructions(cell_of(case, arrays_of(case)[0], "native"), training=True)
    # elu as a gain, sigmoid as an activation of a map, dense kernels that are not square
    other = ("median_functions", "median_feedback_cell", "median_wide_kernels", "shallow_cut")
    halves = 1 if "no_cell" in case else 2
    if case == "median_functions":
        assert "gate_step" not in kinds
    else:
        assert kinds.count("gate_step") == kinds.count("gate_step_backward") == 3 * halves
    assert ("by_torch" in kinds) == (case in other)


@pytest.mark.parametrize("form", ["shallow", "median"])
def test_without_gates_both_halves_take_their_drives_whole(form: str) -> None:
    """The control is the cell whose gate gains are 1, without the gates' parameters."""
    gains = {"gate_multiplier": 0.0, "gate_offset": 1.0, "residual_to_out_gate": False}
    gated = ConvCell("rgc", 4, 4, (5, 5), form=form, kernel_size=3, **gains).double()
    control = ConvCell("rgc", 4, 4, (5, 5), form=form, kernel_size=3, gating=False).double()
    parameters = gated.state_dict()
    gates = {name for name in parameters if ".gate" in name or "out_to_cell" in name}
    assert set(control.state_dict()) == parameters.keys() - gates
    assert gates
    control.load_state_dict({name: value for name, value in parameters.items() if name not in gates})
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
    for a, b in zip(gated.sequence(x), control.sequence(x), strict=True):
        torch.testing.assert_close(a, b)


def random_config(rng: random.Random, form: str) -> tuple[dict[str, Any], int, int]:
    """Options drawn at random, of those that may stand together, and channels of residual and feedback."""
    config: dict[str, Any] = {"out_depth": 3, "cell_depth": rng.choice((2, 3))}
    for name in ("tau", "gate", "ff", "in_out", "feedback"):
        config[f"{name}_filter_size"] = rng.choice((1, 2, 3, [3, 2], 5))
        config[f"{name}_depth_separable"] = rng.random() < 0.3
    for name in ("tau", "gate"):
        config |= {f"{name}_nonlinearity": rng.choice(("sigmoid", "tanh", "relu")), f"{name}_bias": rng.choice((0.0, 0.5))}
        config |= {f"{name}_multiplier": rng.choice((-1.0, 0.4)), f"{name}_offset": rng.choice((1.0, 0.3))}
    for name in ("input", "feedback", "cell", "out"):
        config[f"{name}_activation"] = rng.choice(("identity", "elu", "tanh"))
    switches = (
        "cell_residual", "out_residual", "residual_to_cell_tau", "residual_to_cell_gate", "residual_to_out_tau", "residual_to_out_gate",
        "input_to_tau", "input_to_gate", "input_to_out", "cell_to_out", "layer_norm",
    )  # fmt: skip
    config |= {name: rng.random() < 0.4 for name in switches}
    config |= {"input_to_cell": not config["cell_residual"] or rng.random() < 0.5, "feedback_entry": rng.choice(("input", "cell", "out"))}
    if form == "shallow":
        config["ds_repeat"] = rng.random() < 0.3
    feedback = rng.choice((0, config["cell_depth"] if (form, config["feedback_entry"]) == ("shallow", "cell") else 2))
    return config, 2 if config["cell_residual"] else rng.choice((0, 3)), feedback


@pytest.mark.parametrize("seed", range(24))
def test_random_options_are_numpy_and_native_is_reference(seed: int) -> None:
    rng = random.Random(seed)
    form = rng.choice(("shallow", "median"))
    config, residual, feedback = random_config(rng, form)
    CASES[f"random{seed}"] = case = (form, config, residual, feedback, (4, 3))
    try:
        variables, given = arrays_of(f"random{seed}")
        expected, expected_states = run(f"random{seed}", variables, given)
        grads = []
        for backend in ("reference", "native"):
            cell, inputs = cell_of(f"random{seed}", variables, backend), tensors(given)
            outputs, states = sequence(cell, inputs)
            torch.testing.assert_close(outputs, maps(expected, torch.float64), rtol=1e-9, atol=1e-10, msg=lambda m: f"{case}: {m}")
            torch.testing.assert_close(states, maps(expected_states, torch.float64), rtol=1e-9, atol=1e-10)
            (outputs.square().sum() + states.sum()).backward()
            grads.append([inputs[name].grad for name in inputs] + [p.grad for p in cell.parameters()])
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None) or not (a if a is not None else b).any()
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    finally:
        del CASES[f"random{seed}"]
