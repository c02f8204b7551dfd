"""BLT-VS against the golden runs of the published code: single area steps, whole networks, counts, extraction, bad input."""

from __future__ import annotations

import json
from math import gcd
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden, golden_module
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph import Area, Connection, Input, Interaction, Network, Norm, Operator, Pool, Role
from rnndyn_fast.graph.spec.network import FIT, Activation
from rnndyn_fast.models import BLTVS, blt_vs, build
from rnndyn_fast.models.blt_vs_net import AREAS
from rnndyn_fast.program import rollout

LAYERS = ["full", "v1_224", "v4_224", "lgn_224", "retina_224", "td_all_negative"]
NETWORKS = {
    "net128": ["standard_t1", "standard_t3", "standard_t2_single", "standard_t2_no_lateral", "standard_t2_no_topdown",
               "standard_t2_no_skip", "bio_t5", "bio_t10", "bio_t6_single", "bio_t7_no_lateral", "bio_t7_no_topdown"],
    "net224": ["standard_t2"],
}  # fmt: skip
TERMS = ("bu", "bul", "td", "tdl", "sbu", "std")


def part(prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in golden("blt_vs").items() if k.startswith(f"{prefix}/")}


# ---------------------------------------------------------------- single area steps


def step_network(config: dict[str, Any], present: list[str], maps: dict[str, np.ndarray]) -> Network:
    """One step of both streams of an area, its recurrent terms from inputs."""
    i, channels = config["layer_n"], config["channel_sizes"]
    kernels, strides, lateral = config["kernel_sizes"], config["strides"], config["kernel_sizes_lateral"]
    own = channels[i]
    inputs = [Input(name, *maps[name].shape[1:]) for name in present]
    connections: list[Connection] = []

    def term(source: str, name: str, drives: str, modulates: str | None, **options: Any) -> None:
        if source in present:
            options = {"bias": True, "parameter": name, "role": Role.TOP_DOWN, "delay": 0, **options}
            connections.append(Connection(source, drives, port="drive", **options))
            if modulates is not None:
                connections.append(Connection(source, modulates, port="modulator", **options))

    def grouped(name: str, kernel_size: int, source: int) -> dict[str, Any]:
        return {"kernel_size": kernel_size, "groups": gcd(source, own), "middle_channels": own, "middle_bias": True, "role": Role.BOTTOM_UP}

    up = {"kernel_size": kernels[i], "stride": strides[i], "padding": config["paddings"][i], "role": Role.BOTTOM_UP}
    term("bu", "bu_conv", "u", "v", **up)
    down = {"operator": Operator.CONV_TRANSPOSE, "kernel_size": kernels[i + 1], "stride": strides[i + 1], "output_padding": FIT}
    if config["topdown_connections"]:
        term("td", "td_conv", "v", "u", padding=config["paddings"][i + 1], **down)
    if config["lateral_connections"]:
        term("bul", "bu_l_conv", "u", None, **grouped("bul", lateral[i], own))
        if config["topdown_connections"]:
            term("tdl", "td_l_conv", "v", None, **grouped("tdl", lateral[i], own))
    for source, on, stream in (("sbu", "skip_connections_bu", "u"), ("std", "skip_connections_td", "v")):
        if config[on] and source in maps:
            other = "v" if stream == "u" else "u"
            kernel_size = golden_kernel(config, source)
            term(source, f"skip_{source[1:]}", stream, other, **grouped(source, kernel_size, maps[source].shape[1]))
    areas = [
        Area(name, own, Interaction.SQUASHED, Norm.GROUP, Activation.IDENTITY, norm_parameter=f"layer_norm_{norm}",
             drive_activation=Activation.RELU)
        for name, norm in (("u", "bu"), ("v", "td")) if any(c.target == name for c in connections)
    ]  # fmt: skip
    return Network("step", tuple(inputs), tuple(areas), tuple(connections))


def golden_kernel(config: dict[str, Any], source: str) -> int:
    weight = part(f"layer/{config['name']}")[f"param/skip_{source[1:]}_depthwise.weight"]
    return int(weight.shape[-1])


