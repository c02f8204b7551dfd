"""The wide search space: all options of the reciprocal gated cell, choices of single layers, samplers and pruners."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rnndyn_fast.data import make_dataset
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.graph.spec.yaml_files import network_from_plain, network_to_plain
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.search import SPACES, Architecture, SearchConfig, Space, build_network, count_parameters, load_space, search
from rnndyn_fast.search.architecture import PER_LAYER
from rnndyn_fast.search.reciprocal_choices import DEFAULTS, MEANT
from rnndyn_fast.search.report import completed
from rnndyn_fast.search.storage import finished, open_study

optuna = pytest.importorskip("optuna")


def network(architecture: Architecture, **options: Any) -> Network:
    return build_network(architecture, **{"image_size": 16, "num_classes": 5, **options})


def parameters(architecture: Architecture) -> set[str]:
    return set(network(architecture).parameter_shapes)


def reciprocal(**choices: Any) -> Architecture:
    return Architecture(cell="reciprocal", width=4, norm="none", reciprocal=tuple(choices.items()))


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_random_architectures_of_a_space_are_networks(name: str) -> None:
    """Every draw is a network that runs and is restored from its spec, or says why there is none; every option is drawn and used."""
    space = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    made, infeasible, asked = 0, [], set()
    for k in range(60):
        trial = study.ask()
        architecture, training = space.suggest(trial)
        asked |= trial.params.keys()
        try:
            one = network(architecture, image_size=64)
        except ValueError as error:
            infeasible.append(str(error))
            continue
        made += 1
        assert network_from_plain(network_to_plain(one)) == one
        assert set(training) <= set(trial.params)
        if k % 20 == 0 and count_parameters(one) < 3e6:
            net = RecurrentNetwork(one, 3, backend="reference")
            assert net(torch.zeros(1, 3, 64, 64)).isfinite().all()
    # The shallow form's feedback into the cell has conditions on channels; the highest maps are too small for the largest kernels.
    channels, kernels = "feedback_entry: the shallow form adds the feedback", r"\w*kernel_size: expected at most \d+ on the map of layer 6"
    assert all(re.match(f"{channels}|{kernels}", text) for text in infeasible), infeasible
    assert made >= 35
    assert asked == set(space.open)


def test_paper_space_covers_the_cell() -> None:
    names = set(load_space("paper").choices)
    assert DEFAULTS.keys() <= names | {"rgc_in_out_separable"}
    assert {f"feedback_{i}_{k}" for i in range(2, 7) for k in range(1, i)} <= names
    assert {f"layer{k}_cell" for k in range(1, 7)} <= names
    assert {"timesteps", "loss", "lr", "optimizer"} <= names


@pytest.mark.parametrize(
    ("choices", "there", "absent"),
    [
        ({"rgc_gate_kernel_size": 0}, "out.tau", "cell."),
        ({"rgc_form": "shallow"}, "cell.gate_depthwise", "cell.out_to_cell"),
        ({"rgc_tau_separable": False}, "cell.cell_to_cell.weight", "cell.tau_depthwise"),
        ({"rgc_cell_residual": True}, "cell.residual_to_cell.weight", "res_to_cell_depthwise"),
        ({"rgc_input_to_gate": True}, "out.input_to_out_gate.weight", "input_to_out_tau"),
        ({"rgc_cell_to_out": True}, "out.cell_to_out_pointwise", "out.gate"),
        ({"rgc_layer_norm": True}, "out.layer_norm.weight", "gamma"),
        ({"rgc_input_to_out": False}, "out.tau", "input_to_out"),
    ],
)
def test_options_of_the_cell_reach_the_network(choices: dict[str, Any], there: str, absent: str) -> None:
    own = {name.split("ReciprocalGateCell.")[1] for name in parameters(reciprocal(**choices)) if "ReciprocalGateCell" in name}
    assert any(name.startswith(there) for name in own)
    assert not any(name.startswith(absent) for name in own)


def test_feedback_enters_where_it_is_told_to() -> None:
    for entry, name in (("layer", "feedback_2_1.weight"), ("input", "input.feedback_to_input"), ("cell", "cell.feedback_to_cell"),
                        ("out", "out.feedback_to_out")):  # fmt: skip
        choices = (("rgc_feedback_entry", entry), ("rgc_feedback_activation", "tanh"))
        one = network(Architecture(cell="reciprocal", width=4, feedback=((2, 1),), reciprocal=choices))
        assert any(name in parameter for parameter in one.parameter_shapes), entry
        net = RecurrentNetwork(one, 4, backend="reference").double()
        net(torch.randn(2, 3, 16, 16, dtype=torch.float64))[-1].sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_layers_have_choices_of_their_own() -> None:
    one = Architecture(
        depth=3, width=4, cell="gru", layers=((1, "cell", "feedforward"), (2, "cell", "lstm"), (2, "peepholes", True), (3, "width", 6),
                                              (3, "kernel_size", 5)),
    )  # fmt: skip
    shapes = network(one).parameter_shapes
    assert not any(name.startswith("layer1.") and "Cell" in name for name in shapes)
    assert any("layer2.ConvLSTMCell" in name and name.endswith("peepholes") for name in shapes)
    assert any("layer3.ConvGRUCell" in name for name in shapes)
    assert one.widths == (4, 6, 6)
    assert shapes["layer3.in.bottom_up.weight"] == (6, 6, 5, 5)
    same = Architecture(depth=2, cell="lstm", peepholes=True)
    each = Architecture(depth=2, layers=tuple((k, name, v) for k in (1, 2) for name, v in (("cell", "lstm"), ("peepholes", True))))
    assert network(same) == network(each)
    with pytest.raises(ValueError, match=r"layers: expected \(layer of 1 .. 2, one of .*got \(3, 'cell'\)"):
        Architecture(depth=2, layers=((3, "cell", "gru"),))
    with pytest.raises(ValueError, match=r"cell: expected one of .*got 'grew'"):
        Architecture(depth=2, layers=((2, "cell", "grew"),))
    with pytest.raises(ValueError, match="reciprocal: unknown choice 'rgc_tau', did you mean"):
        reciprocal(rgc_tau=3)


def test_choices_follow_from_choices() -> None:
    """Of a layer without the cell, without its memory, or of another form nothing is asked that means nothing there."""
    space = Space.from_plain({
        "depth": 2, "layer1_cell": ["reciprocal"], "layer2_cell": ["feedforward", "reciprocal"], "layer2_rgc_layer_norm": [True, False],
        "layer3_cell": "gru", "rgc_form": ["shallow", "median"], "rgc_gate_kernel_size": [0, 3], "rgc_tau_bias": [0.0, 1.0],
        "rgc_tau_separable": [True, False], "rgc_cell_residual": [True, False], "rgc_input_to_cell": [True, False],
        "rgc_separable_repeat": [True, False], "rgc_feedback_activation": ["elu", "tanh"], "peepholes": [True, False],
    } | {"depth": 3})  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    seen = set()
    for _ in range(150):
        trial = study.ask()
        architecture, _ = space.suggest(trial)
        p = trial.params
        assert ("layer2_rgc_layer_norm" in p) == (p["layer2_cell"] == "reciprocal")
        assert ("rgc_tau_bias" in p) == (p["rgc_form"] == "median" and not p["rgc_tau_separable"])
        assert ("rgc_cell_residual" in p) == (p["rgc_gate_kernel_size"] == 3)
        assert ("rgc_input_to_cell" in p) == bool(p.get("rgc_cell_residual"))
        assert not {"rgc_feedback_activation", "peepholes"} & p.keys()  # no feedback, no LSTM
        try:
            network(architecture)
        except ValueError as error:
            assert "input_to_cell: nothing enters" in str(error)  # noqa: PT017
        seen |= p.keys()
    assert {"rgc_tau_bias", "rgc_separable_repeat", "layer2_rgc_layer_norm"} <= seen


def test_every_choice_of_the_cell_has_its_condition() -> None:
    assert MEANT.keys() == DEFAULTS.keys()
    assert DEFAULTS.keys() <= set(PER_LAYER)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rgc_gate_kernel": [3]}, "space: unknown choice 'rgc_gate_kernel', did you mean 'rgc_gate_kernel_size'"),
        ({"rgc_form": ["deep"]}, r"form: expected one of \['shallow', 'median'\], got 'deep'"),
        ({"rgc_tau_kernel_size": [0, 3]}, "tau_kernel_size: expected at least 1, got 0"),
        ({"rgc_feedback_entry": ["top"]}, "feedback_entry: expected one of"),
        ({"rgc_layer_norm": [1]}, "space: rgc_layer_norm: expected bool, got 1"),
        ({"layer3_cell": ["gru"], "depth": [1, 2]}, "space: layer3_cell: expected a layer of 1 .. 2"),
        ({"layer1_cel": ["gru"]}, "space: unknown choice 'layer1_cel'"),
        ({"layer1_cell": ["gruu"]}, "cell: expected one of .*got 'gruu'"),
        ({"feedback": [1], "depth": 2}, "space: feedback_2_1: expected true or false, got 1"),
        ({"optimizer": ["adm"]}, "optimizer: expected"),
    ],
)
def test_bad_spaces(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Space.from_plain(values)


# ---------------------------------------------------------------- samplers and pruners


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=64, num_val=32, num_test=20, num_testplus=20)


@pytest.mark.parametrize(
    ("sampler", "pruner", "kinds"),
    [
        ("random", "hyperband", ("RandomSampler", "HyperbandPruner")),
        ("nsga2", "none", ("NSGAIISampler", "NopPruner")),
        ("cmaes", "median", ("CmaEsSampler", "MedianPruner")),
    ],
)
def test_samplers_and_pruners(sampler: Any, pruner: Any, kinds: tuple[str, str], images: Path, tmp_path: Path) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({
        "cell": ["reciprocal", "blt"], "depth": 1, "width": {"low": 2, "high": 6}, "rgc_gate_kernel_size": [0, 3], "norm": "none",
        "lr": {"low": 1e-3, "high": 1e-1, "log": True},
    }))  # fmt: skip
    config = SearchConfig(
        data=str(images), out=str(tmp_path / "s"), space=str(space), trials=5, sampler=sampler, pruner=pruner, startup_trials=2, epochs=2,
        timesteps=2, batch_size=32, backend="reference",
    )  # fmt: skip
    search(config, say=lambda _: None)
    study = open_study(config, create=False)
    assert (type(study.sampler).__name__, type(study.pruner).__name__) == kinds
    assert len(finished(study.get_trials())) == 5
    assert all(trial.state.name == "COMPLETE" for trial in study.get_trials()) or pruner != "none"
    assert {"tpe": "Parzen", "random": "random draws", "nsga2": "NSGA-II", "cmaes": "CMA-ES"}[sampler] in (
        Path(config.out) / "report.html"
    ).read_text()  # fmt: skip


def test_evolution_for_accuracy_and_few_parameters(images: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["feedforward", "blt"], "depth": 1, "width": {"low": 2, "high": 8, "step": 2}}))
    config = SearchConfig(
        data=str(images), out=str(tmp_path / "s"), space=str(space), trials=6, sampler="nsga2", pruner="none", minimise="parameters",
        startup_trials=3, epochs=1, timesteps=2, batch_size=32, backend="reference",
    )  # fmt: skip
    lines: list[str] = []
    search(config, say=lines.append)
    trials = open_study(config, create=False).get_trials()
    assert [t.values[1] for t in trials] == [t.user_attrs["parameters"] for t in trials]
    assert [t.values[0] for t in completed(open_study(config, create=False))] == sorted(
        (t.values[0] for t in trials if "same_as" not in t.user_attrs), reverse=True
    )  # fmt: skip
    assert all("%" in line for line in lines)
    assert "Accuracy against parameters" in (Path(config.out) / "report.html").read_text()
    with pytest.raises(ValueError, match="pruner: with two objectives no trial can be pruned, expected 'none'"):
        SearchConfig(data="d", out="o", minimise="parameters")
    with pytest.raises(ValueError, match="sampler: CMA-ES has one objective"):
        SearchConfig(data="d", out="o", minimise="parameters", pruner="none", sampler="cmaes")


def test_studies_from_before_the_option_go_on(images: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["feedforward", "blt"], "depth": 1, "width": [2, 4]}))
    config = SearchConfig(data=str(images), out=str(tmp_path / "s"), space=str(space), trials=1, epochs=1, timesteps=2, backend="reference")
    search(config, say=lambda _: None)
    study = open_study(config, create=False)
    before = {name: value for name, value in study.user_attrs["settings"].items() if name not in ("sampler", "pruner", "minimise")}
    study.set_user_attr("settings", before)
    search(SearchConfig(**{**config.to_dict(), "trials": 2, "resume": True}), say=lambda _: None)
    with pytest.raises(ValueError, match="other settings: sampler was 'tpe', is 'random'"):
        search(SearchConfig(**{**config.to_dict(), "trials": 3, "resume": True, "sampler": "random"}))


def test_spaces_that_come_along() -> None:
    assert set(SPACES) == {"blt", "cells", "laptop", "paper"}
