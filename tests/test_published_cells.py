"""Cells from published configurations: golden runs, other published arguments, kernels on small maps, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cell_oracle import FUNCTIONS, layer_norm, same
from conftest import golden
from test_conv_cell import CASES, close, maps, optional_inputs
from test_convrnn import configs

from rnndyn_fast.graph.spec.network import Area, Connection, Input, Network, Norm, Operator, Role
from rnndyn_fast.models import convrnn
from rnndyn_fast.models.checkpoint_names import load_mapped
from rnndyn_fast.models.convrnn_checkpoint import entries_of
from rnndyn_fast.nn import ConvCell

OF_THE_FILE = ("cls", "batch", "height", "width", "in_channels", "time_steps", "seed", "extra_inputs")
SHALLOW: dict[str, Any] = {"out_depth": 4, "cell_depth": 4, "tau_filter_size": 3, "gate_filter_size": 3, "ff_filter_size": 3}
SHALLOW |= {"input_to_cell": True}


def form_of(name: str) -> str:
    kind = CASES[name][0]
    return kind.removeprefix("rgc_")


def load(cell: ConvCell, variables: dict[str, np.ndarray]) -> ConvCell:
    load_mapped(cell.double(), variables, entries_of([n for n, _ in cell.named_parameters()], cell.kind), {})
    return cell


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", CASES)
def test_golden_configurations(name: str, backend: str) -> None:
    """The published arguments as the golden files have them, whatever has no effect included, make the cell of the golden run."""
    data, config = golden(f"convrnn_{name}"), configs()[name]
    extra = {f"{key.removesuffix('_input')}_channels": n for key, n in config.get("extra_inputs", {}).items()}
    arguments = {k: v for k, v in config.items() if k not in OF_THE_FILE} | {"shape": [config["height"], config["width"]]}
    size = (config["height"], config["width"])
    cell = ConvCell.from_published(arguments, config["in_channels"], size, form=form_of(name), backend=backend, **extra)
    load(cell, {k.removeprefix("weight__").replace("__", "/"): v for k, v in data.items() if k.startswith("weight__")})
    outputs, states = cell.sequence(
        maps(data["input_seq"], torch.float64), maps(data["random_init__initial_state"], torch.float64),
        **optional_inputs(data, torch.float64),
    )  # fmt: skip
    close(outputs, maps(data["random_init__output_seq"], torch.float64), "outputs")
    close(states, maps(data["random_init__state_seq"], torch.float64), "states")


# ---------------------------------------------------------------- activations and norms of the other cells


def simple(v: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p = "ConvNormBasicCell"
    total = same(x, v[f"{p}/i/weights"]) + v[f"{p}/i/bias"] + same(h, v[f"{p}/s/weights"]) + v[f"{p}/s/bias"]
    return f(layer_norm(total, v[f"{p}/layer_norm/gamma"], v[f"{p}/layer_norm/beta"]))


def gru(v: dict[str, np.ndarray], x: np.ndarray, h: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p, s = "ConvGRUCell", FUNCTIONS["sigmoid"]
    r, u = np.split(same(np.concatenate([x, h], 3), v[f"{p}/gates/weights"]) + v[f"{p}/gates/bias"], 2, 3)
    r, u = s(r + 0.4), s(u)
    candidate = f(same(np.concatenate([x, r * h], 3), v[f"{p}/candidates/weights"]) + v[f"{p}/candidates/bias"])
    return u * h + (1 - u) * candidate


def lstm(v: dict[str, np.ndarray], x: np.ndarray, state: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    p, s = "ConvLSTMCell", FUNCTIONS["sigmoid"]
    c, h = np.split(state, 2, 3)
    i, j, forget, o = np.split(same(np.concatenate([x, h], 3), v[f"{p}/weights"]) + v[f"{p}/bias"], 4, 3)
    w_f, w_i, w_o = (v[f"{p}/peepholes/w_{gate}_diag"] for gate in "fio")
    new = c * s(forget + 0.4 + w_f * c) + s(i + w_i * c) * f(j)
    return np.concatenate([new, f(new) * s(o + w_o * c)], 3)


OTHERS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Any]]] = {
    "simplernn": (simple, {"activation": "tanh"}),
    "gru": (gru, {"activation": "relu", "forget_bias": 0.4}),
    "lstm": (lstm, {"activation": "elu", "forget_bias": 0.4, "use_peepholes": True}),
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("form", OTHERS)
def test_activations_of_the_other_cells(form: str, backend: str) -> None:
    step, options = OTHERS[form]
    cell = ConvCell.from_published({"out_depth": 3, "filter_size": [3, 2], **options}, 2, (4, 5), form=form, backend=backend).double()
    rng = np.random.default_rng(1)
    for p in cell.parameters():
        p.data = torch.from_numpy(rng.normal(size=tuple(p.shape)) * 0.5)
    x, state = rng.normal(size=(3, 2, 4, 5, 2)), rng.normal(size=(2, 4, 5, sum(cell.state_channels)))
    entries = entries_of([n for n, _ in cell.named_parameters()], form)
    variables: dict[str, np.ndarray] = {}
    for entry in entries:
        value = cell.get_parameter(entry.ours).detach().numpy()
        if entry.ours.endswith("peepholes"):
            variables.update(zip(entry.theirs, value.transpose(0, 2, 3, 1), strict=True))
        else:
            variables[entry.theirs[0]] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    _, states = cell.sequence(maps(x, torch.float64), maps(state, torch.float64))
    for t in range(3):
        state = step(variables, x[t], state, FUNCTIONS[options["activation"]])
        torch.testing.assert_close(states[t], maps(state, torch.float64), rtol=1e-10, atol=1e-11)
    states.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())


# ---------------------------------------------------------------- small maps


def test_kernels_on_small_maps() -> None:
    """96 x 64 images: dense kernels of the median form are as published, depthwise ones are cut, each axis for itself."""
    widths = {f"conv{i}": 2 for i in range(1, 11)}
    net = convrnn("rgc_intermediate", image_size=(96, 64), num_classes=3, widths=widths, cell_channels=2)
    shapes = {name: tuple(p.shape[2:]) for name, p in net.named_parameters()}
    assert net.network.shapes["conv8"][1:] == (3, 2)
    scope = "conv8.ReciprocalGateCell"
    assert shapes[f"{scope}.out.input_to_out.weight"] == (3, 3)
    assert shapes[f"{scope}.cell.input_to_cell.weight"] == (2, 2)
    assert shapes[f"{scope}.out.tau_depthwise.weight"] == shapes[f"{scope}.cell.out_to_cell_depthwise.weight"] == (3, 2)
    assert net(torch.zeros(1, 3, 96, 64)).isfinite().all()
    small = ConvCell.from_published({**SHALLOW, "gate_filter_size": 5, "input_to_out": True}, 4, (3, 2))
    kernels = {name.removeprefix("ReciprocalGateCell."): tuple(p.shape[2:]) for name, p in small.named_parameters()}
    assert kernels == {
        "cell.tau.weight": (3, 2), "cell.gate.weight": (3, 2), "cell.input_to_cell.weight": (3, 2), "out.tau.weight": (3, 2),
        "out.gate.weight": (3, 2), "out.input_to_out.weight": (3, 3),
    }  # fmt: skip


def test_biases_that_are_never_added_do_not_exist() -> None:
    """The shallow form's dense convolutions have none, not even where the published code makes a variable."""
    cell = ConvCell.from_published({**SHALLOW, "input_to_out": True, "tau_bias": 2.0, "gate_bias": -1.0}, 4, (5, 5))
    assert not [name for name, _ in cell.named_parameters() if "bias" in name]
    separable = ConvCell.from_published({**SHALLOW, "tau_depth_separable": True}, 4, (5, 5))
    assert sorted(n.split(".")[1] for n, _ in separable.named_parameters() if "bias" in n) == ["cell", "out"]


