"""The reference rollout against nested loops, and its gradients against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import INTERACTIONS, RolloutCase, down, identity, lateral, linear, up
from torch import Tensor

from rnndyn_fast.graph import Area, Input, Interaction, Network, Norm, Pool, Role
from rnndyn_fast.program import rollout


def _tiny(interaction: Interaction) -> Network:
    return Network(
        "tiny",
        (Input("image", 2, 4, 4),),
        (Area("a", 2, interaction), Area("b", 3, interaction, norm=Norm.NONE), Area("g", 3, interaction)),
        (
            up("image", "a"), lateral("a"), down("b", "a"),
            up("a", "b", pool=Pool.MAX, bias=True), lateral("b", 1, bias=True),
            identity("b", "g", pool=Pool.MEAN), linear("g", "g", Role.LATERAL),
        ),
    )  # fmt: skip


def _loop_conv(x: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    n, _, height, width = x.shape
    out, c, k, _ = w.shape
    y = np.zeros((n, out, height + 2 * padding - k + 1, width + 2 * padding - k + 1))
    for s, o, i, j in np.ndindex(*y.shape):
        for ch, u, v in np.ndindex(c, k, k):
            row, column = i + u - padding, j + v - padding
            if 0 <= row < height and 0 <= column < width:
                y[s, o, i, j] += w[o, ch, u, v] * x[s, ch, row, column]
    return y


def _loop_conv_transpose(x: np.ndarray, w: np.ndarray, stride: int, padding: int, output_padding: int) -> np.ndarray:
    n, _, height, width = x.shape
    _, out, k, _ = w.shape
    size = [(m - 1) * stride - 2 * padding + k + output_padding for m in (height, width)]
    y = np.zeros((n, out, *size))
    for s, ch, i, j in np.ndindex(*x.shape):
        for o, u, v in np.ndindex(out, k, k):
            row, column = i * stride + u - padding, j * stride + v - padding
            if 0 <= row < size[0] and 0 <= column < size[1]:
                y[s, o, row, column] += x[s, ch, i, j] * w[ch, o, u, v]
    return y


def _loop_max_pool(x: np.ndarray) -> np.ndarray:
    n, c, height, width = x.shape
    y = np.empty((n, c, height // 2, width // 2))
    for s, ch, i, j in np.ndindex(*y.shape):
        y[s, ch, i, j] = max(x[s, ch, 2 * i + u, 2 * j + v] for u in (0, 1) for v in (0, 1))
    return y


def _loop_norm_relu(z: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None) -> np.ndarray:
    y = z.copy()
    if gamma is not None and beta is not None:
        for s in range(z.shape[0]):
            mean, var = z[s].mean(), ((z[s] - z[s].mean()) ** 2).mean()
            y[s] = (z[s] - mean) / math.sqrt(var + 1e-5) * gamma.reshape(z[s].shape) + beta.reshape(z[s].shape)
    return np.where(y > 0, y, 0)


@pytest.mark.parametrize("key", INTERACTIONS)
def test_reference_equals_nested_loops(key: str) -> None:
    network, timesteps = _tiny(INTERACTIONS[key]), 3
    case = RolloutCase("tiny", network, ("g", "a", "b"), timesteps)
    x, p = case.inputs()[0].numpy(), {k: v.numpy() for k, v in case.parameters().items()}

    def combine(drive: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        if key == "additive":
            return drive + sum(others)
        return drive * (1 + sum(others)) if others else drive

    states: dict[str, list[np.ndarray]] = {"g": [], "a": [], "b": []}
    for t in range(timesteps):
        others = [_loop_conv(states["a"][-1], p["a.lateral.weight"], 1)] if t else []
        others += [_loop_conv_transpose(states["b"][-1], p["a.top_down.weight"], 2, 1, 1)] if t else []
        a = _loop_norm_relu(combine(_loop_conv(x, p["a.bottom_up.weight"], 1), others), p["a_ln.weight"], p["a_ln.bias"])
        bias = p["b.bottom_up.bias"][None, :, None, None], p["b.lateral.bias"][None, :, None, None]
        others = [_loop_conv(states["b"][-1], p["b.lateral.weight"], 0) + bias[1]] if t else []
        b = _loop_norm_relu(combine(_loop_conv(_loop_max_pool(a), p["b.bottom_up.weight"], 1) + bias[0], others), None, None)
        others = [np.einsum("oc,nchw->nohw", p["g.lateral.weight"], states["g"][-1])] if t else []
        g = _loop_norm_relu(combine(b.mean((2, 3), keepdims=True), others), p["g_ln.weight"], p["g_ln.bias"])
        for name, state in (("a", a), ("b", b), ("g", g)):
            states[name].append(state)
    for backend in ("reference", "native"):
        outputs = rollout(network, timesteps, case.inputs(), case.parameters(), case.record, backend=backend)
        for name, output in zip(case.record, outputs, strict=True):
            np.testing.assert_allclose(output.numpy(), np.stack(states[name]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("key", INTERACTIONS)
def test_reference_gradcheck(key: str) -> None:
    network = Network(
        "check",
        (Input("image", 1, 2, 2),),
        (Area("a", 2, INTERACTIONS[key]), Area("b", 1, INTERACTIONS[key], norm=Norm.NONE)),
        (up("image", "a"), lateral("a", 1), down("b", "a"), up("a", "b", pool=Pool.MAX, bias=True)),
    )
    case = RolloutCase("check", network, ("b", "a"), 2, samples=1)
    parameters = case.parameters()
    leaves = [t.requires_grad_() for t in (*case.inputs(), *parameters.values())]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        names = dict(zip(parameters, tensors[1:], strict=True))
        return tuple(rollout(network, 2, tensors[:1], names, case.record, backend="reference"))

    def native(*tensors: Tensor) -> tuple[Tensor, ...]:
        names = dict(zip(parameters, tensors[1:], strict=True))
        return tuple(rollout(network, 2, tensors[:1], names, case.record, backend="native"))

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(native, leaves)
