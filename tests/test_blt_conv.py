"""BLTConv: the golden single steps, its options, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

from rnndyn_fast.nn import BLTConv

GOLDEN_CASES = [
    f"{interaction}_lateral{lateral}_topdown{topdown}_k{k}"
    for interaction in ("additive", "multiplicative")
    for lateral in (0, 1)
    for topdown in (0, 1)
    for k in (3, 5)
] + ["additive_bias_k3"]
INPUTS = ("in_bottom_up", "in_lateral", "in_top_down")


def test_every_golden_case_is_here() -> None:
    assert {key.split("/")[0] for key in golden("blt_conv")} == set(GOLDEN_CASES)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name: str, backend: str) -> None:
    data = {k.split("/", 1)[1]: torch.from_numpy(v) for k, v in golden("blt_conv").items() if k.startswith(f"{name}/")}
    out_chan, in_chan, k, _ = data["param/bottom_up.weight"].shape
    layer = BLTConv(
        in_chan, out_chan, k, "in_lateral" in data, "in_top_down" in data, name.split("_")[0], k == 3,
        "param/bottom_up.bias" in data,
        backend,
    )  # fmt: skip
    layer.load_state_dict({key[6:]: v for key, v in data.items() if key.startswith("param/")}, strict=True)
    inputs = [data[key].clone().requires_grad_() if key in data else None for key in INPUTS]
    out = layer(*inputs)
    torch.testing.assert_close(out, data["out"], rtol=1e-4, atol=1e-5)
    out.backward(data["grad_out"])
    grads: dict[str, Any] = {f"grad_{key}": x.grad for key, x in zip(INPUTS, inputs, strict=True) if x is not None}
    grads |= {f"grad_param/{n}": p.grad for n, p in layer.named_parameters()}
    assert grads.keys() == {key for key in data if key.startswith("grad_") and key != "grad_out"}
    for key, grad in grads.items():
        torch.testing.assert_close(grad, data[key], rtol=1e-3, atol=1e-4 * float(data[key].abs().max()))


def layer_and_inputs(**options: Any) -> tuple[BLTConv, list[Tensor]]:
    layer = BLTConv(3, 4, 3, **options)
    return layer, [torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]


@pytest.mark.parametrize("interaction", ["additive", "multiplicative"])
def test_native_equals_reference_for_any_subset_of_inputs(interaction: str) -> None:
    layer, inputs = layer_and_inputs(LT_interaction=interaction, bias=True)
    layer.double()
    for lateral in (True, False):
        for topdown in (True, False):
            given = [x.double() if keep else None for x, keep in zip(inputs, (True, lateral, topdown), strict=True)]
            results = []
            for layer.backend in ("native", "reference"):
                layer.zero_grad()
                out = layer(*given)
                out.pow(2).sum().backward()
                results.append([out.detach(), *(p.grad for p in layer.parameters())])
            for ours, theirs in zip(*results, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_inputs_of_connections_that_are_off_are_ignored() -> None:
    layer, (x, lateral, top_down) = layer_and_inputs(lateral_connection=False, topdown_connection=False)
    assert [n for n, _ in layer.named_parameters()] == ["bottom_up.weight"]
    assert torch.equal(layer(x, lateral, top_down), layer(x))


def test_layer_inside_autograd_and_odd_maps() -> None:
    layer = BLTConv(3, 4, 5, topdown_connection=False, pool_input=True)
    x = torch.randn(1, 3, 9, 7)
    out = layer(x, torch.randn(1, 4, 4, 3))
    assert out.shape == (1, 4, 4, 3)
    assert torch.isfinite(torch.autograd.grad(out.sum(), layer.bottom_up.weight)[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, h, u: (x[0],), ValueError, r"b_input: expected \[N, C, H, W\], got \[3, 16, 16\]"),
        (lambda x, h, u: (x[:, :2],), ValueError, r"b_input: expected \[N, 3, 16, 16\].*got \[2, 2, 16, 16\]"),
        (lambda x, h, u: (x, h[:, :, :4]), ValueError, r"l_input: expected \[N, 4, 8, 8\].*got \[2, 4, 4, 8\]"),
        (lambda x, h, u: (x, h, u[:, :4]), ValueError, r"t_input: expected \[N, 8, 4, 4\].*got \[2, 4, 4, 4\]"),
        (lambda x, h, u: (x, h[:1]), ValueError, "l_input: expected N = 2 like the first input, got 1"),
        (lambda x, h, u: (x, None, u[:1]), ValueError, "t_input: expected N = 2"),
        (lambda x, h, u: (x[:0],), ValueError, "b_input: .*empty batch"),
        (lambda x, h, u: (x[:, :, :1],), ValueError, r"b_input: the map \[1, 16\] is too small"),
        (lambda x, h, u: (x[:, :, :14], None, u), ValueError, "t_input: .* odd size 7 x 8"),
        (lambda x, h, u: (x.int(),), TypeError, "b_input: expected a floating-point tensor"),
        (
            lambda x, h, u: (x.double(),),
            TypeError,
            "b_input: expected torch.float32 on cpu like parameter 'bottom_up.weight'",
        ),
        (lambda x, h, u: (x, h.double()), TypeError, "l_input: expected torch.float32"),
        (lambda x, h, u: (x.to("meta"),), TypeError, "b_input: .*meta"),
        (lambda x, h, u: (x.numpy(),), TypeError, "b_input: expected a torch.Tensor, got ndarray"),
        (lambda x, h, u: (x, [h]), TypeError, "l_input: expected a torch.Tensor, got list"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    layer, inputs = layer_and_inputs()
    with pytest.raises(error, match=message):
        layer(*call(*inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size: expected a positive odd number, got 4"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"in_chan": 0}, "in_chan: expected at least 1, got 0"),
        ({"out_chan": -1}, "out_chan: expected at least 1, got -1"),
        ({"LT_interaction": "divisive"}, "LT_interaction: expected 'additive' or 'multiplicative', got 'divisive'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLTConv(**({"in_chan": 3, "out_chan": 4, "kernel_size": 3} | options))
