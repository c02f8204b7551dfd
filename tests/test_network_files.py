"""Specs as files: round trips, errors, and the way from a file through plan, train and extract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.graph import Area, Connection, Input, Network, Norm, Operator, Pool, Readout, Role, Unroll
from rnndyn_fast.graph.spec.network import Activation
from rnndyn_fast.graph.spec.yaml_files import network_from_plain, network_to_plain, network_yaml, read_network
from rnndyn_fast.models import blt_net_64, build
from rnndyn_fast.ops.cells import LSTM, Gain, ReciprocalGated
from rnndyn_fast.plain_values import plain_values
from rnndyn_fast.train import TrainConfig, load_checkpoint

SMALL = Network(
    "small",
    (Input("image", 3, 16, 16),),
    (Area("low", 4), Area("high", 6, norm=Norm.NONE), Area("gap", 6, norm=Norm.NONE, activation=Activation.IDENTITY)),
    (
        Connection("image", "low", Role.BOTTOM_UP, kernel_size=3),
        Connection("low", "low", Role.LATERAL, kernel_size=3),
        Connection("low", "high", Role.BOTTOM_UP, kernel_size=3, pool=Pool.MAX, bias=True),
        Connection("high", "low", Role.TOP_DOWN, Operator.CONV_TRANSPOSE, kernel_size=3, stride=2),
        Connection("high", "gap", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN),
    ),
    readout=Readout("gap", 10),
)
GATED = Network(
    "gated",
    (Input("image", 3, 8, 8),),
    (
        Area("x", 4, norm=Norm.NONE),
        Area("h", 4, cell=LSTM(forget_bias=0.5), initial=("zero", "zero")),
        Area("o", 4, cell=ReciprocalGated(tau_gain=Gain(0.5, -0.5)), initial="zero"),
    ),
    (
        Connection("image", "x", Role.BOTTOM_UP, kernel_size=3),
        Connection("x", "h", Role.BOTTOM_UP, kernel_size=3, parameter="h.gates", concat=(0, 8)),
        Connection("h", "h", Role.LATERAL, kernel_size=3, parameter="h.gates", concat=(4, 8)),
        Connection("h", "h", Role.LATERAL, Operator.IDENTITY, state="c", port="memory"),
        Connection("h", "o", Role.BOTTOM_UP, kernel_size=2, padding="same"),
    ),
    unroll=Unroll.BIOLOGICAL,
)


@pytest.mark.parametrize("network", [SMALL, GATED, blt_net_64(timesteps=2).network], ids=lambda network: network.name)
def test_round_trip_is_exact_and_short(network: Network, tmp_path: Path) -> None:
    assert network_from_plain(network_to_plain(network)) == network
    text = network_yaml(network)
    assert "output_padding" not in text  # what follows from the rest is left out
    for name in ("spec.yaml", "spec.json"):
        path = tmp_path / name
        path.write_text(text if name.endswith("yaml") else network.to_json())
        assert read_network(path) == network


def test_what_is_left_out_has_its_default() -> None:
    text = """
    name: tiny
    inputs: [{name: image, channels: 3, height: 8, width: 8}]
    areas: [{name: a, channels: 4, eps: 1e-5}]
    connections: [{source: image, target: a, role: bottom_up, kernel_size: 3}]
    """
    network = network_from_plain(yaml.safe_load(text))
    assert network.areas[0] == Area("a", 4)
    assert network.readout is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": []}, "network: unknown field 'area', did you mean 'areas'"),
        ({"areas": [{"name": "low", "chanels": 3}]}, r"areas\[0\]: unknown field 'chanels', did you mean 'channels'"),
        ({"areas": [{"name": "low"}]}, r"areas\[0\]: missing fields \['channels'\]"),
        ({"areas": [3]}, r"areas\[0\]: expected a mapping"),
        ({"areas": {"low": 4}}, "areas: expected a list"),
        ({"areas": [{"name": "low", "channels": "4"}]}, r"areas\[0\]: channels: expected int, got '4'"),
        ({"areas": [{"name": "low", "channels": 4, "eps": "small"}]}, r"areas\[0\]: eps: expected a number, got 'small'"),
        ({"areas": [{"name": "low", "channels": 4, "norm": "batsch"}]}, r"areas\[0\]: 'batsch' is not a valid Norm"),
        ({"unroll": "sideways"}, r"unroll: expected one of \['engineering', 'biological'\], got 'sideways'"),
        ({"readout": {"source": "gapp", "num_classes": 10}}, "readout: unknown area 'gapp'"),
    ],
)
def test_bad_specs(change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        network_from_plain({**network_to_plain(SMALL), **change})


def test_files_that_are_no_specs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"network: no such file: .*absent.yaml"):
        TrainConfig(data="d", out="o", model=str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="cannot be read"):
        read_network(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(TypeError, match="network: expected a mapping"):
        read_network(tmp_path / "list.yaml")


def test_configuration_holds_the_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(network_yaml(SMALL))
    config = TrainConfig(data="d", out="o", model=str(tmp_path / "spec.yaml"))
    assert config.model == "network"
    assert config.network == network_to_plain(SMALL)
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    with pytest.raises(ValueError, match="widths: is part of the spec of a network"):
        TrainConfig(data="d", out="o", model=str(tmp_path / "spec.yaml"), widths=(1, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="did you mean 'blt_net_64'"):
        TrainConfig(data="d", out="o", model="blt_net_65")
    with pytest.raises(ValueError, match="network: expected a spec with model = 'network'"):
        TrainConfig(data="d", out="o", network=network_to_plain(SMALL))
    with pytest.raises(ValueError, match="network: expected num_classes = 12, as in the data, the spec 'small' has 10"):
        build({"model": "network", "network": network_to_plain(SMALL), "num_classes": 12})
    with pytest.raises(ValueError, match=r"one input .* and a readout"):
        build({"model": "network", "network": network_to_plain(GATED)})


def test_plan_train_and_extract_take_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "i.h5", source="digits", size=16, num_train=64, num_val=20, num_test=20, num_testplus=20)
    spec = tmp_path / "spec.yaml"
    spec.write_text(network_yaml(SMALL))
    assert main(["plan", str(spec), "--timesteps", "3"]) == 0
    assert "small: 3 time steps" in capfd.readouterr().out
    common = ["--data", str(data), "--timesteps", "3", "--epochs", "1", "--batch-size", "16", "--threads", "1"]
    assert main(["train", *common, "--model", str(spec), "--out", str(tmp_path / "run")]) == 0
    net, contents = load_checkpoint(tmp_path / "run" / "last.pt")
    assert net.network == SMALL
    assert contents["config"]["network"] == network_to_plain(SMALL)
    # The run's own configuration, without the file, trains the same network to the same weights.
    spec.unlink()
    again = tmp_path / "again"
    assert main(["train", "--config", str(tmp_path / "run" / "train.yaml"), "--out", str(again)]) == 0
    other, _ = load_checkpoint(again / "last.pt")
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert main(["train", "--config", str(again / "train.yaml"), "--epochs", "2", "--resume"]) == 0
    words = ["extract", str(again / "last.pt"), str(data), "--out", str(tmp_path / "r.h5"), "--save", "gap,high"]
    assert main(words) == 0
    assert "20 trajectories" in capfd.readouterr().out
    assert main(["plan", str(again / "train.yaml")]) == 0
    assert main(["train", *common, "--model", "blt_net_65", "--out", str(tmp_path / "no")]) == 2
    assert "did you mean" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [("n.yaml", "name: a\ninputs: []\nname: b\n"), ("n.json", '{"name": "a", "areas": [{"name": "v", "name": "w"}]}')],
)
def test_keys_that_are_there_twice(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="cannot be read: the key 'name' is there twice"):
        read_network(tmp_path / name)


def test_merged_keys_may_be_given_again() -> None:
    assert plain_values("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}
