"""B, BL and the control networks against the golden runs of the published code; per-step batch norms; Keras weights; bad input."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import golden, golden_module
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph import Area, Connection, Input, Network, Norm, Role, compile_schedule
from rnndyn_fast.models import RCNNSAT, build, load_keras_checkpoint, rcnn_sat
from rnndyn_fast.models.checkpoint_names import load_mapped
from rnndyn_fast.models.preprocess import signed_unit
from rnndyn_fast.models.rcnn_sat_nets import EPS, MOMENTUM, keras_entry
from rnndyn_fast.nn import RecurrentNetwork

CASES = [
    "b_tiny", "bl_tiny_t8", "bl_tiny_t8_cumulative", "bl_tiny_t4_train", "b", "b_k", "b_f", "b_d", "b_train", "bl_t1", "bl_t3",
    "bl_t8_cumulative", "bl_t8_train_batch2",
]  # fmt: skip
LARGE = ["bl_t8", "bl_t3_train"]  # with gradients, in float32: a minute each in float64
LAYERS = ["layer_static", "layer_static_train", "layer_dynamic", "layer_dynamic_train"]


def part(name: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{name}/"): v for k, v in golden("rcnn_sat").items() if k.startswith(f"{name}/")}


def test_every_golden_case_is_here() -> None:
    assert {k.split("/")[0] for k in golden("rcnn_sat")} == {*CASES, *LARGE, *LAYERS}


def keras_arrays(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights of a case, under the names and in the layouts of Keras."""
    fill = golden_module("seeded_weights").fill([(f["fill_name"], tuple(f["fill_shape"])) for f in config["fill"]], config["seed"])
    arrays = {}
    for f in config["fill"]:
        value = fill[f["fill_name"]]
        arrays[f["variable"]] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return arrays


def golden_net(name: str) -> tuple[RCNNSAT, dict[str, np.ndarray]]:
    data = part(name)
    config = json.loads(str(data["config"]))
    net = rcnn_sat(
        config["kind"], config["classes"], timesteps=config["timesteps"], cumulative_readout=config["cumulative_readout"],
        image_size=tuple(config["image"][1:3]), width_divisor=config["width_divisor"], backend="native",
    )  # fmt: skip
    load_keras_checkpoint(net, keras_arrays(config))
    return net.to(torch.float32 if name in LARGE else torch.float64).train(config["training"]), data


def samples(array: np.ndarray) -> np.ndarray:
    flat = array.ravel()
    taken = flat[np.unique(np.linspace(0, flat.size - 1, min(16, flat.size)).astype(int))]
    return np.pad(taken, (0, 16 - len(taken)))


def keras_layout(x: Tensor) -> np.ndarray:
    array = x.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


@pytest.mark.parametrize("name", CASES + LARGE)
def test_golden(name: str) -> None:
    net, data = golden_net(name)
    pixels = torch.from_numpy(data["image_uint8"]).permute(0, 3, 1, 2)
    image = (pixels.double() / 127.5 - 1).to(next(net.parameters()).dtype).requires_grad_(True)
    torch.testing.assert_close(signed_unit(pixels).double(), image.detach().double(), rtol=0, atol=1e-7)
    layers = [area.name for area in net.network.areas[:-1]]
    with torch.set_grad_enabled("grad_names" in data):
        log_probs, maps = net(image, record=layers)
        gap = maps[layers[-1]].mean((3, 4))
        logits = functional.linear(gap, net.get_parameter("ReadoutDense.weight"), net.get_parameter("ReadoutDense.bias"))
    # Float32: what the golden files give for the reference itself, times ten.
    tolerance = 1e-9 if name not in LARGE else 2e-4 if "train" in name else 3e-5
    np.testing.assert_allclose(logits.detach(), data["logits_f64"], rtol=0, atol=tolerance * np.abs(data["logits_f64"]).max())
    np.testing.assert_allclose(log_probs.detach().exp(), data["softmax"], atol=2e-2 if name.endswith("batch2") else 5e-5)
    norms = np.stack([[maps[layer][t].detach().double().flatten(1).norm(dim=1) for layer in layers] for t in range(net.timesteps)])
    np.testing.assert_allclose(norms, data["layer_norms_f64"], rtol=tolerance)
    if "moving_names" in data:
        check_statistics(net, data, 1e-3 if name.endswith("batch2") else 2e-5)
    if "grad_names" in data:
        labels = torch.from_numpy(data["labels"].astype(np.int64))
        sum(functional.nll_loss(p, labels) for p in log_probs).backward()
        check_gradients(net, image, data, name in LARGE)


