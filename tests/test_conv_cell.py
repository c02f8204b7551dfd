"""Cells as layers against the golden runs of the published ones: outputs, states and gradients, a step and a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.graph.spec.network import SAME, Activation, Area, Connection, Input, Network, Norm, Operator, Pool, Role
from rnndyn_fast.models.checkpoint_names import load_mapped
from rnndyn_fast.models.convrnn_checkpoint import entries_of
from rnndyn_fast.nn import ConvCell, RecurrentNetwork
from rnndyn_fast.nn.cell_graphs import add_cell
from rnndyn_fast.nn.decoders import (
    ConfidenceAverage,
    Decoder,
    Last,
    LearnedAverage,
    MaxConfidence,
    Threshold,
    TimeMax,
    WeightedAverage,
)  # fmt: skip
from rnndyn_fast.nn.graph_builder import CellSpec, Graph, Source, bypass

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "simplernn": ("simplernn", {}),
    "simplernn_layernorm": ("simplernn", {"layer_norm": True}),
    "gru": ("gru", {}),
    "gru_layernorm": ("gru", {"layer_norm": True}),
    "lstm": ("lstm", {}),
    "lstm_layernorm_k2": ("lstm", {"layer_norm": True, "kernel_size": 2, "forget_bias": 1.3561755203084322}),
    "lstm_layernorm_peephole": ("lstm", {"layer_norm": True, "peepholes": True, "forget_bias": 0.977962918535079}),
    "ugrnn": ("ugrnn", {}),
    "intersectionrnn": ("intersectionrnn", {}),
    "intersectionrnn_layernorm": ("intersectionrnn", {"layer_norm": True}),
    "rgc_shallow": ("rgc_shallow", {}),
    "rgc_median_nofb_identity": ("rgc_median", {"cell_channels": 3}),
    "rgc_median_clipped_k": ("rgc_median", {"cell_channels": 3}),
    "rgc_median_fb_proj": ("rgc_median", {"cell_channels": 3}),
}


def maps(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).to(dtype)


def golden_cell(name: str, dtype: torch.dtype, **extra: Any) -> tuple[ConvCell, dict[str, np.ndarray]]:
    data, (kind, options) = golden(f"convrnn_{name}"), CASES[name]
    channels = data["zero_init__output_seq"].shape[-1]
    height, width, in_channels = data["input_seq"].shape[2:]
    for key in ("residual", "feedback"):
        if f"{key}_input_seq" in data:
            options = {**options, f"{key}_channels": data[f"{key}_input_seq"].shape[-1]}
    cell = ConvCell(kind, in_channels, channels, (height, width), **options, **extra)
    arrays = {k.removeprefix("weight__").replace("__", "/"): v for k, v in data.items() if k.startswith("weight__")}
    load_mapped(cell, arrays, entries_of([n for n, _ in cell.named_parameters()], kind), {})
    return cell.to(dtype), data


def optional_inputs(data: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: maps(data[f"{key}_input_seq"], dtype) for key in ("residual", "feedback") if f"{key}_input_seq" in data}


def close(got: Tensor, expected: Tensor, what: str, *, gradient: bool = False) -> None:
    """Within what the golden files promise."""
    atol, rtol = (1e-4, 1e-4) if gradient else (2e-5, 1e-5)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_golden_cells(name: str, dtype: torch.dtype, backend: str) -> None:
    cell, data = golden_cell(name, dtype, backend=backend)
    x, extra = maps(data["input_seq"], dtype), optional_inputs(data, dtype)
    outputs, states = cell.sequence(x, **extra)
    close(outputs, maps(data["zero_init__output_seq"], dtype), "outputs from zero")
    close(states, maps(data["zero_init__state_seq"], dtype), "states from zero")

    x.requires_grad_(True)
    initial = maps(data["random_init__initial_state"], dtype).requires_grad_(True)
    extra = {key: value.requires_grad_(True) for key, value in extra.items()}
    outputs, states = cell.sequence(x, initial, **extra)
    close(outputs, maps(data["random_init__output_seq"], dtype), "outputs")
    close(states, maps(data["random_init__state_seq"], dtype), "states")
    (outputs * maps(data["random_init__grad_of_output_seq"], dtype)).sum().backward()
    close(x.grad, maps(data["random_init__grad_input_seq"], dtype), "x", gradient=True)
    close(initial.grad, maps(data["random_init__grad_initial_state"], dtype), "initial", gradient=True)
    for key, value in extra.items():
        close(value.grad, maps(data[f"random_init__grad_{key}_input_seq"], dtype), key, gradient=True)
    prefix = "random_init__grad_weight__"
    arrays = {k.removeprefix(prefix).replace("__", "/"): v for k, v in data.items() if k.startswith(prefix)}
    for entry in entries_of([n for n, _ in cell.named_parameters()], cell.kind):
        expected = torch.from_numpy(entry.convert(*(arrays[n] for n in entry.theirs)).copy()).to(dtype)
        close(cell.get_parameter(entry.ours).grad, expected, entry.ours, gradient=True)


@pytest.mark.parametrize("name", ["lstm", "rgc_median_fb_proj", "intersectionrnn", "gru"])
def test_steps_are_the_sequence(name: str) -> None:
    cell, data = golden_cell(name, torch.float64, backend="reference")
    x, extra = maps(data["input_seq"], torch.float64), optional_inputs(data, torch.float64)
    state = maps(data["random_init__initial_state"], torch.float64)
    outputs, states = cell.sequence(x, state, **extra)
    for t in range(len(x)):
        y, state = cell(x[t], state, **{key: value[t] for key, value in extra.items()})
        torch.testing.assert_close(y, outputs[t])
        torch.testing.assert_close(state, states[t])


def node(style: str, data: dict[str, np.ndarray]) -> RecurrentNetwork:
    """A whole layer with a time decay, as in the networks of that size."""
    height, width, channels = data["input_seq"].shape[2:]
    graph, x = Graph(), Source("x", channels, 0)
    elu = Activation.ELU if style == "intermediate" else Activation.IDENTITY
    graph.areas.append(Area("pre", 4, norm=Norm.NONE, activation=elu))
    graph.conv(x, "pre", Role.BOTTOM_UP, 3, "pre_0", bias=True)
    add_cell(graph, "timedecay", CellSpec("cell", Source("pre", 4), 4, ""))
    last = "cell"
    if style == "intermediate":
        graph.areas.append(Area("post", 4, norm=Norm.NONE, activation=Activation.ELU))
        graph.conv(Source("cell", 4), "post", Role.BOTTOM_UP, 3, "post_0", bias=True)
        bypass(graph, x, "post", 4, "post_1.residual_add")
        last = "post"
    graph.areas.append(Area("out", 4, norm=Norm.NONE, activation=Activation.IDENTITY))
    graph.identity(Source(last, 4), "out", Role.BOTTOM_UP, pool=Pool.MAX_SAME)
    network = Network(style, (Input("x", channels, height, width, frames=True),), tuple(graph.areas), tuple(graph.connections))
    return RecurrentNetwork(network, len(data["input_seq"]), backend="reference")


@pytest.mark.parametrize("style", ["shallow", "intermediate"])
def test_golden_decaying_layers(style: str) -> None:
    data = golden(f"convrnn_timedecay_{style}_node")
    net = node(style, data)
    arrays = {k.removeprefix("weight__").replace("__", "/"): v for k, v in data.items() if k.startswith("weight__")}
    arrays["cell/memory_decay"] = arrays.pop("memory_decay")
    load_mapped(net, arrays, entries_of([n for n, _ in net.named_parameters()], "timedecay"), {})
    net.double()
    out, cell = net.states((maps(data["input_seq"], torch.float64),), ("out", "cell"))
    close(out, maps(data["zero_init__output_seq"], torch.float64), "outputs")
    close(cell, maps(data["zero_init__state_seq"], torch.float64), "states")


# ---------------------------------------------------------------- spatial words


def spatial(connections: list[Connection], inputs: dict[str, np.ndarray], channels: int, parameters: dict[str, np.ndarray]) -> Tensor:
    nodes = [Input(name, v.shape[-1], *v.shape[1:3]) for name, v in inputs.items()]
    area = Area("a", channels, norm=Norm.NONE, activation=Activation.IDENTITY)
    net = RecurrentNetwork(Network("spatial", tuple(nodes), (area,), tuple(connections)), 1, backend="reference")
    load_mapped(net, parameters, entries_of([n for n, _ in net.named_parameters()], ""), {})
    return net.double().states([maps(v, torch.float64) for v in inputs.values()], ("a",))[0][0]


def test_golden_spatial_words() -> None:
    data = golden("convrnn_spatial_ops")
    seen = 0
    for key in (k for k in data if k.endswith("__input")):
        case = key.removesuffix("__input")
        x, expected = data[key], maps(data[f"{case}__output"], torch.float64)
        parameters: dict[str, np.ndarray] = {}
        size = Input("size", 1, *expected.shape[2:])
        if case.startswith("resize"):
            connections = [
                Connection("size", "a", Role.BOTTOM_UP, parameter="zero"),
                Connection("x", "a", Role.TOP_DOWN, Operator.IDENTITY, resize=True),
            ]
            net = Network(
                "r",
                (Input("x", 3, *x.shape[1:3]), size),
                (Area("a", 3, norm=Norm.NONE, activation=Activation.IDENTITY),),
                tuple(connections),
            )
            module = RecurrentNetwork(net, 1, backend="reference").double()
            blank = torch.zeros(len(x), 1, *expected.shape[2:], dtype=torch.float64)
            got = module.states([maps(x, torch.float64), blank], ("a",))[0][0]
        elif case.startswith("maxpool"):
            got = spatial([Connection("x", "a", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MAX_SAME)], {"x": x}, 3, {})
        else:
            kernel, stride = int(case.split("_k")[1][0]), int(case.split("_s")[1][0])
            parameters = {f"pre_0/{kind}": data[f"weight__{case}__{kind}"] for kind in ("weights_basenet", "bias")}
            connection = Connection("x", "a", Role.BOTTOM_UP, Operator.CONV, kernel, stride, SAME, bias=True, parameter="pre_0")
            got = spatial([connection], {"x": x}, 4, parameters)
        close(got, expected, case)
        seen += 1
    assert seen == 15


def test_golden_merge_of_inputs() -> None:
    """Resized and concatenated: every source's channels pass through identities of the right place in one weight."""
    data = golden("convrnn_spatial_ops")
    expected = maps(data["harbor_concat__output"], torch.float64)
    sources = {"feedforward_conv6": (0, 4), "feedback_conv10": (4, 3), "feedback_conv9": (7, 2)}
    connections = [
        Connection(name, "a", Role.BOTTOM_UP if i == 0 else Role.TOP_DOWN, resize=i > 0, parameter="post_0", concat=(first, 9))
        for i, (name, (first, _)) in enumerate(sources.items())
    ]
    eye = np.eye(9, dtype=np.float32)[None, None]
    got = spatial(connections, {name: data[f"harbor_{name}"] for name in sources}, 9, {"post_0/weights": eye})
    close(got, expected, "merge")