def test_presets_are_the_general_cell() -> None:
    for form in ("shallow", "median"):
        preset, general = (
            ConvCell(f"rgc_{form}", 4, 4, (8, 8), residual_channels=3),
            ConvCell("rgc", 4, 4, (8, 8), form=form, residual_channels=3),
        )
        assert (preset.kind, preset.network.areas, preset.network.connections) == (
            general.kind, general.network.areas, general.network.connections
        )  # fmt: skip


def test_feedback_through_an_activation_in_a_network() -> None:
    """The feedback's area has the size of its target, though all that enters it is resized."""
    areas = (
        Area("low", 2, norm=Norm.NONE, initial="zero"),
        Area("top", 3, norm=Norm.NONE, initial="zero"),
        Area("feedback", 2, norm=Norm.NONE, like="low"),
    )
    connections = (
        Connection("image", "low", Role.BOTTOM_UP, kernel_size=3),
        Connection("low", "top", Role.BOTTOM_UP, kernel_size=3, stride=2),
        Connection("top", "feedback", Role.BOTTOM_UP, resize=True, delay=1),
    )
    net = Network("n", (Input("image", 1, 8, 6),), areas, connections)
    assert net.shapes["feedback"] == (2, 8, 6)
    assert Network.from_json(net.to_json()) == net
    with pytest.raises(ValueError, match=r"area 'feedback': like: expected another of .*got 'nothing'"):
        Network("n", net.inputs, (*areas[:2], Area("feedback", 2, norm=Norm.NONE, like="nothing")), connections)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        ({"gate_filter": 3}, "shallow", "config: unknown argument 'gate_filter', did you mean 'gate_filter_size'"),
        ({"ds_repeat": True}, "median", "config: unknown argument 'ds_repeat'"),
        ({"out_depth": 2.5}, "shallow", "config: out_depth: expected a whole number of at least 1, got 2.5"),
        ({"tau_filter_size": None}, "shallow", "config: missing argument 'tau_filter_size'"),
        ({"tau_filter_size": [3]}, "shallow", r"config: tau_filter_size: expected a whole number or \(height, width\), got \[3\]"),
        ({"cell_activation": "crelu"}, "median", "config: cell_activation: expected one of .*got 'crelu', did you mean"),
        ({"feedback_entry": "top"}, "median", r"config: feedback_entry: expected one of \['input', 'cell', 'out'\], got 'top'"),
        ({"input_to_cell": False}, "median", "input_to_cell: nothing enters the cell memory, expected it or cell_residual"),
        ({"cell_residual": True}, "median", "cell_residual: it reads the layer's own input, expected residual_channels > 0"),
        (
            {"gate_filter_size": 0, "residual_to_out_gate": True},
            "shallow",
            "residual_to_out_gate: there is no cell memory and no gate with a gate kernel of size 0",
        ),
        ({"out_depth": 5}, "shallow", "input_to_out: without it x is the drive of the output and needs its channels, got 4 and 5"),
        ({"batch_norm": True}, "shallow", "config: batch_norm: expected False .batch norm within a cell is not here., got True"),
        ({"recurrent_keep_prob": 0.5}, "shallow", "config: recurrent_keep_prob: expected 1.0 .dropout"),
        ({"shape": [4, 4]}, "shallow", r"config: shape: expected the map size \[5, 5\], got \[4, 4\]"),
        ({"tau_multiplier": "large"}, "shallow", "tau_multiplier: expected a finite number, got 'large'"),
        ({"cell_to_out": 1}, "shallow", "cell_to_out: expected true or false, got 1"),
    ],
)
def test_refuses_published(change: dict[str, Any], form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvCell.from_published({**SHALLOW, **change}, 4, (5, 5), form=form)


def test_refuses_other_published_cells() -> None:
    with pytest.raises(ValueError, match="config: layer_norm: expected False"):
        ConvCell.from_published({"out_depth": 3, "filter_size": 3, "layer_norm": True}, 3, (5, 5), form="ugrnn")
    with pytest.raises(ValueError, match=r"form: expected one of .*got 'deep'"):
        ConvCell.from_published({}, 3, (5, 5), form="deep")
    with pytest.raises(ValueError, match="feedback_channels: a gru cell reads no such input"):
        ConvCell.from_published({"out_depth": 3, "filter_size": 3}, 3, (5, 5), form="gru", feedback_channels=2)
    with pytest.raises(ValueError, match="config: expected a mapping"):
        ConvCell.from_published([("out_depth", 3)], 3, (5, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_kernel_size": 7}, r"gate_kernel_size: expected at most the size of the map, 5 x 4, got 7 x 7"),
        ({"tau_kernel_size": (3, 5)}, r"tau_kernel_size: expected at most the size of the map, 5 x 4, got 3 x 5"),
        ({"tau_bias": 1.0}, "tau_bias: the shallow form has no such term .expected form='median'., got 1.0"),
        ({"input_to_gate": True}, "input_to_gate: the shallow form has no such term"),
        ({"form": "median", "separable_repeat": True}, "separable_repeat: the median form has no such convolutions"),
        ({"separable_repeat": True}, "separable_repeat: expected a separable convolution"),
        ({"form": "median", "gate_kernel_size": 3, "gate_bias": 1.0}, "gate_bias: it has no effect on separable convolutions"),
        ({"gate_kernel_size": 0, "cell_to_out": True}, "cell_to_out: there is no cell memory and no gate with a gate kernel of size 0"),
        ({"gate_kernel_sizes": 3}, "options: a reciprocal gated cell has no option 'gate_kernel_sizes', did you mean 'gate_kernel_size'"),
        ({"form": "deep"}, r"form: expected one of \['shallow', 'median'\], got 'deep'"),
        ({"layer_norm": "yes"}, "layer_norm: expected true or false, got 'yes'"),
        ({"cell_channels": 0}, "cell_channels: expected at least 1, got 0"),
        ({"residual_channels": 3, "residual_to_out_gate": False}, "residual_channels: with these options nothing reads that input"),
        (
            {"feedback_channels": 3, "feedback_entry": "cell"},
            r"feedback_entry: the shallow form adds .*feedback_channels = 4 \(one source\)",
        ),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvCell("rgc", 4, 4, (5, 4), **options)


def test_refuses_kernels_larger_than_the_map_of_any_cell() -> None:
    with pytest.raises(ValueError, match="kernel_size: expected at most the size of the map, 2 x 2, got 3 x 3"):
        ConvCell("gru", 3, 3, (2, 2), kernel_size=3)
    assert ConvCell("gru", 3, 3, (2, 2)).get_parameter("ConvGRUCell.gates.weight").shape == (6, 6, 3, 3)  # as published
    with pytest.raises(ValueError, match="form: rgc_median is the median form already"):
        ConvCell("rgc_median", 3, 3, (8, 8), form="shallow")


def test_refuses_feedback_that_takes_no_time() -> None:
    areas = (Area("low", 2, norm=Norm.NONE), Area("top", 2, norm=Norm.NONE))
    up = (Connection("image", "low", Role.BOTTOM_UP), Connection("low", "top", Role.BOTTOM_UP, delay=0))
    down = Connection("top", "low", Role.TOP_DOWN, Operator.IDENTITY, delay=0)
    with pytest.raises(ValueError, match=r"connection top -> low \(top_down\): it has no delay, .*or give the connection delay=1"):
        Network("n", (Input("image", 1, 4, 4),), areas, (*up, down))