@pytest.mark.parametrize("name", LAYERS)
def test_golden_layers(name: str) -> None:
    data = part(f"layer/{name}")
    config = {**json.loads(str(data["config"])), "name": name}
    maps = {k.removeprefix("in/"): v for k, v in data.items() if k.startswith("in/")}
    cases = sorted({k.split("/")[0] for k in data if k.endswith("/out_bu")})
    assert cases
    for case in cases:
        present = case.split("_")
        used = [term for term in present if step_uses(config, term)]
        network = step_network(config, used, maps)
        parameters = {n: torch.from_numpy(data[f"param/{n}"]).double().requires_grad_(True) for n in network.parameter_shapes}
        inputs = [torch.from_numpy(maps[term]).double().requires_grad_(True) for term in used]
        u, v = rollout(network, 1, inputs, parameters, ("u", "v"), backend="reference")
        for got, stream in ((u, "bu"), (v, "td")):
            torch.testing.assert_close(got[0], torch.from_numpy(data[f"{case}/out_{stream}"]).double(), rtol=1e-4, atol=1e-5)
        gradients = {k.removeprefix(f"{case}/grad_"): g for k, g in data.items() if k.startswith(f"{case}/grad_")}
        if not gradients:
            continue
        weights = [torch.from_numpy(data[f"grad_out/{stream}"]).double() for stream in ("bu", "td")]
        sum((g * w[0]).sum() for g, w in zip(weights, (u, v), strict=True)).backward()
        ours = {f"in/{term}": x.grad for term, x in zip(used, inputs, strict=True)}
        ours |= {f"param/{n}": p.grad for n, p in parameters.items()}
        for key, got in ours.items():
            # (Where a stream is only modulated, its modulator's value has no effect: no gradient there, zeros here.)
            if key in gradients:
                expected = torch.from_numpy(gradients[key]).double()
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
            else:
                assert got is None or not got.any(), key
        assert set(gradients) <= set(ours)


def step_uses(config: dict[str, Any], term: str) -> bool:
    lateral, topdown = config["lateral_connections"], config["topdown_connections"]
    return {
        "bu": True, "bul": lateral, "td": topdown, "tdl": lateral and topdown, "sbu": config["skip_connections_bu"],
        "std": config["skip_connections_td"],
    }[term]  # fmt: skip