def test_golden_bypass() -> None:
    data = golden("convrnn_spatial_ops")
    for case in ("same_shape", "channel_mismatch", "spatial_mismatch"):
        other = data[f"residual_add__{case}_bypass"]
        main = Connection("main", "a", Role.BOTTOM_UP, Operator.IDENTITY)
        parameters = {}
        if case == "same_shape":
            second = Connection("bypass", "a", Role.TOP_DOWN, Operator.IDENTITY, delay=0)
        else:
            second = Connection("bypass", "a", Role.TOP_DOWN, resize=case.startswith("spatial"), parameter="residual_add", delay=0)
            parameters = {"residual_add_weights": data[f"weight__residual_add_{case.split('_')[0]}__residual_add_weights"]}
        got = spatial([main, second], {"main": data["residual_add__main"], "bypass": other}, 5, parameters)
        close(got, maps(data[f"residual_add__{case}__output"], torch.float64), case)


# ---------------------------------------------------------------- decoders


def test_golden_decoders() -> None:
    data = golden("convrnn_decoders")
    logits = torch.from_numpy(data["logits_batch_time_class"]).double().transpose(0, 1)
    cases: dict[str, Decoder] = {
        "last": Last(), "max_conf_beta1": MaxConfidence(), "max_conf_trainable": MaxConfidence(), "thresh": Threshold(),
        "thresh_trainable": Threshold(learned=True), "time_max": TimeMax(), "w_avg": WeightedAverage(), "w_time_avg": ConfidenceAverage(),
        "w_avg_t": LearnedAverage(8, 8),
    }  # fmt: skip
    ours = {"normalize__softmax_beta": "softmax_beta", "probs__softmax_beta": "softmax_beta", "alpha__softmax_beta": "alpha_beta"}
    for name, decoder in cases.items():
        decoder.double()
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.fill_(1.0)
            for key in (k for k in data if k.startswith(f"param__{name}__")):
                suffix = key.removeprefix(f"param__{name}__")
                decoder.get_buffer(suffix).copy_(torch.from_numpy(data[key])) if suffix == "decoder_threshold" else decoder.get_parameter(
                    ours.get(suffix, suffix)
                ).copy_(torch.from_numpy(data[key]))
        close(decoder(logits), torch.from_numpy(data[f"output__{name}"]).double(), name)
        if f"time_index__{name}" in data:
            assert decoder.steps is not None
            np.testing.assert_array_equal(decoder.steps.numpy(), data[f"time_index__{name}"].astype(int), err_msg=name)
    close(functional.softmax(logits[-1], -1), torch.from_numpy(data["output__last_softmax"]).double(), "last_softmax")


# ---------------------------------------------------------------- bad input


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of .*got 'rnn'"):
        ConvCell("rnn", 3, 3, (4, 4))
    with pytest.raises(ValueError, match=r"kind: .* got 'convgru', did you mean 'gru'"):
        ConvCell("convgru", 3, 3, (4, 4))
    with pytest.raises(ValueError, match=r"options: a ugrnn cell does not take all of \['peepholes'\]"):
        ConvCell("ugrnn", 3, 3, (4, 4), peepholes=True)
    with pytest.raises(ValueError, match=r"the identity needs equal channels, got 3 and 4 \(port 'input'\)"):
        ConvCell("intersectionrnn", 3, 4, (4, 4))
    with pytest.raises(ValueError, match="residual_channels: a gru cell reads no such input"):
        ConvCell("gru", 3, 4, (4, 4), residual_channels=2)
    cell = ConvCell("rgc_shallow", 4, 4, (4, 4), residual_channels=2)
    with pytest.raises(ValueError, match="residual: expected a tensor, this cell was built with it"):
        cell(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"state: expected \[1, 8, 4, 4\] \(c \+ o\), got \[1, 4, 4, 4\]"):
        cell(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 4, 4))
