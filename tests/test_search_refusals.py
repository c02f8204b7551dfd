"""What a search refuses: choices that make no sense, by the name of the option."""

from __future__ import annotations

from typing import Any

import pytest

from rnndyn_fast.graph.spec.network import Area, Connection, Input, Network, Role
from rnndyn_fast.nn import ConvCell
from rnndyn_fast.search import Architecture, SearchConfig, Space, build_network

pytest.importorskip("optuna")

RECIPROCAL: dict[str, Any] = {"depth": 2, "cell": "reciprocal"}


def named(**choices: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(choices.items())


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        # kernels larger than the map
        ({"stem_kernel_size": 17}, 8, "stem_kernel_size: expected at most 15 on 8 px, got 17"),
        ({"depth": 3, "kernel_size": 5}, 8, "kernel_size: expected at most 3 on the map of layer 3, 2 x 2, got 5"),
        ({"cell": "gru", "cell_kernel_size": 9}, 8, "cell_kernel_size: .* layer 2, 4 x 4, got 9"),
        ({"feedback": ((2, 1),), "feedback_kernel_size": 17}, 8, "feedback_kernel_size: .* layer 1, 8 x 8, got 17"),
        ({**RECIPROCAL, "reciprocal": named(rgc_tau_kernel_size=8)}, 8, "rgc_tau_kernel_size: .* layer 2, 4 x 4, got 8"),
        ({**RECIPROCAL, "layers": ((2, "rgc_gate_kernel_size", 9),)}, 8, "rgc_gate_kernel_size: .* layer 2, 4 x 4, got 9"),
        ({"stem_stride": 2, "kernel_size": 9}, 8, "kernel_size: .* layer 1, 4 x 4, got 9"),
        # too many layers
        ({"stem_stride": 4}, 8, "depth, stem_stride: 2 layers after a stem of stride 4 make maps of 8 px smaller than 2 x 2"),
        # feedback that is none, or that would read what is not there yet
        ({"feedback": ((1, 2),)}, 8, r"feedback: expected pairs \(from, to\)"),
        ({"feedback": ((2, 2),)}, 8, r"feedback: expected pairs \(from, to\)"),
        ({"feedback": (2, 1)}, 8, r"feedback: expected pairs \(from, to\) of layers, got \(2, 1\)"),
        ({"feedback": True}, 8, r"feedback: expected pairs \(from, to\) of layers, got True"),
        # values of another kind
        ({"bypass": 2}, 8, "bypass: expected true or false, got 2"),
        ({"gating": "no"}, 8, "gating: expected true or false, got 'no'"),
        ({"layers": ((1, "peepholes", "x"),)}, 8, "peepholes: expected true or false"),
        ({"growth": float("inf")}, 8, "growth: expected a positive finite number, got inf"),
        ({"memory_ratio": "half"}, 8, "memory_ratio: expected a positive finite number, got 'half'"),
        ({"stem_stride": 0}, 8, "stem_stride: expected an int of at least 1, got 0"),
        # one choice twice
        ({"layers": ((1, "cell", "gru"), (1, "cell", "lstm"))}, 8, "layers: expected each choice of a layer once, got layer1_cell twice"),
        ({}, 8.0, "image_size: expected an int of at least 1, got 8.0"),
    ],
)
def test_architectures(options: dict[str, Any], size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(Architecture(**options), image_size=size, num_classes=5)


def test_kernels_that_mean_nothing_may_have_any_size() -> None:
    """Of a cell or feedback that is not there, the published ones, which are cut."""
    for options in ({"cell": "feedforward", "cell_kernel_size": 19}, {"feedback_kernel_size": 19}, {"cell": "rgc_separable"}, RECIPROCAL):
        build_network(Architecture(**options), image_size=4, num_classes=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": {"low": 4, "high": 8, "step": -1}}, "space: width: expected a step of more than 0"),
        ({"width": {"low": 4, "high": 8, "step": 40}}, "space: width: expected a step of .* at most high - low"),
        ({"width": {"low": 4, "high": 8, "step": 1.5}}, "space: width: expected an int as step between ints"),
        ({"stem_stride": [1, 0]}, "stem_stride: expected an int of at least 1, got 0"),
        ({"feedback_2_2": [True, False]}, "space: feedback_2_2: expected feedback from a layer to one below it"),
        ({"bypass": {"low": 0, "high": 1}}, "space: bypass: expected bool"),
    ],
)
def test_spaces(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space.from_plain(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": ""}, "storage: expected a database URL, got ''"),
        ({"study": ""}, "study: expected a name, got ''"),
        ({"pruning_epochs": 9}, "pruning_epochs: expected at most the 4 epochs of a trial, got 9"),
        ({"minimise": "parameters"}, "pruner: with two objectives no trial can be pruned"),
        ({"minimise": "parameters", "pruner": "none", "sampler": "cmaes"}, "sampler: CMA-ES has one objective"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(data="d", out="o", **options)
    SearchConfig(data="d", out="o", pruner="none", pruning_epochs=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_residual": True}, "out_residual: there is no residual input to read, expected residual_channels too"),
        ({"residual_to_out_gate": True}, "residual_to_out_gate: there is no residual input"),
        ({"feedback_entry": "cell"}, "feedback_entry: there is no feedback to read, expected feedback_channels too"),
        ({"gate_kernel_size": 0, "cell_residual": True, "residual_channels": 4}, "cell_residual: there is no cell memory"),
        ({"gate_kernel_size": 9}, "gate_kernel_size: expected at most the size of the map, 6 x 6, got 9 x 9"),
    ],
)
def test_cells(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvCell("rgc", 4, 4, (6, 6), **options)


def test_feedback_that_skips_time() -> None:
    """From a later area to an earlier one there is no connection within a time step."""
    with pytest.raises(ValueError, match=r"high -> low .*it has no delay, so 'high' must stand before 'low' in areas .*delay=1"):
        Network(
            "n",
            (Input("image", 3, 8, 8),),
            (Area("low", 4), Area("high", 4)),
            (
                Connection("image", "low", Role.BOTTOM_UP, kernel_size=3),
                Connection("low", "high", Role.BOTTOM_UP, kernel_size=3),
                Connection("high", "low", Role.TOP_DOWN, kernel_size=3, delay=0),
            ),
        )
