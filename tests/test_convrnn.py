"""The published ConvRNNs against their golden runs; parameter counts; checkpoints; presentations; bad input."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from torch import Tensor

from rnndyn_fast.cli import main
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.models import ConvRNN, build, convrnn, load_tf_checkpoint
from rnndyn_fast.models.convrnn_nets import BASES, NAMES, PUBLISHED, _layers, convrnn_network

PARAMETERS = {
    "timedecay": (4_197_739, 16_403_439),
    "simplernn": (6_272_872, 33_512_936),
    "gru": (25_434_472, 67_725_032),
    "lstm": (21_126_248, 84_832_232),
    "ugrnn": (18_355_560, 50_617_832),
    "intersectionrnn": (32_513_384, 84_832_232),
    "rgc": (23_956_840, 15_445_800),
}
RGC_LAYERS = {
    "conv1": 9_472, "conv2": 73_856, "conv3": 147_584, "conv4": 384_064, "conv5": 416_960, "conv6": 1_314_880, "conv7": 1_511_488,
    "conv8": 1_380_160, "conv9": 4_454_208, "conv10": 5_240_128, "imnetds": 513_000,
}  # fmt: skip
MODELS = ["gru_shallow", "lstm_shallow", "rgc_shallow", "rgc_intermediate", "timedecay_intermediate", "ugrnn_intermediate"]
TINY: dict[str, Any] = {"image_size": 96, "num_classes": 5, "widths": dict.fromkeys((f"conv{i}" for i in range(1, 6)), 3)}


@cache
def configs() -> dict[str, Any]:
    golden("convrnn_gru")  # skips or fails where there are no golden files
    return json.loads((GOLDEN / "convrnn_configs.json").read_text())


def golden_model(name: str, dtype: torch.dtype, **options: Any) -> tuple[ConvRNN, dict[str, np.ndarray]]:
    data, config = golden(f"convrnn_model_{name}_tiny"), configs()[f"model_{name}_tiny"]
    depths = {layer: p["out_depth"] for layer, p in config.get("lstm_cell_params", {}).items()}
    net = convrnn(
        name, image_size=tuple(config["input_size"]), num_classes=config["classes"], widths=config["channels"], cell_widths=depths,
        cell_channels=config["cell_depth"] or 64, timesteps=config["time_steps"], **options,
    )  # fmt: skip
    weights = {k.removeprefix("weight__"): v for k, v in data.items() if k.startswith("weight__")}
    report = load_tf_checkpoint(net, weights)
    assert set(report.loaded) == {name for name, _ in net.named_parameters()}
    return net.to(dtype), data


def nchw(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).to(dtype)


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("native", torch.float64), ("native", torch.float32)])
@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name: str, backend: str, dtype: torch.dtype) -> None:
    """Every layer's output at every step, the cells' states after the last one, and the answer."""
    net, data = golden_model(name, dtype, backend=backend)
    layers = [k.removeprefix("output_seq__") for k in data if k.startswith("output_seq__") and "imnetds" not in k]
    cells = {layer: net.state_sources(layer) for layer in net.layers.recurrent}
    # (A memory that is no output, such as an LSTM's c, cannot be recorded: the cells' own golden files have it.)
    outputs = {layer: sources for layer, sources in cells.items() if all(state in (None, "h") for _, state in sources)}
    areas = dict.fromkeys([*layers, "imnetds", *(area for sources in outputs.values() for area, _ in sources)])
    states = dict(zip(areas, net.states((nchw(data["input_image"], dtype),), list(areas)), strict=True))
    for layer in layers:
        close(states[layer], nchw(data[f"output_seq__{layer}"], dtype), layer)
    for layer, sources in outputs.items():
        close(torch.cat([states[area][-1] for area, _ in sources], 1), nchw(data[f"final_state__{layer}"], dtype), layer)
    close(states["imnetds"].flatten(2), torch.from_numpy(data["output_seq__imnetds"]).to(dtype), "imnetds")
    close(net.decoder(states["imnetds"].flatten(2)), torch.from_numpy(data["output_logits_decoded"]).to(dtype), "decoded")


def close(got: Tensor, expected: Tensor, what: str) -> None:
    """Within what the golden files promise for float32."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("base", BASES)
def test_parameter_counts(base: str) -> None:
    net = convrnn_network(base, _layers(base, {}, {}, 64), (224, 224), 1000, 12)
    assert Network.from_json(net.to_json()) == net
    count = {name: int(np.prod(shape)) for name, shape in net.parameter_shapes.items()}
    cell, size = base.split("_")[:2]
    assert sum(count.values()) == PARAMETERS[cell][size == "intermediate"]
    if base == "rgc_intermediate":
        layers = {layer: sum(n for name, n in count.items() if name.split(".")[0] == layer) for layer in RGC_LAYERS}
        assert layers == RGC_LAYERS


def test_initial_values_of_separable_gates() -> None:
    """TensorFlow's fan-in of a depthwise kernel counts all its channels."""
    torch.manual_seed(0)
    net = convrnn("rgc_intermediate", image_size=224, num_classes=5, widths={"conv4": 64, "conv5": 64})
    parameters = dict(net.named_parameters())
    scope = "conv4.ReciprocalGateCell.out.tau"
    depthwise, pointwise = parameters[f"{scope}_depthwise.weight"], parameters[f"{scope}_pointwise.weight"]
    assert float(depthwise.std()) == pytest.approx((0.6393378386273998 / (64 * 7 * 7)) ** 0.5, rel=0.05)
    assert float(pointwise.std()) == pytest.approx((0.6393378386273998 / 64) ** 0.5, rel=0.05)