def check_statistics(net: RCNNSAT, data: dict[str, np.ndarray], rtol: float) -> None:
    ours = {e.theirs[0]: net.get_buffer(n) for n, _ in net.named_buffers() if (e := keras_entry(n)) is not None}
    assert len(data["moving_names"]) == len(ours)
    for name, norm, expected in zip(data["moving_names"], data["moving_after_norm"], data["moving_after_samples"], strict=True):
        value = ours[str(name).split(":")[0]].numpy()
        np.testing.assert_allclose(np.linalg.norm(value), norm, rtol=rtol)
        np.testing.assert_allclose(samples(value), expected, rtol=100 * rtol, atol=rtol)


def check_gradients(net: RCNNSAT, image: Tensor, data: dict[str, np.ndarray], single: bool) -> None:
    ours = {e.theirs[0]: p.grad for n, p in net.named_parameters() if (e := keras_entry(n)) is not None}
    errors = {}
    for name, norm, expected in zip(data["grad_names"], data["grad_norm_f64"], data["grad_samples_f64"], strict=True):
        key = str(name).split(":")[0]
        grad = image.grad.permute(0, 2, 3, 1).double().numpy() if key == "input" else keras_layout(ours[key].double())
        errors[key] = max(abs(np.linalg.norm(grad) - norm) / norm, np.abs(samples(grad) - expected).max() / norm)
    # In float32 a tie of a relu or a maximum may be decided differently.
    assert max(errors.values()) < (2e-2 if single else 1e-9), max(errors, key=errors.get)
    assert np.median(list(errors.values())) < (1e-3 if single else 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_golden_layers(name: str) -> None:
    data = part(name)
    c = json.loads(str(data["config"]))
    source = Input("x", c["in_channels"], c["H"], c["W"], frames=not c["static_bottom_up"])
    area = Area("h", c["filters"], norm=Norm.BATCH, norm_parameter="BatchNorm_Time", norm_steps=c["timesteps"], eps=EPS)
    connections = (
        Connection("x", "h", Role.BOTTOM_UP, kernel_size=c["kernel"], parameter="RCL_BConv"),
        Connection("h", "h", Role.LATERAL, kernel_size=c["kernel"], parameter="RCL_LConv"),
    )
    net = RecurrentNetwork(Network("layer", (source,), (area,), connections), c["timesteps"], backend="reference").double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = MOMENTUM
    entries = [e for n in net.state_dict() if (e := keras_entry(n)) is not None]
    load_mapped(net, {k.removeprefix("w/"): v for k, v in data.items() if k.startswith("w/")}, entries, {})
    net.train(c["training"])
    x = torch.from_numpy(data["x"]).double().movedim(-1, -3)
    x = (x[0] if c["static_bottom_up"] else x).clone().requires_grad_(True)
    (output,) = net.states((x,), ("h",))
    np.testing.assert_allclose(output.detach().movedim(-3, -1), data["output_f64"], rtol=1e-10, atol=1e-10)
    (output * torch.from_numpy(data["grad_output"]).double().movedim(-1, -3)).sum().backward()
    grad_x = x.grad.movedim(-3, -1).numpy()
    np.testing.assert_allclose(grad_x.reshape(data["grad/input"].shape), data["grad/input"], rtol=1e-4, atol=1e-4)
    for entry in entries:
        if f"grad/{entry.theirs[0]}" in data:
            expected = entry.convert(data[f"grad/{entry.theirs[0]}"])
            np.testing.assert_allclose(net.get_parameter(entry.ours).grad, expected, rtol=1e-4, atol=1e-4, err_msg=entry.ours)
        if f"after/{entry.theirs[0]}" in data:
            np.testing.assert_allclose(net.get_buffer(entry.ours), data[f"after/{entry.theirs[0]}"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- counts and schedule


@pytest.mark.parametrize(
    ("kind", "timesteps", "expected", "moving"),
    [
        ("b", None, (9_009_258, 10_146_453, 11_037_768), 8_512),
        ("bl", 8, (26_842_410, 27_979_605, 28_870_920), 68_096),
        ("bl", 3, (26_799_850, 27_937_045, 28_828_360), 25_536),
        ("b_k", None, (37_767_530, 38_904_725, 39_796_040), 8_512),
        ("b_f", None, (35_950_794, 38_224_629, 40_006_824), 17_024),
        ("b_d", None, (26_791_338, 27_928_533, 28_819_848), 17_024),
    ],
)
def test_parameter_counts(kind: str, timesteps: int | None, expected: tuple[int, ...], moving: int) -> None:
    with torch.device("meta"):
        nets = [rcnn_sat(kind, n, timesteps=timesteps) for n in (10, 565, 1000)]
    assert tuple(sum(p.numel() for p in net.parameters()) for net in nets) == expected
    assert sum(b.numel() for n, b in nets[0].named_buffers() if "running" in n) == moving


def test_multiply_adds_of_every_step() -> None:
    """Published figures, in G, after 1 .. 8 steps (with the readout's 1.2 M per step, which is no connection)."""
    with torch.device("meta"):
        network = rcnn_sat("bl").network
    counts = [(compile_schedule(network, t, ("gap",)).multiplications()[0] + t * 2048 * 565) / 1e9 for t in range(1, 9)]
    np.testing.assert_allclose(counts, [1.990, 13.634, 25.279, 36.923, 48.568, 60.213, 71.857, 83.502], atol=6e-4)
    schedule = compile_schedule(network, 8, ("gap",))
    assert [d.connection.parameter for d in schedule.drives if d.static] == ["RCL_0_BConv"]
    assert [c.areas for c in schedule.components] == [(f"layer{n}",) for n in range(7)] + [("gap",)]


# ---------------------------------------------------------------- checkpoints and bad input


def test_keras_file(tmp_path: Any) -> None:
    """A file as Keras writes it, of eight steps, into networks of eight and of three."""
    arrays = keras_arrays(json.loads(str(part("bl_tiny_t8")["config"])))
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = sorted({name.split("/")[0] for name in arrays})
        for name, value in arrays.items():
            layer, variable = name.split("/")
            file[f"{layer}/{layer}/{variable}:0"] = value
    net = rcnn_sat("bl", 10, image_size=64, width_divisor=32)
    report = load_keras_checkpoint(net, tmp_path / "w.h5")
    assert len(report.loaded) == 240
    assert report.ignored == {}
    np.testing.assert_array_equal(net.get_parameter("RCL_1_LConv.weight").detach(), arrays["RCL_1_LConv/kernel"].transpose(3, 2, 0, 1))
    short = rcnn_sat("bl", 10, timesteps=3, image_size=64, width_divisor=32)
    report = load_keras_checkpoint(short, tmp_path / "w.h5")
    assert len(report.ignored) == 5 * 7 * 4
    arrays.pop("ReadoutDense/bias")
    with pytest.raises(ValueError, match=r"(?s)2 variables do not fit RCNNSAT.*missing ReadoutDense/bias.*unexpected extra/kernel \[2\]"):
        load_keras_checkpoint(net, {**arrays, "extra/kernel": np.zeros(2)})
    with pytest.raises(ValueError, match=r"(?s)wrong shape: ReadoutDense/kernel \[64, 10\] for ReadoutDense.weight \[565, 64\]"):
        load_keras_checkpoint(rcnn_sat("bl", 565, image_size=64, width_divisor=32), tmp_path / "w.h5")
    with pytest.raises(ValueError, match="checkpoint: no file"):
        load_keras_checkpoint(net, tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "blt"}, r"kind: expected one of \['b', 'bl', 'b_k', 'b_f', 'b_d'\], got 'blt'"),
        ({"kind": "b", "timesteps": 4}, r"timesteps: a feed-forward network \(b\) has one time step, got 4"),
        ({"image_size": 63}, r"image_size: expected at least 64 \(six poolings\), got 63 x 63"),
        ({"width_divisor": 0}, "width_divisor: expected at least 1, got 0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rcnn_sat(**arguments)


def test_longer_than_trained() -> None:
    net = rcnn_sat("bl", 10, timesteps=2, image_size=64, width_divisor=32)
    net.timesteps = 3
    with pytest.raises(ValueError, match="has batch norms for 2 time steps, got 3"):
        net(torch.zeros(2, 3, 64, 64))
    assert build(net.config).network == net.network
    net.timesteps = 1
    with pytest.raises(TypeError, match="timesteps: expected 2, as the network was built, got 1"):
        _ = net.config