@pytest.mark.parametrize("name", ["k3", "k5"])
def test_golden_readout(name: str) -> None:
    data = part(f"readout/{name}")
    config = json.loads(str(data["config"]))
    x = torch.from_numpy(data["in/bu"]).double().requires_grad_(True)
    width, plain = config["out_channels"], {"norm": Norm.NONE, "activation": Activation.IDENTITY}
    network = Network(
        "readout", (Input("x", *x.shape[1:]),),
        (Area("map", width, **plain), Area("td", width, norm=Norm.GROUP, activation=Activation.IDENTITY, norm_parameter="layer_norm_td",
                                           drive_activation=Activation.RELU), Area("logits", width, **plain)),
        (Connection("x", "map", Role.BOTTOM_UP, kernel_size=config["kernel_size"], stride=config["stride"], bias=True,
                    parameter="readout_conv"),
         Connection("map", "td", Role.BOTTOM_UP, Operator.IDENTITY),
         Connection("map", "logits", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN)),
    )  # fmt: skip
    parameters = {n: torch.from_numpy(data[f"param/{n}"]).double().requires_grad_(True) for n in network.parameter_shapes}
    logits, td = rollout(network, 1, [x], parameters, ("logits", "td"), backend="reference")
    logits = logits[0].flatten(1)[:, : config["num_classes"]]
    torch.testing.assert_close(logits, torch.from_numpy(data["out_bu"]).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(td[0], torch.from_numpy(data["out_td"]).double(), rtol=1e-4, atol=1e-5)
    loss = (logits * torch.from_numpy(data["grad_out/bu"])).sum() + (td[0] * torch.from_numpy(data["grad_out/td"])).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, torch.from_numpy(data["grad_in/bu"]).double(), rtol=1e-4, atol=1e-5)
    for n, p in parameters.items():
        torch.testing.assert_close(p.grad, torch.from_numpy(data[f"grad_param/{n}"]).double(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- networks


def golden_net(size: str, name: str, **options: Any) -> tuple[BLTVS, dict[str, np.ndarray]]:
    data = part(f"{size}/{name}")
    config = json.loads(str(data["config"]))
    seed = config.pop("weights_seed")
    net = blt_vs(**config, **options)
    weights = golden_module("seeded_weights").fill([(k, tuple(v.shape)) for k, v in net.state_dict().items()], seed)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    return net, data


def samples(x: Tensor) -> np.ndarray:
    flat = x.detach().flatten().double().numpy()
    return flat[np.linspace(0, flat.size - 1, 16).astype(int)]


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in NETWORKS.items() for name in names])
def test_golden_networks(size: str, name: str) -> None:
    net, data = golden_net(size, name, backend="native")
    shared = part(size)
    net.double()  # (in float32 one relu that decides otherwise moves some gradients by 1e-2)
    image = torch.from_numpy(shared["input"]).double().requires_grad_(True)
    labels = torch.from_numpy(shared["labels"])
    steps = range(net.timesteps)
    readouts, maps = net(image, extract_actvs=True, areas=AREAS, timesteps=steps)
    np.testing.assert_allclose(torch.stack(readouts).detach().numpy(), data["readouts"], atol=2e-5)
    loss = sum(functional.cross_entropy(r, labels) for r in readouts)
    np.testing.assert_allclose(loss.item(), data["loss"], rtol=1e-5)
    check_activations(maps, data, steps)
    loss.backward()
    errors = gradient_errors(net, image, data)
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def check_activations(maps: dict[str, dict[int, dict[str, Tensor]]], data: dict[str, np.ndarray], steps: range) -> None:
    for area in AREAS:
        for stream in ("bu", "td"):
            norms = data.get(f"{stream}_l2/{area}")
            for t in steps:
                got = maps[area][t][stream]
                if norms is None or np.isnan(norms[t]).any():
                    assert not got.any(), (area, stream, t)
                    continue
                norm = got.detach().double().flatten(1).norm(dim=1)
                np.testing.assert_allclose(norm, norms[t], rtol=1e-5, err_msg=f"{area} {stream} {t}")
                expected = data[f"{stream}_samples/{area}"][t]
                for n, x in enumerate(got):
                    np.testing.assert_allclose(samples(x), expected[n], atol=1e-4 * got.abs().max().item(), err_msg=f"{area} {stream} {t}")