def test_published_names() -> None:
    assert len(PUBLISHED) == 20
    assert set(PUBLISHED) <= set(NAMES)
    with pytest.raises(ValueError, match=r"name: unknown network 'gru_deep', did you mean 'gru_intermediate'.*'gru_shallow'"):
        convrnn("gru_deep")


def test_config_builds_the_same_network() -> None:
    net = convrnn("ugrnn_shallow", **TINY)
    again = build(net.config)
    assert again.network == net.network
    again.load_state_dict(net.state_dict())
    assert [m.__class__.__name__ for m in net.children()].count("Last") == 1
    assert build({"model": "convrnn", "name": "gru_shallow_tmaxconf", **TINY}).decoder.softmax_beta.shape == (1,)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (16, 12)),
        ({"presentation": "neural"}, (26, 10)),
        ({"presentation": "constant", "timesteps": 9}, (9, None)),
        ({"presentation": "custom", "timesteps": 9, "image_off": 3}, (9, 3)),
        ({"timesteps": 8}, (8, None)),
    ],
)
def test_presentations(options: dict[str, Any], expected: tuple[int, int | None]) -> None:
    net = convrnn("gru_shallow", **TINY, **options)
    assert (net.timesteps, net.network.inputs[0].off_at) == expected


def test_presentation_of_the_longer_networks() -> None:
    net = convrnn("rgc_intermediate_t22_tmaxconf", image_size=64, widths={f"conv{i}": 2 for i in range(1, 11)}, cell_channels=2)
    assert (net.timesteps, net.network.inputs[0].off_at) == (22, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presentation": "brief"}, "presentation: expected one of .*got 'brief'"),
        ({"presentation": "constant"}, "expected timesteps and no image_off, got None and None"),
        ({"image_off": 3}, 'image_off: give it with presentation="custom"'),
        ({"widths": {"conv9": 3}}, r"widths: unknown layers \['conv9'\]; there are \['conv1'"),
        ({"widths": {"conv3": 0}}, r"widths: expected positive ints, got \{'conv3': 0\}"),
        ({"cell_widths": {"conv3": 7}}, r"the identity needs equal channels, got 256 and 7 \(port 'input'\)"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convrnn("intersectionrnn_shallow", **options)


def test_probabilities_begin_with_the_image() -> None:
    """Before step L - 1 the logits are those of any image; from it on they are not."""
    net = convrnn("gru_shallow", **TINY, timesteps=7, backend="reference").eval()
    with torch.no_grad():
        a, b = net.scores(torch.randn(1, 3, 96, 96)), net.scores(torch.randn(1, 3, 96, 96))
        assert [bool((x != y).any()) for x, y in zip(a, b, strict=True)] == [False] * 5 + [True] * 2
        assert net(torch.randn(1, 3, 96, 96)).shape == (2, 1, 5)
    with pytest.raises(ValueError, match="timesteps: the readout begins at step 5, got 5"):
        convrnn("gru_shallow", **TINY, timesteps=5, backend="reference")(torch.randn(1, 3, 96, 96))


# ---------------------------------------------------------------- checkpoints


def checkpoint() -> tuple[ConvRNN, dict[str, np.ndarray]]:
    net, data = golden_model("gru_shallow", torch.float32)
    return net, {f"tnn_model__{k.removeprefix('weight__')}": v for k, v in data.items() if k.startswith("weight__")}


def test_checkpoint_from_npz(tmp_path: Any) -> None:
    net, arrays = checkpoint()
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    np.savez(tmp_path / "c.npz", **{k.replace("__", "/"): v for k, v in arrays.items()})
    report = load_tf_checkpoint(net, tmp_path / "c.npz")
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)
    assert "conv3.ConvGRUCell.gates.weight <- conv3/ConvGRUCell/gates/weights" in str(report)
    assert "ignored conv1/memory_decay: a fixed decay of 0" in str(report)


def test_checkpoint_that_does_not_fit() -> None:
    net, arrays = checkpoint()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    del arrays["tnn_model__conv3__pre_0__bias"]
    arrays["tnn_model__conv3__extra"] = np.zeros(3, np.float32)
    arrays["tnn_model__conv4__pre_0__bias"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match="checkpoint: 3 variables do not fit ConvRNN") as error:
        load_tf_checkpoint(net, arrays)
    for part in ("missing conv3/pre_0/bias", "unexpected conv3/extra [3]", "wrong shape: conv4/pre_0/bias [9] for conv4.pre_0.bias [5]"):
        assert part in str(error.value)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0)
    _, arrays = checkpoint()
    arrays["tnn_model__conv2__memory_decay"] = np.full(1, 0.5, np.float32)
    with pytest.raises(ValueError, match=r"conv2/memory_decay is 0\.5, but this network's layer has no decay"):
        load_tf_checkpoint(net, arrays)
    with pytest.raises(ValueError, match="checkpoint: no file"):
        load_tf_checkpoint(net, "nowhere.npz")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lstm_intermediate --num-classes 10", "conv5.cell = lstm(gates=conv3(conv5.pre, conv5.ConvLSTMCell.gates)"),
        ('blt_vs --model-options {"bio_unroll":false} --timesteps 6 --num-classes 1000', "multiply-adds per image: 63.63 G"),
        ("rcnn_sat --timesteps 2", "BatchNorm[t](conv7(image, RCL_0_BConv) + conv7(layer0, RCL_0_LConv))"),
    ],
)
def test_plan_on_the_command_line(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 0
    assert expected in capsys.readouterr().out