def gradient_errors(net: BLTVS, image: Tensor, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Of every parameter and the image: largest error of norm and samples, relative to the norm and the largest sample."""
    errors = {}
    for name, p in net.named_parameters():
        if f"grad_l2/{name}" not in data:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient"
            continue
        assert p.grad is not None, name
        norm, expected = float(data[f"grad_l2/{name}"]), data[f"grad_samples/{name}"]
        scale = max(np.abs(expected).max(), norm / p.numel() ** 0.5, 1e-12)
        errors[name] = max(abs(p.grad.double().norm().item() - norm) / max(norm, 1e-12), np.abs(samples(p.grad) - expected).max() / scale)
    for n, x in enumerate(image.grad):
        norm, expected = float(data["grad_input_l2"][n]), data["grad_input_samples"][n]
        errors[f"image {n}"] = max(abs(x.norm().item() - norm) / norm, np.abs(samples(x) - expected).max() / np.abs(expected).max())
    return errors


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_classes": 1000}, (34_989_732, 16_439_716)),
        ({}, (27_332_427, 13_682_251)),
        ({"lateral_connections": False}, (25_472_523, 11_886_859)),
        ({"topdown_connections": False}, (13_965_131, 7_090_763)),
        ({"skip_connections": False}, (26_799_819, 13_204_939)),
    ],
)
def test_parameter_counts(options: dict[str, Any], expected: tuple[int, int]) -> None:
    for bio in (False, True):
        with torch.device("meta"):
            counts = tuple(sum(p.numel() for p in blt_vs(image_size=s, bio_unroll=bio, **options).parameters()) for s in (224, 128))
        assert counts == expected


def test_no_term_is_computed_twice() -> None:
    """As published nearly every term of the standard unrolling is computed twice: 125.4 G multiply-adds at 224 pixels; 63.6 suffice."""
    with torch.device("meta"):
        schedules = [blt_vs(6, n, bio_unroll=False, image_size=s).schedule() for n, s in ((1000, 224), (565, 128))]
    assert [round(s.multiplications()[0] / 1e9, 1) for s in schedules] == [63.6, 10.8]
    assert [round(s.multiplications()[1] / 1e9) for s in schedules] == [126, 21]
    assert "multiply-adds per image: 63.63 G (every term at every step: 125.7 G)" in str(schedules[0])
    for schedule in schedules:
        for drive in schedule.drives:
            assert len(drive.slots) <= 6
        # (The readout's map goes to two areas as it is; all others have parameters.)
        assert len({(d.source, d.connection.parameter) for d in schedule.drives}) == len(schedule.drives) - 1


def test_areas_wake_one_by_one() -> None:
    with torch.device("meta"):
        net, cut = blt_vs(8), blt_vs(8, skip_connections=False)
    names = (*(f"{name}.bu" for name in AREAS[:-1]), "Readout.logits")
    first = net.schedule(names).first_step
    assert [first[name] for name in names] == [0, 1, 2, 3, 4, 3, 4, 4]
    assert cut.schedule(("LOC.bu",)).first_step["LOC.bu"] == 6


# ---------------------------------------------------------------- interface


def test_extraction_and_hooks() -> None:
    net = blt_vs(2, 4, 2, bio_unroll=False, image_size=128, hook_type="separate", backend="reference").eval()
    seen: dict[str, Any] = {}
    net.get_submodule("V2_1_TD").register_forward_hook(lambda m, i, o: seen.update(td=o))
    with torch.no_grad():
        readouts, maps = net(torch.zeros(1, 3, 128, 128), True, ["V2", "Readout"], [0, 1], concat=True)
        assert [r.shape for r in readouts] == [(1, 4)] * 2
        assert maps["V2"][1].shape == (1, 960, 16, 16)
        assert maps["Readout"] == {}
        torch.testing.assert_close(seen["td"], maps["V2"][1][:, 480:])
        _, maps = net(torch.zeros(1, 3, 128, 128), True, ["Readout"], [1], bu=True, td=False)
        assert set(maps["Readout"][1]) == {"bu"}
        assert maps["Readout"][1]["bu"].shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 96}, r"image_size: expected one of \[128, 224\], got 96"),
        ({"readout_type": "mean"}, r"readout_type: expected one of \['multi', 'single'\], got 'mean'"),
        ({"timesteps": 4}, r"timesteps: area 'Readout.logits' of network 'blt_vs' has no state within 4 time steps \(biological unroll\)"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        blt_vs(**{"image_size": 128, **options})


def test_refuses_extraction_of_what_is_not_there() -> None:
    with torch.device("meta"):
        net = blt_vs(5, image_size=128)
    for arguments, message in (
        ((["V5"], [0]), r"areas: unknown area 'V5'; there are \['Retina'"),
        ((["V1"], [5]), r"timesteps: expected some of 0 .. 4, got 5"),
        ((None, [0]), r"areas: name those to extract; areas are \['Retina'"),
    ):
        with pytest.raises(ValueError, match=message):
            net(torch.zeros(1, 3, 128, 128), True, *arguments)


def test_a_checkpoint_of_the_other_dataset_does_not_fit() -> None:
    net, other = blt_vs(5, 4, 2, image_size=128), blt_vs(5, 5, 2, image_size=128)
    with pytest.raises(RuntimeError, match=r"size mismatch for connections\.Readout\.readout_conv\.weight"):
        net.load_state_dict(other.state_dict())
    assert build(net.config).network == net.network
